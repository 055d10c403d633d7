"""PMET and ENCORE: how the search for a target ends, and PMET's spreading of the residual."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.tiny import tiny_model, tiny_tokenizer
from support.workbench import SUBJECT_LAST, bench_of, editor_of, relative_error

from d4s.locate.targets import TargetConfig, optimise_targets
from d4s.methods import method_for
from d4s.models.architectures import Anatomy
from d4s.models.trace import Trace

FREE = TargetConfig(steps=14, learning_rate=1.0, weight_decay=0.0, clamp=30.0, kl_factor=0.0, stop_loss=0.0)
EDIT = replace(SUBJECT_LAST[0], target_new="I")  # one token in the tiny vocabulary


def deltas_after(anatomy, config, steps):
    """δ of a search that ends after each number of steps."""
    return [target(anatomy, replace(config, steps=count)).delta[0] for count in steps]


def target(anatomy, config):
    return optimise_targets(anatomy, tiny_tokenizer(), [EDIT], (), 1, config)


def is_argmax(anatomy, delta):
    """Whether the target is what the model says with δ added, seen through a hook of its own."""
    ids = tiny_tokenizer()(EDIT.text, return_tensors="pt")["input_ids"]

    def plus(output):
        return torch.cat([output[:, :-1], output[:, -1:] + delta], 1)

    with Trace(anatomy.blocks[1], edit=plus), torch.no_grad():
        said = int(anatomy.model(input_ids=ids).logits[0, -1].argmax())
    return said == tiny_tokenizer()(f"{EDIT.text} I")["input_ids"][-1]


@pytest.fixture
def settled(seed):
    """(anatomy, δ after 0 … 14 steps, the first step from which the target is the argmax and stays so)."""
    anatomy = Anatomy(tiny_model("gpt2", seed))
    deltas = [torch.zeros(32), *deltas_after(anatomy, FREE, range(1, 15))]
    hits = [is_argmax(anatomy, delta) for delta in deltas]
    first = hits.index(True)
    assert all(hits[first : first + 5]), "the target does not stay the argmax"
    return anatomy, deltas, first


def test_encore_ends_a_few_steps_after_the_target_is_the_argmax(settled):
    anatomy, deltas, first = settled
    for after in (0, 2, 4):
        found = target(anatomy, replace(FREE, stop_after_argmax=after)).delta[0]
        torch.testing.assert_close(found, deltas[first + after], rtol=1e-4, atol=1e-5)


def test_pmet_ends_when_a_settled_target_disturbs_little(settled):
    anatomy, deltas, first = settled
    found = target(anatomy, replace(FREE, settled_kl=1e9)).delta[0]
    torch.testing.assert_close(found, deltas[first], rtol=1e-4, atol=1e-5)
    never = target(anatomy, replace(FREE, settled_kl=-1.0)).delta[0]
    torch.testing.assert_close(never, deltas[-1], rtol=1e-4, atol=1e-5)


def test_pmet_weighs_the_nll_less_once_the_target_is_settled(settled):
    anatomy, deltas, first = settled
    lighter = (
        deltas_after(anatomy, replace(FREE, settled_nll_factor=0.1), (first, first + 2)) if first else None
    )
    if lighter is None:
        pytest.skip("the target is the argmax from the start")
    torch.testing.assert_close(lighter[0], deltas[first], rtol=1e-4, atol=1e-5)
    assert relative_error(lighter[1], deltas[first + 2]) > 1e-3


def test_presets_name_these_rules(seed):
    anatomy = Anatomy(tiny_model("llama", seed))
    pmet, encore = method_for("pmet", anatomy), method_for("encore", anatomy)
    assert (pmet.target.settled_nll_factor, pmet.target.settled_kl) == (0.1, 0.01)
    assert pmet.target.kl_factor == 1.0 and encore.target.kl_factor == 0.0625  # the authors' and MEMIT's
    assert encore.target.stop_after_argmax == 2


def test_pmet_spreads_the_mlps_residual_by_the_square_root(seed):
    bench = bench_of("llama", seed)
    editor = editor_of("pmet", bench, layers=(0, 1), prior_weight=20.0, learning_rate=0.1, steps=4)
    targets = editor.targets(SUBJECT_LAST)
    both = optimise_targets(
        bench.anatomy,
        bench.tokenizer,
        SUBJECT_LAST,
        editor.prefixes,
        1,
        editor.method.target,
        places=("mlp", "attention"),
    )
    torch.testing.assert_close(targets.delta, both.delta)
    rows, bare, moments = editor.rows(SUBJECT_LAST), editor.bare_rows(SUBJECT_LAST), editor.second_moments()
    for layer, share in ((0, 2**0.5), (1, 1.0)):
        residuals = (targets.target.double() - editor.state(bare)) / share
        keys, c = editor.keys(rows, layer), moments[layer]
        prior = 20.0 * (
            c + 0.1 * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype)
        )  # λ, and a ridge of .1
        change = torch.linalg.solve(prior + keys.T @ keys, keys.T @ residuals).T  # R Kᵀ (λC + K Kᵀ)⁻¹
        editor.weights.write_(layer, change)
    truth = {layer: editor.weights.delta(layer) for layer in (0, 1)}
    editor.restore()
    editor.edit(SUBJECT_LAST)
    for layer in (0, 1):
        assert relative_error(editor.weights.delta(layer), truth[layer]) <= 1e-4
