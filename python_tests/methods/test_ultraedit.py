"""UltraEdit: its statistics, the h and g it reads, and its equation."""

from __future__ import annotations

import pytest
import torch
from support.tiny import tiny_tokenizer
from support.workbench import EDITS, bench_of, editor_of, relative_error, same_bits, state_of

from d4s.errors import ConfigError
from d4s.methods.ultraedit import Moments
from d4s.models.prompts import prompt_and_target_ids


def test_lifelong_statistics_are_those_over_all_at_once(seed):
    rows = torch.randn(57, 12, dtype=torch.float64) * 3 + torch.randn(12, dtype=torch.float64) * 100
    moments = Moments(12, torch.device("cpu"))
    for part in rows.split([1, 1, 30, 5, 20]):
        moments.add_(part)
    assert float(moments.count) == 57
    torch.testing.assert_close(moments.mean, rows.mean(0), rtol=1e-12, atol=1e-12)
    expected = (rows - rows.mean(0)) / (rows.std(0) + 1e-7)
    torch.testing.assert_close(moments.normalised(rows), expected, rtol=1e-9, atol=1e-9)


def test_one_row_alone_is_its_own_mean(seed):
    moments = Moments(3, torch.device("cpu"))
    row = torch.randn(1, 3)
    moments.add_(row)
    assert not moments.normalised(row).any()


