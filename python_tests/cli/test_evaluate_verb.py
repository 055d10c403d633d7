"""`d4s evaluate`: scores, and edits that are read or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.command import RECORDS, done, failed

from d4s.cli import main
from d4s.edits.formats import load_edits, save_edits

ZSRE = {
    "subject": "Danielle Darrieux",
    "src": "What is the mother tongue of Danielle Darrieux?",
    "alt": "English",
    "answers": ["French"],
}


def test_scores_of_tasks_are_in_percent_where_they_are_shares(monkeypatch, capsys):
    scores = {"arc acc_norm": 0.25, "wikitext word_perplexity": 31.5, "gsm8k exact_match (strict-match)": 0.5}
    monkeypatch.setattr("d4s.cli.evaluate.task_scores", lambda *_: lambda: scores)
    lines = done(capsys, "evaluate", "m", "edits.json", "--limit", "1").splitlines()
    assert lines[-3:] == [
        "arc acc_norm: 25.00 %",
        "wikitext word_perplexity: 31.5",
        "gsm8k exact_match (strict-match): 50.00 %",
    ]


def test_the_embedded_model_and_its_edits_go_by_a_name(capsys):
    figures = json.loads(done(capsys, "evaluate", "embedded", "embedded", "--limit", "3", "--json"))
    assert figures["metrics"]["efficacy"]["count"] == 3


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (None, ["bad.json"]),
        ("", ["bad.json"]),
        (json.dumps(RECORDS)[:-60], ["bad.json", "3"]),
        (json.dumps([RECORDS[0], RECORDS[1] | {"prompt": "worked for"}]), ["bad.json", "record 2", "'{}'"]),
        (json.dumps([RECORDS[0] | {"target_new": " "}]), ["bad.json", "record 1", "'target_new'"]),
        (b"\xff\xfe\x00", ["bad.json"]),
    ],
)
def test_edits_that_cannot_be_read_are_named(content, texts, capsys):
    path = Path("bad.json")
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = failed(capsys, "evaluate", "m", "bad.json")
    assert all(text in line for text in texts), line


def test_edits_of_no_known_format_are_told_what_was_looked_for(capsys):
    Path("bad.json").write_text('[{"question": 3}]')
    assert main(["evaluate", "m", "bad.json"]) == 1
    err = capsys.readouterr().err
    assert (
        "d4s: bad.json: not a known format" in err
        and "counterfact" in err
        and "found, in record 1: 'question'" in err
    )


def test_a_record_of_ones_own_that_lacks_a_field_is_told_which(capsys):
    for lacks in ("prompt", "subject", "target_new"):
        whole = {"prompt": "{} is in", "subject": "Paris", "target_new": "Spain", "target_true": "France"}
        Path("own.json").write_text(json.dumps([{k: v for k, v in whole.items() if k != lacks}]))
        said = failed(capsys, "evaluate", "m", "own.json")
        assert said == f"d4s: own.json, record 1: the edit has no field '{lacks}', which it needs"


def test_bad_records_may_be_left_out(capsys):
    Path("mixed.json").write_text(json.dumps([RECORDS[0], RECORDS[1] | {"subject": ""}, RECORDS[2]]))
    assert "record 2" in failed(capsys, "evaluate", "m", "mixed.json")
    figures = json.loads(done(capsys, "evaluate", "m", "mixed.json", "--skip-bad", "--json"))
    assert figures["metrics"]["efficacy"]["count"] == 2


@pytest.mark.parametrize("baseline", ["/none/baseline.json", "baseline.json", "run/none/model", "~/model"])
def test_a_baseline_that_is_not_there_is_told_as_such(baseline, capsys):
    said = failed(capsys, "evaluate", "m", "edits.json", "--baseline", baseline)
    assert f"--baseline {baseline}: there is no such file or model folder; name" in said


def test_a_baseline_may_be_a_model_of_the_hub(capsys):
    said = failed(capsys, "evaluate", "m", "edits.json", "--baseline", "no-such-owner/none")
    assert said.startswith("d4s: no-such-owner/none: no causal language model could be loaded")


def test_figures_of_each_edit_go_to_a_file(tmp_path, capsys):
    place = tmp_path / "new" / "rows.jsonl"
    told = json.loads(done(capsys, "evaluate", "m", "edits.json", "--json", "--rows", str(place)))
    rows = [json.loads(line) for line in place.read_text("utf-8").splitlines()]
    edits = load_edits("edits.json")
    assert [row["id"] for row in rows] == [edit.id for edit in edits]
    assert sum(row["efficacy"] for row in rows) / len(rows) == pytest.approx(
        told["metrics"]["efficacy"]["mean"]
    )
    assert "--rows .: is a folder" in failed(capsys, "evaluate", "m", "edits.json", "--rows", ".")


def test_zsre_can_be_written_towards_the_true_answer(capsys, monkeypatch):
    seen = []
    real = load_edits
    monkeypatch.setattr(
        "d4s.edits.formats.load_edits", lambda *a, **k: seen.append(k["zsre_target"]) or real(*a, **k)
    )
    Path("zsre.json").write_text(json.dumps([ZSRE]))
    for target, name in (("answer", "answer.jsonl"), ("alt", "alt.jsonl")):
        done(capsys, "evaluate", "m", "zsre.json", "--zsre-target", target, "--json")
        save_edits(real("zsre.json", zsre_target=target), name)
    assert seen == ["answer", "alt"]
    done(capsys, "evaluate", "m", "answer.jsonl", "--zsre-target", "answer", "--json")  # as they were saved
    for edits in ("alt.jsonl", "edits.json", "embedded"):
        said = failed(capsys, "evaluate", "m", edits, "--zsre-target", "answer")
        assert "--zsre-target means nothing with" in said and edits in said and "zsRE" in said
