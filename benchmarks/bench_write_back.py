"""Write-back with both norms, against the memory bandwidth that a plain copy reaches."""

from __future__ import annotations

import pytest
import torch

from benchmarks.measure import compare
from d4s import ops
from d4s.ops import reference


@pytest.mark.parametrize("layout", ["", "in GPT-2's layout", "in GPT-2's layout, from a row-major change"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_write_back(benchmark, claim, device, dtype, layout):
    transposed = layout != ""
    d_out, d_in = 4096, 14336
    shape = (d_in, d_out) if transposed else (d_out, d_in)
    base = torch.randn(*shape, device=device).to(dtype)
    delta = 0.01 * torch.randn(d_out, d_in, device=device, dtype=torch.float64)
    if layout == "in GPT-2's layout":
        delta = delta.T.contiguous().T  # as the closed form keeps it there
    weight, twin = torch.empty_like(base), torch.empty_like(base)
    sums = ops.write_back_(weight, base, delta, transposed)
    truth = reference.write_back_(twin, base, delta, transposed)
    assert torch.equal(weight, twin)
    torch.testing.assert_close(sums, truth, rtol=1e-10, atol=0)

    moved = 2 * weight.nbytes + delta.nbytes
    source = torch.randn(moved // 8, device=device)
    copy = torch.empty_like(source)  # reads and writes as many bytes as the operation
    layers = range(8 if device.type == "cuda" else 1)  # in a row, as a step writes them
    mine, theirs = compare(
        lambda: [ops.write_back_(weight, base, delta, transposed) for _ in layers],
        lambda: [copy.copy_(source) for _ in layers],
        device,
    )
    name = f"{str(dtype).removeprefix('torch.')} {layout}".strip()
    claim(
        f"write-back + norms, {name}: of a copy's bandwidth",
        theirs / mine,
        0.85 if device.type == "cuda" else 0.8,
        bytes_a_second=len(layers) * moved / mine,
        in_a_row=len(layers),
    )
    benchmark.pedantic(lambda: ops.write_back_(weight, base, delta, transposed), rounds=5)
