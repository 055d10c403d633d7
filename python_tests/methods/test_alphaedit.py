"""AlphaEdit's solve over projected keys against the paper's equation, and what it is without a projection."""

from __future__ import annotations

import pytest
import torch
from support.workbench import EDITS, bench_of, editor_of, relative_error

from d4s.change.closed_form import ClosedForm, Prior
from d4s.errors import ConfigError
from d4s.methods.alphaedit import AlphaEditEditor, protected_directions

D_IN, D_OUT, L2 = 24, 10, 3.0


def covariance_with_null_space(rank):
    samples = torch.randn(300, rank, dtype=torch.float64) @ torch.randn(rank, D_IN, dtype=torch.float64)
    return samples.T @ samples / 300 + 1e-6 * torch.eye(D_IN, dtype=torch.float64)


def direct(residuals, keys, projection, previous):
    """[P (K Kᵀ + C_p) + L2·I] X = P K Rᵀ, ΔW = Xᵀ, as it stands."""
    left = projection @ (keys.T @ keys + previous) + L2 * torch.eye(D_IN, dtype=torch.float64)
    return torch.linalg.solve(left, projection @ keys.T @ residuals).T


def over_columns(residuals, keys, projection, old_keys):
    """X = Q (QᵀQ + L2·I)⁻¹ E Rᵀ with Q = P [K_prev, K]: the other cheap form, which grows with the edits."""
    q = projection @ torch.cat([old_keys, keys]).T
    inner = q.T @ q + L2 * torch.eye(q.shape[1], dtype=torch.float64)
    selected = torch.cat([torch.zeros(len(old_keys), D_OUT, dtype=torch.float64), residuals])
    return (q @ torch.linalg.solve(inner, selected)).T


def test_the_sums_over_projected_keys_solve_the_papers_equation(seed):
    protected = protected_directions(covariance_with_null_space(9), 2e-2, False, 0)
    assert protected.shape == (D_IN, 9)
    projection = torch.eye(D_IN, dtype=torch.float64) - protected @ protected.T
    sums = ClosedForm({0: Prior.identity(D_IN, L2)}, D_OUT)
    previous = torch.zeros(D_IN, D_IN, dtype=torch.float64)
    old_keys = torch.zeros(0, D_IN, dtype=torch.float64)
    truth = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    for n in (1, 3, 1, 5, 1, 1):
        residuals, keys, again = torch.randn(n, D_OUT + 2 * D_IN, dtype=torch.float64).split(
            [D_OUT, D_IN, D_IN], 1
        )
        change = direct(residuals, keys, projection, previous)
        assert relative_error(over_columns(residuals, keys, projection, old_keys), change) <= 1e-11
        truth += change
        projected, retaken = keys @ projection, again @ projection
        sums.add_(residuals + projected @ sums.delta(0).T, projected, 0)
        assert relative_error(sums.delta(0), truth) <= 1e-10
        # `again` stands for the keys as they are after the edit.
        delta = sums.delta(0).clone()
        sums.add_(retaken @ delta.T, retaken, 0)
        sums.subtract_(projected @ delta.T, projected, 0)
        assert relative_error(sums.delta(0), truth) <= 1e-10, "exchanging keys must change nothing"
        previous += again.T @ again
        old_keys = torch.cat([old_keys, again])


@pytest.mark.parametrize("layers", [(1,), (0, 1)])
def test_the_editor_follows_the_papers_equation(layers, seed):
    """Keys, targets and residuals from the editor's own plumbing; solves, null space and sums written out."""
    bench = bench_of("llama", seed)
    config = dict(layers=layers, l2=L2, null_space_threshold=1.0, learning_rate=0.1, steps=5)
    editor = editor_of("alphaedit", bench, **config)
    projections, previous = {}, {}
    for layer, c in editor.second_moments().items():
        values, vectors = torch.linalg.eigh(c)
        null = vectors[:, values < values.mean()]
        projections[layer] = null @ null.T
        previous[layer] = torch.zeros_like(c)
    plain = super(type(editor), editor).keys  # without the projection
    for batch in (EDITS[:2], EDITS[2:3], EDITS[3:]):
        targets = editor.targets(batch)
        rows, bare = editor.rows(batch), editor.bare_rows(batch)
        for i, layer in enumerate(layers):
            k = plain(rows, layer)
            r = (targets.target.double() - editor.state(bare)) / (len(layers) - i)
            left = projections[layer] @ (k.T @ k + previous[layer]) + L2 * torch.eye(k.shape[1])
            change = torch.linalg.solve(left, projections[layer] @ k.T @ r).T
            editor.weights.write_(layer, editor.weights.delta(layer) + change)
        for layer in layers:
            k = plain(rows, layer)
            previous[layer] += k.T @ k
    truth = {layer: editor.weights.delta(layer) for layer in layers}
    editor.restore()
    for batch in (EDITS[:2], EDITS[2:3], EDITS[3:]):
        editor.edit(batch)
    for layer in layers:
        assert relative_error(editor.weights.delta(layer), truth[layer]) <= 1e-3


