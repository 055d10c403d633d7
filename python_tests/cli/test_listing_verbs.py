"""`d4s models` and `d4s methods`: every model type, every method, its fields and presets."""

from __future__ import annotations

import dataclasses
import json

import pytest
from support.command import done, failed

from d4s.locate.targets import TargetConfig
from d4s.methods import METHODS
from d4s.models.architectures import ARCHITECTURES

UNDOES = {"d4s", "memit-seq", "alphaedit", "encore", "nas", "sphere"}  # as docs/guide/journals.md has it


def test_models_lists_every_type(capsys):
    text = done(capsys, "models")
    for name, row in ARCHITECTURES.items():
        (line,) = [line for line in text.splitlines() if line.split()[0] == name]
        assert line.split()[1:] == [row.blocks, row.mlp_output]
    listed = json.loads(done(capsys, "models", "--json"))
    assert set(listed) == set(ARCHITECTURES) and listed["gpt2"]["mlp_output"] == "mlp.c_proj"


def test_methods_lists_every_method_in_a_line(capsys):
    head, *lines = done(capsys, "methods").splitlines()
    columns = [head.index(word) for word in ("method", "paper", "changes", "needs", "undone")]
    for line, (name, method) in zip(lines, METHODS.items(), strict=False):
        cells = [line[a:b].strip() for a, b in zip(columns, [*columns[1:], None], strict=True)]
        assert cells == [
            name,
            method.paper,
            method.changes,
            ", ".join(method.needs) or "nothing",
            "one by one" if name in UNDOES else "all at once",
        ]
    assert all(len(line) <= 120 for line in lines)
    listed = json.loads(done(capsys, "methods", "--json"))
    assert set(listed) == set(METHODS)
    for model, layers, weight in (
        ("gpt2-xl", [13, 14, 15, 16, 17], 20_000),
        ("gpt-j-6b", [3, 4, 5, 6, 7, 8], 15_000),
        ("llama-3-8b", [4, 5, 6, 7, 8], 15_000),
    ):
        preset = listed["d4s"]["presets"][model]
        assert preset["layers"] == layers and preset["prior_weight"] == weight
        assert listed["d4s"]["needs"] == ["covariance"]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_shown_with_its_fields_and_presets(name, capsys):
    about, preset = (part.splitlines() for part in done(capsys, "methods", name).split("\n\n")[1:])
    method = METHODS[name]
    own = {f.name for f in dataclasses.fields(method)}
    if "target" in own:
        own = own - {"target"} | {f.name for f in dataclasses.fields(TargetConfig)}
    meaning = about[0].index("meaning")
    assert {line.split()[0] for line in about[1:]} == own
    assert all(line[meaning:] for line in about[1:]), "every field has a meaning"
    models = [model.rstrip("*") for model in preset[0].split()[1:]]
    assert models == ["gpt2-xl", "gpt-j-6b", "llama-2-7b", "llama-3-8b"]
    columns = [preset[0].index(model) for model in models]
    listed = json.loads(done(capsys, "methods", name, "--json"))
    assert set(listed) == {name}
    rows = {line.split()[0]: line for line in preset[1:] if line.split()[0] in own}
    assert set(rows) == own
    for model, begin, end in zip(models, columns, [*columns[1:], None], strict=True):
        fields = listed[name]["presets"][model]
        for field, value in (fields | fields.get("target", {})).items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                assert float(rows[field][begin:end]) == pytest.approx(value)


def test_layers_and_modules_are_shown_in_short(capsys):
    text = done(capsys, "methods", "ultraedit")
    assert "18–26" in text and "11–15, 18–24" in text and "mlp.gate_proj ×5, mlp.up_proj ×7" in text
    assert "gpt2-xl*" in text and "llama-3-8b*" not in text and "* not published" in text


def test_a_named_preset_is_shown_as_a_method_with_it(capsys):
    lines = done(capsys, "methods", "d4s:fresh").splitlines()
    assert [line.split()[1:] for line in lines if line.startswith("anchor ")][-1] == ["current"] * 4
    told = json.loads(done(capsys, "methods", "d4s:fresh", "--json"))["d4s:fresh"]["presets"]
    assert {one["anchor"] for one in told.values()} == {"current"}
    assert "rome has no named presets" in failed(capsys, "methods", "rome:fresh")


def test_a_method_that_does_not_exist_is_not_shown(capsys):
    line = failed(capsys, "methods", "alphaedti")
    assert line.startswith("d4s: unknown method 'alphaedti'. Did you mean 'alphaedit'? Known: alphaedit, d4s")
