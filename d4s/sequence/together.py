"""A sequence that several processes make together (`d4s.ranks`): one keeps the journal and tells the observers, and all
hold the same bits.

Targets and answers are searched in parts, where they are asked for (`d4s.locate.targets`, `d4s.models.scoring`). The
closed form every process solves itself, which costs less than sending what it gives: layers follow one another, and
the solve of one is short. Where processes do not come to the same bits, on machines of different kinds, the first's
go.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from d4s.edits import Edit
from d4s.errors import ConfigError
from d4s.locate.kept_targets import KeptTargets
from d4s.measure.metrics import Baseline
from d4s.methods import Method, Workbench
from d4s.ranks import alone, here
from d4s.sequence.journaling import Journaling
from d4s.sequence.observers import Observer, Observers
from d4s.sequence.result import Result
from d4s.sequence.schedule import Schedule
from d4s.sequence.under_way import EditorState, Run


class FirstsJournal:
    """The journal of a sequence that several processes make: the first's own, as which the others begin and go on.

    Raises in each process what `Journaling` raises in the first.
    """

    def __init__(self, path: str | os.PathLike[str], *, keep_vectors: bool = True) -> None:
        self.own: Journaling | None = None
        self.is_anothers = False

        def open_it() -> None:
            self.own = Journaling(path, keep_vectors=keep_vectors)

        here().on_first(open_it)

    @property
    def _first(self) -> Journaling:
        assert self.own is not None
        return self.own

    def close(self) -> None:
        if self.own is not None:
            self.own.close()

    def check(self, method: Method, bench: Workbench, edits: Sequence[Edit], schedule: Schedule) -> None:
        self._compared(lambda: self._first.check(method, bench, edits, schedule))

    def open(self, result: Result, method: Method, bench: Workbench, schedule: Schedule) -> None:
        self._compared(lambda: self._first.open(result, method, bench, schedule))

    def _compared(self, work: Callable[[], None]) -> None:
        ranks = here()
        raised: list[ConfigError] = []

        def told() -> str | None:
            try:
                work()
            except ConfigError as error:
                if not self._first.is_anothers:
                    raise
                raised.append(error)
                return str(error)
            return None

        said = ranks.from_first(told)
        if said is not None:
            self.is_anothers = True
            raise raised[0] if raised else ConfigError(said)

    def settled(self, method: Method, bench: Workbench, edits: Sequence[Edit]) -> Method:
        ranks = here()
        if ranks.from_first(lambda: self._first.folder is None):
            return method.settled(bench, edits)
        return ranks.from_first(lambda: self._first.settled(method, bench, edits))

    def targets(self, given: KeptTargets | None) -> KeptTargets:
        """The first's, which its journal keeps; in the others the same ones."""
        kept: list[KeptTargets] = []

        def found() -> KeptTargets:
            kept.append(self._first.targets(given))
            return kept[0].copy()

        plain = here().from_first(found)
        return kept[0] if kept else plain

    def baseline(self) -> Baseline | None:
        return here().from_first(lambda: self._first.baseline())

    def restore(self, under_way: Run) -> None:
        """The first goes on in its journal, as one alone; the others are then where it is."""
        result, bench = under_way.result, under_way.result.editor.bench

        def restored() -> dict[str, Any]:
            self._first.restore(under_way)
            made = bool(result.edits_table)
            return {
                "state": EditorState.of(result.editor) if made else None,
                "targets": None if bench.targets is None else bench.targets.copy(),
                "result": (result.edits_table, result.history, result.evaluations, result.columns),
                "run": (under_way.edit_seconds, under_way.right_after, under_way.unedited),
            }

        ranks = here()
        told = ranks.from_first(restored)
        if not ranks.is_first:
            if told["state"] is not None:
                told["state"].put_into(result.editor)
            bench.targets = told["targets"]
            result.edits_table, result.history, result.evaluations, result.columns = told["result"]
            under_way.edit_seconds, under_way.right_after, unedited = told["run"]
            vars(under_way.unedited).update(vars(unedited))  # in place: later sequences take it from there
        result.editor.announce(result.edits)  # what the first made again is ready nowhere else


class OnFirst(Observer):
    """Observers who are told in the first process, and what they raise is raised in all."""

    def __init__(self, observers: Iterable[Observer]) -> None:
        self.told = Observers(observers)

    def began(self, result: Result) -> None:
        here().on_first(lambda: self.told.began(result))

    def step(self, result: Result, batch: Sequence[Edit]) -> None:
        here().on_first(lambda: self.told.step(result, batch))

    def tested(self, result: Result, batch: Sequence[Edit], figures: Sequence[Mapping[str, Any]]) -> None:
        here().on_first(lambda: self.told.tested(result, batch, figures))

    def point(self, result: Result) -> None:
        here().on_first(lambda: self.told.point(result))

    def again(self, result: Result, edits: Sequence[Edit]) -> None:
        here().on_first(lambda: self.told.again(result, edits))

    def ended(self, result: Result, error: BaseException | None) -> None:
        if error is None:
            here().on_first(lambda: self.told.ended(result, None))
        elif here().is_first:  # the others may have heard of nothing, and wait elsewhere
            with alone():
                self.told.ended(result, error)


def journaling(path: str | os.PathLike[str], *, keep_vectors: bool = True) -> Journaling | FirstsJournal:
    """The journal in a folder, of this process or of the first of several."""
    kind = Journaling if here().count == 1 else FirstsJournal
    return kind(Path(path), keep_vectors=keep_vectors)


def watched_by(
    journal: Journaling | FirstsJournal | None, before: Iterable[Observer], after: Iterable[Observer]
) -> Observer:
    """The journal between other observers, as one."""
    own = journal.own if isinstance(journal, FirstsJournal) else journal
    everyone = [*before, *([] if own is None else [own]), *after]
    return Observers(everyone) if here().count == 1 else OnFirst(everyone)
