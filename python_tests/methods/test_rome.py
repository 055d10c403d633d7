"""ROME, r-ROME and EMMET: their equations, and what ties them to MEMIT."""

from __future__ import annotations

import pytest
import torch
from support.workbench import EDITS, bench_of, editor_of, relative_error

from d4s.change.closed_form import Prior, solve
from d4s.methods.rome import rank_one

D_IN, D_OUT = 24, 10


def layer_problem(n):
    """Residuals [n, d_out], keys [n, d_in] and a covariance, float64."""
    samples = torch.randn(200, D_IN, dtype=torch.float64) * torch.rand(D_IN, dtype=torch.float64)
    residuals, keys = torch.randn(n, D_OUT + D_IN, dtype=torch.float64).split([D_OUT, D_IN], 1)
    return residuals, keys, samples.T @ samples / 200


def test_emmet_is_memit_with_the_prior_weight_epsilon_lambda(seed):
    residuals, keys, covariance = layer_problem(7)
    weight, epsilon = 300.0, 0.1
    whitened = torch.linalg.solve(weight * covariance, keys.T)  # C'⁻¹ K
    inner = keys @ whitened + epsilon * torch.eye(7, dtype=torch.float64)
    emmet = residuals.T @ torch.linalg.solve(inner, whitened.T)
    assert relative_error(solve(residuals, keys, Prior(covariance, epsilon * weight)), emmet) <= 1e-10


def test_an_emmet_edit_alone_arrives_whole_where_it_has_no_slack(seed):
    """The limit of ε → 0; several at once have the slack either way."""
    bench = bench_of("llama", seed)

    def changed(edits, **config):
        editor = editor_of("emmet", bench, layers=1, prior_weight=50.0, **config)
        keys = editor.keys(editor.rows(edits), 1)
        lacks = editor.targets(edits).target.double() - editor.state(editor.bare_rows(edits))
        editor.edit(edits)
        delta = editor.weights.delta(1).double()
        editor.restore()
        return delta, keys, lacks

    delta, keys, lacks = changed(EDITS[:1], slack_alone=False)
    assert relative_error(delta @ keys[0], lacks[0]) <= 1e-5
    assert relative_error(delta, changed(EDITS[:1], epsilon=1e-9)[0]) <= 1e-5
    assert relative_error(delta, changed(EDITS[:1])[0]) > 1e-3
    assert torch.equal(changed(EDITS, slack_alone=False)[0], changed(EDITS)[0])


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_the_emmet_editor_is_memit_in_one_layer(model_type, seed):
    bench = bench_of(model_type, seed)
    found = []
    for name, config in [
        ("emmet", dict(prior_weight=50.0, epsilon=0.2)),
        ("memit", dict(prior_weight=10.0)),
    ]:
        editor = editor_of(name, bench, layers=1, **config)
        editor.edit(EDITS)
        found.append(editor.weights.delta(1))
        editor.restore()
    assert found[0].norm() > 0
    assert relative_error(*found) <= 1e-5


def test_rome_is_emmet_with_one_edit_and_no_slack(seed):
    residuals, keys, covariance = layer_problem(1)
    rome = rank_one(residuals[0], keys[0], keys[0], Prior(covariance))
    for epsilon in (1e-6, 1e-9):
        error = relative_error(solve(residuals, keys, Prior(covariance, epsilon)), rome)
        assert error <= 10 * epsilon / float(keys @ torch.linalg.solve(covariance, keys.T))


def test_the_rank_one_change_maps_its_key_to_the_target(seed):
    residuals, keys, covariance = layer_problem(1)
    mean_key = keys[0] + 0.3 * torch.randn(D_IN, dtype=torch.float64)
    change = rank_one(residuals[0], keys[0], mean_key, Prior(covariance))
    torch.testing.assert_close(change @ keys[0], residuals[0], rtol=1e-9, atol=1e-9)
    direction = torch.linalg.solve(covariance, mean_key)
    assert torch.linalg.matrix_rank(torch.stack([change[0], direction]), rtol=1e-9) == 1


@pytest.mark.parametrize("name", ["rome", "r-rome"])
def test_each_name_takes_its_own_key(name, seed):
    """`rome`: k and v of the bare prompt; `r-rome`: means over the bare prompt and all contexts."""
    bench = bench_of("gpt2", seed)
    editor = editor_of(name, bench, layers=1, contexts=2, context_lengths=(5, 10))
    assert len(editor.prefixes) == 20
    edit = EDITS[0]
    bare = editor.bare_rows([edit])
    each = [editor.keys(bare, 1)] + [
        editor.keys(editor.bare_rows([_behind(prefix, edit)]), 1) for prefix in editor.prefixes
    ]
    mean_key = torch.cat(each).mean(0)
    k = each[0][0] if name == "rome" else mean_key
    w, bias = bench.anatomy.weight(1).detach().double().T, bench.anatomy.projection(1).bias.detach().double()
    residual = editor.targets([edit]).target[0].double() - (w @ k + bias)  # v* − W k
    covariance = editor.second_moments()[1]
    ridge = 0.1 * covariance.diagonal().mean() * torch.eye(len(covariance))
    u = torch.linalg.solve(covariance + ridge, mean_key)
    editor.edit([edit])
    assert relative_error(editor.weights.delta(1), residual.outer(u) / (k @ u)) <= 1e-3


def _behind(prefix, edit):
    return type(edit)(prompt=prefix + edit.prompt, subject=edit.subject, target_new=edit.target_new)


def test_identity_covariance_asks_for_no_statistics(seed):
    bench = bench_of("llama", seed)
    bench._covariance = None
    bench.covariance = lambda _layers: pytest.fail("statistics were asked for")
    editor = editor_of("r-rome", bench, layers=1, identity_covariance=True)
    editor.edit(EDITS[:1])
    key = editor.keys(editor.rows(EDITS[:1]), 1)[0]
    row = editor.weights.delta(1)[0]
    assert float(torch.cosine_similarity(row, key, dim=0).abs()) == pytest.approx(1.0, abs=1e-4)


def test_edits_of_one_batch_are_made_one_after_another(seed):
    bench = bench_of("llama", seed)
    editor = editor_of("rome", bench, layers=1)
    together = editor.edit(EDITS[:3])
    batch = editor.weights.current()[1]
    editor.restore()
    steps = [editor.edit([edit]) for edit in EDITS[:3]]
    assert torch.equal(editor.weights.current()[1], batch)
    assert together.last_probability == tuple(p for step in steps for p in step.last_probability)
