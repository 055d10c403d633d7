"""Settings that find themselves: within the time, by probes that are named, and put down to more than chance."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pandas
import pytest
from support.sequences import EDITS, FAST, failing, ready, same, state
from support.tiny import tiny_tokenizer

from d4s.edits import Edit
from d4s.errors import ConfigError, EditError
from d4s.methods import Workbench, method_for
from d4s.methods.d4s import D4SEditor
from d4s.methods.locate_then_edit import LocateEditor, LocateMethod, arriving
from d4s.methods.preset import load_preset
from d4s.models.architectures import Anatomy
from d4s.study import tune as module
from d4s.study.front import Outcome
from d4s.study.tune import SLICE, tune
from d4s.study.tuning import Scored, Trial, chosen_of, standard_error

SEARCH, MAKE = 5.0, 1.0  # seconds of the clock in these tests, a target and an edit


class Clock:
    """Goes on only where something is done."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    one, search, apply = Clock(), LocateEditor.search, D4SEditor.apply

    def searched(self, edits):
        one.now += SEARCH * len(edits)
        return search(self, edits)

    def made(self, batch):
        one.now += MAKE
        return apply(self, batch)

    monkeypatch.setattr(LocateEditor, "search", searched)
    monkeypatch.setattr(D4SEditor, "apply", made)
    return one


def many(count: int) -> list[Edit]:
    """Edits of as many prompts, short ones."""
    return [
        replace(EDITS[i % 7], prompt=f"{'a' * (i // 7)} {EDITS[i % 7].prompt}".strip(), id=f"m{i}")
        for i in range(count)
    ]


def tuned(model, covariance, edits=EDITS, **options):
    options = dict(config=FAST | {"steps": 2}, progress=False, minutes=5.0) | options
    return tune(model, tiny_tokenizer(), edits, covariance=covariance, **options)


def test_the_time_is_kept_and_more_of_it_tries_more(clock, seed):
    model, covariance = ready(seed)
    before, tried = state(model), []
    for minutes in (1.0, 10.0):
        clock.now = 0.0
        found = tuned(model, covariance, many(20), minutes=minutes, clock=clock)
        assert clock.now <= 60 * minutes + SEARCH * SLICE + MAKE  # what had begun
        assert found.seconds == clock.now and same(state(model), before)
        tried.append((found.most, len(found.scored)))
        assert ("probes are few" in found.summary()) == (found.most < 16)
        assert bool(found.left_out) == ("no time was left for" in found.summary())
    (few, short), (more, long) = tried
    assert few < 16 <= more and short < long


def test_a_clock_that_runs_away_is_stopped_at_once(clock, seed):
    model, covariance = ready(seed)
    before = state(model)
    with pytest.raises(ConfigError, match=r"0.1 minutes are over before 4 probes"):
        tuned(model, covariance, many(8), minutes=0.1, clock=clock)
    assert same(state(model), before)


def test_the_same_measured_times_find_the_same(clock, seed):
    model, covariance = ready(seed)
    found = []
    for _ in range(2):
        clock.now = 0.0
        found.append(tuned(model, covariance, minutes=1.5, clock=clock, seed=seed % 5))
    assert found[0].preset == found[1].preset and found[0].summary() == found[1].summary()
    assert found[0].left_out == found[1].left_out != ()


def test_every_edit_that_was_looked_at_is_named_as_a_probe(clock, monkeypatch, seed):
    model, covariance = ready(seed)
    seen: set[str] = set()

    def watched(function, place):
        def call(*arguments, **options):
            seen.update(edit.text for edit in arguments[place])
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(module, "evaluate", watched(module.evaluate, 2))
    monkeypatch.setattr(module, "take_baseline", watched(module.take_baseline, 2))
    monkeypatch.setattr(LocateEditor, "search", watched(LocateEditor.search, 1))
    monkeypatch.setattr(D4SEditor, "edit", watched(D4SEditor.edit, 1))
    plain = LocateMethod.key_squares
    # λ looks at the first few of what it is given.
    monkeypatch.setattr(
        LocateMethod,
        "key_squares",
        lambda self, b, e: seen.update(x.text for x in e[:16]) or plain(self, b, e),
    )
    edits = many(40)
    found = tuned(model, covariance, edits, minutes=2.0, clock=clock, seed=seed % 5)
    probes = dict(found.preset.probes)
    assert seen <= set(probes.values()) and len(probes) < 40
    assert {edit.id: edit.text for edit in edits}.items() >= probes.items()
    assert not found.preset.probed(edit for edit in edits if edit.text not in seen)


