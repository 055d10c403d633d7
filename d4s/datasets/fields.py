"""Fields of a record, fetched with checks that name the field, and subjects found in prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Fields = Mapping[str, Any]


class FieldError(Exception):
    """A field that is missing or wrong; the loader adds file and record."""


def fetch(record: Fields, path: str) -> Any:
    """The value at a dotted path such as 'requested_rewrite.target_new.str'."""
    value: Any = record
    for part in path.split("."):
        if not isinstance(value, Mapping) or value.get(part) is None:
            raise FieldError(f"field {path!r} is missing")
        value = value[part]
    return value


def text(record: Fields, path: str) -> str:
    """The text at a dotted path, which must not be blank."""
    value = fetch(record, path)
    if not isinstance(value, str):
        raise FieldError(f"field {path!r} must be text, not {type(value).__name__}")
    if not value.strip():
        raise FieldError(f"field {path!r} is empty")
    return value


def optional_text(record: Fields, name: str) -> str | None:
    """The text of a field, or None if the record does not have it."""
    return None if record.get(name) is None else text(record, name)


def texts(record: Fields, path: str) -> tuple[str, ...]:
    """The list of texts at a dotted path; a last part that is left out is an empty list."""
    parent, _, name = path.rpartition(".")
    holder = fetch(record, parent) if parent else record
    if isinstance(holder, Mapping) and holder.get(name) is None:
        return ()
    value = fetch(record, path)
    if not isinstance(value, list):
        raise FieldError(f"field {path!r} must be a list of texts, not {type(value).__name__}")
    for i, item in enumerate(value):
        if not isinstance(item, str):
            raise FieldError(f"field '{path}[{i}]' must be text, not {type(item).__name__}")
    return tuple(value)


def objects(record: Fields, path: str) -> list[Fields]:
    """The list of objects at a dotted path."""
    value = fetch(record, path)
    if not isinstance(value, list):
        raise FieldError(f"field {path!r} must be a list of objects, not {type(value).__name__}")
    for i, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise FieldError(f"field '{path}[{i}]' must be an object, not {type(item).__name__}")
    return value


def split_subject(prompt: str, subject: str, field: str) -> tuple[str, str]:
    """Template and subject of a full prompt: the prompt with '{}' for the subject, and the subject as it
    stands there. Filled again, the template is the prompt, letter by letter.

    Of several occurrences one that is a word of its own comes before one inside a word ('i' in 'in'), then
    the last one counts: there the model has read all of the question that leads up to the subject. An
    occurrence in other letter case is taken only if there is none in the subject's own.
    Raises FieldError if the subject does not occur.
    """
    name = subject.strip()
    places = _occurrences(prompt, name) or _occurrences(prompt, name, re.IGNORECASE)
    if not places:
        raise FieldError(f"field {field!r} does not contain the subject {name!r}: {prompt!r}")
    whole = [p for p in places if _is_word(prompt, p, len(name))]
    at = (whole or places)[-1]
    return prompt[:at] + "{}" + prompt[at + len(name) :], prompt[at : at + len(name)]


def _occurrences(prompt: str, name: str, flags: int = 0) -> list[int]:
    return [match.start() for match in re.finditer(re.escape(name), prompt, flags)] if name else []


def _is_word(prompt: str, at: int, length: int) -> bool:
    before, after = prompt[at - 1 : at] if at else "", prompt[at + length : at + length + 1]
    return not (before.isalnum() and prompt[at].isalnum()) and not (
        after.isalnum() and prompt[at + length - 1].isalnum()
    )
