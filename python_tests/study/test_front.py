"""Methods along their strength: what a point is, which points no other dominates, and what is drawn and told."""

from __future__ import annotations

import json
import math
import random

import pandas
import pytest
from support.sequences import EDITS, FAST, ready, same, state
from support.tiny import tiny_tokenizer

from d4s.errors import ConfigError
from d4s.methods import METHODS, Workbench, method_for
from d4s.models.architectures import Anatomy
from d4s.sequence.comparison import Comparison
from d4s.study.front import FACTORS, front, non_dominated, outcome, strengths


def drawn_points(draw: random.Random, count: int) -> list[tuple[float, float]]:
    """Of few values, so that some are equal; one in ten has a NaN."""
    values = [0.0, 0.25, 0.5, 0.75, 1.0]
    return [
        (math.nan if draw.random() < 0.1 else draw.choice(values), draw.choice(values)) for _ in range(count)
    ]


def swept(points: list[tuple[float, float]]) -> list[bool]:
    """The front by the largest second number among the points that are further right, instead of pair by pair."""
    found = []
    for x, y in points:
        there = [(a, b) for a, b in points if a == a and b == b]
        right = max((b for a, b in there if a > x), default=-math.inf)
        above = max((b for a, b in there if a == x), default=-math.inf)
        found.append(x == x and y == y and right < y and above <= y)
    return found


def test_the_front_is_what_a_sweep_from_the_right_finds(seed):
    draw = random.Random(seed)
    for _ in range(200):
        points = drawn_points(draw, draw.randrange(1, 9))
        assert non_dominated(points) == swept(points), points
    assert non_dominated([]) == [] and non_dominated([(math.nan, 1.0)]) == [False]


def test_written_and_kept_are_means_over_edits_of_what_each_edit_has():
    rows = [
        dict(efficacy=1.0, paraphrase=0.5, specificity=0.8, efficacy_argmax=1.0, paraphrase_argmax=0.0)
        | dict(specificity_argmax=0.6),
        dict(efficacy=0.0, paraphrase=1.0, specificity=0.4, efficacy_argmax=0.0, specificity_argmax=1.0),
        dict(efficacy=1.0, efficacy_argmax=1.0),
    ]
    found = outcome(rows, 0.25)
    assert found.written == pytest.approx((0.5 + 0.0 + 1.0) / 3)
    assert found.written_greedy == pytest.approx((0.0 + 0.0 + 1.0) / 3)
    assert found.kept == pytest.approx(0.6) and found.kept_greedy == pytest.approx(0.8)
    assert found.by_edit == pytest.approx((0.25 * 0.7, 0.0, 1.0)) and found.growth == 0.25
    assert found.sums == pytest.approx(((0.5 + 1 / 3) / 2, 0.7))
    assert found.total == pytest.approx((0.175 + 1.0) / 3)


