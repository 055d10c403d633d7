"""Targets that are kept: the same edits with and without them, and nothing taken that was found for something else."""

from __future__ import annotations

import os
import random
from dataclasses import replace

import pytest
import torch
from support.tiny import TEXTS, tiny_model, tiny_tokenizer
from support.workbench import EDITS

from d4s import progress
from d4s.cli import main
from d4s.edits.formats import save_edits
from d4s.errors import ConfigError, DataError
from d4s.locate.covariance import estimate_covariance
from d4s.locate.kept_targets import KeptTargets
from d4s.methods import locate_then_edit
from d4s.sequence import run as sequence
from d4s.sequence import target_search, under_way
from d4s.sequence.compare import compare
from d4s.sequence.run import edit_sequence
from d4s.sequence.target_search import search_targets

FIELDS = dict(layers=[0, 1], steps=4, clamp=8.0, weight_decay=0.0, prior_weight=1e-2, ridge=0.1, contexts=1)


def made(seed, targets=None, model=None, method="d4s", edits=EDITS, **fields):
    model = tiny_model("llama", seed) if model is None else model
    covariance = estimate_covariance(model, tiny_tokenizer(), TEXTS * 6, dtype=torch.float64, progress=False)
    edit_sequence(
        model,
        tiny_tokenizer(),
        edits,
        method=method,
        config=FIELDS | fields,
        covariance=covariance,
        targets=targets,
        progress=False,
    )
    return [p.detach().clone() for p in model.parameters()]


def searches(monkeypatch):
    """The edits whose targets are searched from here on."""
    found = []
    own = locate_then_edit.optimise_targets

    def counted(anatomy, tokenizer, edits, *arguments, **named):
        found.extend(edits)
        return own(anatomy, tokenizer, edits, *arguments, **named)

    monkeypatch.setattr(locate_then_edit, "optimise_targets", counted)
    return found


def test_kept_targets_are_not_searched_again_and_give_the_same_weights(seed, tmp_path, monkeypatch):
    searched = searches(monkeypatch)
    expected = made(seed)
    kept = KeptTargets()
    assert all(map(torch.equal, made(seed, kept), expected)) and len(kept) == len(EDITS)
    kept.save(tmp_path / "t.safetensors")
    searched.clear()
    assert all(map(torch.equal, made(seed, tmp_path / "t.safetensors"), expected))
    # λ, the layers below the last and the rule of the residual are not what a target hangs on.
    made(seed, tmp_path / "t.safetensors", prior_weight=3.0, layers=[1], residual="once")
    assert searched == []


@pytest.mark.parametrize("shown", [True, False])
def test_a_log_says_how_many_targets_of_several_are_found(seed, monkeypatch, capsys, shown):
    monkeypatch.setattr(progress, "_SECONDS", 0)
    model, fields = tiny_model("llama", seed), dict(layers=[1], steps=2, contexts=0)
    for edits in (EDITS, EDITS[:1]):
        search_targets(model, tiny_tokenizer(), edits, config=fields, progress=shown)
        told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("target search: ")]
        assert bool(told) == (shown and len(edits) > 1)
        assert not told or f" {len(edits)}/{len(edits)} " in told[-1]


def test_edits_may_come_one_after_another(seed):
    model = tiny_model("llama", seed)
    found, again = (
        search_targets(model, tiny_tokenizer(), edits, config=FIELDS, progress=False)
        for edits in (EDITS, iter(EDITS))
    )
    assert (
        len(again) == len(EDITS) and all(edit in again for edit in EDITS) and again.identity == found.identity
    )


def test_what_was_found_before_an_interruption_is_in_the_file(seed, monkeypatch, tmp_path):
    own, windows = locate_then_edit.optimise_targets, []

    def interrupted(anatomy, tokenizer, edits, *arguments, **named):
        windows.append(edits)
        if len(windows) > 2:
            raise KeyboardInterrupt
        return own(anatomy, tokenizer, edits, *arguments, **named)

    monkeypatch.setattr(locate_then_edit, "optimise_targets", interrupted)
    monkeypatch.setattr(target_search, "EDITS_AHEAD", 1)
    place, fields = tmp_path / "t.safetensors", dict(layers=[1], steps=2, contexts=0)
    with pytest.raises(KeyboardInterrupt):
        search_targets(
            tiny_model("llama", seed), tiny_tokenizer(), EDITS, config=fields, out=place, progress=False
        )
    assert len(KeptTargets.load(place)) == 2


def test_what_is_not_among_them_is_searched_and_added(seed, monkeypatch):
    kept = KeptTargets()
    made(seed, kept, edits=EDITS[:2])
    searched = searches(monkeypatch)
    found = made(seed, kept)
    assert searched == list(EDITS[2:]) and len(kept) == len(EDITS)
    for one, other in zip(found, made(seed), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("named", "change"),
    [
        ("layer 1 there, 2 here", dict(layers=[1, 2])),
        ("target configuration", dict(steps=5)),
        ("target configuration", dict(optimizer="polyak")),
        ("contexts", dict(contexts=0)),
        ("model", dict(model="other")),
    ],
)
def test_targets_found_for_something_else_are_refused_and_what_differs_is_named(named, change, seed):
    kept = KeptTargets()
    made(seed, kept)
    model = tiny_model("llama", seed)
    before = [p.clone() for p in model.parameters()]
    if change.pop("model", None):
        with torch.no_grad():
            model.model.layers[2].mlp.down_proj.weight[0, 0] += 1e-3
        before = [p.clone() for p in model.parameters()]
    with pytest.raises(DataError, match=named):
        made(seed, kept, model=model, **change)
    assert all(map(torch.equal, before, model.parameters()))


