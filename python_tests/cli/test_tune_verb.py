"""`d4s tune`, and what takes its file: settings by --preset, along a --front."""

from __future__ import annotations

import json
from dataclasses import fields
from urllib.parse import unquote

import pandas
import pytest
from support.command import FAST, RECORDS, done, failed

from d4s.cli.compare import _grid
from d4s.errors import ConfigError
from d4s.methods import METHODS, Preset, method_for
from d4s.methods.preset import load_preset, model_facts
from d4s.models.architectures import Anatomy
from d4s.models.loading import load_model

GIVEN = ("--covariance", "c.safetensors")
WHOLE = [one | {"neighborhood": ["Edwin was born in", "Manila is"]} for one in RECORDS]


@pytest.fixture
def whole(tmp_path) -> str:
    """A file of edits that all bring neighbours."""
    (tmp_path / "whole.json").write_text(json.dumps(WHOLE))
    return str(tmp_path / "whole.json")


@pytest.fixture
def preset(tmp_path) -> str:
    """A preset of the model 'm', whose only probe is the first of the edits."""
    model, _ = load_model("m")
    text = RECORDS[0]["prompt"].replace("{}", RECORDS[0]["subject"])
    fields = {"layers": [0, 1], "steps": 3, "contexts": 0, "prior_weight": 0.01, "ridge": 0.1}
    path = str(tmp_path / "given.json")
    Preset(method="d4s", fields=fields, model=model_facts(Anatomy(model)), probes=(("p", text),)).save(path)
    return path


def test_tune_writes_a_preset_its_figure_and_says_what_it_chose(whole, tmp_path, capsys):
    out = tmp_path / "deep" / "p.json"
    options = ("--probes", "2", "--minutes", "0.5", *GIVEN, *FAST)
    text = done(capsys, "tune", "m", whole, "--out", str(out), *options)
    found = load_preset(out)
    model, _ = load_model("m")
    method_for("d4s", Anatomy(model), found)
    assert f"chosen: {found.measured['chosen']}; " in text and "probes are few" in text and str(out) in text
    assert len(found.probes) >= 2 and {"layers", "clamp", "contexts"} <= found.fields.keys()
    assert set(pandas.read_csv(out.with_suffix(".csv"))["panel"]) == {"NLL", "greedy"}
    assert out.with_suffix(".png").exists()


def test_what_goes_by_the_number_of_edits_is_left_to_the_edits(whole, tmp_path, capsys):
    out = tmp_path / "p.json"
    options = ("--preset", "hold", "--probes", "2", "--minutes", "0.2", *GIVEN, *FAST)
    done(capsys, "tune", "m", whole, "--out", str(out), *options)
    fields = load_preset(out).fields
    assert fields["prompt_weight"] is None and fields["context_keys"] == "each"


def test_an_edit_takes_a_preset_and_names_its_probes(preset, tmp_path, capsys):
    run = tmp_path / "run"
    text = done(
        capsys, "edit", "m", "edits.json", "--preset", preset, "--out", str(run), *GIVEN, "--set", "steps=2"
    )
    assert "note: 1 of these edits are probes of" in text
    stored = json.loads((run / "result.json").read_text())
    assert stored["method"] == "d4s" and stored["config"]["layers"] == [0, 1]
    assert (
        stored["config"]["prior_weight"] == 0.01 and stored["config"]["target"]["steps"] == 2
    )  # --set goes before
    assert stored["notes"] and len(stored["edits_table"]) == 3  # the edits were asked for, so they are made


def test_a_comparison_along_a_front_leaves_the_probes_out(preset, whole, tmp_path, capsys):
    out = tmp_path / "front"
    arguments = ("compare", "m", whole, "--methods", "d4s", "--out", str(out), *GIVEN)
    text = done(capsys, *arguments, "--preset", preset, "--front", "0.01,1")
    assert "1 edits are left out, the probes of" in text and "on the front" in text
    data = pandas.read_csv(out / "front-points.csv")
    assert list(data["label"]) == ["d4s λ 0.01", "d4s λ 1"] and (out / "front.png").exists()
    records = [json.loads(path.read_text()) for path in (out / "results").iterdir()]
    assert {len(record["edits_table"]) for record in records} == {2}


def test_targets_are_those_of_the_preset(preset, tmp_path, capsys):
    out = tmp_path / "t.safetensors"
    done(capsys, "targets", "m", "edits.json", "--preset", preset, "--out", str(out))
    text = done(
        capsys,
        "edit",
        "m",
        "edits.json",
        "--preset",
        preset,
        "--targets",
        str(out),
        "--out",
        str(tmp_path / "r"),
        *GIVEN,
    )
    assert "edited model" in text


def test_the_papers_own_settings_have_a_name(tmp_path, capsys):
    options = ("--preset", "paper", "--limit", "1", "--out", str(tmp_path / "run"), *GIVEN, *FAST)
    done(capsys, "edit", "m", "edits.json", *options)
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    assert stored["config"]["residual"] == "once" and stored["config"]["anchor"] == "base"
    assert METHODS["d4s"].presets["paper"] == {"residual": "once", "anchor": "base"}
    assert "named presets: paper (" in done(capsys, "methods", "d4s")


