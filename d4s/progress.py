"""Progress of long work: a bar on a terminal, plain lines in a log; bytes and seconds as they are told."""

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


def note(text: str, *, shown: bool = True) -> None:
    """What has to be known before the work goes on, a line of standard error, on a terminal too."""
    if shown and here().is_first:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def amount(number: int) -> str:
    """Bytes, as they are told."""
    if number >= 1e9:
        return f"{number / 1e9:.2f} GB"
    return f"{number / 1e6:.2f} MB" if number >= 1e4 else f"{number} B"


def duration(seconds: float) -> str:
    """Seconds, as they are told."""
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def stage(text: str, *, shown: bool = True) -> None:
    """What begins now, as a line of a log, which is then not silent until its first bar; on a terminal bars say it."""
    if shown and here().is_first and not sys.stderr.isatty():
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
