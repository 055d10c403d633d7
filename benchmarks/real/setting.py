"""What the long runs share: which sequences there are, on what they run, and what is kept of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import d4s
from d4s.edits import Edit
from d4s.files import write_json
from d4s.locate.covariance import Covariance, covariance_at_subjects, fingerprint_of
from d4s.locate.kept_targets import KeptTargets
from d4s.measure.metrics import Baseline, evaluate, take_baseline
from d4s.methods import METHODS
from d4s.sequence.comparison import Comparison
from d4s.sequence.observers import Observer
from d4s.sequence.result import Result
from d4s.sequence.saving import save_changes
from d4s.study.retained import Retained, untouched

# Label → what differs from the preset. memit-seq is d4s with anchor="current", but for facts that change twice.
SEQUENCES: dict[str, dict[str, Any]] = {
    "d4s": {},
    "d4s-once": {"method": "d4s", "residual": "once"},
    "d4s-current": {"method": "d4s", "anchor": "current"},
    "d4s-long": {"method": "d4s", **METHODS["d4s"].presets["long"]},
    "d4s-long-stop": {"method": "d4s", **METHODS["d4s"].presets["long"], "target_stop": True},
    "d4s-long-stop-looks": {
        "method": "d4s",
        **METHODS["d4s"].presets["long"],
        "target_stop": True,
        "refine_looks": 4,
    },
    "d4s-long-looks": {"method": "d4s", **METHODS["d4s"].presets["long"], "refine_looks": 4},
    "d4s-long-deep": {"method": "d4s", **METHODS["d4s"].presets["long"], "steps": 50, "stop_loss": 0.01},
    "d4s-hold": {"method": "d4s", **METHODS["d4s"].presets["hold"]},
    "d4s-hold-quarter": {"method": "d4s", **METHODS["d4s"].presets["hold"], "prompt_weight": 0.25},
    "d4s-hold-half": {
        "method": "d4s",
        **METHODS["d4s"].presets["hold"],
        "prompt_weight": 0.5,
        "prior_weight": 800.0,
    },
    "d4s-fresh": {"method": "d4s", **METHODS["d4s"].presets["fresh"]},
    "d4s-fresh-c20": {"method": "d4s", **METHODS["d4s"].presets["fresh"], "context_lengths": [20]},
    "d4s-fresh-long": {"method": "d4s", **METHODS["d4s"].presets["long"], "anchor": "current"},
    "d4s-fresh-stop": {"method": "d4s", **METHODS["d4s"].presets["answers"]},
    "memit-seq-prompts": {"method": "d4s", "anchor": "current", "prompt_weight": None},
    "d4s-refined": {"method": "d4s", "refine_looks": 4},
    "d4s-refined-stop": {"method": "d4s", "refine_looks": 4, "target_stop": True},
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
    "nas": {},
    "sphere": {},
    "lyaplock": {},
    "ft-bf": {},
}
COLLAPSE = 0.1
GENERATED = "d4s-generated-1"
FACTS = 200  # that no edit touches
# Fields by which sequences of one method are told apart, and what is not told.
TOLD = {
    "anchor": None,
    "residual": None,
    "context_keys": "mean",
    "context_lengths": (10,),
    "prompt_weight": 0.0,
    "refine_looks": 0,
    "target_stop": False,
    "stop_loss": 0.05,
}


def split(
    edits: list[Edit], count: int, neighbors: int | None, seed: int, *, skip: int = 0
) -> tuple[list[Edit], list[Edit]]:
    """(edits of a seeded order, behind the first `skip`, and facts behind those whose subjects none of them is about).

    neighbors: prompts that an edit keeps; None: all
    """
    order = Random(seed).sample(edits, len(edits))[skip:]
    made = [replace(edit, neighborhood=edit.neighborhood[:neighbors]) for edit in order[:count]]
    return made, untouched(order[count:], made)[:FACTS]


def to_retain(edits: list[Edit], made: list[Edit], facts: list[Edit], count: int) -> list[Edit]:
    """Other facts to be told of: that none of the edits is about, no neighbour asks, and that are not among `facts`."""
    asked = {prompt for edit in made for prompt in edit.neighborhood}
    measured = {fact.subject for fact in facts}
    found = [
        edit
        for edit in untouched(edits, made)
        if edit.subject not in measured and not any(edit.subject in prompt for prompt in asked)
    ]
    return found[:count]


def with_facts(covariance: Covariance, model: Any, tokenizer: Any, facts: list[Edit]) -> Covariance:
    """Half of it of facts that are to stay."""
    return covariance.mixed(covariance_at_subjects(model, tokenizer, facts), 0.5)


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


def sequences_over(
    model: Any,
    tokenizer: Any,
    made: list[Edit],
    labels: Sequence[str],
    covariance: Covariance,
    retained: Retained,
    out: Path,
    *,
    points: Sequence[int],
    seed: int,
    batch_size: int = 1,
    targets: KeptTargets | None = None,
    passes: int = 1,
    observers: Sequence[Observer] = (),
) -> Comparison:
    """A sequence of each label, in `out`: what is there goes on.

    points: edits at which is scored; batch_size: edits a step; targets: of the unedited model, found before
    passes: over the edits
    """
    found = d4s.compare(
        model,
        tokenizer,
        made,
        {label: SEQUENCES[label] for label in labels},
        covariance=covariance,
        targets=targets,
        batch_size=batch_size,
        evaluate_every=points,
        seeds=seed,
        baseline=answers(model, tokenizer, made, out / "baseline.json"),
        measure=retained,
        passes=passes,
        stop_on_collapse=COLLAPSE,
        observers=[Keep(out / "edited", fingerprint_of(model)), *observers],
        out=out / "sequences",
    )
    found.save(out / "sequences")
    return found


def name_of(result: Result) -> str:
    """Of a sequence's files: its method, and what tells it from other sequences of that."""
    fields = result.config | result.config.get("target", {})
    # What a method leaves open by None (prompt_weight) is not what it is without.
    told = {
        name: f"{name}-open" if value is None else value
        for name, usual in TOLD.items()
        if name in fields and (value := fields[name]) != usual
    }
    return "-".join([result.method, *(name if value is True else str(value) for name, value in told.items())])


class Keep(Observer):
    """The weights that each sequence has changed, as it leaves them: for scores that are taken afterwards.

    unedited: the model's fingerprint before any edit
    """

    def __init__(self, folder: Path, unedited: str) -> None:
        self.folder, self.unedited = folder, unedited

    def ended(self, result: Result, error: BaseException | None) -> None:
        if error is None:
            save_changes(result, self.unedited, self.folder / f"{name_of(result)}.safetensors")


class Generate(Observer):
    """What each sequence's model answers freely to some of the edits as the sequence ends: the `_generated` figures.

    An interruption in between costs this alone: the sequence's journal is complete.
    """

    def __init__(self, folder: Path, edits: Sequence[Edit]) -> None:
        self.folder, self.edits = folder, edits

    def ended(self, result: Result, error: BaseException | None) -> None:
        if error is None:
            made = {row["id"] for row in result.edits_table}
            asked = [edit for edit in self.edits if edit.id in made]
            self.take(result.model, result.editor.tokenizer, asked, name_of(result))

    def take(self, model: Any, tokenizer: Any, edits: Sequence[Edit], name: str) -> None:
        """Of the model as it is, unless its file is there."""
        place = self.folder / f"{name}.json"
        if edits and not place.exists():
            found = evaluate(model, tokenizer, edits, generate=True, neighborhood_limit=0, progress=True)
            write_json({"format": GENERATED} | found.to_dict(), place)
