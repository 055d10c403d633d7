"""What the journal of a sequence in one layer must do, whatever rows its method puts into the sums."""

from __future__ import annotations

import pytest
from support.sequences import EDITS, broken_off, ready, same, sequence, state
from support.tiny import tiny_tokenizer
from support.workbench import relative_error

from d4s.errors import EditingStopped
from d4s.journal.journal import Journal


def goes_on_and_takes_back(config, monkeypatch, folder, seed):
    """It goes on to the same bits after an interruption, is sound, and without an edit is the sequence without it.

    Returns the whole sequence's result.
    """
    whole = sequence(*ready(seed), config=config, journal=folder / "whole")
    with monkeypatch.context() as patch:
        broken_off(patch, 4, KeyboardInterrupt)
        with pytest.raises(EditingStopped):
            sequence(*ready(seed), config=config, journal=folder / "broken")
    again = sequence(*ready(seed), config=config, journal=folder / "broken")
    assert same(state(again.model), state(whole.model))

    journal = Journal(folder / "whole")
    model, covariance = ready(seed)
    assert journal.verify(model=model, tokenizer=tiny_tokenizer(), covariance=covariance).sound
    journal.undo("e2")
    without = sequence(*ready(seed), edits=[edit for edit in EDITS if edit.id != "e2"], config=config)
    (name,) = journal.weights()
    base = ready(seed)[0].get_parameter(name)
    wanted = without.model.get_parameter(name) - base
    assert relative_error(journal.weights()[name] - base, wanted) <= 1e-3
    return whole
