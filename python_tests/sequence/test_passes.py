"""Later passes over a sequence: what is lost is made again, whatever comes between."""

from __future__ import annotations

import json

import pytest
import torch
from support.sequences import EDITS, FAST, broken_off, ready, same, sequence, state, without_times
from support.tiny import tiny_tokenizer

from d4s import save_edits
from d4s.cli import main
from d4s.edits import Edit
from d4s.edits.edit import made_again, pass_of
from d4s.errors import ConfigError, EditError, EditingFailed, EditingStopped
from d4s.journal.folder import Folder
from d4s.journal.journal import Journal
from d4s.locate.kept_targets import KeptTargets
from d4s.measure.metrics import evaluate
from d4s.sequence import under_way
from d4s.sequence.journaling import record_of
from d4s.sequence.observers import Bar
from d4s.sequence.record import Record
from d4s.sequence.schedule import Schedule
from d4s.study.model_view import ModelView

WEAK = FAST | {"clamp": 0.05}  # few of a random model's edits take


def lost_of(result, at):
    """By the point after `at` edits, written out independently."""
    row = [one["step"] for one in result.history].index(at)
    said = {one["id"]: one["efficacy_argmax"] for one in result.evaluations[row].rows}
    return [edit for edit in result.edits if said[edit.id] < 1]


@pytest.mark.parametrize("anchor", ["base", "current"])
def test_what_is_not_the_greedy_answer_is_made_again_as_if_it_stood_behind(anchor, seed):
    config = WEAK | {"anchor": anchor}
    targets = KeptTargets() if anchor == "base" else None
    found = sequence(*ready(seed), config=config, passes=2, evaluate_every=3, targets=targets)
    lost = lost_of(found, 7)
    assert [row["step"] for row in found.history][:4] == [0, 3, 6, 7]
    assert found.history[-1]["step"] == 7 + len(lost)
    ids = [row["id"] for row in found.edits_table]
    assert ids == [edit.id for edit in EDITS] + [f"{edit.id}~2" for edit in lost]
    assert [row.get("again") for row in found.edits_table[7:]] == [edit.id for edit in lost]
    assert [row["id"] for row in found.evaluations[-1].rows] == [edit.id for edit in EDITS]

    behind = [*EDITS, *(made_again(edit, 2) for edit in lost)]
    alone = sequence(*ready(seed), edits=behind, config=config, targets=targets)
    for layer, weight in found.editor.weights.current().items():
        change = (weight - found.editor.weights.base[layer]).norm()
        assert (weight - alone.editor.weights.current()[layer]).norm() < 1e-2 * change
    once = sequence(*ready(seed), config=config, evaluate_every=3, targets=targets)
    assert without_times(found.history)[:4] == without_times(once.history)
    assert found.history[-1]["original_efficacy"] == once.history[-1]["original_efficacy"]
    assert len(found.forgetting()) == len(found.history) - 1
    assert set(ModelView({"d4s": found.record()}, {}).bottleneck()["count"]) == {1}  # a fifth of seven
    assert set(found.not_arrived()) <= {edit.id for edit in EDITS}


def judged(model, tokenizer, edits, **options):
    """A random model says nothing: here all say the target but e1, and e2 and e5 go on behind it."""
    found = evaluate(model, tokenizer, edits, **options)
    for row in found.rows:
        row["efficacy_argmax"] = float(row["id"] != "e1")
        if options.get("generate"):
            row["efficacy_exact"] = float(row["id"] not in ("e1", "e2", "e5"))
    return found


@pytest.mark.parametrize("stop", [True, False])
def test_what_does_not_end_where_it_should_is_made_again(stop, monkeypatch, tmp_path, seed):
    monkeypatch.setattr(under_way, "evaluate", judged)
    options = dict(config=FAST | {"target_stop": stop}, journal=tmp_path / "j", original=False)
    once = sequence(*ready(seed), **options)
    once.restore()
    again = ["e1~2", "e2~2", "e5~2"] if stop else ["e1~2"]
    found = sequence(*ready(seed), **options, passes=2)  # goes on with what the point has noted
    assert [row["id"] for row in found.edits_table[len(EDITS) :]] == again
    ended = {row["id"]: row["ended"] for row in found.evaluations[1].rows if "ended" in row}
    assert ended == ({"e0": 1, "e2": 0, "e3": 1, "e4": 1, "e5": 0, "e6": 1} if stop else {})
    found.record().save(tmp_path / "r.json")
    assert Record.load(tmp_path / "r.json").evaluations[1].rows == found.evaluations[1].rows