def test_a_methods_name_may_bring_its_preset(preset, tmp_path, capsys):
    """In Python and in every verb that takes a method; what --set says goes before it."""
    out = tmp_path / "run"
    options = ("--method", "d4s:fresh", "--set", "residual=once", "--limit", "1", "--out", str(out))
    done(capsys, "edit", "m", "edits.json", *options, *GIVEN, *FAST)
    told = json.loads((out / "result.json").read_text())["config"]
    assert (told["anchor"], told["context_keys"], told["prompt_weight"]) == ("current", "each", None)
    assert told["residual"] == "once"

    anatomy = Anatomy(load_model("m")[0])
    named = method_for("d4s:fresh", anatomy, {"residual": "once"})
    assert named == method_for("d4s", anatomy, METHODS["d4s"].presets["fresh"] | {"residual": "once"})
    for whole in (named, load_preset(preset)):
        with pytest.raises(ConfigError, match="names a preset, and config is another"):
            method_for("d4s:fresh", anatomy, whole)


def test_named_presets_are_compared_side_by_side(tmp_path, capsys):
    out = tmp_path / "c"
    options = ("--methods", "d4s:paper,d4s:hold,d4s", "--preset", "long", "--out", str(out), *GIVEN)
    text = done(capsys, "compare", "m", "edits.json", "--limit", "1", *options)
    stored = {path.stem: json.loads(path.read_text())["config"] for path in (out / "results").iterdir()}
    by_label = {unquote(name).rpartition("-")[0]: config for name, config in stored.items()}
    told = ("anchor", "residual", "context_keys", "prompt_weight")
    assert {label: tuple(config[field] for field in told) for label, config in by_label.items()} == {
        "d4s:paper": ("base", "once", "mean", 0.0),
        "d4s:hold": ("base", "measured", "each", None),
        "d4s:long": ("base", "measured", "each", 0.0),
    }
    assert all(label in text for label in by_label)


def test_fields_of_methods_that_are_compared_go_to_those_that_have_them(preset, tmp_path, capsys):
    from d4s.cli.compare import _with_fields

    loaded = load_preset(preset)
    given = {"steps": 3, "d4s:hold.prior_weight": 7, "l2": 2.0, "d4s.ridge": 0.5}
    configs = {"d4s": loaded, "d4s:hold": None, "alphaedit": None, "ft-m": {"steps": 9}, "kn": None}
    found = _with_fields(configs, given)
    assert found["d4s"].overrides == {"steps": 3, "ridge": 0.5}
    assert {label: one for label, one in found.items() if label != "d4s"} == {
        "d4s:hold": {"steps": 3, "prior_weight": 7},
        "alphaedit": {"steps": 3, "l2": 2.0},
        "ft-m": {"steps": 3},
        "kn": None if "steps" not in {f.name for f in fields(METHODS["kn"])} else {"steps": 3},
    }
    assert configs["d4s:hold"] is None, "what was given is left as it is"
    # A method's own field goes before one of all, in whatever order; METHOD stands for its only METHOD:PRESET.
    assert _with_fields(
        {"memit": None, "d4s:long": None}, {"memit.steps": 5, "steps": 30, "d4s.ridge": 1.0}
    ) == {
        "memit": {"steps": 5},
        "d4s:long": {"steps": 30, "ridge": 1.0},
    }
    out = tmp_path / "c"
    options = ("--methods", "ft-m,grace", "--set", "ft-m.steps=1", "--limit", "1", "--out", str(out))
    done(capsys, "compare", "m", "edits.json", *options)
    stored = {path.stem: json.loads(path.read_text())["config"] for path in (out / "results").iterdir()}
    assert stored["ft-m-0"]["steps"] == 1 != stored["grace-0"]["steps"]


def test_a_search_may_begin_from_a_preset(monkeypatch, tmp_path, capsys):
    from d4s.errors import ConfigError
    from d4s.study import tune

    seen = []

    def begun(*args, method, config, **options):
        seen.append((method, config))
        raise ConfigError("enough was seen")

    monkeypatch.setattr(tune, "tune", begun)
    out = ("--out", str(tmp_path / "p.json"))
    failed(capsys, "tune", "m", "edits.json", *out, "--preset", "fresh", "--set", "steps=4")
    failed(capsys, "tune", "m", "edits.json", *out, "--method", "memit")
    assert seen == [("d4s", METHODS["d4s"].presets["fresh"] | {"steps": 4}), ("memit", None)]


def test_what_settings_rest_on_is_said_before_a_long_run(tmp_path, capsys):
    from d4s.cli import main

    options = ("--limit", "1", "--out", str(tmp_path / "run"), *GIVEN, *FAST)
    assert main(["edit", "m", "edits.json", *options]) == 0
    said = capsys.readouterr().err
    assert "nothing is published or measured for a gpt2 of 3 blocks" in said
    assert "d4s tune m edits.json --out preset.json" in said


