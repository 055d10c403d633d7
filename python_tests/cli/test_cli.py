"""The command line: what each verb prints and writes, its exit status, and one clear line for every failure."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from support.tiny import TEXTS, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, MptConfig, MptForCausalLM

import d4s
from d4s import progress
from d4s.cli import main
from d4s.cli.parser import command_line
from d4s.cli.reproduce import labels
from d4s.edits.formats import load_edits
from d4s.errors import ConfigError, ModelError
from d4s.locate.covariance import Covariance, cached_covariance, estimate_covariance, fingerprint_of
from d4s.locate.targets import TargetConfig
from d4s.measure.metrics import evaluate
from d4s.methods import METHODS
from d4s.methods.ft import FTEditor
from d4s.models.architectures import ARCHITECTURES, Anatomy
from d4s.models.loading import load_model
from d4s.progress import progress_bar
from d4s.sequence.run import edit_sequence

ROOT = Path(__file__).resolve().parents[2]
VERBS = (
    "demo",
    "edit",
    "targets",
    "evaluate",
    "covariance",
    "compare",
    "analyze",
    "reproduce",
    "tasks",
    "models",
    "methods",
)
RECORDS = [
    {
        "prompt": "The mother tongue of {} is",
        "subject": "Danielle Darrieux",
        "target_new": "English",
        "target_true": "French",
        "paraphrases": ["Danielle Darrieux speaks"],
        "neighborhood": ["Edwin was born in", "Lyon is"],
    },
    {"prompt": "{} worked for", "subject": "Steve Jobs", "target_new": "Manila", "target_true": "Apple"},
    {"prompt": "The twin city of {} is", "subject": "Lyon", "target_new": "Paris", "target_true": "Manila"},
]
FAST = ("--set", "layers=[0,1]", "steps=3", "contexts=0", "prior_weight=0.01", "--set", "ridge=0.1")
CONFIG = dict(layers=[0, 1], steps=3, contexts=0, prior_weight=0.01, ridge=0.1)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model 'm', edits.json, corpus.txt and key statistics c.safetensors of the model."""
    folder = tmp_path_factory.mktemp("cli")
    model = tiny_model("gpt2", 1)
    model.save_pretrained(folder / "m")
    tiny_tokenizer().save_pretrained(folder / "m")
    (folder / "edits.json").write_text(json.dumps(RECORDS))
    (folder / "corpus.txt").write_text("\n".join(TEXTS * 3))
    estimate_covariance(model, tiny_tokenizer(), TEXTS * 3, progress=False).save(folder / "c.safetensors")
    return folder


