"""When a sequence steps and is scored, and who is told of it."""

from __future__ import annotations

import pytest
from support.sequences import EDITS, FAST, ready, same, sequence, state

import d4s
from d4s.errors import ConfigError, EditingFailed, EditingInterrupted, EditingStopped, ModelError
from d4s.methods.d4s import D4SEditor


@pytest.mark.parametrize(
    ("evaluate_every", "size", "points"),
    [
        (3, 1, [3, 6]),
        (3, 2, [4, 6]),
        (3, 5, [5, 7]),
        ({6, 1, 5}, 2, [2, 6]),
        ((), 1, []),
        (None, 1, []),
        (100, 1, []),
    ],
)
def test_a_point_is_due_at_the_end_of_the_step_that_reaches_it(evaluate_every, size, points):
    schedule = d4s.Schedule(batch_size=size, evaluate_every=evaluate_every)
    steps = schedule.batches(EDITS)
    assert [edit.id for step in steps for edit in step] == [f"e{i}" for i in range(7)]
    assert {len(step) for step in steps[:-1]} <= {size}
    made, due = 0, []
    for step in steps:
        before, made = made, made + len(step)
        if schedule.is_due(before, made):
            due.append(made)
    assert due == points


def test_fewer_neighbours_are_asked_between_the_first_point_and_the_last():
    schedule = d4s.Schedule(neighborhood_limit=2)
    assert [schedule.limit(made, 7) for made in (0, 1, 6, 7)] == [None, 2, 2, None]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"evaluate_every": 2.5}, r"evaluate_every=2\.5"),
        ({"evaluate_every": [3, -1]}, "evaluate_every=-1"),
        ({"evaluate_every": ["3"]}, "evaluate_every='3'"),
        ({"batch_size": True}, "batch_size=True"),
    ],
)
def test_numbers_that_are_none_are_refused(fields, named):
    with pytest.raises(ConfigError, match=f"{named}, must be a whole number from 1 on"):
        d4s.Schedule(**fields)


@pytest.mark.parametrize("limit", [-1, "2", 1.5, True])
def test_a_limit_that_is_none_is_refused(limit):
    with pytest.raises(ConfigError, match=f"neighborhood_limit={limit!r}, must be a whole number from 0 on"):
        d4s.Schedule(neighborhood_limit=limit)


class Told(d4s.Observer):
    """Writes down what it is told, and what it finds then."""

    def __init__(self, name="a", log=None, fails=None):
        self.name, self.log, self.fails = name, [] if log is None else log, fails

    def tell(self, what, *more):
        self.log.append((self.name, what, *more))
        if self.fails == what:
            raise ModelError(f"{self.name} fails at {what}")

    def began(self, result):
        self.tell("began", len(result.history), len(result.edits_table))

    def step(self, result, batch):
        self.tell("step", [edit.id for edit in batch], len(result.edits_table))

    def point(self, result):
        self.tell("point", result.history[-1]["step"], len(result.evaluations))

    def ended(self, result, error):
        self.tell("ended", type(error).__name__, result.failure)


def test_an_observer_is_told_of_each_step_and_point(seed):
    model, covariance = ready(seed)
    told = Told()
    sequence(model, covariance, batch_size=3, evaluate_every=4, observers=[told])
    assert told.log == [
        ("a", "began", 1, 0),
        ("a", "step", ["e0", "e1", "e2"], 3),
        ("a", "step", ["e3", "e4", "e5"], 6),
        ("a", "point", 6, 2),
        ("a", "step", ["e6"], 7),
        ("a", "point", 7, 3),
        ("a", "ended", "NoneType", None),
    ]


def test_observers_end_in_the_reverse_order_and_one_that_fails_breaks_the_sequence_off(seed):
    model, covariance = ready(seed)
    log = []
    observers = [Told("a", log), Told("b", log, fails="step"), Told("c", log)]
    with pytest.raises(EditingFailed, match="b fails at step") as caught:
        sequence(model, covariance, observers=observers)
    assert isinstance(caught.value.__cause__, ModelError)
    assert [entry[:2] for entry in log[3:]] == [
        ("a", "step"), ("b", "step"), ("c", "ended"), ("b", "ended"), ("a", "ended"),
    ]  # fmt: skip
    assert log[-1][2] == "ModelError" and len(caught.value.result.edits_table) == 1


def test_an_observer_that_could_not_begin_is_not_told_of_the_end(seed):
    model, covariance = ready(seed)
    log = []
    with pytest.raises(EditingFailed, match="b fails at began"):
        sequence(model, covariance, observers=[Told("a", log), Told("b", log, fails="began"), Told("c", log)])
    assert [entry[:2] for entry in log] == [("a", "began"), ("b", "began"), ("a", "ended")]


