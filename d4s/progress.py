"""Progress of long work: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from d4s.ranks import here

_SECONDS = 30  # between two lines of a log; what takes less writes none


class _Lines:
    """Standard error, each state of a bar a line of its own."""

    def write(self, text: str) -> None:
        if state := text.strip("\r\n "):
            sys.stderr.write(f"{state}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(total: int, unit: str, title: str, *, shown: bool = True, **options: Any) -> tqdm[Any]:
    """A tqdm bar over `total` units, of several processes in the first; options: further ones of tqdm."""
    shown = shown and here().is_first
    if shown and not sys.stderr.isatty():
        options |= dict(file=_Lines(), delay=_SECONDS, mininterval=_SECONDS, maxinterval=_SECONDS, ncols=100)
    return tqdm(total=total, unit=unit, desc=title, disable=not shown, **options)


def stage(text: str, *, shown: bool = True) -> None:
    """What begins now, as a line of a log, which is then not silent until its first bar; on a terminal bars say it."""
    if shown and here().is_first and not sys.stderr.isatty():
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