def test_that_a_model_was_edited_before_is_said(tmp_path, capsys):
    from d4s.cli import main

    options = ("--limit", "1", "--method", "ft-m", "--set", "steps=1")
    assert main(["edit", "m", "edits.json", "--out", str(tmp_path / "one"), *options]) == 0
    assert "edits already" not in capsys.readouterr().err
    edited = str(tmp_path / "one" / "model")
    assert main(["edit", edited, "edits.json", "--out", str(tmp_path / "two"), *options]) == 0
    assert f"{edited} holds 1 edits already (ft-m)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("edit", "--preset", "papre"), "Did you mean 'paper'"),
        (("compare", "--methods", "d4s,d4s:papre"), "Did you mean 'paper'"),
        (("compare", "--methods", "d4:paper"), "Did you mean 'd4s'"),
        (("compare", "--methods", "d4s:hold", "--preset", "long"), "names a preset of its own"),
        (("compare", "--methods", "d4s,memit", "--set", "memti.steps=3"), "Did you mean 'memit'"),
        (("compare", "--methods", "d4s,memit", "--set", "d4s.method=memit"), "unknown field of d4s 'method'"),
        (("compare", "--methods", "d4s,memit", "--set", "l2=3"), "none of d4s, memit has this field"),
        (("compare", "--methods", "memit,ft-m", "--set", "ft-m.l2=3"), "unknown field of ft-m 'l2'"),
        (("compare", "--methods", "d4s,d4s:long", "--preset", "long"), "one of them twice"),
        (("compare", "--methods", "memit:paper"), "memit has no named presets"),
        (
            ("edit", "--method", "memit", "--preset", "paper"),
            "memit has no named presets, so no 'paper' (d4s:paper",
        ),
        (("edit", "--method", "d4s:hodl"), "Did you mean 'hold'"),
        (("edit", "--method", "MEMIT"), "Did you mean 'memit'"),
        (("edit", "--method", "AlphaEdit"), "Did you mean 'alphaedit'"),
        (
            ("edit", "--method", "d4s:hold", "--preset", "long"),
            "method d4s:hold names one of its own; leave one of the two out",
        ),
        (("edit", "--method", "d4s:hold", "--preset", "GIVEN"), "is of d4s, and d4s:hold was asked for"),
        (("edit", "--preset", "none.json"), "none.json: there is no such file"),
        (("edit", "--preset", "edits.json"), "not what d4s tune wrote"),
        (
            ("compare", "--methods", "memit", "--preset", "GIVEN"),
            "is of d4s, and --methods names memit; add it",
        ),
        (("edit", "--method", "memit", "--preset", "GIVEN"), "is of d4s, and memit was asked for"),
        (("compare", "--front", "a,b"), "must be numbers with commas"),
        (("compare", "--front", "1", "memit=2"), "not both"),
        (("compare", "--front", "1", "--front", "memit=2"), "not both"),
        (("tune", "--probes", "9"), "1 different edits with neighbours, and 9 probes"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(arguments, words, preset, tmp_path, capsys):
    verb, *rest = (preset if text == "GIVEN" else text for text in arguments)
    out = str(tmp_path / ("out.json" if verb == "tune" else "out"))
    assert words in failed(capsys, verb, "m", "edits.json", "--out", out, *GIVEN, *rest)


def test_a_time_in_which_nothing_can_be_done_is_refused(whole, tmp_path, capsys):
    options = ("--minutes", "0.0001", "--out", str(tmp_path / "p.json"), *GIVEN)
    assert "give more minutes" in failed(capsys, "tune", "m", whole, *options)


def test_a_front_without_neighbours_says_that_there_is_none(tmp_path, capsys):
    (tmp_path / "bare.json").write_text(json.dumps(RECORDS[1:]))
    options = ("--methods", "d4s", "--front", "1", "--out", str(tmp_path / "f"), *GIVEN)
    assert "bring nothing that must not change" in done(
        capsys, "compare", "m", str(tmp_path / "bare.json"), *options
    )
    assert not (tmp_path / "f" / "front.png").exists()


def test_the_place_of_a_preset_is_a_json_file(tmp_path, capsys):
    assert "must be a .json file" in failed(
        capsys, "tune", "m", "edits.json", "--out", str(tmp_path / "p.txt")
    )


def test_a_grid_is_of_all_methods_or_of_each():
    assert _grid(None) is None and _grid([]) is None
    assert _grid(["30,300"]) == [30.0, 300.0]
    assert _grid(["ft-m=1e-4,1e-3", "d4s=30"]) == {"ft-m": [1e-4, 1e-3], "d4s": [30.0]}
    assert _grid(["d4s=30", "d4s=300"]) == {"d4s": [30.0, 300.0]}
    with pytest.raises(ConfigError, match="not both"):
        _grid(["30", "d4s=30"])
