"""`d4s alone`: each edit by itself, into a file."""

from __future__ import annotations

import json

from support.command import FAST, RECORDS, done, failed

GIVEN = ("--covariance", "c.safetensors")


def test_each_edit_is_scored_and_the_same_command_goes_on(tmp_path, capsys):
    out = tmp_path / "deep" / "alone.json"
    command = ("alone", "m", "edits.json", "--method", "memit", "--out", str(out), *GIVEN, *FAST)
    text = done(capsys, *command)
    assert "efficacy" in text and str(out) in text
    stored = json.loads(out.read_text())
    assert len(stored["evaluation"]["rows"]) == len(RECORDS) and stored["settings"]["method"] == "memit"
    told = json.loads(done(capsys, *command, "--json"))
    assert told["metrics"] == stored["evaluation"]["metrics"] and "rows" not in told


def test_what_is_wrong_is_said_in_one_line(tmp_path, capsys):
    error = failed(capsys, "alone", "m", "edits.json", "--out", str(tmp_path), *GIVEN, *FAST)
    assert "is a folder; name a file in it" in error
    command = ("alone", "m", "edits.json", "--out", str(tmp_path / "a.json"), *GIVEN, *FAST)
    done(capsys, *command)
    assert "another seed (0 there, 3 here)" in failed(capsys, *command, "--seed", "3")
