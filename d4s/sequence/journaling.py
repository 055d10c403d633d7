"""A sequence that is kept in a journal as it is made, and goes on in it after an interruption."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d4s.change.closed_form import ClosedForm, Rows
from d4s.change.expert_form import JointForm
from d4s.edits import Edit
from d4s.edits.edit import AGAIN, pass_of
from d4s.errors import ConfigError, D4SError, DataError, EditingFailed, shown
from d4s.files import as_list, as_text, check_folder, checking, finite_or_none
from d4s.journal.folder import (
    SAME,
    SNAPSHOTS_KEPT,
    Folder,
    differing,
    digest_of,
    now,
)
from d4s.journal.sums import Segments, edits_of, numbered, packed
from d4s.locate.covariance import fingerprint_of
from d4s.locate.kept_targets import KeptTargets
from d4s.locate.targets import Targets
from d4s.measure.columns import measured_columns
from d4s.measure.metrics import Baseline, Evaluation
from d4s.methods import Editor, Method, Workbench
from d4s.methods.d4s import D4SEditor
from d4s.models.loading import source_of
from d4s.models.prompts import tokenizer_fingerprint
from d4s.progress import progress_bar, stage
from d4s.sequence.observers import Observer
from d4s.sequence.record import Record, read_evaluation, read_history_row
from d4s.sequence.result import Result
from d4s.sequence.schedule import Schedule
from d4s.sequence.under_way import Run, table_rows
from d4s.version import versions

SEGMENT_EVERY = 64  # steps
SNAPSHOT_EVERY = 1000  # steps, of an editor whose steps can be made again from their vectors
LINES_AN_EDIT = 2_000  # bytes of the log, about
BYTES_A_STEP = 4 << 20  # of an editor whose cannot: what snapshots may cost a step, on the average
# Steps of a hundred edits are few and long, so that seconds count too: of editing, what a killed process may lose
SEGMENT_SECONDS = 60.0  # of vectors
SNAPSHOT_SECONDS = 120.0  # of steps that can only be searched for again
VECTOR_SECONDS = 1800.0  # of steps whose vectors are there
SNAPSHOT_TIMES = 20  # but no less than so many times what the last snapshot took
_RIGHT_AFTER = ("efficacy", "paraphrase")


class KeptInJournal(KeptTargets):
    """Targets that are durable in a journal before a step uses them.

    given: those that the caller keeps, to which what is found is added too
    """

    def __init__(self, given: KeptTargets | None) -> None:
        super().__init__(None if given is None else given.identity)
        self.given, self.folder = given, None
        if given is not None and len(given):
            self.take_in(given)
        self._written = self.times

    folder: Folder | None

    def add(self, edits: Sequence[Edit], targets: Targets) -> None:
        super().add(edits, targets)
        if self.given is not None:
            self.given.check(self.identity or {})
            self.given.add(edits, targets)
        self._write()

    def keep_in(self, folder: Folder) -> None:
        """What the folder has, also for the caller, and from now on what is found goes there."""
        self.folder = folder
        for path in self._files():
            try:
                found = KeptTargets.load(path)
                self.take_in(found)
            except D4SError:
                continue  # damaged: searched again
            if self.given is not None:
                self.given.take_in(found)
        self._written = self.times

    def _files(self) -> list[Path]:
        assert self.folder is not None
        found = (self.folder.root / "targets").glob("*.safetensors")
        return sorted((path for path in found if path.stem.isdecimal()), key=lambda path: int(path.stem))

    def _write(self) -> None:
        if self.folder is None:
            return
        last = int(self._files()[-1].stem) if self._files() else -1
        for number, part in enumerate(self.since(self._written), start=last + 1):
            part.save(self.folder.place("targets", number))
        self._written = self.times


class Journaling(Observer):
    """Writes a sequence into its journal, and brings an editor to where the journal ends.

    Raises ConfigError where another process writes to the journal, or the folder holds something else, or a sequence
    that is not this one, naming what differs.
    """

    def __init__(self, path: str | os.PathLike[str], *, keep_vectors: bool = True) -> None:
        self.path, self.keep_vectors = Path(path), keep_vectors
        self.folder: Folder | None = None
        if Folder.exists(self.path):
            self.folder = Folder.open(self.path)
            self.folder.lock()
            self.folder.reread()
        elif not Folder.is_free(self.path):
            raise ConfigError(
                f"{self.path}: already holds something else; name a new or empty folder, or a journal"
            )
        self.is_anothers = False  # whether the folder was found to be another sequence's
        self.under_way: Run | None = None
        self.waiting: dict[int, list[Rows]] = {}  # steps whose vectors are in no segment yet
        self.number = 0  # of the last step that is in the log
        self.at_snapshot = 0
        self.snapshot_took = 0.0  # seconds
        self.segmented = self.snapshotted = 0.0  # seconds of editing by then
        self.as_logged = True  # whether the editor's state is what the log's steps have made

    def close(self) -> None:
        """Another process may write."""
        if self.folder is not None:
            self.folder.unlock()

    def check(self, method: Method, bench: Workbench, edits: Sequence[Edit], schedule: Schedule) -> None:
        """Before anything is searched for: ConfigError, naming what differs, if the journal is another sequence's."""
        if self.folder is not None:
            self._same(identity_of(method, bench, edits, schedule), method)

    def _same(self, wanted: Mapping[str, Any], method: Method) -> None:
        assert self.folder is not None
        config = _as_json(method.as_known_to(self.folder.head["config"]))
        head, wanted = _but_for_passes(self.folder.head), _but_for_passes({**wanted, "config": config})
        differ = differing(head, wanted, [name for name in SAME if name in wanted])
        # Earlier versions did not keep it, so none there may be any.
        if "architecture" in head and head["architecture"] != wanted.get("architecture"):
            differ.append("architecture: another one there")
        if differ:
            self.is_anothers = True
            raise ConfigError(
                f"{self.path} is the journal of another sequence: {'; '.join(differ)}; name another folder, or ask for "
                "the same"
            )

    def targets(self, given: KeptTargets | None) -> KeptInJournal:
        kept = KeptInJournal(given)
        if self.folder is not None:
            kept.keep_in(self.folder)
        return kept

    def settled(self, method: Method, bench: Workbench, edits: Sequence[Edit]) -> Method:
        """What the first edits decide, as it was decided when the sequence began."""
        if self.folder is None:
            return method.settled(bench, edits)
        chosen = self.folder.head["chosen"]
        try:
            return replace(method, **chosen) if chosen else method
        except TypeError:
            raise DataError(
                f"{self.path / 'journal.json'}: chosen holds {', '.join(map(shown, chosen))}; not all of them are "
                f"fields of {method.name}"
            ) from None

    def baseline(self) -> Baseline | None:
        place = self.path / "baseline.json"
        if self.folder is None or not place.exists():
            return None
        try:
            return Baseline.load(place)
        except D4SError:
            return None  # damaged, and soon taken

    def open(self, result: Result, method: Method, bench: Workbench, schedule: Schedule) -> None:
        """The head and what goes with it, written if the journal is new, compared if it is not."""
        editor = result.editor
        state = sum(tensor.nbytes for tensor in editor.snapshot().values())
        wanted = self._head(result, method, bench, schedule, state)
        if self.folder is None:
            self.folder = Folder.create(self.path, wanted)
        else:
            self._same(wanted, method)
            if self.folder.is_changed_after:
                raise ConfigError(
                    f"{self.path}: edits of this journal were taken back or solved for anew after its sequence, which "
                    "does not go on. d4s.Journal works with it; name another folder for a new sequence"
                )
        folder = self.folder
        expected = self._expected_bytes(editor, max(0, len(result.edits) - self.folder.steps_made), state)
        stage(
            f"journal {self.path}: up to {expected / 1e6:.0f} MB more",
            shown=bench.progress and expected > 1e6,
        )
        check_folder(folder.root, room=expected)
        if not folder.events:  # nothing was done: whatever is there may be half of it
            weights = editor.weights
            folder.save("base", None, {f"{layer}": weights.base[layer] for layer in weights.layers})
            sums, form = _sums_of(editor), _joint_form_of(editor)
            if form is not None and folder.head["keeps_vectors"]:
                sums = form.dense  # of experts none is needed: their rows' products are in the state
            if sums is not None:
                folder.save("priors", None, {f"{i}": _stored_prior(p.matrix) for i, p in sums.priors.items()})
            result.baseline.save(self.path / "baseline.json")
        if isinstance(bench.targets, KeptInJournal) and bench.targets.folder is None:
            bench.targets.keep_in(folder)

    def _expected_bytes(self, editor: Editor, edits: int, state: int) -> int:
        """What the journal will hold: W0, priors, snapshots, and of each edit its line and its vectors.

        state: bytes of a snapshot now, which sums outgrow
        """
        weights = editor.weights
        shapes = [weights.anatomy.shape(layer) for layer in weights.layers]
        base = sum(w.nbytes for w in weights.base.values())
        sums = shapes if _sums_of(editor) is not None else ()
        keys = editor.method.keys_an_edit
        return bytes_of_journal(base, state, edits, sums, keys=keys, keep_vectors=self.keep_vectors)

    def _head(
        self, result: Result, method: Method, bench: Workbench, schedule: Schedule, state: int
    ) -> dict[str, Any]:
        editor, anatomy = result.editor, result.editor.anatomy
        layers = editor.weights.layers
        again = _sums_of(editor) is not None and self.keep_vectors
        joint = _joint_form_of(editor) is not None and self.keep_vectors
        every = SNAPSHOT_EVERY if again else max(10, math.ceil(state / BYTES_A_STEP))
        moment = now()
        head = {
            "created": moment["at"],
            "by": moment["by"],
            "versions": versions(),
            **identity_of(method, bench, result.edits, schedule),
            "statistics": bench.statistics_digest(layers),
            "chosen": result.chosen,
            "count": len(result.edits),
            "layers": list(layers),
            "weights": {str(layer): anatomy.weight_name(layer) for layer in layers},
            "transposed": {str(layer): anatomy.transposed(layer) for layer in layers},
            "keeps_vectors": again or joint,
            "snapshot_every": every,
            "segment_every": SEGMENT_EVERY,
            "source": source_of(anatomy.model),
        }
        return dict(_as_json(head))

    # Going on

    def restore(self, under_way: Run) -> None:
        """The sequence as it was at the last whole step: weights, table, history, clocks."""
        assert self.folder is not None
        self.under_way = under_way
        result, events = under_way.result, self.folder.events
        steps = [event for event in events if event["kind"] == "step"]
        if not events:
            return
        editor = result.editor
        by_id = {edit.id: edit for edit in result.edits}
        batches = under_way.schedule.batches(result.edits)
        for number, event in enumerate(steps):
            stored = edits_of(event, self.folder)
            if number == len(batches) and all(edit.tags.get(AGAIN) in by_id for edit in stored):
                batches.append(stored)  # by a later pass
                made, asked = pass_of(stored[0]), under_way.schedule.passes
                if made > asked:
                    raise ConfigError(
                        f"{self.path}: its sequence has come to pass {made}, and passes={asked} is asked for; ask for "
                        "as many or more, or name another folder"
                    )
            if number >= len(batches) or [e.id for e in stored] != [e.id for e in batches[number]]:
                raise DataError(
                    f"{self.folder.root}, event {event['n']}: its edits are not those of step {number + 1}; "
                    "the log is damaged, or was changed"
                )
        began = time.perf_counter()
        by_editing = self._rebuild(editor, steps, batches)
        self.number, took = len(steps), time.perf_counter() - began
        made = 0
        for event, batch in zip(steps, batches, strict=False):
            made += len(batch)
            result.edits_table += _table_rows(event, batch, made)
            under_way.edit_seconds = float(event["seconds"] or 0.0)  # None: it was not finite
        tested = [event for event in events if event["kind"] == "tested"]
        for event in tested:
            _take_tested(event, result.edits_table)
            if int(event["made"]) > len(result.edits):
                continue  # of a later pass
            for name in _RIGHT_AFTER:
                under_way.right_after[name] += [v for v in event[name] if v is not None]
        for event in events:
            if event["kind"] == "point":
                self._point(event, under_way)
        if steps and under_way.schedule.original and (not tested or int(tested[-1]["made"]) < made):
            under_way.test(batches[len(steps) - 1], self)
        self.segmented = self.snapshotted = under_way.edit_seconds
        if by_editing and took >= SNAPSHOT_SECONDS:
            self._snapshot(editor)
        done = f"{made} of {len(result.edits)} edits"
        if made > len(result.edits):
            done = f"{len(result.edits)} edits and {made - len(result.edits)} that were made again"
        stage(f"{result.method}: goes on after {done}", shown=under_way.progress)

    def _rebuild(
        self, editor: Editor, steps: Sequence[Mapping[str, Any]], batches: Sequence[Sequence[Edit]]
    ) -> bool:
        """The editor's state after the last step: from a snapshot, then from vectors, then by editing again; whether
        there was any of the last."""
        assert self.folder is not None
        begin, by_editing = 0, False
        for number, event in reversed(self.folder.sound("snapshots")):
            try:
                state = self.folder.load("snapshots", number, event["digest"]).tensors
            except D4SError:
                continue  # damaged: the one before it, and more is made again
            try:
                editor.resume_(state)
            except (D4SError, KeyError, RuntimeError, TypeError, ValueError):
                editor.restore()  # as it was written, and not this editor's; it may have been taken in by half
                continue
            begin = sum(1 for step in steps if step["n"] <= number)
            break
        self.at_snapshot = begin
        segments = Segments(self.folder)
        waiting = False  # whether weights are still to be written
        bar = progress_bar(len(steps) - begin, "step", "made again", shown=editor.bench.progress)
        for place in range(begin, len(steps)):
            bar.update()
            put = None
            if _sums_of(editor) is not None:
                try:
                    put = segments.rows(place + 1)
                except DataError:
                    put = None
            if put is not None and isinstance(editor, D4SEditor):
                editor.make_again(batches[place], put)
                waiting = True
                continue
            if waiting and isinstance(editor, D4SEditor):
                editor.write()
                waiting = False
            editor.edit(batches[place])
            self._take_vectors(editor, place + 1)
            by_editing = True
        if waiting and isinstance(editor, D4SEditor):
            editor.write()
        bar.close()
        return by_editing

    def _point(self, event: Mapping[str, Any], under_way: Run) -> None:
        assert self.folder is not None
        place, stored, row, evaluation = _read_point(self.folder, event)
        given, unedited = None, under_way.unedited
        under_way.result.history.append(row)
        under_way.result.evaluations.append(evaluation)
        under_way.began = time.perf_counter() - float(row["seconds"] or 0.0)
        if (measure := under_way.schedule.measure) is not None:
            given = {name: row[name] for name in stored["measured"] if name in row}
            under_way.result.columns |= measured_columns(given, measure)
        if not int(event["made"]):
            unedited.take(evaluation, given)
            if under_way.schedule.neighborhood_limit is not None and stored["fewer"] is not None:
                with checking(place, "a journal"):
                    fewer = read_evaluation({"rows": stored["fewer"], "metrics": {}, "notes": []}, "fewer")
                unedited.rows[under_way.schedule.neighborhood_limit] = fewer.rows

    # What happens

    @property
    def _run(self) -> Run:
        assert self.under_way is not None
        return self.under_way

    def began(self, result: Result) -> None:
        assert self.folder is not None
        try:
            if not any(event["kind"] == "point" for event in self.folder.events):
                self.point(result)
        except BaseException:
            self.folder.unlock()  # who has not begun is not told of the end
            raise

    def step(self, result: Result, batch: Sequence[Edit]) -> None:
        assert self.folder is not None
        rows = result.edits_table[-len(batch) :]
        fields: dict[str, Any] = {"edits": [edit.to_dict() for edit in batch]}
        for name in ("first_probability", "last_probability"):
            if name in rows[0]:
                fields[name] = finite_or_none([float(row[name]) for row in rows])
        self.as_logged = False  # should the next line raise, the step is in the weights, and not in the log
        self.folder.append("step", step=self.number + 1, **fields, seconds=self._run.edit_seconds)
        self.number += 1
        self.as_logged = True
        self._take_vectors(result.editor, self.number)
        now, head = self._run.edit_seconds, self.folder.head
        if len(self.waiting) >= head["segment_every"] or now - self.segmented >= SEGMENT_SECONDS:
            self._segment()
        by_vectors = head["keeps_vectors"] and _sums_of(result.editor) is not None
        longest = max(VECTOR_SECONDS if by_vectors else SNAPSHOT_SECONDS, SNAPSHOT_TIMES * self.snapshot_took)
        if self.number - self.at_snapshot >= head["snapshot_every"] or now - self.snapshotted >= longest:
            self._snapshot(result.editor)

    def tested(self, result: Result, batch: Sequence[Edit], figures: Sequence[Mapping[str, Any]]) -> None:
        assert self.folder is not None
        found = {name: finite_or_none([row.get(name) for row in figures]) for name in _RIGHT_AFTER}
        written = finite_or_none([row["target_probability"] for row in figures])
        self.folder.append("tested", made=len(result.edits_table), written_probability=written, **found)

    def point(self, result: Result) -> None:
        assert self.folder is not None
        row, evaluation = result.history[-1], result.evaluations[-1]
        made = int(row["step"])
        values = {
            "row": finite_or_none(row),
            "evaluation": evaluation.to_dict(),
            "fewer": self._run.unedited.rows.get(self._run.schedule.neighborhood_limit) if not made else None,
            "measured": list(result.columns),
        }
        self.folder.add_point(made, _as_json(values))

    def ended(self, result: Result, error: BaseException | None) -> None:
        """What waits is written, where it still can be; then the journal may be written by another process.

        Raises EditingFailed where that alone fails. What broke a sequence off before is not covered up by it.
        """
        if self.folder is None:
            return
        try:
            self._segment()
            # Where the last step failed half-way or is not in the log, a snapshot would hold what was not done.
            if self.number > self.at_snapshot and self.as_logged and not result.editor.torn:
                self._snapshot(result.editor)
            self.folder.append("ended", failure=result.failure, passes=self._run.schedule.passes)
        except (D4SError, OSError) as own:
            if error is None:
                raise EditingFailed(
                    f"the edits are made and logged, and {self.path} could not be brought to its end: {own}; the same "
                    "call again does that",
                    result,
                ) from own
            # The disk is full, say: what broke the sequence off is told, and what was logged is there.
        finally:
            self.folder.unlock()

    def _take_vectors(self, editor: Editor, number: int) -> None:
        assert self.folder is not None
        if isinstance(editor, D4SEditor) and self.folder.head["keeps_vectors"]:
            form = _joint_form_of(editor)
            self.waiting[number] = list(editor.put) if form is None else numbered(editor.put, form)

    def _segment(self) -> None:
        """What waits, each stretch of neighbouring steps by itself: a segment holds all steps from its first on."""
        assert self.folder is not None
        for stretch in _stretches(sorted(self.waiting)):
            steps = {step: self.waiting[step] for step in stretch}
            self.folder.add_segment(stretch[0], stretch[-1], packed(steps))
            for step in stretch:
                del self.waiting[step]
        self.segmented = self._run.edit_seconds

    def _snapshot(self, editor: Editor) -> None:
        assert self.folder is not None
        self._segment()  # steps before a snapshot are not made again, so their vectors would be lost with this process
        began = time.perf_counter()
        self.folder.add_snapshot(editor.snapshot())
        self.snapshot_took = time.perf_counter() - began
        self.at_snapshot, self.snapshotted = self.number, self._run.edit_seconds


