"""A sequence in a journal: it goes on where it was, whatever ended it, with the same weights and the same history."""

from __future__ import annotations

import json
import re
import shutil
import signal
from contextlib import suppress

import pytest
import torch
from support.sequences import EDITS, FAST, broken_off, ready, same, sequence, state, without_times

import d4s
from d4s import progress
from d4s.errors import ConfigError, EditingFailed, EditingStopped
from d4s.sequence import journaling

SHORT = dict(layers=[0], steps=2, learning_rate=1.0, contexts=0)
METHODS = {
    "d4s": FAST,
    "d4s, the paper's rule": FAST | {"method": "d4s", "residual": "once"},
    "d4s, contexts": FAST | {"method": "d4s", "contexts": 1},
    "memit": FAST,
    "memit-seq": FAST,
    "alphaedit": {k: v for k, v in FAST.items() if k not in ("prior_weight", "ridge")}
    | dict(null_space_threshold=1.0, threshold_is_relative=True),
    "nas": {k: v for k, v in FAST.items() if k not in ("prior_weight", "ridge")}
    | dict(null_space_threshold=1.0, threshold_is_relative=True),
    "d4s, on a norm, projected": FAST
    | {"method": "d4s", "target_norm": "anchor", "delta_projection": [0.5, 0.5]},
    "lyaplock": FAST | dict(allowed_damage=0.5),
    "rome": dict(layers=[1], steps=3, contexts=0, ridge=0.1),
    "ft-m": dict(layers=[0], steps=2),
    "ft-bf": dict(layers=[0], steps=2),
    "grace": dict(layers=[1], steps=3),
    "kn": dict(steps=2),
    "ultraedit": dict(layers=[0]),
}


def options(name, **more):
    fields = dict(METHODS[name])
    return {
        "method": fields.pop("method", name),
        "config": fields,
        "evaluate_every": 3,
        "generate": False,
    } | more