def test_of_a_fact_that_has_changed_only_the_last_is_made_again(seed):
    changed = Edit(EDITS[0].prompt, EDITS[0].subject, "Islam", EDITS[0].target_true, id="changed")
    found = sequence(*ready(seed), edits=(*EDITS, changed), config=WEAK, passes=3)
    assert "e0~2" not in {row["id"] for row in found.edits_table}
    second = [row for row in found.edits_table if row["id"].endswith("~2")]
    third = [row for row in found.edits_table if row["id"].endswith("~3")]
    assert [row["step"] for row in second] == list(range(9, 9 + len(second)))
    assert [row["step"] for row in third] == list(range(9 + len(second), 9 + len(second) + len(third)))
    assert [row["again"] for row in third] == [
        edit.id for edit in lost_of(found, 8 + len(second)) if edit.id != "e0"
    ]


@pytest.mark.parametrize("method", ["d4s", "memit"])
@pytest.mark.parametrize("place", [3, 8])
def test_a_pass_goes_on_where_it_was_broken_off(method, place, monkeypatch, tmp_path, seed):
    options = dict(method=method, config=WEAK, passes=2, evaluate_every=3)
    whole = sequence(*ready(seed), **options, journal=tmp_path / "whole")
    assert len(whole.edits_table) > 8
    with monkeypatch.context() as patch:
        broken_off(patch, place + 1, KeyboardInterrupt)
        with pytest.raises(EditingStopped):
            sequence(*ready(seed), **options, journal=tmp_path / "broken")
    assert len(record_of(tmp_path / "broken").edits_table) == place
    again = sequence(*ready(seed), **options, journal=tmp_path / "broken")
    assert same(state(again.model), state(whole.model))
    assert again.edits_table == whole.edits_table
    assert without_times(again.history) == without_times(whole.history)
    stored = record_of(tmp_path / "broken")
    assert stored.edits_table == whole.edits_table and stored.failure is None
    whole.record().save(tmp_path / "result.json")
    assert Record.load(tmp_path / "result.json").edits_table == whole.edits_table


@pytest.mark.parametrize("method", ["d4s", "memit"])
def test_a_sequence_that_has_ended_goes_on_with_more_passes(method, tmp_path, seed):
    options = dict(method=method, config=WEAK, evaluate_every=3)
    whole = sequence(*ready(seed), **options, passes=2, journal=tmp_path / "whole")
    sequence(*ready(seed), **options, journal=tmp_path / "more")
    assert Folder.open(tmp_path / "more").is_complete() and not Folder.open(tmp_path / "more").is_complete(2)
    found = sequence(*ready(seed), **options, passes=2, journal=tmp_path / "more")
    assert Folder.open(tmp_path / "more").is_complete(2) and len(found.edits_table) > 7
    assert same(state(found.model), state(whole.model))
    assert found.edits_table == whole.edits_table
    assert without_times(found.history) == without_times(whole.history)
    with pytest.raises(ConfigError, match="has come to pass 2, and passes=1 is asked for"):
        sequence(*ready(seed), **options, journal=tmp_path / "more")
    model, covariance = ready(seed)
    journal = Journal(tmp_path / "more")
    assert journal.verify(model=model, tokenizer=tiny_tokenizer(), covariance=covariance).sound


class Heard(Bar):
    """What of it is told, and how many edits the bar says there are at each step."""

    def __init__(self):
        super().__init__(shown=False)
        self.passes, self.totals = [], []

    def again(self, result, edits):
        super().again(result, edits)
        self.passes.append([edit.id for edit in edits])

    def step(self, result, batch):
        super().step(result, batch)
        self.totals.append(self.bar.total)


