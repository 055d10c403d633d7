"""Who watches a sequence: told of its steps and points while they happen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from d4s.edits import Edit
from d4s.progress import progress_bar

if TYPE_CHECKING:
    from d4s.sequence.result import Result


class Observer:
    """Does nothing; a subclass does something where it is told.

    What an observer raises breaks the sequence off, as a step that fails does. All but `ended` are called in the order
    in which the observers were given; `ended` in the reverse order, of those whose `began` has returned.

    draws: whether it shows the sequence's progress itself, so that no bar is drawn
    """

    draws: ClassVar[bool] = False

    def began(self, result: Result) -> None:
        """The unedited model has been scored (row 0 of the history); no edit has been made."""

    def step(self, result: Result, batch: Sequence[Edit]) -> None:
        """The batch is in the weights and its rows in `edits_table`. Ctrl-C and ending signals wait until it returns.

        What each edit's test right after its step finds is not there yet.
        """

    def tested(self, result: Result, batch: Sequence[Edit], figures: Sequence[Mapping[str, Any]]) -> None:
        """Each edit of the batch was tested right after its step.

        figures: of each edit, by name, as `evaluate` gives them
        """

    def point(self, result: Result) -> None:
        """The last row of the history, and its evaluation, are new."""

    def again(self, result: Result, edits: Sequence[Edit]) -> None:
        """A later pass begins, which makes these edits again. A sequence that goes on tells of earlier passes too."""

    def ended(self, result: Result, error: BaseException | None) -> None:
        """The last thing that is told. error: what broke the sequence off; None: nothing did, or `result.failure`."""


class Observers(Observer):
    """Several as one."""

    def __init__(self, observers: Iterable[Observer]) -> None:
        self.waiting, self.told = list(observers), list[Observer]()

    def began(self, result: Result) -> None:
        while self.waiting:
            self.waiting[0].began(result)
            self.told.append(self.waiting.pop(0))

    def step(self, result: Result, batch: Sequence[Edit]) -> None:
        for one in self.told:
            one.step(result, batch)

    def tested(self, result: Result, batch: Sequence[Edit], figures: Sequence[Mapping[str, Any]]) -> None:
        for one in self.told:
            one.tested(result, batch, figures)

    def point(self, result: Result) -> None:
        for one in self.told:
            one.point(result)

    def again(self, result: Result, edits: Sequence[Edit]) -> None:
        for one in self.told:
            one.again(result, edits)

    def ended(self, result: Result, error: BaseException | None) -> None:
        """Each is told, whatever another raises; the first that raised is heard afterwards."""
        raised: BaseException | None = None
        while self.told:
            try:
                self.told.pop().ended(result, error)
            except BaseException as its:
                raised = raised or its
        if raised is not None:
            raise raised


class Bar(Observer):
    """A progress bar over the edits, with the last average beside it."""

    def __init__(self, *, shown: bool = True) -> None:
        self.shown = shown
        self.bar: Any = None

    def began(self, result: Result) -> None:
        made = len(result.edits_table)  # by a run that this one goes on from
        self.bar = progress_bar(len(result.edits), "edit", result.method, shown=self.shown, initial=made)

    def step(self, result: Result, batch: Sequence[Edit]) -> None:
        self.bar.update(len(batch))

    def point(self, result: Result) -> None:
        row = result.history[-1]
        if "average" in row:  # shown at the bar's next turn: a log has a line every so often
            self.bar.set_postfix({"average": f"{row['average']:.3f}"}, refresh=False)

    def again(self, result: Result, edits: Sequence[Edit]) -> None:
        self.bar.total += len(edits)

    def ended(self, result: Result, error: BaseException | None) -> None:
        self.bar.close()
