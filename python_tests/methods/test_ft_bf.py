"""LocFT-BF: rounds over mini-batches, and what it is for a single edit."""

from __future__ import annotations

import pytest
import torch
from support.tiny import tiny_tokenizer
from support.workbench import EDITS, bench_of, editor_of, relative_error

from d4s.models.prompts import end_of_text, prompt_and_target_ids


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
@pytest.mark.parametrize("ends", [True, False])
def test_a_single_edit_is_ft_m(ends, model_type, seed):
    found = []
    for name in ("ft-m", "ft-bf"):
        editor = editor_of(name, bench_of(model_type, seed), layers=1, target_eos=ends)
        step = editor.edit(EDITS[:1])
        found.append((editor.weights.current()[1], step))
    (weight, step), (same, told) = found
    assert torch.equal(weight, same) and step == told


def loss_of(model, end, edit):
    prompt, target = prompt_and_target_ids(tiny_tokenizer(), edit.text, edit.target_new)
    target = [*target, *end]
    logits = model(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(target))


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_it_is_adam_over_mini_batches_and_none_is_passed_over_for_one_of_its_edits(model_type, seed):
    """Mini-batches as large as the step, so that their order is none; the bound lies between the edits' losses."""
    bench, twin = bench_of(model_type, seed), bench_of(model_type, seed)
    end = end_of_text(twin.model, tiny_tokenizer())
    losses = sorted(float(loss_of(twin.model, end, edit).detach()) for edit in EDITS[:2])
    config = dict(layers=2, steps=4, learning_rate=1e-3, stop_loss=losses[0])
    editor = editor_of("ft-bf", bench, **config)
    editor.edit(EDITS[:2])
    weight = twin.anatomy.weight(2)
    optimiser = torch.optim.Adam([weight], lr=1e-3)
    for _ in range(4):
        loss = sum(loss_of(twin.model, end, edit) for edit in EDITS[:2]) / 2
        if float(loss.detach()) < losses[0]:
            break
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    base = editor.weights.base[2]
    assert relative_error(bench.anatomy.weight(2).detach() - base, weight.detach() - base) <= 0.02


def test_every_edit_has_its_turn_in_every_round_and_a_learned_mini_batch_is_passed_over(monkeypatch, seed):
    editor = editor_of("ft-bf", bench_of("llama", seed), layers=1, steps=3, mini_batch=3, stop_loss=1.0)
    seen, written = [], []
    told = iter([2.0, 0.5, 0.5, 8.0, 0.9, 0.9])

    def gradients(batch):
        seen.append([edit.id for edit in batch])
        editor.deltas[1].grad = torch.ones_like(editor.deltas[1])
        return torch.full((len(batch),), next(told))

    monkeypatch.setattr(editor, "gradients", gradients)
    monkeypatch.setattr(editor, "write", lambda: written.append(len(seen)))
    editor.edit(EDITS)
    rounds = [seen[i] + seen[i + 1] for i in (0, 2, 4)]
    assert [len(part) for part in seen] == [3, 1] * 3
    assert all(sorted(ids) == sorted(edit.id for edit in EDITS) for ids in rounds)
    assert written == [1, 4]


def test_a_round_below_the_bound_is_the_last(monkeypatch, seed):
    editor = editor_of("ft-bf", bench_of("llama", seed), layers=1, mini_batch=2, stop_loss=1.0)
    looks = []

    def gradients(batch):
        looks.append(len(batch))
        editor.deltas[1].grad = torch.zeros_like(editor.deltas[1])
        return torch.full((len(batch),), 0.9 if len(looks) > 2 else 1.0)

    monkeypatch.setattr(editor, "gradients", gradients)
    editor.edit(EDITS)
    assert len(looks) == 4
