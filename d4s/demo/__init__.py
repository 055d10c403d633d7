"""The embedded model: a small language model that knows CounterFact's facts, and the edits made on it."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from d4s.datasets import load_edits
from d4s.edits import Edit


def folder() -> Path:
    """Where the package keeps the embedded model and its facts."""
    return Path(str(resources.files("d4s.demo")))


def load_model(dtype: Any = None) -> tuple[Any, Any]:
    """(model, tokenizer), loaded by transformers like any other model; float32 unless dtype is given."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = folder() / "model"
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or torch.float32, **options)
    return model.eval(), AutoTokenizer.from_pretrained(path, **options)


def load_demo_edits(limit: int | None = None) -> list[Edit]:
    """CounterFact records whose facts the embedded model knows; distinct facts, none contradicts another."""
    return load_edits(folder() / "counterfact.json", limit=limit)
