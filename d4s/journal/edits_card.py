"""d4s_edits.json: beside a saved edited model, which facts were written into it, when, and what it was before."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from d4s.edits import Edit
from d4s.errors import DataError, EditError
from d4s.files import as_json, as_list, as_object, as_text, checking, read_json, write_json

EDITS_CARD = "d4s_edits.json"
FORMAT = "d4s-edits-1"
_WRITER = "d4s edit"


@dataclass(frozen=True)
class EditsCard:
    """base_fingerprint: of the unedited model's weights; base_name: as it was loaded by; when: UTC, ISO 8601"""

    edits: tuple[Edit, ...]
    base_fingerprint: str
    base_name: str
    method: str
    when: str


def write_edits_card(
    folder: str | os.PathLike[str],
    edits: Sequence[Edit],
    *,
    base_fingerprint: str,
    base_name: str,
    method: str,
    when: str,
) -> Path:
    """Writes d4s_edits.json into a model's folder, whole or not at all; returns its path.

    edits: those that the weights hold, in their order; base_fingerprint: `d4s.locate.covariance.fingerprint_of`;
    when: UTC, ISO 8601
    """
    path = Path(folder) / EDITS_CARD
    record = {
        "format": FORMAT,
        "base": {"name": base_name, "fingerprint": base_fingerprint},
        "method": method,
        "when": when,
        "edits": [edit.to_dict() for edit in edits],
    }
    write_json(record, path, indent=1)
    return path


def read_edits_card(folder: str | os.PathLike[str]) -> EditsCard | None:
    """What stands in a model's folder; None where nothing does. DataError for a damaged file or another."""
    path = Path(folder) / EDITS_CARD
    if not path.exists():
        return None
    record = read_json(path, writer=_WRITER, format=FORMAT, fields=("base", "method", "when", "edits"))
    with checking(path, _WRITER):
        base = as_object(record["base"], "base")
        texts = [as_text(base.get(name), f"base.{name}") for name in ("fingerprint", "name")]
        texts += [as_text(record[name], name) for name in ("method", "when")]
        edits = [as_object(as_json(edit, "an edit"), "an edit") for edit in as_list(record["edits"], "edits")]
    try:
        return EditsCard(tuple(Edit.from_dict(edit) for edit in edits), *texts)
    except EditError as error:
        raise DataError(f"{path}: not what {_WRITER} wrote ({error}); get the model again") from None
