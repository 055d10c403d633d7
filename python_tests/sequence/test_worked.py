"""What a sequence tells of three edits whose every effect is known: each number is worked by hand."""

from __future__ import annotations

import math

import pytest
from support.scripted import ARCHITECTURE, Script, Scripted

from d4s.edits import Edit
from d4s.sequence.run import edit_sequence

EDITS = [
    Edit("{} was", "Ada", "new", "old", paraphrases=("Ada became",), id="was"),
    Edit("{} is", "Ada", "new", "old", id="is"),
    Edit("{} stays", "Ada", "new", "old", id="stays"),
]
# The model says `old` of the first and the third edit, and `new` of the second before it is made.
UNEDITED = {
    "was": {"new": 0.1, "old": 0.6},
    "became": {"new": 0.1, "old": 0.6},
    "is": {"new": 0.5, "old": 0.2},
    "stays": {"new": 0.1, "old": 0.6},
    "Ada": {"was": 0.3},
}
SCRIPT = {
    "was": [("was", "new", 0.9), ("became", "new", 0.9)],  # takes
    "is": [("is", "new", 0.8), ("was", "new", 0.01)],  # takes, and undoes the first but for its paraphrase
    "stays": [],  # does not take
}


def worked(**options):
    model = Scripted(UNEDITED)
    options = {"evaluate_every": 1} | options
    return edit_sequence(
        model,
        model.tokenizer,
        EDITS,
        method=Script(script=SCRIPT),
        architecture=ARCHITECTURE,
        progress=False,
        **options,
    )


def column(result, name: str) -> list[float | None]:
    return [row.get(name) for row in result.history]


def test_each_point_is_of_all_edits_made_so_far():
    #      unedited, of all   was   was lost, is    and stays not made
    result = worked()
    assert column(result, "efficacy") == pytest.approx([1 / 3, 1, 1 / 2, 1 / 3])
    assert column(result, "paraphrase") == [0, 1, 1, 1]


def test_the_figure_right_after_each_step_remembers_what_is_lost_later():
    result = worked()
    assert column(result, "original_efficacy")[1:] == pytest.approx([1, 1, 2 / 3])
    assert column(result, "original_paraphrase") == [None, 1, 1, 1]
    assert column(result, "original_efficacy")[0] is None
    assert set(column(worked(original=False), "original_efficacy")) == {None}


def test_the_unedited_level_is_that_of_the_edits_made_so_far():
    """The second edit's answer was the model's own, so the level moves though the unedited model does not."""
    assert column(worked(), "efficacy.unedited")[1:] == pytest.approx([0, 1 / 2, 1 / 3])
    assert column(worked(), "efficacy.unedited")[0] is None


def test_forgetting_follows_each_stretch_of_edits():
    found = worked().forgetting().to_numpy().tolist()
    assert found[0] == [1, 0, 0] and found[1][1:] == [1, 1] and found[2][2:] == [0]
    assert all(math.isnan(cell) for cell in (found[1][0], found[2][0], found[2][1]))
    # In stretches of two: `was` is lost within its own stretch.
    assert worked(evaluate_every=2).forgetting().to_numpy().tolist()[0] == [1 / 2, 1 / 2]


def test_the_forgetting_of_a_probability_is_in_that_probability():
    found = worked().forgetting("target_probability").to_numpy()
    assert found[0].tolist() == pytest.approx([0.9, 0.01, 0.01], rel=1e-4)
    assert found[1, 1:].tolist() == pytest.approx([0.8, 0.8], rel=1e-4)
    assert found[2, 2] == pytest.approx(0.1, rel=1e-4)
