"""Formatters, linters and types. The extra 'test' brings the tools; where one lacks, that is a failure and no skip."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INSTALL = "the extra 'test' of pyproject.toml names it; pip install '.[test]'"


def passes(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def module(name: str) -> list[str]:
    if importlib.util.find_spec(name) is None:
        pytest.fail(f"{name} is not installed: {INSTALL}", pytrace=False)
    return [sys.executable, "-m", name]


def clang_format() -> str:
    """The environment's own, beside its Python, before whatever PATH has."""
    found = shutil.which("clang-format", path=Path(sys.executable).parent) or shutil.which("clang-format")
    if found is None:
        pytest.fail(f"clang-format is not installed: {INSTALL}", pytrace=False)
    return found


def test_ruff_lint():
    passes(*module("ruff"), "check", ".")


def test_ruff_format():
    passes(*module("ruff"), "format", "--check", ".")


def test_types():
    passes(*module("mypy"))


def test_clang_format():
    sources = sorted(
        str(path) for path in ROOT.glob("csrc/**/*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")
    )
    assert sources
    passes(clang_format(), "--dry-run", "--Werror", *sources)


def test_hooks_before_a_commit_are_the_tools_of_these_tests():
    """`language: system` runs what is installed, so there is no second version of a tool to disagree with."""
    hooks = (ROOT / ".pre-commit-config.yaml").read_text("utf-8")
    assert set(re.findall(r"language: (\S+)", hooks)) == {"system"} and "rev:" not in hooks
    assert hooks.count("- repo: ") == hooks.count("- repo: local") == 1
    entries = re.findall(r"entry: (.*)", hooks)
    for tool in ("ruff check", "ruff format --check", "mypy", "clang-format --dry-run --Werror"):
        assert any(tool in entry for entry in entries), tool


@pytest.mark.parametrize("name", ["ruff", "mypy"])
def test_a_tool_that_lacks_is_a_failure(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(pytest.fail.Exception, match=f"{name} is not installed"):
        module(name)


def test_without_clang_format_that_is_a_failure(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *_arguments, **_options: None)
    with pytest.raises(pytest.fail.Exception, match="clang-format is not installed"):
        clang_format()


def test_the_extension_uses_no_streams():
    """Where a compiler has only the static libstdc++, a stream inside the extension ends the process beside torch's."""
    streams = re.compile(r"c10::str\(|<<\s*\"|stringstream|std::(cout|cerr|locale)|#include <(io|s)stream>")
    found = [
        path.name for path in ROOT.glob("csrc/**/*") if path.is_file() and streams.search(path.read_text())
    ]
    assert not found
