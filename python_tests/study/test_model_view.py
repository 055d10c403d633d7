"""What changes inside a model as it is edited; by hand where a hand can work it out."""

from __future__ import annotations

import json
import math

import numpy
import pandas
import pytest
from support.sequences import EDITS, FAST, ready
from support.tiny import tiny_tokenizer

from d4s import cli, save_edits
from d4s.errors import ConfigError
from d4s.measure.metrics import Evaluation
from d4s.sequence.compare import compare
from d4s.sequence.record import Record
from d4s.sequence.run import edit_sequence
from d4s.study.model_view import analyze_model


def hand_record(**columns):
    """Five points of two edits each; the weights move with the share."""
    history = [
        {
            "step": 2 * i,
            "efficacy": [0.0, 1.0, 0.8, 0.6, 0.5][i],
            "original_efficacy": 1.0,
            "specificity": [1.0, 0.9, 0.9, 0.8, 0.9][i],
            "l1_growth": [0.0, 0.1, 0.3, 0.4, 0.8][i],
            "l1_norm.2": 1.0 + [0.0, 0.1, 0.3, 0.4, 0.8][i],
            "delta_norm.2": float(i),
            "seconds": 1.0,
            "edit_seconds": 1.0,
        }
        for i in range(5)
    ]
    for row in history:
        row.update({name: values[row["step"] // 2] for name, values in columns.items()})
    table = [
        {"id": f"e{i}", "step": i + 1, "first_probability": 0.1 * i, "last_probability": 1 - 0.1 * i}
        for i in range(8)
    ]
    evaluations = []
    for row in history:
        made = row["step"] or 8
        evaluations.append(
            Evaluation([{"id": f"e{i}", "efficacy": float(i % 2), "nll_true": 1.0} for i in range(made)], {})
        )
    return Record("memit", {}, history, table, evaluations)


def test_the_inside_of_a_sequence_by_hand():
    view = analyze_model(hand_record())
    bottleneck = view.bottleneck()
    assert list(bottleneck["last_probability"]) == pytest.approx([1.0, 0.3])  # a fifth of eight is one
    assert list(bottleneck["first_probability"]) == pytest.approx([0.0, 0.7])
    assert bottleneck["standard_error"].isna().all()
    record = hand_record()
    record.edits_table = [
        {"id": i, "last_probability": [0.9, 0.7][i % 2], "first_probability": 0.0} for i in range(10)
    ]
    assert list(analyze_model(record).bottleneck()["standard_error"]) == pytest.approx([0.1, 0.1])
    forgetting = view.forgetting().iloc[0]
    assert (forgetting["original"], forgetting["current"], forgetting["forgotten"]) == (1.0, 0.5, 0.5)
    norms = view.norms()
    assert list(norms["growth"]) == pytest.approx([0.0, 0.1, 0.3, 0.4, 0.8])
    assert list(norms["delta_norm"]) == [0, 1, 2, 3, 4] and set(norms["layer"]) == {2}
    row = view.correlations().set_index("metric").loc["efficacy"]
    x, y = [0.1, 0.3, 0.4, 0.8], [1.0, 0.8, 0.6, 0.5]
    assert row["pearson"] == pytest.approx(numpy.corrcoef(x, y)[0, 1])
    assert row["spearman"] == pytest.approx(-1.0) and row["n"] == 4
    assert row["pearson_changes"] == pytest.approx(numpy.corrcoef(numpy.diff(x), numpy.diff(y))[0, 1])
    estimates = view.estimates().set_index("metric")
    assert estimates.loc["efficacy", "bound"] == pytest.approx(0.9)
    assert estimates.loc["efficacy", "observed"] == pytest.approx(3.0)
    assert estimates.loc["specificity", "bound"] == pytest.approx(0.9)  # of the unedited model's 1.0
    bounded = analyze_model(hand_record(), bounds={"efficacy": 0.55}).estimates().set_index("metric")
    assert bounded.loc["efficacy", "observed"] == pytest.approx(7.0)


def test_a_comparison_is_analyzed_method_by_method_and_written(tmp_path, seed):
    model, covariance = ready(seed)
    found = compare(
        model,
        tiny_tokenizer(),
        EDITS,
        {"d4s": FAST, "kn": {"steps": 2, "paraphrases": False}},
        covariance=covariance,
        evaluate_every=1,
        progress=False,
    )
    view = analyze_model(found)
    assert list(view.records) == ["d4s", "kn"]
    assert set(view.bottleneck()["method"]) == {"d4s"}  # kn searches no target
    assert set(view.norms()["method"]) == {"d4s", "kn"}
    view.save(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    for figure in (
        "metrics",
        "norms",
        "change",
        "target_probability",
        "forgetting",
        "forgetting-d4s",
        "forgetting-kn",
    ):
        assert {f"{figure}.png", f"{figure}.csv"} <= names
    stored = json.loads((tmp_path / "analysis.json").read_text())
    assert set(stored) == {"bottleneck", "remembered", "correlations", "estimates"}
    change = pandas.read_csv(tmp_path / "change.csv")
    last = found.results["d4s"][0].history[-1]
    size = math.hypot(*(value for name, value in last.items() if name.startswith("delta_norm.")))
    assert change[change["line"] == "d4s"]["y"].iloc[-1] == pytest.approx(size)
    assert "Forgetting" in view.summary() and "kn" in view.summary()


def test_labels_that_differ_in_signs_alone_have_a_file_each(tmp_path, seed):
    model, covariance = ready(seed)
    options = dict(covariance=covariance, evaluate_every=1, progress=False)
    found = compare(
        model,
        tiny_tokenizer(),
        EDITS[:2],
        {"a/b": {"method": "d4s", **FAST}, "a-b": {"method": "d4s", **FAST}},
        **options,
    )
    analyze_model(found).save(tmp_path)
    assert len(list(tmp_path.glob("forgetting-*.png"))) == 2


def test_a_stored_sequence_is_analyzed_as_a_fresh_one(tmp_path, seed):
    model, covariance = ready(seed)
    result = edit_sequence(
        model, tiny_tokenizer(), EDITS, config=FAST, covariance=covariance, evaluate_every=1, progress=False
    )
    result.save(tmp_path / "r.json")
    stored = analyze_model(Record.load(tmp_path / "r.json"))
    assert stored.to_dict() == analyze_model(result).to_dict()
    assert len(stored.to_dict()["estimates"]) == 2


def test_figures_that_were_not_finite_do_not_stop_the_analysis(tmp_path):
    broken = hand_record(
        **{"l1_norm.2": [1.0, 1.1, 1.2, None, None], "delta_norm.2": [0.0, 1.0, 2.0, None, None]}
    )
    view = analyze_model(broken)
    assert len(view.norms()) == 5 and "memit" in view.summary()
    json.dumps(view.to_dict(), allow_nan=False)


def test_nothing_to_analyze_is_said():
    with pytest.raises(ConfigError, match="nothing to analyze"):
        analyze_model(Record("memit", history=[{"step": 0}]))


def test_the_verb_takes_a_stored_sequence_or_a_model_with_edits(monkeypatch, tmp_path, capsys, seed):
    model, _ = ready(seed)
    monkeypatch.setattr("d4s.cli.analyze.loaded_model", lambda options: (model, tiny_tokenizer()))
    hand_record().save(tmp_path / "r.json")
    out = ["--out", str(tmp_path / "stored")]
    assert (
        cli.main(["analyze", "model", f"{tmp_path}/r.json", "--efficacy-bound", "0.55", *out, "--json"]) == 0
    )
    found = json.loads(capsys.readouterr().out)["estimates"]
    assert {row["metric"]: row["bound"] for row in found} == {"efficacy": 0.55, "specificity": 0.9}
    save_edits(EDITS, tmp_path / "edits.jsonl")
    for view in ("model", "data"):
        asked = ["analyze", view, "m", f"{tmp_path}/edits.jsonl", "--methods", "ft-m", "--limit", "4"]
        assert cli.main([*asked, "--out", str(tmp_path / view)]) == 0
    said = capsys.readouterr().out
    assert "Forgetting" in said and "multiple_choice" in said
    assert (tmp_path / "data" / "perplexity.png").exists() and (tmp_path / "model" / "norms.png").exists()
    assert cli.main(["analyze", "data", "m", "--out", str(tmp_path / "none")]) == 2
    assert "needs EDITS" in capsys.readouterr().err
