"""Products of a lower precision, for a block of code and no longer."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional

from d4s.locate.precision import products_in

CPU = torch.device("cpu")
BACKEND = getattr(torch.backends.mkldnn, "matmul", None)
has_setting = pytest.mark.skipif(not hasattr(BACKEND, "fp32_precision"), reason="torch before 2.9")


@contextmanager
def set_for_all(value):
    """Every product of the process, as the machine has it: not at all where it has no instructions for it."""
    before = BACKEND.fp32_precision
    BACKEND.fp32_precision = value
    try:
        yield
    finally:
        BACKEND.fp32_precision = before


def operands(*shape):
    """x with a gradient, a weight without, a bias."""
    return torch.randn(*shape, 64, requires_grad=True), torch.randn(48, 64), torch.randn(48)


@has_setting
@pytest.mark.parametrize("shape", [(96,), (3, 32)])
@pytest.mark.parametrize("biased", [True, False])
def test_products_with_weights_and_their_gradients_are_the_backends_own(seed, shape, biased):
    x, weight, bias = operands(*shape)
    weights = torch.randn(*shape, 48)  # of a sum of the products: the gradient that comes to them
    with set_for_all("bf16"):
        right = functional.linear(x, weight)
        (gradient,) = torch.autograd.grad(right, x, weights)
    with products_in("reduced", CPU):
        found = functional.linear(x, weight, bias) if biased else functional.linear(x, weight)
    (own,) = torch.autograd.grad(found, x, weights)  # behind the block, which the backward pass is not in
    torch.testing.assert_close(found - bias if biased else found, right, rtol=0, atol=1e-5)
    torch.testing.assert_close(own, gradient, rtol=0, atol=1e-5)


@has_setting
def test_conv1d_is_reduced_as_linear_is(seed):
    x, weight, bias = operands(96)
    with products_in("reduced", CPU):
        linear, conv1d = functional.linear(x, weight, bias), torch.addmm(bias, x, weight.T)
    assert torch.equal(linear, conv1d)


@has_setting
def test_what_has_no_weight_stays_float32(seed):
    """Attention, and weights that are trained, whose gradient would be of another precision than their product."""
    q, k = torch.randn(2, 3, 40, 64), torch.randn(2, 3, 40, 64)
    x, weight, _ = operands(96)

    def all_of_them():
        trained = functional.linear(x, weight.clone().requires_grad_())
        return q @ k.mT, functional.scaled_dot_product_attention(q, k, k), trained

    right = all_of_them()
    with products_in("reduced", CPU):
        found = all_of_them()
    assert all(map(torch.equal, found, right))


@has_setting
@pytest.mark.parametrize("set_to", ["ieee", "bf16"])
def test_the_setting_stays_what_the_user_made_it(seed, set_to):
    x, weight, _ = operands(96)
    with set_for_all(set_to):
        with products_in("reduced", CPU):
            found = functional.linear(x, weight)
            assert BACKEND.fp32_precision == set_to
        torch.autograd.grad(found.sum(), x)
        assert BACKEND.fp32_precision == set_to
        with pytest.raises(RuntimeError), products_in("reduced", CPU):
            functional.linear(x, weight.T)
        assert BACKEND.fp32_precision == set_to


def test_float32_leaves_everything_alone(seed):
    x, weight, bias = operands(96)
    right = functional.linear(x, weight, bias)
    with products_in("float32", CPU):
        assert torch.equal(functional.linear(x, weight, bias), right)


def test_a_torch_without_the_setting_takes_products_as_they_are(seed, monkeypatch):
    x, weight, bias = operands(96)
    right = functional.linear(x, weight, bias)
    monkeypatch.setattr(torch.backends.mkldnn, "matmul", None, raising=False)
    with products_in("reduced", CPU):
        assert torch.equal(functional.linear(x, weight, bias), right)


def test_a_reduced_product_is_off_by_no_more_than_bfloat16_allows(seed):
    """|x||w| 2⁻⁷ bounds the two roundings to 8 bits; float32's sum of 64 terms adds little."""
    x, weight, _ = operands(96)
    with products_in("reduced", CPU):
        found = functional.linear(x, weight).detach()
    exact = x.detach().double() @ weight.double().T
    bound = x.detach().abs().double() @ weight.abs().double().T * 2**-7
    assert ((found.double() - exact).abs() <= bound + 1e-6).all()
