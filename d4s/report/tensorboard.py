"""A sequence's figures as scalars for TensorBoard, written by torch's own writer while it is under way."""

from __future__ import annotations

import importlib.util
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d4s.edits import Edit
from d4s.errors import ConfigError
from d4s.files import check_folder
from d4s.measure.columns import column
from d4s.sequence.observers import Observer

if TYPE_CHECKING:
    from d4s.sequence.result import Result

_TESTED = ("efficacy", "paraphrase", "target_probability")


class TensorBoard(Observer):
    """Scalars of a sequence in a folder, by the number of edits made; of several, one after another, a folder each.

    point/…: figures of the history; tested/…: of the step's edits right after it; step/…: p(target) at the end of their
    search, and seconds an edit, the tests before it counted
    folder: for event files, as `tensorboard --logdir` takes it
    Raises ConfigError where tensorboard is not installed, OSError for a folder that cannot be written to.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise ConfigError(
                f"--tensorboard {os.fspath(folder)}: tensorboard is not installed: pip install tensorboard"
            )
        self.folder = Path(folder)
        lacking = [place for place in (self.folder, *self.folder.parents) if not place.exists()]
        check_folder(self.folder)
        for place in lacking:
            place.rmdir()  # made when there is something to write: in a run's folder nothing may be before it
        self.times: dict[str, int] = {}
        self.writer: Any = None

    def began(self, result: Result) -> None:
        from torch.utils.tensorboard import SummaryWriter

        name = result.method
        self.times[name] = self.times.get(name, 0) + 1
        if self.times[name] > 1:
            name = f"{name}-{self.times[name]}"
        made = len(result.edits_table)
        # What an interrupted run wrote of steps that are made again is taken back.
        self.writer = SummaryWriter(self.folder / name, purge_step=made + 1 if made else None)
        self.before = time.perf_counter()
        if not made:
            self.point(result)

    def step(self, result: Result, batch: Sequence[Edit]) -> None:
        made, now = len(result.edits_table), time.perf_counter()
        self._write("step/seconds_an_edit", (now - self.before) / len(batch), made)
        self.before = now
        found = [row.get("last_probability") for row in result.edits_table[-len(batch) :]]
        self._write("step/last_probability", _mean(found), made)

    def tested(self, result: Result, batch: Sequence[Edit], figures: Sequence[Mapping[str, Any]]) -> None:
        for name in _TESTED:
            self._write(f"tested/{name}", _mean([row.get(name) for row in figures]), len(result.edits_table))

    def point(self, result: Result) -> None:
        row = result.history[-1]
        for name, value in row.items():
            about = column(name, result.columns)
            if name != "step" and about.bound in ("", "unedited") and about.unit != "text":
                self._write(f"point/{name}", value, int(row["step"]))
        self.writer.flush()
        self.before = time.perf_counter()

    def ended(self, result: Result, error: BaseException | None) -> None:
        self.writer.close()

    def _write(self, name: str, value: Any, made: int) -> None:
        if value is not None and math.isfinite(value):
            self.writer.add_scalar(name, value, made)


def _mean(values: Sequence[Any]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None