def _read_point(
    folder: Folder, event: Mapping[str, Any]
) -> tuple[Path, dict[str, Any], dict[str, Any], Evaluation]:
    """(place, what is stored there, history row, evaluation) of the point that a line of the log names."""
    place, stored = folder.point(event)
    with checking(place, "a journal"):
        row = read_history_row(stored["row"], "row")
        evaluation = read_evaluation(stored["evaluation"], "evaluation")
        for name in as_list(stored["measured"], "measured"):
            as_text(name, "measured")
    return place, stored, row, evaluation


def record_of(path: str | os.PathLike[str]) -> Record:
    """What a journal tells of its sequence, whether that has ended, is under way in another process, or was stopped.

    `failure` says of an unfinished one how far it has come; its last row is the last point, not that far.
    Raises DataError for a folder that is no journal, or is damaged.
    """
    folder = Folder.open(path)
    head = folder.head
    record = Record(head["method"], head["config"], chosen=head["chosen"])
    made, unfinished = 0, "not begun"
    for event in folder.events:
        if event["kind"] == "step":
            made += len(event["edits"])
            record.edits_table += _table_rows(event, edits_of(event, folder), made)
            whole = f"{head['count']} edits"
            unfinished = (
                f"unfinished, {made} of {whole} made"
                if made <= head["count"]
                else f"unfinished, {whole} made, and {made - head['count']} of them again"
            )
        elif event["kind"] == "tested":
            _take_tested(event, record.edits_table)
        elif event["kind"] == "point":
            _, _, row, evaluation = _read_point(folder, event)
            record.history.append(row)
            record.evaluations.append(evaluation)
        elif event["kind"] == "ended":
            unfinished = event["failure"] or (unfinished if made < head["count"] else "")
    record.failure = unfinished or None
    return record