def told(result):
    """All that a sequence says, but for its clocks."""
    return (
        without_times(result.history),
        [[row.get(k) for k in ("id", "step", "written_probability")] for row in result.edits_table],
        [evaluation.to_dict() for evaluation in result.evaluations],
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_sequence_that_was_broken_off_goes_on_with_the_same_bits(name, monkeypatch, tmp_path, seed):
    """With small windows, segments and snapshots, so that each of them ends within the sequence."""
    monkeypatch.setattr("d4s.methods.locate_then_edit.EDITS_AHEAD", 4)
    monkeypatch.setattr(journaling, "SEGMENT_EVERY", 2)
    monkeypatch.setattr(journaling, "SNAPSHOT_EVERY", 3)
    model, covariance = ready(seed)
    unedited = state(model)
    whole = sequence(model, covariance, **options(name))
    right, said = state(model), told(whole)
    whole.restore()
    assert same(state(model), unedited)
    for call in (1, 2, 4, 7):
        path = tmp_path / str(call)
        with monkeypatch.context() as patch:
            broken_off(patch, call)
            with pytest.raises(EditingFailed, match="broken off") as caught:
                sequence(model, covariance, **options(name, journal=path))
        caught.value.result.restore()
        assert same(state(model), unedited)
        again = sequence(model, covariance, **options(name, journal=path))
        assert same(state(model), right), call
        assert told(again) == said and again.failure is None
        assert [row["id"] for row in again.edits_table] == [edit.id for edit in EDITS]
        again.restore()
        # And once more, when all is done: nothing is edited.
        with monkeypatch.context() as patch:
            patch.setattr("d4s.sequence.under_way.evaluate", lambda *_a, **_k: pytest.fail("asked again"))
            done = sequence(model, covariance, **options(name, journal=path))
        assert same(state(model), right) and told(done) == said
        done.restore()


@pytest.mark.skipif(not hasattr(signal, "SIGTERM"), reason="no SIGTERM here")
def test_a_scheduler_that_ends_the_program_finds_the_journal_closed(tmp_path, seed):
    """SIGTERM in the middle of a step, in a program of one's own: the vectors of all steps are in their segment."""

    class Ends(d4s.Observer):
        def step(self, result, batch):
            if len(result.edits_table) == 4:
                signal.raise_signal(signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    model, covariance = ready(seed)
    with pytest.raises(EditingStopped, match="after edit 4: ended by SIGTERM"):
        sequence(model, covariance, journal=tmp_path / "j", observers=[Ends()], **options("d4s"))
    assert signal.getsignal(signal.SIGTERM) is handler
    assert list((tmp_path / "j" / "segments").glob("*.safetensors"))


def test_a_journal_changes_no_bit_of_what_is_done(tmp_path, seed):
    model, covariance = ready(seed)
    plain = sequence(model, covariance, batch_size=2)
    right, said = state(model), told(plain)
    plain.restore()
    kept = sequence(model, covariance, batch_size=2, journal=tmp_path / "j")
    assert same(state(model), right) and told(kept) == said


@pytest.mark.parametrize("lost", ["segments", "snapshots", "targets", "all three"])
def test_what_is_lost_or_damaged_is_made_again(lost, monkeypatch, tmp_path, seed):
    monkeypatch.setattr(journaling, "SEGMENT_EVERY", 2)
    monkeypatch.setattr(journaling, "SNAPSHOT_EVERY", 3)
    model, covariance = ready(seed)
    whole = sequence(model, covariance)
    right = state(model)
    whole.restore()
    for damage in ("removed", "torn", "a bit"):
        path = tmp_path / damage
        with monkeypatch.context() as patch:
            broken_off(patch, 6)
            with pytest.raises(EditingFailed) as caught:
                sequence(model, covariance, journal=path)
        caught.value.result.restore()
        for folder in ("segments", "snapshots", "targets") if lost == "all three" else (lost,):
            for file in (path / folder).iterdir():
                data = bytearray(file.read_bytes())
                if damage == "removed":
                    file.unlink()
                elif damage == "torn":
                    file.write_bytes(data[: len(data) // 2])
                else:
                    data[-9] ^= 4
                    file.write_bytes(data)
        again = sequence(model, covariance, journal=path)
        assert same(state(model), right), damage
        again.restore()


def test_another_sequence_is_refused_with_what_differs(tmp_path, seed):
    model, covariance = ready(seed)
    before = state(model)
    sequence(model, covariance, EDITS[:3], journal=tmp_path / "j").restore()
    other, its = ready(seed + 1)
    for named, call in {
        "edits": lambda: sequence(model, covariance, EDITS[1:4], journal=tmp_path / "j"),
        "edits ": lambda: sequence(model, covariance, EDITS[2::-1], journal=tmp_path / "j"),
        "config": lambda: sequence(
            model, covariance, EDITS[:3], config=FAST | {"prior_weight": 2.0}, journal=tmp_path / "j"
        ),
        "method": lambda: sequence(model, covariance, EDITS[:3], method="memit", journal=tmp_path / "j"),
        "schedule": lambda: sequence(model, covariance, EDITS[:3], batch_size=2, journal=tmp_path / "j"),
        "model": lambda: sequence(other, its, EDITS[:3], journal=tmp_path / "j"),
        "dtype": lambda: sequence(*ready(seed, dtype=torch.bfloat16), EDITS[:3], journal=tmp_path / "j"),
    }.items():
        with pytest.raises((ConfigError, d4s.DataError), match=named.strip()):
            call()
        assert same(state(model), before), named
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ConfigError, match="already holds something else"):
        sequence(model, covariance, journal=tmp_path / "other")
    shutil.rmtree(tmp_path / "j")
    sequence(model, covariance, EDITS[1:4], journal=tmp_path / "j")


def test_one_process_writes_and_a_lock_ends_with_its_owner(tmp_path, seed):
    model, covariance = ready(seed)

    class Second(d4s.Observer):
        def step(self, result, batch):
            with pytest.raises(ConfigError, match="another process is writing"):
                journaling.Journaling(tmp_path / "j")

    sequence(model, covariance, EDITS[:2], journal=tmp_path / "j", observers=[Second()]).restore()
    sequence(model, covariance, EDITS[:2], journal=tmp_path / "j")


def test_a_journal_tells_of_its_sequence_while_it_is_made_and_afterwards(monkeypatch, tmp_path, seed):
    model, covariance = ready(seed)
    path, seen = tmp_path / "journal", []

    class Looks(d4s.Observer):
        def tested(self, result, batch, figures):
            seen.append(journaling.record_of(path))

    broken_off(monkeypatch, 5)
    with pytest.raises(EditingFailed):
        sequence(model, covariance, **options("d4s", journal=path, observers=[Looks()]))
    assert [one.failure for one in seen] == [f"unfinished, {n} of 7 edits made" for n in (1, 2, 3, 4)]
    assert [one.history[-1]["step"] for one in seen] == [0, 0, 0, 3]
    stopped = journaling.record_of(path)
    assert stopped.failure == "after edit 4: broken off" and len(stopped.edits_table) == 4
    model, _ = ready(seed)
    whole = sequence(model, covariance, **options("d4s", journal=path))
    found = journaling.record_of(path)
    assert told(found) == told(whole) and found.failure is None
    assert (found.method, found.config) == ("d4s", json.loads(json.dumps(whole.record().config)))


def test_a_bar_goes_on_where_the_sequence_was_broken_off(monkeypatch, tmp_path, capsys, seed):
    monkeypatch.setattr(progress, "_SECONDS", 0)
    broken_off(monkeypatch, 4)
    for first, last in (("0/7", "3/7"), ("3/7", "7/7")):
        model, covariance = ready(seed)
        with suppress(EditingFailed):
            sequence(model, covariance, **options("d4s", journal=tmp_path / "journal", progress=True))
        counts = re.findall(r"^d4s: .* (\d/7) ", capsys.readouterr().err, re.MULTILINE)
        assert (counts[0], counts[-1]) == (first, last)
