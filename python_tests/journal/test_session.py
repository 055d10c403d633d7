"""Edits tried one by one: what is taken back was never there, what breaks off changes nothing, what is saved is it."""

from __future__ import annotations

import pytest
import torch
from support.sequences import EDITS, FAST, ready, same, state
from support.tiny import tiny_model, tiny_tokenizer

from d4s.edits import Edit
from d4s.errors import ConfigError, EditError
from d4s.journal.edits_card import read_edits_card
from d4s.journal.patch import apply_patch, read_patch
from d4s.journal.session import Session
from d4s.locate.covariance import fingerprint_of


def session(seed: int, **changes) -> Session:
    model, covariance = ready(seed)
    return Session(model, tokenizer=tiny_tokenizer(), config=FAST | changes, covariance=covariance, seed=seed)


def expected(trial: Session, layer: int, put) -> torch.Tensor:
    """W0 + A (λC + B)⁻¹ of these rows, in float64 and the model's layout."""
    base, prior = trial.editor.weights.base[layer], trial.editor.closed_form.priors[layer].matrix.double()
    own = [rows for rows in put if rows.layer == layer]
    a = sum(rows.sign * rows.residuals.double().T @ rows.keys.double() for rows in own)
    b = sum(rows.sign * rows.keys.double().T @ rows.keys.double() for rows in own)
    delta = torch.linalg.solve(prior + b, a.T).T
    return base.double() + (delta.T if trial.editor.anatomy.transposed(layer) else delta)


def test_what_is_taken_back_was_never_put_in(seed):
    trial = session(seed)
    unedited, states, put, sums = state(trial.model), [], [], []
    for edit in EDITS[:4]:
        trial.edit(edit)
        states.append(state(trial.model))
        put.append(list(trial.editor.put))
        sums.append(trial.editor.closed_form.snapshot())
    assert not same(states[0], unedited) and not same(states[3], states[2])
    assert trial.undo() == EDITS[3]
    assert same(state(trial.model), states[2]), "the last one: the bits that were there before it"
    assert same(sums[2], trial.editor.closed_form.snapshot()), "of the sums and what is kept beside them, too"
    assert trial.undo(2) == EDITS[1]
    assert [edit.id for edit in trial.edits] == ["e0", "e2"] and trial.unsaved == 2
    for layer in (0, 1):
        right = expected(trial, layer, [*put[0], *put[2]])
        found = trial.editor.anatomy.weight(layer).double()
        change = (right - trial.editor.weights.base[layer].double()).norm()
        assert (found - right).norm() < 1e-5 * change + 1e-6 * right.norm()
    trial.undo(1)
    trial.undo()
    assert same(state(trial.model), unedited) and trial.unsaved == 0
    trial.edit(EDITS[0])
    assert same(state(trial.model), states[0]), "and a first edit is a first edit again"


def test_of_a_prompt_that_is_edited_again_either_answer_can_be_taken_back(seed):
    trial = session(seed)
    unedited = state(trial.model)
    first = Edit("{} worked for", "Steve Jobs", "Manila")
    trial.edit(first)
    once, put = state(trial.model), list(trial.editor.put)
    trial.edit(Edit("{} worked for", "Steve Jobs", "Lyon"))
    again = list(trial.editor.put)
    trial.undo()
    assert same(state(trial.model), once)
    trial.edit(Edit("{} worked for", "Steve Jobs", "Lyon"))
    trial.undo(1)
    for layer in (0, 1):  # only what the later one has put in is left, and it takes nobody's place
        right = expected(trial, layer, [rows for rows in again if rows.sign > 0])
        assert (trial.editor.anatomy.weight(layer).double() - right).norm() < 1e-5 * right.norm()
    assert any(rows.sign < 0 for rows in again) and not any(rows.sign < 0 for rows in put)
    trial.undo()
    assert same(state(trial.model), unedited)
    assert len({edit.id for edit in trial.made}) == len(trial.made) == 3


