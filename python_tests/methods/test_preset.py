"""Presets: by file and by name, for one model, and never for figures of the edits that chose them."""

from __future__ import annotations

import json

import pytest
import torch
from support.sequences import EDITS, FAST, ready, sequence, without_times
from support.tiny import tiny_model, tiny_tokenizer

import d4s
from d4s.errors import ConfigError, DataError
from d4s.locate.targets import TargetConfig
from d4s.methods import METHODS, Preset, method_for
from d4s.methods.preset import by_name, is_place, load_preset, model_facts, without_probes
from d4s.models.architectures import Anatomy
from d4s.sequence.compare import compare
from d4s.sequence.record import Record

FIELDS = {"layers": [1], "prior_weight": 0.25, "clamp": 6.0, "contexts": 0, "anchor": "base", "steps": 3}


def preset_of(model, **changes) -> Preset:
    probes = tuple((edit.id, edit.text) for edit in EDITS[:2])
    facts = dict(method="d4s", fields=FIELDS, model=model_facts(Anatomy(model)), probes=probes)
    return Preset(
        **facts | {"measured": {"settings": [{"written": 0.5}]}, "versions": {"d4s": "1"}} | changes
    )


def test_a_file_holds_the_preset_and_a_sequence_takes_it(tmp_path, seed):
    model, covariance = ready(seed)
    preset = preset_of(model, path=str(tmp_path / "p.json"))
    preset.save(tmp_path / "p.json")
    assert d4s.load_preset(tmp_path / "p.json") == preset
    edits = EDITS[2:4]
    with_it = sequence(model, covariance, edits, config=preset)
    assert (
        with_it.config["layers"] == (1,) and with_it.config["target"]["clamp"] == 6.0 and with_it.notes == ()
    )
    with_it.restore()
    plain = sequence(model, covariance, edits, config=FIELDS)
    assert without_times(with_it.history) == without_times(plain.history)
    plain.restore()


def test_single_fields_go_before_those_of_a_preset(seed):
    model, _ = ready(seed)
    anatomy, preset = Anatomy(model), preset_of(model)
    found = method_for("d4s", anatomy, preset.changed({"clamp": 9.0}).changed({"ridge": 0.5}))
    assert (found.target.clamp, found.ridge, found.prior_weight) == (9.0, 0.5, 0.25)
    found = method_for("d4s", anatomy, preset.changed({"target": {"clamp": 9.0}}))
    assert (found.target.clamp, found.target.steps) == (9.0, 3)
    with pytest.raises(ConfigError, match="is a preset of d4s, not of memit"):
        method_for("memit", anatomy, preset)
    with pytest.raises(ConfigError, match=r"the preset: .*clamp is -1"):
        method_for("d4s", anatomy, preset_of(model, fields=FIELDS | {"clamp": -1.0}))
    with pytest.raises(ConfigError, match="clamp"):
        method_for("d4s", anatomy, preset_of(model, fields=FIELDS | {"clamb": 1.0}))


def test_another_model_is_refused_with_what_differs(seed):
    model, _ = ready(seed)
    preset = preset_of(model)
    for other, words in (
        (tiny_model("gpt2", seed + 1), r"another model \(fingerprint \w{12} there, \w{12} here\)"),
        (tiny_model("llama", seed), "type gpt2 there, llama here"),
        (tiny_model("gpt2", seed, n_layer=4), "blocks 3 there, 4 here"),
    ):
        with pytest.raises(ConfigError, match=words):
            method_for("d4s", Anatomy(other), preset)
    # Loaded in another type it is the same model.
    kept = preset_of(tiny_model("gpt2", seed, torch.bfloat16).float())
    method_for("d4s", Anatomy(tiny_model("gpt2", seed, torch.bfloat16)), kept)


def test_figures_of_probes_are_named_in_the_result(tmp_path, seed):
    model, covariance = ready(seed)
    result = sequence(model, covariance, EDITS[1:4], config=preset_of(model))
    (note,) = result.notes
    assert "1 of these edits are probes of the preset (e1)" in note and f"note: {note}" in result.summary()
    result.save(tmp_path / "r.json")
    assert Record.load(tmp_path / "r.json").notes == (note,) and result.record().notes == (note,)


