"""One edit in closed form: against a float64 solve, late against early, its drift and its memory."""

from __future__ import annotations

import statistics

import pytest
import torch

from benchmarks.measure import compare, relative_error, seconds
from d4s.change.closed_form import DELAYED_ROWS, ClosedForm, Prior


def prior_of(d_in: int, device: torch.device, dtype: torch.dtype = torch.float64) -> Prior:
    """λC of keys with a decaying spectrum, from twice as many keys as dimensions."""
    scale = torch.logspace(0, -1, d_in, dtype=torch.float64, device=device)
    keys = torch.randn(2 * d_in, d_in, dtype=torch.float64, device=device) * scale
    return Prior(keys.T @ keys / len(keys), weight=float(d_in), dtype=dtype)


class Edits:
    """A run of single edits with simulated residuals and keys."""

    def __init__(self, prior: Prior, d_out: int) -> None:
        self.closed = ClosedForm({0: prior}, d_out)
        like = {"dtype": torch.float64, "device": prior.matrix.device}
        self.residuals = torch.randn(DELAYED_ROWS, d_out, **like)
        self.keys = torch.randn(DELAYED_ROWS, prior.d_in, **like)
        self.made = 0

    def make(self, count: int = 1) -> None:
        for _ in range(count):
            i = self.made % DELAYED_ROWS
            if i == 0:
                self.residuals.normal_()
                self.keys.normal_()
            self.closed.add_(self.residuals[i : i + 1], self.keys[i : i + 1], 0)
            self.closed.delta(0)
            self.made += 1


@pytest.mark.parametrize(("d_in", "d_out", "target"), [(4096, 1024, 30), (14336, 4096, 100)])
def test_one_edit(benchmark, claim, device, request, d_in, d_out, target):
    large = d_in > 4096
    if large and device.type == "cpu" and not request.config.getoption("--large"):
        pytest.skip("minutes and 16 GiB on a CPU: --large")
    prior = prior_of(d_in, device)
    edits = Edits(prior, d_out)
    edits.make(3)
    state = edits.closed.state_dict()
    key_sum, residual_sum = state["0.key_sum"], state["0.residual_sum"]

    def solve() -> torch.Tensor:
        return torch.linalg.solve(prior.matrix + key_sum, residual_sum.T).T

    assert relative_error(edits.closed.delta(0), solve()) <= 1e-8
    # Whole rounds of DELAYED_ROWS edits: the delayed products are part of what an edit costs.
    rounds = 1 if large and device.type == "cpu" else 3
    mine, theirs = compare(
        edits.make, solve, device, rounds=rounds, warmups=0 if large else 1, calls=DELAYED_ROWS
    )
    target = 50 if device.type == "cuda" and large else target
    claim(f"closed form, one edit, d_in {d_in}: times float64 solve", theirs / mine, target, seconds=mine)
    if device.type == "cuda" and large:
        claim(f"closed form, one edit, d_in {d_in}: ms a layer", 1e3 * mine, 1.0, at_least=False)
    benchmark.pedantic(edits.make, rounds=10, warmup_rounds=1)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-6), (torch.float32, 1e-3)])
def test_drift(benchmark, claim, device, dtype, bound):
    d_in, d_out, steps = 512, 128, 10_000
    prior = prior_of(d_in, device, dtype)
    closed = ClosedForm({0: prior}, d_out)
    like = {"dtype": torch.float64, "device": device}
    residuals, keys = torch.randn(steps, d_out, **like), torch.randn(steps, d_in, **like)

    def run() -> None:
        for i in range(steps):
            closed.add_(residuals[i : i + 1], keys[i : i + 1], 0)
            closed.delta(0)

    benchmark.pedantic(run, rounds=1)
    batch = torch.linalg.solve(prior.matrix.double() + keys.T @ keys, keys.T @ residuals).T
    name = str(dtype).removeprefix("torch.")
    error = relative_error(closed.delta(0), batch)
    claim(
        f"drift after 10,000 steps, {name}: relative error", error, bound, False, refreshes=closed.refreshes
    )


def test_late_edits_cost_what_early_ones_do(benchmark, claim, device):
    prior = prior_of(2048, device)
    late = Edits(prior, 256)
    late.make(10_000)
    early_seconds, late_seconds = [], []
    for _ in range(9):
        early = Edits(prior, 256)
        early.make(10)
        late.make(10)
        # Whole rounds of DELAYED_ROWS edits in turns, so that a machine's slow moments meet both.
        for _ in range(2):
            early_seconds.append(seconds(lambda run=early: run.make(DELAYED_ROWS), device))
            late_seconds.append(seconds(lambda: late.make(DELAYED_ROWS), device))
    ratio = statistics.median(late_seconds) / statistics.median(early_seconds)
    claim("cost of edit 10,000 over edit 10, d_in 2048", ratio, 1.1, at_least=False)
    benchmark.pedantic(late.make, rounds=DELAYED_ROWS)


def test_memory_does_not_grow(benchmark, claim, device):
    d_in, d_out, batch = 256, 64, 10  # ten edits a step, to be done sooner
    closed = ClosedForm({0: prior_of(d_in, device)}, d_out)

    def make(edits: int) -> None:
        for _ in range(edits // batch):
            closed.add_(torch.randn(batch, d_out, device=device), torch.randn(batch, d_in, device=device), 0)
            closed.delta(0)

    make(100)
    early = closed.nbytes
    benchmark.pedantic(lambda: make(99_900), rounds=1)
    claim("memory at edit 100,000 over edit 100", closed.nbytes / early, 1.05, at_least=False)