@pytest.fixture(autouse=True)
def _here(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("D4S_CACHE", str(tmp_path / "cache"))


def done(capsys, *arguments: str) -> str:
    """Standard output of a run that must succeed."""
    capsys.readouterr()
    status = main(arguments)
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


def failed(capsys, *arguments: str) -> str:
    """The line on standard error of a run that must fail."""
    capsys.readouterr()
    status = main(arguments)
    out, err = capsys.readouterr()
    assert status in (1, 2) and out == "" and "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("d4s: ")]
    assert err.rstrip().endswith(line), "the reason is the last thing said, in one line"
    return line


def test_each_verb_has_its_help(capsys):
    for verb in VERBS:
        with pytest.raises(SystemExit) as ended:
            main([verb, "--help"])
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert text.startswith(f"usage: d4s {verb}") and "--json" in text
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert set(VERBS) <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "edits",
        "edit m edits.json",
        "edit m --out x",
        "edit m edits.json --out x --batch-size many",
        "edit m edits.json --out x --batch-size 0",
        "edit m edits.json --out x --evaluate-every 0",
        "edit m edits.json --out x --limit 0",
        "covariance m corpus.txt --out c --tokens 0",
        "edit m edits.json --out x --seed -1",
        "edit m edits.json --out x --seed 99999999999999999999",
        "compare m edits.json --out x --neighborhood-limit -1",
        "compare m edits.json --out x --seeds 0,-1",
        "analyze model result.json --out x --efficacy-bound 90",
        "edit m edits.json --out x --dtype int8",
        "evaluate m",
        "evaluate m edits.json --limit x",
        "evaluate m edits.json --no-such-option",
        "covariance m corpus.txt",
        "covariance m corpus.txt --out c --layers 1,x",
        "models too many",
    ],
)
def test_wrong_arguments_end_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("usage: d4s") and "error: " in err.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments",
    ["covariance m --out .", "edit m edits.json --method nonsense", "edit m edits.json --set steps"],
)
def test_arguments_that_fit_nothing_end_with_2(arguments, tmp_path, capsys):
    out = () if "--out" in arguments else ("--out", str(tmp_path / "x"))
    assert main([*arguments.split(), *out]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("d4s: ")


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
            method.undo,
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


def test_a_method_that_does_not_exist_is_not_shown(capsys):
    line = failed(capsys, "methods", "alphaedti")
    assert line.startswith("d4s: unknown method 'alphaedti'. Did you mean 'alphaedit'? Known: alphaedit, d4s")


def test_statistics_from_the_command_line_are_those_from_python(place, tmp_path, capsys):
    out = tmp_path / "c.safetensors"
    facts = json.loads(done(capsys, "covariance", "m", "corpus.txt", "--out", str(out), "--json"))
    found, expected = Covariance.load(out), Covariance.load(place / "c.safetensors")
    assert facts == {
        "file": str(out),
        "layers": [0, 1, 2],
        "keys": expected.count,
        "fingerprint": expected.fingerprint,
    }
    assert all(torch.equal(found.moments[i], expected.moments[i]) for i in range(3))
    text = done(
        capsys, "covariance", "m", "--out", str(out), "--layers", "2,0", "--tokens", "77", "--seed", "3"
    )
    found = Covariance.load(out)
    assert found.layers == (0, 2) and found.count == 77 and "77 key vectors" in text
    model = AutoModelForCausalLM.from_pretrained("m").eval()
    again = estimate_covariance(model, tiny_tokenizer(), layers=(0, 2), tokens=77, seed=3, progress=False)
    assert again.corpus == found.corpus


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


def test_scores_of_tasks_are_in_percent_where_they_are_shares(monkeypatch, capsys):
    scores = {"arc acc_norm": 0.25, "wikitext word_perplexity": 31.5, "gsm8k exact_match (strict-match)": 0.5}
    monkeypatch.setattr("d4s.cli.evaluate.task_scores", lambda *_: lambda: scores)
    lines = done(capsys, "evaluate", "m", "edits.json", "--limit", "1").splitlines()
    assert lines[-3:] == [
        "arc acc_norm: 25.00 %",
        "wikitext word_perplexity: 31.5",
        "gsm8k exact_match (strict-match): 50.00 %",
    ]


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
    kept = ["baseline.json", "history.csv", "result.json", "weights.safetensors"]
    assert sorted(path.name for path in out.iterdir()) == kept


def test_options_that_mean_nothing_end_with_2(tmp_path, capsys):
    for arguments, option in (
        ("analyze data m edits.json --neighborhood-limit 2", "--neighborhood-limit"),
        ("analyze model run/result.json --methods d4s", "--methods"),
        ("reproduce fig8 m --tasks mmlu", "--tasks"),
    ):
        assert main([*arguments.split(), "--out", str(tmp_path / "out")]) == 2
        assert f"{option} means nothing with" in capsys.readouterr().err


def test_data_sets_of_one_name_are_told_apart_by_their_folders():
    found = labels([Path("20q/edit_set.json"), Path("pep3k/edit_set.json"), Path("zsre.json")])
    assert list(found) == ["20q-edit_set", "pep3k-edit_set", "zsre"]
    with pytest.raises(ConfigError, match="'20q-edit_set'"):
        labels([Path("a/20q/edit_set.json"), Path("b/20q/edit_set.json")])


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


def test_the_embedded_model_and_its_edits_go_by_a_name(capsys):
    figures = json.loads(done(capsys, "evaluate", "embedded", "embedded", "--limit", "3", "--json"))
    assert figures["metrics"]["efficacy"]["count"] == 3


def spoiled(place: Path, name: str) -> None:
    """A copy of the model with one thing wrong."""
    shutil.rmtree(place / name, ignore_errors=True)
    shutil.copytree(place / "m", place / name)
    config, weights = place / name / "config.json", place / name / "model.safetensors"
    if name == "unknown-type":
        config.write_text(config.read_text().replace('"gpt2"', '"gpt99"'))
    elif name == "half-a-config":
        config.write_text(config.read_text()[:40])
    elif name == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif name == "no-weights":
        weights.unlink()
    elif name == "nan":
        model = tiny_model("gpt2", 1)
        model.transformer.h[1].mlp.c_fc.weight.data[0, 0] = float("nan")
        model.save_pretrained(place / name)
    elif name == "unsupported":
        tokens = len(tiny_tokenizer())
        model = MptForCausalLM(
            MptConfig(vocab_size=tokens, max_seq_len=64, d_model=16, n_layers=1, n_heads=4)
        )
        weights.unlink()
        model.save_pretrained(place / name)


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("nowhere/at/all", ["no causal language model could be loaded", "'embedded'"]),
        ("unknown-type", ["gpt99"]),
        ("half-a-config", ["config.json"]),
        ("truncated", ["could be loaded"]),
        ("no-weights", ["model.safetensors"]),
        ("nan", ["NaN", "transformer.h.1.mlp.c_fc.weight"]),
        ("unsupported", ["unknown model type 'mpt'", "'opt'", "architecture=d4s.Architecture("]),
    ],
)
def test_a_model_that_cannot_be_edited_is_named(name, texts, place, tmp_path, capsys):
    if "/" not in name:
        spoiled(place, name)
    path = str(place / name)
    line = failed(capsys, "edit", path, "edits.json", "--out", str(tmp_path / "o"), "--set", "layers=[0]")
    assert name in ("nan", "unsupported") or path in line
    assert all(text in line for text in texts), line
    assert not any((tmp_path / "o").iterdir())


