"""The norm anchor, in a world of two dimensions."""

from __future__ import annotations

import pytest
import torch

from d4s.locate.norm_anchor import anchored, mean_norm, norms
from d4s.locate.targets import Targets


def targets_of(delta, start=None):
    delta = torch.tensor(delta)
    nothing = torch.zeros(len(delta))
    return Targets(torch.zeros_like(delta) if start is None else torch.tensor(start), delta, nothing, nothing)


def test_what_is_asked_of_the_mlp_gets_the_norm_and_what_is_too_long_is_dropped():
    """v0 = (3, 0); v* = (3, 4), (3, −12), (0, 0) and (6, 8) of norm 5, 12.4, 0 and 10; m = 5."""
    found = targets_of([[0.0, 4.0], [0.0, -12.0], [-3.0, 0.0], [3.0, 8.0]], [[10.0, 1.0]] * 4)
    outputs = torch.tensor([[3.0, 0.0]] * 4)
    wanted = anchored(found, outputs, 5.0)
    assert wanted.delta.tolist() == [[0.0, 4.0], [0.0, 0.0], [-3.0, 0.0], [0.0, 4.0]]
    assert wanted.target[3].tolist() == [10.0, 5.0]  # (h − v0) + (3, 4)
    assert torch.equal(wanted.start, found.start)


def test_the_longest_twentieth_is_left_out_of_the_mean():
    lengths = torch.arange(1.0, 41.0)
    assert mean_norm(lengths.flip(0)) == pytest.approx(sum(range(1, 39)) / 38)
    assert mean_norm(lengths[:19]) == pytest.approx(10.0)
    assert norms(targets_of([[3.0, 4.0]]), torch.zeros(1, 2)).tolist() == [5.0]
