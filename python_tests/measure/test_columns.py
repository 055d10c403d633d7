"""Every figure is declared: its unit, its direction, where it shows; and a measure declares its own."""

from __future__ import annotations

from typing import ClassVar

import pytest
from support.sequences import EDITS, ready, sequence
from support.tiny import tiny_tokenizer

from d4s.edits import Edit, Question
from d4s.errors import ConfigError
from d4s.measure.columns import (
    COLUMNS,
    HEADLINES,
    METRICS,
    THREE,
    Column,
    column,
    declared,
    is_share,
    layers,
    spelled,
)
from d4s.measure.metrics import evaluate


@pytest.mark.parametrize(
    ("name", "share"),
    [
        *(
            (name, True)
            for name in ("efficacy", "paraphrase_argmax", "original_efficacy", "efficacy.unedited")
        ),
        *(
            (name, True)
            for name in ("locality.Relation", "specificity.low", "retained", "multi_hop_generated")
        ),
        *((name, False) for name in ("fluency", "target_probability", "consistency", "nll_new", "l1_norm.3")),
        *((name, True) for name in ("mmlu acc", "arc_challenge acc_norm", "arc acc_norm.low", "v1.1 acc")),
        ("gsm8k exact_match (strict-match)", True),
        *((name, False) for name in ("wikitext word_perplexity", "squadv2 f1", "wmt bleu", "cola mcc")),
        *((name, False) for name in ("score", "accuracy", "acc", "text_perplexity", "my weight", "loss.low")),
    ],
)
def test_only_names_that_are_known_are_shares(name, share):
    assert is_share(name) == share
    assert spelled(name, 0.5) == ("50.0 %" if share else "0.5")


def test_a_figure_is_spelled_by_its_unit():
    assert spelled("efficacy", 0.98765) == "98.8 %" and spelled("mmlu acc", 0.98765, 2) == "98.77 %"
    assert spelled("text_perplexity", 12.3456) == "12.35" and spelled("fluency", 5.0) == "5"
    assert (column("efficacy").axis, column("nll_new").axis) == ("efficacy (%)", "nll_new")


QUESTION = Edit(
    "Where does {} live?",
    "Edwin",
    "Paris",
    kind="question",
    paraphrases=("Where is Edwin?",),
    locality=(Question("Where is Lyon?", ("France",), "Relation"),),
    portability=(Question("Who lives in Paris?", ("Edwin",), "multi_hop"),),
    id="q",
)


def test_every_column_of_a_sequence_is_declared_with_a_unit(seed):
    class Measure:
        columns: ClassVar = {
            "weight": Column("weight", "norm", "down"),
            "<task> f1": Column("<task> f1", "share"),
        }

        def __call__(self):
            return {"weight": 3.0, "squad f1": 0.5, "mmlu acc": 0.25, "retained": 0.5, "right.0": 1.0}

    model, covariance = ready(seed)
    measure = Measure()
    result = sequence(
        model, covariance, (*EDITS[:3], QUESTION), generate=True, evaluate_every=2, measure=measure
    )
    own = declared(measure)
    names = {name for row in result.history for name in row} | {n for r in result.edits_table for n in r}
    names |= {name for evaluation in result.evaluations for row in evaluation.rows for name in row}
    names |= {name for evaluation in result.evaluations for name in evaluation.metrics}
    assert {
        "efficacy_generated",
        "efficacy_argmax.unedited",
        "delta_norm.1",
        "locality.Relation.low",
    } <= names
    assert {"portability.multi_hop", "paraphrase_nll_new", "written_probability", "squad f1"} <= names
    assert [name for name in sorted(names) if column(name, own).unit == "unknown"] == []
    given = measure()
    assert {name for name in result.history[-1] if column(name, own).origin == "measure"} == set(given)


def test_bounds_and_levels_are_of_the_figure_they_stand_beside(seed):
    model, covariance = ready(seed)
    row = sequence(model, covariance, EDITS[:3], evaluate_every=1).history[-1]
    for name in row:
        one = column(name)
        if one.bound:
            whole = column(one.stem)
            assert one.unit == whole.unit and one.stem in row
            assert whole.unedited if one.bound == "unedited" else whole.interval
    assert column("efficacy.unedited.low").stem == "efficacy.unedited"
    assert (column("efficacy.unedited").better, column("efficacy.low").better) == ("neither", "up")


def test_tables_leave_out_clocks_layers_kinds_and_levels():
    shown = (
        "efficacy",
        "efficacy.low",
        "l1_growth",
        "seconds_an_edit",
        "v1.1 acc",
        "loss",
        "original_efficacy",
    )
    left_out = (
        "step",
        "edit_seconds",
        "l1_norm.3",
        "l1_norm.3.low",
        "locality.Relation",
        "efficacy.unedited",
    )
    assert all(column(name).in_tables for name in shown)
    assert not any(column(name).in_tables for name in (*left_out, "right.7", "undeclared.part"))
    clocks = {name for name, one in COLUMNS.items() if one.is_clock}
    assert clocks == {"seconds", "edit_seconds", "seconds_an_edit"}


def test_layers_are_numbers_in_their_order():
    names = ["l1_norm.12", "l1_norm.3", "l1_norm.3.low", "delta_norm.3", "l1_growth", "l1_norm.x", 4]
    assert layers(names) == {3: "l1_norm.3", 12: "l1_norm.12"} and list(layers(names)) == [3, 12]
    assert layers(names, "delta_norm.<layer>") == {3: "delta_norm.3"}
    assert column("l1_norm.3").layer == 3 and column("efficacy").layer is None


def test_the_headlines_are_the_three_and_their_means():
    assert HEADLINES == ("efficacy", "paraphrase", "specificity", "average", "harmonic")
    assert HEADLINES[:3] == THREE and all(METRICS[name].better == "up" for name in HEADLINES)


def test_a_measure_declares_its_columns_as_a_callable_or_as_the_owner_of_a_method():
    class Owner:
        columns: ClassVar = {"part.<number>": Column("part.<number>", "share", "up", shown="row")}

        def ask(self):
            return {"part.3": 0.5}

    own = declared(Owner().ask)
    assert is_share("part.3", own) and column("part.3", own).member == "3" and not is_share("part.3")
    assert is_share("part.3.high", own) and spelled("part.3", 0.5, own=own) == "50.0 %"
    assert declared(None) == declared(lambda: {}) == {}


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        (["loss"], "must be a mapping"),
        ({"loss": "nats"}, "must be a mapping"),
        ({"loss": Column("lost", "nats")}, "under 'loss' stands the column 'lost'"),
    ],
)
def test_columns_that_are_none_are_refused(columns, text):
    def measure():
        return {}

    measure.columns = columns
    with pytest.raises(ConfigError, match=text):
        declared(measure)


@pytest.mark.parametrize("wrong", [{"unit": "percent"}, {"better": "more"}, {"shown": "first"}])
def test_an_unknown_unit_or_direction_is_refused(wrong):
    with pytest.raises(ConfigError, match=f"loss: unknown {next(iter(wrong))} of a column"):
        Column(**{"name": "loss", "unit": "nats"} | wrong)


def test_each_metric_of_an_evaluation_says_what_it_is(seed):
    model, _ = ready(seed)
    found = evaluate(model, tiny_tokenizer(), EDITS[:2], fluency=False)
    lines = found.summary().splitlines()
    assert any(line.endswith("%     mean of the three") for line in lines)
