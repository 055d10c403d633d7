"""Where the tests of verbs run: a folder with a model, edits, a corpus and key statistics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.command import RECORDS
from support.tiny import TEXTS, tiny_model, tiny_tokenizer

from d4s.locate.covariance import estimate_covariance


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model 'm', edits.json, corpus.txt and key statistics c.safetensors of the model."""
    folder = tmp_path_factory.mktemp("cli")
    model = tiny_model("gpt2", 1)
    model.save_pretrained(folder / "m")
    tiny_tokenizer().save_pretrained(folder / "m")
    (folder / "edits.json").write_text(json.dumps(RECORDS))
    (folder / "corpus.txt").write_text("\n".join(TEXTS * 3))
    estimate_covariance(model, tiny_tokenizer(), TEXTS * 3, progress=False).save(folder / "c.safetensors")
    return folder


@pytest.fixture(autouse=True)
def _here(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("D4S_CACHE", str(tmp_path / "cache"))