def test_no_comparison_holds_an_edit_that_chose_a_preset(seed):
    model, covariance = ready(seed)
    found = compare(
        model,
        tiny_tokenizer(),
        EDITS[:4],
        {"tuned": preset_of(model), "own": {"method": "d4s", **FAST}},
        covariance=covariance,
        progress=False,
    )
    for label in ("tuned", "own"):
        assert [row["id"] for row in found.results[label][0].edits_table] == ["e2", "e3"]
    assert "2 edits are left out, the probes of the preset (e0, e1)" in found.summary()
    with pytest.raises(ConfigError, match="every edit is a probe of the preset"):
        compare(model, tiny_tokenizer(), EDITS[:2], {"d4s": preset_of(model)}, progress=False)


def test_a_probe_is_known_by_its_prompt_under_whatever_id(seed):
    model, _ = ready(seed)
    preset = preset_of(model)
    again = d4s.Edit(EDITS[0].prompt, EDITS[0].subject, "Lyon", id="other")
    same_id = d4s.Edit("{} costs", "Bread", "Lyon", id=EDITS[0].id)
    assert preset.probed([again, same_id, EDITS[5]]) == [again]
    left, notes = without_probes([again, same_id], [preset, preset])
    assert left == [same_id] and len(notes) == 1
    assert without_probes([], [preset]) == ([], ())


def test_named_presets_are_a_table_of_the_method(seed):
    anatomy = Anatomy(ready(seed)[0])
    paper = method_for("d4s", anatomy, by_name("d4s:paper")[1])
    assert (paper.residual, paper.anchor) == ("once", "base")
    for name, method in METHODS.items():
        for fields in method.presets.values():
            method_for(name, anatomy, fields)  # every field is one of the method's
    with pytest.raises(
        ConfigError, match=r"Did you mean 'paper'\? Known: answers, fresh, hold, long, paper\. Or name a file"
    ):
        by_name("d4s:papre")
    with pytest.raises(ConfigError, match="kn has no named presets"):
        by_name("kn:paper")
    with pytest.raises(ConfigError, match="unknown method"):
        by_name("d5s:paper")


def test_a_name_is_told_from_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "paper").mkdir()
    (tmp_path / "mine").write_text("{}")
    assert [is_place(text) for text in ("paper", "mine", "none", "none.json", "a/none")] == [
        *(False, True, False, True, True)
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "d5s"}, "Did you mean 'd4s'"),
        ({"method": 3}, "method must be text"),
        ({"fields": []}, "fields must be an object"),
        ({"model": {"type": "gpt2"}}, "model, fingerprint must be text"),
        ({"probes": [["a"]]}, r"probes\[0\] has 1 parts"),
        ({"probes": [["a", 3]]}, r"probes\[0\] must be text"),
        ({"versions": {"d4s": 2}}, "versions, 'd4s' must be text"),
        ({"format": "d4s-preset-9"}, "its format is 'd4s-preset-9'"),
        ({"more": 1}, "it has the field 'more'"),
    ],
)
def test_a_file_that_is_none_is_refused_by_file_and_field(tmp_path, change, words):
    path = tmp_path / "p.json"
    facts = {"type": "gpt2", "fingerprint": "ab", "blocks": 3, "width": 32, "vocabulary": 320}
    Preset(method="d4s", fields=FIELDS, model=facts, probes=(("a", "b"),)).save(path)
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (stored | change).items() if k != "digest"}))
    with pytest.raises(DataError, match=words) as error:
        load_preset(path)
    assert str(error.value).startswith(str(path))
    path.write_text(json.dumps(stored | {"method": "memit"}))
    with pytest.raises(DataError, match="has changed since d4s tune wrote it"):
        load_preset(path)


def test_a_field_is_read_by_the_name_that_changes_it(seed):
    method = method_for("d4s", Anatomy(ready(seed)[0]))
    assert method.value("clamp") == TargetConfig().clamp and method.value("layers") == method.layers
    assert method.value("target_of_no_method") is None
