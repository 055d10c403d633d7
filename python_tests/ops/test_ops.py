"""Every compiled operation against float64, over odd sizes, types, strides, masks and wrong arguments."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from support import foreign_tensors
from torch._subclasses.fake_tensor import FakeTensorMode

from d4s import ops
from d4s.errors import D4SError, NotPositiveDefiniteError
from d4s.ops import reference

TYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [1, 7, 33, 1000]


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm().clamp_min(1e-300)).item()


# accumulate_key_covariance_, symmetrize_


def accumulated(moment, keys, mask=None):
    count = ops.accumulate_key_covariance_(moment, keys, mask)
    ops.symmetrize_(moment)
    return count


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("d", SIZES)
def test_key_covariance_is_as_accurate_as_torch(device, dtype, d):
    for n in (1, 7, 300):
        keys = torch.randn(n, d, device=device).to(dtype)
        truth = keys.double().T @ keys.double()
        moment, twin = torch.zeros(2, d, d, device=device)
        assert accumulated(moment, keys) == n
        assert reference.accumulate_key_covariance_(twin, keys) == n
        slack = 1e-7
        if (
            device.type == "cuda"
        ):  # a float32 key is two TF32 numbers, 22 bits; others' sums are cut, not rounded
            slack = 6e-7 if dtype == torch.float32 else 1e-7 + n * 2.0**-26
        assert relative_error(moment, truth) <= 2 * relative_error(twin, truth) + slack
        wide = torch.zeros(d, d, device=device, dtype=torch.float64)
        accumulated(wide, keys)
        assert relative_error(wide, truth) <= 1e-14


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_key_covariance_in_wide_tiles(device, dtype):
    d = 6000 if device.type == "cuda" else 600  # wide tiles are for moments that fill a large GPU
    keys = torch.randn(70, d, device=device).to(dtype)
    mask = torch.rand(70, device=device) < 0.6
    keys[~mask] = torch.nan
    moment = torch.zeros(d, d, device=device)
    assert accumulated(moment, keys, mask) == mask.sum().item()
    chosen = keys[mask].double()
    assert relative_error(moment, chosen.T @ chosen) <= 1e-6


def test_key_covariance_adds_to_what_is_there(device):
    keys = torch.randn(2, 50, 33, device=device)
    moment = torch.zeros(33, 33, device=device)
    ops.accumulate_key_covariance_(moment, keys[0])
    ops.accumulate_key_covariance_(moment, keys[1])
    ops.symmetrize_(moment)
    every = keys.reshape(-1, 33).double()
    torch.testing.assert_close(moment.double(), every.T @ every, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [*TYPES, torch.float64])
@pytest.mark.parametrize("d", [7, 40, 300])
def test_key_covariance_counts_the_masked_keys_only(device, dtype, d):
    keys = torch.randn(5, 37, d, device=device).to(dtype)
    mask = torch.rand(5, 37, device=device) < 0.6
    keys[~mask] = torch.nan  # must not be read into the sums
    moment = torch.zeros(d, d, device=device, dtype=torch.float64)
    assert accumulated(moment, keys, mask) == mask.sum().item()
    chosen = keys[mask].double()
    torch.testing.assert_close(moment, chosen.T @ chosen, rtol=1e-12, atol=1e-12)


def test_key_covariance_of_more_keys_than_the_buffer_holds():
    d, n = 600, 30_000  # 27,962 rows fit
    keys = torch.randn(n, d).bfloat16()
    moment = torch.zeros(d, d)
    assert accumulated(moment, keys) == n
    assert relative_error(moment, keys.double().T @ keys.double()) <= 1e-6


@pytest.mark.parametrize("view", ["row step", "column step", "transposed", "offset", "batch slice"])
@pytest.mark.parametrize("dtype", TYPES)
def test_key_covariance_of_strided_keys(device, dtype, view):
    whole = torch.randn(66, 80, 48, device=device).to(dtype)
    keys = {
        "row step": whole[0, ::3],
        "column step": whole[0, :, ::2],
        "transposed": whole[0].T,
        "offset": whole[0].flatten()[1 : 1 + 48 * 60].view(60, 48),
        "batch slice": whole[3:9, 5:50, 1:34],
    }[view]
    moment = torch.zeros(keys.shape[-1], keys.shape[-1], device=device)
    accumulated(moment, keys)
    flat = keys.reshape(-1, keys.shape[-1]).double()
    truth = flat.T @ flat
    cut = len(flat) * 2.0**-26 if device.type == "cuda" and dtype != torch.float32 else 0.0
    assert relative_error(moment, truth) <= 1e-6 + cut


def test_key_covariance_of_nothing(device):
    moment = torch.ones(5, 5, device=device)
    assert ops.accumulate_key_covariance_(moment, torch.empty(0, 5, device=device)) == 0
    mask = torch.zeros(2, 3, dtype=torch.bool, device=device)
    assert ops.accumulate_key_covariance_(moment, torch.randn(2, 3, 5, device=device), mask) == 0
    assert (moment == 1).all()


def test_key_covariance_refuses_what_does_not_fit():
    moment, keys = torch.zeros(4, 4), torch.randn(2, 3, 4)
    for bad_moment, bad_keys, bad_mask, word in [
        (torch.zeros(4, 5), keys, None, "moment"),
        (moment.half(), keys, None, "moment"),
        (torch.zeros(8, 8)[::2, ::2], keys, None, "contiguous"),
        (moment, torch.randn(3, 5), None, "keys"),
        (moment, torch.ones(3, 4, dtype=torch.int64), None, "keys"),
        (moment, keys.double(), None, "float64"),
        (moment, keys, torch.ones(2, 4, dtype=torch.bool), "mask"),
        (moment, keys, torch.ones(2, 3), "mask is float32; it must be bool"),
        (moment, keys.to("meta"), None, "meta"),
    ]:
        with pytest.raises(D4SError, match=word):
            ops.accumulate_key_covariance_(bad_moment, bad_keys, bad_mask)
    assert (moment == 0).all()


@pytest.mark.parametrize("side", [1, 2, 7, 8, 9, 16, 37, 112])
def test_triangle_tiles_come_once_each_and_in_bands(side):
    tiles = ops._C.lower_triangle_tiles(side)
    assert sorted(tiles) == [(row, col) for row in range(side) for col in range(row + 1)]
    bands = [row // 8 for row, _ in tiles]
    assert bands == sorted(bands)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [0, *SIZES])
def test_symmetrize_mirrors_the_lower_triangle(device, dtype, d):
    matrix = torch.randn(d, d, device=device, dtype=dtype)
    expected = reference.symmetrize_(matrix.clone())
    assert ops.symmetrize_(matrix) is matrix
    assert torch.equal(matrix, expected)


# closed_form


def systems(layers, d_out, d_in, dtype, device):
    keys = torch.randn(layers, 3, d_in, dtype=torch.float64, device=device)
    residuals = torch.randn(layers, 3, d_out, dtype=torch.float64, device=device)
    root = torch.randn(layers, d_in, 2 * d_in + 3, dtype=torch.float64, device=device)
    prior = root @ root.mT
    return (residuals.mT @ keys).to(dtype), (keys.mT @ keys).to(dtype), prior.to(dtype)


@pytest.mark.parametrize("d_in", [1, 7, 33, 200])
def test_closed_form_solves_every_layer(device, d_in):
    arguments = systems(3, 5, d_in, torch.float64, device)
    delta = ops.closed_form(*arguments)
    torch.testing.assert_close(delta, reference.closed_form(*arguments), rtol=1e-9, atol=1e-11)
    single = ops.closed_form(*(a.float() for a in arguments))
    assert single.dtype == torch.float32
    assert relative_error(single, delta) <= 1e-3


def test_closed_form_reads_strided_sums_and_lower_triangles(device):
    residual_sum, key_sum, prior = systems(2, 5, 33, torch.float64, device)
    truth = reference.closed_form(residual_sum, key_sum, prior)
    strided = residual_sum.mT.contiguous().mT
    delta = ops.closed_form(strided, key_sum.tril(), prior.tril())
    torch.testing.assert_close(delta, truth, rtol=1e-9, atol=1e-11)


def test_closed_form_of_no_layers(device):
    empty = torch.zeros(0, 4, 4, device=device)
    assert ops.closed_form(torch.zeros(0, 3, 4, device=device), empty, empty).shape == (0, 3, 4)


@pytest.mark.parametrize("damage", ["indefinite", "nan on the diagonal", "nan below it", "inf"])
def test_closed_form_names_the_layer_that_has_no_factor(device, damage):
    residual_sum, key_sum, prior = systems(3, 5, 33, torch.float64, device)
    if damage == "indefinite":
        prior[1] = -prior[1]
    else:
        i, j, value = {
            "nan on the diagonal": (4, 4, torch.nan),
            "nan below it": (9, 2, torch.nan),
            "inf": (4, 4, torch.inf),
        }[damage]
        prior[1, i, j] = value
    with pytest.raises(NotPositiveDefiniteError, match="layer 1 of 3"):
        ops.closed_form(residual_sum, key_sum, prior)


def test_closed_form_refuses_what_does_not_fit():
    residual_sum, key_sum, prior = systems(2, 5, 7, torch.float64, "cpu")
    for arguments, word in [
        ((residual_sum[0], key_sum, prior), "residual_sum"),
        ((residual_sum, key_sum[:1], prior), "key_sum"),
        ((residual_sum, key_sum, prior[..., :3]), "prior"),
        ((residual_sum.float(), key_sum, prior), "one type"),
        ((residual_sum.half(), key_sum.half(), prior.half()), "float64"),
        ((residual_sum * torch.nan, key_sum, prior), "residual_sum"),
    ]:
        with pytest.raises(D4SError, match=word):
            ops.closed_form(*arguments)


# write_back_


def awkward_numbers(*shape, device, dtype):
    """Magnitudes over the whole range of half precision, ties, zeros, subnormals and an overflow."""
    exponent = torch.randint(-26, 17, shape, device=device)
    numbers = torch.ldexp(torch.randn(*shape, device=device, dtype=torch.float64), exponent)
    flat = numbers.view(-1)
    flat[::5] = flat[::5].bfloat16().double() * (1 + 2**-9)  # half-way between two bfloat16 numbers
    flat[::7] = flat[::7].bfloat16().double() * (1 + 2**-9 + 2**-40)  # a tie after rounding to float32
    flat[::11] = 0.0
    return numbers.to(dtype)


@pytest.mark.parametrize("dtype", [*TYPES, torch.float64])
@pytest.mark.parametrize("delta_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_write_back_is_torch_bit_for_bit(device, dtype, delta_dtype, transposed):
    for d_out, d_in in [*itertools.product((1, 7, 33), repeat=2), (1000, 33), (64, 1032)]:
        shape = (d_in, d_out) if transposed else (d_out, d_in)
        base = awkward_numbers(*shape, device=device, dtype=dtype)
        delta = awkward_numbers(d_out, d_in, device=device, dtype=delta_dtype)
        weight, twin = torch.empty_like(base), torch.empty_like(base)
        l1, delta_sq = ops.write_back_(weight, base, delta, transposed)
        true_l1, true_delta_sq = reference.write_back_(twin, base, delta, transposed)
        assert torch.equal(weight, twin)
        torch.testing.assert_close(l1, true_l1, rtol=1e-12, atol=0, equal_nan=True)
        torch.testing.assert_close(delta_sq, true_delta_sq, rtol=1e-12, atol=0, equal_nan=True)
        assert l1.dtype == delta_sq.dtype == torch.float64
        assert l1.device == weight.device


@pytest.mark.parametrize("dtype", TYPES)
def test_write_back_keeps_nan_and_infinity_where_they_are(device, dtype):
    base = torch.randn(16, 24, device=device).to(dtype)
    delta = torch.zeros(16, 24, device=device, dtype=torch.float64)
    delta[3, 5], delta[4, 6], delta[5, 7] = torch.nan, torch.inf, 1e300
    weight = torch.empty_like(base)
    ops.write_back_(weight, base, delta)
    assert torch.equal(weight.isnan().nonzero(), torch.tensor([[3, 5]], device=device))
    assert torch.equal(weight.isinf().nonzero(), torch.tensor([[4, 6], [5, 7]], device=device))


def test_write_back_of_strided_tensors(device):
    base = torch.randn(33, 70, device=device).bfloat16()
    delta = torch.randn(33, 70, device=device, dtype=torch.float64)
    truth = (base.double() + delta).bfloat16()
    room = torch.zeros(33, 100, device=device, dtype=torch.bfloat16)
    ops.write_back_(room[:, 5:75], base.T.contiguous().T, delta.T.contiguous().T)
    assert torch.equal(room[:, 5:75], truth)
    assert room.count_nonzero() == truth.count_nonzero()
    lying = torch.zeros(70, 33, device=device, dtype=torch.bfloat16).T
    ops.write_back_(lying, base, delta.repeat(1, 2)[:, ::1][:, :70])
    assert torch.equal(lying, truth)
    ops.write_back_(lying, base, torch.stack([delta, delta], dim=2).view(33, 140)[:, ::2])
    assert torch.equal(lying, truth)


def test_write_back_writes_a_parameter_and_may_write_its_base(device):
    parameter = torch.nn.Parameter(torch.randn(9, 11, device=device))
    delta = torch.randn(9, 11, device=device)
    truth = parameter.detach() + delta
    ops.write_back_(parameter, parameter, delta)
    assert torch.equal(parameter.detach(), truth)
    assert parameter.grad_fn is None


def test_write_back_of_nothing(device):
    empty = torch.empty(0, 5, device=device)
    l1, delta_sq = ops.write_back_(empty, empty.clone(), torch.empty(0, 5, device=device))
    assert l1 == delta_sq == 0


def test_write_back_refuses_what_does_not_fit():
    weight, delta = torch.zeros(4, 6), torch.zeros(4, 6)
    for arguments, word in [
        ((weight, weight, delta.T), "weight"),
        ((weight, weight, delta, True), "transposed"),
        ((weight, weight.half(), delta), "base"),
        ((weight, weight[:2], delta), "base"),
        ((weight, weight, delta.half()), "delta"),
        ((torch.zeros(8, 12)[::2, ::2], weight, delta), "dense"),
        ((weight.int(), weight.int(), delta), "weight"),
    ]:
        with pytest.raises(D4SError, match=word):
            ops.write_back_(*arguments)


def test_sums_do_not_depend_on_the_run(device):
    base = torch.randn(515, 1031, device=device)
    delta = torch.randn(515, 1031, device=device)
    threads = torch.get_num_threads()
    try:
        results = set()
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            sums = ops.write_back_(torch.empty_like(base), base, delta)
            results.add((sums[0].item(), sums[1].item(), ops.l1_norms([base])[0].item()))
    finally:
        torch.set_num_threads(threads)
    assert len(results) == 1


# l1_norms


def l1_error(dtype: torch.dtype) -> float:
    """Relative. Four bfloat16 numbers are added in float32: exact unless one is 2¹⁴ times another."""
    return 2.0**-23 if dtype == torch.bfloat16 else 1e-12


@pytest.mark.parametrize("dtype", [*TYPES, torch.float64])
def test_l1_norms_are_float64_sums(device, dtype):
    weights = [torch.randn(a, b, device=device).to(dtype) for a, b in itertools.product(SIZES, repeat=2)]
    norms = ops.l1_norms(weights)
    assert norms.dtype == torch.float64
    torch.testing.assert_close(norms, reference.l1_norms(weights), rtol=l1_error(dtype), atol=0)


def test_l1_norms_of_many_shapes_types_and_strides(device):
    whole = torch.randn(64, 48, 5, device=device)
    weights = [
        whole[..., 0],
        whole[:, 3].T,
        whole[::3, ::2].bfloat16(),
        whole.flatten()[1:78].half(),
        whole.bfloat16().flatten()[3:],
        whole[0, 0, 0],
        torch.empty(0, 7, device=device),
    ] * 30  # more than one launch of the CUDA kernel takes
    found = zip(ops.l1_norms(weights), reference.l1_norms(weights), weights, strict=True)
    for norm, truth, weight in found:
        torch.testing.assert_close(norm, truth, rtol=l1_error(weight.dtype), atol=0)
    assert ops.l1_norms([]).shape == (0,)


def test_memory_that_is_read_while_it_is_written_is_refused():
    square, keys = torch.randn(6, 6), torch.randn(6, 6)
    with pytest.raises(D4SError, match="keys shares memory with moment"):
        ops.accumulate_key_covariance_(square, square)
    with pytest.raises(D4SError, match="delta shares memory with weight"):
        ops.write_back_(square, keys, square.T)
    with pytest.raises(D4SError, match="base shares memory with weight"):
        ops.write_back_(square, square.T, keys)
    memory = torch.randn(42)
    with pytest.raises(D4SError, match="base shares memory with weight"):
        ops.write_back_(memory[6:].view(6, 6), memory[:36].view(6, 6), keys)
    numbers = np.zeros((6, 6), dtype=np.float32)  # one memory, two storages
    with pytest.raises(D4SError, match="keys shares memory with moment"):
        ops.accumulate_key_covariance_(torch.from_numpy(numbers), torch.from_numpy(numbers))
    wanted = (square.double() + keys.double()).float()
    ops.write_back_(square, square, keys)  # the same elements
    assert torch.equal(square, wanted)


def test_views_that_overlap_are_refused_however_they_lie():
    moment, weight = torch.randn(60, 60), torch.randn(64, 64)
    before = weight.clone()
    with pytest.raises(D4SError, match="keys shares memory with moment"):
        ops.accumulate_key_covariance_(moment, moment[::2])
    with pytest.raises(D4SError, match="delta shares memory with weight"):
        ops.write_back_(weight[:, 16:48], torch.zeros(64, 32), weight[:, :32])
    with pytest.raises(D4SError, match="base shares memory with weight"):
        ops.write_back_(weight[1:, :40], weight[:63, :40], torch.zeros(63, 40))
    assert torch.equal(weight, before)
    ops.write_back_(weight[1:, :40], weight[1:, :40], torch.ones(63, 40))  # its own base
    ops.write_back_(weight[:10, :40], torch.zeros(10, 40), weight[20:30, :40].clone())
    before[1:, :40] += 1
    before[:10, :40] = before[20:30, :40]
    assert torch.equal(weight, before)


def test_a_negated_view_is_read_with_its_sign():
    change = torch.complex(torch.randn(5, 8), torch.randn(5, 8)).conj().imag
    assert change.is_neg()
    weight = torch.zeros(5, 8)
    ops.write_back_(weight, torch.zeros(5, 8), change)
    assert torch.equal(weight, change)
    moment = torch.zeros(8, 8)
    accumulated(moment, change)
    torch.testing.assert_close(moment, change.T @ change)
    with pytest.raises(D4SError, match=r"weight\.resolve_neg"):
        ops.write_back_(torch._neg_view(torch.zeros(5, 8)), torch.zeros(5, 8), torch.zeros(5, 8))


def test_autograd_knows_of_a_write():
    weight, inputs = torch.randn(4, 6), torch.randn(3, 6, requires_grad=True)
    loss = (inputs @ weight.T).sum()
    ops.write_back_(weight, torch.zeros(4, 6), torch.zeros(4, 6))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_weight_of_one_row_may_have_any_stride():
    weight = torch.zeros(5, 1).t()
    ops.write_back_(weight, torch.zeros(1, 5), torch.arange(5.0)[None])
    assert weight.tolist() == [[0, 1, 2, 3, 4]]


def test_l1_norms_do_not_overflow_where_the_sum_does_not(device):
    weight = torch.full((64, 3), 2e38, dtype=torch.bfloat16, device=device)
    assert ops.l1_norms([weight]).item() == pytest.approx(weight.double().sum().item(), rel=1e-12)


def test_l1_norms_refuse_what_is_no_weight():
    with pytest.raises(D4SError, match=r"weights\[1\] is int32"):
        ops.l1_norms([torch.ones(3), torch.ones(3, dtype=torch.int32)])
    with pytest.raises(D4SError, match=r"weights\[1\] is on meta"):
        ops.l1_norms([torch.ones(3), torch.ones(3, device="meta")])


# every op


@pytest.fixture(scope="module")
def cases_of_foreign_tensors() -> list[str]:
    """What foreign_tensors.py prints."""
    child = subprocess.run(
        [sys.executable, foreign_tensors.__file__],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.returncode == 0, child.stderr
    return child.stdout.splitlines()


@pytest.mark.parametrize("op", foreign_tensors.arguments_that_fit())
def test_tensors_that_are_not_plain_memory_are_refused_by_name(cases_of_foreign_tensors, op):
    own = [line.removeprefix(f"{op}: ") for line in cases_of_foreign_tensors if line.startswith(f"{op}: ")]
    assert [case for case in own if not case.endswith(": refused")] == ["done"]
    tried = {case.split(", ")[1].removesuffix(": refused") for case in own[:-1]}
    # Other layouts torch may lose.
    assert tried >= {"sparse", "csr", "mkldnn", "jagged", "meta", "fake", "a wrapper", "vmap", "emptied"}
    assert tried >= {"torch.int64", "torch.complex64", "torch.float8_e4m3fn"}


@pytest.mark.parametrize("mode", ["none", "fake", "inference", "autocast", "vmap", "grad", "functionalize"])
def test_modes_of_torch_do_not_come_between_the_ops_and_memory(device, mode):
    keys, weight = torch.randn(2, 4, 4, device=device)
    mask, residual_sum, prior = keys[:, 0] < 9, keys[None], torch.eye(4, device=device)[None]
    moment, written = torch.zeros(2, 4, 4, device=device)

    def results() -> list[torch.Tensor]:
        assert ops.accumulate_key_covariance_(moment, keys, mask) == 4
        ops.symmetrize_(moment)
        delta = ops.closed_form(residual_sum, prior, prior)
        return [moment, delta, written, *ops.write_back_(written, weight, keys), ops.l1_norms([weight, keys])]

    truth = [value.clone() for value in results()]
    for value in (moment, written):
        value.zero_()
    found: list[torch.Tensor] = []
    if mode in ("vmap", "grad", "functionalize"):
        transform = torch.vmap if mode == "vmap" else getattr(torch.func, mode)
        transform(lambda x: (x.sum(), found.extend(results()))[0])(torch.ones(2, device=device))
    else:
        modes = {
            "none": nullcontext(),
            "fake": FakeTensorMode(),
            "inference": torch.inference_mode(),
            "autocast": torch.autocast(device.type, dtype=torch.bfloat16),
        }
        with modes[mode]:
            found = results()
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_sum_in_float32_is_whole_whatever_the_process_is_set_to(reduced, dtype):
    """At "medium" torch multiplies float32 on a CPU in bfloat16: C was off by 2e-3."""
    keys = torch.randn(512, 512).to(dtype)
    moment = torch.zeros(512, 512)
    ops.accumulate_key_covariance_(moment, keys)
    delta = ops.closed_form(torch.ones(1, 3, 512), torch.zeros(1, 512, 512), 512 * torch.eye(512)[None])
    assert torch.get_float32_matmul_precision() == reduced
    truth = (keys.double().T @ keys.double()).tril()
    assert (moment.tril() - truth).norm() < 1e-5 * truth.norm()
    torch.testing.assert_close(delta, torch.full((1, 3, 512), 1 / 512))
