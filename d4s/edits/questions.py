"""One fact asked in three forms: true or false, multiple choice, directly generated.

After the multi-question dataset of the D4S paper (arXiv 2410.23843, section 3), whose text is not public: the
wording here is this project's own. The forms differ in how surprising their targets are to a model (lowest
for yes or no, highest for an entity), which is what the analysis relates to the harm done by editing.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from d4s.edits import Edit
from d4s.edits.spacing import continuation
from d4s.errors import EditError

_LETTERS = "abcd"
_INTERROGATIVES = re.compile(
    r"(?:in |on |at |from |to |by |for |of |with )?(?:who|whose|whom|what|which|when|where|why|how)\b"
    r"|(?:is|are|was|were|do|does|did|has|have|can|name|identify|provide)\b",
    re.IGNORECASE,
)


class QuestionForms(NamedTuple):
    """The same fact as three edits, all of kind "question", so that one measure scores all three."""

    true_false: Edit
    multiple_choice: Edit
    directly_generated: Edit


class AnswerPool:
    """The answers that occur in a set of edits, by relation, from which wrong choices are drawn.

    Edits without a relation count as of one relation if they share a prompt.
    """

    def __init__(self, edits: Iterable[Edit]) -> None:
        by_relation: dict[str, dict[str, None]] = {}
        for edit in edits:
            answers = by_relation.setdefault(_relation(edit), {})
            answers.update(dict.fromkeys(a for a in (edit.target_new, edit.target_true) if a is not None))
        self._by_relation = {relation: list(answers) for relation, answers in by_relation.items()}
        self._all = list(dict.fromkeys(a for answers in by_relation.values() for a in answers))

    def draw(self, edit: Edit, count: int, generator: random.Random) -> list[str]:
        """At most `count` different wrong answers to `edit`, of its relation first, then of any other.

        The old answer, where it is known, is always one of them.
        """
        right = edit.target_new.casefold()
        drawn: dict[str, str] = {}
        if edit.target_true is not None and edit.target_true.casefold() != right:
            drawn[edit.target_true.casefold()] = edit.target_true
        if edit.kind == "statement":  # judged true or false: there is no third answer
            return list(drawn.values())
        for answers in (self._by_relation.get(_relation(edit), []), self._all):
            # A sample so large holds enough answers that are neither right nor drawn already.
            for answer in generator.sample(answers, min(len(answers), 4 * count + 4)):
                if len(drawn) < count and answer.casefold() != right:
                    drawn.setdefault(answer.casefold(), answer)
        return list(drawn.values())


def question_forms(
    edit: Edit, *, pool: Iterable[Edit] | AnswerPool | None = None, seed: int = 0
) -> QuestionForms:
    """Turn an edit into three that teach the same fact (arXiv 2410.23843, section 3; `_asdict()` names them).

    true_false:         a claim about the subject, target 'yes' or 'no'. Where a wrong answer is known, a coin
                        decides whether the claim is right, lest 'yes' be learnt whatever is asked.
    multiple_choice:    choices (a) to (d) in random order, target the letter
    directly_generated: the prompt itself, target the entity

    pool: edits whose answers serve as wrong choices (for many edits make an `AnswerPool` once). Without it
          the old answer is the only one; from a small pool there are fewer than four choices.
    seed: coin, choices and order are drawn from it and from the edit's id, so that every edit has its own.
    Paraphrases are put in the same form; locality questions are kept as they are. `tags['form']` names the
    form and `tags['of']` the edit.
    Raises EditError if there is no wrong answer at all for the choices.
    """
    generator = random.Random(f"{seed}/{edit.id}")
    answers = pool if isinstance(pool, AnswerPool) else AnswerPool(() if pool is None else pool)
    wrong = answers.draw(edit, len(_LETTERS) - 1, generator)
    if not wrong:
        raise EditError(
            f"edit {edit.id!r} ({edit.text!r} -> {edit.target_new!r}): no wrong answer to offer as a choice; "
            "give it a target_true, or pass pool= with edits of the same relation"
        )

    claimed = edit.target_new if generator.random() < 0.5 else wrong[0]
    yes, no = ("yes", "no") if claimed == edit.target_new else ("no", "yes")
    choices = _shuffled([edit.target_new, *wrong], generator)
    letters = dict(zip(choices, _LETTERS, strict=False))
    listed = " ".join(f"({letter}) {choice}" for choice, letter in letters.items())
    old_letter = None if edit.target_true is None else letters.get(edit.target_true)

    def form(name: str, ask: Callable[[str], str], target_new: str, target_true: str | None) -> Edit:
        return Edit(
            prompt=ask(edit.prompt),
            subject=edit.subject,
            target_new=target_new,
            target_true=target_true,
            id=f"{edit.id}/{name}",
            paraphrases=tuple(ask(text) for text in edit.paraphrases),
            locality=edit.locality,
            relation=edit.relation,
            kind="question",
            tags={**edit.tags, "form": name, "of": edit.id},
            # Where the form ends in words of its own, a space follows them.
            target_prefix=edit.target_prefix if ask(edit.prompt) == edit.prompt else None,
        )

    return QuestionForms(
        true_false=form("true_false", lambda text: _claim(edit, text, claimed), yes, no),
        multiple_choice=form(
            "multiple_choice", lambda text: _choice(edit, text, listed), letters[edit.target_new], old_letter
        ),
        directly_generated=form(
            "directly_generated", lambda text: _open(edit, text), edit.target_new, edit.target_true
        ),
    )


def _claim(edit: Edit, text: str, answer: str) -> str:
    question, _ = _question_in(edit, text)
    if edit.kind == "statement":
        return (
            f"Claim: {_sentence(text)} Someone calls it {answer.lower()}. Are they right, yes or no? Answer:"
        )
    if question is None:
        claim = _sentence(text + continuation(text, edit.target(answer)))
        return f"Claim: {claim} Is the claim right, yes or no? Answer:"
    return f"Question: {question} Given answer: {_sentence(answer)} Is it right, yes or no? Answer:"


def _choice(edit: Edit, text: str, choices: str) -> str:
    question, _ = _question_in(edit, text)
    if edit.kind == "statement":
        opening = f"Claim: {_sentence(text)} What is it?"
    elif question is None:
        opening = f'Which choice completes "{text} ..."?'
    else:
        opening = question
    return f"{opening} {choices} The letter of the right choice is"


def _open(edit: Edit, text: str) -> str:
    question, tail = _question_in(edit, text)
    return f"{question} The answer is" if question is not None and not tail else text


def _question_in(edit: Edit, text: str) -> tuple[str | None, str]:
    """The question in a text and what follows it ('It is'); (None, text) for an open sentence.

    Question words open a question without its mark only in question edits: 'Where {} is from, people speak'
    is an open sentence.
    """
    if "?" in text:
        end = text.rindex("?") + 1
        return text[:end], text[end:].strip()
    if edit.kind == "question" and _INTERROGATIVES.match(text):
        return f"{text.rstrip('. ')}?", ""
    return None, text


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _relation(edit: Edit) -> str:
    return edit.relation if edit.relation is not None else edit.prompt


def _shuffled(items: list[str], generator: random.Random) -> list[str]:
    return generator.sample(items, len(items))
