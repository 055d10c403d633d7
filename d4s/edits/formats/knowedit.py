"""KnowEdit (arXiv 2401.01286): recent or false facts with groups of portability and locality questions.

Most of its sets give no old answer, so edits are scored by token accuracy although the prompts are open
sentences.
"""

from __future__ import annotations

from collections.abc import Mapping

from d4s.edits import Edit
from d4s.edits.formats.fields import (
    Fields,
    answers,
    filled,
    optional_text,
    questions,
    split_subject,
    target,
    text,
)

LOOKS_FOR = "'prompt', 'subject', 'target_new', 'portability' or 'locality' (objects with lists of questions)"


def recognises(record: Fields) -> bool:
    return (
        all(isinstance(record.get(name), str) for name in ("prompt", "subject"))
        and isinstance(record.get("target_new"), (str, Mapping))
        and any(isinstance(record.get(name), Mapping) for name in ("portability", "locality"))
    )


def edits_of(record: Fields) -> list[Edit]:
    """One edit. A question's kind is its group's name in lower case; all its answers and aliases count."""
    prompt, subject = split_subject(text(record, "prompt"), text(record, "subject"), "prompt")
    truths = answers(record, "ground_truth")
    rephrased = optional_text(record, "rephrase_prompt") or optional_text(record, "rephrase")
    return [
        Edit(
            prompt=prompt,
            subject=subject,
            target_new=target(record, "target_new"),
            target_true=truths[0] if truths else None,
            paraphrases=() if rephrased is None else (filled(rephrased, subject),),
            # Where the data gives no answer, locality can still be compared with the unedited model.
            locality=questions(record, "locality", "locality"),
            portability=tuple(q for q in questions(record, "portability", "portability") if q.answers),
            kind="question",
        )
    ]
