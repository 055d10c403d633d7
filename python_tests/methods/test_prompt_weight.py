"""D4S with the prompt's other tokens held: the least-squares problem that it says it solves, and what leaves it."""

from __future__ import annotations

import numpy
import pytest
import torch
from support.sequences import EDITS as SEVEN
from support.sequences import FAST, ready, same, sequence, state
from support.undoing import goes_on_and_takes_back
from support.workbench import EDITS, bench_of, editor_of, relative_error

from d4s.edits import Edit
from d4s.errors import ConfigError
from d4s.journal.journal import Journal
from d4s.locate.keys import keys_beside, prompt_rows
from d4s.methods import METHODS, d4s, method_for
from d4s.models.architectures import Anatomy
from d4s.models.prompts import subject_row
from d4s.study.plan import plan
from d4s.study.planned import VECTORS

WEIGHT = 0.7
HELD = dict(prompt_weight=WEIGHT, contexts=0, prior_weight=5.0, ridge=0.1, learning_rate=0.1)


def beside(anatomy, tokenizer, edits, layer):
    """Keys at every token of each prompt but the subject's last, by a hook and one prompt at a time. float64"""
    found, seen = [], []
    hook = anatomy.projection(layer).register_forward_pre_hook(
        lambda _m, given: seen.append(given[0].detach())
    )
    try:
        for edit in edits:
            row = subject_row(tokenizer, edit.prompt, edit.subject)
            seen.clear()
            with torch.no_grad():
                anatomy.model(torch.tensor([row.ids]), use_cache=False)
            keys = seen[0].reshape(len(row.ids), -1)
            found.append(keys[[i for i in range(len(row.ids)) if i != row.subject_last]])
    finally:
        hook.remove()
    return torch.cat(found).double()


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt"])
def test_keys_beside_are_those_of_each_prompt_by_itself_whatever_its_batch(model_type, seed):
    bench = bench_of(model_type, seed)
    edits = [*EDITS, Edit("{} is", "Rome", "x"), Edit("In the city of {}", "Rome", "x")]
    rows = prompt_rows(bench.tokenizer, edits, 64)
    for layer in (0, 1):
        found = keys_beside(bench.anatomy, rows, layer).double()
        assert relative_error(found, beside(bench.anatomy, bench.tokenizer, edits, layer)) <= 1e-5
    assert len(rows.edits) == len(found) and list(rows.edits) == sorted(rows.edits)
    few = prompt_rows(bench.tokenizer, edits, 2)
    assert few.positions == tuple(here[-2:] for here in rows.positions)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
@pytest.mark.parametrize("rule", [{}, dict(residual="once"), dict(anchor="current")])
def test_a_batch_is_the_least_squares_problem_with_nothing_asked_at_those_keys(model_type, rule, seed):
    bench = bench_of(model_type, seed)
    statistics = bench.covariance((0, 1))
    editor = editor_of("d4s", bench, layers=(0, 1), **HELD, **rule)
    editor.edit(EDITS)
    written = {layer: editor.weights.delta(layer).double() for layer in (0, 1)}
    editor.restore()

    targets = editor.targets(EDITS)
    goals = targets.target.double()
    for share, layer in ((2, 0), (1, 1)):
        keys = editor.keys(editor.rows(EDITS), layer).numpy()
        held = beside(bench.anatomy, bench.tokenizer, EDITS, layer).numpy()
        once = rule.get("residual") == "once"
        left = targets.delta.double() if once else goals - editor.state(editor.bare_rows(EDITS))
        c = statistics.mean(layer).double().numpy()
        prior = 5.0 * (c + 0.1 * c.diagonal().mean() * numpy.eye(len(c)))
        normal = prior + keys.T @ keys + WEIGHT * held.T @ held
        wanted = torch.from_numpy(numpy.linalg.solve(normal, keys.T @ left.numpy() / share).T)
        assert relative_error(written[layer], wanted) <= 1e-3
        editor.weights.write_(layer, wanted.to(editor.weights.base[layer]))


def test_a_larger_weight_moves_the_prompts_other_tokens_less(seed):
    moved = []
    for weight in (0.0, 0.5, 50.0):
        bench = bench_of("llama", seed)
        editor = editor_of("d4s", bench, layers=(1,), **HELD | dict(prompt_weight=weight))
        editor.edit(EDITS)
        keys = beside(bench.anatomy, bench.tokenizer, EDITS, 1)
        moved.append(float((keys @ editor.weights.delta(1).double().T).norm()))
    assert moved[0] > 1.2 * moved[1] > 3 * moved[2] > 0


