"""Records out of a text file: JSON list, JSONL or CSV, told apart by how the text begins.

A record that cannot be parsed comes out with its problem instead of a value, so that the caller decides
whether to stop or to go on; what concerns the file as a whole is raised at once.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from d4s.errors import DataError, shown
from d4s.files import read_bytes

_BLANKS = " \t\r\n"
_BYTE_ORDER_MARK = "\ufeff"


class Record(NamedTuple):
    """One record of a file.

    number:  counted from 1
    place:   "record 3", with the line where the file has one record a line
    value:   the parsed record; None where it could not be parsed
    problem: why not
    """

    number: int
    place: str
    value: Any
    problem: str | None = None


def read_records(path: Path) -> list[Record]:
    """All records of a UTF-8 file. Raises DataError if it cannot be read, is empty, or holds no records."""
    text = _read_text(path)
    body = text.lstrip(_BYTE_ORDER_MARK)
    start = body.lstrip(_BLANKS)[:1]
    if not start:
        raise DataError(f"{path}: the file is empty; a list of edits was expected")
    if start == "[":
        records = list(_json_list(text, text.index("[")))
    elif start == "{":
        records = list(_json_lines_or_object(path, text))
    else:
        records = list(_csv_rows(path, body))
    if not records:
        raise DataError(f"{path}: the file holds no records; a list of edits was expected")
    return records


def _read_text(path: Path) -> str:
    data = read_bytes(path, "the edits")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path}: the text is UTF-16; save it as UTF-8")
    if data.startswith(b"\x1f\x8b"):
        raise DataError(f"{path}: the file is gzip-compressed; unpack it first")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}: not UTF-8 text: byte {error.start} (line {line}) is 0x{data[error.start]:02x}; "
            "save it as UTF-8"
        ) from None


def _where(text: str, position: int) -> str:
    """Line and column from 1, byte from 0, of a character position."""
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    byte = len(text[:position].encode("utf-8", "surrogatepass"))
    return f"line {line}, column {column} (byte {byte})"


def _is_cut_off(text: str, error: json.JSONDecodeError) -> bool:
    # A string without its end reaches to the end of the text; everything else that is cut, down to a
    # \uXXXX escape of six characters, fails close to it.
    return error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip()) - 6


def _json_problem(text: str, start: int, error: json.JSONDecodeError, last: int) -> str:
    complete = f"the last complete record is number {last}" if last else "no record before it is complete"
    if _is_cut_off(text, error):
        return (
            f"the file is cut off inside this record, which starts at {_where(text, start)}: it ends at "
            f"{_where(text, len(text))}; {complete}. Get the file again, or read what is complete with "
            "skip_bad=True"
        )
    where = _where(text, error.pos)
    return f"not valid JSON: {error.msg} at {where}; {complete}, and nothing after it can be read"


def _json_list(text: str, start: int) -> Iterator[Record]:
    try:
        values = json.loads(text[start:])
    except json.JSONDecodeError:
        yield from _damaged_json_list(text, start)
    except (RecursionError, ValueError):
        yield from _damaged_json_list(text, start)
    else:
        for number, value in enumerate(values, start=1):
            yield Record(number, f"record {number}", value)


def _damaged_json_list(text: str, start: int) -> Iterator[Record]:
    """The complete records of a list that does not parse as a whole, then the place where it breaks."""
    decoder = json.JSONDecoder()
    position = _skip_blanks(text, start + 1)
    number = 0
    while True:
        place = f"record {number + 1}"
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            yield Record(number + 1, place, None, _json_problem(text, position, error, number))
            return
        except (RecursionError, ValueError) as error:
            problem = f"cannot be parsed: {_unreadable(error)}, in what begins at {_where(text, position)}"
            yield Record(number + 1, place, None, problem)
            return
        number += 1
        yield Record(number, place, value)
        end = _skip_blanks(text, end)
        if text[end : end + 1] == ",":
            position = _skip_blanks(text, end + 1)
            continue
        if text[end : end + 1] == "]":
            after = _skip_blanks(text, end + 1)
            problem = f"text after the end of the list, at {_where(text, after)}; nothing may stand there"
        elif end == len(text):
            problem = f"the file is cut off at {_where(text, end)}: the list has no end after record {number}"
        else:
            problem = f"not valid JSON: ',' or ']' expected after record {number}, at {_where(text, end)}"
        yield Record(number + 1, f"after record {number}", None, problem)
        return


def _skip_blanks(text: str, position: int) -> int:
    while position < len(text) and text[position] in _BLANKS:
        position += 1
    return position


def _json_lines_or_object(path: Path, text: str) -> Iterator[Record]:
    # Split at '\n' only: str.splitlines also splits at U+2028, which may stand inside a JSON string.
    lines = text.lstrip(_BYTE_ORDER_MARK + _BLANKS).split("\n")
    try:
        value = json.loads(text.lstrip(_BYTE_ORDER_MARK))
    except json.JSONDecodeError as error:
        # A record a line begins on every line; one object over many lines has its second line inside it.
        if _is_object(lines[0]) or (len(lines) > 1 and lines[1].startswith("{")):
            return _json_lines(text)
        shift = len(text) - len(text.lstrip(_BYTE_ORDER_MARK))
        verb = "is cut off" if _is_cut_off(text, error) else "is not valid JSON"
        raise DataError(
            f"{path}: the file {verb}: {error.msg} at {_where(text, error.pos + shift)}; mend it there"
        ) from None
    except (RecursionError, ValueError) as error:
        # Of records a line, the others can still be read.
        if _is_object(lines[0]) or any(line.startswith("{") for line in lines[1:2]):
            return _json_lines(text)
        raise DataError(
            f"{path}: the file cannot be parsed ({_unreadable(error)}); must be JSON, JSON lines or CSV"
        ) from None
    values = _wrapped(value)
    return (Record(number, f"record {number}", record) for number, record in enumerate(values, start=1))


def _wrapped(value: dict[str, Any]) -> list[Any]:
    """The list in {"data": [...]}, as hubs wrap theirs, also beside a version or a name; else the object itself."""
    lists = [one for one in value.values() if isinstance(one, list)]
    if len(value) == 1 and lists:
        return lists[0]
    named = [value.get(name) for name in ("data", "edits", "records")]
    found = next((one for one in named if isinstance(one, list) and one), None)
    return found if found is not None and all(isinstance(one, dict) for one in found) else [value]


def _unreadable(error: Exception) -> str:
    """Why Python's parser gave up on what may well be JSON."""
    return (
        "it is nested too deeply" if isinstance(error, RecursionError) else "a number has thousands of digits"
    )


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _json_lines(text: str) -> Iterator[Record]:
    number = 0
    bytes_before = 0  # counted on the way: each damaged line names its place, and there may be thousands
    for line_number, line in enumerate(text.split("\n"), start=1):
        content = line.strip(_BLANKS + _BYTE_ORDER_MARK)
        if content:
            number += 1
            place = f"record {number} (line {line_number})"
            try:
                yield Record(number, place, json.loads(content))
            except json.JSONDecodeError as error:
                at = line.index(content) + error.pos
                byte = bytes_before + len(line[:at].encode("utf-8", "surrogatepass"))
                where = f"line {line_number}, column {at + 1} (byte {byte})"
                verb = "the line is cut off" if _is_cut_off(content, error) else "not valid JSON"
                yield Record(number, place, None, f"{verb}: {error.msg} at {where}")
            except (RecursionError, ValueError) as error:
                yield Record(number, place, None, f"the line cannot be parsed: {_unreadable(error)}")
        bytes_before += len(line.encode("utf-8", "surrogatepass")) + 1


