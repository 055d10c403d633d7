"""Passes that begin where the last one stood give the numbers of passes from the embedding on."""

from __future__ import annotations

from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
from support.workbench import EDITS, bench_of, editor_of

from d4s.locate import ascent
from d4s.locate.ascent import Ascent

HELD = dict(context_keys="each", prompt_weight=0.5)
FIELDS = dict(layers=(1, 2), contexts=2, prior_weight=5.0, ridge=0.1)


def change_of(model_type, method, fields, seed, steps=1):
    bench = bench_of(model_type, seed)
    config = {name: value for name, value in (FIELDS | fields).items() if value is not None}
    editor = editor_of(method, bench, **config)
    editor.announce(EDITS)
    passes = [0]
    lowest = next(bench.anatomy.blocks[0].children())
    hook = lowest.register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    for i in range(steps):
        editor.edit(EDITS[i::steps])
    hook.remove()
    base, now = editor.weights.base, editor.weights.current()
    assert not any(torch.equal(now[layer], base[layer]) for layer in (1, 2))
    return [now[layer].clone() for layer in (1, 2)], passes[0]


@pytest.mark.parametrize(
    ("model_type", "method", "fields"),
    [
        ("gpt2", "d4s", {}),
        ("llama", "d4s", HELD),
        ("llama", "d4s", HELD | dict(anchor="current")),
        ("opt", "d4s", HELD),
        ("falcon", "d4s", HELD),
        ("gemma2", "d4s", HELD),
        ("bloom", "memit", {}),
        ("gpt_neox", "memit-seq", {}),
        (
            "llama",
            "alphaedit",
            dict(null_space_threshold=1.0, threshold_is_relative=True, prior_weight=None, ridge=None),
        ),
        ("llama", "lyaplock", {}),
        ("olmoe", "d4s", {}),
    ],
)
def test_a_step_is_the_same_to_the_last_bit_and_runs_less(model_type, method, fields, seed):
    found, fewer = change_of(model_type, method, fields, seed, steps=2)
    with patch.object(Ascent, "passing", lambda *_: nullcontext()):
        whole, all_passes = change_of(model_type, method, fields, seed, steps=2)
    assert all(map(torch.equal, found, whole))
    assert fewer < all_passes


def test_where_nothing_may_be_kept_every_pass_is_whole(monkeypatch, seed):
    found, fewer = change_of("llama", "d4s", HELD, seed)
    monkeypatch.setattr(ascent, "KEPT_BYTES", 0)
    whole, all_passes = change_of("llama", "d4s", HELD, seed)
    assert all(map(torch.equal, found, whole)) and fewer < all_passes


def test_after_a_step_that_failed_passes_are_whole_again(monkeypatch, seed):
    bench = bench_of("llama", seed)
    editor = editor_of("d4s", bench, **FIELDS)
    rows = editor.rows(EDITS)
    before = editor.keys(rows, 2)

    def failing(layer, weight):
        with torch.no_grad():
            bench.anatomy.projection(1).weight.mul_(2)
        raise RuntimeError("no room")

    monkeypatch.setattr(editor.weights, "write_", failing)
    with pytest.raises(RuntimeError, match="no room"):
        editor.apply(EDITS)
    assert not torch.equal(editor.keys(rows, 2), before)
    with torch.no_grad():
        bench.anatomy.projection(1).weight.div_(2)
    assert torch.equal(editor.keys(rows, 2), before)
