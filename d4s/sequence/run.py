"""Edits one after another, with everything that is measured on the way."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from d4s.edits import Edit, check_batch, check_sequence
from d4s.errors import ConfigError, D4SError
from d4s.interrupts import deferred
from d4s.locate.covariance import Covariance
from d4s.locate.kept_targets import KeptTargets
from d4s.measure.columns import THREE, measured_columns
from d4s.measure.metrics import Baseline, Evaluation, evaluate, take_baseline
from d4s.methods import Editor, Method, Workbench, method_for
from d4s.methods.locate_then_edit import TargetMethod
from d4s.models.architectures import Architecture
from d4s.models.forward import evaluating
from d4s.models.prompts import subject_row
from d4s.models.readiness import check_ready
from d4s.progress import progress_bar, stage
from d4s.sequence.record import Record

if TYPE_CHECKING:
    pass


@dataclass(kw_only=True)
class Result(Record):
    """What a sequence did, with the model as it is now.

    model: the edited model, the object that went in
    edits: all that were to be made
    editor: goes on from here, or restores the original weights
    baseline: the unedited model's answers
    """

    model: Any
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
    model: Any,
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
    measure: Callable[[], Mapping[str, float]] | None = None,
    stop_at_failure: bool = False,
    baseline: Baseline | None = None,
    architecture: Architecture | None = None,
    seed: int = 0,
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

    Raises a D4SError before anything is changed if an edit, the model, the statistics or an argument is not
    right. A step that fails leaves the weights as the step before it left them; whatever is raised after the
    first edit carries the Result so far as its attribute `result`, whose `restore()` is the way back.
    """
    edits = tuple(edits)
    if not edits:
        raise ConfigError("no edits were given")
    points = evaluate_every if isinstance(evaluate_every, Collection) else ()
    every = None if isinstance(evaluate_every, Collection) else evaluate_every
    for name, value in (
        ("batch_size", batch_size),
        ("evaluate_every", every),
        *(("evaluate_every", p) for p in points),
    ):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name}={value!r}, must be a whole number from 1 on")
    check_sequence(edits)
    batches = [edits[i : i + batch_size] for i in range(0, len(edits), batch_size)]
    for batch in batches:
        check_batch(batch)
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
    if targets is not None and not configured.searches_ahead:
        raise ConfigError(
            f"targets: {configured.name} searches its targets on the weights as they are, so none of the unedited "
            "model can be given; d4s with anchor='base' takes them"
        )
    check_ready(model, tokenizer, edits)
    if isinstance(configured, TargetMethod):
        for edit in edits:
            subject_row(tokenizer, edit.prompt, edit.subject)
    with evaluating(model):
        settled = configured.settled(bench, edits)
        editor = settled.editor(bench)
        if baseline is None:
            stage(f"baseline: the unedited model is asked about {len(edits)} edits", shown=progress)
            baseline = take_baseline(model, tokenizer, edits, progress=progress)
        fields, decided = asdict(configured), asdict(settled)
        result = Result(
            configured.name,
            fields,
            chosen={name: value for name, value in decided.items() if value != fields[name]},
            model=model,
            edits=edits,
            editor=editor,
            baseline=baseline,
        )
        run = _Run(result, neighborhood_limit, generate, measure, seed, progress)
        stage(f"{configured.name}: the unedited model is scored on {len(edits)} edits", shown=progress)
        run.point(0, last=False)
        stage(f"{configured.name}: {len(edits)} edits, {batch_size} a step", shown=progress)
        editor.announce(edits)
        made = 0
        try:
            with progress_bar(len(edits), "edit", configured.name, shown=progress) as bar:
                for batch in batches:
                    try:
                        run.step(batch, original)
                    except (D4SError, torch.OutOfMemoryError) as error:
                        made = len(result.edits_table)  # the step itself may have been made
                        result.failure = f"edit {made + 1}: {error}"
                        if not stop_at_failure:
                            raise
                        if made and result.history[-1]["step"] != made:
                            run.point(made, last=True)
                        break
                    before, made = made, made + len(batch)
                    bar.update(len(batch))
                    due = every is not None and made // every > before // every
                    due |= any(before < point <= made for point in points)
                    if due or made == len(edits):
                        run.point(made, last=made == len(edits))
                        shown = {k: f"{v:.3f}" for k, v in result.history[-1].items() if k == "average"}
                        bar.set_postfix(
                            shown, refresh=False
                        )  # at its next turn: a log has a line every so often
        except BaseException as error:
            why = str(error) or type(error).__name__
            result.failure = result.failure or f"after edit {len(result.edits_table)}: {why}"
            error.result = result  # type: ignore[attr-defined]
            raise
    return result


class _Run:
    """A sequence under way: clocks, and the tests right after each step."""

    def __init__(
        self,
        result: Result,
        neighborhood_limit: int | None,
        generate: bool,
        measure: Callable[[], Mapping[str, float]] | None,
        seed: int,
        progress: bool,
    ) -> None:
        self.result, self.limit, self.generate, self.seed = result, neighborhood_limit, generate, seed
        self.measure, self.progress = measure, progress
        self.began = time.perf_counter()
        self.edit_seconds = 0.0
        self.right_after: dict[str, list[float]] = {"efficacy": [], "paraphrase": []}
        self.rows_before: dict[int | None, list[dict[str, Any]]] = {}  # by the limit on neighbourhood prompts
        self.unedited = result.editor.weights.mean_absolute()

    def step(self, batch: Sequence[Edit], original: bool) -> None:
        with deferred():  # an interruption finds the weights and the rows of the same edits
            self._make(batch)
        if original:
            now = self._evaluate(batch, limit=0, only_edited=True)
            for table_row, found in zip(self.result.edits_table[-len(batch) :], now.rows, strict=True):
                table_row["written_probability"] = found["target_probability"]
            for name, values in self.right_after.items():
                values += [row[name] for row in now.rows if row.get(name) is not None]

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
            generate=self.generate and not only_edited,
            neighborhood_limit=limit,
            portability=not only_edited,
            seed=self.seed,
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

    def point(self, made: int, *, last: bool) -> None:
        """One history row: all edits made so far; before the first, all that are to be made."""
        result, weights = self.result, self.result.editor.weights
        scored = result.edits[:made] if made else result.edits
        limit = None if last or not made else self.limit
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
            if self.limit is not None:  # fewer prompts have a level of their own
                self.rows_before[self.limit] = self._evaluate(scored, self.limit, only_edited=True).rows
        norms, changes = weights.mean_absolute(), weights.delta_norm()
        row["l1_growth"] = sum(norms[i] / self.unedited[i] - 1 for i in norms) / len(norms)
        row |= {f"l1_norm.{i}": norm for i, norm in norms.items()}
        row |= {f"delta_norm.{i}": norm for i, norm in changes.items()}
        row["seconds"] = time.perf_counter() - self.began
        row["edit_seconds"] = self.edit_seconds
        if self.measure is not None:
            row |= (given := self.measure())
            result.columns |= measured_columns(given, self.measure)
        result.history.append(row)
        result.evaluations.append(evaluation)