def _csv_rows(path: Path, text: str) -> Iterator[Record]:
    """Rows under a header. An empty cell is a field left out; one that holds two quotation marks is an empty text."""
    # Python's csv has a limit of its own, for the whole process, which long texts exceed.
    limit = csv.field_size_limit(max(len(text), csv.field_size_limit()))
    try:
        yield from _rows_under_header(path, text)
    finally:
        csv.field_size_limit(limit)


def _rows_under_header(path: Path, text: str) -> Iterator[Record]:
    header_line = text.lstrip(_BLANKS).split("\n", 1)[0]
    delimiter = max(",;\t", key=header_line.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    number = 0
    try:
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            if header is None:
                header = [cell.strip() for cell in row]
                doubled = sorted(name for name, count in Counter(header).items() if count > 1)
                if doubled:
                    raise DataError(
                        f"{path}: the header names {shown(doubled[0])} twice; rename one of the columns"
                    )
                continue
            number += 1
            place = f"record {number} (line {reader.line_num})"
            if len(row) == len(header):
                cells = {k: v for k, v in zip(header, row, strict=True) if v.strip()}
                yield Record(number, place, {k: "" if v == '""' else v for k, v in cells.items()})
            else:
                yield Record(
                    number,
                    place,
                    None,
                    f"{len(row)} cells under a header of {len(header)}: {delimiter.join(header)[:80]!r}; "
                    f"put quotes around text that holds {delimiter!r}",
                )
    except csv.Error as error:
        yield Record(
            number + 1, f"record {number + 1} (line {reader.line_num})", None, f"not valid CSV: {error}"
        )
    if header is not None and number == 0:
        raise DataError(
            f"{path}: begins with {header_line[:80]!r} and holds no records under it; must be a JSON list or "
            "object, or CSV with a header and rows"
        )
