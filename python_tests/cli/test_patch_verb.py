"""`d4s patch`: folders in, folders and files out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.command import done, failed
from support.tiny import tiny_model, tiny_tokenizer
from support.workbench import EDITS

from d4s.journal.edits_card import read_edits_card, write_edits_card
from d4s.models.architectures import Anatomy


@pytest.fixture(scope="module")
def edited(place) -> Path:
    """A folder beside 'm' with the same model, of which two weights were edited, and a card of the edits."""
    model = tiny_model("gpt2", 1)
    first, last = (Anatomy(model).weight(layer).data for layer in (0, 2))
    first[0] += 0.5  # of rank 1
    last[:2] += 0.5  # of rank 2
    last[0, :9] -= 1
    model.save_pretrained(place / "e")
    tiny_tokenizer().save_pretrained(place / "e")
    write_edits_card(place / "e", EDITS, base_fingerprint="", base_name="m", method="d4s", when="")
    return place / "e"


def test_a_patch_goes_from_folder_to_folder_and_back(tmp_path, edited, capsys):
    patch, there, back = tmp_path / "p.safetensors", tmp_path / "there", tmp_path / "back"
    out = done(capsys, "patch", "export", "m", "e", str(patch))
    assert "2 weights" in out and f"{len(EDITS)} edits named" in out
    done(capsys, "patch", "apply", "m", str(patch), "--out", str(there))
    made = json.loads(done(capsys, "patch", "remove", str(there), str(patch), "--out", str(back), "--json"))
    assert made["edits"] == [edit.id for edit in EDITS] and len(made["weights"]) == 2

    def bytes_of(folder: Path | str) -> bytes:
        return (Path(folder) / "model.safetensors").read_bytes()

    assert bytes_of(there) == bytes_of("e") and bytes_of(back) == bytes_of("m") != bytes_of("e")
    card = read_edits_card(there)
    assert card is not None and card.edits == EDITS and card.base_name == "m"
    assert read_edits_card(back) is None
    assert "already" in failed(capsys, "patch", "apply", str(there), str(patch), "--out", str(tmp_path / "x"))
    assert "not applied" in failed(capsys, "patch", "remove", "m", str(patch), "--out", str(tmp_path / "x"))
    assert "already holds files" in failed(capsys, "patch", "apply", "m", str(patch), "--out", str(there))


def test_a_patch_of_experts_goes_from_folder_to_folder_and_back(tmp_path, capsys):
    model = tiny_model("mixtral", 1)
    for folder in ("moe", "edited"):
        model.save_pretrained(tmp_path / folder)
        tiny_tokenizer().save_pretrained(tmp_path / folder)
        Anatomy(model).weight(1).data[2, 0] += 0.5  # after the first is saved
    moe, edited, patch, there, back = (str(tmp_path / n) for n in ("moe", "edited", "p.st", "there", "back"))
    sizes = json.loads(done(capsys, "patch", "export", moe, edited, patch, "--json"))["patch"]["bytes"]
    label = "model.layers.1.mlp.experts.down_proj[2]"
    assert list(sizes) == [label] and sizes[label] <= 32 * 48 * 4
    made = json.loads(done(capsys, "patch", "apply", moe, patch, "--out", there, "--json"))
    assert made["weights"] == [label]
    done(capsys, "patch", "remove", there, patch, "--out", back)

    def bytes_of(folder: str) -> bytes:
        return (Path(folder) / "model.safetensors").read_bytes()

    assert bytes_of(there) == bytes_of(edited) and bytes_of(back) == bytes_of(moe) != bytes_of(edited)
    out = failed(capsys, "patch", "export", moe, edited, "--as-lora", str(tmp_path / "lora"))
    assert f"{label} is one expert's matrix" in out and "write a patch" in out


def test_adapters_are_written_with_a_patch_or_alone(tmp_path, edited, capsys):
    lora, gguf = tmp_path / "lora", tmp_path / "a.gguf"
    pytest.importorskip("gguf")
    out = done(capsys, "patch", "export", "m", "e", "--as-lora", str(lora), "--as-gguf-lora", str(gguf))
    assert "rank 2 of 2" in out and "rank 1 of 1" in out
    assert {p.name for p in tmp_path.iterdir()} == {"lora", "a.gguf"}
    assert len(load_file(lora / "adapter_model.safetensors")) == 4
    few = done(
        *(capsys, "patch", "export", "m", "e", "--as-lora", str(tmp_path / "few"), "--rank", "1", "--json")
    )
    fits = json.loads(few)["lora"]["fits"]
    assert fits["transformer.h.2.mlp.c_proj.weight"]["rank"] == 1
    assert fits["transformer.h.2.mlp.c_proj.weight"]["frobenius"] > 0.1
    json.loads((tmp_path / "few" / "adapter_config.json").read_text())


def test_what_cannot_be_meant_is_said(tmp_path, edited, capsys):
    patch = str(tmp_path / "p.safetensors")
    assert "name a PATCH" in failed(capsys, "patch", "export", "m", "e")
    assert "--rank means nothing" in failed(capsys, "patch", "export", "m", "e", patch, "--rank", "2")
    assert "not differ in a single bit" in failed(capsys, "patch", "export", "m", "m", patch)
    assert "not a readable safetensors" in failed(
        *(capsys, "patch", "apply", "m", "edits.json", "--out", str(tmp_path / "x"))
    )
    assert not Path(patch).exists()
