"""Edits one after another, with everything that is measured on the way."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from d4s.edits import Edit, check_batch, check_sequence
from d4s.errors import ConfigError, D4SError, EditingFailed, EditingStopped
from d4s.interrupts import deferred
from d4s.locate.covariance import Covariance
from d4s.locate.kept_targets import KeptTargets
from d4s.measure.columns import THREE, measured_columns
from d4s.measure.metrics import Baseline, Evaluation, evaluate, take_baseline
from d4s.methods import Editor, Method, Workbench, method_for
from d4s.methods.locate_then_edit import TargetMethod
from d4s.models.architectures import Architecture
from d4s.models.causal_lm import CausalLM
from d4s.models.forward import evaluating
from d4s.models.prompts import subject_row
from d4s.models.readiness import check_ready
from d4s.progress import stage
from d4s.sequence.observers import Bar, Observer, Observers
from d4s.sequence.record import Record
from d4s.sequence.schedule import Measure, Schedule

if TYPE_CHECKING:
    from d4s.sequence.journaling import Journaling


@dataclass(kw_only=True)
class Result(Record):
    """What a sequence did, with the model as it is now.

    model: the edited model, the object that went in
    edits: all that were to be made
    editor: goes on from here, or restores the original weights
    baseline: the unedited model's answers
    """

    model: CausalLM
    edits: tuple[Edit, ...]
    editor: Editor
    baseline: Baseline

    def restore(self) -> None:
        """The original weights back, bit for bit."""
        self.editor.restore()

    def consolidate(self) -> None:
        """Solves anew for all the edits made, as one batch from the original weights; only D4S can.

        Keys at upper layers, which later edits below them had made stale, are fresh afterwards. The history is of
        the model before it: `evaluate` scores the new one. A failure leaves weights and sums as they were.
        Raises ConfigError for an editor of another method, and if no edit has been made.
        """
        made = {row["id"] for row in self.edits_table}
        again = getattr(self.editor, "consolidate", None)
        if again is None:
            raise ConfigError(f"{self.method} keeps nothing to consolidate; d4s does")
        if not made:
            raise ConfigError("no edit has been made, so there is nothing to consolidate")
        with evaluating(self.model):
            again([edit for edit in self.edits if edit.id in made])

    def record(self) -> Record:
        """The measurements alone, which hold no weight."""
        return Record(
            self.method,
            self.config,
            self.history,
            self.edits_table,
            self.evaluations,
            self.failure,
            self.chosen,
            self.columns,
        )


def consolidate(result: Result) -> None:
    """`Result.consolidate`, as a function."""
    result.consolidate()


def edit_sequence(
    model: CausalLM,
    tokenizer: Any,
    edits: Sequence[Edit],
    *,
    method: str | Method = "d4s",
    config: Mapping[str, Any] | Method | None = None,
    covariance: Covariance | str | os.PathLike[str] | None = None,
    targets: KeptTargets | str | os.PathLike[str] | None = None,
    batch_size: int = 1,
    evaluate_every: int | Collection[int] | None = None,
    neighborhood_limit: int | None = None,
    original: bool = True,
    generate: bool = False,
    measure: Measure | None = None,
    stop_at_failure: bool = False,
    baseline: Baseline | None = None,
    architecture: Architecture | None = None,
    seed: int = 0,
    journal: str | os.PathLike[str] | None = None,
    keep_vectors: bool = True,
    observers: Sequence[Observer] = (),
    progress: bool = True,
) -> Result:
    """Makes the edits in order, `batch_size` a step, in place, and measures as it goes.

    model: a transformers causal language model, float32 | float16 | bfloat16, CPU or CUDA
    edits: in the order they are to be made; a later edit may change a fact that an earlier one has changed
    method: a name from `d4s.methods()`, or a configured method
    config: fields that differ from the preset, as {"prior_weight": 2e4, "steps": 30}; or a whole configuration
    covariance: key statistics of the unedited model, or their file; None: estimated on text that the model
        samples, and cached
    targets: of the unedited model, found before (d4s targets), or their file; those of edits that are not among them
        are searched, and added to a `KeptTargets`. For methods that search on the unedited model: d4s, anchor="base"
    evaluate_every: edits between evaluations, or the numbers of edits after which to evaluate, as {100, 500};
        each scores ALL edits made so far. None: only at the end
    neighborhood_limit: neighbourhood prompts an edit that are scored at the points between the first and the
        last; None: all
    original: also test each edit right after its own step
    generate: also score free generation
    measure: called at each evaluation point while the model holds the edits; its figures join the history row.
        Its attribute `columns`, a mapping name → `measure.columns.Column`, says what they are; without it those named
        "<task> acc" or as another accuracy are shown in percent, others as they are
    stop_at_failure: a step that fails, also for want of device memory, ends the sequence instead of raising;
        `Result.failure` says why
    baseline: the unedited model's answers to these edits, where they have been taken before
    seed: of contexts, samples and intervals; same seed, same machine: same result
    journal: folder in which the sequence is kept as it is made (docs/formats/journal.md): what was done is durable, and
        the same call goes on in it after an interruption; None: nowhere
    keep_vectors: whether the journal keeps keys and residuals, without which no single edit can be taken back
    observers: told of each step and point while it happens (`d4s.Observer`)

    Raises a D4SError before anything is changed if an edit, the model, the statistics or an argument is not
    right. A step that fails leaves the weights as the step before it left them. What breaks a sequence off that has
    begun is raised as EditingFailed or, by Ctrl-C or a signal, EditingStopped: both are EditingInterrupted, with the
    cause behind them and the Result so far as `result`, whose `restore()` is the way back.
    """
    schedule = Schedule(
        batch_size=batch_size,
        evaluate_every=evaluate_every,
        neighborhood_limit=neighborhood_limit,
        original=original,
        generate=generate,
        measure=measure,
        stop_at_failure=stop_at_failure,
        seed=seed,
    )
    if isinstance(covariance, (str, os.PathLike)):
        covariance = Covariance.load(covariance)
    if isinstance(targets, (str, os.PathLike)):
        targets = KeptTargets.load(targets)
    bench = Workbench(
        model,
        tokenizer,
        covariance=covariance,
        targets=targets,
        architecture=architecture,
        seed=seed,
        progress=progress,
    )
    configured = method_for(method, bench.anatomy, config)
    kept = None
    if journal is not None:
        from d4s.sequence.journaling import Journaling

        kept = Journaling(journal, keep_vectors=keep_vectors)
    return run(bench, edits, configured, schedule, baseline=baseline, journal=kept, observers=observers)


def run(
    bench: Workbench,
    edits: Sequence[Edit],
    method: Method,
    schedule: Schedule,
    *,
    baseline: Baseline | None = None,
    journal: Journaling | None = None,
    observers: Sequence[Observer] = (),
) -> Result:
    """`edit_sequence`, where the workbench, the configuration and the schedule are there already."""
    edits = tuple(edits)
    try:
        _check(bench, edits, method, schedule)
        with evaluating(bench.model):
            under_way = _begun(bench, edits, method, schedule, baseline, journal)
    except BaseException:
        if journal is not None:
            journal.close()
        raise
    result = under_way.result
    with evaluating(bench.model):
        told = Observers([Bar(shown=bench.progress), *([] if journal is None else [journal]), *observers])
        try:
            told.began(result)
            under_way.steps(told)
        except BaseException as error:
            why = str(error) or type(error).__name__
            result.failure = result.failure or f"after edit {len(result.edits_table)}: {why}"
            told.ended(result, error)
            stopped = isinstance(error, KeyboardInterrupt)
            raise (EditingStopped if stopped else EditingFailed)(result.failure, result) from error
        told.ended(result, None)
    return result


def _begun(
    bench: Workbench,
    edits: tuple[Edit, ...],
    method: Method,
    schedule: Schedule,
    baseline: Baseline | None,
    journal: Journaling | None,
) -> Run:
    """The sequence with its unedited model scored, or as far as its journal goes."""
    model, shown = bench.model, bench.progress
    if journal is not None:
        journal.check(method, bench, edits, schedule)
    settled = method.settled(bench, edits) if journal is None else journal.settled(method, bench, edits)
    if journal is not None and settled.searches_ahead:
        bench.targets = journal.targets(bench.targets)
    editor = settled.editor(bench)
    if baseline is None and journal is not None:
        baseline = journal.baseline()
    if baseline is None:
        stage(f"baseline: the unedited model is asked about {len(edits)} edits", shown=shown)
        baseline = take_baseline(model, bench.tokenizer, edits, progress=shown)
    fields, decided = asdict(method), asdict(settled)
    result = Result(
        method.name,
        fields,
        chosen={name: value for name, value in decided.items() if value != fields[name]},
        model=model,
        edits=edits,
        editor=editor,
        baseline=baseline,
    )
    under_way = Run(result, schedule, shown)
    if journal is not None:
        journal.open(result, method, bench, schedule)
    editor.announce(edits)
    try:
        if journal is not None:
            journal.restore(under_way)
        if not result.history:
            stage(f"{method.name}: the unedited model is scored on {len(edits)} edits", shown=shown)
            under_way.point(0)
    except BaseException:
        editor.restore()
        raise
    stage(f"{method.name}: {len(edits)} edits, {schedule.batch_size} a step", shown=shown)
    return under_way


def _check(bench: Workbench, edits: Sequence[Edit], method: Method, schedule: Schedule) -> None:
    """Raises what `edit_sequence` raises before anything is changed."""
    if not edits:
        raise ConfigError("no edits were given")
    check_sequence(edits)
    for batch in schedule.batches(edits):
        check_batch(batch)
    if bench.targets is not None and not method.searches_ahead:
        raise ConfigError(
            f"targets: {method.name} searches its targets on the weights as they are, so none of the unedited "
            "model can be given; d4s with anchor='base' takes them"
        )
    check_ready(bench.model, bench.tokenizer, edits)
    if isinstance(method, TargetMethod):
        for edit in edits:
            subject_row(bench.tokenizer, edit.prompt, edit.subject)


class Run:
    """A sequence under way: clocks, and the tests right after each step."""

    def __init__(self, result: Result, schedule: Schedule, progress: bool) -> None:
        self.result, self.schedule, self.progress = result, schedule, progress
        self.began = time.perf_counter()
        self.edit_seconds = 0.0
        self.right_after: dict[str, list[float]] = {"efficacy": [], "paraphrase": []}
        self.rows_before: dict[int | None, list[dict[str, Any]]] = {}  # by the limit on neighbourhood prompts
        self.unedited = result.editor.weights.mean_absolute()

    def steps(self, observers: Observer) -> None:
        """All steps, and the points that are due behind them."""
        result, schedule, made = self.result, self.schedule, 0
        done = len(result.edits_table)
        for batch in schedule.batches(result.edits):
            if made < done:  # by the sequence that this one goes on with
                before, made = made, made + len(batch)
                if made == done and self._lacks_point(before, made):
                    self.point(made)
                    observers.point(result)
                continue
            try:
                self.step(batch, observers)
            except (D4SError, torch.OutOfMemoryError) as error:
                made = len(result.edits_table)  # the step itself may have been made
                result.failure = f"edit {made + 1}: {error}"
                if not schedule.stop_at_failure:
                    raise
                if made and result.history[-1]["step"] != made:
                    self.point(made, ended=True)
                    observers.point(result)
                return
            before, made = made, made + len(batch)
            if self._lacks_point(before, made):
                self.point(made)
                observers.point(result)

    def _lacks_point(self, before: int, made: int) -> bool:
        due = made == len(self.result.edits) or self.schedule.is_due(before, made)
        return due and self.result.history[-1]["step"] != made

    def step(self, batch: Sequence[Edit], observers: Observer) -> None:
        with deferred():  # an interruption finds the weights, the rows and the observers of the same edits
            self._make(batch)
            observers.step(self.result, batch)
        if self.schedule.original:
            self.test(batch, observers)

    def test(self, batch: Sequence[Edit], observers: Observer) -> None:
        """The edits of the last step, right after it."""
        now = self._evaluate(batch, limit=0, only_edited=True)
        for table_row, found in zip(self.result.edits_table[-len(batch) :], now.rows, strict=True):
            table_row["written_probability"] = found["target_probability"]
        for name, values in self.right_after.items():
            values += [row[name] for row in now.rows if row.get(name) is not None]
        observers.tested(self.result, batch, now.rows)

    def _make(self, batch: Sequence[Edit]) -> None:
        """The step and its rows: both, or neither."""
        result, began = self.result, time.perf_counter()
        before, step = len(result.edits_table), None
        try:
            with result.editor.weights.all_or_nothing():
                step = result.editor.edit(batch)
                if result.editor.anatomy.device.type == "cuda":
                    torch.cuda.synchronize()
                made = before + len(batch)
                rows: list[dict[str, Any]] = [{"id": edit.id, "step": made} for edit in batch]
                if step.first_probability:
                    for i, row in enumerate(rows):
                        row["first_probability"] = step.first_probability[i]
                        row["last_probability"] = step.last_probability[i]
                result.edits_table += rows
        except BaseException:
            del result.edits_table[before:]
            if step is not None:  # it was made, and its weights are taken back
                result.editor.tear()
            raise
        self.edit_seconds += time.perf_counter() - began

    def _evaluate(self, edits: Sequence[Edit], limit: int | None, only_edited: bool = False) -> Evaluation:
        return evaluate(
            self.result.model,
            self.result.editor.tokenizer,
            edits,
            baseline=self.result.baseline,
            generate=self.schedule.generate and not only_edited,
            neighborhood_limit=limit,
            portability=not only_edited,
            seed=self.schedule.seed,
            check=False,
            progress=self.progress and not only_edited,
        )

    def _unedited(self, made: int, limit: int | None) -> dict[str, float]:
        """Shares of the unedited model on the edits made so far, whose own level may differ from that of all."""
        rows, found = self.rows_before[limit][:made], {}
        for name in (*THREE, *(f"{name}_argmax" for name in THREE)):
            values = [row[name] for row in rows if row.get(name) is not None]
            if values:
                found[f"{name}.unedited"] = sum(values) / len(values)
        if all(f"{name}.unedited" in found for name in THREE):
            found["average.unedited"] = sum(found[f"{name}.unedited"] for name in THREE) / len(THREE)
        return found

    def point(self, made: int, *, ended: bool = False) -> None:
        """One history row: all edits made so far; before the first, all that are to be made.

        ended: no other point follows
        """
        result, weights = self.result, self.result.editor.weights
        scored = result.edits[:made] if made else result.edits
        limit = None if ended else self.schedule.limit(made, len(result.edits))
        evaluation = self._evaluate(scored, limit)
        row: dict[str, Any] = {"step": made}
        for name, metric in evaluation.metrics.items():
            row[name] = metric.mean
            row |= {f"{name}.low": metric.low, f"{name}.high": metric.high}
        for name, values in self.right_after.items():
            if values:
                row[f"original_{name}"] = sum(values) / len(values)
        if made:
            row |= self._unedited(made, limit)
        else:
            self.rows_before[None] = evaluation.rows
            if (
                fewer := self.schedule.neighborhood_limit
            ) is not None:  # these prompts have a level of their own
                self.rows_before[fewer] = self._evaluate(scored, fewer, only_edited=True).rows
        norms, changes = weights.mean_absolute(), weights.delta_norm()
        row["l1_growth"] = sum(norms[i] / self.unedited[i] - 1 for i in norms) / len(norms)
        row |= {f"l1_norm.{i}": norm for i, norm in norms.items()}
        row |= {f"delta_norm.{i}": norm for i, norm in changes.items()}
        row["seconds"] = time.perf_counter() - self.began
        row["edit_seconds"] = self.edit_seconds
        if (measure := self.schedule.measure) is not None:
            row |= (given := measure())
            result.columns |= measured_columns(given, measure)
        result.history.append(row)
        result.evaluations.append(evaluation)
