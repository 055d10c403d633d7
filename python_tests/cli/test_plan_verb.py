"""`d4s plan`, and what `d4s edit` and `d4s compare` refuse by it."""

from __future__ import annotations

import json

import pytest
from support.command import FAST, done, failed

from d4s.errors import D4SError
from d4s.study import plan as planning


def test_plan_prints_bytes_passes_and_what_fits(capsys):
    text = done(capsys, "plan", "m", "--edits", "100", "--no-measure", *FAST)
    for word in (
        "copies of edited weights",
        "sums",
        "journal: keys and residuals",
        "targets",
        "evaluations",
        "disk",
    ):
        assert word in text
    assert "does not fit" not in text and "by rates measured here" not in text


def test_plan_as_json_adds_up(capsys):
    told = json.loads(done(capsys, "plan", "m", "--edits", "100", "--no-measure", "--json", *FAST))
    for place, total in told["bytes"].items():
        assert total == sum(part["bytes"] for part in told["parts"] if part["place"] == place) > 0
    assert told["fits"] is True and told["seconds"] is None and told["layers"] == [0, 1]
    without = json.loads(
        done(capsys, "plan", "m", "--edits", "100", "--no-measure", "--json", "--keep-vectors", "no", *FAST)
    )
    assert (
        without["bytes"]["disk"] < told["bytes"]["disk"] and without["bytes"]["cpu"] == told["bytes"]["cpu"]
    )


def test_where_layers_lie_is_asked_of_the_model_that_lies_there(capsys, monkeypatch):
    """An estimate by one device said that a model does not fit which --device-map spreads over two."""
    from d4s.models import loading

    asked = []
    monkeypatch.setattr(loading, "skeleton", lambda *_, **__: pytest.fail("estimated as on one device"))
    load = loading.load_model
    monkeypatch.setattr(
        loading,
        "load_model",
        lambda name, **options: asked.append(options) or load(name, dtype=options["dtype"]),
    )
    arguments = ("plan", "m", "--edits", "100", "--no-measure", "--device-map", "auto", *FAST)
    assert "copies of edited weights" in done(capsys, *arguments)
    assert [options["device_map"] for options in asked] == ["auto"]


def test_plan_measures_this_machine(capsys, monkeypatch):
    monkeypatch.setattr(planning, "MEASURING", 0.05)
    told = json.loads(done(capsys, "plan", "m", "--edits", "10", "--json", *FAST))
    assert told["seconds"] > 0 and all(one["seconds"] > 0 for one in told["passes"])
    told = json.loads(done(capsys, "plan", "m", "--edits", "10", "--passes", "2", "--json", *FAST))
    assert told["later_passes"] == 1 and told["seconds_again"] > 0


def test_plan_names_what_is_wrong(capsys):
    assert "must be a whole number from 1 on" in refused(capsys, "plan", "m", "--edits", "0")
    assert "unknown method 'd4ss'" in failed(capsys, "plan", "m", "--edits", "1", "--method", "d4ss")
    assert "no configuration of a causal language model" in failed(capsys, "plan", "nowhere", "--edits", "1")


def refused(capsys, *arguments):
    from d4s.cli import main

    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("verb", ["edit", "compare"])
def test_what_cannot_fit_is_refused_before_anything_is_made(verb, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(planning, "_host_bytes", lambda: 60_000)
    line = failed(
        capsys, verb, "m", "edits.json", "--covariance", "c.safetensors", "--out", str(tmp_path / "o")
    )
    assert line.startswith("d4s: cpu has 0.06 MB free") and "edits with" in line
    assert not list((tmp_path / "o").iterdir())


def test_edit_names_the_option_that_saves_disk(capsys, monkeypatch, tmp_path):
    found = json.loads(done(capsys, "plan", "m", "--edits", "3", "--no-measure", "--json", *FAST))
    vectors = sum(p["bytes"] for p in found["parts"] if p["name"] == planning.VECTORS)
    monkeypatch.setattr(
        planning, "free_bytes", lambda _places, _out=None: {"disk": found["bytes"]["disk"] - vectors // 2}
    )
    line = failed(
        capsys,
        "edit",
        "m",
        "edits.json",
        "--covariance",
        "c.safetensors",
        "--out",
        str(tmp_path / "o"),
        *FAST,
    )
    assert "--keep-vectors no" in line


def test_plan_tells_what_does_not_fit(capsys, monkeypatch):
    monkeypatch.setattr(planning, "_host_bytes", lambda: 60_000)
    text = done(capsys, "plan", "m", "--edits", "10", "--device", "cpu", *FAST)
    assert "does not fit: cpu has" in text and "by rates measured here" not in text


@pytest.mark.parametrize(
    ("verb", "function", "more"),
    [
        (
            "edit",
            "d4s.sequence.run.edit_sequence",
            ("edits.json", "--covariance", "c.safetensors", "--out", "o"),
        ),
        ("compare", "d4s.sequence.compare.compare", ("edits.json", "--out", "o")),
        ("tune", "d4s.study.tune.tune", ("edits.json", "--out", "o.json")),
        ("try", "d4s.journal.session.Session", ("--covariance", "c.safetensors")),
        ("plan", "d4s.study.plan.plan", ("--edits", "3")),
    ],
)
def test_every_verb_hands_on_where_the_sums_are_to_be(verb, function, more, capsys, monkeypatch, tmp_path):
    found = []

    def told(*_arguments, **options):
        found.append(options["sums_on"])
        raise D4SError("that is enough")

    monkeypatch.setattr(function, told)
    more = tuple(str(tmp_path / one) if one in ("o", "o.json") else one for one in more)
    for asked in ((), ("--sums-on", "cpu"), ("--sums-on", "device")):
        assert "that is enough" in failed(capsys, verb, "m", *more, *asked)
    assert found == ["auto", "cpu", "device"]
    assert "invalid choice: 'gpu'" in refused(capsys, verb, "m", *more, "--sums-on", "gpu")


def test_on_a_model_on_the_cpu_the_place_of_the_sums_changes_nothing(capsys):
    told = [
        json.loads(
            done(capsys, "plan", "m", "--edits", "9", "--no-measure", "--json", "--sums-on", place, *FAST)
        )
        for place in ("auto", "device", "cpu")
    ]
    assert told[0]["parts"] == told[1]["parts"] == told[2]["parts"] and told[2]["sums_on_host"] == []
