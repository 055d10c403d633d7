"""Files and folders that are there whole or not at all, and places for them, looked at before the work begins."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

if TYPE_CHECKING:
    from pandas import DataFrame


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
    """`with whole("a.json") as beside: …` writes to `beside`; at the end that is synced and takes the path's place.

    `beside` may become a file, or a folder where nothing stands at `path`. Folders above are made where they lack.
    If the block raises, nothing is left, and what stood at `path` stays. A tensor file that cannot be written
    raises OSError, as others do; so does a path at which a device or pipe stands, which nothing may replace.
    """
    place = Path(path)
    check_place(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_name(f"{place.stem}.{os.getpid()}.part{place.suffix}")
    try:
        yield beside
        if beside.is_file():
            with open(beside, "rb") as file:
                os.fsync(file.fileno())
        beside.replace(place)
    except SafetensorError as error:
        raise OSError(f"{place}: {error}") from None
    finally:
        if beside.is_dir():
            shutil.rmtree(beside)
        else:
            beside.unlink(missing_ok=True)


def write_text(text: str, path: str | os.PathLike[str]) -> None:
    """UTF-8, whole or not at all."""
    with whole(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_table(table: DataFrame, path: str | os.PathLike[str]) -> None:
    """CSV without the index, whole or not at all."""
    with whole(path) as beside:
        table.to_csv(beside, index=False)
