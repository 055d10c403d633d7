"""One fact in three forms: what is asked, and what counts as the answer."""

from __future__ import annotations

import random
import re
import secrets

import pytest

from d4s.edits import Edit, Question, check_sequence
from d4s.edits.questions import AnswerPool, QuestionForms, question_forms
from d4s.errors import EditError

CLOZE = Edit(
    "The mother tongue of {} is",
    "Ada Quist",
    "English",
    "French",
    id="cloze",
    paraphrases=["Where Ada Quist is from, people speak"],
    neighborhood=["The mother tongue of Bo Lind is"],
    locality=[Question("who wrote the sea wolf", ("Jack London",), "unrelated")],
    relation="P103",
)
LANGUAGES = ["Dutch", "Czech", "Basque", "Welsh", "Sorbian"]
POOL = [
    *(Edit("{} speaks", f"Speaker {i}", new, id=f"l{i}", relation="P103") for i, new in enumerate(LANGUAGES)),
    *(
        Edit("{} is in", f"Town {i}", place, id=f"t{i}", relation="P17")
        for i, place in enumerate(["Peru", "Oman"])
    ),
]


@pytest.fixture
def seed() -> int:
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    return seed


def choices_of(form: Edit) -> dict[str, str]:
    return dict(re.findall(r"\(([a-d])\) (.*?)(?= \([a-d]\) | The letter)", form.text))


def test_each_form_is_an_edit_of_the_same_subject_scored_the_same_way(seed: int) -> None:
    forms = question_forms(CLOZE, pool=POOL, seed=seed)
    assert isinstance(forms, QuestionForms)
    assert list(forms._asdict()) == ["true_false", "multiple_choice", "directly_generated"]
    for name, form in forms._asdict().items():
        assert form.prompt.count("{}") == 1 and form.subject == "Ada Quist"
        assert form.kind == "question" and form.tags == {"form": name, "of": "cloze"}
        assert form.locality == CLOZE.locality
        assert len(form.paraphrases) == 1 and "people speak" in form.paraphrases[0]
    check_sequence([CLOZE, *forms])


def test_a_right_claim_is_answered_yes_and_a_wrong_one_no() -> None:
    seen = set()
    for seed in range(40):
        form = question_forms(CLOZE, pool=POOL, seed=seed).true_false
        claimed = re.search(r"The mother tongue of Ada Quist is (\w+)\.", form.text)
        assert claimed is not None
        assert form.target_new == ("yes" if claimed[1] == "English" else "no")
        assert form.target_true == ("no" if claimed[1] == "English" else "yes")
        seen.add(claimed[1])
    assert seen == {"English", "French"}


def test_the_letter_points_at_the_new_answer_among_four_of_the_relation(seed: int) -> None:
    form = question_forms(CLOZE, pool=POOL, seed=seed).multiple_choice
    choices = choices_of(form)
    assert list(choices) == list("abcd")
    assert choices[form.target_new] == "English"
    assert form.target_true is not None and choices[form.target_true] == "French"
    assert len(set(choices.values())) == 4 and set(choices.values()) <= {"English", "French", *LANGUAGES}


def test_the_right_letter_and_the_wrong_choices_vary_with_the_seed() -> None:
    forms = [question_forms(CLOZE, pool=POOL, seed=seed).multiple_choice for seed in range(60)]
    assert {form.target_new for form in forms} == set("abcd")
    assert {choice for form in forms for choice in choices_of(form).values()} == {
        "English",
        "French",
        *LANGUAGES,
    }


def test_the_same_seed_gives_the_same_forms_whatever_was_drawn_before(seed: int) -> None:
    first = question_forms(CLOZE, pool=POOL, seed=seed)
    question_forms(POOL[0], pool=POOL, seed=seed)
    random.random()
    assert question_forms(CLOZE, pool=AnswerPool(POOL), seed=seed) == first


def test_a_relation_with_too_few_answers_is_filled_from_the_others(seed: int) -> None:
    edit = Edit("{} lies in", "Karvel", "Chile", id="place", relation="P17")
    form = question_forms(edit, pool=POOL, seed=seed).multiple_choice
    choices = set(choices_of(form).values())
    assert {"Chile", "Peru", "Oman"} < choices and len(choices & set(LANGUAGES)) == 1


