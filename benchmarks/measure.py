"""How a claim is measured: against its baseline in the same process, medians after a warm-up."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Row:
    """One claim. `measured` and `target` are in the claim's own unit, which its name states."""

    name: str
    measured: float
    target: float
    at_least: bool  # whether the target is a lower or an upper bound
    device: str
    details: dict[str, float] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        return self.measured >= self.target if self.at_least else self.measured <= self.target


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """One timed call."""
    wait(device)
    begin = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - begin


def compare(
    ours: Callable[[], object],
    baseline: Callable[[], object],
    device: torch.device,
    rounds: int = 7,
    warmups: int = 1,
    calls: int = 1,
) -> tuple[float, float]:
    """Median seconds a call of both. They take turns, so that a machine's slow moments meet both.

    calls: of `ours` in one timed round, for work far shorter than its baseline
    """
    for _ in range(warmups):
        ours()
        baseline()
    mine, theirs = [], []
    for _ in range(rounds):
        theirs.append(seconds(baseline, device))
        mine.append(seconds(lambda: [ours() for _ in range(calls)], device) / calls)
    return statistics.median(mine), statistics.median(theirs)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()
