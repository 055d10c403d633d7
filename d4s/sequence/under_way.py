"""A sequence under way: its steps, the tests right after them, and the points at which all of it is scored."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from d4s.edits import Edit
from d4s.edits.edit import AGAIN, made_again
from d4s.errors import D4SError
from d4s.interrupts import deferred
from d4s.measure.columns import THREE, measured_columns
from d4s.measure.metrics import Evaluation, evaluate
from d4s.measure.routing import routing_change
from d4s.methods import Editor, Step
from d4s.progress import stage
from d4s.ranks import here
from d4s.sequence.observers import Observer
from d4s.sequence.record import Record
from d4s.sequence.result import Result
from d4s.sequence.schedule import Schedule


@dataclass
class Unedited:
    """What is scored before the first edit: no method changes that, so sequences of one order take it once.

    evaluation: None: not taken yet
    rows: by the limit on neighbourhood prompts
    measured: what `measure` gave; None: not taken yet
    """

    evaluation: Evaluation | None = None
    rows: dict[int | None, list[dict[str, Any]]] = field(default_factory=dict)
    measured: dict[str, float] | None = None

    def take(self, evaluation: Evaluation, measured: Mapping[str, float] | None) -> None:
        """From where it was kept."""
        self.evaluation, self.rows[None] = evaluation, evaluation.rows
        if measured is not None:
            self.measured = dict(measured)

    def take_from(self, record: Record) -> None:
        """From a sequence that has ended, over the same edits."""
        if record.history and not record.history[0]["step"]:
            first = record.history[0]
            self.take(record.evaluations[0], {name: first[name] for name in record.measured})


class Run:
    """A sequence under way: clocks, and the tests right after each step."""

    def __init__(self, result: Result, schedule: Schedule, progress: bool, unedited: Unedited) -> None:
        self.result, self.schedule, self.progress = result, schedule, progress
        self.unedited = unedited
        self.began = time.perf_counter()
        self.edit_seconds = 0.0
        self.right_after: dict[str, list[float]] = {"efficacy": [], "paraphrase": []}
        self.norms_before = result.editor.weights.mean_absolute()

    def steps(self, observers: Observer) -> None:
        """All steps, and the points that are due behind them: the edits, then in each pass those of them that the point
        behind the pass before has found not to be the greedy answer, or not to end where they should."""
        made, edits = 0, self.result.edits
        for number in range(1, self.schedule.passes + 1):
            if number > 1:
                edits = self._lost(made, number)
                told = (
                    f"pass {number}: {len(edits)} of {len(self.result.edits)} edits are not the greedy answer"
                    f"{', or do not end behind it' if self._ends_targets else ''}"
                )
                stage(f"{self.result.method}: {told}", shown=self.progress)
                observers.again(self.result, edits)
            if not edits or not self._pass(edits, made, observers):
                return
            made += len(edits)
            if number < self.schedule.passes and self._has_collapsed(made):
                return

    def _lost(self, made: int, number: int) -> tuple[Edit, ...]:
        """To be made again in a pass, by the point after `made` edits: of several edits of a prompt the last one."""
        result = self.result
        at = [row["step"] for row in result.history].index(made)
        left = {row["id"] for row in result.evaluations[at].rows if not _is_written(row)}
        last = {edit.place: edit.id for edit in result.edits}
        standing = [edit for edit in result.edits if last[edit.place] == edit.id]
        return tuple(made_again(edit, number) for edit in standing if edit.id in left)

    @property
    def _ends_targets(self) -> bool:
        """Whether the method writes, behind a target, that the answer ends there."""
        method = self.result.editor.method
        return bool(method.value("target_eos") or method.value("target_stop"))

    def _note_ends(self, edits: Sequence[Edit], evaluation: Evaluation) -> None:
        """`ended` in the row of each edit that is the greedy answer: whether the model, asked freely, says it alone."""
        rows = {row["id"]: row for row in evaluation.rows if row.get("efficacy_argmax") == 1}
        if not self.schedule.generate and rows:  # else they were asked freely already
            asked = [replace(edit, paraphrases=(), portability=()) for edit in edits if edit.id in rows]
            evaluation = self._evaluate(asked, 0, freely=True)
        for found in evaluation.rows:
            if found["id"] in rows and (exact := found.get("efficacy_exact")) is not None:
                rows[found["id"]]["ended"] = exact

    def _pass(self, edits: Sequence[Edit], begin: int, observers: Observer) -> bool:
        """Steps over these edits; whether they came to their end. begin: edits made before"""
        result, schedule, made = self.result, self.schedule, begin
        done, end = len(result.edits_table), begin + len(edits)
        for batch in schedule.batches(edits):
            if made < done:  # by the sequence that this one goes on with
                before, made = made, made + len(batch)
                if made == done and self._lacks_point(before, made, end):
                    self.point(made)
                    observers.point(result)
                if made < end and self._has_collapsed(made):
                    return False
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
                return False
            before, made = made, made + len(batch)
            if self._lacks_point(before, made, end):
                self.point(made)
                observers.point(result)
            if made < end and self._has_collapsed(made):
                return False
        return True

    def _has_collapsed(self, made: int) -> bool:
        """Whether the last point lies here, and is one that the schedule lets no step follow."""
        result = self.result
        if result.history[-1]["step"] != made:
            return False
        why = self.schedule.collapse(result.history[-1])
        if why is not None:
            result.failure = f"after edit {made}: {why}"
        return why is not None

    def _lacks_point(self, before: int, made: int, end: int) -> bool:
        due = made == end or self.schedule.is_due(before, made)
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
        if AGAIN not in batch[0].tags:  # what is made again was right, or not, after its own step
            for name, values in self.right_after.items():
                values += [row[name] for row in now.rows if row.get(name) is not None]
        observers.tested(self.result, batch, now.rows)

    def _make(self, batch: Sequence[Edit]) -> None:
        """The step and its rows: both, or neither."""
        result, began = self.result, time.perf_counter()
        before, step = len(result.edits_table), None
        try:
            with result.editor.weights.all_or_nothing():
                step = made_alike(result.editor, batch)
                for device in {weight.device for weight in result.editor.weights.base.values()}:
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)
                made = before + len(batch)
                rows = table_rows(batch, made)
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

    def _evaluate(
        self, edits: Sequence[Edit], limit: int | None, only_edited: bool = False, freely: bool = False
    ) -> Evaluation:
        return evaluate(
            self.result.model,
            self.result.editor.tokenizer,
            edits,
            baseline=self.result.baseline,
            generate=freely or (self.schedule.generate and not only_edited),
            neighborhood_limit=limit,
            portability=not only_edited,
            seed=self.schedule.seed,
            check=False,
            progress=self.progress and not only_edited,
        )

    def _before_any(self) -> Evaluation:
        """Of all edits that are to be made, and their rows with fewer neighbourhood prompts, which have a level of
        their own."""
        unedited, edits, fewer = self.unedited, self.result.edits, self.schedule.neighborhood_limit
        if unedited.evaluation is None:
            method = self.result.method
            stage(f"{method}: the unedited model is scored on {len(edits)} edits", shown=self.progress)
            unedited.take(self._evaluate(edits, None), None)
        if fewer not in unedited.rows:
            unedited.rows[fewer] = self._evaluate(edits, fewer, only_edited=True).rows
        assert unedited.evaluation is not None
        return unedited.evaluation

    def _levels_before(self, made: int, limit: int | None) -> dict[str, float]:
        """Shares of the unedited model on the edits made so far, whose own level may differ from that of all."""
        rows, found = self.unedited.rows[limit][:made], {}
        for name in (*THREE, *(f"{name}_argmax" for name in THREE)):
            values = [row[name] for row in rows if row.get(name) is not None]
            if values:
                found[f"{name}.unedited"] = sum(values) / len(values)
        if all(f"{name}.unedited" in found for name in THREE):
            found["average.unedited"] = sum(found[f"{name}.unedited"] for name in THREE) / len(THREE)
        return found

    def _routing_change(self, edits: Sequence[Edit]) -> float | None:
        """Of the edits' neighbours; None for a model without experts above the lowest edited layer."""
        editor = self.result.editor
        if not editor.anatomy.has_experts:
            return None
        prompts = [prompt for edit in edits for prompt in edit.neighborhood]
        return routing_change(
            editor.anatomy,
            editor.tokenizer,
            prompts,
            editor.weights.layers[0],
            editor.weights.at_base,
            self.schedule.seed,
        )

    def point(self, made: int, *, ended: bool = False) -> None:
        """One history row: all edits made so far; before the first, all that are to be made.

        ended: no other point follows
        """
        result, weights, unedited = self.result, self.result.editor.weights, self.unedited
        scored = result.edits[:made] if made else result.edits
        limit = None if ended else self.schedule.limit(made, len(result.edits))
        evaluation = self._evaluate(scored, limit) if made else self._before_any()
        if made >= len(result.edits) and self._ends_targets:
            self._note_ends(scored, evaluation)
        row: dict[str, Any] = {"step": made}
        for name, metric in evaluation.metrics.items():
            row[name] = metric.mean
            row |= {f"{name}.low": metric.low, f"{name}.high": metric.high}
        for name, values in self.right_after.items():
            if values:
                row[f"original_{name}"] = sum(values) / len(values)
        if made:
            row |= self._levels_before(made, limit)
        norms, changes = weights.mean_absolute(), weights.delta_norm()
        row["l1_growth"] = sum(norms[i] / self.norms_before[i] - 1 for i in norms) / len(norms)
        row |= {f"l1_norm.{i}": norm for i, norm in norms.items()}
        row |= {f"delta_norm.{i}": norm for i, norm in changes.items()}
        if (moved := self._routing_change(scored)) is not None:
            row["routing_change"] = moved
        row["seconds"] = time.perf_counter() - self.began
        row["edit_seconds"] = self.edit_seconds
        if (measure := self.schedule.measure) is not None:
            given = unedited.measured if not made else None
            if given is None:
                given = dict(here().from_first(measure))
            if not made:
                unedited.measured = given
            row |= given
            result.columns |= measured_columns(given, measure)
        result.history.append(row)
        result.evaluations.append(evaluation)


