"""QAEdit (arXiv 2502.11177): questions that a model really gets wrong, from three question-answering sets."""

from __future__ import annotations

from collections.abc import Mapping

from d4s.edits import Edit
from d4s.edits.formats.fields import (
    Fields,
    answers,
    filled,
    identifier,
    optional_text,
    questions,
    split_subject,
    target,
    text,
)

LOOKS_FOR = "'prompt', 'subject', 'target', 'rephrase'"


def recognises(record: Fields) -> bool:
    return (
        "target_new" not in record
        and all(isinstance(record.get(name), str) for name in ("prompt", "subject"))
        and isinstance(record.get("target"), (str, Mapping))
    )


def edits_of(record: Fields) -> list[Edit]:
    """One edit. Numbers repeat between the source sets, so the id carries the source's name as well."""
    prompt, subject = split_subject(text(record, "prompt"), text(record, "subject"), "prompt")
    number = identifier(record, "id")
    source = optional_text(record, "source")
    rephrased = optional_text(record, "rephrase")
    truths = answers(record, "ground_truth")
    return [
        Edit(
            prompt=prompt,
            subject=subject,
            target_new=target(record, "target"),
            target_true=truths[0] if truths else None,
            id="-".join(part for part in ("qaedit", source, number) if part),
            paraphrases=() if rephrased is None else (filled(rephrased, subject),),
            locality=questions(record, "locality", "unrelated"),
            kind="question",
            tags={"question_set": source} if source else {},
        )
    ]
