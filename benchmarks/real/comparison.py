"""Single CounterFact edits on a real language model, one sequence per method; what is kept goes on where it was.

python -m benchmarks.real.comparison smollm2 counterfact.json corpus.txt --text held_out.txt --out comparison

Cost on two idle cores, SmolLM2-135M: key statistics 3 minutes; an edit 3 s with d4s, .4 s once its targets are kept,
8 s with methods that search on the weights as they are, 15 s with ROME (20 contexts); a point of 300 edits 2 minutes,
of 1,000 5 minutes. Sequences end one after another, in the order in which they are named, and each is saved as it ends.
The weights that a sequence has changed are kept in OUT/edited. A method of whose edits fewer than a tenth are still the
greedy answer has collapsed, and is not taken further.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import d4s
from d4s.edits import Edit
from d4s.locate.covariance import Covariance, fingerprint_of
from d4s.measure.metrics import Baseline, take_baseline
from d4s.sequence.observers import Observer
from d4s.sequence.result import Result
from d4s.sequence.saving import save_changes
from d4s.study.retained import Retained, untouched

# Label → what differs from the preset. memit-seq is d4s with anchor="current", but for facts that change twice.
SEQUENCES: dict[str, dict[str, str]] = {
    "d4s": {},
    "d4s-once": {"method": "d4s", "residual": "once"},
    "d4s-current": {"method": "d4s", "anchor": "current"},
    "memit": {},
    "memit-seq": {},
    "alphaedit": {},
    "rome": {},
    "emmet": {},
    "encore": {},
    "pmet": {},
    "ft-l": {},
    "ft-m": {},
    "ultraedit": {},
    "grace": {},
    "kn": {},
}
POINTS = (50, 100, 200, 300, 500, 1000, 2000, 5000, 10_000)
COLLAPSE = 0.1
FACTS = 200  # that no edit touches
TOLD = ("anchor", "residual")  # fields by which sequences of one method are told apart
CHARACTERS = 30_000  # of held-out text


def held_out(path: Path) -> list[str]:
    """Its first paragraphs."""
    texts: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if sum(map(len, texts)) >= CHARACTERS:
            break
        if len(line) >= 200:  # no heading
            texts.append(line.strip())
    return texts


def split(edits: list[Edit], count: int, neighbors: int, seed: int) -> tuple[list[Edit], list[Edit]]:
    """(the first edits of a seeded order, facts of the rest whose subjects none of them is about)."""
    order = Random(seed).sample(edits, len(edits))
    made = [replace(edit, neighborhood=edit.neighborhood[:neighbors]) for edit in order[:count]]
    return made, untouched(order[count:], made)[:FACTS]


def statistics(model: Any, tokenizer: Any, corpus: Path, tokens: int, place: Path) -> Covariance:
    if place.exists():
        return Covariance.load(place)
    found = d4s.estimate_covariance(model, tokenizer, corpus, tokens=tokens)
    found.save(place)
    return found


def answers(model: Any, tokenizer: Any, made: list[Edit], place: Path) -> Baseline:
    """The unedited model's."""
    if place.exists():
        return Baseline.load(place)
    found = take_baseline(model, tokenizer, made, progress=True)
    found.save(place)
    return found


class Keep(Observer):
    """The weights that each sequence has changed, as it leaves them: for scores that are taken afterwards.

    unedited: the model's fingerprint before any edit
    """

    def __init__(self, folder: Path, unedited: str) -> None:
        self.folder, self.unedited = folder, unedited

    def ended(self, result: Result, error: BaseException | None) -> None:
        if error is None:
            name = "-".join([result.method, *(str(result.config[n]) for n in TOLD if n in result.config)])
            save_changes(result, self.unedited, self.folder / f"{name}.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("edits", type=Path, help="CounterFact, original or flat")
    parser.add_argument("corpus", type=Path, help="text for the key statistics, one a line")
    parser.add_argument("--text", type=Path, required=True, help="other text, for the perplexity")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument(
        "--neighbors", type=int, default=3, help="neighbourhood prompts an edit that are asked"
    )
    parser.add_argument("--methods", nargs="+", default=list(SEQUENCES), choices=SEQUENCES)
    parser.add_argument("--tokens", type=int, default=50_000, help="key vectors behind the statistics")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    model, tokenizer = d4s.load_model(options.model)
    covariance = statistics(
        model, tokenizer, options.corpus, options.tokens, options.out / "covariance.safetensors"
    )
    made, facts = split(d4s.load_edits(options.edits), options.count, options.neighbors, options.seed)
    found = d4s.compare(
        model,
        tokenizer,
        made,
        {name: SEQUENCES[name] for name in options.methods},
        covariance=covariance,
        evaluate_every=[point for point in POINTS if point <= options.count],
        seeds=options.seed,
        baseline=answers(model, tokenizer, made, options.out / "baseline.json"),
        measure=Retained(model, tokenizer, facts, held_out(options.text), seed=options.seed),
        stop_on_collapse=COLLAPSE,
        observers=[Keep(options.out / "edited", fingerprint_of(model))],
        out=options.out / "sequences",
    )
    found.save(options.out / "sequences")
    print(found.summary())


if __name__ == "__main__":
    main()
