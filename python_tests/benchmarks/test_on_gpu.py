"""The script for a machine with a GPU, as far as a machine without one can tell."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))  # behind all else: d4s is the one that is tested
from benchmarks import limits

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "on_gpu.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


def said(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], capture_output=True, text=True, env=os.environ | environment
    )


def test_it_can_be_read():
    done = subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", "-S", "warning", str(SCRIPT)]).returncode == 0


@pytest.mark.parametrize(
    ("stage", "commands"),
    [
        ("build", ["cmake --build", "pytest -k cuda"]),
        ("sanitize", ["cmake --build", "--tool memcheck", "--tool racecheck", "--tool synccheck"]),
        ("claims", ["benchmarks.limits", "benchmarks.claims", "bench_closed_form"]),
        ("model", ["--methods d4s", "--methods rome", "--count 7", "benchmarks.real.tables"]),
    ],
)
def test_a_dry_run_names_every_command_and_makes_nothing(stage, commands, tmp_path):
    out = tmp_path / "out"
    done = said("--dry-run", stage, OUT=str(out), EDITS="e.json", CORPUS="c.txt", TEXT="t.txt", COUNT="7")
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in commands)
    assert not out.exists()
    seconds = [int(found) for found in re.findall(r"^(\d+) s: ", done.stdout, re.MULTILINE)]
    assert len(seconds) == len(done.stdout.splitlines()) and max(seconds) <= 240
    files = re.findall(r"(?:python_tests|benchmarks)/[\w/.]+\.py", done.stdout)
    modules = [f"{m.replace('.', '/')}.py" for m in re.findall(r"-m (benchmarks[\w.]+)", done.stdout)]
    assert all((ROOT / name).exists() for name in (*files, *modules))


def test_every_test_that_takes_a_device_runs_on_a_gpu(tmp_path):
    told = said("--dry-run", "build", OUT=str(tmp_path)).stdout
    asked = {name for name in re.findall(r"python_tests/(\w+)(?= |$)", told, re.MULTILINE)}
    on_a_device = re.compile(r"^def test_\w+\([^)]*\bdevice\b", re.MULTILINE)
    tests = ROOT / "python_tests"
    taking = {path for path in tests.rglob("test_*.py") if on_a_device.search(path.read_text())}
    assert taking and {path.relative_to(tests).parts[0] for path in taking} <= asked


def test_no_stage_takes_more_than_four_minutes(tmp_path):
    done = said("--dry-run", "claims", OUT=str(tmp_path), STAGE_SECONDS="20")
    assert max(int(found) for found in re.findall(r"^(\d+) s: ", done.stdout, re.MULTILINE)) <= 20


def test_wrong_words_are_told(tmp_path):
    assert "usage: OUT=FOLDER benchmarks/on_gpu.sh" in said().stderr
    wrong = said("modle", OUT=str(tmp_path))
    assert (
        wrong.returncode == 2
        and "unknown stage modle; there are build, sanitize, claims, model" in wrong.stderr
    )
    lacking = said("--dry-run", "model", OUT=str(tmp_path))
    assert lacking.returncode != 0 and "EDITS: counterfact.json" in lacking.stderr


def test_parts_become_the_file_they_were(tmp_path, draw):
    whole = bytes(draw.randrange(256) for _ in range(3000))
    cuts = [0, *sorted(draw.sample(range(1, 3000), 2)), 3000]
    for i, (a, b) in enumerate(pairwise(cuts), 1):
        (tmp_path / f"m.gguf.part{i}").write_bytes(whole[a:b])
    (tmp_path / "m.gguf.sha256").write_text(f"{hashlib.sha256(whole).hexdigest()}  m.gguf\n")
    done = said("join", str(tmp_path / "m.gguf"))
    assert done.returncode == 0 and (tmp_path / "m.gguf").read_bytes() == whole, done.stderr
    (tmp_path / "m.gguf").write_bytes(whole[:-1])
    damaged = said("join", str(tmp_path / "m.gguf"))
    assert damaged.returncode == 1 and "must be" in damaged.stderr
    nothing = said("join", str(tmp_path / "other.gguf"))
    assert nothing.returncode == 1 and "neither it nor" in nothing.stderr


def test_limits_are_measured_and_shares_follow(tmp_path):
    limits.main(["--size", "64", "--rounds", "1", "--out", str(tmp_path / "limits.json")])
    told = json.loads((tmp_path / "limits.json").read_text())
    assert set(told["limits"]) == {"bytes", "bfloat16", "float32", "float64"}
    for row in told["ops"]:
        share = row["amount"] / row["seconds"] / told["limits"][row["limit"]]
        assert row["share"] == pytest.approx(share) and row["share"] > 0
    assert {row["op"].split(",")[0] for row in told["ops"]} == {
        "key covariance",
        "write-back and norms",
        "L1 norm",
        "closed form",
    }