def test_without_a_relation_edits_with_the_same_prompt_belong_together(seed: int) -> None:
    pool = [
        Edit("The colour of {} is", f"Thing {i}", colour) for i, colour in enumerate(["red", "blue", "grey"])
    ]
    edit = Edit("The colour of {} is", "Tin", "green", id="tin")
    form = question_forms(edit, pool=[*POOL, *pool], seed=seed).multiple_choice
    assert set(choices_of(form).values()) == {"green", "red", "blue", "grey"}


def test_the_right_answer_in_other_letter_case_is_no_wrong_choice(seed: int) -> None:
    edit = Edit("{} speaks", "Ada", "english", id="e", relation="P103")
    pool = [
        Edit("{} speaks", "Bo", "English", relation="P103"),
        Edit("{} speaks", "Cy", "Welsh", relation="P103"),
    ]
    form = question_forms(edit, pool=pool, seed=seed).multiple_choice
    assert set(choices_of(form).values()) == {"english", "Welsh"}


def test_without_a_pool_the_old_answer_is_the_only_other_choice(seed: int) -> None:
    form = question_forms(CLOZE, seed=seed).multiple_choice
    assert choices_of(form) in ({"a": "English", "b": "French"}, {"a": "French", "b": "English"})


def test_no_wrong_answer_at_all_is_an_error_that_says_what_to_give() -> None:
    edit = Edit("{} speaks", "Ada", "English", id="lonely")
    with pytest.raises(EditError, match=r"'lonely'.*no wrong answer.*target_true.*pool="):
        question_forms(edit, pool=[edit])


@pytest.mark.parametrize(
    ("prompt", "kind", "open_prompt", "question"),
    [
        ("The mother tongue of {} is", "completion", "The mother tongue of {} is", None),
        ("The gender of {} is", "question", "The gender of {} is", None),
        (
            "What is the twin city of {}? It is",
            "completion",
            "What is the twin city of {}? It is",
            "What is the twin city of {}?",
        ),
        ("When was {} founded?", "question", "When was {} founded? The answer is", "When was {} founded?"),
        ("who founded {}", "question", "who founded {}? The answer is", "who founded {}?"),
        ("Where {} is from, people speak", "completion", "Where {} is from, people speak", None),
    ],
)
def test_open_sentences_and_questions_are_each_asked_in_their_own_way(
    prompt: str, kind: str, open_prompt: str, question: str | None
) -> None:
    edit = Edit(prompt, "Karvel", "new", "old", id="x", kind=kind)  # type: ignore[arg-type]
    forms = question_forms(edit)
    assert forms.directly_generated.prompt == open_prompt
    assert (forms.directly_generated.target_new, forms.directly_generated.target_true) == ("new", "old")
    if question is None:
        assert f'completes "{prompt} ..."?' in forms.multiple_choice.prompt
        assert re.search(re.escape(prompt) + r" (new|old)\. ", forms.true_false.prompt)
    else:
        assert forms.multiple_choice.prompt.startswith(f"{question} (a) ")
        assert forms.true_false.prompt.startswith(f"Question: {question} Given answer: ")
        assert "It is" not in forms.multiple_choice.prompt


def test_a_statement_is_judged_and_has_two_choices(seed: int) -> None:
    edit = Edit("{} make noise", "Chairs", "False", "True", id="s", kind="statement")
    forms = question_forms(edit, pool=POOL, seed=seed)
    assert set(choices_of(forms.multiple_choice).values()) == {"True", "False"}
    called = re.search(r"calls it (true|false)", forms.true_false.text)
    assert called is not None and forms.true_false.target_new == ("yes" if called[1] == "false" else "no")
    assert forms.directly_generated.text == "Chairs make noise"


def test_forms_of_a_target_without_a_space_keep_it_where_it_stands() -> None:
    bread = Edit("{} costs $", "Bread", "20", "30", target_prefix="")
    claim, choice, open_ = question_forms(bread)
    assert open_.text == "Bread costs $" and open_.target_prefix == ""
    assert claim.target_prefix is None and choice.target_prefix is None
    assert re.match(r"Claim: Bread costs \$(20|30)\. ", claim.text)
