"""QAEdit (arXiv 2502.11177): questions that a model really gets wrong, from three question-answering sets."""

from __future__ import annotations

from d4s.datasets.fields import Fields, fetch, objects, optional_text, split_subject, text
from d4s.edits import Edit, Question

LOOKS_FOR = "'prompt', 'subject', 'target', 'rephrase'"


def recognises(record: Fields) -> bool:
    return "target_new" not in record and all(
        isinstance(record.get(name), str) for name in ("prompt", "subject", "target")
    )


def edits_of(record: Fields) -> list[Edit]:
    """One edit. Numbers repeat between the source sets, so the id carries the source's name as well."""
    prompt, subject = split_subject(text(record, "prompt"), text(record, "subject"), "prompt")
    number = str(fetch(record, "id"))
    source = optional_text(record, "source")
    rephrased = optional_text(record, "rephrase")
    unrelated = objects(record, "locality") if record.get("locality") is not None else []
    return [
        Edit(
            prompt=prompt,
            subject=subject,
            target_new=text(record, "target"),
            id="-".join(part for part in ("qaedit", source, number) if part),
            paraphrases=() if rephrased is None else (rephrased,),
            locality=tuple(Question(text(q, "loc"), (text(q, "loc_ans"),), "unrelated") for q in unrelated),
            kind="question",
            tags={"question_set": source} if source else {},
        )
    ]
