"""The embedded model: a small language model that knows CounterFact's facts, and the edits made on it."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from d4s.edits import Edit
from d4s.edits.formats import load_edits


def folder() -> Path:
    """Where the package keeps the embedded model and its facts."""
    return Path(str(resources.files("d4s.embedded")))


def load_demo_edits(limit: int | None = None) -> list[Edit]:
    """CounterFact records whose facts the embedded model knows; distinct facts, none contradicts another."""
    return load_edits(folder() / "counterfact.json", limit=limit)
