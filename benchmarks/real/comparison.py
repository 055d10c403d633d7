"""Single CounterFact edits on a real language model, one sequence per method; what is kept goes on where it was.

python -m benchmarks.real.comparison smollm2 counterfact.json corpus.txt --out comparison [--count 300]

Cost on two idle cores, SmolLM2-135M: key statistics 3 minutes; an edit 3 s with d4s, 8 s with methods that search on
the weights as they are, 15 s with ROME (20 contexts); a point of 300 edits 2 minutes. Sequences end one after another,
the cheapest first, and each is saved as it ends.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import d4s
from d4s.locate.covariance import Covariance

# Label → what differs from the preset. memit-seq is d4s with anchor="current", but for facts that change twice.
SEQUENCES: dict[str, dict[str, str]] = {
    "d4s": {},
    "d4s-once": {"method": "d4s", "residual": "once"},
    "memit": {},
    "rome": {},
    "memit-seq": {},
    "alphaedit": {},
    "d4s-current": {"method": "d4s", "anchor": "current"},
}
POINTS = (50, 100, 200, 300)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("edits", type=Path, help="CounterFact, original or flat")
    parser.add_argument("corpus", type=Path, help="text for the key statistics, one a line")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--methods", nargs="+", default=list(SEQUENCES), choices=SEQUENCES)
    parser.add_argument("--tokens", type=int, default=50_000, help="key vectors behind the statistics")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    model, tokenizer = d4s.load_model(options.model)
    place = options.out / "covariance.safetensors"
    if place.exists():
        covariance = Covariance.load(place)
    else:
        covariance = d4s.estimate_covariance(model, tokenizer, options.corpus, tokens=options.tokens)
        covariance.save(place)
    found = d4s.compare(
        model,
        tokenizer,
        d4s.load_edits(options.edits),
        {name: SEQUENCES[name] for name in options.methods},
        covariance=covariance,
        evaluate_every=[point for point in POINTS if point <= options.count],
        seeds=options.seed,
        shuffle=True,
        count=options.count,
        neighborhood_limit=2,
        out=options.out / "sequences",
    )
    found.save(options.out / "sequences")
    print(found.summary())


if __name__ == "__main__":
    main()
