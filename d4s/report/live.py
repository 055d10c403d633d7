"""A sequence on a terminal while it is under way: pace, time left, how edits take, how norms grow, and a warning.

Collapse is said to be near where one of two things is seen, both of them rates, since levels are the model's own:

- mean |w| of the edited layers has doubled since half as many edits were made. Methods that hold grow it 1.2 to 1.5
  times from half of their edits on; ROME's grew 4.3 times from 50 to 100 edits of SmolLM2-135M, and of those 100 edits
  8 % were still the greedy answer.
- of the last 100 edits tested right after their step fewer than three quarters as many took as of the first 100.

`stop_on_collapse` ends a sequence by what is left of its edits at a point; this warns between points, and ends nothing.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from d4s.edits import Edit
from d4s.errors import ConfigError
from d4s.sequence.observers import Observer

if TYPE_CHECKING:
    from d4s.sequence.result import Result

FEWEST = 10  # edits before a norm's growth says anything
DOUBLED = 2.0
STRETCH = 100  # edits whose tests are averaged
STILL_TAKE = 0.75
_PACE = 20  # steps that the pace is taken over
_SECONDS = 1.0  # between two looks at the norms, which read every edited weight


def is_there() -> bool:
    """Whether this process has a terminal that a live view can be drawn on, and rich to draw it with."""
    return sys.stderr.isatty() and importlib.util.find_spec("rich") is not None


class Watch:
    """What is seen of a sequence between its points, and what it says of a collapse.

    efficacy: of each edit, right after its step
    growth: numbers of edits made, ascending, and what mean |w| has grown by since the unedited model
    """

    def __init__(self) -> None:
        self.efficacy: list[float] = []
        self.made: list[int] = [0]
        self.growth: list[float] = [0.0]

    def grew(self, made: int, growth: float) -> None:
        if made > self.made[-1]:
            self.made.append(made)
            self.growth.append(growth)

    def takes(self) -> float | None:
        """Mean efficacy of the last tests; None: there are none."""
        last = self.efficacy[-STRETCH:]
        return sum(last) / len(last) if last else None

    def warning(self) -> str | None:
        """Why a collapse is near; None: nothing says so."""
        made, growth = self.made[-1], self.growth[-1]
        if not math.isfinite(growth):
            return f"collapse: mean |w| is no longer finite after {made} edits"
        earlier = bisect_left(self.made, made / 2)  # the first look at half as many edits, or later
        if made >= FEWEST and 1 + growth >= DOUBLED * (1 + self.growth[earlier]):
            factor = (1 + growth) / (1 + self.growth[earlier])
            return f"collapse is near: mean |w| is {factor:.3g} times what it was after {self.made[earlier]} edits"
        if len(self.efficacy) >= 2 * STRETCH:
            first, last = sum(self.efficacy[:STRETCH]) / STRETCH, self.takes()
            if last is not None and last < STILL_TAKE * first:
                return (
                    f"collapse is near: of the last {STRETCH} edits {100 * last:.0f} % took, of the first "
                    f"{STRETCH} {100 * first:.0f} %"
                )
        return None


class Live(Observer):
    """A view of the sequence on a terminal, drawn with rich in place of the bar.

    console: a rich console; None: of standard error
    clock: seconds
    Raises ConfigError where rich is not installed.
    """

    draws = True

    def __init__(self, console: Any = None, clock: Callable[[], float] = time.monotonic) -> None:
        if importlib.util.find_spec("rich") is None:
            raise ConfigError("the live view needs rich, which is not installed: pip install rich")
        self.console, self.clock = console, clock
        self.view: Any = None

    def began(self, result: Result) -> None:
        from rich.console import Console
        from rich.live import Live as Drawn

        self.watch, self.total, self.title = Watch(), len(result.edits), result.method
        self.made = len(result.edits_table)
        self.unedited = _norms(result.history[0])
        self.warned = False
        self.average: float | None = None
        self.steps: deque[tuple[float, int]] = deque(maxlen=_PACE)
        self.before = self.looked = self.clock()
        self.beneath, self.said = "", sys.stderr
        self.view = Drawn(
            console=self.console or Console(file=sys.stderr),  # as it is now: it is exchanged below
            get_renderable=self._drawn,
            refresh_per_second=4,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self.view.start()
        sys.stderr = _Beneath(self)  # bars of evaluations, which would be drawn over the view

    def step(self, result: Result, batch: Sequence[Edit]) -> None:
        now = self.clock()
        self.steps.append((now - self.before, len(batch)))
        self.before, self.made = now, len(result.edits_table)
        if now - self.looked >= _SECONDS:
            self.looked = now
            self._look(result.editor.weights.mean_absolute())

    def again(self, result: Result, edits: Sequence[Edit]) -> None:
        self.total += len(edits)

    def tested(self, result: Result, batch: Sequence[Edit], figures: Sequence[Mapping[str, Any]]) -> None:
        self.watch.efficacy += [row["efficacy"] for row in figures if row.get("efficacy") is not None]
        self._warn()

    def point(self, result: Result) -> None:
        row = result.history[-1]
        self.average = row.get("average")
        self._look(_norms(row))
        self.before = self.clock()  # the point's time is no step's

    def ended(self, result: Result, error: BaseException | None) -> None:
        sys.stderr = self.said
        self.beneath = ""
        self.view.stop()

    def _look(self, norms: Mapping[int, float]) -> None:
        growths = [
            norm / self.unedited[layer] - 1 for layer, norm in norms.items() if self.unedited.get(layer)
        ]
        if growths:
            self.watch.grew(self.made, sum(growths) / len(growths))
        self._warn()

    def _warn(self) -> None:
        """Once, above the view, where it stays; for as long as it holds the view says it too."""
        if not self.warned and (warning := self.watch.warning()) is not None:
            self.warned = True
            self.view.console.print(
                f"{self.title}, after {self.made} edits: {warning}", markup=False, highlight=False
            )

    def pace(self) -> float | None:
        """Edits a second over the last steps, evaluations not counted; None: before the first."""
        seconds, edits = sum(s for s, _ in self.steps), sum(n for _, n in self.steps)
        return edits / seconds if seconds > 0 else None

    def words(self) -> list[str]:
        """What is told beside the bar."""
        told = [f"{self.made}/{self.total} edits"]
        if (pace := self.pace()) is not None:
            told.append(f"{pace:.2f} edits/s")
            told.append(f"{_clock((self.total - self.made) / pace)} left")
        if (takes := self.watch.takes()) is not None:
            told.append(f"right after: {100 * takes:.1f} %")
        if len(self.watch.made) > 1:
            told.append(f"mean |w| {100 * self.watch.growth[-1]:+.2f} %")
        if self.average is not None:
            told.append(f"average {100 * self.average:.1f} %")
        return told

    def _drawn(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        line = Table.grid(padding=(0, 1))
        line.add_row(
            Text(self.title, style="bold"),
            ProgressBar(self.total, self.made, width=24),
            Text(" · ".join(self.words())),
        )
        rows: list[Any] = [line]
        if (warning := self.watch.warning()) is not None:
            rows.append(Text(f"! {warning}", style="bold red"))
        if self.beneath:
            rows.append(Text(self.beneath, style="dim", no_wrap=True, overflow="ellipsis"))
        return Group(*rows)


class _Beneath:
    """Standard error while the view is drawn: the state of a bar stands beneath the view, whole lines above it."""

    def __init__(self, live: Live) -> None:
        self._live, self._begun = live, ""

    def write(self, text: str) -> int:
        """A bar writes its states behind carriage returns, and a line's end when it is closed."""
        self._begun += text
        *lines, self._begun = self._begun.split("\n")
        for line in lines:
            line = self._states(line)
            if line:
                self._live.view.console.print(line, markup=False, highlight=False)
            else:
                self._live.beneath = ""
        self._begun = self._states(self._begun)
        return len(text)

    def _states(self, line: str) -> str:
        """The last state goes beneath the view. Returns what of the line is none."""
        if "\r" not in line:
            return line
        self._live.beneath = line.rpartition("\r")[2].strip()
        return ""

    def flush(self) -> None:
        """What is written is drawn at the view's next turn."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._live.said, name)


def _norms(row: Mapping[str, Any]) -> dict[int, float]:
    """Layer → mean |w| of a history row."""
    from d4s.measure.columns import layers

    return {layer: row[name] for layer, name in layers(row).items()}


def _clock(seconds: float) -> str:
    """1:02:03, or 2:03 within an hour."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
