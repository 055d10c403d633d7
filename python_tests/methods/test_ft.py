"""FT-L and FT-M: what each loss is, the bound, and Adam on Δ."""

from __future__ import annotations

import pytest
import torch
from support.tiny import tiny_tokenizer
from support.workbench import EDITS, bench_of, editor_of, relative_error

from d4s.methods import method_for
from d4s.models.prompts import prompt_and_target_ids
from d4s.models.scoring import score


def test_ft_m_scores_the_answer_token_by_token(seed):
    bench = bench_of("llama", seed)
    nll = [s[0].nll for s in score(bench.model, bench.tokenizer, [(e.text, [e.target_new]) for e in EDITS])]
    step = editor_of("ft-m", bench, steps=1).edit(EDITS)
    torch.testing.assert_close(
        torch.tensor(step.first_probability), torch.exp(-torch.tensor(nll)), rtol=1e-4, atol=0
    )


def test_ft_l_scores_every_token_from_the_prompts_last_position(seed):
    bench = bench_of("gpt2", seed)
    expected = []
    for edit in EDITS:
        prompt, target = prompt_and_target_ids(tiny_tokenizer(), edit.text, edit.target_new)
        with torch.no_grad():
            log_p = bench.model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        expected.append(log_p[target].mean().exp())
    step = editor_of("ft-l", bench, steps=1).edit(EDITS)
    torch.testing.assert_close(torch.tensor(step.first_probability), torch.stack(expected), rtol=1e-4, atol=0)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_it_is_adam_on_the_projection(model_type, seed):
    bench, twin = bench_of(model_type, seed), bench_of(model_type, seed)
    editor = editor_of("ft-m", bench, layers=(0, 2), steps=4, learning_rate=1e-3)
    editor.edit(EDITS[:2])
    weights = [twin.anatomy.weight(layer) for layer in (0, 2)]
    optimiser = torch.optim.Adam(weights, lr=1e-3)
    for _ in range(4):
        loss = 0
        for edit in EDITS[:2]:
            prompt, target = prompt_and_target_ids(tiny_tokenizer(), edit.text, edit.target_new)
            logits = twin.model(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
            loss = loss + torch.nn.functional.cross_entropy(logits, torch.tensor(target)) / 2
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for layer, weight in zip((0, 2), weights, strict=True):
        base = editor.weights.base[layer]
        assert relative_error(bench.anatomy.weight(layer).detach() - base, weight.detach() - base) <= 0.02


def test_with_its_end_the_loss_has_one_more_token_and_the_p_told_has_not(seed):
    bench, twin = bench_of("llama", seed), bench_of("llama", seed)
    editor = editor_of("ft-m", bench, layers=1, steps=2, learning_rate=1e-3, target_eos=True)
    step = editor.edit(EDITS)
    weight = twin.anatomy.weight(1)
    optimiser = torch.optim.Adam([weight], lr=1e-3)
    told = []
    for look in range(3):
        loss, nlls = 0, []
        for edit in EDITS:
            prompt, target = prompt_and_target_ids(tiny_tokenizer(), edit.text, edit.target_new)
            ended = [*target, tiny_tokenizer().eos_token_id]
            logits = twin.model(input_ids=torch.tensor([prompt + ended])).logits[0, len(prompt) - 1 : -1]
            nll = torch.nn.functional.cross_entropy(logits, torch.tensor(ended), reduction="none")
            loss = loss + nll.mean() / len(EDITS)
            nlls.append(nll[: len(target)].mean().detach())
        told.append(torch.exp(-torch.stack(nlls)))
        if look < 2:
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    moved = bench.anatomy.weight(1).detach() - editor.weights.base[1]
    assert relative_error(moved, weight.detach() - editor.weights.base[1]) <= 0.02
    torch.testing.assert_close(torch.tensor(step.first_probability), told[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.tensor(step.last_probability), told[2], rtol=2e-2, atol=0)


def test_ft_l_stays_within_epsilon_of_where_each_step_began(seed):
    bench = bench_of("llama", seed)
    editor = editor_of("ft-l", bench, layers=(0, 1), epsilon=2e-3, learning_rate=1e-3)
    for count in range(1, 4):
        before = {layer: editor.weights.delta(layer) for layer in (0, 1)}
        editor.edit(EDITS[count : count + 1])
        for layer, start in before.items():
            moved = float((editor.weights.delta(layer) - start).abs().max())
            assert 1.9e-3 < moved <= 2e-3 * (1 + 1e-3)
    drift = float(editor.weights.delta(1).abs().max())
    assert 2.1e-3 < drift <= 3 * 2e-3 * (1 + 1e-3), "over a sequence the bound is on each step alone"


def test_ft_l_w0_stays_within_epsilon_of_the_unedited_weights(seed):
    bench = bench_of("llama", seed)
    editor = editor_of("ft-l-w0", bench, layers=1, epsilon=2e-3, learning_rate=1e-3)
    for edit in EDITS:
        editor.edit([edit])
    largest = float(editor.weights.delta(1).abs().max())
    assert 1.9e-3 < largest <= 2e-3 * (1 + 1e-3)


def test_the_first_step_of_both_bounds_is_the_same(seed):
    found = []
    for name in ("ft-l", "ft-l-w0"):
        editor = editor_of(name, bench_of("gpt2", seed), layers=1, epsilon=1e-3, learning_rate=1e-3)
        editor.edit(EDITS)
        found.append(editor.deltas[1])
    assert torch.equal(*found)


def test_an_edit_that_is_known_is_skipped(seed):
    bench = bench_of("gpt2", seed)
    editor = editor_of("ft-m", bench, stop_loss=100.0)
    step = editor.edit(EDITS)
    assert step.first_probability == step.last_probability
    assert set(editor.weights.delta_norm().values()) == {0.0}


def test_half_precision_weights_are_rounded_from_a_float32_change(seed):
    bench = bench_of("gpt2", seed, torch.bfloat16)
    editor = editor_of("ft-m", bench, layers=1, learning_rate=1e-5, steps=10)
    base = bench.anatomy.weight(1).detach().clone()
    for edit in EDITS[:2]:
        editor.edit([edit])
    once = (base.double() + editor.deltas[1].T.double()).bfloat16()
    assert torch.equal(bench.anatomy.weight(1).detach(), once)
    assert float(editor.deltas[1].abs().max()) > 1e-4, "steps of 1e-5 have not added up"


def test_gradients_and_flags_of_the_model_are_left_alone(seed):
    bench = bench_of("llama", seed)
    bench.anatomy.weight(1).requires_grad_(False)
    bench.model.train()
    wanted = {name: p.requires_grad for name, p in bench.model.named_parameters()}
    editor_of("ft-m", bench, layers=(1, 2), steps=2).edit(EDITS[:1])
    assert bench.model.training
    assert {name: p.requires_grad for name, p in bench.model.named_parameters()} == wanted
    assert all(p.grad is None for p in bench.model.parameters())


@pytest.mark.parametrize(
    ("parameters", "epsilon"), [(1e5, 2e-3), (5e8, 2e-3), (6e8, 1e-3), (2e9, 5e-4), (4e9, 5e-5), (7e10, 5e-5)]
)
def test_the_bound_is_that_of_the_published_model_nearest_in_size(monkeypatch, seed, parameters, epsilon):
    anatomy = bench_of("llama", seed).anatomy
    assert method_for("ft-l", anatomy).epsilon == method_for("ft-l-w0", anatomy).epsilon == 2e-3
    weight = torch.nn.Parameter(torch.empty(int(parameters), device="meta"))
    monkeypatch.setattr(type(anatomy.model), "parameters", lambda self: iter([weight]))
    assert method_for("ft-l", anatomy).epsilon == epsilon
