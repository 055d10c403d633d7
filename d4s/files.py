"""Files and folders that are there whole or not at all, places for them, and what is read back from them with care."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from d4s.errors import DataError, shown

if TYPE_CHECKING:
    from pandas import DataFrame

logger = logging.getLogger("d4s.files")

MOST_BYTES = 4 << 30  # of a text that is read: more is no list of edits, and would not fit into memory
_DIGEST = re.compile(rb'\{\s*"digest": "sha256:([^"]*)"')
_DIGITS = "0" * 64


def check_place(path: str | os.PathLike[str]) -> None:
    """Raises OSError if a device, pipe or socket stands at the path: a file would take its place for everybody."""
    place = Path(path)
    if place.exists() and not (place.is_file() or place.is_dir()):
        raise OSError(errno.EINVAL, "is a device, pipe or socket; name a file or folder", os.fspath(path))


def check_folder(path: str | os.PathLike[str], room: int = 0) -> None:
    """Makes the folder where it lacks; raises OSError unless `room` bytes can be written to it."""
    check_place(path)
    Path(path).mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"d4s")  # a disk may be so full that it takes names but no bytes
            file.flush()
    except OSError as error:
        raise OSError(error.errno, f"cannot be written to ({error.strerror})", os.fspath(path)) from None
    if (free := shutil.disk_usage(path).free) < room:
        raise OSError(
            errno.ENOSPC, f"has {free / 1e9:.2f} GB free, and {room / 1e9:.2f} GB are needed", os.fspath(path)
        )


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """`with whole("a.json") as beside: …` writes to `beside`; at the end that, and all in it, is synced and takes the
    path's place.

    `beside` may become a file, or a folder where nothing stands at `path`. Folders above are made where they lack.
    If the block raises, nothing is left, and what stood at `path` stays. A tensor file that cannot be written
    raises OSError, as others do; so does a path at which a device or pipe stands, which nothing may replace. Such an
    error names the path.
    """
    place = Path(path)
    check_place(place)
    make_folder(place.parent)
    beside = place.with_name(f"{place.stem}.{os.getpid()}.part{place.suffix}")
    try:
        with naming(place):
            mode = None
            if place.suffix == ".safetensors":
                beside.touch()
                mode = stat.S_IMODE(beside.stat().st_mode)
            yield beside
            _settle(beside, mode)
            beside.replace(place)
            sync_folder(place.parent)
    except SafetensorError as error:
        raise OSError(f"{place}: {error}") from None
    finally:
        with suppress(OSError):  # of a disk that gives way: what went wrong before says more
            if beside.is_dir():
                shutil.rmtree(beside)
            else:
                beside.unlink(missing_ok=True)


def _settle(place: Path, mode: int | None) -> None:
    """A file, or a folder with all in it, on the disk, its tensor files with the mode that the umask leaves:
    safetensors (0.8) gives them to their owner alone. mode: that; None: found by a file made in the folder"""
    if place.is_dir():
        probe = place / f"{os.getpid()}.part"
        probe.touch()
        mode = stat.S_IMODE(probe.stat().st_mode)
        probe.unlink()
        for inside in place.iterdir():
            _settle(inside, mode)
        sync_folder(place)
        return
    if mode is not None and place.suffix == ".safetensors":
        place.chmod(mode)
    with open(place, "rb") as file:
        os.fsync(file.fileno())


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """An OSError of a write or sync, which knows no name, is raised with that of the file."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, f"cannot be written ({error.strerror})", os.fspath(path)) from error


def make_folder(path: str | os.PathLike[str]) -> None:
    """The folder and those above it, where they lack, so that their names too outlast a loss of power."""
    place = Path(path)
    lacking = [folder for folder in (place, *place.parents) if not folder.exists()]
    place.mkdir(parents=True, exist_ok=True)
    for folder in lacking:
        sync_folder(folder.parent)


