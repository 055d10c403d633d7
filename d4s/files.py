"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

if TYPE_CHECKING:
    from pandas import DataFrame


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """`with whole("a.json") as beside: …` writes to `beside`; at the end that is synced and takes the path's place.

    `beside` may become a file, or a folder where nothing stands at `path`. Folders above are made where they lack.
    If the block raises, nothing is left, and what stood at `path` stays. A tensor file that cannot be written
    raises OSError, as others do.
    """
    place = Path(path)
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
