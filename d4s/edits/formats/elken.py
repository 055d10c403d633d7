"""ELKEN (arXiv 2402.13093): events, which change several facts and tendencies at once.

One edit an event: the first half of the sentence, with the subject in it, is the prompt and the rest the
target. Cut right after the subject, all news about one organisation would contradict each other. The
questions about facts and tendencies that the event changes are portability, those about what it leaves
alone locality.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from d4s.edits import Edit, Question
from d4s.edits.formats.fields import FieldError, Fields, fetch, objects, optional_text, text, texts
from d4s.errors import shown

LOOKS_FOR = "'event', 'fact', 'tendency' (objects with 'qas' and 'local_qas')"

_ARTICLE = re.compile(r"(?:an?|the)\s+", re.IGNORECASE)
_NAME = re.compile(r"(?:[A-Z0-9][^\s,;]*)(?: (?:(?:of|the|for|and|de) )*[A-Z0-9][^\s,;]*)*")


def recognises(record: Fields) -> bool:
    return all(name in record for name in ("event", "fact", "tendency"))


def edits_of(record: Fields) -> list[Edit]:
    """One edit, with kinds "fact" and "tendency" in portability and locality.

    The subject is the first in the sentence of those that the fact questions are about; where there is
    none, the name with which the sentence begins, or else its first three words after an article.
    A tendency question lists its choices and is answered by a letter.
    """
    event = text(record, "event").strip()
    facts = objects(record, "fact.qas")
    prompt, subject, target = _cut(event, [_name_of(entry) for entry in facts])
    return [
        Edit(
            prompt=prompt,
            subject=subject,
            target_new=target,
            portability=(*map(_fact, facts), *map(_tendency, objects(record, "tendency.qas"))),
            locality=(
                *map(_fact, objects(record, "fact.local_qas")),
                *map(_tendency, objects(record, "tendency.local_qas")),
            ),
            relation=optional_text(record, "event_type"),
            kind="question",
        )
    ]


def _name_of(entry: Fields) -> str:
    subject = fetch(entry, "subject")
    if not isinstance(subject, Mapping):
        raise FieldError(f"field 'subject' of a question must be an object, not {type(subject).__name__}")
    return text(entry, "subject.name" if "name" in subject else "subject.ent2name")


def _fact(entry: Fields) -> Question:
    return Question(
        text(entry, "question"), (text(entry, "answer.name"), *texts(entry, "answer.alias")), "fact"
    )


def _tendency(entry: Fields) -> Question:
    prompt = f"{text(entry, 'question')} {text(entry, 'candidate')} Answer:"
    return Question(prompt, (text(entry, "answer"),), "tendency")


def _cut(event: str, names: list[str]) -> tuple[str, str, str]:
    """Prompt, subject and target: the sentence cut at its middle, or after the subject if that is later."""
    places = sorted((event.find(name), -len(name)) for name in names if name in event)
    for start, length in [*places, _opening(event)]:
        end = start - length
        cut = event.find(" ", max(end, len(event) // 2))
        if cut < 0:
            cut = event.find(" ", end)
        if cut > 0:
            return event[:start] + "{}" + event[end:cut], event[start:end], event[cut:].strip()
    raise FieldError(f"field 'event' has too few words for a subject and what happens to it: {shown(event)}")


def _opening(event: str) -> tuple[int, int]:
    """Start and, negative, length of the words with which the sentence begins, without an article."""
    article = _ARTICLE.match(event)
    start = article.end() if article else 0
    name = _NAME.match(event, start)
    words = name.group() if name else " ".join(event[start:].split(" ")[:3])
    return start, -len(words.removesuffix("'s"))
