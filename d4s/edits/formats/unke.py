"""UnKE (arXiv 2405.15349): questions with long unstructured answers, a paraphrase, and sub-questions.

No subject is named, and UnKE itself reads its keys at the question's last token. So the whole question stands where
the subject does: its last token is the one that an edit's key is read at.
"""

from __future__ import annotations

from d4s.edits import Edit, Question
from d4s.edits.formats.fields import (
    FieldError,
    Fields,
    answers,
    identifier,
    optional_text,
    target,
    text,
    texts,
)

LOOKS_FOR = "'question', 'answer' (a long text), 'para_question', 'sub_question', 'sub_answer'"


def recognises(record: Fields) -> bool:
    return all(name in record for name in ("question", "answer", "para_question"))


def edits_of(record: Fields) -> list[Edit]:
    """One edit: question → answer. Each sub-question is a portability question of the kind "sub_question"."""
    rephrased = optional_text(record, "para_question")
    asked = texts(record, "sub_question")
    told = answers(record, "sub_answer")
    if len(asked) != len(told):
        raise FieldError(f"field 'sub_answer' has {len(told)} texts for {len(asked)} in 'sub_question'")
    return [
        Edit(
            prompt="{}",
            subject=text(record, "question"),
            target_new=target(record, "answer"),
            id=f"unke-{identifier(record, 'id')}" if record.get("id") is not None else "",
            paraphrases=() if rephrased is None else (rephrased,),
            portability=tuple(
                Question(question, (answer,), "sub_question")
                for question, answer in zip(asked, told, strict=True)
            ),
            kind="question",
        )
    ]
