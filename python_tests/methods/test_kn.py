"""Knowledge neurons: completeness of the attributions, the choice of neurons, and what is written."""

from __future__ import annotations

from dataclasses import replace

import numpy
import pytest
import torch
from support.tiny import tiny_model, tiny_tokenizer
from support.workbench import EDITS, bench_of, editor_of, relative_error

from d4s.models.architectures import Anatomy
from d4s.models.prompts import prompt_and_target_ids


def probability(bench, ids, layer, token, share):
    """p(token) with the layer's neurons at the last position scaled by `share`."""

    def scale(_module, arguments):
        inputs = arguments[0].clone()
        inputs[:, -1] *= share
        return (inputs,)

    handle = bench.anatomy.projection(layer).register_forward_pre_hook(scale)
    with torch.no_grad():
        logits = bench.model(input_ids=torch.tensor([ids])).logits[0, -1]
    handle.remove()
    return float(logits.double().softmax(-1)[token])


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_attributions_sum_to_the_change_of_probability(model_type, seed):
    bench = bench_of(model_type, seed)
    bench.model.requires_grad_(False)
    editor = editor_of("kn", bench)
    assert editor.method.steps == 20
    ids = tiny_tokenizer()(EDITS[0].text)["input_ids"]
    token = int(editor.last_probabilities(ids).argmax())
    for layer in range(3):
        path = [probability(bench, ids, layer, token, share / 40) for share in range(41)]
        # The midpoint rule with m = 20 against its own p on a grid twice as fine: what curvature there is.
        bends = sum(abs(path[i] - 2 * path[i + 1] + path[i + 2]) for i in range(39))
        total = float(editor.attributions(ids, layer, token).sum())
        assert abs(total - (path[-1] - path[0])) <= 0.1 * bends + 1e-5


def integral(model, projection, ids, token):
    """w̄ ⊙ ∫ ∂p/∂w (α w̄) dα by Gauss and Legendre's rule of 40 points, on a float64 model through a hook of its own."""
    neurons: list[torch.Tensor] = []

    def scaled(_module, arguments):
        inputs = arguments[0].clone()
        if not neurons:  # the first pass is the model's own
            neurons.append(inputs[0, -1].detach())
        else:
            inputs[0, -1] = point
        return (inputs,)

    handle = projection.register_forward_pre_hook(scaled)
    model(input_ids=torch.tensor([ids]))
    total = torch.zeros_like(neurons[0])
    for place, weight in zip(*numpy.polynomial.legendre.leggauss(40), strict=True):
        point = ((place + 1) / 2 * neurons[0]).requires_grad_(True)  # from [−1, 1] to [0, 1]
        p = model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)[token]
        total += weight / 2 * torch.autograd.grad(p, point)[0]
    handle.remove()
    return neurons[0] * total


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_twenty_steps_are_near_the_integral_for_each_neuron(model_type, seed):
    bench = bench_of(model_type, seed)
    bench.model.requires_grad_(False)
    editor = editor_of("kn", bench)
    ids = tiny_tokenizer()(EDITS[0].text)["input_ids"]
    token = int(editor.last_probabilities(ids).argmax())
    model = tiny_model(model_type, seed, torch.float64)
    exact = integral(model, Anatomy(model).projection(1), ids, token)
    assert relative_error(editor.attributions(ids, 1, token), exact) <= 0.02


def test_neurons_are_kept_by_threshold_and_share(seed, monkeypatch):
    editor = editor_of("kn", bench_of("gpt2", seed), layers=(0, 2))
    found = {  # text → layer → attributions
        1: {0: [1.0, 0.19, 0.0, -3.0], 2: [0.5, 0.0, 0.21, 0.0]},
        2: {0: [0.3, 0.0, 1.0, 0.0], 2: [0.0, 0.0, 0.9, 0.0]},
        3: {0: [2.0, 0.1, 0.0, 0.0], 2: [2.0, 0.0, 0.5, 0.0]},
    }
    monkeypatch.setattr(editor, "attributions", lambda ids, layer, _token: torch.tensor(found[ids[0]][layer]))
    assert editor.shared_neurons([[1]], 7) == {0: [0], 2: [0, 2]}
    # Of three texts more than .7 are all three.
    assert editor.shared_neurons([[1], [2], [3]], 7) == {0: [0], 2: [2]}


def test_columns_trade_the_old_embedding_for_the_new(seed, monkeypatch):
    bench = bench_of("gpt2", seed)
    editor = editor_of("kn", bench, layers=(0, 2))
    edit = EDITS[0]
    old, new = (
        prompt_and_target_ids(tiny_tokenizer(), edit.text, text)[1][0]
        for text in (edit.target_true, edit.target_new)
    )
    asked = []

    def chosen(texts, token):
        asked.append((len(texts), token))
        return {2: chosen_ones}

    monkeypatch.setattr(editor, "shared_neurons", chosen)
    seen = []
    hook = editor.anatomy.projection(2).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        bench.model(input_ids=tiny_tokenizer()(edit.text, return_tensors="pt")["input_ids"])
    hook.remove()
    neurons = seen[0].reshape(-1, seen[0].shape[-1])[-1]
    chosen_ones = [int(neurons.argmin()), int(neurons.argmax())]
    assert neurons[chosen_ones[0]] < 0 < neurons[chosen_ones[1]]  # both signs
    editor.edit([edit])
    assert asked == [(3, old)]
    assert not editor.weights.delta(0).any()
    w0 = editor.weights.base[2].double().T
    embeddings = bench.model.get_output_embeddings().weight.detach().double()
    expected = torch.zeros_like(w0)
    for i, s in zip(chosen_ones, (-1, 1), strict=True):
        expected[:, i] = (
            s
            * w0[:, i].norm()
            * sum(
                sign * embeddings[token] / embeddings[token].norm() for sign, token in ((-1, old), (1, new))
            )
        )
    torch.testing.assert_close(editor.weights.delta(2), expected, rtol=1e-4, atol=1e-6)


def test_without_an_old_answer_it_is_what_the_model_says(seed, monkeypatch):
    bench = bench_of("llama", seed)
    editor = editor_of("kn", bench)
    asked = []
    monkeypatch.setattr(
        editor, "shared_neurons", lambda texts, token: asked.append((len(texts), token)) or {}
    )
    edit = replace(EDITS[0], target_true=None)
    ids = tiny_tokenizer()(edit.text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        said = int(bench.model(input_ids=ids).logits[0, -1].argmax())
    editor.edit([edit])
    assert asked == [(3, said)]


def test_paraphrases_can_be_left_out(seed, monkeypatch):
    editor = editor_of("kn", bench_of("llama", seed), paraphrases=False)
    asked = []
    monkeypatch.setattr(editor, "shared_neurons", lambda texts, _token: asked.append(len(texts)) or {})
    editor.edit(EDITS[:1])
    assert asked == [1]
