"""What a model must still know: which facts are asked, and when one counts as known."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.sequences import EDITS
from support.small_world import FACTS, small_world

from d4s.edits import Edit
from d4s.errors import ConfigError
from d4s.study.retained import Retained, hold_out


def test_retained_counts_facts_whose_old_answer_is_the_likeliest():
    model = small_world()
    retained = Retained(model, model.tokenizer, FACTS, ["France Paris"])
    asked = {prompt: options for prompt, options in retained.questions}
    assert asked["Spain"][:2] == ("Madrid", "Oslo") and len(asked["Spain"]) == 4
    found = retained()
    assert found["retained"] == 0.5  # France and Norway; a tie is not right
    assert found["text_perplexity"] == pytest.approx(2.0, rel=1e-5)
    model.set("France", "Oslo", 0.9)
    assert retained()["retained"] == 0.25
    assert [retained.by_fact()[f"right.{i}"] for i in range(4)] == [0, 0, 0, 1]
    assert retained.by_fact().items() > retained().items()
    assert retained()["text_perplexity"] > 2.1


def test_only_facts_with_an_old_answer_are_asked():
    model = small_world()
    unknown = Edit(prompt="{}", subject="Norway", target_new="Oslo")
    assert len(Retained(model, model.tokenizer, [*FACTS, unknown]).questions) == 4
    with pytest.raises(ConfigError, match="target_true"):
        Retained(model, model.tokenizer, [unknown])


def test_text_is_by_default_the_facts_as_sentences():
    model = small_world()
    retained = Retained(model, model.tokenizer, FACTS[:1])
    assert retained.texts == ["France Paris."]


def test_held_out_facts_are_the_last_ones():
    made, facts = hold_out(EDITS)
    assert [e.id for e in made + facts] == [e.id for e in EDITS] and len(facts) == 2
    with pytest.raises(ConfigError, match="too few"):
        hold_out(EDITS[:1])


def test_held_out_facts_are_not_about_a_subject_that_is_edited():
    again = [replace(edit, id=f"{edit.id}'", prompt="{} is known for") for edit in EDITS[:2]]
    other = replace(EDITS[0], id="other", subject="Xerxes")
    made, facts = hold_out([*EDITS[:4], again[0], other, other], share=3 / 7)
    assert made == list(EDITS[:4]) and facts == [other]
