"""Single edits out of three other data sets on a real language model, one sequence per method and data set; what is
kept goes on where it was.

python -m benchmarks.real.datasets smollm2 EDITS corpus.txt --text held_out.txt --out datasets [--only zsre mquake]

EDITS is a folder with zsre_mend.json, mquake.json, wikibigedit_3k.json, and counterfact.json for the facts that are
asked unedited, the same of all data sets but for subjects that are edited. Each data set has its folder in OUT, made
as `benchmarks.real.comparison` makes its own. A question's efficacy is the share of its target's tokens that are right,
not whether the new answer is likelier than the old; MQuAKE's edits are sentences, scored as CounterFact's, and have no
neighbours, hence no average. Its cases stay whole; two of 429 that contradict an earlier one are left out.

Cost with SmolLM2-135M, beside what `benchmarks.real.comparison` says of edits and points: free generation takes 3 s a
prompt on a core that others use too, and zsRE has three prompts an edit, MQuAKE seven a case. So it is scored once
for each sequence, as it ends, on --generate edits of it (OUT/<data set>/generated): 50
edits take 7 minutes, all 500 an hour.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from random import Random

import d4s
from benchmarks.real.setting import FACTS, SEQUENCES, Generate, sequences_over, statistics
from d4s.edits import Edit
from d4s.study.retained import Retained, paragraphs, untouched

FILES = {"zsre": "zsre_mend.json", "mquake": "mquake.json", "wikibigedit": "wikibigedit_3k.json"}
OF_FACTS = "counterfact.json"
METHODS = ("d4s", "d4s-long", "d4s-once", "memit", "memit-seq", "alphaedit", "rome")
POINTS = (50, 100, 200, 500, 1000, 2000)


def chosen(edits: Sequence[Edit], count: int, seed: int) -> list[Edit]:
    """Up to so many edits, the first of a seeded order of cases: each whole, and none that gives a prompt another
    target than an earlier one does. A record that is no case stands alone."""
    cases: dict[str, list[Edit]] = {}
    for edit in edits:
        cases.setdefault(edit.tags.get("case", edit.id), []).append(edit)
    made: list[Edit] = []
    targets: dict[str, str] = {}
    for case in Random(seed).sample(list(cases.values()), len(cases)):
        if len(made) + len(case) > count:
            break
        if all(targets.get(edit.text, edit.target_new) == edit.target_new for edit in case):
            targets |= {edit.text: edit.target_new for edit in case}
            made += case
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("edits", type=Path, help="folder of the data sets")
    parser.add_argument("corpus", type=Path, help="text for the key statistics, one a line")
    parser.add_argument("--text", type=Path, required=True, help="other text, for the perplexity")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=list(FILES), choices=FILES, help="of the data sets")
    parser.add_argument(
        "--count", type=int, default=500, help="edits of each; of whole cases, so many at most"
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=SEQUENCES)
    parser.add_argument(
        "--passes", type=int, default=1, help="2: what is not the greedy answer at the end is made again"
    )
    parser.add_argument("--generate", type=int, default=50, help="edits answered freely at the end; 0: none")
    parser.add_argument(
        "--covariance", type=Path, help="key statistics, made if not there; default: in --out"
    )
    parser.add_argument("--tokens", type=int, default=50_000, help="key vectors behind the statistics")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    model, tokenizer = d4s.load_model(options.model)
    place = options.covariance or options.out / "covariance.safetensors"
    covariance = statistics(model, tokenizer, options.corpus, options.tokens, place)
    known = d4s.load_edits(options.edits / OF_FACTS)
    known, texts = Random(options.seed).sample(known, len(known)), paragraphs(options.text)
    for name in options.only:
        out = options.out / name
        made = chosen(d4s.load_edits(options.edits / FILES[name]), options.count, options.seed)
        freely = chosen(made, options.generate, options.seed + 1)  # in another order: of any age
        generate = Generate(out / "generated", freely)
        generate.take(model, tokenizer, freely, "unedited")
        found = sequences_over(
            model,
            tokenizer,
            made,
            options.methods,
            covariance,
            Retained(model, tokenizer, untouched(known, made)[:FACTS], texts, seed=options.seed),
            out,
            points=[point for point in POINTS if point <= options.count],
            seed=options.seed,
            passes=options.passes,
            observers=[generate],
        )
        print(f"{name}, {len(made)} edits\n{found.summary()}", flush=True)


if __name__ == "__main__":
    main()