def test_a_front_is_one_sequence_a_value_with_its_label_its_figure_and_its_file(seed, tmp_path, monkeypatch):
    model, covariance = ready(seed)
    before = state(model)
    methods = {"d4s": FAST, "slow": FAST | {"method": "memit"}}
    options = dict(covariance=covariance, progress=False, seeds=seed % 7, out=tmp_path)
    found = front(model, tiny_tokenizer(), EDITS[:2], methods, grid=[1.0, 0.01], **options)
    assert same(state(model), before)
    labels = ["d4s λ 0.01", "d4s λ 1", "slow λ 0.01", "slow λ 1"]
    assert list(found.comparison.results) == labels == list(found.table()["label"])
    record = found.comparison.results["d4s λ 1"][seed % 7]
    assert record.config["prior_weight"] == 1.0 and record.method == "d4s"
    row = found.table().set_index("label").loc["d4s λ 1"]
    here = outcome(record.evaluations[-1].rows, record.history[-1]["l1_growth"])
    assert (row["written"], row["kept"], row["growth"]) == (here.written, here.kept, here.growth)
    monkeypatch.setattr(Comparison, "save", lambda self, folder: None)  # its own figures are tested elsewhere
    found.save(tmp_path)
    data = pandas.read_csv(tmp_path / "front.csv")
    assert list(data["panel"]) == ["NLL"] * 4 + ["greedy"] * 4
    assert list(data["label"][:4]) == ["λ 0.01", "λ 1"] * 2
    assert list(data["line"][:4]) == ["d4s", "d4s", "slow", "slow"]
    assert (data["x"][1], data["y"][1]) == pytest.approx((100 * row["kept"], 100 * row["written"]))
    assert (tmp_path / "front.png").stat().st_size > 1_000
    told = json.loads((tmp_path / "front.json").read_text())
    marked = {point["label"] for point in told["points"] if point["front"] or point["front_greedy"]}
    assert marked == {label for label in labels if label in found.summary()}
    for end in ("", "_greedy"):
        pairs = [(p[f"written{end}"], p[f"kept{end}"]) for p in told["points"]]
        assert [p[f"front{end}"] for p in told["points"]] == swept(pairs)
    again = front(model, tiny_tokenizer(), EDITS[:2], {"d4s": FAST}, grid=[1.0, 0.01], **options)
    times = [one.comparison.results["d4s λ 1"][seed % 7].history for one in (found, again)]
    assert times[0] == times[1]  # its clock too: it was kept, and not made again


def test_without_a_grid_it_is_multiples_of_each_methods_own(seed):
    model, covariance = ready(seed)
    bench = Workbench(model, tiny_tokenizer(), covariance=covariance)
    anatomy = Anatomy(model)
    own = method_for("d4s", anatomy, FAST)
    assert strengths("d4s", own, None, bench, EDITS) == pytest.approx([0.01 * f for f in FACTORS], rel=0.02)
    assert strengths("d4s", own, {"memit": [1.0]}, bench, EDITS) == strengths("d4s", own, None, bench, EDITS)
    tuned = method_for("ft-m", anatomy)
    found = strengths("ft-m", tuned, [30.0, 300.0], bench, EDITS)
    assert found[2] == tuned.learning_rate  # λ is no field of it
    assert max(strengths("kn", method_for("kn", anatomy), None, bench, EDITS)) < 1  # a share
    open_ = method_for("d4s", anatomy, FAST | {"prior_weight": None})
    settled = open_.settled(bench, EDITS).prior_weight
    assert strengths("d4s", open_, None, bench, EDITS)[2] == settled
    with pytest.raises(ConfigError, match="empty"):
        strengths("d4s", own, [], bench, EDITS)
    with pytest.raises(ConfigError, match=r"d4s: its grid has 30\.0 and 30\.00001, which are both λ 30"):
        strengths("d4s", own, [30.00001, 1.0, 30, 30.0], bench, EDITS)
    assert strengths("d4s", own, [30.001, 30, 30.0], bench, EDITS) == [30.0, 30.001]
    with pytest.raises(ConfigError, match="mennit"):
        front(model, tiny_tokenizer(), EDITS, {"d4s": FAST}, grid={"mennit": [1]}, covariance=covariance)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_names_a_field_of_its_own_as_its_strength(name, seed):
    model, _ = ready(seed)
    method = method_for(name, Anatomy(model))
    own = method.value(method.strength)
    assert method.strength and (own is None or isinstance(own, float))
    assert method.changed({method.strength: 0.125}).value(method.strength) == 0.125


def test_a_sequence_that_breaks_off_is_told_and_not_drawn(seed, tmp_path, monkeypatch):
    model, covariance = ready(seed)
    methods = {"d4s": FAST, "wrong": FAST | {"method": "memit", "layers": [9]}}
    found = front(
        model, tiny_tokenizer(), EDITS[:2], methods, grid=[0.01], covariance=covariance, progress=False
    )
    assert list(found.table()["label"]) == ["d4s λ 0.01"]
    assert "wrong λ 0.01 broke off: before the first edit" in found.summary()
    monkeypatch.setattr(Comparison, "save", lambda self, folder: None)
    found.save(tmp_path)
    assert set(pandas.read_csv(tmp_path / "front.csv")["line"]) == {"d4s"}
