"""zsRE (arXiv 1706.04115): a question, its rephrasing, an unrelated question; in MEND's form (arXiv 2110.11309) and
in a flat one.

Which answer is written differs between releases. EasyEdit writes a made-up one ('alt'), of which the model can know
nothing; ROME and MEMIT write the true one (the first of 'answers'), and put a question mark behind 'loc'. Both can be
had; figures of the one are none of the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from d4s.edits import Edit, Question
from d4s.edits.formats.fields import (
    FieldError,
    Fields,
    answers,
    filled,
    optional_text,
    questions,
    split_subject,
    target,
    text,
)

ZsreTarget = Literal["alt", "answer"]

LOOKS_FOR = "'subject', 'src', 'alt', 'answers'"
FLAT_LOOKS_FOR = "'subject', 'prompt', 'target', 'ground_truth', 'generality' (texts)"


def recognises(record: Fields) -> bool:
    return all(name in record for name in ("src", "alt", "answers"))


def is_flat(record: Fields) -> bool:
    return all(name in record for name in ("subject", "prompt", "target", "generality"))


def edits_of(record: Fields, towards: ZsreTarget = "alt") -> list[Edit]:
    """One edit: 'src' → 'alt', whose true answer is the first of 'answers'; or, `towards` "answer", 'src' → that.

    'loc' becomes a locality question, with the "nq question: " that the files put before it.
    """
    prompt, subject = split_subject(text(record, "src"), text(record, "subject"), "src")
    truths = answers(record, "answers")
    if not truths:
        raise FieldError("field 'answers' is empty")
    rephrased = optional_text(record, "rephrase")
    locality: tuple[Question, ...] = ()
    if record.get("loc") is not None:
        answer = answers(record, "loc_ans")
        if not answer:
            raise FieldError("field 'loc_ans' is missing or empty")
        locality = (Question(text(record, "loc"), answer, "unrelated"),)
    portability: tuple[Question, ...] = ()
    if record.get("portability"):
        portability = (
            Question(
                text(record, "portability.New Question"),
                (text(record, "portability.New Answer"),),
                "reasoning",
            ),
        )
    edit = Edit(
        prompt=prompt,
        subject=subject,
        target_new=target(record, "alt"),
        target_true=truths[0],
        paraphrases=() if rephrased is None else (filled(rephrased, subject),),
        locality=locality,
        portability=portability,
        kind="question",
    )
    return [_towards_truth(edit) if towards == "answer" else edit]


def edits_of_flat(record: Fields, towards: ZsreTarget = "alt") -> list[Edit]:
    """One edit: 'prompt' → 'target', whose true answer is 'ground_truth'; or, `towards` "answer", 'prompt' → that."""
    prompt, subject = split_subject(text(record, "prompt"), text(record, "subject"), "prompt")
    rephrased = record.get("generality")
    if isinstance(rephrased, Mapping):  # as 'locality' is
        rephrased = text(record, "generality.prompt")
    elif rephrased is not None:
        rephrased = text(record, "generality")
    truths = answers(record, "ground_truth")
    if towards == "answer" and not truths:
        raise FieldError("field 'ground_truth' is missing or empty")
    edit = Edit(
        prompt=prompt,
        subject=subject,
        target_new=target(record, "target"),
        target_true=truths[0] if truths else None,
        paraphrases=() if rephrased is None else (filled(rephrased, subject),),
        locality=questions(record, "locality", "unrelated"),
        portability=tuple(q for q in questions(record, "portability", "reasoning") if q.answers),
        kind="question",
    )
    return [_towards_truth(edit) if towards == "answer" else edit]


def _towards_truth(edit: Edit) -> Edit:
    """What follows from the made-up answer does not follow from the true one."""
    return replace(
        edit,
        target_new=edit.target_true or "",
        target_true=None,
        id="",
        locality=tuple(
            q if q.prompt.endswith("?") else replace(q, prompt=f"{q.prompt}?") for q in edit.locality
        ),
        portability=(),
    )
