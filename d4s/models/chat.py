"""Edits as a chat model is asked: prompts in the user's turn of its template, answers where the assistant's begins.

What `in_chat` makes are edits like any other, whose texts hold the template: target search, keys, scores and generation
see the same text, and the subject is found in it as in any other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

from d4s.edits import Edit, Question
from d4s.errors import EditError, TokenizerError, shown

_USER, _ANSWER = "⟦d4s question⟧", "⟦d4s answer⟧"  # stand for both while the template is written
# Templates that tell the date tell this one: the same edits are the same texts on every day, and a journal goes on.
_DAY = date(2024, 7, 26)
_OF_THE_DAY = re.compile(r"""strftime_now\(\s*(['"])(?P<format>.*?)\1\s*\)""")


@dataclass(frozen=True)
class ChatForm:
    """What a chat template puts around one question and its answer.

    head: before the question: a start token and a system's turn, where the template has them, and the user's opening
    tail: between the question and the answer, without spaces at its end
    target_prefix: those spaces, as of an `Edit`
    """

    head: str
    tail: str
    target_prefix: str

    @classmethod
    def of(cls, tokenizer: Any) -> ChatForm:
        """Of the tokenizer's own template, without tools, and without thinking where it can be left out.

        Raises TokenizerError for a tokenizer that has none, or whose template cannot be divided.
        """
        name = type(tokenizer).__name__
        if not getattr(tokenizer, "chat_template", None):
            raise TokenizerError(
                f"{name} has no chat template, so nothing can be asked in it; take the model's instruct version, set "
                "tokenizer.chat_template, or ask plainly (without --chat)"
            )
        asked = [{"role": "user", "content": _USER}]
        text = _written(tokenizer, asked, add_generation_prompt=True)
        head, user, tail = text.partition(_USER)
        if not user or _USER in tail or "{}" in head + tail:
            raise TokenizerError(
                f"the chat template of {name} cannot be divided around a question: it must hold the user's text once, "
                "and no '{}'"
            )
        try:
            whole = _written(tokenizer, [*asked, {"role": "assistant", "content": _ANSWER}])
        except TokenizerError:  # it takes no answer; the opened turn is all that is known
            whole = ""
        # An empty thought, say, stands between the turn's beginning and the answer.
        if whole.startswith(text) and _ANSWER in whole:
            tail += whole[len(text) : whole.index(_ANSWER)]
        kept = tail.rstrip(" ")
        if not kept or kept[-1].isspace():  # spaces behind a line break indent, and stay
            kept = tail
        return cls(head, kept, tail[len(kept) :])

    def asked(self, prompt: str) -> str:
        """The text of the prompt, without blanks around it, up to where the answer begins."""
        return f"{self.head}{prompt.strip()}{self.tail}"

    def edit(self, edit: Edit) -> Edit:
        """The edit with all its prompts and questions in this form; EditError for one that is in another already."""
        if edit.chat is not None:
            if edit.chat != self.head:
                raise EditError(
                    f"edit {edit.id!r} is in another model's chat template already: {shown(edit.chat)}"
                )
            return edit
        fields: dict[str, Any] = {
            name: tuple(map(self.asked, getattr(edit, name)))
            for name in ("paraphrases", "neighborhood", "attribute", "generation")
        }
        for name in ("locality", "portability"):
            fields[name] = tuple(map(self.question, getattr(edit, name)))
        return replace(
            edit,
            prompt=self.asked(edit.prompt),
            target_prefix=self.target_prefix,
            chat=self.head,
            **fields,
        )

    def question(self, question: Question) -> Question:
        return replace(question, prompt=self.asked(question.prompt), target_prefix=self.target_prefix)


def in_chat(edits: Sequence[Edit], tokenizer: Any) -> list[Edit]:
    """The edits as the tokenizer's chat template asks them; ids stay.

    Each prompt (the edit's, paraphrases, neighbourhood, generation, questions) stands as it is in the user's turn,
    also one that a completion ends: "The mother tongue of Danielle Darrieux is" is no question, and is not made one.
    The target is what the assistant's turn begins with. Contexts are put behind what precedes the prompt in the user's
    turn, not before the template. An edit that is in this form already is returned as it is.
    Raises TokenizerError for a tokenizer without a template, EditError for an edit in another one.
    """
    form = ChatForm.of(tokenizer)
    return [form.edit(edit) for edit in edits]


def chat_note(edits: Sequence[Edit]) -> str | None:
    """What has to be said of figures of edits that were asked in a chat template; None: none was."""
    count = sum(edit.chat is not None for edit in edits)
    if not count:
        return None
    of = "" if count == len(edits) else f"{count} of {len(edits)} edits "
    return (
        f"{of}asked in the model's chat template: prompts as they are in the user's turn, the answer at the "
        "beginning of the assistant's"
    )


def _written(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    """The template's text; what it raises as TokenizerError."""
    try:
        template = _OF_THE_DAY.sub(
            lambda call: repr(_DAY.strftime(call["format"])), tokenizer.get_chat_template()
        )
        return str(
            tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, enable_thinking=False, **options
            )
        )
    except Exception as error:  # jinja's, and whatever the template raises
        raise TokenizerError(
            f"the chat template of {type(tokenizer).__name__} cannot be written: {shown(str(error))}"
        ) from error