def test_probes_of_their_own_leave_the_edits_alone(clock, seed):
    model, covariance = ready(seed)
    found = tuned(model, covariance, EDITS, probe_edits=many(16)[8:], probes=2, minutes=0.5, clock=clock)
    assert {one for one, _ in found.preset.probes} <= {edit.id for edit in many(16)[8:]}
    assert not found.preset.probed(EDITS)


def test_the_preset_is_the_setting_that_was_measured(clock, seed, tmp_path):
    model, covariance = ready(seed)
    found = tuned(model, covariance, probes=4, minutes=30, clock=clock)
    (chosen,) = [one for one in found.scored if one.trial.label == found.chosen]
    assert chosen.probes == found.most == 4
    found.save(tmp_path / "deep" / "p.json")
    preset = load_preset(tmp_path / "deep" / "p.json")
    assert method_for("d4s", Anatomy(model), preset) == chosen.trial.method
    assert preset.fields.keys() >= {"layers", "clamp", "contexts", "anchor", "prior_weight"}
    assert "target_norm" not in preset.fields or hasattr(chosen.trial.method, "target_norm")
    data = pandas.read_csv(tmp_path / "deep" / "p.csv")
    assert (tmp_path / "deep" / "p.png").stat().st_size > 1_000
    last = [one for one in found.scored if one.probes == found.most]
    assert list(data["label"]) == [one.trial.label for one in last] * 2
    assert list(data["x"]) == pytest.approx(
        [100 * x for x in [one.found.kept for one in last] + [one.found.kept_greedy for one in last]]
    )
    assert set(data["label"][data["chosen"]]) == {found.chosen}
    assert set(data["label"][data["front"]]) == found.on_front() != set()
    text = found.summary()
    assert all(one.trial.label in text for one in found.scored) and f"chosen: {found.chosen}; " in text
    assert json.loads(json.dumps(found.to_dict()))["chosen"] == found.chosen


def test_a_setting_is_made_as_a_sequence_makes_it(clock, seed):
    """One edit after another from the unedited weights: what it writes is what `edit_sequence` writes."""
    from support.sequences import sequence

    model, covariance = ready(seed)
    found = tuned(model, covariance, probes=4, minutes=1.0, clock=clock)
    order = [next(edit for edit in EDITS if edit.id == one) for one, _ in found.preset.probes][:4]
    own = next(one for one in found.scored if one.trial.label == "own")
    result = sequence(model, covariance, order, config=own.trial.method)
    assert result.history[-1]["l1_growth"] == pytest.approx(own.found.growth, rel=1e-9)
    assert result.history[-1]["specificity"] == pytest.approx(own.found.kept)
    result.restore()


def test_the_norm_anchor_is_tried_with_the_norm_of_the_first_probes(clock, seed):
    from support.sequences import sequence

    model, covariance = ready(seed)
    found = tuned(model, covariance, probes=7, minutes=60.0, clock=clock)
    (anchored,) = [
        one.trial.method for one in found.scored if one.trial.changes.get("target_norm") == "anchor"
    ][:1]
    order = [next(edit for edit in EDITS if edit.id == one) for one, _ in found.preset.probes]
    result = sequence(model, covariance, order, config=FAST | {"steps": 2, "target_norm": "anchor"})
    assert anchored.anchor_norm == pytest.approx(result.chosen["anchor_norm"], rel=1e-5)
    result.restore()


