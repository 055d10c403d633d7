"""CounterFact (arXiv 2202.05262): false facts, scored by the old answer's likelihood against the new one's.

The original schema carries two paraphrases and ten neighbours a record; the flat one, used by later
benchmarks, one of each and prompts with the subject filled in. WikiBigEdit and its like have the flat schema
without an old answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from d4s.edits import Edit, Kind, Question
from d4s.edits.formats.fields import (
    FieldError,
    Fields,
    answers,
    fetch,
    filled,
    identifier,
    optional_text,
    questions,
    split_subject,
    target,
    text,
    texts,
)

LOOKS_FOR = "'requested_rewrite' (an object with 'prompt', 'subject', 'target_new', 'target_true')"
FLAT_LOOKS_FOR = "'prompt', 'subject', 'target_new', 'ground_truth' (texts, the subject filled in)"
CHANGES_LOOKS_FOR = (
    "'prompt', 'subject', 'target_new', and 'rephrase_prompt' or 'locality_prompt', without an old answer"
)


def recognises(record: Fields) -> bool:
    return isinstance(record.get("requested_rewrite"), Mapping)


def is_flat(record: Fields) -> bool:
    return _is_told(record) and record.get("ground_truth") is not None


def is_change(record: Fields) -> bool:
    return _is_told(record) and any(name in record for name in ("rephrase_prompt", "locality_prompt"))


def _is_told(record: Fields) -> bool:
    return all(isinstance(record.get(name), str) for name in ("prompt", "subject")) and isinstance(
        record.get("target_new"), (str, Mapping)
    )


def edits_of(record: Fields) -> list[Edit]:
    """One edit. The 'portability' question and 'alternative_subject', which some copies add, become
    portability questions of the kinds "reasoning" and "subject_aliasing"."""
    rewrite = fetch(record, "requested_rewrite")
    prompt = text(record, "requested_rewrite.prompt")
    target_new = target(record, "requested_rewrite.target_new")
    portability = []
    if record.get("portability"):
        portability.append(
            Question(
                text(record, "portability.New Question"),
                (text(record, "portability.New Answer"),),
                "reasoning",
            )
        )
    alias = optional_text(record, "alternative_subject")
    if alias is not None:
        portability.append(Question(prompt.replace("{}", alias), (target_new,), "subject_aliasing"))
    case = identifier(record, "case_id")
    return [
        Edit(
            prompt=prompt,
            subject=text(record, "requested_rewrite.subject"),
            target_new=target_new,
            target_true=target(record, "requested_rewrite.target_true"),
            id=f"counterfact-{case}",
            paraphrases=texts(record, "paraphrase_prompts"),
            neighborhood=texts(record, "neighborhood_prompts"),
            attribute=texts(record, "attribute_prompts"),
            generation=texts(record, "generation_prompts"),
            portability=tuple(portability),
            relation=optional_text(rewrite, "relation_id"),
            tags={"case": case},
        )
    ]


def edits_of_flat(record: Fields) -> list[Edit]:
    """One edit. The locality prompt is a neighbour if its answer is the edit's old one, else a question."""
    truths = answers(record, "ground_truth")
    if not truths:
        raise FieldError("field 'ground_truth' is empty")
    neighbour = optional_text(record, "locality_prompt")
    neighbour_answers = answers(record, "locality_ground_truth") or truths
    is_neighbour = neighbour is not None and neighbour_answers[0].strip() == truths[0].strip()
    edit = _told(record, truths[0], "completion")
    if neighbour is None or is_neighbour:
        return [replace(edit, neighborhood=() if neighbour is None else (neighbour,))]
    return [replace(edit, locality=(*edit.locality, Question(neighbour, neighbour_answers, "neighborhood")))]


def edits_of_changes(record: Fields) -> list[Edit]:
    """One edit of a set whose records tell a change and not what was before, as WikiBigEdit's (arXiv 2503.05683).

    There is nothing to compare likelihoods with, so it is scored as a question; the locality prompt is one too.
    """
    edit = _told(record, None, "question")
    unrelated = optional_text(record, "locality_prompt")
    if unrelated is None:
        return [edit]
    question = Question(unrelated, answers(record, "locality_ground_truth"), "neighborhood")
    return [replace(edit, locality=(*edit.locality, question))]


def _told(record: Fields, target_true: str | None, kind: Kind) -> Edit:
    """What flat records have in common."""
    prompt, subject = split_subject(text(record, "prompt"), text(record, "subject"), "prompt")
    paraphrase = optional_text(record, "rephrase_prompt")
    case = identifier(record, "case_id") if record.get("case_id") is not None else None
    return Edit(
        prompt=prompt,
        subject=subject,
        target_new=target(record, "target_new"),
        target_true=target_true,
        id="" if case is None else f"counterfact-{case}",
        paraphrases=() if paraphrase is None else (filled(paraphrase, subject),),
        locality=questions(record, "locality", "neighborhood"),
        portability=tuple(q for q in questions(record, "portability", "reasoning") if q.answers),
        kind=kind,
        tags={} if case is None else {"case": case},
    )
