"""KnowEdit (arXiv 2401.01286): recent or false facts with groups of portability and locality questions.

Most of its sets give no old answer, so edits are scored by token accuracy although the prompts are open
sentences.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d4s.datasets.fields import FieldError, Fields, objects, optional_text, split_subject, text
from d4s.edits import Edit, Question

LOOKS_FOR = "'prompt', 'subject', 'target_new', 'portability' or 'locality' (objects with lists of questions)"


def recognises(record: Fields) -> bool:
    return all(isinstance(record.get(name), str) for name in ("prompt", "subject", "target_new")) and any(
        isinstance(record.get(name), Mapping) for name in ("portability", "locality")
    )


def edits_of(record: Fields) -> list[Edit]:
    """One edit. A question's kind is its group's name in lower case; all its answers and aliases count."""
    prompt, subject = split_subject(text(record, "prompt"), text(record, "subject"), "prompt")
    truths = _answers(record.get("ground_truth"), "ground_truth")
    rephrased = optional_text(record, "rephrase_prompt") or optional_text(record, "rephrase")
    return [
        Edit(
            prompt=prompt,
            subject=subject,
            target_new=text(record, "target_new"),
            target_true=truths[0] if truths else None,
            paraphrases=() if rephrased is None else (rephrased,),
            # Where the data gives no answer, locality can still be compared with the unedited model.
            locality=tuple(_questions(record, "locality")),
            portability=tuple(q for q in _questions(record, "portability") if q.answers),
            kind="question",
        )
    ]


def _questions(record: Fields, part: str) -> list[Question]:
    groups = record.get(part) or {}
    if not isinstance(groups, Mapping):
        raise FieldError(f"field {part!r} must be an object of lists, not {type(groups).__name__}")
    return [
        Question(
            text(entry, "prompt"),
            _answers(entry.get("ground_truth"), f"{part}.{name}.ground_truth"),
            name.lower(),
        )
        for name in groups
        for entry in objects(groups, name)
    ]


def _answers(value: Any, field: str) -> tuple[str, ...]:
    """Answers given as one text, as a list of texts, or as a list of lists of aliases."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,) if value.strip() else ()
    if not isinstance(value, list):
        raise FieldError(f"field {field!r} must be text or a list of texts, not {type(value).__name__}")
    return tuple(answer for item in value for answer in _answers(item, field))
