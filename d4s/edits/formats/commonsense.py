"""20Q and PEP3k as edited in MEMIT-CSK (arXiv 2305.14956): everyday statements judged true or false.

The prompt is the whole statement, and 'True' or 'False' follows it. The other label is the old answer: these
are statements the model judged wrongly, or any, and a judgement has two sides only.
"""

from __future__ import annotations

import re

from d4s.edits import Edit, Question
from d4s.edits.formats.fields import FieldError, Fields, split_subject, text, texts
from d4s.errors import shown

LOOKS_FOR = "'prompt', 'label' (0, 1, 'True' or 'False')"
PROBE_LOOKS_FOR = "'prompt', 'subject', 'label', 'affected_paraphrase'"

_LABELS = {"0": "False", "1": "True", "False": "False", "True": "True"}
_OTHER = {"True": "False", "False": "True"}
_OPENING = re.compile(r"(?:(?:an?|the|and)\s+)*(\S*\w)", re.IGNORECASE)


def recognises(record: Fields) -> bool:
    return "prompt" in record and "label" in record


def is_probe(record: Fields) -> bool:
    return recognises(record) and "affected_paraphrase" in record


def edits_of(record: Fields) -> list[Edit]:
    """One edit. The lists name no subject: it is the first word after articles, as in the probe sets."""
    statement = text(record, "prompt")
    opening = _OPENING.match(statement)
    if opening is None:
        raise FieldError(f"field 'prompt' has no word for a subject: {shown(statement)}")
    prompt = statement[: opening.start(1)] + "{}" + statement[opening.end(1) :]
    return [_statement(prompt, opening.group(1), record)]


def edits_of_probe(record: Fields) -> list[Edit]:
    """One edit with its probes.

    Affected neighbours share the edit's label and, with the reasoning, whose sentences are true, are
    portability questions; for unaffected ones the data gives no label, so they are locality questions
    without an answer, to be compared with the unedited model.
    """
    prompt, subject = split_subject(text(record, "prompt"), text(record, "subject"), "prompt")
    label = _label(record)
    affected = [
        Question(probe, (label,), name)
        for name in (
            "affected_neighborhood_subject",
            "affected_neighborhood_verb",
            "affected_neighborhood_object",
        )
        for probe in texts(record, name)
    ]
    affected += [
        Question(probe, ("True",), "affected_reasoning") for probe in texts(record, "affected_reasoning")
    ]
    unaffected = [
        Question(probe, (), name)
        for name in ("unaffected_neighborhood_subject", "unaffected_neighborhood_object")
        for probe in texts(record, name)
    ]
    return [
        _statement(
            prompt,
            subject,
            record,
            paraphrases=texts(record, "affected_paraphrase"),
            portability=tuple(affected),
            locality=tuple(unaffected),
        )
    ]


def _statement(
    prompt: str,
    subject: str,
    record: Fields,
    paraphrases: tuple[str, ...] = (),
    portability: tuple[Question, ...] = (),
    locality: tuple[Question, ...] = (),
) -> Edit:
    label = _label(record)
    return Edit(
        prompt=prompt,
        subject=subject,
        target_new=label,
        target_true=_OTHER[label],
        paraphrases=paraphrases,
        portability=portability,
        locality=locality,
        kind="statement",
    )


def _label(record: Fields) -> str:
    value = record.get("label")
    label = _LABELS.get(str(value).strip()) if isinstance(value, (str, int)) else None
    if label is not None:
        return label
    raise FieldError(f"field 'label' is {shown(value)}; 0, 1, 'True' or 'False' would be right")
