"""Two evaluations of the same edits: what is told of their difference, against identities and normal theory."""

from __future__ import annotations

import math

import numpy
import pytest

from d4s.edits import Edit
from d4s.measure.differences import differences
from d4s.measure.metrics import evaluation_of


def evaluation(figures, ids=None):
    """figures: name → a value an edit; None: the edit has none"""
    count = len(next(iter(figures.values())))
    ids = [f"e{i}" for i in range(count)] if ids is None else ids
    rows = [
        {"id": id_, "kind": "completion"}
        | {name: values[i] for name, values in figures.items() if values[i] is not None}
        for i, id_ in enumerate(ids)
    ]
    edits = [Edit(prompt="{} is", subject=id_, target_new="x", id=id_) for id_ in ids]
    return evaluation_of(rows, edits, 0)


def three(generator, count=40):
    names = ("efficacy", "paraphrase", "specificity")
    return {name: list(generator.integers(0, 5, count) / 4) for name in names}


def test_an_evaluation_differs_from_itself_by_nothing_and_the_reverse_by_the_negative(seed):
    generator = numpy.random.default_rng(seed)
    one, other = evaluation(three(generator)), evaluation(three(generator))
    assert {(m.mean, m.low, m.high) for m in differences(one, one).values()} == {(0.0, 0.0, 0.0)}
    there, back = differences(one, other), differences(other, one)
    assert list(there) == ["efficacy", "paraphrase", "specificity", "average", "harmonic"]
    for name in there:
        assert there[name].mean == -back[name].mean
        assert (there[name].low, there[name].high) == pytest.approx((-back[name].high, -back[name].low))


def test_figures_are_the_differences_of_the_evaluations_own(seed):
    generator = numpy.random.default_rng(seed)
    one, other = evaluation(three(generator)), evaluation(three(generator))
    for name, metric in differences(one, other).items():
        assert metric.mean == pytest.approx(one[name] - other[name], abs=1e-12)
        assert metric.low < metric.mean < metric.high and metric.count == 40


def test_what_the_edits_share_cancels_out(seed):
    hard = numpy.random.default_rng(seed).random(200)
    one, other = evaluation({"efficacy": list(0.5 * hard + 0.25)}), evaluation({"efficacy": list(0.5 * hard)})
    found = differences(one, other)["efficacy"]
    assert (found.low, found.high) == pytest.approx((0.25, 0.25), abs=1e-12)
    own = one.metrics["efficacy"]
    assert own.high - own.low > 0.02  # while each interval by itself is wide


def test_edits_of_one_fact_are_one_sample(seed):
    """Rows of a fact that is made five times say no more than one."""
    generator = numpy.random.default_rng(seed)
    figures = [three(generator, 20) for _ in range(2)]
    once = differences(*(evaluation(one, [f"{i:02d}" for i in range(20)]) for one in figures))
    ids = [f"{i:02d}#{again}" for i in range(20) for again in range(5)]
    edits = [Edit(prompt="{} is", subject=id_[:2], target_new="x", id=id_) for id_ in ids]
    often = []
    for one in figures:
        rows = [
            {"id": id_, "kind": "completion"} | {name: values[int(id_[:2])] for name, values in one.items()}
            for id_ in ids
        ]
        often.append(evaluation_of(rows, edits, 0))
    again = differences(*often)
    for name, metric in once.items():
        assert (again[name].mean, again[name].low, again[name].high) == pytest.approx(
            (metric.mean, metric.low, metric.high), abs=1e-12
        )
        assert again[name].count == 100


def test_the_interval_is_that_of_paired_differences(seed):
    generator = numpy.random.default_rng(seed)
    first, second = generator.random(2_000), generator.random(2_000)
    found = differences(evaluation({"efficacy": list(first)}), evaluation({"efficacy": list(second)}))[
        "efficacy"
    ]
    half = 1.96 * numpy.std(first - second) / math.sqrt(2_000)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)


def test_only_edits_that_have_the_figure_in_both_are_compared():
    one = evaluation({"efficacy": [1.0, 0.0, 1.0], "paraphrase": [1.0, None, 1.0]}, ["a", "b", "c"])
    other = evaluation({"efficacy": [0.0, 1.0, 0.0], "paraphrase": [None, 0.0, 0.5]}, ["c", "a", "d"])
    found = differences(one, other)
    assert (found["efficacy"].mean, found["efficacy"].count) == (0.5, 2)  # a: 1 less 1, c: 1 less 0
    assert (found["paraphrase"].mean, found["paraphrase"].count) == (1.0, 1)  # a alone: 1 less 0
    assert differences(one, evaluation({"efficacy": [1.0]}, ["z"])) == {}
    assert differences(one, evaluation({"specificity": [1.0] * 3}, ["a", "b", "c"])) == {}
