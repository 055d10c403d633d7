"""`d4s covariance`, and key statistics that other verbs estimate and keep."""

from __future__ import annotations

import json
import os

import pytest
import torch
from support.command import FAST, done, failed
from support.tiny import TEXTS, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from d4s.cli import main
from d4s.edits.formats import load_edits
from d4s.locate.covariance import (
    Covariance,
    cached_covariance,
    covariance_at_subjects,
    estimate_covariance,
)
from d4s.models.architectures import Anatomy


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


def test_a_corpus_or_a_number_of_keys_that_does_not_fit_is_named(tmp_path, capsys):
    out = str(tmp_path / "c")
    assert "none.txt: there is no such file" in failed(capsys, "covariance", "m", "none.txt", "--out", out)
    assert "0…2" in failed(capsys, "covariance", "m", "corpus.txt", "--out", out, "--layers", "3")
    (tmp_path / "c").mkdir()
    assert str(tmp_path) in failed(capsys, "covariance", "m", "corpus.txt", "--out", out)


def test_fewer_keys_than_dimensions_are_told(tmp_path, capsys):
    for tokens, is_told in (("9", True), ("500", False)):
        out = ("--out", str(tmp_path / "c"), "--tokens", tokens, "--json")
        assert main(["covariance", "m", *out]) == 0
        assert ("key vectors are fewer than the" in capsys.readouterr().err) is is_told


def test_a_file_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    line = failed(capsys, "covariance", "m", "corpus.txt", "--out", str(tmp_path / "file" / "c"))
    assert str(tmp_path / "file") in line


@pytest.mark.parametrize("order", ["m corpus.txt {}", "m {} corpus.txt", "{} m corpus.txt"])
def test_options_may_stand_between_the_words(order, tmp_path, capsys):
    out = tmp_path / "c"
    options = f"--layers 0 --tokens 9 --out {out}"
    facts = json.loads(done(capsys, "covariance", *order.format(options).split(), "--json"))
    assert facts["layers"] == [0]

    done(capsys, "covariance", "m", "corpus.txt", *options.replace(str(out), f"{out}2").split())
    assert Covariance.load(out).corpus == Covariance.load(f"{out}2").corpus


def test_statistics_that_cannot_be_kept_are_used_all_the_same(tmp_path, monkeypatch, capsys, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("D4S_CACHE", str(tmp_path / "file" / "cache"))
    done(capsys, "edit", "m", "edits.json", "--out", str(tmp_path / "x"), *FAST)
    assert "are not kept for the next time" in caplog.text


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


def test_statistics_taken_apart_add_up(place, tmp_path, capsys):
    lines = (place / "corpus.txt").read_text().splitlines()
    parts = [str(tmp_path / name) for name in ("a", "b", "c")]
    for part, path in zip((lines[:5], lines[5:9], lines[9:]), parts, strict=True):
        (tmp_path / "part.txt").write_text("\n".join(part))
        done(capsys, "covariance", "m", str(tmp_path / "part.txt"), "--out", path)
    out = str(tmp_path / "all.safetensors")
    said = done(capsys, "covariance", "--merge", *parts, "--out", out)
    found, whole = Covariance.load(out), Covariance.load(place / "c.safetensors")
    assert found.count == whole.count and f"{whole.count} key vectors" in said
    for layer in whole.layers:
        error = (found.moments[layer] - whole.moments[layer]).norm()
        assert error <= 1e-5 * whole.moments[layer].norm()
    found.check(Anatomy(tiny_model("gpt2", 1)), whole.layers)


def test_facts_that_are_to_stay_are_mixed_in(place, tmp_path, capsys):
    out = str(tmp_path / "c")
    done(
        capsys,
        "covariance",
        "m",
        "corpus.txt",
        "--retain",
        "edits.json",
        "--retain-share",
        ".3",
        "--out",
        out,
    )
    found, text = Covariance.load(out), Covariance.load(place / "c.safetensors")
    facts = covariance_at_subjects(tiny_model("gpt2", 1), tiny_tokenizer(), load_edits("edits.json"))
    for layer in text.layers:
        expected = 0.7 * text.mean(layer) + 0.3 * facts.mean(layer)
        assert (found.mean(layer) - expected).norm() <= 1e-5 * expected.norm()
    found.check(Anatomy(tiny_model("gpt2", 1)), text.layers)
    said = failed(capsys, "covariance", "--merge", out, out, "--retain", "edits.json", "--out", out)
    assert "--retain means nothing with --merge" in said


@pytest.mark.parametrize("option", ["--retain-share .3", "--dtype float16", "--seed 4", "--device-map auto"])
def test_what_means_nothing_beside_a_sum_is_refused(option, tmp_path, capsys):
    files = ("--merge", "c.safetensors", "c.safetensors", "--out", str(tmp_path / "c"))
    assert f"{option.split()[0]} means nothing with --merge" in failed(
        capsys, "covariance", *files, *option.split()
    )


def test_a_share_of_no_facts_is_refused(tmp_path, capsys):
    arguments = ("m", "corpus.txt", "--retain-share", ".3", "--out", str(tmp_path / "c"))
    assert "--retain-share means nothing without --retain;" in failed(capsys, "covariance", *arguments)
    npz = ("--from-npz", "none.npz", "--out", str(tmp_path / "c"))
    assert "--retain-share means nothing with --from-npz" in failed(
        capsys, "covariance", *npz, "--retain-share", ".3"
    )
    assert "--dtype means nothing without MODEL" in failed(capsys, "covariance", *npz, "--dtype", "float16")


def test_statistics_that_do_not_belong_together_are_refused_with_what_differs(place, tmp_path, capsys):
    mine, out = str(place / "c.safetensors"), ("--out", str(tmp_path / "all"))
    fewer, others = str(tmp_path / "fewer"), str(tmp_path / "others")
    done(capsys, "covariance", "m", "corpus.txt", "--layers", "0,2", "--out", fewer)
    estimate_covariance(tiny_model("gpt2", 2), tiny_tokenizer(), TEXTS, progress=False).save(others)
    said = failed(capsys, "covariance", "--merge", mine, fewer, *out)
    assert fewer in said and "[0, 1, 2] and [0, 2]" in said
    said = failed(capsys, "covariance", "--merge", mine, others, *out)
    assert others in said and Covariance.load(mine).fingerprint[:12] in said
    assert "name two or more" in failed(capsys, "covariance", "--merge", mine, *out)
    assert "files alone" in failed(capsys, "covariance", "m", *out, "--merge", mine, fewer)
    assert "--layers means nothing" in failed(
        capsys, "covariance", *out, "--layers", "1", "--merge", mine, fewer
    )
    assert "--merge" in failed(capsys, "covariance", *out)
    assert not (tmp_path / "all").exists()