def test_a_setting_that_fails_is_told_and_the_others_go_on(clock, monkeypatch, seed):
    model, covariance = ready(seed)
    before = state(model)
    failing(monkeypatch, D4SEditor, 4)  # the own setting's three have been made
    found = tuned(model, covariance, probes=3, minutes=2, clock=clock)
    (label,) = found.failed
    assert (
        label not in {one.trial.label for one in found.scored}
        and f"{label} failed: no room" in found.summary()
    )
    assert same(state(model), before)


def test_a_field_that_a_method_lacks_is_not_searched(seed):
    model, _ = ready(seed)
    found = tune(model, tiny_tokenizer(), EDITS, method="ft-l", config={"steps": 2}, probes=3, progress=False)
    assert {one.trial.line for one in found.scored} <= {"own", "layers", "epsilon", "together"}
    assert found.preset.method == "ft-l" and found.preset.fields.keys() == {"layers", "epsilon", "steps"}


def test_with_the_weight_left_open_the_methods_own_is_by_the_share_that_arrives(clock, seed):
    model, covariance = ready(seed)
    config = FAST | {"prior_weight": None, "steps": 2}
    found = tuned(model, covariance, probes=3, config=config, minutes=3, clock=clock)
    own = next(one for one in found.scored if one.trial.label == "own").trial.method
    bench = Workbench(model, tiny_tokenizer(), covariance=covariance)
    ids = [one for one, _ in found.preset.probes]
    probes = [edit for edit in EDITS if edit.id in ids]

    def share(method):
        return float(arriving(method.key_squares(bench, probes), method.prior_weight, True).median())

    assert share(own) == pytest.approx(0.9, abs=0.03)
    weak = next(one for one in found.scored if one.trial.label == "λ: 60 % arrive").trial.method
    assert share(weak) == pytest.approx(0.6, abs=0.03)
    assert isinstance(found.preset.fields["prior_weight"], float)


def scored(label: str, totals: list[float]) -> Scored:
    nothing = dict(written=0.0, written_greedy=0.0, kept=0.0, kept_greedy=0.0, growth=0.0)
    return Scored(Trial(label, label, None), len(totals), Outcome(**nothing, by_edit=tuple(totals)))  # type: ignore[arg-type]


def test_the_methods_own_setting_stays_unless_another_is_better_by_more_than_chance(seed):
    draw = random.Random(seed)
    own = scored("own", [draw.random() for _ in range(8)])
    sure = scored("sure", [value + 0.1 + 0.01 * draw.random() for value in own.found.by_edit])
    mixed = scored("mixed", [v + (0.1 if i % 2 else -0.08) for i, v in enumerate(own.found.by_edit)])
    worse = scored("worse", [value - 0.1 for value in own.found.by_edit])
    assert chosen_of([own, mixed, sure, worse], own)[0] is sure
    found, why = chosen_of([own, mixed, worse], own)
    assert found is own and "mixed is 1.0 ± 3.4 points better" in why and "chance" in why
    assert chosen_of([own, worse], own)[0] is own
    assert chosen_of([worse], own) == (worse, "own did not make 8 probes")


def test_a_standard_error_is_that_of_a_mean():
    assert standard_error([1.0, 3.0]) == pytest.approx(1.0)  # √2 / √2
    assert standard_error([2.0] * 5) == 0 and standard_error([1.0]) == math.inf


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"minutes": 0}, "minutes=0"),
        ({"minutes": math.inf}, "minutes=inf"),
        ({"probes": 1}, "probes=1"),
        ({"probes": 8}, "7 different edits with neighbours, and 8 probes"),
        ({"edits": EDITS[:1]}, "1 different edits with neighbours, and 2 probes"),
        ({"method": "d5s"}, "Did you mean 'd4s'"),
        ({"config": {"clamb": 1}}, "clamp"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_anything_is_done(options, words, seed):
    model, covariance = ready(seed)
    with pytest.raises(ConfigError, match=words):
        tuned(model, covariance, **options)


def test_a_tokenizer_that_does_not_fit_is_found_before_the_search(seed):
    model, covariance = ready(seed)
    with pytest.raises(EditError):
        tuned(model, covariance, [EDITS[0], replace(EDITS[1], id="e0")])
