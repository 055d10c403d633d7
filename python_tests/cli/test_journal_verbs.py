"""`d4s log`, `undo`, `redo`, `revise`, `merge`, `verify`: what a user does with a sequence that was made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.command import FAST, RECORDS, done, failed
from support.sequences import broken_off
from support.tiny import tiny_tokenizer

import d4s
from d4s.methods.base import Editor

EDIT = ("edit", "m", "edits.json", "--covariance", "c.safetensors", *FAST)


def weights(out):
    return load_file(Path(out) / "model" / "model.safetensors")


def ids(out):
    return [row["id"] for row in d4s.Journal(out).log()]


def test_an_edit_is_undone_redone_and_given_another_answer(capsys, tmp_path):
    run = str(tmp_path / "run")
    done(capsys, *EDIT, "--out", run)
    first, second, third = ids(run)
    said = done(capsys, "log", run)
    assert "d4s on m (weights " in said and said.count(" yes ") == 3
    assert "Steve Jobs worked for → Manila" in said and second in said
    assert "every edited weight" in done(capsys, "verify", run)
    again = done(capsys, "verify", run, "--again", "m", "--covariance", "c.safetensors")
    assert "made again from the log alone: the same weights" in again
    whole = weights(run)

    assert "2 edits stand" in done(capsys, "undo", run, second)
    assert json.loads(done(capsys, "log", run, "--json"))["edits"][1]["stands"] is False
    changed = weights(run)
    assert not torch.equal(
        whole["transformer.h.0.mlp.c_proj.weight"], changed["transformer.h.0.mlp.c_proj.weight"]
    )
    assert set(json.loads(done(capsys, "redo", run, second, "--json"))["stand"]) == {first, second, third}
    for name, weight in weights(run).items():
        assert torch.allclose(weight, whole[name], atol=1e-6), name

    said = done(
        capsys, "revise", run, third, "Manila Lyon", "m", "--covariance", "c.safetensors", "--sums-on", "cpu"
    )
    p = d4s.Journal(run).log()[-1]["last_probability"]
    assert f"; its search reached a probability of {p:.2f} a token; 3 edits stand" in said
    assert "The twin city of Lyon is → Manila Lyon" in done(capsys, "log", run)
    done(capsys, "verify", run)
    line = failed(capsys, "undo", run, "nobody")
    assert "unknown edit 'nobody'" in line
    (Path(run) / "model" / "model.safetensors").write_bytes(
        (Path("m") / "model.safetensors").read_bytes()
    )  # somebody put the unedited model there
    capsys.readouterr()
    assert d4s.cli.main(["verify", run]) == 1
    out, err = capsys.readouterr()
    assert "WRONG" in out and "things are wrong with this journal" in err


def test_a_model_that_could_not_follow_its_journal_follows_when_the_command_comes_again(
    capsys, tmp_path, monkeypatch
):
    run = str(tmp_path / "run")
    done(capsys, *EDIT, "--out", run)
    first, second, _ = ids(run)

    def full(*_arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(d4s.Journal, "write_to_folder", full)
        line = failed(capsys, "undo", run, second)
    assert "No space left" in line and "the journal has changed" in line and f"d4s redo {run} {first}" in line
    assert not d4s.Journal(run).model_follows()
    assert "unknown edit 'nobody'" in failed(capsys, "undo", run, "nobody")
    assert "was undone already" not in done(capsys, "undo", run, second)
    assert d4s.Journal(run).model_follows() and "WRONG" not in done(capsys, "verify", run)
    assert "was undone already" in failed(capsys, "undo", run, second)
    said = done(capsys, "verify", run, "--again", "m", "--covariance", "c.safetensors")
    assert "not made again" in said and "bit for bit" not in said


def test_a_method_that_changes_no_weight_has_none_to_be_verified(capsys, tmp_path):
    run = str(tmp_path / "run")
    done(capsys, "edit", "m", "edits.json", "--method", "grace", "--set", "steps=2", "--out", run)
    assert "grace changes none" in done(capsys, "verify", run)


def test_a_sequence_that_was_interrupted_goes_on_by_the_same_command(capsys, tmp_path, monkeypatch):
    whole, run = str(tmp_path / "whole"), str(tmp_path / "run")
    done(capsys, *EDIT, "--out", whole)
    with monkeypatch.context() as patch:
        broken_off(patch, 3, KeyboardInterrupt)
        assert d4s.cli.main([*EDIT, "--out", run]) == 130
    assert "2 edits were made before" in capsys.readouterr().err
    done(capsys, *EDIT, "--out", run)
    one, other = weights(whole), weights(run)
    assert all(torch.equal(one[name], other[name]) for name in one)
    kept = json.loads((Path(run) / "result.json").read_text())
    assert kept["failure"] is None and len(kept["edits_table"]) == 3
    assert "every edited weight" in done(capsys, "verify", run)
    assert "already holds files" in failed(capsys, *EDIT, "--out", run)  # it has come to its end


def test_another_command_in_the_same_folder_is_refused(capsys, tmp_path, monkeypatch):
    run = str(tmp_path / "run")

    def interrupted(self, batch):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Editor, "edit", interrupted)
        assert d4s.cli.main([*EDIT, "--out", run]) == 130
    line = failed(capsys, *EDIT, "--out", run, "--batch-size", "2")
    assert "is the journal of another sequence: schedule" in line


def test_two_runs_become_one(capsys, tmp_path):
    for name, part in (("a", RECORDS[:2]), ("b", [RECORDS[1] | {"target_new": "Paris"}, RECORDS[2]])):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
        done(
            capsys, "edit", "m", str(tmp_path / f"{name}.json"), "--covariance", "c.safetensors", *FAST,
            "--out", str(tmp_path / name),
        )  # fmt: skip
    both = [str(tmp_path / name) for name in ("a", "b")]
    assert "1 facts have different answers" in failed(
        capsys, "merge", *both, "--into", str(tmp_path / "no"), "--fail"
    )
    assert not (tmp_path / "no").exists()
    said = done(capsys, "merge", *both, "--into", str(tmp_path / "ab"))
    assert "3 edits in" in said and "two answers, the last is taken" in said and "'Paris'" in said
    facts = json.loads(done(capsys, "log", str(tmp_path / "ab"), "--json"))["edits"]
    assert [fact["target_new"] for fact in facts] == ["English", "Paris", "Paris"]
    done(capsys, "verify", str(tmp_path / "ab"))
    model, _ = d4s.load_model("m")
    d4s.Journal(tmp_path / "ab").write_to(model)
    model.save_pretrained(tmp_path / "ab" / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "ab" / "model")
    assert "every edited weight" in done(capsys, "verify", str(tmp_path / "ab"))


@pytest.mark.parametrize("verb", ["log", "verify", "undo", "redo"])
def test_a_folder_that_is_no_journal_is_told(verb, capsys, tmp_path):
    line = failed(capsys, verb, str(tmp_path), *(["x"] if verb in ("undo", "redo") else []))
    assert f"{tmp_path}: is no journal" in line


def test_a_journal_makes_patches_and_adapters_and_its_model_says_its_edits(capsys, tmp_path):
    run = str(tmp_path / "run")
    done(capsys, *EDIT, "--out", run)
    card = json.loads((Path(run) / "model" / "d4s_edits.json").read_text())
    assert [edit["subject"] for edit in card["edits"]] == ["Danielle Darrieux", "Steve Jobs", "Lyon"]
    assert card["base"]["name"] == "m" and card["method"] == "d4s"
    said = done(
        capsys, "patch", "export", run, str(tmp_path / "p.safetensors"), "--as-lora", str(tmp_path / "lora")
    )
    assert "2 weights" in said and "3 edits named" in said and "adapter of rank 3" in said
    done(capsys, "patch", "apply", "m", str(tmp_path / "p.safetensors"), "--out", str(tmp_path / "again"))
    one, other = weights(run), load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)
    second = ids(run)[1]
    done(capsys, "undo", run, second)
    card = json.loads((Path(run) / "model" / "d4s_edits.json").read_text())
    assert [edit["subject"] for edit in card["edits"]] == ["Danielle Darrieux", "Lyon"]
    assert "adapter of rank 2" in done(capsys, "patch", "export", run, "--as-lora", str(tmp_path / "two"))
    model, _ = d4s.load_model("m")
    d4s.apply_patch(model, tmp_path / "p.safetensors")
    assert all(torch.equal(w, one[n]) for n, w in model.state_dict().items() if n in one)
    d4s.Journal(run).export_patch(tmp_path / "q.safetensors")
    d4s.remove_patch(model, tmp_path / "p.safetensors")
    d4s.apply_patch(model, tmp_path / "q.safetensors")
    assert torch.equal(
        model.transformer.h[0].mlp.c_proj.weight, weights(run)["transformer.h.0.mlp.c_proj.weight"]
    )