def _table_rows(event: Mapping[str, Any], batch: Sequence[Edit], made: int) -> list[dict[str, Any]]:
    """Rows of `edits_table` of a step. made: edits with those of the step"""
    rows = table_rows(batch, made)
    first, last = event.get("first_probability"), event.get("last_probability")
    if first is not None and last is not None:
        for i, row in enumerate(rows):
            row |= {"first_probability": _number(first[i]), "last_probability": _number(last[i])}
    return rows


def _take_tested(event: Mapping[str, Any], table: Sequence[dict[str, Any]]) -> None:
    """What a test right after a step found, into the step's rows."""
    begin = int(event["made"]) - len(event["written_probability"])
    for row, value in zip(table[begin:], event["written_probability"], strict=False):
        row["written_probability"] = _number(value)


def _sums_of(editor: Editor) -> ClosedForm | None:
    """The sums of an editor that keeps any, by which its steps can be made again from their vectors."""
    if isinstance(editor, D4SEditor) and editor.keeps_sums and isinstance(editor.closed_form, ClosedForm):
        return editor.closed_form
    return None


def _joint_form_of(editor: Editor) -> JointForm | None:
    """Of an editor of experts the rows that it has put in, if it keeps them."""
    if isinstance(editor, D4SEditor) and isinstance(editor.closed_form, JointForm):
        return editor.closed_form
    return None


