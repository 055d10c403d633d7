"""Edits from files: every published format this project reads, and its own.

`FORMATS` maps a format's name to the fields by which it is recognised and to the function that turns one
record into edits. A file's name says nothing: only what stands in it counts.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

from d4s.edits import Edit
from d4s.edits.formats import commonsense, counterfact, elken, knowedit, mquake, plain, qaedit, unke, zsre
from d4s.edits.formats.fields import FieldError
from d4s.edits.formats.files import Record, read_records
from d4s.edits.formats.zsre import ZsreTarget
from d4s.errors import ConfigError, DataError, EditError, shown, unknown_name
from d4s.files import whole

logger = logging.getLogger("d4s.edits.formats")


class Format(NamedTuple):
    """How one kind of record is known and read.

    looks_for:  the fields that tell it, in words, for error messages
    recognises: whether a record is of this kind
    edits_of:   one record → its edits; raises FieldError or EditError
    """

    looks_for: str
    recognises: Callable[[Mapping[str, Any]], bool]
    edits_of: Callable[[Mapping[str, Any]], list[Edit]]


# Tried in this order: a record is of the first format that recognises it.
FORMATS: dict[str, Format] = {
    "counterfact": Format(counterfact.LOOKS_FOR, counterfact.recognises, counterfact.edits_of),
    "mquake": Format(mquake.LOOKS_FOR, mquake.recognises, mquake.edits_of),
    "zsre": Format(zsre.LOOKS_FOR, zsre.recognises, zsre.edits_of),
    "zsre_flat": Format(zsre.FLAT_LOOKS_FOR, zsre.is_flat, zsre.edits_of_flat),
    "unke": Format(unke.LOOKS_FOR, unke.recognises, unke.edits_of),
    "elken": Format(elken.LOOKS_FOR, elken.recognises, elken.edits_of),
    "commonsense_probe": Format(
        commonsense.PROBE_LOOKS_FOR, commonsense.is_probe, commonsense.edits_of_probe
    ),
    "commonsense": Format(commonsense.LOOKS_FOR, commonsense.recognises, commonsense.edits_of),
    "qaedit": Format(qaedit.LOOKS_FOR, qaedit.recognises, qaedit.edits_of),
    "knowedit": Format(knowedit.LOOKS_FOR, knowedit.recognises, knowedit.edits_of),
    "counterfact_flat": Format(counterfact.FLAT_LOOKS_FOR, counterfact.is_flat, counterfact.edits_of_flat),
    "wikibigedit": Format(counterfact.CHANGES_LOOKS_FOR, counterfact.is_change, counterfact.edits_of_changes),
    "edits": Format(plain.LOOKS_FOR, plain.recognises, plain.edits_of),
}

# The first record may be the damaged one: this many are asked before a format counts as unknown.
_RECORDS_ASKED = 50


def load_edits(
    path: str | os.PathLike[str],
    *,
    limit: int | None = None,
    format: str | None = None,
    skip_bad: bool = False,
    skipped: list[str] | None = None,
    zsre_target: ZsreTarget = "alt",
) -> list[Edit]:
    """Read edits from a file in any known format (the keys of `FORMATS`), in the file's order.

    path:     UTF-8 text: a JSON list, JSONL (under whatever name), or CSV with a header
    limit:    at most so many edits, None: all
    format:   a key of `FORMATS`; None: recognised from the records
    skip_bad: leave out records that cannot be read, with one warning in the log, instead of stopping at the
              first. Of a file that was cut off, the complete records are read.
    skipped:  a list that receives one line for each record left out
    zsre_target: what edits of zsRE write. "alt", the default: the made-up answer, as EasyEdit does and all
              figures of this project do, with the true one as `target_true`. "answer": the true one, as ROME and
              MEMIT do, with a "?" behind the unrelated question, as they ask it, and without what would follow
              from the made-up answer

    Every edit's `tags` say where it comes from: 'source' is the format, 'case' the record (the data's own
    case number where it has one). Ids are unique: in the published sets, where the same fact occurs more
    than once, a repeated id gets '#2', '#3', …; in files with the fields of `Edit` it is an error.
    Record numbers in messages start at 1; lines do too, and bytes at 0.
    Raises DataError naming file, record and field; ConfigError for a wrong argument.
    """
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise ConfigError(
            f"limit is {limit!r}; it must be a whole number of at least 1, or None for all edits"
        )
    if format is not None and format not in FORMATS:
        raise ConfigError(unknown_name("format", str(format), FORMATS))
    if zsre_target not in get_args(ZsreTarget):
        raise ConfigError(unknown_name("zsre_target", str(zsre_target), get_args(ZsreTarget)))
    file = os.fspath(path)
    records = read_records(Path(file))
    name = format or _recognise(file, records)

    edits_of = FORMATS[name].edits_of
    if zsre_target != "alt" and edits_of in (zsre.edits_of, zsre.edits_of_flat):
        edits_of = partial(edits_of, towards=zsre_target)

    edits: list[Edit] = []
    owners: dict[str, Record] = {}
    repeats: dict[str, int] = {}
    left_out: list[str] = []
    for record in records:
        try:
            # A record's edits are kept or left out together: half of a case would be no case.
            of_record = _edits_of(name, edits_of, record, owners, repeats)
        except (FieldError, EditError) as error:
            message = f"{file}, {record.place}: {error}"
            if not skip_bad:
                raise DataError(message) from error
            left_out.append(message)
            continue
        owners.update((edit.id, record) for edit in of_record)
        edits += of_record
        if limit is not None and len(edits) >= limit:
            del edits[limit:]
            break

    if skipped is not None:
        skipped += left_out
    if left_out:
        logger.warning("%d of %d records left out:\n%s", len(left_out), len(records), "\n".join(left_out))
    if not edits:
        raise DataError(f"{file}: none of its {len(records)} records could be read; the first: {left_out[0]}")
    return edits


def save_edits(edits: Iterable[Edit], path: str | os.PathLike[str]) -> None:
    """Write edits as JSONL, one `Edit.to_dict()` a line, such that `load_edits` gives the same edits back.

    The file is written beside its place, synced, then renamed: a reader sees the old or the new one, whole.
    Raises OSError if the folder cannot be written to.
    """
    with whole(path) as beside, open(beside, "w", encoding="utf-8", newline="\n") as handle:
        for edit in edits:
            handle.write(json.dumps(edit.to_dict(), ensure_ascii=False) + "\n")


def _recognise(file: str, records: list[Record]) -> str:
    asked = [r for r in records[:_RECORDS_ASKED] if isinstance(r.value, Mapping)]
    for record in asked:
        for name, format_ in FORMATS.items():
            if format_.recognises(record.value):
                return name
    if any(plain.is_nearly(record.value) for record in asked):
        return "edits"  # whose reader says which field lacks
    if asked:
        found = f"found, in {asked[0].place}: {_named(asked[0].value)}"
    else:
        found = f"found, in {records[0].place}: {records[0].problem or type(records[0].value).__name__}"
    looked_for = "; ".join(f"{name}: {format_.looks_for}" for name, format_ in FORMATS.items())
    raise DataError(
        f"{file}: not a known format of edits ({found}); a record must have the fields of one: {looked_for}"
    )


def _named(fields: Iterable[str], most: int = 40) -> str:
    names = list(fields)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + more or "no fields at all"


def _edits_of(
    name: str,
    edits_of: Callable[[Mapping[str, Any]], list[Edit]],
    record: Record,
    owners: Mapping[str, Record],
    repeats: dict[str, int],
) -> list[Edit]:
    if record.problem is not None:
        raise FieldError(record.problem)
    if not isinstance(record.value, Mapping):
        raise FieldError(f"must be an object with fields, not {type(record.value).__name__}")
    edits = edits_of(record.value)
    if name == "edits":
        for edit in edits:
            if edit.id in owners:
                raise FieldError(
                    f"has the id {shown(edit.id)}, like {owners[edit.id].place}; an id names one edit only"
                )
        return edits
    return [
        dataclasses.replace(
            edit,
            id=_free_id(edit.id, owners, repeats),
            tags={"source": name, "case": str(record.number), **edit.tags},
        )
        for edit in edits
    ]


def _free_id(id_: str, taken: Mapping[str, Record], repeats: dict[str, int]) -> str:
    """The id, or the first free one of id#2, id#3, …: later passes over a sequence have id~2 and so on.

    repeats: id → the number given last, from where the search goes on: a fact may occur thousands of times
    """
    free = id_
    while free in taken:
        repeats[id_] = repeats.get(id_, 1) + 1
        free = f"{id_}#{repeats[id_]}"
    return free
