"""D4S with a key of each context: the least-squares problem that it says it solves, written out, and what leaves it."""

from __future__ import annotations

import numpy
import pytest
import torch
from support.sequences import FAST, ready, sequence
from support.undoing import goes_on_and_takes_back
from support.workbench import EDITS, bench_of, editor_of, relative_error

from d4s.edits import Edit
from d4s.errors import ConfigError
from d4s.locate.keys import keys_at, output_at
from d4s.methods import method_for
from d4s.models.architectures import Anatomy
from d4s.study.plan import plan
from d4s.study.planned import VECTORS
from d4s.study.tuned_fields import SEARCHED

EACH = dict(context_keys="each", contexts=1, prior_weight=5.0, ridge=0.1, learning_rate=0.1)


def of_each(editor, edits, layer=None):
    """Keys (or, without a layer, states) of one text after another. [rows, features] numpy float64"""
    found = []
    for edit in edits:
        for prefix in ("", *editor.prefixes):
            alone = editor.bare_rows([Edit(prefix + edit.prompt, edit.subject, edit.target_new)])
            if layer is None:
                found.append(output_at(editor.anatomy, alone, editor.anatomy.blocks[editor.last]))
            else:
                found.append(keys_at(editor.anatomy, alone, layer))
    return torch.cat(found).double().numpy()


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
@pytest.mark.parametrize("rule", [dict(residual="once"), dict(residual="measured"), dict(anchor="current")])
def test_a_batch_is_the_weighted_least_squares_problem_over_all_contexts(model_type, rule, seed):
    bench = bench_of(model_type, seed)
    statistics = bench.covariance((0, 1))
    editor = editor_of("d4s", bench, layers=(0, 1), **EACH, **rule)
    editor.edit(EDITS)
    written = {layer: editor.weights.delta(layer).double().numpy() for layer in (0, 1)}
    editor.restore()

    targets = editor.targets(EDITS)
    count = 1 + len(editor.prefixes)
    weights = numpy.tile([0.5] + [0.5 / (count - 1)] * (count - 1), len(EDITS))
    delta = numpy.repeat(targets.delta.double().numpy(), count, 0)
    goals = of_each(editor, EDITS) + delta
    for share, layer in ((2, 0), (1, 1)):
        keys = of_each(editor, EDITS, layer)
        left = delta if rule.get("residual") == "once" else goals - of_each(editor, EDITS)
        c = statistics.mean(layer).double().numpy()
        prior = 5.0 * (c + 0.1 * c.diagonal().mean() * numpy.eye(len(c)))
        normal = prior + (keys * weights[:, None]).T @ keys
        wanted = numpy.linalg.solve(normal, (keys * weights[:, None]).T @ left / share).T
        assert relative_error(torch.from_numpy(written[layer]), torch.from_numpy(wanted)) <= 1e-3
        change = torch.from_numpy(wanted).to(editor.weights.base[layer])
        editor.weights.write_(layer, change)


def test_without_contexts_both_are_one(seed):
    for rule in ({}, dict(anchor="current"), dict(refine_looks=2)):
        found = []
        for keys in ("mean", "each"):
            bench = bench_of("llama", seed)
            editor = editor_of("d4s", bench, **EACH | dict(contexts=0, context_keys=keys), **rule)
            for edit in EDITS:
                editor.edit([edit])
            found.append(torch.cat([editor.weights.delta(i).flatten() for i in editor.weights.layers]))
        assert relative_error(found[1], found[0]) <= 1e-3


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2"])
def test_in_one_layer_a_sequence_is_its_batch(model_type, seed):
    bench = bench_of(model_type, seed)
    found = []
    for rule, size in (("once", 1), ("measured", 1), ("measured", len(EDITS))):
        editor = editor_of("d4s", bench, layers=(1,), residual=rule, **EACH)
        for at in range(0, len(EDITS), size):
            editor.edit(EDITS[at : at + size])
        found.append(editor.weights.delta(1))
        editor.restore()
    assert relative_error(found[1], found[0]) <= 1e-3
    assert relative_error(found[2], found[0]) <= 1e-3


def test_with_a_light_prior_every_context_arrives_where_the_mean_leaves_some_short(seed):
    """What is left of h_j + δ after the step, at the context that lacks most, relative to δ."""
    left = {}
    for keys in ("mean", "each"):
        bench = bench_of("llama", seed)
        config = EACH | dict(context_keys=keys, layers=(1,), prior_weight=1e-4, residual="measured")
        editor = editor_of("d4s", bench, **config)
        targets = editor.targets(EDITS[:1])
        goals = of_each(editor, EDITS[:1]) + targets.delta.double().numpy()
        editor.edit(EDITS[:1])
        rest = numpy.linalg.norm(goals - of_each(editor, EDITS[:1]), axis=1)
        left[keys] = rest.max() / float(targets.delta.norm())
    assert left["each"] < 0.5 * left["mean"]


@pytest.mark.parametrize("rule", [dict(residual="once"), dict(residual="measured"), dict(anchor="current")])
def test_a_fact_that_goes_back_and_forth_leaves_the_weights_bounded(rule, seed):
    bench = bench_of("llama", seed, num_hidden_layers=12)
    editor = method_for("d4s", bench.anatomy, rule | dict(context_keys="each")).editor(bench)
    growth = []
    for i in range(8):
        fact = Edit(EDITS[0].prompt, EDITS[0].subject, ("English", "Paris")[i % 2], id=f"{i}")
        editor.edit([fact])
        growth.append(max(editor.weights.delta_norm().values()))
    assert growth[-1] < 5 * max(growth[:2]), growth


def test_its_journal_goes_on_and_takes_single_edits_back(monkeypatch, tmp_path, seed):
    goes_on_and_takes_back(
        FAST | dict(context_keys="each", contexts=1, layers=[1]), monkeypatch, tmp_path, seed
    )


def test_plan_and_journal_count_a_row_a_context(tmp_path, seed):
    model, covariance = ready(seed)
    config = FAST | dict(contexts=1)
    sizes = {}
    for keys in ("mean", "each"):
        method = method_for("d4s", Anatomy(model), config | dict(context_keys=keys))
        (sizes[keys],) = (part.bytes for part in plan(model, method, 7).parts if part.name == VECTORS)
    assert sizes["each"] == 6 * sizes["mean"]
    sequence(model, covariance, config=config | dict(context_keys="each"), journal=tmp_path / "journal")
    kept = sum(path.stat().st_size for path in (tmp_path / "journal/segments").iterdir())
    assert 0.5 * sizes["each"] < kept < 2 * sizes["each"] + 20_000


def test_of_experts_it_is_refused_and_tune_tries_it(seed):
    bench = bench_of("olmoe", seed)
    with pytest.raises(ConfigError, match="context_keys='each' is of layers with one MLP"):
        editor_of("d4s", bench, context_keys="each")
    assert SEARCHED["context_keys"](
        method_for("d4s", bench_of("gpt2", seed).anatomy), None, "context_keys"
    ) == ["each"]
