"""D4S where facts change again: what takes the earlier edit's place, and what only looks as if it did."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from workbench import EDITS, bench_of, editor_of

from d4s.edits import Edit
from d4s.methods import method_for
from d4s.methods.d4s import D4SEditor, _fact, _told


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
@pytest.mark.parametrize("anchor", ["base", "current"])
def test_a_fact_that_goes_back_and_forth_leaves_the_weights_bounded(model_type, anchor, seed):
    """Keys above the lowest of four layers move with every edit below them."""
    depth = dict(n_layer=12) if model_type == "gpt2" else dict(num_hidden_layers=12)
    bench = bench_of(model_type, seed, **depth)
    editor = method_for("d4s", bench.anatomy, dict(anchor=anchor, contexts=0)).editor(bench)
    assert len(editor.weights.layers) == 4
    growth = []
    for i in range(8):
        editor.edit([replace(EDITS[0], target_new=("English", "Paris")[i % 2], target_true=None, id=f"{i}")])
        growth.append(max(editor.weights.delta_norm().values()))
    assert growth[-1] < 5 * max(growth[:2]), growth


@pytest.mark.parametrize("anchor", ["base", "current"])
def test_a_sentence_about_another_subject_is_another_fact(anchor, seed):
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
        editor = D4SEditor(method, bench, anchor=anchor, replaces=replaces)
        editor.edit([first])
        editor.edit([second])
        deltas.append({layer: editor.weights.delta(layer) for layer in editor.weights.layers})
        assert len(editor.held) == (2 if replaces else 0)
    for layer, delta in deltas[0].items():
        assert torch.equal(delta, deltas[1][layer])


def test_a_held_fact_keeps_what_stands_before_its_target():
    for prefix in (None, "", "\n"):
        edit = Edit("{} costs $", "Bread", "20", target_prefix=prefix)
        held = _fact(*json.loads(json.dumps(_told(edit))))
        assert held.target(held.target_new) == edit.target(edit.target_new) and held.text == edit.text
    earlier = _fact("{} costs", "Bread", "20")  # a state that was stored before there was a prefix
    assert earlier.target_prefix is None
