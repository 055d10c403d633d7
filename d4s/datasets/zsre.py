"""zsRE in MEND's form (arXiv 1706.04115, 2110.11309): a question, its rephrasing, an unrelated question."""

from __future__ import annotations

from d4s.datasets.fields import FieldError, Fields, optional_text, split_subject, text, texts
from d4s.edits import Edit, Question

LOOKS_FOR = "'subject', 'src', 'alt', 'answers'"


def recognises(record: Fields) -> bool:
    return all(name in record for name in ("src", "alt", "answers"))


def edits_of(record: Fields) -> list[Edit]:
    """One edit: 'src' → 'alt', whose true answer is the first of 'answers'.

    'loc' becomes a locality question, with the "nq question: " that the files put before it.
    """
    prompt, subject = split_subject(text(record, "src"), text(record, "subject"), "src")
    answers = texts(record, "answers")
    if not answers:
        raise FieldError("field 'answers' is empty")
    rephrased = optional_text(record, "rephrase")
    locality: tuple[Question, ...] = ()
    if record.get("loc") is not None:
        locality = (Question(text(record, "loc"), (text(record, "loc_ans"),), "unrelated"),)
    portability: tuple[Question, ...] = ()
    if record.get("portability"):
        portability = (
            Question(
                text(record, "portability.New Question"),
                (text(record, "portability.New Answer"),),
                "reasoning",
            ),
        )
    return [
        Edit(
            prompt=prompt,
            subject=subject,
            target_new=text(record, "alt"),
            target_true=answers[0],
            paraphrases=() if rephrased is None else (rephrased,),
            locality=locality,
            portability=portability,
            kind="question",
        )
    ]