def test_who_watches_is_told_of_a_later_pass_before_its_first_step(tmp_path, seed, monkeypatch):
    options = dict(config=WEAK, journal=tmp_path / "journal")
    sequence(*ready(seed), **options)
    with monkeypatch.context() as patch:
        broken_off(patch, 2)
        first = Heard()
        with pytest.raises(EditingFailed, match="after edit 8: broken off"):
            sequence(*ready(seed), **options, passes=2, observers=[first])
    second = Heard()
    found = sequence(*ready(seed), **options, passes=2, observers=[second])
    ids = [row["id"] for row in found.edits_table[7:]]
    assert len(ids) > 1 and first.passes == second.passes == [ids]
    made = 7 + len(ids)
    assert first.totals == [made] and second.totals == [made] * (len(ids) - 1)


def test_what_an_earlier_sequence_made_again_may_be_edits_of_a_first_pass(tmp_path, seed):
    edits = [*EDITS, *(made_again(edit, 2) for edit in EDITS[:2])]
    options = dict(edits=edits, config=WEAK, journal=tmp_path / "journal")
    assert [pass_of(edit) for edit in edits[6:]] == [1, 2, 2]
    once, twice = (sequence(*ready(seed), **options) for _ in range(2))
    assert once.edits_table == twice.edits_table and len(twice.edits_table) == 9


def test_a_journal_takes_back_an_edit_with_what_made_it_again(tmp_path, seed):
    model, covariance = ready(seed)
    before = state(model)
    found = sequence(model, covariance, config=WEAK, passes=2, journal=tmp_path / "journal")
    again = [row["again"] for row in found.edits_table[7:]]
    journal, written = Journal(tmp_path / "journal"), state(model)
    assert len(journal.edits) == 7 + len(again) and again
    fresh, _ = ready(seed)
    assert journal.verify(model=fresh, tokenizer=tiny_tokenizer(), covariance=covariance).sound

    first = again[0]
    with pytest.raises(EditError, match=f"{first}' was made again as '{first}~2'"):
        journal.revise(first, "Lyon")
    journal.undo(first)
    assert {edit.id for edit in journal.edits} == {row["id"] for row in found.edits_table} - {
        first,
        f"{first}~2",
    }
    assert not all(torch.equal(weight, written[name]) for name, weight in journal.weights().items())
    journal.redo(first)
    for name, weight in journal.weights().items():
        torch.testing.assert_close(weight, written[name], rtol=1e-4, atol=1e-5)
    journal.undo(f"{first}~2")
    assert first in {edit.id for edit in journal.edits}
    journal.undo([edit.id for edit in journal.edits if "~" not in edit.id])
    assert not journal.edits
    for name, weight in journal.weights().items():
        torch.testing.assert_close(weight, before[name], rtol=1e-4, atol=1e-5)


def test_passes_are_whole_numbers_and_leave_ids_free(seed):
    with pytest.raises(ConfigError, match="passes=0, must be a whole number from 1 on"):
        Schedule(passes=0)
    assert "passes" not in Schedule().told_apart() and Schedule(passes=2).told_apart()["passes"] == 2
    taken = (*EDITS, Edit("{} is", "Apple", "Paris", "Lyon", id="e1~2"))
    with pytest.raises(EditError, match="e1~2"):
        sequence(*ready(seed), edits=taken, passes=2)


def test_the_verbs_make_passes(monkeypatch, tmp_path, capsys, seed):
    monkeypatch.chdir(tmp_path)
    model, covariance = ready(seed)
    model.save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    covariance.save("covariance.safetensors")
    save_edits(EDITS, "edits.jsonl")
    told = [f"--set={name}={json.dumps(value)}" for name, value in WEAK.items()]
    common = ["model", "edits.jsonl", "--covariance", "covariance.safetensors", *told]
    assert main(["edit", *common, "--out", "run"]) == 0
    assert len(Record.load("run/result.json").edits_table) == 7
    assert main(["edit", *common, "--out", "run"]) != 0  # it has ended
    assert "pass 2: " not in capsys.readouterr().err
    assert main(["edit", *common, "--passes", "2", "--out", "run"]) == 0
    result = Record.load("run/result.json")
    assert result.history[-1]["step"] == len(result.edits_table) > 7
    assert len(Journal("run/journal").edits) == len(result.edits_table)
    assert "pass 2: " in capsys.readouterr().err
    assert main(["report", "run"]) == 0
