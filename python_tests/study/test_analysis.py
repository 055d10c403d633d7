"""The two views: what data do to a model, and what changes inside it; by hand where a hand can work it out."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy
import pandas
import pytest
from support.bigram import Bigram
from support.sequences import EDITS, FAST, ready, same, state
from support.tiny import tiny_tokenizer
from support.views import view_of

from d4s import cli, save_edits
from d4s.edits import Edit
from d4s.errors import ConfigError
from d4s.measure.metrics import Evaluation
from d4s.sequence.compare import compare
from d4s.sequence.record import Record
from d4s.sequence.run import edit_sequence
from d4s.study.analysis import (
    FORMS,
    Retained,
    analyze_data,
    analyze_model,
    correlation,
    forms_of,
    frame_lines,
    hold_out,
    mcnemar,
    target_surprise,
)


def fact(subject, true, new, **fields):
    return Edit(prompt="{}", subject=subject, target_true=true, target_new=new, relation="r", **fields)


def small_world():
    """France → Paris likely, Spain → Oslo likely (wrong), Italy → Rome as likely as Paris."""
    return Bigram(
        {
            "France": {"Paris": 0.5, "Rome": 0.2},
            "Spain": {"Oslo": 0.6, "Madrid": 0.2},
            "Italy": {"Rome": 0.4, "Paris": 0.4},
            "Norway": {"Oslo": 0.7, "Rome": 0.1},
            "Paris.": {},
        }
    )


FACTS = (
    fact("France", "Paris", "Oslo"),
    fact("Spain", "Madrid", "Oslo"),
    fact("Italy", "Rome", "Paris"),
    fact("Norway", "Oslo", "Rome"),
)


def test_retained_counts_facts_whose_old_answer_is_the_likeliest():
    model = small_world()
    retained = Retained(model, model.tokenizer, FACTS, ["France Paris"])
    asked = {prompt: options for prompt, options in retained.questions}
    assert asked["Spain"][:2] == ("Madrid", "Oslo") and len(asked["Spain"]) == 4
    found = retained()
    assert found["retained"] == 0.5  # France and Norway; a tie is not right
    assert found["text_perplexity"] == pytest.approx(2.0, rel=1e-5)
    model.set("France", "Oslo", 0.9)
    assert retained()["retained"] == 0.25
    assert [retained.by_fact()[f"right.{i}"] for i in range(4)] == [0, 0, 0, 1]
    assert retained.by_fact().items() > retained().items()
    assert retained()["text_perplexity"] > 2.1


def test_only_facts_with_an_old_answer_are_asked():
    model = small_world()
    unknown = Edit(prompt="{}", subject="Norway", target_new="Oslo")
    assert len(Retained(model, model.tokenizer, [*FACTS, unknown]).questions) == 4
    with pytest.raises(ConfigError, match="target_true"):
        Retained(model, model.tokenizer, [unknown])


def test_text_is_by_default_the_facts_as_sentences():
    model = small_world()
    retained = Retained(model, model.tokenizer, FACTS[:1])
    assert retained.texts == ["France Paris."]


def test_the_surprise_of_targets_is_worked_out_by_hand():
    """p(new): Oslo after Spain .6, Rome after Norway .1."""
    model = small_world()
    found = target_surprise(model, model.tokenizer, [FACTS[1], FACTS[3]])
    assert found["perplexity"] == pytest.approx(1 / math.sqrt(0.6 * 0.1), rel=1e-5)
    assert found["perplexity_mean"] == pytest.approx((1 / 0.6 + 1 / 0.1) / 2, rel=1e-5)
    assert found["perplexity.low"] == pytest.approx(1 / 0.6, rel=1e-5)
    assert found["perplexity.high"] == pytest.approx(1 / 0.1, rel=1e-5)


def test_the_same_facts_stand_in_each_form():
    forms = forms_of(EDITS)
    assert tuple(forms) == FORMS
    for form, edits in forms.items():
        assert [edit.tags["of"] for edit in edits] == [edit.id for edit in EDITS]
        assert {edit.tags["form"] for edit in edits} == {form}
    assert {edit.target_new for edit in forms["true_false"]} <= {"yes", "no"}
    assert list(forms_of(EDITS, ["multiple_choice"])) == ["multiple_choice"]
    with pytest.raises(ConfigError, match="essay"):
        forms_of(EDITS, ["essay"])


def test_held_out_facts_are_the_last_ones():
    made, facts = hold_out(EDITS)
    assert [e.id for e in made + facts] == [e.id for e in EDITS] and len(facts) == 2
    with pytest.raises(ConfigError, match="too few"):
        hold_out(EDITS[:1])


def test_held_out_facts_are_not_about_a_subject_that_is_edited():
    again = [replace(edit, id=f"{edit.id}'", prompt="{} is known for") for edit in EDITS[:2]]
    other = replace(EDITS[0], id="other", subject="Xerxes")
    made, facts = hold_out([*EDITS[:4], again[0], other, other], share=3 / 7)
    assert made == list(EDITS[:4]) and facts == [other]


def test_each_form_is_edited_from_the_same_weights_and_measured_on_facts_left_alone(seed):
    model, covariance = ready(seed)
    before = state(model)
    view = analyze_data(
        model,
        tiny_tokenizer(),
        EDITS,
        {"d4s": FAST},
        forms=FORMS[::2],
        covariance=covariance,
        evaluate_every=2,
        seed=seed,
        progress=False,
    )
    assert same(state(model), before)
    made, facts = hold_out(EDITS)
    assert list(view.groups["group"]) == ["true_false", "directly_generated"]
    assert list(view.groups["edits"]) == [5, 5]
    history = view.history()
    retained = Retained(model, tiny_tokenizer(), facts, seed=seed)
    unedited = retained()
    for form, group in forms_of(made, FORMS[::2], seed).items():
        expected = target_surprise(model, tiny_tokenizer(), group, seed)
        assert view.groups.set_index("group").loc[form, "perplexity"] == expected["perplexity"]
        result = edit_sequence(
            model, tiny_tokenizer(), group, config=FAST, covariance=covariance, seed=seed, progress=False
        )
        edited = retained()
        result.restore()
        rows = history[history["group"] == form]
        assert list(rows["step"]) == [0, 2, 4, 5]
        assert dict(rows.iloc[0][["retained", "text_perplexity"]]) == unedited
        assert dict(rows.iloc[-1][["retained", "text_perplexity"]]) == edited
        line = view.relation().set_index("group").loc[form]
        assert line["retained_drop"] == unedited["retained"] - edited["retained"]
        rise = math.log(edited["text_perplexity"] / unedited["text_perplexity"])
        assert line["perplexity_rise"] == pytest.approx(rise) and rise != 0


def test_data_sets_are_compared_at_the_same_size_and_written(tmp_path, seed):
    model, covariance = ready(seed)
    data = {"one": EDITS[:5], "two": forms_of(EDITS)["true_false"][:2]}
    methods = {"d4s": FAST, "memit": FAST}
    view = analyze_data(
        model, tiny_tokenizer(), data, methods, facts=EDITS[5:], covariance=covariance, progress=False
    )
    assert list(view.groups["edits"]) == [2, 2]
    assert [tuple(row) for row in view.relation()[["method", "group"]].to_numpy()] == [
        (method, group) for group in data for method in methods
    ]
    pooled = view.correlations().iloc[-1]
    assert pooled["n"] == 4 and pooled["method"].startswith("all")
    assert "Correlation" in view.summary() and "two" in view.summary()
    view.save(tmp_path)
    names = {"groups", "relation", "correlations", "decline", "perplexity"}
    assert {p.name for p in tmp_path.iterdir()} == {f"{n}.csv" for n in names} | {
        "decline.png",
        "perplexity.png",
    }
    pandas.testing.assert_frame_equal(
        pandas.read_csv(tmp_path / "groups.csv"), view.groups, check_exact=False, rtol=1e-12
    )
    json.dumps(view.to_dict(), allow_nan=False)


def test_without_facts_they_are_taken_from_the_data_that_know_old_answers(seed):
    model, covariance = ready(seed)
    blank = [Edit(prompt="{} worked for", subject=s, target_new="Apple") for s in ("Paris", "Islam", "Edwin")]
    view = analyze_data(
        model,
        tiny_tokenizer(),
        {"blank": blank, "known": EDITS[:4]},
        {"d4s": FAST},
        covariance=covariance,
        progress=False,
    )
    # "Edwin" is asked about, so no group edits him.
    assert EDITS[3].subject == "Edwin" and list(view.groups["edits"]) == [2, 2]
    for name, made in (("known", EDITS[:2]), ("blank", blank[:2])):
        table = view.comparisons[name].results["d4s"][0].edits_table
        assert [row["id"] for row in table] == [edit.id for edit in made]


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


def test_mcnemar_is_a_binomial_test_of_the_facts_that_changed_sides():
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1
    assert mcnemar(5, 0) == 2 / 32 and mcnemar(0, 6) == 2 / 64
    assert mcnemar(8, 1) == mcnemar(1, 8) == pytest.approx(2 * (9 + 1) / 2**9)
    assert mcnemar(2000, 0) == 0.0


def test_what_data_do_is_told_fact_by_fact():
    view = view_of(
        {
            "one": {"rome": ["11110000", "11111111", "00000001"], "kn": ["11110000", "11110000"]},
            "two": {"rome": ["11110000", "11000011"], "memit": ["11110000", "11110000"]},
        }
    )
    relation = view.relation().set_index(["group", "method"])
    lost = relation.loc["one", "rome"]
    assert (lost["known"], lost["lost"], lost["regained"], lost["mcnemar_p"]) == (4, 4, 1, mcnemar(4, 1))
    assert lost["retained_drop"] == 3 / 8 and relation.loc[("two", "rome"), "mcnemar_p"] == 1
    (difference,) = view.differences().to_dict("records")  # the last point that both reached
    assert difference == {
        "method": "rome", "first": "one", "second": "two", "edits": 1,
        "first_only": 4, "second_only": 0, "mcnemar_p": mcnemar(4, 0),
    }  # fmt: skip
    assert not len(view_of({"one": {"rome": ["1", "1"]}}).differences())


def test_differences_allow_for_their_number():
    points = {"rome": ["1" * 8, "0" * 8], "memit": ["1" * 8, "1" * 8]}
    table = view_of({"one": points, "two": {name: ["1" * 8] * 2 for name in points}}).differences()
    assert list(table["mcnemar_p"]) == [2 * mcnemar(8, 0), 1]


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


def test_correlations_rank_ties_alike_and_need_three_points_that_vary():
    found = correlation([1, 2, 2, 4], [1.0, 3.0, 2.0, 9.0])
    assert found["n"] == 4
    assert found["spearman"] == pytest.approx(numpy.corrcoef([1, 2.5, 2.5, 4], [1, 3, 2, 4])[0, 1])
    assert correlation([1, 2, math.inf, 3], [1, 2, 3, 3])["n"] == 3
    assert math.isnan(correlation([1, 2], [1, 2])["pearson"])
    assert math.isnan(correlation([1, 1, 1], [1, 2, 3])["spearman"])


def test_tables_in_text_leave_out_empty_columns_and_name_the_infinite():
    frame = pandas.DataFrame(
        {
            "a": ["x", "y"],
            "b": [0.5, math.inf],
            "b.low": [0.25, 1.0],
            "b.high": [0.75, math.inf],
            "c": ["", ""],
        }
    )
    lines = frame_lines(frame)
    assert lines[0].split() == ["a", "b"]
    assert "0.5 [0.25, 0.75]" in lines[1] and "never [1, never]" in lines[2]


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
