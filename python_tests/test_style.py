"""Formatters, linters and types, each where its tool is installed (the extra 'test' brings all)."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def passes(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def module(name: str) -> list[str]:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    return [sys.executable, "-m", name]


def test_ruff_lint():
    passes(*module("ruff"), "check", ".")


def test_ruff_format():
    passes(*module("ruff"), "format", "--check", ".")


def test_types():
    passes(*module("mypy"))


def test_clang_format():
    if shutil.which("clang-format") is None:
        pytest.skip("clang-format is not installed")
    sources = sorted(str(path) for path in ROOT.glob("csrc/**/*") if path.is_file())
    passes("clang-format", "--dry-run", "--Werror", *sources)
