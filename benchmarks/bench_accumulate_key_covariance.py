"""Key covariance against the same sum in plain torch, and on CUDA against the device's matrix rate."""

from __future__ import annotations

import pytest
import torch

from benchmarks.measure import compare, relative_error
from d4s import ops

TOKENS = 4096
has_out_dtype = "out_dtype" in torch.mm.__doc__  # torch 2.8


@pytest.mark.parametrize("d", [4096, 14336])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_key_covariance(benchmark, claim, device, dtype, d):
    if device.type == "cpu" and d > 4096:
        pytest.skip("the same ratio as at 4096, in 12 times the time")
    tokens = TOKENS if device.type == "cpu" else 4 * TOKENS
    keys = torch.randn(tokens, d, device=device).to(dtype)
    moment, twin = torch.zeros(2, d, d, device=device)

    def ours():
        ops.accumulate_key_covariance_(moment, keys)

    def plain():
        if device.type == "cuda" and dtype != torch.float32 and has_out_dtype:
            twin.add_(torch.mm(keys.T, keys, out_dtype=torch.float32))
        else:
            twin.add_(keys.float().T @ keys.float())

    ours(), plain()
    for row in (0, d // 2 + 32):  # on the diagonal, of which the lower half is computed, and off it
        truth = (keys[:, row : row + 64].double().T @ keys[:, :64].double()).tril(row)
        error, bound = (relative_error(m[row : row + 64, :64].tril(row), truth) for m in (moment, twin))
        # Tensor cores cut products of 16-bit keys as they align them to the sum, to one or two bits more than it has.
        cut = tokens * 2.0**-26 if device.type == "cuda" and dtype != torch.float32 else 0.0
        assert error <= 2 * bound + cut + 1e-7
    assert torch.equal(ops.symmetrize_(moment.clone()), ops.symmetrize_(moment.clone()).T)

    mine, theirs = compare(ours, plain, device, rounds=5)
    name = str(dtype).removeprefix("torch.")
    claim(f"key covariance, {name} keys, d {d}: times plain torch", theirs / mine, 1.6, seconds=mine)
    counted = torch.rand(tokens, device=device) < 0.9  # as padding leaves them

    def masked():
        ops.accumulate_key_covariance_(moment, keys, counted)

    with_mask, without = compare(masked, ours, device, rounds=5)
    claim(
        f"key covariance, {name} keys, d {d}: time with a mask of nine tenths",
        with_mask / without,
        1.2,
        at_least=False,
    )
    if device.type == "cuda" and dtype == torch.bfloat16:
        _, product = compare(lambda: None, lambda: keys.T @ keys, device)
        claim(
            f"key covariance, {name} keys, d {d}: of the limit n·d² at the matrix rate",
            product / 2 / mine,
            0.7,
        )
    benchmark.pedantic(ours, rounds=3, warmup_rounds=1)