class Exchanging(AlphaEditEditor):
    """C_p as the paper words it: after each step its keys are exchanged for those taken again on the edited weights."""

    def apply(self, batch):
        taken, self.exchanged = [], []
        plain = self.closed_form.add_
        self.closed_form.add_ = lambda residuals, keys, layer: (
            taken.append((layer, keys)),
            plain(residuals, keys, layer),
        )
        step = super().apply(batch)
        del self.closed_form.add_
        rows = self.rows(batch)
        for layer, before in taken:
            delta, now = self.closed_form.delta(layer).clone(), self.keys(rows, layer)
            self.exchanged.append(relative_error(now, before))
            self.closed_form.add_(now @ delta.T, now, layer)
            self.closed_form.subtract_(before @ delta.T, before, layer)
        return step


@pytest.mark.parametrize("model_type", ["llama", "gptj"])
def test_keys_taken_again_after_the_write_change_nothing(model_type, seed):
    bench = bench_of(model_type, seed)
    config = dict(layers=(0, 1, 2), learning_rate=0.1, steps=4, contexts=1)
    editor = editor_of("alphaedit", bench, **config)
    deltas = []
    for run in (editor, Exchanging(editor.method, bench)):
        for batch in (EDITS[:1], EDITS[1:3], EDITS[3:]):
            run.edit(batch)
        deltas.append({layer: delta.clone() for layer, delta in run.closed_form.deltas().items()})
        if isinstance(run, Exchanging):
            assert len(run.exchanged) == 3 and max(run.exchanged) <= 1e-5
        run.restore()
    for layer, delta in deltas[0].items():
        assert delta.norm() > 0 and relative_error(deltas[1][layer], delta) <= 1e-5


def test_it_runs_the_model_as_often_as_cached_memit(seed):
    """Both take targets, keys and states; nothing is left to run once the last layer is written."""
    runs = []
    for name in ("memit-seq", "alphaedit"):
        bench, count = bench_of("llama", seed), [0]
        editor = editor_of(name, bench, layers=(0, 1, 2), learning_rate=0.1, steps=3)

        def counted(*_, count=count):
            count[0] += 1

        bench.anatomy.blocks[0].register_forward_pre_hook(counted)
        editor.edit(EDITS[:2])
        runs.append(count[0])
    assert runs[1] == runs[0] > 0


def test_without_a_projection_it_is_cached_memit_with_an_identity_prior(seed):
    bench = bench_of("gpt2", seed)
    config = dict(layers=1, learning_rate=0.1, steps=5)
    editor = editor_of("alphaedit", bench, l2=L2, null_space_threshold=1e9, **config)
    assert editor.protected[1].shape[1] == 0  # P = I
    cached = editor_of("memit-seq", bench, **config)
    cached._priors = {1: Prior.identity(bench.anatomy.shape(1)[1], L2)}
    cached.reset()
    found = []
    for run in (editor, cached):
        for batch in (EDITS[:1], EDITS[1:3], EDITS[3:]):
            run.edit(batch)
        found.append(run.weights.delta(1))
        run.restore()
    assert found[0].norm() > 0
    assert relative_error(*found) <= 1e-4


def test_the_change_does_not_touch_what_is_protected(seed):
    bench = bench_of("gpt2", seed)
    editor = editor_of("alphaedit", bench, layers=(0, 1))
    moments = editor.second_moments()
    for edit in EDITS:
        editor.edit([edit])
    for layer, delta in editor.closed_form.deltas().items():
        values, vectors = torch.linalg.eigh(moments[layer])
        protected = vectors[:, values >= values.mean()]  # a relative threshold of 1
        assert 0 < protected.shape[1] < len(values) and delta.norm() > 0
        assert (delta @ protected).norm() <= 1e-9 * delta.norm()


def test_a_covariance_without_a_null_space_is_an_error_that_names_its_eigenvalues(seed):
    with pytest.raises(ConfigError, match=r"layer 5.*eigenvalues from"):
        protected_directions(torch.eye(D_IN, dtype=torch.float64), 2e-2, False, 5)


def test_a_relative_threshold_does_not_depend_on_scale(seed):
    covariance = covariance_with_null_space(9)
    small = protected_directions(covariance * 1e-7, 2e-2, True, 0)
    assert small.shape == protected_directions(covariance, 2e-2, True, 0).shape
