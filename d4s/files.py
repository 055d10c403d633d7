"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pandas import DataFrame


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """`with whole("a.json") as beside: …` writes to `beside`; at the end that is synced and takes the path's place.

    Folders are made where they lack. If the block raises, nothing is left, and what stood at `path` stays.
    """
    place = Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_name(f"{place.stem}.{os.getpid()}.part{place.suffix}")
    try:
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        beside.replace(place)
    finally:
        beside.unlink(missing_ok=True)


def write_text(text: str, path: str | os.PathLike[str]) -> None:
    """UTF-8, whole or not at all."""
    with whole(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_table(table: DataFrame, path: str | os.PathLike[str]) -> None:
    """CSV without the index, whole or not at all."""
    with whole(path) as beside:
        table.to_csv(beside, index=False)