class Bomb:
    """Unpickling this leaves a trace."""

    def __reduce__(self):
        return open, ("unpickled", "w")


def test_a_model_whose_files_lack_weights_is_refused(place, tmp_path, capsys):
    broken = shutil.copytree(place / "m", tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors.pop("transformer.h.1.mlp.c_proj.weight")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    line = failed(capsys, "evaluate", str(broken), "edits.json")
    assert "lack 1 weights" in line and "transformer.h.1.mlp.c_proj.weight" in line


def test_statistics_that_cannot_be_kept_are_used_all_the_same(tmp_path, monkeypatch, capsys, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("D4S_CACHE", str(tmp_path / "file" / "cache"))
    done(capsys, "edit", "m", "edits.json", "--out", str(tmp_path / "x"), *FAST)
    assert "are not kept for the next time" in caplog.text


def test_a_log_gets_plain_lines(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_SECONDS", 0)
    with progress_bar(3, "edit", "d4s") as bar:
        for _ in range(3):
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert (
        lines[0].startswith("d4s:   0%") and lines[-1].startswith("d4s: 100%") and "\r" not in "".join(lines)
    )
    with progress_bar(3, "edit", "d4s", shown=False) as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""


def test_pickled_weights_are_never_read(place, capsys):
    spoiled(place, "no-weights")
    for content in (pickle.dumps(Bomb()), None):
        path = place / "no-weights" / "pytorch_model.bin"
        if content is None:
            torch.save(tiny_model("gpt2", 1).state_dict(), path)
        else:
            path.write_bytes(content)
        assert "model.safetensors" in failed(capsys, "evaluate", "no-weights", "edits.json")
    assert not Path("unpickled").exists()


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (None, ["bad.json"]),
        ("", ["bad.json"]),
        (json.dumps(RECORDS)[:-60], ["bad.json", "3"]),
        (json.dumps([RECORDS[0], RECORDS[1] | {"prompt": "worked for"}]), ["bad.json", "record 2", "'{}'"]),
        (json.dumps([RECORDS[0] | {"target_new": " "}]), ["bad.json", "record 1", "'target_new'"]),
        (b"\xff\xfe\x00", ["bad.json"]),
    ],
)
def test_edits_that_cannot_be_read_are_named(content, texts, capsys):
    path = Path("bad.json")
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = failed(capsys, "evaluate", "m", "bad.json")
    assert all(text in line for text in texts), line


def test_edits_of_no_known_format_are_told_what_was_looked_for(capsys):
    Path("bad.json").write_text('[{"question": 3}]')
    assert main(["evaluate", "m", "bad.json"]) == 1
    err = capsys.readouterr().err
    assert (
        "d4s: bad.json: not a known format" in err
        and "counterfact" in err
        and "found, in record 1: 'question'" in err
    )


def test_bad_records_may_be_left_out(capsys):
    Path("mixed.json").write_text(json.dumps([RECORDS[0], RECORDS[1] | {"subject": ""}, RECORDS[2]]))
    assert "record 2" in failed(capsys, "evaluate", "m", "mixed.json")
    figures = json.loads(done(capsys, "evaluate", "m", "mixed.json", "--skip-bad", "--json"))
    assert figures["metrics"]["efficacy"]["count"] == 2


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


def test_a_corpus_or_a_number_of_keys_that_does_not_fit_is_named(tmp_path, capsys):
    out = str(tmp_path / "c")
    assert "none.txt: cannot be read" in failed(capsys, "covariance", "m", "none.txt", "--out", out)
    assert "0…2" in failed(capsys, "covariance", "m", "corpus.txt", "--out", out, "--layers", "3")
    (tmp_path / "c").mkdir()
    assert str(tmp_path) in failed(capsys, "covariance", "m", "corpus.txt", "--out", out)


def test_a_file_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    line = failed(capsys, "covariance", "m", "corpus.txt", "--out", str(tmp_path / "file" / "c"))
    assert str(tmp_path / "file") in line


def test_an_interruption_is_a_failure_in_one_line(monkeypatch, capsys):
    def interrupted(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("d4s.edits.formats.load_edits", interrupted)
    assert "stopped" in failed(capsys, "evaluate", "m", "edits.json")


def test_the_module_runs_as_a_program_and_hands_on_its_status(place):
    ended = run(sys.executable, "-m", "d4s", "evaluate", "m", "none.json", cwd=place)
    assert ended.returncode == 1 and ended.stdout == ""
    assert ended.stderr.splitlines()[-1].startswith("d4s: none.json")


def test_code_beside_a_model_never_runs_and_nobody_is_asked(place, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    monkeypatch.setattr("sys.stdin", None)
    for name, known in (("own-type", False), ("known-type", True)):
        folder = shutil.copytree(place / "m", place / name, dirs_exist_ok=True)
        (folder / "own.py").write_text("open('ran', 'w').close()\n")
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
        config["model_type"] = "gpt2" if known else "own"
        (folder / "config.json").write_text(json.dumps(config))
        if known:
            done(capsys, "evaluate", name, "edits.json", "--limit", "1")
        else:
            line = failed(capsys, "evaluate", name, "edits.json")
            assert name in line and "auto_map" in line and "never runs" in line
    tokenizer = shutil.copytree(place / "m", place / "own-tokenizer", dirs_exist_ok=True)
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "OwnTokenizer"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    (tokenizer / "own.py").write_text("open('ran', 'w').close()\n")
    assert main(["evaluate", "own-tokenizer", "edits.json", "--limit", "1"]) in (0, 1)
    assert not Path("ran").exists()


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


@pytest.mark.parametrize("order", ["m corpus.txt {}", "m {} corpus.txt", "{} m corpus.txt"])
def test_options_may_stand_between_the_words(order, tmp_path, capsys):
    out = tmp_path / "c"
    options = f"--layers 0 --tokens 9 --out {out}"
    facts = json.loads(done(capsys, "covariance", *order.format(options).split(), "--json"))
    assert facts["layers"] == [0]

    done(capsys, "covariance", "m", "corpus.txt", *options.replace(str(out), f"{out}2").split())
    assert Covariance.load(out).corpus == Covariance.load(f"{out}2").corpus


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"d4s {d4s.__version__}\n"


def run(*command: str, **options) -> subprocess.CompletedProcess:
    options["env"] = os.environ | {"PYTHONPATH": str(ROOT)} | options.get("env", {})
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_who_reads_only_the_first_lines_is_left_in_peace():
    line = f"{sys.executable} -m d4s methods --json; echo $? >&2"
    ended = run("bash", "-c", f"({line}) | head -n 1 > /dev/null")
    assert ended.stderr.split() in (["141"], ["0"])  # 0: all of it was written before head ended
    # A reader that has gone before the first line:
    ended = run("bash", "-c", f"({line}) | true", env={"PYTHONUNBUFFERED": ""})
    assert "roken" not in ended.stderr and "Traceback" not in ended.stderr


def test_a_checkout_without_its_extension_says_so_in_one_line(tmp_path):
    shutil.copytree(
        ROOT / "d4s", tmp_path / "d4s", ignore=shutil.ignore_patterns("*.so", "demo", "__pycache__")
    )
    path = {"PYTHONPATH": str(tmp_path)}
    ended = run(sys.executable, "-m", "d4s", "methods", cwd=tmp_path, env=path)
    assert ended.returncode == 1 and ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith(
        "d4s: the compiled extension d4s.ops._C does not load (it is not built); run 'pip install .'"
    )
    ended = run(sys.executable, "-c", "import d4s", cwd=tmp_path, env=path)
    assert ended.stderr.splitlines()[-1].startswith("d4s.errors.ExtensionError: the compiled extension")


def test_without_a_home_the_statistics_have_a_place_all_the_same(place, tmp_path, monkeypatch, caplog):
    def nobody(path):
        return path  # as where the user is in no list

    monkeypatch.setattr(os.path, "expanduser", nobody)
    monkeypatch.delenv("D4S_CACHE")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("d4s.locate.covariance.KEYS_A_DIMENSION", 1)
    arguments = (tiny_model("gpt2", 1), tiny_tokenizer(), (0,))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    first = cached_covariance(*arguments, progress=False)
    (file,) = (tmp_path / "xdg" / "d4s").iterdir()
    assert Covariance.load(file).count == first.count and not caplog.text
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cached_covariance(*arguments, progress=False).count == first.count
    assert "no home folder" in caplog.text and [p.name for p in tmp_path.iterdir()] == ["xdg"]


def test_a_log_says_from_the_start_what_is_done(tmp_path, capsys, monkeypatch):
    done(capsys, "compare", "m", "edits.json", "--methods", "ft-m", "--out", str(tmp_path / "c"))
    assert main(["compare", "m", "edits.json", "--methods", "ft-m,grace", "--out", str(tmp_path / "d")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line] == [
        "baseline: the unedited model is asked about 3 edits",
        "sequence 1 of 2: ft-m, seed 0",
        "ft-m: the unedited model is scored on 3 edits",
        "ft-m: 3 edits, 1 a step",
        "sequence 2 of 2: grace, seed 0",
        "grace: the unedited model is scored on 3 edits",
        "grace: 3 edits, 1 a step",
    ]
    monkeypatch.setattr(progress, "_SECONDS", 0)  # work that takes long
    done(capsys, "edit", "m", "edits.json", "--method", "ft-m", "--out", str(tmp_path / "e"))
    assert main(["edit", "m", "edits.json", "--method", "ft-m", "--out", str(tmp_path / "f")]) == 0
    before_the_edits = capsys.readouterr().err.split("ft-m: 3 edits")[0]
    assert before_the_edits.count("scoring: 100%") >= 1 and "\r" not in before_the_edits


def test_the_public_face_has_what_the_verbs_do():
    script = (
        "import sys, d4s\n"
        "assert 'matplotlib' not in sys.modules and 'lm_eval' not in sys.modules\n"
        "import d4s.sequence.compare\n"
        "names = ('compare', 'analyze_data', 'analyze_model', 'run_tasks', 'consolidate')\n"
        "assert all(callable(getattr(d4s, name)) and name in dir(d4s) for name in names)\n"
        "from d4s import *\n"
        "assert compare is d4s.sequence.compare.compare and not hasattr(d4s, 'no_such_name')\n"
    )
    ended = run(sys.executable, "-c", script)
    assert ended.returncode == 0, ended.stderr


def test_every_verb_is_tested():
    (verbs,) = [
        action.choices for action in command_line()._actions if hasattr(action, "choices") and action.choices
    ]
    assert set(VERBS) == set(verbs)
    assert set(VERBS) <= {path.stem for path in (ROOT / "d4s" / "cli").glob("*.py")}, "one file a verb"


def test_the_command_line_loads_nothing_slow_before_a_verb_runs():
    script = (
        "import sys, d4s\n"
        "before = set(sys.modules)\n"
        "import d4s.cli\n"
        "loaded = {name for name in set(sys.modules) - before if not name.startswith('d4s.cli')}\n"
        "assert not loaded & {'matplotlib', 'pandas', 'lm_eval', 'transformers'}, loaded\n"
        "assert not [name for name in loaded if name.startswith('d4s')], loaded\n"
    )
    ended = run(sys.executable, "-c", script)
    assert ended.returncode == 0, ended.stderr


def test_zsre_can_be_written_towards_the_true_answer(capsys, monkeypatch):
    seen = []
    real = load_edits
    monkeypatch.setattr(
        "d4s.edits.formats.load_edits", lambda *a, **k: seen.append(k["zsre_target"]) or real(*a, **k)
    )
    done(capsys, "evaluate", "m", "edits.json", "--zsre-target", "answer", "--json")
    done(capsys, "evaluate", "m", "edits.json", "--json")
    assert seen == ["answer", "alt"]