def test_numbers_that_name_no_edit_are_refused(seed):
    trial = session(seed)
    with pytest.raises(EditError, match="no edit stands"):
        trial.undo()
    with pytest.raises(EditError, match="there is no edit 1; none was made"):
        trial.undo(1)
    trial.edit(EDITS[0])
    for number in (0, 2):
        with pytest.raises(EditError, match=f"there is no edit {number}; they are 1 to 1"):
            trial.undo(number)
    trial.undo(1)
    with pytest.raises(EditError, match="edit 1 was taken back already"):
        trial.undo(1)


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_breaks_off_leaves_the_model_as_it_was(seed, monkeypatch, error, call):
    trial = session(seed)
    trial.edit(EDITS[0])
    before, held = state(trial.model), dict(trial.editor.held)
    weights, calls = trial.editor.weights, []
    write = weights.write_

    def failing(layer, delta):
        calls.append(layer)
        if len(calls) == call:
            raise error
        write(layer, delta)

    monkeypatch.setattr(weights, "write_", failing)
    with pytest.raises(error):
        trial.edit(EDITS[1])
    assert same(state(trial.model), before) and trial.editor.held == held
    assert trial.edits == [EDITS[0]] and not trial.editor.torn
    trial.edit(EDITS[1])
    trial.undo()
    assert same(state(trial.model), before)


def test_a_patch_and_a_folder_hold_the_edits_that_stand(seed, tmp_path):
    trial = session(seed)
    unedited = fingerprint_of(trial.model)
    with pytest.raises(EditError, match="nothing can be saved"):
        trial.save(tmp_path / "none")
    for edit in EDITS[:3]:
        trial.edit(edit)
    trial.undo(2)
    assert trial.unsaved == 2
    trial.save(tmp_path / "p.safetensors")
    assert trial.unsaved == 0
    fresh = tiny_model("gpt2", seed)
    assert fingerprint_of(fresh) == unedited
    patch = apply_patch(fresh, tmp_path / "p.safetensors")
    assert same(state(fresh), state(trial.model)) and [e.id for e in patch.edits] == ["e0", "e2"]
    assert read_patch(tmp_path / "p.safetensors").fingerprint == unedited
    (tmp_path / "empty").mkdir()
    trial.undo()
    assert trial.unsaved == 1
    trial.save(tmp_path / "empty")
    card = read_edits_card(tmp_path / "empty")
    assert [edit.id for edit in card.edits] == ["e0"] and card.base_fingerprint == unedited
    saved = type(trial.model).from_pretrained(tmp_path / "empty")
    assert same(state(saved), state(trial.model))
    with pytest.raises(ConfigError, match="holds something already"):
        trial.save(tmp_path / "empty")


def test_what_the_configuration_leaves_open_is_decided_by_the_first_edit(seed):
    trial = session(seed, prior_weight=None)
    trial.edit(EDITS[0])
    chosen = trial.chosen["prior_weight"]
    assert chosen > 0 and trial.editor.method.prior_weight == chosen
    trial.edit(EDITS[1])
    assert trial.chosen == {"prior_weight": chosen}


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_edits_of_experts_are_taken_back_one_by_one(seed, model_type, tmp_path):
    model, covariance = ready(seed, model_type)
    trial = Session(
        model, tokenizer=tiny_tokenizer(), config=FAST | {"layers": [1]}, covariance=covariance, seed=seed
    )
    unedited, states, put = state(model), [], []
    for edit in EDITS[:3]:
        trial.edit(edit)
        states.append(state(model))
        put.append(list(trial.editor.put))
    trial.save(tmp_path / "p.safetensors")
    trial.undo()
    assert same(state(model), states[1]), "the last one: the bits that were there before it"
    trial.undo(1)
    prior = trial.editor.closed_form.of_experts[1].prior
    (rows,) = put[1]
    keys, residuals = rows.keys.double(), rows.residuals.double()
    matrix = torch.block_diag(*(prior.of(j).matrix for j in range(prior.experts))) + keys.T @ keys
    right = torch.linalg.solve(matrix, keys.T @ residuals).T.chunk(prior.experts, 1)
    base, found = trial.editor.weights.base[1].double(), trial.editor.anatomy.weight(1).double()
    for expert, delta in enumerate(right):
        change = delta.T if trial.editor.anatomy.transposed(1) else delta
        wanted = base[expert] + change
        assert (found[expert] - wanted).norm() < 1e-5 * change.norm() + 1e-6 * wanted.norm()
    trial.undo()
    assert same(state(model), unedited) and trial.unsaved == 3
    apply_patch(model, tmp_path / "p.safetensors")
    assert same(state(model), states[2])
