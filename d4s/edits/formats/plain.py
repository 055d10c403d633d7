"""The project's own files: one `Edit.to_dict()` a record, as JSONL, a JSON list, or CSV."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from d4s.edits import Edit
from d4s.edits.formats.fields import FieldError, Fields, target
from d4s.errors import DataError
from d4s.files import parse_json

LOOKS_FOR = "'prompt' (with '{}' for the subject), 'subject', 'target_new' and any other field of Edit"

_LISTS = ("paraphrases", "neighborhood", "attribute", "generation", "reference_texts")
_OBJECTS = ("locality", "portability", "tags")


def recognises(record: Fields) -> bool:
    return all(name in record for name in ("prompt", "subject", "target_new"))


def is_nearly(record: Fields) -> bool:
    """Whether it has fields of `Edit` alone, and lacks one that an edit needs."""
    return {*record} <= {one.name for one in fields(Edit)} and len(
        {"prompt", "subject", "target_new"} - {*record}
    ) == 1


def edits_of(record: Fields) -> list[Edit]:
    """One edit. In CSV, where every cell is text, a list of texts is JSON if it begins with '[' and else
    divided by '|'; 'locality', 'portability' and 'tags' are JSON."""
    values = dict(record)
    for name in ("target_new", "target_true"):
        if isinstance(values.get(name), Mapping):
            values[name] = target(record, name)
    for name in _LISTS:
        if isinstance(cell := values.get(name), str):
            values[name] = (
                _json(cell, name) if cell.lstrip().startswith("[") else [t.strip() for t in cell.split("|")]
            )
    for name in _OBJECTS:
        if isinstance(cell := values.get(name), str):
            values[name] = _json(cell, name)
    return [Edit.from_dict(values)]


def _json(cell: str, name: str) -> Any:
    try:
        return parse_json(cell, f"field {name!r}")
    except DataError as error:
        raise FieldError(str(error)) from None