def sync_folder(path: str | os.PathLike[str]) -> None:
    """The names in a folder, a new one among them, outlast a loss of power. Where folders cannot be synced, nothing is
    done (Windows)."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    except OSError:
        return
    try:
        with naming(path):
            os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def write_text(text: str, path: str | os.PathLike[str]) -> None:
    """UTF-8, whole or not at all."""
    with whole(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_table(table: DataFrame, path: str | os.PathLike[str]) -> None:
    """CSV without the index, whole or not at all."""
    with whole(path) as beside:
        table.to_csv(beside, index=False)


def digest(parts: Iterable[bytes | bytearray | memoryview]) -> str:
    """ "sha256:" and 64 hex digits of the parts in their order, each with its length before it: neither a changed bit
    nor a moved border between two parts leaves it as it was."""
    found = hashlib.sha256()
    for part in parts:
        view = memoryview(part)
        found.update(view.nbytes.to_bytes(8, "little"))
        found.update(view)
    return f"sha256:{found.hexdigest()}"


def write_json(record: Mapping[str, Any], path: str | os.PathLike[str], indent: int | None = None) -> None:
    """JSON, whole or not at all, with a field "digest" in front.

    It is the `digest` of all the file's bytes, in which the 64 digits themselves stand as zeros.
    """
    # In ASCII, which spells everything that a text may hold, half of a surrogate pair in an error's text too.
    text = json.dumps({"digest": f"sha256:{_DIGITS}", **record}, indent=indent)
    write_text(text.replace(f"sha256:{_DIGITS}", digest([text.encode()]), 1), path)


def read_json(
    path: str | os.PathLike[str],
    *,
    writer: str,
    format: str,
    fields: Iterable[str],
    later: Iterable[str] = (),
    always_digest: bool = False,
) -> dict[str, Any]:
    """The JSON object that `write_json` wrote, checked against its digest.

    writer, format, fields: whose file it must be, what its field "format" says, and its other fields: all of them,
        and no more; later: fields that earlier versions did not write
    always_digest: it is a file that was never written without a digest
    A file without a digest, as earlier versions wrote them, is read, with a line in the log.
    Raises DataError for a file that cannot be read, is no such object, or has changed since it was written.
    """

    def wrong(reason: str) -> DataError:
        return DataError(f"{path}: not what {writer} wrote ({reason}); its format is {format!r}")

    data = read_bytes(path, f"what {writer} writes")
    try:
        record = parse_json(data.decode(), "it")
    except UnicodeDecodeError as error:
        raise wrong(f"byte {error.start} is 0x{data[error.start]:02x}: not UTF-8 text") from None
    except DataError as error:
        raise wrong(str(error)) from None
    if not isinstance(record, dict):
        raise wrong(f"it is no object with fields but {shown(record)}")
    if record.get("format") != format:
        raise wrong(f"its format is {shown(record.get('format'))}")
    if (stored := record.pop("digest", None)) is not None:
        place = _DIGEST.match(data)
        zeroed = None if place is None else data[: place.start(1)] + _DIGITS.encode() + data[place.end(1) :]
        if zeroed is None or stored != digest([zeroed]):
            raise DataError(
                f"{path}: has changed since {writer} wrote it: its content does not have its digest; get the file "
                'again, or, if it was you who changed it, take its field "digest" out'
            )
    expected = {"format", *fields}
    for name in record:
        if name not in expected and name not in later:
            raise wrong(f"it has the field {shown(name)}")
    for name in expected:
        if name not in record:
            raise wrong(f"it has no field {name!r}")
    if stored is None and always_digest:
        raise wrong("it has no field 'digest'")
    if stored is None:
        logger.info("%s: has no digest, so it is not checked that it is as it was written", path)
    return record


@contextmanager
def checking(path: str | os.PathLike[str], writer: str) -> Iterator[None]:
    """Around what looks into a stored record: a WrongType becomes a DataError that names the file."""
    try:
        yield
    except WrongType as error:
        raise DataError(
            f"{path}: not what {writer} wrote ({error}); get the file again, or make it anew"
        ) from None


class WrongType(Exception):
    """A value of a stored record that is of another type than it was written with."""


def as_list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list):
        raise WrongType(f"{place} must be a list, not {shown(value)}")
    return value


def as_object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise WrongType(f"{place} must be an object with fields, not {shown(value)}")
    return value


def as_text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise WrongType(f"{place} must be text, not {shown(value)}")
    return value


def as_count(value: Any, place: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise WrongType(f"{place} must be a whole number from 0 on, not {shown(value)}")
    return value


def as_number(value: Any, place: str) -> float | int | None:
    """A number, or None, which stands for one that was not finite."""
    if value is None or isinstance(value, float):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        return value
    raise WrongType(f"{place} must be a number, not {shown(value)}")


def as_json(value: Any, place: str, deepest: int = 20) -> Any:
    """Any JSON value that is not nested more deeply than a configuration is."""
    if deepest == 0:
        raise WrongType(f"{place} is nested too deeply")
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        as_json(one, place, deepest - 1)
    return value


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text. Raises DataError, in one line that begins with `where`, for whatever is wrong with it.

    That includes what Python's own parser has other errors for: nesting too deep and numbers of thousands of digits.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}; mend it there"
        ) from None
    except RecursionError:
        raise DataError(f"{where}: not readable JSON: nested too deeply; make it flat") from None
    except ValueError:
        raise DataError(f"{where}: not readable JSON: a number of thousands of digits; shorten it") from None


def check_regular(path: str | os.PathLike[str], what: str) -> None:
    """Raises DataError for a folder, and for a pipe or device, which has no end: waiting for it would be a hang."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise DataError(f"{path}: this is a folder; name the file with {what} in it")
    if not stat.S_ISREG(mode):
        raise DataError(f"{path}: is a pipe or a device; save {what} to a file and name that")


def read_bytes(path: str | os.PathLike[str], what: str) -> bytes:
    """All bytes of a regular file, of which at most `MOST_BYTES`.

    what: what was expected, for the message: "a list of edits"
    Raises DataError for anything else: a pipe or device has no end, and waiting for it would be a hang.
    """
    try:
        check_regular(path, what)
        status = os.stat(path)
        if status.st_size > MOST_BYTES:
            raise DataError(f"{path}: has more than {MOST_BYTES >> 30} GiB, too much for {what}; divide it")
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; name one that is there") from None
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        reason = getattr(error, "strerror", None) or error  # a name with a null character is a ValueError
        raise DataError(f"{os.fspath(path)!r}: cannot be read ({reason}); name a file that can") from None


def finite_or_none(value: Any) -> Any:
    """The same JSON value with None for every number that is not finite, which JSON cannot spell."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite_or_none(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_none(one) for one in value]
    return value