@pytest.mark.parametrize("keys, contexts", [("mean", 0), ("each", 1)])
def test_in_one_layer_a_sequence_is_its_batch_and_a_fact_that_comes_again_is_held_once(keys, contexts, seed):
    bench = bench_of("gpt2", seed)
    config = HELD | dict(contexts=contexts, context_keys=keys)
    once, batch = (editor_of("d4s", bench, layers=(1,), **config) for _ in range(2))
    twice = editor_of(
        "d4s", bench, layers=(1,), residual="once", **config
    )  # by which what is taken out is what was put in
    for edit in EDITS:
        once.edit([edit])
    found = once.weights.delta(1)
    once.restore()
    batch.edit(EDITS)
    assert relative_error(batch.weights.delta(1), found) <= 1e-3
    batch.restore()
    first = Edit(EDITS[0].prompt, EDITS[0].subject, EDITS[1].target_new, id="before")
    for edit in (first, *EDITS):
        twice.edit([edit])
    assert relative_error(twice.weights.delta(1), found) <= 2e-3


def test_its_journal_goes_on_and_takes_single_edits_back(monkeypatch, tmp_path, seed):
    config = FAST | dict(prompt_weight=WEIGHT, layers=[1])
    whole = goes_on_and_takes_back(config, monkeypatch, tmp_path, seed)
    base = ready(seed)[0]
    unheld = sequence(*ready(seed), config=config | dict(prompt_weight=0.0))
    (name,) = Journal(tmp_path / "whole").weights()
    change, plain = (one.model.get_parameter(name) - base.get_parameter(name) for one in (whole, unheld))
    assert relative_error(change, plain) > 1e-2


def test_plan_and_journal_count_its_rows(tmp_path, seed):
    model, covariance = ready(seed)
    sizes, seconds = {}, {}
    for weight in (0.0, WEIGHT, None):
        method = method_for("d4s", Anatomy(model), FAST | dict(prompt_weight=weight))
        found = plan(model, method, 7)
        (sizes[weight],) = (part.bytes for part in found.parts if part.name == VECTORS)
        seconds[weight] = sum(one.rows for one in found.passes)
    assert sizes[WEIGHT] == sizes[None] > 4 * sizes[0.0] and seconds[WEIGHT] > seconds[0.0]
    sequence(model, covariance, config=FAST | dict(prompt_weight=WEIGHT), journal=tmp_path / "journal")
    kept = sum(path.stat().st_size for path in (tmp_path / "journal/segments").iterdir())
    assert 0.2 * sizes[WEIGHT] < kept < 2 * sizes[WEIGHT] + 20_000


def test_left_open_it_is_chosen_by_how_many_edits_there_are(monkeypatch, tmp_path, seed):
    assert [d4s.prompt_weight_of(count) for count in (1, 300, 600, 1_000)] == pytest.approx(
        [0.25, 0.25, 0.125, 0.075]
    )
    monkeypatch.setattr(d4s, "PROMPT_EDITS", 2)
    model, covariance = ready(seed)
    found = sequence(model, covariance, config=FAST | dict(prompt_weight=None), journal=tmp_path / "journal")
    assert found.chosen == {"prompt_weight": pytest.approx(0.5 / len(SEVEN))}
    told = sequence(*ready(seed), config=FAST | found.chosen)
    assert same(state(told.model), state(model)) and told.chosen == {}
    monkeypatch.setattr(d4s, "PROMPT_EDITS", 7)  # what a sequence has begun with stays
    assert (
        sequence(*ready(seed), config=FAST | dict(prompt_weight=None), journal=tmp_path / "journal").chosen
        == found.chosen
    )
    (alone,) = {editor_of("d4s", bench_of("gpt2", seed), prompt_weight=None).prompt_weight}
    assert alone == 0.25
    assert METHODS["d4s"].presets["hold"]["prompt_weight"] is None


def test_of_experts_it_is_refused(seed):
    bench = bench_of("olmoe", seed)
    for weight in (0.25, None):
        with pytest.raises(ConfigError, match="prompt_weight is of layers with one MLP"):
            editor_of("d4s", bench, prompt_weight=weight)


def test_the_preset_fresh_is_hold_in_one_step_and_searches_again_in_the_next(seed):
    bench = bench_of("llama", seed)
    config = HELD | dict(contexts=2, layers=(0, 1))
    hold, fresh = (
        editor_of("d4s", bench, **config | METHODS["d4s"].presets[name] | dict(prompt_weight=WEIGHT))
        for name in ("hold", "fresh")
    )
    changes = {}
    for name, editor in (("hold", hold), ("fresh", fresh)):
        editor.announce(EDITS)
        for steps in ([EDITS], [EDITS[:2], EDITS[2:]]):
            for step in steps:
                editor.edit(step)
            changes[name, len(steps)] = torch.cat([editor.weights.delta(i).flatten() for i in (0, 1)])
            editor.restore()
    assert relative_error(changes["fresh", 1], changes["hold", 1]) <= 1e-4
    assert relative_error(changes["fresh", 2], changes["hold", 2]) > 1e-3
