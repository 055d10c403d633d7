"""What a closed form takes on a device, by a short measurement there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from d4s import ops
from d4s.change.closed_form import DELAYED_ROWS, ClosedForm, Prior

WIDEST = (
    512,
    1024,
)  # d_out and d_in at the most of what is measured; wider ones are told by their operations


@dataclass(frozen=True)
class Speed:
    """update: seconds of a single edit's update of one layer, an element of P and Δ; solve: seconds an operation"""

    update: float
    solve: float

    def of_update(self, d_out: int, d_in: int) -> float:
        """Seconds of a single edit's update of a layer."""
        return d_in * (d_in + d_out) * self.update

    def of_solve(self, d_out: int, d_in: int) -> float:
        """Seconds of a layer's Cholesky solve."""
        return (d_in**3 / 3 + 2 * d_out * d_in**2) * self.solve


def speed_of(d_out: int, d_in: int, device: torch.device, seconds: float) -> Speed:
    """Of a layer of about this size, float64. seconds: that each of both measurements takes, about"""
    d_out, d_in = min(d_out, WIDEST[0]), min(d_in, WIDEST[1])
    like: dict[str, Any] = {"dtype": torch.float64, "device": device}
    closed = ClosedForm({0: Prior.identity(d_in, float(d_in), device=device)}, d_out)
    own = torch.Generator().manual_seed(0)
    residuals, keys = (
        torch.randn(DELAYED_ROWS, width, dtype=torch.float64, generator=own).to(device)
        for width in (d_out, d_in)
    )

    def update() -> None:
        for i in range(DELAYED_ROWS):
            closed.add_(residuals[i : i + 1], keys[i : i + 1], 0)
            closed.delta(0)

    matrix = torch.eye(d_in, **like)[None]

    def solve() -> None:
        ops.closed_form(torch.ones(1, d_out, d_in, **like), matrix, matrix)

    return Speed(
        seconds_a_call(update, seconds, device) / (DELAYED_ROWS * d_in * (d_in + d_out)),
        seconds_a_call(solve, seconds, device) / (d_in**3 / 3 + 2 * d_out * d_in**2),
    )


def seconds_a_call(work: Callable[[], object], seconds: float, device: torch.device) -> float:
    """Of calls that take about so long together, after one that is not counted."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    wait()
    began, calls = time.perf_counter(), 0
    while calls < 1 or time.perf_counter() - began < seconds:
        work()
        wait()
        calls += 1
    return (time.perf_counter() - began) / calls