def _stretches(numbers: Sequence[int]) -> list[list[int]]:
    """Ascending numbers, divided where one is left out."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return found


def bytes_of_journal(
    base: int,
    state: int,
    edits: int,
    sums: Sequence[tuple[int, int]] = (),
    *,
    keys: int = 1,
    keep_vectors: bool = True,
) -> int:
    """What a journal of so many edits will hold: W0, priors, snapshots, and of each edit its line and its vectors.

    base: bytes of W0 of the edited layers
    state: bytes of a snapshot, which sums outgrow
    sums: (d_out, d_in) of the layers whose sums are kept; none: the editor keeps no sums
    keys: of an edit, in each layer
    keep_vectors: whether keys and residuals are kept, where there are sums
    """
    an_edit = LINES_AN_EDIT
    if sums:
        base += sum(8 * d_in**2 for _, d_in in sums)  # the priors
        state = sum(8 * (2 * d_in**2 + 2 * d_in * d_out) for d_out, d_in in sums)
        if keep_vectors:
            an_edit += keys * sum(4 * d_in + 8 * d_out for d_out, d_in in sums)
    # One snapshot more than are kept, while the oldest is still there.
    return base + (SNAPSHOTS_KEPT + 1) * state + edits * an_edit


def identity_of(
    method: Method, bench: Workbench, edits: Sequence[Edit], schedule: Schedule
) -> dict[str, Any]:
    """What tells a sequence from others, but for its statistics, which may not be there yet."""
    anatomy = bench.anatomy
    identity = {
        "dtype": str(anatomy.weight(0).dtype).removeprefix("torch."),
        "model": fingerprint_of(anatomy.model),
        "tokenizer": tokenizer_fingerprint(bench.tokenizer),
        "edits": digest_of([edit.to_dict() for edit in edits]),
        "method": method.name,
        "config": asdict(method),
        "schedule": schedule.told_apart() | {"seed": schedule.seed},
    }
    if bench.architecture is not None:  # of a type of model, say, that d4s does not know
        identity["architecture"] = asdict(bench.architecture)
    return dict(_as_json(identity))


def _but_for_passes(told: Mapping[str, Any]) -> Mapping[str, Any]:
    """What tells a sequence from others, without the number of its passes: one that has made fewer goes on."""
    schedule = {name: value for name, value in told["schedule"].items() if name != "passes"}
    return {**told, "schedule": schedule}


def _stored_prior(matrix: Tensor) -> Tensor:
    """A multiple of the identity as that number alone."""
    factor = matrix[0, 0]
    same = torch.equal(matrix, torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device) * factor)
    return factor.clone() if same else matrix


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _as_json(value: Any) -> Any:
    """What comes back from a file: lists for tuples, text for the names of fields."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(one) for one in value]
    return value
