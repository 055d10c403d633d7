"""The scripts of examples/ do what they say, in a process of their own, with few edits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import torch
from safetensors.torch import load_file

import d4s
from d4s.embedded import folder, load_demo_edits

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


def run(name: str, out: Path, *arguments: str) -> str:
    """What an example prints. It sees the checkout, and no network."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *arguments, "--out", out],
        cwd=out.parent,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run_here():
    tested = {"edit_and_save", "compare_methods", "explore_prior"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested


def test_a_model_is_edited_and_saved(tmp_path):
    said = run("edit_and_save", tmp_path / "edited", "--edits", "2")
    edits = load_demo_edits(limit=2)
    assert all(f"asked for: {edit.target_new}" in said for edit in edits)
    model, tokenizer = d4s.load_model(tmp_path / "edited" / "model", dtype="float32")
    assert d4s.evaluate(model, tokenizer, edits)["efficacy"] == 1.0
    now, before = (
        load_file(place / "model.safetensors") for place in (tmp_path / "edited/model", folder() / "model")
    )
    changed = [name for name in before if not torch.equal(now[name].float(), before[name].float())]
    assert changed == ["model.layers.0.mlp.down_proj.weight"]


def test_two_methods_are_compared_and_drawn(tmp_path):
    said = run("compare_methods", tmp_path / "compared", "--edits", "2", "--methods", "d4s,ft-m")
    history = pandas.read_csv(tmp_path / "compared" / "history.csv")
    assert list(history["method"].unique()) == ["d4s", "ft-m"] and history["step"].max() == 2
    for name in ("metrics", "norms"):
        assert (tmp_path / "compared" / f"{name}.png").stat().st_size > 1_000 and f"{name}.png" in said
        assert (tmp_path / "compared" / f"{name}.csv").exists()


def test_targets_are_searched_once_for_every_weight_of_the_prior(tmp_path):
    said = run("explore_prior", tmp_path / "explored", "--edits", "3", "--weights", "60,60000")
    assert len(d4s.KeptTargets.load(tmp_path / "explored" / "targets.safetensors")) == 3
    light, heavy = (line.split() for line in said.splitlines() if line.split()[0] in ("60", "60000"))
    growth = [float(line[-1].rstrip("%")) for line in (light, heavy)]
    assert growth[0] > growth[1] >= 0 and float(light[1]) > float(heavy[1])


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_an_example_says_how_it_is_run(name):
    source = (EXAMPLES / f"{name}.py").read_text("utf-8")
    assert f"    python examples/{name}.py " in source.split('"""')[1]
