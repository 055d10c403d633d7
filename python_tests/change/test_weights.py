"""The one place that writes weights: rounded once from W0 + Δ, measured, and put back bit for bit."""

from __future__ import annotations

import pytest
import torch
from support.tiny import tiny_model

from d4s.change.weights import EditedWeights
from d4s.errors import ConfigError, ModelError
from d4s.models.architectures import Anatomy

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYERS = (0, 2)


def edited(model_type: str, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Anatomy, EditedWeights]:
    anatomy = Anatomy(tiny_model(model_type, seed, dtype))
    return anatomy, EditedWeights(anatomy, LAYERS)


def snapshot(anatomy: Anatomy) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in anatomy.model.state_dict().items()}


def changed(anatomy: Anatomy, before: dict[str, torch.Tensor]) -> set[str]:
    return {
        name for name, value in anatomy.model.state_dict().items() if not torch.equal(value, before[name])
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
@pytest.mark.parametrize("delta_dtype", [torch.float32, torch.float64])
def test_a_write_rounds_once_from_the_unedited_weight(model_type, dtype, delta_dtype, seed):
    anatomy, weights = edited(model_type, seed, dtype)
    before = snapshot(anatomy)
    base = anatomy.weight(2).detach().clone()
    for _ in range(3):  # a later write starts from W0 again, not from what the earlier one has left
        delta = torch.randn(anatomy.shape(2), dtype=delta_dtype) * 0.1
        weights.write_(2, delta)
        wanted = delta.T if anatomy.transposed(2) else delta
        assert torch.equal(anatomy.weight(2), (base.double() + wanted.double()).to(dtype))
    assert anatomy.transposed(2) == (model_type == "gpt2")
    assert changed(anatomy, before) == {anatomy.weight_name(2)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_thousand_small_steps_are_not_lost_to_rounding(dtype, seed):
    """Each step is far below the last bit of the weights; their sum is not."""
    anatomy, weights = edited("llama", seed, dtype)
    base = anatomy.weight(0).detach().clone()
    total = torch.zeros(anatomy.shape(0), dtype=torch.float64)
    step = torch.randn(anatomy.shape(0), dtype=torch.float64) * 1e-5
    for _ in range(1000):
        total += step
        weights.write_(0, total)
    assert torch.equal(anatomy.weight(0), (base.double() + total).to(dtype))
    added = base.clone()
    for _ in range(1000):
        added = (added.double() + step).to(dtype)
    assert (added.double() - base.double() - total).norm() > 0.5 * total.norm(), "which is what W0 + Δ avoids"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_norms_are_those_of_the_stored_weights(model_type, dtype, seed):
    anatomy, weights = edited(model_type, seed, dtype)
    base = {layer: anatomy.weight(layer).detach().double() for layer in LAYERS}
    error = 2.0**-23 if dtype == torch.bfloat16 else 1e-12  # of ops.l1_norms on a CPU

    def check():
        for layer in LAYERS:
            stored = anatomy.weight(layer).detach().double()
            change = stored - base[layer]
            assert weights.mean_absolute()[layer] == pytest.approx(float(stored.abs().mean()), rel=error)
            assert weights.delta_norm()[layer] == pytest.approx(float(change.norm()), rel=1e-12, abs=1e-30)
            found = weights.delta(layer)
            assert found.dtype == torch.float64 and found.shape == anatomy.shape(layer)
            assert torch.equal(found, change.T if anatomy.transposed(layer) else change)

    check()
    assert weights.delta_norm() == {0: 0.0, 2: 0.0}
    weights.write_(2, torch.randn(anatomy.shape(2)) * 0.05)
    check()
    assert weights.delta_norm()[0] == 0 < weights.delta_norm()[2]
    anatomy.weight(0).data.mul_(1.5)  # a method that writes by other means
    weights.measure()
    check()


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_a_change_that_is_not_finite_or_does_not_fit_writes_nothing(model_type, seed):
    anatomy, weights = edited(model_type, seed)
    weights.write_(2, torch.randn(anatomy.shape(2)) * 0.1)
    before, norms = snapshot(anatomy), (weights.mean_absolute(), weights.delta_norm())
    for bad in (float("nan"), float("inf"), -float("inf")):
        delta = torch.zeros(anatomy.shape(2))
        delta[5, 7] = bad
        with pytest.raises(ModelError, match=r"2\.mlp\..*weight is not finite; nothing was written"):
            weights.write_(2, delta)
    d_out, d_in = anatomy.shape(2)
    for shape in ((d_in, d_out), (d_out, d_in - 1), (d_out * d_in,), (1, d_in)):
        with pytest.raises(
            ModelError, match=rf"is \[{d_out}, {d_in}\] \(d_out, d_in\), so its change must be, and is"
        ):
            weights.write_(2, torch.zeros(shape))
    assert not changed(anatomy, before)
    assert (weights.mean_absolute(), weights.delta_norm()) == norms


def test_at_base_shows_the_unedited_model_and_swaps_back(seed):
    anatomy, weights = edited("gpt2", seed)
    before = snapshot(anatomy)
    ids = torch.randint(2, 300, (1, 9))
    with torch.no_grad():
        unedited = anatomy.model(ids).logits
        for layer in LAYERS:
            weights.write_(layer, torch.randn(anatomy.shape(layer)) * 0.1)
        after, now = snapshot(anatomy), anatomy.model(ids).logits
        with weights.at_base():
            assert torch.equal(anatomy.model(ids).logits, unedited) and not changed(anatomy, before)
        assert torch.equal(anatomy.model(ids).logits, now) and not changed(anatomy, after)
    assert not torch.equal(now, unedited)


def test_at_base_swaps_back_after_an_error_and_what_follows_is_written_to_the_model(seed):
    anatomy, weights = edited("llama", seed)
    parameter = anatomy.weight(2)
    for layer in LAYERS:
        weights.write_(layer, torch.randn(anatomy.shape(layer)) * 0.1)
    after = snapshot(anatomy)
    with pytest.raises(ZeroDivisionError), weights.at_base():
        raise ZeroDivisionError
    assert anatomy.weight(2) is parameter and not changed(anatomy, after)
    delta = torch.randn(anatomy.shape(2)) * 0.1
    weights.write_(2, delta)
    assert torch.equal(parameter, (weights.base[2].double() + delta).float())
    weights.restore_()
    assert weights.delta_norm()[2] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_restore_is_bit_for_bit(model_type, dtype, seed):
    anatomy, weights = edited(model_type, seed, dtype)
    before, norms = snapshot(anatomy), weights.mean_absolute()
    for layer in LAYERS:
        weights.write_(layer, torch.randn(anatomy.shape(layer)) * 0.1)
    assert changed(anatomy, before) == {anatomy.weight_name(layer) for layer in LAYERS}
    weights.restore_()
    assert not changed(anatomy, before)
    assert weights.delta_norm() == {0: 0.0, 2: 0.0} and weights.mean_absolute() == pytest.approx(
        norms, rel=1e-14
    )


def test_stored_weights_come_back_bit_for_bit(seed):
    anatomy, weights = edited("gpt2", seed, torch.bfloat16)
    weights.write_(0, torch.randn(anatomy.shape(0)) * 0.1)
    kept, norm = weights.current(), weights.delta_norm()
    state = snapshot(anatomy)
    weights.restore_()
    assert changed(anatomy, state), "a copy was kept, not the weight itself"
    weights.load_(kept)
    assert not changed(anatomy, state) and weights.delta_norm() == pytest.approx(norm)


def test_a_change_beyond_float16_is_refused_and_nothing_is_written(seed):
    anatomy, weights = edited("gpt2", seed, torch.float16)
    before = snapshot(anatomy)
    delta = torch.zeros(anatomy.shape(2))
    delta[1, 0] = 7e4
    with pytest.raises(ModelError, match=r"to 7e\+04, beyond float16"):
        weights.write_(2, delta)
    assert not changed(anatomy, before)


def test_a_failure_inside_all_or_nothing_leaves_weights_and_norms_as_before(seed):
    anatomy, weights = edited("gpt2", seed, torch.bfloat16)
    weights.write_(0, torch.randn(anatomy.shape(0)) * 0.1)
    state, norms = snapshot(anatomy), (weights.mean_absolute(), weights.delta_norm())
    with pytest.raises(KeyboardInterrupt), weights.all_or_nothing():
        weights.write_(0, torch.randn(anatomy.shape(0)) * 0.1)
        anatomy.weight(2).data.zero_()
        raise KeyboardInterrupt
    assert not changed(anatomy, state)
    assert (weights.mean_absolute(), weights.delta_norm()) == norms
    with weights.all_or_nothing():
        weights.write_(2, torch.randn(anatomy.shape(2)) * 0.1)
    assert changed(anatomy, state) == {anatomy.weight_name(2)}


def test_a_damaged_or_quantised_weight_is_refused_at_the_start(seed):
    anatomy = Anatomy(tiny_model("gpt2", seed))
    anatomy.weight(2).data[3, 4] = float("inf")
    with pytest.raises(ModelError, match=r"transformer\.h\.2\.mlp\.c_proj\.weight holds 1 value"):
        EditedWeights(anatomy, LAYERS)
    assert EditedWeights(anatomy, (0, 1)).layers == (0, 1)
    anatomy.projection(0).weight = torch.nn.Parameter(
        torch.ones(48, 32, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(
        ModelError, match=r"0\.mlp\.c_proj\.weight is torch\.int8.*float32, float16 or bfloat16"
    ):
        EditedWeights(anatomy, (0,))
    with pytest.raises(ConfigError, match="within 0…2"):
        EditedWeights(anatomy, (1, 3))
