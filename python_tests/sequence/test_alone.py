"""Each edit by itself: the figures of as many sequences of one edit, and nothing of it stays."""

from __future__ import annotations

import json

import pytest
from support.sequences import EDITS, FAST, broken_off, ready, same, sequence, state
from support.tiny import tiny_tokenizer

import d4s
from d4s import files
from d4s.errors import ConfigError, DataError, EditError
from d4s.locate.kept_targets import KeptTargets
from d4s.methods import Preset
from d4s.methods.base import Editor
from d4s.methods.preset import model_facts
from d4s.models.architectures import Anatomy
from d4s.sequence import alone

CONFIGS = {"d4s": FAST, "memit": FAST, "grace": {"layers": 1, "steps": 3}, "ft-m": {"steps": 2}}


def taken(model, covariance, edits=EDITS, **options):
    options = {"config": FAST, "progress": False} | options
    return d4s.edit_alone(model, tiny_tokenizer(), edits, covariance=covariance, **options)


def alike(rows, others):
    assert [row.keys() for row in rows] == [row.keys() for row in others]
    for row, other in zip(rows, others, strict=True):
        for name, value in row.items():
            right = other[name]
            assert value == (
                pytest.approx(right, rel=1e-4, abs=1e-5) if isinstance(right, (float, list)) else right
            )


@pytest.mark.parametrize("method", CONFIGS)
def test_it_is_a_sequence_of_one_edit_for_each(method, seed):
    model, covariance = ready(seed)
    before = state(model)
    config = CONFIGS[method]
    found = taken(model, covariance, method=method, config=config)
    assert same(state(model), before)
    rows = []
    for edit in EDITS:
        result = sequence(*ready(seed), edits=[edit], method=method, config=config)
        rows += result.evaluations[-1].rows
    alike(found.rows, rows)
    assert found["efficacy"] == pytest.approx(sum(row["efficacy"] for row in rows) / len(rows))
    assert found.metrics["average"].count == len(EDITS)


def test_what_the_first_edits_choose_is_told(seed):
    config = {name: value for name, value in FAST.items() if name != "prior_weight"}
    model, covariance = ready(seed)
    settled = sequence(*ready(seed), edits=EDITS, method="d4s", config=config).chosen["prior_weight"]
    notes = taken(model, covariance, config=config).notes
    assert any(f"prior_weight={settled:g}" in note for note in notes), notes
    assert not any("prior_weight" in note for note in taken(model, covariance).notes)


def test_a_batch_is_scored_together_and_taken_back_together(seed):
    model, covariance = ready(seed)
    before = state(model)
    found = taken(model, covariance, method="memit", batch_size=3)
    assert same(state(model), before)
    rows = []
    for at in (0, 3, 6):
        result = sequence(*ready(seed), edits=EDITS[at : at + 3], method="memit", batch_size=3)
        rows += result.evaluations[-1].rows
    alike(found.rows, rows)


def test_targets_of_the_unedited_model_are_taken(seed, monkeypatch):
    model, covariance = ready(seed)
    kept = KeptTargets()
    whole = taken(model, covariance, targets=kept)
    assert len(kept) == len(EDITS)
    alike(taken(model, covariance, targets=kept).rows, whole.rows)
    with pytest.raises(ConfigError, match="searches its targets on the weights as they are"):
        taken(model, covariance, method="memit", targets=kept)