def plainly(bench, edit, layer, path=None):
    """(h, g) of one edit by a pass over it alone, with a gradient to the projection's output."""
    prompt, target = prompt_and_target_ids(tiny_tokenizer(), edit.text, edit.target_new)
    seen = {}

    def hook(_module, arguments, output):
        seen["h"] = arguments[0].detach()
        seen["out"] = output
        output.retain_grad()

    module = bench.anatomy.projection(layer)
    if path is not None:
        module = bench.anatomy.blocks[layer].get_submodule(path)
    handle = module.register_forward_hook(hook)
    logits = bench.model(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
    handle.remove()
    torch.nn.functional.cross_entropy(logits, torch.tensor(target)).backward()
    places = slice(len(prompt) - 1, len(prompt) + len(target) - 1)
    return seen["h"].reshape(-1, seen["h"].shape[-1])[places], seen["out"].grad[0, places]


PLACES = [
    ("gpt2", {0: None, 2: None}),
    ("llama", {0: None, 2: None}),
    ("llama", {0: "mlp.gate_proj", 1: "mlp.up_proj", 2: "mlp.down_proj"}),
    ("gpt2", {1: "mlp.c_fc", 2: "attn.c_proj"}),
]


@pytest.mark.parametrize(("model_type", "places"), PLACES)
def test_inputs_and_gradients_are_those_at_the_answer(model_type, places, seed):
    bench = bench_of(model_type, seed)
    paths = tuple(path for path in places.values() if path is not None)
    editor = editor_of("ultraedit", bench, layers=tuple(places), modules=paths)
    expected = {
        layer: [plainly(bench, edit, layer, path) for edit in EDITS] for layer, path in places.items()
    }
    bench.model.requires_grad_(False)
    _, inputs, gradients = editor.answers(EDITS)
    for layer, parts in expected.items():
        for found, want in (
            (inputs[layer], torch.cat([h for h, _ in parts])),
            (gradients[layer], torch.cat([g for _, g in parts])),
        ):
            # Edits of one length go together: rows may stand in another order.
            assert found.shape == want.shape
            torch.testing.assert_close(found.T @ found, want.T @ want, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(found.sum(0), want.sum(0), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("model_type", "places"), PLACES[2:])
def test_the_modules_that_are_named_are_changed_and_no_others(model_type, places, seed):
    bench = bench_of(model_type, seed)
    before = state_of(bench)
    editor = editor_of(
        "ultraedit", bench, layers=list(places), modules=list(places.values()), learning_rate=1e-2
    )
    editor.edit(EDITS)
    after = state_of(bench)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    blocks = bench.anatomy.architecture.blocks
    assert changed == {f"{blocks}.{layer}.{path}.weight" for layer, path in places.items()}
    for layer in places:
        name = editor.anatomy.weight_name(layer)
        stored = (after[name] - before[name]).double()
        stored = stored.T if editor.anatomy.transposed(layer) else stored
        assert relative_error(editor.deltas[layer], stored) <= 1e-4
        assert editor.weights.delta_norm()[layer] == pytest.approx(float(stored.norm()), rel=1e-4)
    state = editor.state_dict()
    editor.restore()
    assert same_bits(before, state_of(bench))
    editor.load_state_dict(state)
    assert same_bits(after, state_of(bench))


def test_modules_that_do_not_fit_are_refused(seed):
    bench = bench_of("llama", seed)
    before = state_of(bench)
    for config, text in (
        (dict(layers=(0, 1), modules=["mlp.up_proj"]), r"one for each of layers=\[0, 1\]"),
        (
            dict(layers=1, modules="mlp.up_porj"),
            r"model\.layers\.1 'mlp.up_porj'.*Did you mean 'mlp.up_proj'",
        ),
        (dict(layers=1, modules="mlp"), r"unknown projection of model\.layers\.1 'mlp'"),
        (dict(layers=7, modules="mlp.up_proj"), r"layers=\[7\]"),
        (dict(layers=1, modules=[3]), "modules is"),
    ):
        with pytest.raises(ConfigError, match=text):
            editor_of("ultraedit", bench, **config)
    assert same_bits(before, state_of(bench))


def test_statistics_of_a_run_do_not_depend_on_its_steps(seed):
    found = []
    for batches in ([EDITS], [EDITS[:1], EDITS[1:3], EDITS[3:]]):
        editor = editor_of("ultraedit", bench_of("llama", seed), learning_rate=0.0)
        for batch in batches:
            editor.edit(batch)
        (moments,) = editor.moments.values()
        found.append(moments)
    assert float(found[0].count) == float(found[1].count)
    torch.testing.assert_close(found[0].mean, found[1].mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[0].squares, found[1].squares, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("layers", [(1,), (0, 1, 2)])
def test_the_editor_follows_its_equation_over_several_turns(layers, seed):
    """Layers of one shape share mean and deviation, and all of a turn's tokens are in them before any is used."""
    bench = bench_of("gpt2", seed)
    editor = editor_of("ultraedit", bench, layers=layers, learning_rate=1e-3)
    seen, truth = [], {layer: torch.zeros(32, 48, dtype=torch.float64) for layer in layers}
    for batch in (EDITS[:2], EDITS[2:]):
        bench.model.requires_grad_(False)
        _, inputs, gradients = editor.answers(batch)
        turn = {layer: torch.cat([inputs[layer], gradients[layer]], 1).double() for layer in layers}
        seen += turn.values()
        tokens = torch.cat(seen)
        for layer in layers:
            h_hat, g_hat = ((turn[layer] - tokens.mean(0)) / (tokens.std(0) + 1e-7)).split([48, 32], 1)
            v = -1e-3 * h_hat.square().sum(1, keepdim=True) * g_hat
            h = turn[layer][:, :48]
            left = h.T @ h + torch.eye(48, dtype=torch.float64)
            truth[layer] += torch.linalg.solve(left, h.T @ v).T
        editor.edit(batch)
        for layer in layers:
            assert relative_error(editor.weights.delta(layer), truth[layer]) <= 1e-4


def test_projections_of_several_shapes_have_statistics_of_their_own(seed):
    places = {0: "mlp.gate_proj", 1: "mlp.up_proj", 2: "mlp.down_proj"}
    bench = bench_of("llama", seed)
    editor = editor_of("ultraedit", bench, layers=tuple(places), modules=tuple(places.values()))
    editor.edit(EDITS)
    tokens = len(editor.answers(EDITS)[1][0])
    assert sorted(float(one.count) for one in editor.moments.values()) == [tokens, 2 * tokens]


def test_steps_smaller_than_a_half_precision_weight_shows_add_up(seed):
    editor = editor_of("ultraedit", bench_of("llama", seed, torch.bfloat16), layers=1, learning_rate=1e-6)
    editor.edit(EDITS)
    once = editor.deltas[1].clone()
    editor.edit(EDITS)
    assert 0 < once.norm() < editor.deltas[1].norm()
