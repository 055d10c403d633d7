"""`d4s edit`: what it makes, what it leaves behind where it fails, and what it is told that does not fit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from support.command import FAST, done, failed
from support.tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from d4s.cli import main
from d4s.cli.edit import _save_model
from d4s.edits.formats import load_edits
from d4s.errors import ModelError
from d4s.locate.covariance import Covariance, fingerprint_of
from d4s.measure.metrics import evaluate
from d4s.methods.ft import FTEditor
from d4s.models.architectures import Anatomy
from d4s.models.loading import load_model
from d4s.sequence.run import edit_sequence

CONFIG = dict(layers=[0, 1], steps=3, contexts=0, prior_weight=0.01, ridge=0.1)


def test_an_edited_model_goes_to_a_folder_and_is_evaluated_from_there(place, tmp_path, capsys):
    out = tmp_path / "deep" / "run"
    options = (
        "--covariance",
        "c.safetensors",
        "--batch-size",
        "2",
        "--evaluate-every",
        "1",
        "--seed",
        "4",
        *FAST,
    )
    text = done(capsys, "edit", "m", "edits.json", "--out", str(out), *options)
    assert text.splitlines()[0].split()[0] == "edits" and str(out / "model") in text

    model = AutoModelForCausalLM.from_pretrained("m").eval()
    edits = load_edits("edits.json")
    expected = edit_sequence(
        model,
        tiny_tokenizer(),
        edits,
        config=CONFIG,
        covariance="c.safetensors",
        batch_size=2,
        evaluate_every=1,
        seed=4,
        progress=False,
    )
    weights = load_file(out / "model" / "model.safetensors")
    for layer in (0, 1):
        name = Anatomy(model).weight_name(layer)
        torch.testing.assert_close(weights[name], model.state_dict()[name], rtol=1e-5, atol=1e-6)
    stored = json.loads((out / "result.json").read_text())
    assert stored["method"] == "d4s" and [row["step"] for row in stored["history"]] == [0, 2, 3]
    assert stored["config"]["layers"] == [0, 1] and stored["config"]["ridge"] == 0.1
    assert stored["config"]["target"]["steps"] == 3
    rows = (out / "history.csv").read_text().splitlines()
    assert len(rows) == 4 and rows[0].startswith("step,") and "l1_norm.1" in rows[0]

    figures = json.loads(done(capsys, "evaluate", str(out / "model"), "edits.json", "--json"))
    for name in ("efficacy", "paraphrase", "specificity", "average"):
        assert figures["metrics"][name]["mean"] == expected.history[-1][name]
    assert "specificity_argmax" not in figures["metrics"]
    for unedited in (str(out / "baseline.json"), "m"):
        again = json.loads(
            done(capsys, "evaluate", str(out / "model"), "edits.json", "--json", "--baseline", unedited)
        )
        found = again["metrics"]["specificity_argmax"]["mean"]
        assert found == expected.history[-1]["specificity_argmax"]
    direct = evaluate(AutoModelForCausalLM.from_pretrained("m").eval(), tiny_tokenizer(), edits)
    figures = json.loads(done(capsys, "evaluate", "m", "edits.json", "--json"))
    found = figures["metrics"]["target_probability"]
    assert found["mean"] == pytest.approx(direct["target_probability"], rel=1e-5) and found["count"] == 3
    assert "efficacy" in done(capsys, "evaluate", "m", "edits.json", "--limit", "1")


def test_with_json_only_figures_are_on_standard_output(tmp_path, capsys):
    out = str(tmp_path / "run")
    row = json.loads(
        done(capsys, "edit", "m", "edits.json", "--limit", "2", "--out", out, "--json", "--method", "kn")
    )
    assert row["step"] == 2 and 0 <= row["efficacy"] <= 1 and "l1_growth" in row


def test_a_codebook_is_part_of_the_model_that_is_evaluated(place, tmp_path, capsys):
    out = tmp_path / "run"
    row = json.loads(
        done(capsys, "edit", "m", "edits.json", "--out", str(out), "--json", "--method", "grace")
    )
    figures = json.loads(done(capsys, "evaluate", str(out / "model"), "edits.json", "--json"))["metrics"]
    unedited = json.loads(done(capsys, "evaluate", "m", "edits.json", "--json"))["metrics"]
    assert figures["target_probability"]["mean"] == pytest.approx(row["target_probability"], rel=1e-5)
    assert figures["target_probability"]["mean"] > unedited["target_probability"]["mean"]


def test_what_was_done_before_a_failure_is_kept(place, tmp_path, capsys, monkeypatch):
    out, plain, calls = tmp_path / "run", FTEditor.apply, []

    def fails_at_the_third(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise ModelError("no room")
        return plain(*arguments)

    monkeypatch.setattr(FTEditor, "apply", fails_at_the_third)
    line = failed(capsys, "edit", "m", "edits.json", "--out", str(out), "--method", "ft-m")
    assert "no room" in line
    stored = json.loads((out / "result.json").read_text())
    assert stored["failure"] == "edit 3: no room" and stored["edits"] == 2
    assert (out / "model" / "model.safetensors").exists() and not list(out.glob("*part*"))


def test_a_disk_that_is_full_is_one_line_and_leaves_no_half_a_model(place, tmp_path, capsys, monkeypatch):
    def full(_model, folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(GPT2LMHeadModel, "save_pretrained", full)
    out = tmp_path / "run"
    line = failed(capsys, "edit", "m", "edits.json", "--out", str(out), "--method", "ft-m", "--limit", "1")
    assert str(out / "model") in line and "No space left" in line
    kept = ["baseline.json", "history.csv", "journal", "result.json", "weights.safetensors"]
    assert sorted(path.name for path in out.iterdir()) == kept


def test_a_model_takes_the_place_of_an_earlier_one_whatever_a_kill_has_left(tmp_path):
    """As a process leaves them that is killed between its renames, or while the earlier model is removed."""
    out = tmp_path / "run"
    model, tokenizer = load_model("m")
    for left in (["model", "model.old"], ["model", "model.new"], ["model.old", "model.new"]):
        for name in left:
            (out / name).mkdir(parents=True)
            (out / name / "half").write_text("of another")
        _save_model(model, tokenizer, out / "model", out)
        assert [path.name for path in out.iterdir()] == ["model"]
        assert (out / "model" / "model.safetensors").exists() and not (out / "model" / "half").exists()
        shutil.rmtree(out)


def test_weights_are_of_the_type_that_is_asked_for(tmp_path, capsys):
    out = tmp_path / "run"
    done(
        capsys,
        "edit",
        "m",
        "edits.json",
        "--limit",
        "1",
        "--out",
        str(out),
        "--dtype",
        "bfloat16",
        "--method",
        "ft-m",
    )
    kept = load_file(out / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16}
    few = ("--layers", "0", "--tokens", "9", "--dtype", "bfloat16")
    done(capsys, "covariance", "embedded", "corpus.txt", "--out", "e", *few)
    assert Covariance.load("e").fingerprint == fingerprint_of(load_model("embedded", dtype=torch.bfloat16)[0])


def test_a_folder_that_holds_something_is_not_touched(tmp_path, capsys):
    full = tmp_path / "full"
    full.mkdir()
    (full / "kept").write_text("kept")
    for out in (full, full / "kept"):
        line = failed(capsys, "edit", "m", "edits.json", "--out", str(out), *FAST)
        assert str(out) in line and "already holds files" in line
    assert [p.name for p in full.iterdir()] == ["kept"] and (full / "kept").read_text() == "kept"
    (tmp_path / "empty").mkdir()
    done(capsys, "edit", "m", "edits.json", "--limit", "1", "--out", str(tmp_path / "empty"), *FAST)


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        ("--method d5s", ["unknown method 'd5s'. Did you mean 'd4s'"]),
        ("--set prior_wieght=3", ["'prior_wieght'. Did you mean 'prior_weight'"]),
        ("--set prior_weight", ["--set 'prior_weight'", "FIELD=VALUE"]),
        ("--set ridge=-.1", ["ridge is -0.1"]),
        ("--set prior_weight=abc", ["d4s: prior_weight is 'abc', must be a finite number or none"]),
        ("--set layers=x", ["layers is ('x',), must be a list, each of it a whole number"]),
        ("--set steps=1.5", ["steps is 1.5, must be a whole number"]),
        ("--set layers=[7]", ["layers=[7]", "0…2"]),
        ("--covariance none.safetensors", ["none.safetensors: not a readable safetensors file"]),
        ("--method ultraedit --covariance none.safetensors", ["none.safetensors: not a readable"]),
        ("--covariance corpus.txt", ["corpus.txt: not a readable safetensors file"]),
        ("--covariance other.safetensors", ["another model"]),
        ("--device nonsense", ["--device nonsense"]),
    ],
)
def test_arguments_that_do_not_fit_are_named(options, texts, tmp_path, capsys):
    Covariance({i: torch.eye(48) for i in range(3)}, 9, fingerprint="0" * 64).save("other.safetensors")
    line = failed(capsys, "edit", "m", "edits.json", "--out", str(tmp_path / "o"), *options.split())
    assert all(text in line for text in texts), line
    assert not (tmp_path / "o" / "model").exists()


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (
            f"--set steps={'9' * 5_000}",
            ["--set steps: its value, 99999999999999999999…, has too many digits"],
        ),
        (f"--set layers={'[' * 100_000}", ["--set layers", "is nested too deeply"]),
        ("--set contexts=1000000000", ["contexts is 1000000000, must be at most 1,000"]),
        ("--device meta", ["--device meta", "holds no numbers"]),
    ],
)
def test_values_that_nothing_can_be_done_with_are_one_line(options, texts, tmp_path, capsys):
    out = str(tmp_path / "o")
    line = failed(capsys, "edit", "m", "edits.json", "--method", "memit", "--out", out, *options.split())
    assert all(text in line for text in texts) and len(line) < 400, line


def test_a_collapsed_sequence_is_saved_and_says_so(place, tmp_path, capsys):
    """Nothing is written, so what a random model says by itself is not the new answer of one edit at least."""
    out = tmp_path / "run"
    still = ("--covariance", "c.safetensors", *FAST, "learning_rate=1e-30", "--evaluate-every", "1")
    text = done(capsys, "edit", "m", "edits.json", "--out", str(out), *still, "--stop-on-collapse", "1")
    stored = json.loads((out / "result.json").read_text())
    made = len(stored["edits_table"])
    assert f"broke off: after edit {made}: " in text and "fewer than stop_on_collapse=1" in text
    assert stored["failure"] in text and (out / "model").is_dir()
    with pytest.raises(SystemExit):
        main(["edit", "m", "edits.json", "--out", "other", "--stop-on-collapse", "2"])
    assert "--stop-on-collapse: '2' must be a share" in capsys.readouterr().err