def test_probes_of_a_preset_are_named(seed):
    model, covariance = ready(seed)
    first = EDITS[0]
    fields = {name: value for name, value in FAST.items() if name != "ridge"}
    preset = Preset(
        method="d4s", fields=fields, model=model_facts(Anatomy(model)), probes=((first.id, first.text),)
    )
    (note,) = taken(model, covariance, EDITS[:2], config=preset).notes
    assert "1 of these edits" in note and "probes" in note


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_breaks_off_leaves_the_weights_and_goes_on_where_it_was(error, seed, tmp_path, monkeypatch):
    out = tmp_path / "alone.json"
    whole = taken(*ready(seed), method="memit")
    model, covariance = ready(seed)
    before = state(model)
    with monkeypatch.context() as patch:
        broken_off(patch, 4, error)
        with pytest.raises(error, match="broken off"):
            taken(model, covariance, method="memit", out=out)
    assert same(state(model), before)
    assert len(json.loads(out.read_text())["evaluation"]["rows"]) == 3

    plain, made = Editor.edit, []
    monkeypatch.setattr(Editor, "edit", lambda self, batch: (made.extend(batch), plain(self, batch))[1])
    found = taken(model, covariance, method="memit", out=out)
    assert [edit.id for edit in made] == [edit.id for edit in EDITS[3:]]
    alike(found.rows, whole.rows)
    assert found.metrics.keys() == whole.metrics.keys()
    again = taken(model, covariance, method="memit", out=out)  # there is nothing left to do
    assert len(made) == 4 and again.rows == found.rows


def test_rows_are_written_while_it_runs(seed, tmp_path, monkeypatch):
    out, seen = tmp_path / "alone.json", []
    plain = Editor.edit

    def edit(self, batch):
        seen.append(len(json.loads(out.read_text())["evaluation"]["rows"]) if out.exists() else 0)
        return plain(self, batch)

    monkeypatch.setattr(alone, "EVERY", 0.0)
    monkeypatch.setattr(Editor, "edit", edit)
    taken(*ready(seed), out=out)
    assert seen == list(range(len(EDITS)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 7}, "another seed"),
        ({"batch_size": 2}, "another batch_size"),
        ({"edits": EDITS[:4]}, "another edits"),
        ({"config": FAST | {"prior_weight": 0.5}}, "another prior_weight"),
        ({"method": "memit"}, "another method"),
    ],
)
def test_a_file_of_something_else_is_refused_and_left(change, said, seed, tmp_path):
    out = tmp_path / "alone.json"
    model, covariance = ready(seed)
    taken(model, covariance, out=out)
    stored, before = out.read_bytes(), state(model)
    with pytest.raises(ConfigError, match=said):
        taken(model, covariance, out=out, **change)
    assert out.read_bytes() == stored and same(state(model), before)


def test_figures_of_an_earlier_version_are_gone_on_with(seed, tmp_path):
    """One that did not know a field which is at its default here."""
    out = tmp_path / "alone.json"
    model, covariance = ready(seed)
    first = taken(model, covariance, EDITS[:2], out=out)
    record = files.read_json(out, writer="d4s alone", format="d4s-alone-1", fields=("settings", "evaluation"))
    settings = dict(record["settings"])
    del settings["context_keys"], settings["target"]["search_precision"]
    everything = dict(record) | {"settings": settings}
    files.write_json({"format": "d4s-alone-1", **everything}, out)
    with pytest.raises(ConfigError, match="another edits"):
        taken(model, covariance, out=out)
    assert taken(model, covariance, EDITS[:2], out=out).rows == first.rows
    with pytest.raises(ConfigError, match="another context_keys"):
        taken(model, covariance, EDITS[:2], out=out, config=FAST | {"context_keys": "each"})


def test_figures_with_other_statistics_are_not_gone_on_with(seed, tmp_path):
    model, covariance = ready(seed)
    out = tmp_path / "alone.json"
    taken(model, covariance, EDITS[:2], out=out)
    with pytest.raises(ConfigError, match="another statistics"):
        taken(model, covariance.merge(covariance), EDITS[:2], out=out)


def test_a_foreign_file_and_wrong_arguments_are_refused_before_anything(seed, tmp_path):
    model, covariance = ready(seed)
    before = state(model)
    (tmp_path / "other.json").write_text('{"format": "mine"}')
    with pytest.raises(DataError, match="not what d4s alone wrote"):
        taken(model, covariance, out=tmp_path / "other.json")
    with pytest.raises(ConfigError, match="batch_size=0"):
        taken(model, covariance, batch_size=0)
    with pytest.raises(ConfigError, match="no edits"):
        taken(model, covariance, edits=[])
    with pytest.raises(EditError, match="'target_new' is empty"):
        taken(model, covariance, edits=[*EDITS, d4s.Edit("{} is", "Lyon", " ", id="empty")])
    assert same(state(model), before)
