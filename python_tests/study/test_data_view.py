"""What data do to a model; by hand where a hand can work it out."""

from __future__ import annotations

import json
import math

import numpy
import pandas
import pytest
from support.sequences import EDITS, FAST, ready, same, state
from support.small_world import FACTS, small_world
from support.tiny import tiny_tokenizer
from support.views import view_of

from d4s.edits import Edit
from d4s.errors import ConfigError
from d4s.measure.statistics import correlation, mcnemar
from d4s.sequence.run import edit_sequence
from d4s.study.data_view import FORMS, analyze_data, forms_of, target_surprise
from d4s.study.retained import Retained, hold_out


def test_mcnemar_is_a_binomial_test_of_the_facts_that_changed_sides():
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1
    assert mcnemar(5, 0) == 2 / 32 and mcnemar(0, 6) == 2 / 64
    assert mcnemar(8, 1) == mcnemar(1, 8) == pytest.approx(2 * (9 + 1) / 2**9)
    assert mcnemar(2000, 0) == 0.0


def test_correlations_rank_ties_alike_and_need_three_points_that_vary():
    found = correlation([1, 2, 2, 4], [1.0, 3.0, 2.0, 9.0])
    assert found["n"] == 4
    assert found["spearman"] == pytest.approx(numpy.corrcoef([1, 2.5, 2.5, 4], [1, 3, 2, 4])[0, 1])
    assert correlation([1, 2, math.inf, 3], [1, 2, 3, 3])["n"] == 3
    assert math.isnan(correlation([1, 2], [1, 2])["pearson"])
    assert math.isnan(correlation([1, 1, 1], [1, 2, 3])["spearman"])


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