def _is_written(row: Mapping[str, Any]) -> bool:
    """Whether an edit need not be made again, by its row of an evaluation."""
    return row.get("efficacy_argmax") in (None, 1) and row.get("ended") in (None, 1)


def table_rows(batch: Sequence[Edit], made: int) -> list[dict[str, Any]]:
    """Rows of `edits_table` of a step, without its figures. made: edits with those of the step"""
    rows: list[dict[str, Any]] = [{"id": edit.id, "step": made} for edit in batch]
    for row, edit in zip(rows, batch, strict=True):
        if AGAIN in edit.tags:
            row[AGAIN] = edit.tags[AGAIN]
    return rows


def made_alike(editor: Editor, batch: Sequence[Edit]) -> Step:
    """A step: in all processes or, where it fails in one, in none; then all hold the same weights, bit for bit."""
    ranks = here()
    if ranks.count == 1:
        return editor.edit(batch)
    made: list[Step] = []

    def edit() -> str:
        made.append(editor.edit(batch))
        return repr((editor.weights.norms().tolist(), made[0]))

    try:
        found = ranks.gather("step", edit)
        if len(set(found)) > 1:
            step, state = ranks.from_first(lambda: (made[0], EditorState.of(editor)))
            if not ranks.is_first:
                state.put_into(editor)
            return step
    except BaseException:
        if made:  # here, and not everywhere: the caller takes it back
            editor.tear()
        raise
    return made[0]


@dataclass(frozen=True)
class EditorState:
    """All of an editor that another process needs to have the same bits; on the CPU.

    weights: beside the snapshot, from which another kind of machine might write others
    """

    snapshot: dict[str, Tensor]
    weights: dict[int, Tensor]
    norms: Tensor

    @classmethod
    def of(cls, editor: Editor) -> EditorState:
        snapshot = {name: tensor.cpu() for name, tensor in editor.snapshot().items()}
        weights = {layer: weight.cpu() for layer, weight in editor.weights.current().items()}
        return cls(snapshot, weights, editor.weights.norms())

    def put_into(self, editor: Editor) -> None:
        editor.resume_(self.snapshot)
        editor.weights.load_(self.weights)
        editor.weights.set_norms(self.norms)
