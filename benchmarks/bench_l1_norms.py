"""L1 norms of 32 layers in one call, against the memory bandwidth that a plain copy reaches."""

from __future__ import annotations

import pytest
import torch

from benchmarks.measure import compare
from d4s import ops
from d4s.ops import reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_l1_norms(benchmark, claim, device, dtype):
    shape = (4096, 14336) if device.type == "cuda" else (1024, 4096)
    weights = [torch.randn(*shape, device=device).to(dtype) for _ in range(32)]
    torch.testing.assert_close(ops.l1_norms(weights), reference.l1_norms(weights), rtol=2**-23, atol=0)

    moved = sum(weight.nbytes for weight in weights)
    source = torch.randn(moved // 8, device=device)
    copy = torch.empty_like(source)  # reads and writes as many bytes as the operation reads
    mine, theirs = compare(lambda: ops.l1_norms(weights), lambda: copy.copy_(source), device, rounds=15)
    name = str(dtype).removeprefix("torch.")
    claim(
        f"L1 norms of 32 layers, {name}: of a copy's bandwidth",
        theirs / mine,
        0.9,
        bytes_a_second=moved / mine,
    )
    benchmark.pedantic(lambda: ops.l1_norms(weights), rounds=5)
