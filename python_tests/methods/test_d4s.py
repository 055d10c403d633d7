"""D4S where facts change again: what takes the earlier edit's place, and what only looks as if it did."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from support.workbench import EDITS, bench_of, editor_of, relative_error

from d4s.edits import Edit
from d4s.errors import ConfigError
from d4s.methods import method_for
from d4s.methods.d4s import D4S, D4SEditor, _fact, _told


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "rule", [dict(residual="once"), dict(residual="measured"), dict(anchor="current")], ids=str
)
def test_a_fact_that_goes_back_and_forth_leaves_the_weights_bounded(model_type, rule, seed):
    """Keys above the lowest of four layers move with every edit below them."""
    depth = dict(n_layer=12) if model_type == "gpt2" else dict(num_hidden_layers=12)
    bench = bench_of(model_type, seed, **depth)
    editor = method_for("d4s", bench.anatomy, rule | dict(contexts=0)).editor(bench)
    assert len(editor.weights.layers) == 4
    growth = []
    for i in range(8):
        editor.edit([replace(EDITS[0], target_new=("English", "Paris")[i % 2], target_true=None, id=f"{i}")])
        growth.append(max(editor.weights.delta_norm().values()))
    assert growth[-1] < 5 * max(growth[:2]), growth


@pytest.mark.parametrize("anchor", ["base", "current"])
def test_a_sentence_about_another_subject_is_another_fact(anchor, seed, monkeypatch):
    first = Edit(
        prompt="The mother tongue of {} is", subject="Danielle Darrieux", target_new="English", id="1"
    )
    second = Edit(
        prompt="The {} of Danielle Darrieux is", subject="mother tongue", target_new="Paris", id="2"
    )
    assert first.text == second.text
    deltas = []
    for replaces in (True, False):
        bench = bench_of("gpt2", seed)
        method = editor_of("d4s", bench, anchor=anchor).method
        monkeypatch.setattr(D4S, "replaces", replaces)
        editor = D4SEditor(method, bench, anchor=anchor)
        editor.edit([first])
        editor.edit([second])
        deltas.append({layer: editor.weights.delta(layer) for layer in editor.weights.layers})
        assert len(editor.held) == (2 if replaces else 0)
    for layer, delta in deltas[0].items():
        assert torch.equal(delta, deltas[1][layer])


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2"])
def test_in_one_layer_the_residual_measured_again_is_that_measured_once(model_type, seed):
    """Without contexts, whose mean key is not the one at which the state is measured."""
    bench = bench_of(model_type, seed)
    found = []
    for rule in ("once", "measured"):
        editor = editor_of("d4s", bench, layers=(1,), residual=rule, prior_weight=5.0, learning_rate=0.1)
        for edit in EDITS:
            editor.edit([edit])
        found.append(editor.weights.delta(1))
        editor.restore()
    assert relative_error(found[1], found[0]) <= 1e-3


@pytest.mark.parametrize("layers", [(0, 1), (0, 1, 2)])
def test_one_batch_with_residuals_measured_is_memits_batch(layers, seed):
    bench = bench_of("llama", seed)
    config = dict(layers=layers, prior_weight=5.0, learning_rate=0.1, contexts=1)
    found = []
    for name, more in (("memit", {}), ("d4s", dict(residual="measured")), ("d4s", dict(residual="once"))):
        editor = editor_of(name, bench, **config, **more)
        editor.edit(EDITS)
        found.append(torch.cat([editor.weights.delta(layer).flatten() for layer in layers]))
        editor.restore()
    assert relative_error(found[1], found[0]) <= 1e-3
    assert relative_error(found[2], found[0]) > 0.05  # the paper's rule is another one


def test_with_residuals_measured_an_edit_arrives_and_with_the_papers_rule_it_overshoots(seed):
    """At a light prior: what is left of z − h_L after the step, along it. Three layers bring 1 + ½ + ⅓ of it."""
    bench = bench_of("llama", seed)
    left = {}
    for rule in ("once", "measured"):
        editor = editor_of(
            "d4s", bench, layers=(0, 1, 2), residual=rule, prior_weight=1e-7, learning_rate=0.01, steps=3
        )
        targets = editor.targets(EDITS[:1])
        editor.edit(EDITS[:1])
        rest = (targets.target.double() - editor.state(editor.bare_rows(EDITS[:1])))[0]
        delta = targets.delta[0].double()
        left[rule] = float(rest @ delta / (delta @ delta))
        editor.restore()
    assert abs(left["measured"]) < 0.05
    assert left["once"] < -0.3


def test_targets_searched_on_are_those_of_w0_where_nothing_is_left_to_find(seed):
    """One look is followed by no step, so only the clamp, around v0 as it is now, could change a target."""
    bench = bench_of("llama", seed)
    deltas = []
    for looks in (0, 1, 4):
        editor = editor_of("d4s", bench, refine_looks=looks, clamp=100.0, contexts=1)
        for edit in EDITS:
            editor.edit([edit])
        deltas.append(torch.cat([editor.weights.delta(layer).flatten() for layer in editor.weights.layers]))
        editor.restore()
    assert relative_error(deltas[1], deltas[0]) <= 1e-3
    assert relative_error(deltas[2], deltas[0]) > 1e-3


@pytest.mark.parametrize("rule", [dict(residual="once"), dict(anchor="current")])
def test_targets_are_searched_on_only_where_they_are_of_w0_and_measured_again(rule):
    bench = bench_of("gpt2", 0)
    with pytest.raises(ConfigError, match=r"refine_looks=2 .*set anchor='base' and residual='measured'"):
        method_for("d4s", bench.anatomy, rule | dict(refine_looks=2))


def test_a_held_fact_keeps_what_stands_before_its_target():
    for prefix in (None, "", "\n"):
        edit = Edit("{} costs $", "Bread", "20", target_prefix=prefix)
        held = _fact(*json.loads(json.dumps(_told(edit))))
        assert held.target(held.target_new) == edit.target(edit.target_new) and held.text == edit.text
    earlier = _fact("{} costs", "Bread", "20")  # a state that was stored before there was a prefix
    assert earlier.target_prefix is None
