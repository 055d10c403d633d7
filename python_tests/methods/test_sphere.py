"""SPHERE's projection: its directions, what it leaves of a change, and that sums and journals do not know of it."""

from __future__ import annotations

import pytest
import torch
from support.sequences import FAST, ready, sequence
from support.workbench import EDITS, bench_of, editor_of, relative_error

import d4s
from d4s.change.projection import Projection, main_directions
from d4s.errors import ConfigError


def directions_by_the_equation(weight, share):
    """U Uᵀ by the eigenvectors of Ŵᵀ Ŵ / d_out, added until their share exceeds β."""
    unit = weight.double() / weight.double().norm(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh(unit.T @ unit / len(unit))
    found, total = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64), 0.0
    for value, vector in zip(values.flip(0), vectors.T.flip(0), strict=True):
        found, total = found + vector.outer(vector), total + float(value)
        if total > share * float(values.sum()):
            break
    return found


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_the_directions_are_those_of_the_equation(shape, seed):
    weight = torch.randn(shape) * torch.rand(shape[0], 1) * torch.linspace(0.1, 3, shape[1])
    for share in (0.0, 0.3, 0.5, 0.9):
        u = main_directions(weight, share)
        torch.testing.assert_close(u.T @ u, torch.eye(u.shape[1], dtype=torch.float64), atol=1e-9, rtol=0)
        torch.testing.assert_close(u @ u.T, directions_by_the_equation(weight, share), atol=1e-7, rtol=0)
    assert main_directions(weight, 1.0).shape[1] == 12


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_at_zero_nothing_changes_and_at_one_nothing_of_the_main_directions_is_left(model_type, seed):
    deltas, plain = [], bench_of(model_type, seed)
    for name, more in (("alphaedit", {}), ("sphere", {"delta_projection": [0.0, 0.5]}), ("sphere", {})):
        editor = editor_of(name, bench_of(model_type, seed), **more)
        editor.edit(EDITS)
        deltas.append({layer: editor.weights.delta(layer) for layer in editor.weights.layers})
    full = editor_of("sphere", bench_of(model_type, seed), delta_projection=[1.0, 0.5])
    full.edit(EDITS)
    for layer, delta in deltas[0].items():
        assert torch.equal(delta, deltas[1][layer])
        assert not torch.equal(delta, deltas[2][layer])
        weight = plain.anatomy.weight(layer).detach()
        u = main_directions(weight.T if plain.anatomy.transposed(layer) else weight, 0.5)
        left = full.weights.delta(layer)
        rounding = 1e-6 * float(weight.norm())  # of float32 weights
        assert float((left @ u).norm()) <= 1e-4 * float(left.norm()) + rounding
        assert float((delta @ u).norm()) > 0


@pytest.mark.parametrize("name", ["d4s", "memit", "memit-seq"])
@pytest.mark.parametrize("layers", [(1,), (0, 1)])
def test_each_step_is_projected(name, layers, seed):
    """W += r kᵀ (λC + B)⁻¹ (I − α U Uᵀ), one edit at a time, r measured on W, as the release does."""
    config = dict(layers=layers, prior_weight=50.0, learning_rate=0.1, steps=5, contexts=0, anchor="current")
    if name != "d4s":
        del config["anchor"]
    bench = bench_of("gpt2", seed)
    editor = editor_of(name, bench, delta_projection=(0.7, 0.4), **config)
    base = {layer: bench.anatomy.weight(layer).detach().T.double() for layer in layers}
    spared = {
        layer: torch.eye(w.shape[1], dtype=torch.float64) - 0.7 * directions_by_the_equation(w, 0.4)
        for layer, w in base.items()
    }
    sums = {
        layer: 50.0 * (c + 0.1 * c.diagonal().mean() * torch.eye(len(c)))
        for layer, c in editor.second_moments().items()
    }
    for edit in EDITS:
        targets, rows, bare = editor.targets([edit]), editor.rows([edit]), editor.bare_rows([edit])
        for i, layer in enumerate(layers):
            k = editor.keys(rows, layer)
            r = (targets.target.double() - editor.state(bare)) / (len(layers) - i)
            with_this = sums[layer] + k.T @ k
            step = torch.linalg.solve(with_this, k.T @ r).T @ spared[layer]
            editor.weights.write_(layer, editor.weights.delta(layer) + step)
            if name != "memit":
                sums[layer] = with_this
    truth = {layer: editor.weights.delta(layer) for layer in layers}
    editor.restore()
    for edit in EDITS:
        editor.edit([edit])
    for layer in layers:
        assert relative_error(editor.weights.delta(layer), truth[layer]) <= 1e-3


def test_a_journal_takes_an_edit_out_of_projected_weights(tmp_path, seed):
    """One layer by the paper's rule, where a sequence without the edit is the truth."""
    from support.sequences import EDITS as SEVEN

    config = FAST | dict(layers=[1], residual="once", delta_projection=[0.8, 0.5])
    model, covariance = ready(seed)
    whole = sequence(model, covariance, SEVEN, config=config, journal=tmp_path / "j", evaluate_every=7)
    journal = d4s.Journal(tmp_path / "j")
    (name,) = journal.weights()
    found = dict(model.named_parameters())[name].detach().clone()
    assert torch.equal(journal.weights()[name], found)
    (change,) = journal.changes()
    factors, delta = change.factors, whole.editor.weights.delta(1)
    assert relative_error(factors.u * factors.singular[: factors.rank] @ factors.vt, delta) <= 1e-4
    whole.restore()
    journal.undo(SEVEN[2].id)
    rest = [edit for edit in SEVEN if edit.id != SEVEN[2].id]
    sequence(model, covariance, rest, config=config, evaluate_every=7)
    right_one = dict(model.named_parameters())[name].detach()
    assert not torch.equal(right_one, found)
    torch.testing.assert_close(journal.weights()[name], right_one, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("given", [[0.5], [0.5, 0.5, 0.5], [1.5, 0.5], [0.5, -0.1], 0.5, "all"])
def test_a_projection_that_makes_no_sense_is_refused(given, seed):
    with pytest.raises(ConfigError, match="delta_projection"):
        editor_of("d4s", bench_of("gpt2", seed), delta_projection=given)


def test_a_projection_is_linear(seed):
    projection = Projection(torch.randn(6, 9), 0.3, 0.5)
    one, other = torch.randn(2, 6, 9, dtype=torch.float64)
    torch.testing.assert_close(projection(one + other), projection(one) + projection(other))
