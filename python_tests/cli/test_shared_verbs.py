"""Verbs that several processes run together: torchrun -m d4s …"""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout

from support.command import FAST, RECORDS, run
from support.several import in_each
from test_ranks import alike

from d4s.cli import main
from d4s.locate.covariance import Covariance
from d4s.ranks import here


def _said(commands):
    """(status, standard output, standard error) of each command."""
    found = []
    for arguments in commands:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            status = main(arguments)
        found.append((status, out.getvalue(), err.getvalue()))
    return found


def test_the_first_alone_speaks_and_writes_and_says_what_one_would(place, tmp_path):
    def commands(folder):
        edited = str(tmp_path / folder / "run")
        given = ("--covariance", "c.safetensors")
        return [
            ("covariance", "m", "corpus.txt", "--out", str(tmp_path / folder / "c.safetensors"), "--json"),
            ("edit", "m", "edits.json", "--out", edited, *given, *FAST, "--json"),
            (
                *("evaluate", f"{edited}/model", "edits.json", "--baseline", f"{edited}/baseline.json"),
                *("--generate", "--json"),
            ),
            ("targets", "m", "edits.json", "--out", f"{edited}/more", "--set", "steps=2", "contexts=0"),
            ("log", edited, "--json"),
            ("edit", "m", "edits.json", "--out", edited, *given, *FAST),
            ("evaluate", "gone.gguf", "edits.json"),
        ]

    one = _said(commands("one"))
    first, second = in_each(2, _said, commands("two"))
    assert [status for status, _, _ in first] == [status for status, _, _ in one] == [0] * 5 + [2, 1]
    assert [status for status, _, _ in second] == [0] * 5 + [2, 1]
    assert all(out == "" and err == "" for _, out, err in second), second
    for (_, out, err), (_, right, said) in zip(first, one, strict=True):
        assert out.count("\n") == right.count("\n")
        assert err.replace("/two/", "/one/") == said
    evaluated, right = (json.loads(every[2][1])["metrics"] for every in (first, one))
    assert evaluated.keys() == right.keys()
    assert alike(evaluated["efficacy"], right["efficacy"])
    statistics = [Covariance.load(tmp_path / folder / "c.safetensors") for folder in ("one", "two")]
    for moment, truth in zip(*(every.moments.values() for every in reversed(statistics)), strict=True):
        assert (moment - truth).norm() <= 1e-5 * truth.norm()
    assert {p.name for p in (tmp_path / "two" / "run").iterdir()} == {
        p.name for p in (tmp_path / "one" / "run").iterdir()
    }


def _with_one_that_fails(folder, edits):
    """Its own edits are not there."""
    given = edits if here().rank != 1 else "gone.json"
    return _said([("edit", "m", given, "--out", folder, "--covariance", "c.safetensors", *FAST)])[0]


def test_what_one_alone_cannot_read_ends_all_with_its_reason(place, tmp_path):
    first, second = in_each(2, _with_one_that_fails, str(tmp_path / "run"), "edits.json", within=30)
    assert first[0] == second[0] == 1
    assert "gone.json" in first[2] and second[2] == ""
    assert not (tmp_path / "run" / "model").exists()


def test_torchrun_starts_them(place, tmp_path):
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = ("-m", "d4s", "edit", "m", "edits.json", "--out", str(tmp_path / "run"), *FAST)
    ended = run(*launcher, *command, "--covariance", "c.safetensors", "--json", cwd=place, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["step"] == len(RECORDS)
    assert (tmp_path / "run" / "model" / "config.json").exists()
