"""Each edit by itself, from the unedited model: the protocol of single edits, beside which a sequence is read."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from d4s import files
from d4s.edits import Edit
from d4s.errors import ConfigError, shown
from d4s.interrupts import ending_signals_raise
from d4s.locate.covariance import Covariance
from d4s.locate.kept_targets import KeptTargets
from d4s.measure.metrics import Baseline, Evaluation, evaluate, evaluation_of, take_baseline
from d4s.methods import Method, Preset, Workbench, method_for, sums_place
from d4s.methods.base import SumsOn
from d4s.models.architectures import Architecture
from d4s.models.causal_lm import CausalLM
from d4s.models.forward import evaluating
from d4s.progress import progress_bar, stage
from d4s.ranks import here
from d4s.sequence.journaling import identity_of
from d4s.sequence.record import read_evaluation, told_chosen
from d4s.sequence.run import check_asked
from d4s.sequence.schedule import Schedule
from d4s.sequence.under_way import made_alike

FORMAT = "d4s-alone-1"
WRITER = "d4s alone"
EVERY = 10.0  # seconds between two times that what has been scored is written


@ending_signals_raise()  # a scheduler's SIGTERM, too, finds the weights back and the rows written
def edit_alone(
    model: CausalLM,
    tokenizer: Any,
    edits: Sequence[Edit],
    *,
    method: str | Method = "d4s",
    config: Mapping[str, Any] | Method | Preset | None = None,
    covariance: Covariance | str | os.PathLike[str] | None = None,
    targets: KeptTargets | str | os.PathLike[str] | None = None,
    batch_size: int = 1,
    neighborhood_limit: int | None = None,
    generate: bool = False,
    baseline: Baseline | None = None,
    architecture: Architecture | None = None,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    sums_on: SumsOn = "auto",
    progress: bool = True,
) -> Evaluation:
    """Makes each edit on the unedited model, scores it, and takes it back, before the next one is made.

    That is what EasyEdit does without `sequential_edit`. What edits do to one another does not show in it;
    `edit_sequence` is for that.

    batch_size: edits that are made, scored and taken back together
    out: JSON file of the figures, written as they are taken; where it is there already, by the same call, it is gone on
        with. None: nowhere
    All others: as of `edit_sequence`.

    Figures are over all edits, each scored right after its own step. The weights come back bit for bit, after an
    error or interruption too. Raises what `edit_sequence` raises before anything is changed, the D4SError of a
    step that fails, and ConfigError if `out` holds figures of something else.
    """
    schedule = Schedule(
        batch_size=batch_size, neighborhood_limit=neighborhood_limit, generate=generate, seed=seed
    )
    edits = tuple(edits)
    bench = Workbench(
        model,
        tokenizer,
        covariance=covariance,
        targets=targets,
        architecture=architecture,
        sums_on=sums_on,
        seed=seed,
        progress=progress,
    )
    configured = method_for(method, bench.anatomy, config)
    check_asked(bench, edits, configured, schedule)
    settings = _settings(bench, edits, configured, schedule)
    kept = _Kept(None if out is None else Path(out), edits, settings, configured)
    if isinstance(config, Preset):
        kept.notes |= dict.fromkeys(config.notes_on(edits))
    with evaluating(model):
        sums_place.on_host(bench, configured, len(edits))
        settled = configured.settled(bench, edits)
        kept.notes |= dict.fromkeys(told_chosen(configured.decided(settled)))
        if baseline is None:
            stage(f"baseline: the unedited model is asked about {len(edits)} edits", shown=progress)
            baseline = take_baseline(model, tokenizer, edits, progress=progress)
        editor = settled.editor(bench)
        editor.announce(edits)
        title = f"{configured.name} alone"
        with progress_bar(len(edits), "edit", title, shown=progress, initial=len(kept.rows)) as bar:
            try:
                for at in range(len(kept.rows), len(edits), batch_size):
                    batch = edits[at : at + batch_size]
                    made_alike(editor, batch)
                    found = evaluate(
                        model,
                        tokenizer,
                        batch,
                        baseline=baseline,
                        generate=generate,
                        neighborhood_limit=neighborhood_limit,
                        seed=seed,
                        check=False,
                    )
                    editor.restore()
                    kept.add(found)
                    bar.update(len(batch))
            finally:
                editor.restore()
                kept.write()
    return kept.evaluation()


def _settings(bench: Workbench, edits: Sequence[Edit], method: Method, schedule: Schedule) -> dict[str, Any]:
    """What decides the figures, as JSON values in one level."""
    told = identity_of(method, bench, edits, schedule)
    config, scheduled = told.pop("config"), told.pop("schedule")
    statistics = bench.statistics_digest(method.value("layers")) if "covariance" in method.needs else None
    return {**told, "statistics": statistics, **scheduled, **config}


class _Kept:
    """The rows so far, and their file."""

    def __init__(
        self, path: Path | None, edits: tuple[Edit, ...], settings: dict[str, Any], method: Method
    ) -> None:
        self.path, self.edits, self.settings, self.method = path, edits, settings, method
        self.rows: list[dict[str, Any]] = []
        self.notes: dict[str, None] = {}
        self.written = time.monotonic()
        self.unwritten = False
        if path is not None:
            self.rows, notes = here().from_first(lambda: self._begun(path))
            self.notes = dict.fromkeys(notes)

    def _begun(self, path: Path) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
        """Rows and notes that are there."""
        if not path.exists():
            files.check_place(path)
            return [], ()
        record = files.read_json(
            path, writer=WRITER, format=FORMAT, fields=("settings", "evaluation"), always_digest=True
        )
        with files.checking(path, WRITER):
            stored = files.as_object(record["settings"], "settings")
            found = read_evaluation(record["evaluation"], "evaluation")
        known = json.loads(json.dumps(self.method.as_known_to(stored)))  # by the version that wrote it
        own = {field.name for field in fields(self.method)}
        for name, value in ({n: v for n, v in self.settings.items() if n not in own} | known).items():
            if stored.get(name) != value:
                raise ConfigError(
                    f"{path} holds figures with another {name} ({shown(stored.get(name))} there, {shown(value)} "
                    "here); name another file, or ask for the same"
                )
        ids = [edit.id for edit in self.edits[: len(found.rows)]]
        if [row["id"] for row in found.rows] != ids:
            raise ConfigError(
                f"{path}: its rows are not those of the first {len(found.rows)} edits; name another file"
            )
        return found.rows, found.notes

    def add(self, found: Evaluation) -> None:
        self.rows += found.rows
        self.notes |= dict.fromkeys(found.notes)
        self.unwritten = True
        if time.monotonic() - self.written >= EVERY:
            self.write()

    def evaluation(self) -> Evaluation:
        return evaluation_of(
            self.rows, self.edits[: len(self.rows)], self.settings["seed"], tuple(self.notes)
        )

    def write(self) -> None:
        if self.path is not None and self.unwritten and here().is_first:
            record = {"settings": self.settings, "evaluation": self.evaluation().to_dict()}
            files.write_json({"format": FORMAT} | record, self.path)
            self.written, self.unwritten = time.monotonic(), False
