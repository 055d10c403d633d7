"""Models that cannot be read or edited: each is named, and nothing that lies beside one is ever run."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command import done, failed
from support.tiny import tiny_model, tiny_tokenizer
from transformers import MptConfig, MptForCausalLM

from d4s.cli import main


def spoiled(place: Path, name: str) -> None:
    """A copy of the model with one thing wrong."""
    shutil.rmtree(place / name, ignore_errors=True)
    shutil.copytree(place / "m", place / name)
    config, weights = place / name / "config.json", place / name / "model.safetensors"
    if name == "unknown-type":
        config.write_text(config.read_text().replace('"gpt2"', '"gpt99"'))
    elif name == "half-a-config":
        config.write_text(config.read_text()[:40])
    elif name == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif name == "no-weights":
        weights.unlink()
    elif name == "nan":
        model = tiny_model("gpt2", 1)
        model.transformer.h[1].mlp.c_fc.weight.data[0, 0] = float("nan")
        model.save_pretrained(place / name)
    elif name == "unsupported":
        tokens = len(tiny_tokenizer())
        model = MptForCausalLM(
            MptConfig(vocab_size=tokens, max_seq_len=64, d_model=16, n_layers=1, n_heads=4)
        )
        weights.unlink()
        model.save_pretrained(place / name)


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("nowhere/at/all", ["no causal language model could be loaded", "'embedded'"]),
        ("unknown-type", ["gpt99"]),
        ("half-a-config", ["config.json"]),
        ("truncated", ["could be loaded"]),
        ("no-weights", ["model.safetensors"]),
        ("nan", ["NaN", "transformer.h.1.mlp.c_fc.weight"]),
        ("unsupported", ["unknown model type 'mpt'", "'opt'", "architecture=d4s.Architecture("]),
    ],
)
def test_a_model_that_cannot_be_edited_is_named(name, texts, place, tmp_path, capsys):
    if "/" not in name:
        spoiled(place, name)
    path = str(place / name)
    line = failed(capsys, "edit", path, "edits.json", "--out", str(tmp_path / "o"), "--set", "layers=[0]")
    assert name in ("nan", "unsupported") or path in line
    assert all(text in line for text in texts), line
    assert not any((tmp_path / "o").iterdir())


class Bomb:
    """Unpickling this leaves a trace."""

    def __reduce__(self):
        return open, ("unpickled", "w")


def test_a_model_whose_files_lack_weights_is_refused(place, tmp_path, capsys):
    broken = shutil.copytree(place / "m", tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors.pop("transformer.h.1.mlp.c_proj.weight")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    line = failed(capsys, "evaluate", str(broken), "edits.json")
    assert "lack 1 weights" in line and "transformer.h.1.mlp.c_proj.weight" in line


def test_pickled_weights_are_never_read(place, capsys):
    spoiled(place, "no-weights")
    for content in (pickle.dumps(Bomb()), None):
        path = place / "no-weights" / "pytorch_model.bin"
        if content is None:
            torch.save(tiny_model("gpt2", 1).state_dict(), path)
        else:
            path.write_bytes(content)
        assert "model.safetensors" in failed(capsys, "evaluate", "no-weights", "edits.json")
    assert not Path("unpickled").exists()


def test_code_beside_a_model_never_runs_and_nobody_is_asked(place, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    monkeypatch.setattr("sys.stdin", None)
    for name, known in (("own-type", False), ("known-type", True)):
        folder = shutil.copytree(place / "m", place / name, dirs_exist_ok=True)
        (folder / "own.py").write_text("open('ran', 'w').close()\n")
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
        config["model_type"] = "gpt2" if known else "own"
        (folder / "config.json").write_text(json.dumps(config))
        if known:
            done(capsys, "evaluate", name, "edits.json", "--limit", "1")
        else:
            line = failed(capsys, "evaluate", name, "edits.json")
            assert name in line and "auto_map" in line and "never runs" in line
    tokenizer = shutil.copytree(place / "m", place / "own-tokenizer", dirs_exist_ok=True)
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "OwnTokenizer"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    (tokenizer / "own.py").write_text("open('ran', 'w').close()\n")
    assert main(["evaluate", "own-tokenizer", "edits.json", "--limit", "1"]) in (0, 1)
    assert not Path("ran").exists()
