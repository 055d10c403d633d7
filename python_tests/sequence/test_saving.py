"""Where results go: places are tried before the work, and an edited model outlives a failure to save it."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import TEXTS, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from d4s import files
from d4s.cli import main
from d4s.errors import DataError, ModelError
from d4s.files import check_folder, whole
from d4s.interrupts import Terminated
from d4s.sequence import compare
from d4s.sequence import run as sequence
from d4s.sequence.saving import load_changes_

ROOT = Path(__file__).resolve().parents[2]
RECORDS = [
    {"prompt": "{} worked for", "subject": "Steve Jobs", "target_new": "Manila", "target_true": "Apple"},
    {"prompt": "The twin city of {} is", "subject": "Lyon", "target_new": "Paris", "target_true": "Manila"},
]
EDIT = ("edit", "m", "edits.json", "--method", "ft-m", "--set", "steps=2")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    tiny_model("gpt2", 1).save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "edits.json").write_text(json.dumps(RECORDS))
    (tmp_path / "corpus.txt").write_text("\n".join(TEXTS * 3))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fails(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert main(arguments) in (1, 2)
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("d4s: ")]
    assert out == "" and "Traceback" not in err and err.rstrip().endswith(lines[-1])
    return lines[-1]


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model" / "model.safetensors")


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def full(_model, folder, **_options):
    Path(folder).mkdir()
    (Path(folder) / "model.safetensors").write_bytes(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


@pytest.mark.parametrize("method", ["ft-m", "grace"])
def test_a_model_that_could_not_be_saved_is_saved_by_the_same_command(method, capsys, monkeypatch):
    command = ("edit", "m", "edits.json", "--method", method, "--set", "steps=2")
    assert main([*command, "--out", "whole"]) == 0
    with monkeypatch.context() as broken:
        broken.setattr(GPT2LMHeadModel, "save_pretrained", full)
        line = fails(capsys, *command, "--out", "run")
    assert "run/model" in line and "No space left" in line and "repeat the command with --out run" in line
    kept = ["baseline.json", "history.csv", "journal", "result.json", "weights.safetensors"]
    assert sorted(os.listdir("run")) == kept and all(name in line for name in kept)
    before = Path("run/result.json").read_bytes()
    with monkeypatch.context() as untouched:
        untouched.setattr(sequence, "edit_sequence", lambda *a, **k: pytest.fail("edited again"))
        assert main([*command, "--out", "run"]) == 0
    assert "had been made, and their model is saved now" in capsys.readouterr().out
    assert same(weights("run"), weights("whole"))
    assert same(weights("run"), load_file("m/model.safetensors")) == (method == "grace")
    assert Path("run/result.json").read_bytes() == before
    assert sorted(os.listdir("run")) == sorted(os.listdir("whole")) == [*kept[:3], "model", "result.json"]
    if method == "grace":
        books = [load_file(f"{run}/model/grace_codebook.safetensors") for run in ("run", "whole")]
        assert same(*books)
    assert "already holds files" in fails(capsys, *command, "--out", "run")


def test_a_model_of_more_passes_that_could_not_be_saved_is_saved_by_the_same_command(capsys, monkeypatch):
    more = ("edit", "m", "edits.json", "--method", "ft-m", "--set", "steps=1", "--passes", "2")
    assert main([*more, "--out", "whole"]) == 0
    assert main([*more[:-2], "--out", "run"]) == 0
    with monkeypatch.context() as broken:
        broken.setattr(GPT2LMHeadModel, "save_pretrained", full)
        line = fails(capsys, *more, "--out", "run")
    assert "repeat the command with --out run" in line and not same(weights("run"), weights("whole"))
    assert main([*more, "--out", "run"]) == 0
    assert "their model is saved now" in capsys.readouterr().out
    assert same(weights("run"), weights("whole")) and not Path("run/weights.safetensors").exists()


def test_ctrl_c_while_saving_costs_nothing(capsys, monkeypatch):
    def interrupted(*_arguments, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(GPT2LMHeadModel, "save_pretrained", interrupted)
        assert main([*EDIT, "--out", "run"]) == 130
    assert "the model was not saved; repeat the command with --out run" in capsys.readouterr().err
    assert main([*EDIT, "--out", "run"]) == 0
    assert main([*EDIT, "--out", "whole"]) == 0
    assert same(weights("run"), weights("whole"))


def test_changes_of_another_model_or_of_no_model_are_refused_and_change_nothing(capsys, monkeypatch):
    monkeypatch.setattr(GPT2LMHeadModel, "save_pretrained", full)
    fails(capsys, *EDIT, "--out", "run")
    changes = Path("run/weights.safetensors")
    other = tiny_model("gpt2", 2)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ModelError, match="belongs to another model"):
        load_changes_(other, tiny_tokenizer(), changes)
    assert same(before, other.state_dict())
    for content in (b"", b"\0" * 100, changes.read_bytes()[:-9]):
        changes.write_bytes(content)
        assert "not a readable safetensors file" in fails(capsys, *EDIT, "--out", "run")
    save_file({"a": torch.zeros(1)}, changes, {"format": "pt"})
    with pytest.raises(DataError, match="format 'pt'"):
        load_changes_(other, tiny_tokenizer(), changes)


def test_room_and_rights_are_looked_at_before_the_first_edit(capsys, monkeypatch):
    monkeypatch.setattr(sequence, "edit_sequence", lambda *a, **k: pytest.fail("edited"))
    with monkeypatch.context() as small:
        usage = namedtuple("usage", "total used free")
        small.setattr(files.shutil, "disk_usage", lambda _path: usage(10, 7, 3))
        line = fails(capsys, *EDIT, "--out", "run")
        assert line.startswith("d4s: run: has 0.00 GB free, and ") and "are needed" in line

    def refused(**_options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refused)
    assert "run: cannot be written to (Permission denied)" in fails(capsys, *EDIT, "--out", "run")


VERBS = {
    "demo": ("demo",),
    "edit": EDIT,
    "covariance": ("covariance", "m", "corpus.txt"),
    "compare": ("compare", "m", "edits.json", "--methods", "ft-m"),
    "analyze": ("analyze", "model", "m", "edits.json", "--methods", "ft-m"),
    "reproduce": ("reproduce", "fig5", "m", "--edits", "edits.json"),
    "tasks": ("tasks", "make"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_tries_its_place_before_it_works(verb, capsys, monkeypatch):
    """Neither a pipe nor a device is ever replaced, and a folder that takes no file is found at once."""
    for module, name in ((sequence, "take_baseline"), (compare, "take_baseline")):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("worked"))
    os.mkfifo("pipe")
    where = ("pipe", "edits.json") if verb == "tasks" else ("--out", "pipe")
    assert "pipe: is a device, pipe or socket" in fails(capsys, *VERBS[verb], *where)
    assert stat.S_ISFIFO(os.stat("pipe").st_mode)

    def refused(**_options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refused)
    out = "new/c" if verb == "covariance" else "new"
    where = (out, "edits.json") if verb == "tasks" else ("--out", out)
    assert "new: cannot be written to (Permission denied)" in fails(capsys, *VERBS[verb], *where)


def test_a_device_is_never_replaced_by_a_file(tmp_path):
    link = tmp_path / "null"
    link.symlink_to(os.devnull)
    for path in (os.devnull, link):
        with pytest.raises(OSError, match="device, pipe or socket"), whole(path) as beside:
            beside.write_text("")
        with pytest.raises(OSError, match="device, pipe or socket"):
            check_folder(path)
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode) and link.is_symlink()


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)]
)
def test_what_was_made_is_saved_when_the_program_is_asked_to_end(number, status, capsys, monkeypatch):
    from d4s.methods.ft import FTEditor

    plain, calls = FTEditor.apply, []

    def at_the_second(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)  # in the midst of a step
        return plain(*arguments)

    records = [*RECORDS, RECORDS[0] | {"subject": "Edwin"}]
    Path("edits.json").write_text(json.dumps(records))
    before = signal.getsignal(number)
    with monkeypatch.context() as watched:
        watched.setattr(FTEditor, "apply", at_the_second)
        assert main([*EDIT, "--out", "run"]) == status
    assert signal.getsignal(number) is before
    err = capsys.readouterr().err
    assert "2 edits were made before; they are in run" in err and "Traceback" not in err
    stored = json.loads(Path("run/result.json").read_text())
    assert stored["edits"] == len(stored["edits_table"]) == 2 and "after edit 2" in stored["failure"]
    Path("edits.json").write_text(json.dumps(records[:2]))
    assert main([*EDIT, "--out", "two"]) == 0
    assert same(weights("run"), weights("two"))
    AutoModelForCausalLM.from_pretrained("run/model")


def test_a_program_that_is_terminated_ends_with_143(place):
    """The real thing: another process, a real signal, at whatever moment it comes."""
    Path("many.json").write_text(json.dumps([RECORDS[i % 2] | {"subject": f"Lyon {i}"} for i in range(400)]))
    command = [sys.executable, "-m", "d4s", "edit", "m", "many.json", "--method", "ft-m", "--out", "run"]
    with subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True
    ) as running:
        for line in running.stderr:
            if "400 edits, 1 a step" in line:
                break
        time.sleep(1)
        running.send_signal(signal.SIGTERM)
        rest = running.stderr.read()
    assert running.returncode == 143, rest
    stored = json.loads(Path("run/result.json").read_text())
    assert 0 < stored["edits"] < 400 and f"{stored['edits']} edits were made before" in rest
    assert not same(weights("run"), load_file("m/model.safetensors"))
    assert str(Terminated(signal.SIGTERM)) == "ended by SIGTERM"
