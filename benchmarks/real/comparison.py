"""CounterFact edits on a real language model, one sequence per method; what is kept goes on where it was.

python -m benchmarks.real.comparison smollm2 counterfact.json corpus.txt --text held_out.txt --out comparison

Cost on two idle cores, SmolLM2-135M: key statistics 3 minutes; an edit 3 s with d4s, .4 s once its targets are kept,
8 s with methods that search on the weights as they are, 15 s with ROME (20 contexts); a point of 300 edits 2 minutes,
of 1,000 5 minutes. Sequences end one after another, in the order in which they are named, and each is saved as it ends.
The weights that a sequence has changed are kept in OUT/edited. A method of whose edits fewer than a tenth are still the
greedy answer has collapsed, and is not taken further.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import d4s
from benchmarks.real.setting import (
    SEQUENCES,
    Generate,
    sequences_over,
    split,
    statistics,
    to_retain,
    with_facts,
)
from d4s.locate.kept_targets import KeptTargets
from d4s.study.retained import Retained, paragraphs

POINTS = (50, 100, 200, 300, 500, 1000, 2000, 5000, 10_000)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("edits", type=Path, help="CounterFact, original or flat")
    parser.add_argument("corpus", type=Path, help="text for the key statistics, one a line")
    parser.add_argument("--text", type=Path, required=True, help="other text, for the perplexity")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=1, help="edits a step, in an OUT of its own")
    parser.add_argument(
        "--neighbors", type=int, default=3, help="neighbourhood prompts an edit that are asked"
    )
    parser.add_argument("--methods", nargs="+", default=list(SEQUENCES), choices=SEQUENCES)
    parser.add_argument("--tokens", type=int, default=50_000, help="key vectors behind the statistics")
    parser.add_argument(
        "--retain",
        type=int,
        metavar="FACTS",
        help="so many other facts make half of the statistics; in an OUT of its own",
    )
    parser.add_argument(
        "--generate",
        action="store_true",
        help="what each sequence's model answers freely to its edits at the end, in OUT/generated",
    )
    parser.add_argument(
        "--passes", type=int, default=1, help="2: what is not the greedy answer at the end is made again"
    )
    parser.add_argument("--targets", type=Path, help="of an earlier run on the same edits and model")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    model, tokenizer = d4s.load_model(options.model)
    covariance = statistics(
        model, tokenizer, options.corpus, options.tokens, options.out / "covariance.safetensors"
    )
    edits = d4s.load_edits(options.edits)
    made, facts = split(edits, options.count, options.neighbors, options.seed)
    if options.retain:
        stay = to_retain(edits, made, facts, options.retain)
        covariance = with_facts(covariance, model, tokenizer, stay)
        print(f"{len(stay)} facts make half of the statistics")
    found = sequences_over(
        model,
        tokenizer,
        made,
        options.methods,
        covariance,
        Retained(model, tokenizer, facts, paragraphs(options.text), seed=options.seed),
        options.out,
        points=[point for point in POINTS if point <= options.count and point % options.batch == 0],
        batch_size=options.batch,
        seed=options.seed,
        targets=None if options.targets is None else KeptTargets.load(options.targets),
        passes=options.passes,
        observers=[Generate(options.out / "generated", made)] if options.generate else [],
    )
    print(found.summary())


if __name__ == "__main__":
    main()
