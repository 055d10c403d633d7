"""Edits in a chat template: one text for search, keys, scores and generation, with the subject where it is."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support.chat import TEMPLATES, chatting
from support.sequences import EDITS, FAST, ready, sequence
from support.tiny import tiny_tokenizer

from d4s.edits import Edit, Question
from d4s.errors import EditError, TokenizerError
from d4s.locate.kept_targets import KeptTargets
from d4s.locate.keys import subject_rows
from d4s.locate.request_rows import request_of
from d4s.locate.targets import Targets
from d4s.measure.metrics import evaluate
from d4s.models.chat import ChatForm, chat_note, in_chat
from d4s.models.prompts import prompt_and_target_ids, subject_row, text_ids

EDIT = Edit(
    "The mother tongue of {} is",
    "Danielle Darrieux",
    "English",
    "French",
    paraphrases=("Danielle Darrieux speaks",),
    neighborhood=("Lyon is ", "The capital of France is"),
    attribute=("Edwin is",),
    generation=("Danielle Darrieux was",),
    locality=(Question("Where is Lyon?", ("France",), "Relation"),),
    portability=(Question("Who speaks English?", ("Danielle Darrieux",)),),
)
QUESTION = Edit(
    "What is the mother tongue of {}?", "Danielle Darrieux", "English", kind="question", target_prefix="\n"
)
CONTEXT = "Therefore I play. "


def conversation(tokenizer, prompt: str, answer: str) -> str:
    """As the template itself writes a question that was answered."""
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return tokenizer.apply_chat_template(turns, tokenize=False)


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("edit", [EDIT, QUESTION], ids=["completion", "question"])
def test_prompt_and_target_are_what_the_template_makes_of_question_and_answer(edit, template, start):
    tokenizer = chatting(template, start=start)
    (asked,) = in_chat([edit], tokenizer)
    prompt, target = prompt_and_target_ids(tokenizer, asked.text, asked.target(asked.target_new))
    text = conversation(tokenizer, edit.text, "English")
    whole = text[: text.rindex("English") + len("English")]
    assert [*prompt, *target] == text_ids(tokenizer, [whole])[0]
    assert tokenizer.decode(target).strip() == "English"
    assert asked.id == edit.id and asked.chat is not None


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_subject_is_found_inside_the_template_and_contexts_stand_before_the_question(template, start):
    tokenizer = chatting(template, start=start)
    (asked,) = in_chat([EDIT], tokenizer)
    plain = subject_row(tokenizer, asked.prompt, asked.subject, asked.target("English"), head=asked.chat)
    behind = subject_row(tokenizer, asked.prompt, asked.subject, asked.target("English"), CONTEXT, asked.chat)
    for row, question in ((plain, EDIT.text), (behind, CONTEXT + EDIT.text)):
        said = tokenizer.decode(row.ids[: row.subject_last + 1])
        assert said.endswith("Danielle Darrieux") and said.count("Darrieux") == 1
        text = conversation(tokenizer, question, "English")
        assert list(row.ids) == text_ids(tokenizer, [text[: text.rindex("English") + len("English")]])[0]
        # Once at the beginning: neither the tokenizer's and the template's, nor none where one of them has it.
        first = [token == tokenizer.bos_token_id for token in row.ids[:2]]
        assert first == [start or asked.chat.startswith("<s>"), False]
    # Search and keys ask for these very rows.
    request = request_of(tokenizer, asked, [CONTEXT])
    rows = subject_rows(tokenizer, [asked], [CONTEXT]).ids
    for i, row in enumerate((plain, behind)):
        assert (*request.before[i], *request.after[i]) == row.ids[:-1]
        assert rows[i] == row.ids[: row.subject_last + 1]


def test_a_context_stays_before_a_plain_prompt():
    row = subject_row(tiny_tokenizer(), EDIT.prompt, EDIT.subject, prefix=CONTEXT, head=EDIT.chat)
    assert tiny_tokenizer().decode(row.ids, skip_special_tokens=True) == CONTEXT + EDIT.text


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_other_prompt_is_asked_in_the_same_form(template):
    tokenizer = chatting(template)
    (asked,) = in_chat([EDIT], tokenizer)
    for name in ("paraphrases", "neighborhood", "attribute", "generation"):
        for before, after in zip(getattr(EDIT, name), getattr(asked, name), strict=True):
            text = conversation(tokenizer, before.strip(), "Answer")
            assert after == text[: text.rindex("Answer")].rstrip(" ")
    for before, after in zip(
        (*EDIT.locality, *EDIT.portability), (*asked.locality, *asked.portability), strict=True
    ):
        target = after.target("Answer")
        text = conversation(tokenizer, before.prompt, "Answer")
        assert after.prompt + target[1] == text[: text.rindex("Answer")]
        assert (after.answers, after.kind) == (before.answers, before.kind)
    assert Edit.from_dict(asked.to_dict()) == asked and "chat" not in EDIT.to_dict()
    assert in_chat([asked], tokenizer) == [asked], "what is in the form already stays"


def test_a_template_is_told_the_same_day_every_day_and_not_to_think():
    told = "{{ strftime_now('%d') }} {{ strftime_now(\"%B %Y\") }} {{ enable_thinking }}"
    form = ChatForm.of(chatting(told + ": {{ messages[0]['content'] }}\n"))
    assert form.head == "26 July 2024 False: "


@pytest.mark.parametrize(
    ("template", "texts"),
    [
        (None, ["has no chat template", "--chat"]),
        ("no question\n", ["cannot be divided"]),
        ("{{ messages[0]['content'] }} {{ messages[0]['content'] }}", ["cannot be divided"]),
        ("{% raw %}{}{% endraw %} {{ messages[0]['content'] }}", ["cannot be divided", "'{}'"]),
        ("{{ raise_exception('only with tools') }}", ["cannot be written", "only with tools"]),
        ("{% for %}", ["cannot be written"]),
    ],
)
def test_a_tokenizer_without_a_template_that_serves_is_refused_in_one_line(template, texts):
    tokenizer = tiny_tokenizer() if template is None else chatting(template)
    with pytest.raises(TokenizerError) as refused:
        in_chat([EDIT], tokenizer)
    said = str(refused.value)
    assert "\n" not in said and all(text in said for text in texts), said


def test_an_edit_of_another_template_is_refused():
    (asked,) = in_chat([EDIT], chatting("turns with a system's"))
    with pytest.raises(EditError, match="another model's chat template"):
        in_chat([asked], chatting("a start token and headers"))


def test_chat_must_be_what_the_prompt_begins_with():
    with pytest.raises(EditError, match="does not begin with 'chat'"):
        Edit("The capital of {} is", "France", "Lyon", chat="<s>user")
    with pytest.raises(EditError, match="does not begin with 'chat'"):  # nor may the subject stand in it
        Edit("The capital of {} is", "France", "Lyon", chat="The capital of {} is")
    with pytest.raises(EditError, match="'chat' must be text or None, not int"):
        Edit("The capital of {} is", "France", "Lyon", chat=3)  # type: ignore[arg-type]


def test_targets_of_both_forms_are_kept_apart(seed):
    (asked,) = in_chat([EDIT], chatting("nothing before the question"))
    plain = replace(asked, chat=None)  # the same texts; only contexts stand elsewhere
    kept = KeptTargets({})
    kept.add([plain], Targets(*(torch.randn(1, 4) for _ in range(2)), *(torch.rand(1) for _ in range(2))))
    assert plain in kept and asked not in kept


def test_a_sequence_in_chat_form_writes_what_is_asked_so_and_says_it(seed, tmp_path):
    tokenizer = chatting("turns with a system's")
    model, covariance = ready(seed)
    edits = in_chat(EDITS[:3], tokenizer)
    options = dict(tokenizer=tokenizer, config=FAST | {"steps": 8}, journal=tmp_path / "j", original=False)
    result = sequence(model, covariance, edits, **options)
    # Search begins at what scoring says of the unedited model: both see one text, and the target where it is.
    scored = [math.exp(-row["nll_new"]) for row in result.evaluations[0].rows]
    assert [row["first_probability"] for row in result.edits_table] == pytest.approx(scored, rel=1e-3)
    (note,) = [note for note in result.evaluations[-1].notes if "chat" in note]
    assert note.startswith("asked in the model's chat template") and "as they are in the user's turn" in note
    again = sequence(ready(seed)[0], covariance, edits, **options)
    assert again.history == result.history, "the same edits go on in the same journal"
    state = result.editor.snapshot()
    held = dict(result.editor.held)
    result.restore()
    result.editor.resume_(state)
    assert result.editor.held == held and all(edit.chat for edit in held.values())


def test_the_note_counts_what_was_asked_so(seed):
    tokenizer = chatting("brackets, no start token")
    mixed = [*in_chat(EDITS[:1], tokenizer), EDITS[1]]
    assert chat_note(mixed).startswith("1 of 2 edits asked in")
    assert chat_note(EDITS) is None
    model, _ = ready(seed)
    assert not [note for note in evaluate(model, tokenizer, EDITS[:2]).notes if "chat" in note]
    assert evaluate(model, tokenizer, mixed).notes[0] == chat_note(mixed)
