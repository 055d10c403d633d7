"""Norm-Anchor Scaling: the target it makes of the one that was found, and what it leaves alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.tiny import tiny_tokenizer
from support.workbench import EDITS, bench_of, editor_of, relative_error

from d4s.errors import ConfigError
from d4s.locate.kept_targets import KeptTargets
from d4s.methods import method_for
from d4s.models.prompts import subject_row


def mlp_output(bench, edit, layer):
    """What the MLP adds to the stream at the subject's last token, by a plain hook. [d_model] float64"""
    row = subject_row(tiny_tokenizer(), edit.prompt, edit.subject)
    found = []
    hook = bench.anatomy.projection(layer).register_forward_hook(lambda _m, _i, output: found.append(output))
    try:
        with torch.no_grad():
            bench.model(input_ids=torch.tensor([list(row.ids)]))
    finally:
        hook.remove()
    return found[0].reshape(len(row.ids), -1)[row.subject_last].double()


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gptj"])
def test_the_target_is_what_the_equation_says(model_type, seed):
    bench = bench_of(model_type, seed)
    found = editor_of("d4s", bench).targets(EDITS)
    layer = method_for("d4s", bench.anatomy).layers[-1]
    v0 = torch.stack([mlp_output(bench, edit, layer) for edit in EDITS])
    v = v0 + found.delta.double()
    for m in (float(v.norm(dim=1).max()), float(v.norm(dim=1).min()) / 2.1):
        editor = editor_of("d4s", bench, target_norm="anchor", anchor_norm=m)
        length = v.norm(dim=1, keepdim=True)
        z = found.start.double() - v0 + torch.where(length > 2 * m, v0, v * m / length)
        wanted = editor.targets(EDITS)
        torch.testing.assert_close(wanted.target.double(), z, rtol=1e-4, atol=1e-4 * float(z.abs().max()))
    assert torch.equal(wanted.delta, torch.zeros_like(wanted.delta)), "more than twice too long, all of them"


def test_where_the_mlp_has_a_norm_behind_it_its_output_is_the_target(seed):
    bench = bench_of("gemma2", seed)
    editor = editor_of("d4s", bench, target_norm="anchor", anchor_norm=1e3)
    assert editor.places == ("mlp",)
    torch.testing.assert_close(editor.targets(EDITS).target.norm(dim=1), torch.full((4,), 1e3))


@pytest.mark.parametrize("plain", ["alphaedit", "d4s", "rome"])
def test_at_the_norm_that_a_target_has_nothing_changes(plain, seed):
    one, other = bench_of("llama", seed), bench_of("llama", seed)
    editor = editor_of(plain, one)
    found = editor.targets(EDITS[:1])
    at_mlp = editor.places[0] == "mlp"
    v = (found.start[0] if at_mlp else mlp_output(one, EDITS[0], editor.last)) + found.delta[0]
    editor.edit(EDITS[:1])
    name, more = ("nas", {}) if plain == "alphaedit" else (plain, {"target_norm": "anchor"})
    again = editor_of(name, other, anchor_norm=float(v.norm()), **more)
    again.edit(EDITS[:1])
    assert float(editor.weights.delta(editor.last).norm()) > 0
    for layer in editor.weights.layers:
        assert relative_error(again.weights.delta(layer), editor.weights.delta(layer)) <= 2e-3


def test_the_norm_is_the_mean_of_the_first_edits_on_the_unedited_model(seed):
    bench = bench_of("gpt2", seed)
    method = method_for("nas", bench.anatomy, dict(steps=4, learning_rate=1.0, contexts=1))
    with pytest.raises(ConfigError, match=r"method\.settled\(bench, edits\)"):
        method.editor(bench)
    settled = method.settled(bench, EDITS)
    editor = replace(settled, target_norm="found").editor(bench)
    found, last = editor.targets(EDITS), settled.layers[-1]
    lengths = [
        float((mlp_output(bench, e, last) + d).norm()) for e, d in zip(EDITS, found.delta, strict=True)
    ]
    assert settled.anchor_norm == pytest.approx(sum(lengths) / 4, rel=1e-4)
    assert settled.settled(bench, EDITS[:1]) == settled, "decided once"


def test_kept_targets_are_those_that_were_found(seed):
    found = []
    for more in ({}, {"target_norm": "anchor"}):
        bench = bench_of("llama", seed)
        bench.targets = KeptTargets()
        method = method_for("d4s", bench.anatomy, dict(steps=3, learning_rate=1.0, contexts=0, **more))
        editor = method.settled(bench, EDITS).editor(bench)
        editor.announce(EDITS)
        editor.edit(EDITS[:2])
        found.append((bench.targets.take(EDITS, torch.device("cpu")), editor.weights.current()))
    (one, weights), (other, normed) = found
    assert torch.equal(one.delta, other.delta) and torch.equal(one.start, other.start)
    assert any(not torch.equal(weights[layer], normed[layer]) for layer in weights)
