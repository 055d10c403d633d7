"""Patches of tiny models: weights that are changed by a known Δ, and what tests ask of all bits of a model."""

from __future__ import annotations

import pytest
import torch

from d4s.errors import ModelError
from d4s.journal.changes import Change
from d4s.journal.stored_bits import bits
from d4s.models.architectures import Anatomy

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def changed_(model, seed: int, ranks: dict[int | tuple[int, int], int], size: float = 0.01) -> list[Change]:
    """Adds a random Δ of a given rank to W of each layer, or of (layer, expert), rounding once; the changes, with exact
    factors."""
    generator = torch.Generator().manual_seed(seed)
    anatomy, changes = Anatomy(model), []
    for place, rank in ranks.items():
        layer, expert = place if isinstance(place, tuple) else (place, None)
        d_out, d_in = anatomy.shape(layer)
        left = torch.randn(d_out, rank, generator=generator, dtype=torch.float64) * size
        right = torch.randn(rank, d_in, generator=generator, dtype=torch.float64)
        weight, transposed = anatomy.weight(layer).detach(), anatomy.transposed(layer)
        weight = weight if expert is None else weight[expert]
        base, delta = weight.clone(), left @ right
        edited = (base.double() + (delta.T if transposed else delta)).to(torch.float32).to(weight.dtype)
        weight.copy_(edited)
        changes.append(Change(anatomy.weight_name(layer), base, edited, transposed, left, right, expert))
    return changes


def all_bits(model) -> dict[str, torch.Tensor]:
    return {name: bits(tensor).clone() for name, tensor in model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def interrupted(monkeypatch, action, model, path, last: torch.Tensor) -> None:
    """The action fails for want of memory as it writes `last`, and leaves every weight as it was."""
    before, copy = all_bits(model), torch.Tensor.copy_

    def full(self, *arguments, **options):
        if self.data_ptr() == last.data_ptr():
            raise torch.OutOfMemoryError("no room")
        return copy(self, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "copy_", full)
    with pytest.raises(torch.OutOfMemoryError):
        action(model, path)
    assert same(all_bits(model), before)


def refused(action, model, path, match: str, error=ModelError) -> None:
    before = all_bits(model)
    with pytest.raises(error, match=match):
        action(model, path)
    assert same(all_bits(model), before), "refused, and yet something was written"
