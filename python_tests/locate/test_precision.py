"""Products of a lower precision, for a block of code and no longer."""

from __future__ import annotations

import pytest
import torch

from d4s.locate.precision import products_in

CPU = torch.device("cpu")
BACKEND = getattr(torch.backends.mkldnn, "matmul", None)
has_setting = pytest.mark.skipif(not hasattr(BACKEND, "fp32_precision"), reason="torch before 2.9")


@has_setting
def test_the_setting_is_as_it_was_before_after_an_error_too():
    before = BACKEND.fp32_precision
    with products_in("reduced", CPU):
        assert BACKEND.fp32_precision == "bf16"
    assert BACKEND.fp32_precision == before
    with pytest.raises(ZeroDivisionError), products_in("reduced", CPU):
        raise ZeroDivisionError
    assert BACKEND.fp32_precision == before


@has_setting
def test_what_the_user_set_comes_back():
    before = BACKEND.fp32_precision
    BACKEND.fp32_precision = "ieee"
    try:
        with products_in("reduced", CPU):
            assert BACKEND.fp32_precision == "bf16"
        assert BACKEND.fp32_precision == "ieee"
    finally:
        BACKEND.fp32_precision = before


@has_setting
def test_float32_leaves_everything_alone():
    before = BACKEND.fp32_precision
    with products_in("float32", CPU):
        assert BACKEND.fp32_precision == before


def test_a_torch_without_the_setting_takes_products_as_they_are(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "matmul", None, raising=False)
    with products_in("reduced", CPU):
        pass


def test_a_reduced_product_is_off_by_no_more_than_bfloat16_allows(seed):
    """|a||b| 2⁻⁷ bounds the two roundings to 8 bits; float32's sum of 64 terms adds little."""
    a, b = torch.randn(48, 64), torch.randn(64, 48)
    with products_in("reduced", CPU):
        found = a @ b
    bound = a.abs().double() @ b.abs().double() * 2**-7
    assert ((found.double() - a.double() @ b.double()).abs() <= bound + 1e-6).all()
