"""The reckoning of large scales: what it simulates is bounded, and what it reckons is the code's own arithmetic."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pandas
import pytest
import torch

from d4s.change.closed_form import ClosedForm, Prior

sys.path.append(str(Path(__file__).resolve().parents[2]))  # behind all else: d4s is the one that is tested
from benchmarks import scale


def test_a_simulated_run_stays_within_its_bound_and_its_memory(seed, tmp_path):
    sizes = ("--edits", "300", "--d-in", "24", "--d-out", "8", "--size", "32")
    scale.main([*sizes, "--seed", str(seed % 1000), "--out", str(tmp_path)])
    made = pandas.read_csv(tmp_path / "edits.csv")
    assert list(made["edits"]) == [64, 128, 256, 300]
    assert made["bytes"].nunique() == 1 and (made["norm"] <= made["bound"]).all() and (made["norm"] > 0).all()
    root = (made["bound"] / made["edits"] ** 0.5).to_numpy()
    assert root == pytest.approx(root[0])  # residuals of length 1: the bound grows as √t
    costs = pandas.read_csv(tmp_path / "costs.csv")
    assert {"8B dense", "70B dense", "30B-A3B"} == set(costs["model"]) and (costs["seconds"] > 0).all()
    assert costs["edits"].max() == 1_000_000 and set(costs["devices"]) == {1, 8, 64}


def test_the_state_is_that_of_a_closed_form():
    model = replace(scale.MODELS[0], d_model=8, d_in=24, layers=1)
    closed = ClosedForm({0: Prior(torch.eye(24, dtype=torch.float64), 1.0)}, 8)
    for _ in range(3):
        closed.add_(torch.randn(1, 8), torch.randn(1, 24), 0)
        closed.delta(0)
    assert scale.state_bytes(model, 3) == scale.state_bytes(model, 10**6) == closed.nbytes


def test_dense_state_does_not_grow_and_that_of_experts_does():
    eight, seventy, experts = scale.MODELS
    for model in (eight, seventy):
        assert scale.state_bytes(model, 10) == scale.state_bytes(model, 10**6)
    assert scale.state_bytes(experts, 10**6) > 8 * 10**12
    most = scale.most_edits(experts, 8, scale.H100)
    room = 8 * scale.H100["memory"] - 2 * experts.parameters
    assert scale.state_bytes(experts, most) <= room < scale.state_bytes(experts, most + 1)


def test_more_devices_share_the_searches_alone():
    one, many = (scale.cost(scale.MODELS[1], 10**5, devices, scale.H100) for devices in (8, 64))
    assert many["searches_seconds"] == pytest.approx(one["searches_seconds"] / 8)
    assert many["keys_seconds"] == one["keys_seconds"] and many["seconds"] < one["seconds"]