def test_what_broke_off_is_told_by_type(monkeypatch, seed):
    """Errors and Ctrl-C apart, one base for both; nothing is hung onto the cause."""
    plain = D4SEditor.apply
    for cause, kind, kin in (
        (ModelError("no room"), EditingFailed, d4s.D4SError),
        (KeyboardInterrupt(), EditingStopped, KeyboardInterrupt),
        (OSError("disk"), EditingFailed, Exception),
    ):
        model, covariance = ready(seed)
        before, calls = state(model), []

        def apply(self, batch, cause=cause, calls=calls):
            calls.append(batch)
            if len(calls) == 3:
                raise cause
            return plain(self, batch)

        monkeypatch.setattr(D4SEditor, "apply", apply)
        with pytest.raises(kin) as caught:
            sequence(model, covariance)
        error = caught.value
        assert type(error) is kind and isinstance(error, EditingInterrupted)
        assert error.__cause__ is cause and not hasattr(cause, "result")
        assert [row["id"] for row in error.result.edits_table] == ["e0", "e1"]
        assert not same(before, state(model))
        error.result.restore()
        assert same(before, state(model))
    assert not issubclass(EditingStopped, Exception)  # `except Exception` lets Ctrl-C through


@pytest.mark.parametrize("given", [0, 1.5, "a tenth"])
def test_what_is_no_share_is_refused(given):
    with pytest.raises(ConfigError, match=f"stop_on_collapse={given!r}, must be a share, above 0"):
        d4s.Schedule(stop_on_collapse=given)


STILL = FAST | dict(steps=1, learning_rate=1e-30)  # nothing is written, so that no edit is the answer


def test_a_sequence_ends_at_the_point_where_it_has_collapsed(seed):
    model, covariance = ready(seed)
    told = Told()
    result = sequence(
        model, covariance, config=STILL, evaluate_every=3, stop_on_collapse=1.0, observers=[told]
    )
    share = f"{100 * result.history[-1]['efficacy_argmax']:.1f} % of the edits made"
    assert [row["step"] for row in result.history] == [0, 3] and len(result.edits_table) == 3
    assert result.failure == f"after edit 3: {share} are the greedy answer, fewer than stop_on_collapse=1"
    assert told.log[-1] == ("a", "ended", "NoneType", result.failure)
    assert share in result.summary()


def test_a_sequence_that_holds_its_edits_is_not_ended(seed):
    model, covariance = ready(seed)
    points = {row["step"]: row for row in sequence(model, covariance, evaluate_every=2).history[1:]}
    model, covariance = ready(seed)
    least = min(row["efficacy_argmax"] for made, row in points.items() if made < len(EDITS))
    if least > 0:
        result = sequence(model, covariance, evaluate_every=2, stop_on_collapse=least)
        assert result.failure is None and len(result.edits_table) == len(EDITS)
        model, covariance = ready(seed)
    below = min(least + 1e-6, 1.0)
    result = sequence(model, covariance, evaluate_every=2, stop_on_collapse=below)
    first = min(made for made, row in points.items() if row["efficacy_argmax"] < below)
    assert result.history[-1]["step"] == first and (result.failure is not None) == (first < len(EDITS))


def test_the_end_of_a_sequence_is_no_collapse(seed):
    model, covariance = ready(seed)
    result = sequence(model, covariance, config=STILL, stop_on_collapse=1.0)
    assert result.failure is None and [row["step"] for row in result.history] == [0, len(EDITS)]


def test_no_pass_follows_a_collapse(seed):
    result = sequence(*ready(seed), config=STILL, stop_on_collapse=1.0, passes=2)
    assert result.failure is not None and result.failure.startswith(f"after edit {len(EDITS)}: ")
    assert [row["step"] for row in result.history] == [0, len(EDITS)]
    held = sequence(*ready(seed), config=STILL, passes=2)
    assert held.failure is None and held.history[-1]["step"] > len(EDITS)


def test_what_has_collapsed_does_not_go_on_in_its_journal(tmp_path, seed):
    model, covariance = ready(seed)
    before = state(model)
    options = dict(config=STILL, evaluate_every=3, stop_on_collapse=1.0, journal=tmp_path / "journal")
    first = sequence(model, covariance, **options)
    first.restore()
    assert same(before, state(model))
    again = sequence(model, covariance, **options)
    assert again.failure == first.failure and len(again.edits_table) == 3
