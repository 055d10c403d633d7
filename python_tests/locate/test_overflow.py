"""A target's search in float16: what is searched stays float32, and what overflows is told with its place."""

from __future__ import annotations

import pytest
import torch
from support.tiny import tiny_model, tiny_tokenizer
from support.workbench import SUBJECT_LAST

from d4s.errors import ModelError
from d4s.locate.targets import TargetConfig, optimise_targets
from d4s.models.architectures import Anatomy

CONFIG = TargetConfig(steps=4, learning_rate=1.0, weight_decay=0.0, clamp=5.0)


def searched(model, config=CONFIG):
    return optimise_targets(Anatomy(model), tiny_tokenizer(), SUBJECT_LAST, (), 0, config)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_targets_of_half_precision_weights_are_float32(dtype, seed):
    found = searched(tiny_model("llama", seed, dtype))
    for tensor in (found.start, found.delta, found.first_probability, found.last_probability):
        assert tensor.dtype == torch.float32 and torch.isfinite(tensor).all()
    # Not rounded to the weights' type: almost no float32 number is one of its numbers.
    assert not torch.equal(found.delta, found.delta.to(dtype).float())


def overflowing(seed, dtype):
    """In block 1 two neurons of the MLP go beyond 65504, one where x adds up to more than nothing and one to less."""
    model = tiny_model("llama", seed, dtype)
    with torch.no_grad():
        mlp = model.model.layers[1].mlp
        mlp.down_proj.weight.fill_(60_000.0)
        for part in (mlp.up_proj, mlp.gate_proj):
            part.weight[0], part.weight[1] = 1_000.0, -1_000.0
    return model


def test_an_overflow_is_told_with_the_block_and_what_to_do(seed):
    with pytest.raises(ModelError) as failure:
        searched(overflowing(seed, torch.float16))
    text = str(failure.value)
    assert text.startswith(f"edit {SUBJECT_LAST[0].id}: ") or text.startswith(f"edit {SUBJECT_LAST[1].id}: ")
    assert "overflowed float16, which ends at 65504, in model.layers.1" in text
    assert "--dtype bfloat16" in text and "clamp=5" in text


def test_bfloat16_has_room_for_the_same(seed):
    found = searched(overflowing(seed, torch.bfloat16))
    assert torch.isfinite(found.delta).all()