def test_a_method_that_searches_on_edited_weights_takes_none(seed):
    with pytest.raises(ConfigError, match="memit searches its targets on the weights as they are"):
        made(seed, KeptTargets(), method="memit")
    with pytest.raises(ConfigError, match="anchor='base'"):
        made(seed, KeptTargets(), anchor="current")


def test_a_fact_that_stands_twice_is_kept_once_and_moves_no_other(seed, tmp_path):
    twice = [EDITS[0], replace(EDITS[0], id="again"), *EDITS[1:]]
    kept = KeptTargets()
    for one, other in zip(made(seed, kept, edits=twice), made(seed, edits=twice), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)  # another batch: another rounding
    assert len(kept) == len(EDITS)
    kept.save(tmp_path / "t.safetensors")
    loaded = KeptTargets.load(tmp_path / "t.safetensors")
    for edit in EDITS:
        one, other = (k.take([edit], torch.device("cpu")).delta for k in (loaded, kept))
        assert torch.equal(one, other)


def test_targets_that_do_not_fit_are_refused_before_the_model_is_asked_anything(seed, monkeypatch):
    kept = KeptTargets()
    made(seed, kept)
    for module, name in ((sequence, "take_baseline"), (under_way, "evaluate")):
        monkeypatch.setattr(module, name, lambda *_a, **_k: pytest.fail("the model was asked"))
    with pytest.raises(DataError, match="another model"):
        made(seed + 1, kept)


def test_a_comparison_of_several_seeds_takes_no_targets_that_hang_on_one(seed):
    model, kept = tiny_model("llama", seed), KeptTargets()
    with pytest.raises(ConfigError, match="each seed has of its own"):
        compare(model, tiny_tokenizer(), EDITS, {"d4s": FIELDS}, targets=kept, seeds=(0, 1), progress=False)
    made(seed, kept)
    with pytest.raises(DataError, match="contexts"):
        compare(model, tiny_tokenizer(), EDITS, {"d4s": FIELDS}, targets=kept, seeds=3, progress=False)


def test_a_damaged_file_is_refused(seed, tmp_path):
    kept, path = KeptTargets(), tmp_path / "t.safetensors"
    made(seed, kept)
    kept.save(path)
    whole = path.read_bytes()
    generator = random.Random(seed)
    for _ in range(40):
        flipped = bytearray(whole)
        flipped[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(DataError, match=r"t\.safetensors"):
            KeptTargets.load(path)
    with pytest.raises(DataError, match="no targets"):
        KeptTargets().save(path)


def test_targets_are_searched_kept_and_used_from_the_shell(tmp_path, monkeypatch, capsys):
    """d4s targets; d4s edit --targets; d4s edit and d4s compare keep their own beside their results."""
    monkeypatch.chdir(tmp_path)
    tiny_model("llama", 1).save_pretrained("m")
    tiny_tokenizer().save_pretrained("m")
    save_edits(EDITS, "edits.jsonl")
    (tmp_path / "corpus.txt").write_text("\n".join(TEXTS * 6))
    common = ("--set", "steps=3", "contexts=0", "layers=[0,1]", "ridge=0.1")
    assert main(["covariance", "m", "corpus.txt", "--out", "c.safetensors"]) == 0
    assert main(["targets", "m", "edits.jsonl", "--out", "t.safetensors", "--limit", "2", *common]) == 0
    assert len(KeptTargets.load("t.safetensors")) == 2
    assert main(["targets", "m", "edits.jsonl", "--out", "t.safetensors", *common]) == 0  # it goes on
    assert len(KeptTargets.load("t.safetensors")) == len(EDITS)
    searched = searches(monkeypatch)
    edit = ["edit", "m", "edits.jsonl", "--covariance", "c.safetensors", *common]
    assert main([*edit, "--out", "one", "--targets", "t.safetensors"]) == 0
    assert searched == []
    assert main([*edit, "--out", "two"]) == 0
    assert searched == list(EDITS) and len(KeptTargets.load("two/targets.safetensors")) == len(EDITS)
    searched.clear()
    compare = ["compare", "m", "edits.jsonl", "--covariance", "c.safetensors", "--methods", "d4s"]
    assert main([*compare, "--out", "three"]) == 0 and searched == list(EDITS)
    (kept,) = (tmp_path / "three" / "targets").iterdir()
    assert len(KeptTargets.load(kept)) == len(EDITS)
    capsys.readouterr()
    assert main([*edit, "--out", "four", "--targets", str(kept)]) == 1
    assert "another" in capsys.readouterr().err


def test_a_pipe_is_no_file_of_targets(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe or a device"):
        KeptTargets.load(tmp_path / "pipe")
