"""Undoing, redoing, revising and consolidating: whole or not at all, wherever the disk gives way."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.faults import counted, forked, killed, no_space, nothing_half, was_killed
from support.sequences import EDITS, ready, same, sequence, state
from support.tiny import TEXTS, tiny_tokenizer

from d4s.errors import D4SError
from d4s.journal.folder import Folder
from d4s.journal.journal import Journal
from d4s.locate.covariance import estimate_covariance

ONE = {"layers": [1], "steps": 4, "learning_rate": 1.0, "clamp": 8.0, "weight_decay": 0.0, "contexts": 0} | {
    "prior_weight": 1e-2,
    "ridge": 0.1,
    "residual": "once",
}
CHANGES = ("undo", "redo", "revise", "consolidate")


class Case:
    """A journal of three edits, one of them undone, made anew for each try; and its model, unedited."""

    def __init__(self, folder: Path, seed: int, model_type: str) -> None:
        self.folder = folder
        self.model, self.covariance = ready(seed, model_type)
        self.unedited = state(self.model)
        sequence(
            *(self.model, self.covariance, EDITS[:3]),
            config=ONE,
            journal=folder / "first",
            original=False,
        ).restore()
        Journal(folder / "first").undo("e0")

    def fresh(self, name: str) -> Path:
        return Path(shutil.copytree(self.folder / "first", self.folder / name))

    def change(self, path: Path, how: str) -> None:
        journal = Journal(path)
        given = {"model": self.model, "tokenizer": tiny_tokenizer(), "covariance": self.covariance}
        if how == "undo":
            journal.undo("e1")
        elif how == "redo":
            journal.redo("e0")
        elif how == "revise":
            journal.revise("e1", "Paris", **given)
        else:
            journal.consolidate(**given)

    def changed(self, how: str) -> tuple[Any, Any, list[str]]:
        """(what the journal tells before, after the change, every write of it)"""
        before, path = self.told(self.folder / "first"), self.fresh("counted")
        with counted().watched() as points:
            self.change(path, how)
        after = self.told(path)
        self.unedit()
        assert not alike(before, after)
        return before, after, points.kinds

    def told(self, path: Path) -> tuple[list[str], dict[str, torch.Tensor]]:
        journal = Journal(path)
        return [f"{edit.id} {edit.target_new}" for edit in journal.edits], journal.weights()

    def unedit(self) -> None:
        self.model.load_state_dict(self.unedited)


def alike(one, other) -> bool:
    return one[0] == other[0] and same(one[1], other[1])


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("model_type", ["gpt2", "mixtral"])
def test_a_change_that_fails_is_not_made_and_one_that_is_made_does_not_fail(model_type, how, seed, tmp_path):
    case = Case(tmp_path, seed, model_type)
    before, after, kinds = case.changed(how)
    for number, kind in enumerate(kinds, start=1):
        path = case.fresh(f"{number}")
        try:
            with no_space(number).watched():
                case.change(path, how)
            right, failed = after, False
        except (D4SError, OSError):
            right, failed = before, True
            assert same(state(case.model), case.unedited), f"{kind} {number}"
        assert alike(case.told(path), right), f"{kind} {number}, failed: {failed}"
        case.unedit()
        if failed:
            case.change(path, how)
            assert alike(case.told(path), after), f"{kind} {number}, again"
            case.unedit()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("model_type", ["gpt2", "mixtral"])
def test_a_process_that_is_killed_leaves_the_journal_before_or_after(model_type, how, seed, tmp_path):
    """Of experts the snapshot alone has a revised edit's rows: it came behind the line that names them."""
    case = Case(tmp_path, seed, model_type)
    before, after, kinds = case.changed(how)
    for number in range(1 + seed % 2, len(kinds) + 1, 2):
        path = case.fresh(f"{number}")

        def work(path: Path = path, number: int = number) -> None:
            with killed(number, ("before", "half", "after")[number % 3]).watched():
                case.change(path, how)

        assert was_killed(forked(work))
        nothing_half(path)
        told = case.told(path)
        assert alike(told, before) or alike(told, after), kinds[number - 1]
        if alike(told, before):
            case.change(path, how)
            assert alike(case.told(path), after)
            case.unedit()


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral"])
def test_with_every_edit_undone_the_weights_are_the_unedited_ones_bit_for_bit(model_type, seed, tmp_path):
    """Also where W0 holds −0, as pruned models do: −0 + 0 is 0, and the model was then no more the unedited one."""
    model, _ = ready(seed, model_type)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.view(-1)[:4] = -0.0
    covariance = estimate_covariance(model, tiny_tokenizer(), TEXTS * 6, dtype=torch.float64, progress=False)
    before = {name: weight.clone() for name, weight in state(model).items()}
    sequence(model, covariance, EDITS[:2], config=ONE, journal=tmp_path / "j", original=False).restore()
    journal = Journal(tmp_path / "j")
    journal.undo(["e0", "e1"])
    journal.write_to(model)
    journal.write_to(model)  # it is still the unedited one
    for name, weight in state(model).items():
        assert torch.equal(weight.view(torch.int32), before[name].view(torch.int32)), name
    assert Journal(tmp_path / "j").verify().sound


def test_a_log_of_an_earlier_version_has_the_snapshot_in_a_line_of_its_own(seed, tmp_path, monkeypatch):
    case = Case(tmp_path, seed, "gpt2")

    def as_before(self, kind, state, **fields):
        self.append(kind, **fields)
        self.add_snapshot(state)

    for how in CHANGES[:3]:
        path = case.fresh(how)
        with monkeypatch.context() as patch:
            patch.setattr(Folder, "append_with_snapshot", as_before)
            case.change(path, how)
        case.unedit()
        old = case.told(path)
        kinds = [event["kind"] for event in Folder.open(path).events[-2:] if "snapshot" not in event]
        assert len(kinds) == 2 and kinds[1] == "snapshot"
        path = case.fresh(f"{how} now")
        case.change(path, how)
        case.unedit()
        assert alike(case.told(path), old)
        assert Folder.open(path).events[-1]["snapshot"]
