"""What an edit refuses, what it turns into, and which edits may stand together."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from d4s.edits import Edit, Question, check_batch, check_sequence, without_contradictions
from d4s.errors import EditError

FACT = {"prompt": "The mother tongue of {} is", "subject": "Ada Quist", "target_new": "English"}


def edit(**fields: object) -> Edit:
    return Edit(**{**FACT, **fields})  # type: ignore[arg-type]


def test_text_is_the_prompt_with_the_subject_in_its_place() -> None:
    assert edit().text == "The mother tongue of Ada Quist is"


def test_other_braces_in_the_prompt_are_kept() -> None:
    made = edit(prompt="In {set notation}, {} is {0}")
    assert made.text == "In {set notation}, Ada Quist is {0}"


def test_blanks_around_targets_and_at_the_end_of_prompts_are_cut() -> None:
    made = edit(
        prompt="The mother tongue of {} is ",
        target_new=" English\n",
        target_true=" French",
        paraphrases=["Ada speaks "],
    )
    assert (made.prompt, made.target_new, made.target_true) == (
        "The mother tongue of {} is",
        "English",
        "French",
    )
    assert made.paraphrases == ("Ada speaks",)


def test_lists_become_tuples_and_the_edit_is_hashable() -> None:
    made = edit(paraphrases=["a"], neighborhood=["b"], locality=[Question("c", ["d"])], tags={"case": "1"})
    assert made.paraphrases == ("a",) and made.neighborhood == ("b",)
    assert made.locality[0].answers == ("d",)
    assert len({made, pickle.loads(pickle.dumps(made))}) == 1


def test_an_edit_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        edit().subject = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt": "The mother tongue is"}, r"'Ada Quist': 'prompt' has no '\{\}' for the subject.*; write"),
        ({"prompt": "{} and {} speak"}, r"'prompt' must have one '\{\}', not 2"),
        ({"prompt": 3}, "'prompt' must be text, not int"),
        ({"subject": "  "}, "'subject' is empty"),
        ({"subject": "{}"}, r"'subject' contains '\{\}'"),
        ({"target_new": "\n"}, "'target_new' is empty"),
        ({"target_new": 1998}, "'target_new' must be text, not int"),
        ({"target_new": "\ud83d"}, "half of a surrogate pair"),
        ({"target_true": ""}, "'target_true' is empty"),
        ({"target_true": "English "}, "both 'English'.*must differ"),
        ({"paraphrases": "one text"}, "'paraphrases' must be a list, not str"),
        ({"paraphrases": ["fine", "{} speaks"]}, r"paraphrases\[1\].*write the full text"),
        ({"neighborhood": [""]}, r"'neighborhood\[0\]' is empty"),
        ({"generation": [None]}, r"'generation\[0\]' must be text, not NoneType"),
        ({"locality": ["Who?"]}, r"locality\[0\] must be a Question\(prompt, answers\), not str"),
        ({"kind": "statment"}, "unknown kind 'statment'. Did you mean 'statement'"),
        ({"tags": {"case": 3}}, r"tags\['case'\] must be text, not int"),
        ({"tags": ["case"]}, "'tags' must map names to texts"),
        ({"id": 7}, "'id' must be text, not int"),
    ],
)
def test_a_wrong_field_is_refused_and_named(fields: dict[str, object], says: str) -> None:
    with pytest.raises(EditError, match=says):
        edit(**fields)


def test_a_question_may_have_no_known_answer_but_no_blank_one() -> None:
    assert Question("Plants make noise").answers == ()
    assert Question("Who?", ["Ada", " Bo", "Ada "]).answers == ("Ada", "Bo")  # type: ignore[arg-type]
    with pytest.raises(EditError, match=r"'answers\[1\]' is empty"):
        Question("Who?", ("Ada", " "))
    with pytest.raises(EditError, match="'answers' must be a list, not str"):
        Question("Who?", "Ada")  # type: ignore[arg-type]


def test_a_question_edit_may_repeat_the_true_answer() -> None:
    assert edit(kind="question", target_true="English").target_true == "English"


def test_the_default_id_depends_on_the_fact_alone_and_is_the_same_in_every_process() -> None:
    first = edit()
    assert edit(paraphrases=["Ada Quist speaks"]).id == first.id
    others = {edit(subject="Ada").id, edit(target_new="French").id, edit(prompt="{} speaks").id}
    assert len(others | {first.id}) == 4
    program = (
        "import sys, types, pathlib; d4s = types.ModuleType('d4s'); "
        "d4s.__path__ = [str(pathlib.Path('d4s').resolve())]; sys.modules['d4s'] = d4s; "
        f"from d4s.edits import Edit; print(Edit(**{FACT!r}).id)"
    )
    root = Path(__file__).parents[2]
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root
    )
    assert printed.stdout.strip() == first.id


def test_a_dict_and_back_is_the_same_edit() -> None:
    made = edit(
        target_true="French",
        id="e1",
        paraphrases=["p\u2028q"],
        neighborhood=["n"],
        attribute=["a"],
        generation=["g"],
        locality=[Question("l", ("x", "y"), "forgetfulness")],
        portability=[Question("m", (), "multi_hop", "")],
        reference_texts=["r"],
        relation="P103",
        kind="question",
        tags={"case": "4"},
        target_prefix="",
        chat="",
    )
    record = made.to_dict()
    assert set(record) == {item.name for item in dataclasses.fields(Edit)}
    assert Edit.from_dict(record) == made
    assert Edit.from_dict(edit().to_dict()) == edit()


def test_an_unknown_field_is_named_with_a_suggestion() -> None:
    with pytest.raises(EditError, match=r"unknown field of an edit 'paraphrase'. Did you mean 'paraphrases'"):
        Edit.from_dict({**FACT, "paraphrase": ["x"]})
    with pytest.raises(EditError, match=r"unknown field of a question 'answer'. Did you mean 'answers'"):
        Edit.from_dict({**FACT, "locality": [{"prompt": "x", "answer": "y"}]})


def test_a_missing_field_is_named_and_null_counts_as_left_out() -> None:
    with pytest.raises(EditError, match="no field 'subject'"):
        Edit.from_dict({"prompt": "{} is", "target_new": "x", "subject": None})
    assert Edit.from_dict({**FACT, "target_true": None, "paraphrases": None, "id": 12}).id == "12"


def test_a_sequence_refuses_one_id_twice_and_allows_a_later_update() -> None:
    update = edit(target_new="French")
    check_sequence([edit(), update])
    with pytest.raises(EditError, match="edits number 1 and 3 both have the id 'a'"):
        check_sequence([edit(id="a"), update, edit(id="a", target_new="Dutch")])


def test_a_batch_refuses_two_answers_to_one_prompt_and_names_both_edits() -> None:
    with pytest.raises(
        EditError, match=r"'a' and 'b' contradict.*'The mother tongue of Ada Quist is'.*'English'.*'French'"
    ):
        check_batch([edit(id="a"), edit(id="b", target_new="French")])


def test_a_batch_sees_a_contradiction_between_two_cuts_of_one_prompt() -> None:
    with pytest.raises(EditError, match="contradict"):
        check_batch(
            [edit(), edit(prompt="The mother tongue of Ada {} is", subject="Quist", target_new="French")]
        )


def test_a_batch_refuses_the_same_edit_under_two_ids() -> None:
    with pytest.raises(EditError, match=r"number 1 and 2 of one batch are the same.*'b'"):
        check_batch([edit(id="a"), edit(id="b")])


def test_a_batch_allows_a_fact_that_two_cases_share() -> None:
    check_batch([edit(id="a", tags={"case": "1"}), edit(id="b", tags={"case": "2"})])


@pytest.mark.parametrize("check", [check_batch, check_sequence])
def test_nothing_and_things_that_are_no_edits_are_refused(check) -> None:
    with pytest.raises(EditError, match="there are no edits"):
        check([])
    with pytest.raises(EditError, match="edit number 2 is a dict"):
        check([edit(), FACT])


def test_leaving_contradictions_out_keeps_the_first_and_passes_the_check() -> None:
    first, second, other = edit(id="a"), edit(id="b", target_new="French"), edit(id="c", subject="Bo Lind")
    kept, left_out = without_contradictions([first, second, other])
    assert (kept, left_out) == ([first, other], [second])
    check_batch(kept)
