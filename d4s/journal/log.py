"""The log of a journal: one JSON object a line, each bound to all before it (docs/formats/journal.md)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from d4s.errors import DataError, shown
from d4s.files import (
    WrongType,
    as_count,
    as_list,
    as_number,
    as_text,
    naming,
    parse_json,
    read_bytes,
    sync_folder,
)

CHECK_DIGITS = 32
_TAIL = ', "check": "'


def _numbers(value: Any, place: str) -> None:
    for one in as_list(value, place):
        as_number(one, place)


def _numbers_or_none(value: Any, place: str) -> None:
    if value is not None:
        _numbers(value, place)


# What the events of a sequence must hold: kind → field → its check. Numbers among them become names of files.
_FIELDS: dict[str, dict[str, Callable[[Any, str], object]]] = {
    "step": {"step": as_count, "edits": as_list, "seconds": as_number},
    "tested": {
        "made": as_count,
        "written_probability": _numbers,
        "efficacy": _numbers,
        "paraphrase": _numbers,
    },
    "point": {"made": as_count, "digest": as_text},
    "segment": {"first": as_count, "step": as_count, "digest": as_text},
    "snapshot": {"event": as_count, "digest": as_text},
}


def _check(before: str, body: bytes) -> str:
    return hashlib.sha256(before.encode() + body).hexdigest()[:CHECK_DIGITS]


@dataclass(frozen=True)
class _End:
    """Where the next line begins, what it is bound to (nothing: the log's begin), and the number of lines before it."""

    size: int = 0
    check: str = ""
    count: int = 0


@dataclass
class Log:
    """The events so far, and the file they are appended to.

    begin: what the first line is bound to
    torn: bytes of a last line that was not written whole, which the next `append` takes away
    """

    path: Path
    begin: str
    events: list[dict[str, Any]] = field(default_factory=list)
    torn: int = 0
    _end: _End = _End()

    def append(self, kind: str, **fields: Any) -> dict[str, Any]:
        """One more event; durable when this returns.

        Raises OSError where it cannot be written; the file is then as it was, or, where that fails too, ends in a line
        that the next `append` takes away. An interruption (Ctrl-C) is the same: all that this object knows of the end
        changes at once.
        """
        end = self._end
        del self.events[end.count :]
        event = {"n": end.count, "kind": kind, **fields}
        body = json.dumps(event, allow_nan=False)[:-1].encode()
        check = _check(end.check or self.begin, body)
        line = body + f'{_TAIL}{check}"}}\n'.encode()
        with naming(self.path), open(self.path, "r+b" if end.size or self.path.exists() else "xb") as file:
            file.truncate(end.size)  # what a failed or torn append has left
            file.seek(end.size)
            try:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                with suppress(OSError):  # whoever reads it before the next append would take it for done
                    file.truncate(end.size)
                raise
            if not end.size:
                sync_folder(self.path.parent)
        self.events.append(event)
        self._end, self.torn = _End(end.size + len(line), check, end.count + 1), 0
        return event

    @staticmethod
    def read(path: str | os.PathLike[str], begin: str) -> Log:
        """All whole lines. Raises DataError for a log that is damaged elsewhere than at its end, or another head's."""
        place = Path(path)
        log = Log(place, begin)
        if not place.exists():
            return log
        data = read_bytes(place, "the log of a journal")
        lines = data.split(b"\n")
        rest = lines.pop()  # what follows the last line feed: nothing, or a torn line
        size, before = 0, ""
        for number, line in enumerate(lines):
            last = number == len(lines) - 1 and not rest
            try:
                check = _checked(line, number, before or begin, place)
            except DataError:
                if last:  # a torn write may have brought the line feed, and not all before it
                    rest = line + b"\n"
                    break
                raise
            log.events.append(_parsed(line, number, place))
            size, before = size + len(line) + 1, check
        log._end, log.torn = _End(size, before, len(log.events)), len(rest)
        return log


def _checked(line: bytes, number: int, before: str, path: Path) -> str:
    """The check of a line, which fits it. DataError for a line that was not written so, or not behind that one."""
    where = f"{path}, line {number + 1}"
    body, found, tail = line.rpartition(_TAIL.encode())
    if not found or len(tail) != CHECK_DIGITS + 2 or not tail.endswith(b'"}'):
        raise DataError(f"{where}: has no check at its end; the log is damaged, or was changed")
    check = tail[:-2].decode("ascii", "replace")
    if check != _check(before, body):
        raise DataError(
            f"{where}: its check does not fit it and the lines before; the log is damaged, or was changed"
        )
    return check


def _parsed(line: bytes, number: int, path: Path) -> dict[str, Any]:
    """The event of a line whose check fits: whatever is wrong with it was written so."""
    where = f"{path}, line {number + 1}"
    event = parse_json(line.decode("utf-8", "replace"), where)
    if not isinstance(event, Mapping) or event.get("n") != number or not isinstance(event.get("kind"), str):
        raise DataError(f"{where}: must be event {number} with a kind, and is {shown(event)}")
    try:
        for name, fits in _FIELDS.get(event["kind"], {}).items():
            if name not in event:
                raise WrongType(f"it has no {name!r}")
            fits(event[name], name)
        if "snapshot" in event:  # of the state after it
            as_text(event["snapshot"], "snapshot")
        if event["kind"] == "step":
            for name in ("first_probability", "last_probability"):
                _numbers_or_none(event.get(name), name)
                if event.get(name) is not None and len(event[name]) != len(event["edits"]):
                    raise WrongType(f"{name} is not one number an edit")
    except WrongType as error:
        raise DataError(
            f"{where}: is no {shown(event['kind'])} event ({error}); the log is damaged, or was changed"
        ) from None
    return {name: value for name, value in event.items() if name != "check"}
