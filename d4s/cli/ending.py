"""How a command ends: the exit statuses, the line that says why, and standard output that cannot be written to."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

import torch

from d4s.errors import ConfigError, D4SError, EditingInterrupted, RankEnded
from d4s.files import naming
from d4s.interrupts import Terminated

DONE, FAILED, WRONG, BUG, STOPPED, READER_GONE = 0, 1, 2, 70, 130, 141

# Every status there is → what it says; `d4s --help` and docs/guide/errors.md tell the same.
STATUSES = {
    DONE: "done",
    FAILED: "failed",
    WRONG: "wrong arguments",
    BUG: "a bug of d4s",
    129: "ended by SIGHUP",
    STOPPED: "stopped by Ctrl-C",
    READER_GONE: "the reader of standard output closed it",
    143: "ended by SIGTERM",
}
EPILOG = f"exit status: {'; '.join(f'{status} {meaning}' for status, meaning in STATUSES.items())}"

_LONGEST = 400  # characters of a text that d4s has not written itself


def ended_by(error: BaseException, options: Namespace) -> tuple[str, int]:
    """(the line that says why, exit status) of a verb that raised. The line is empty where nobody would read it.

    options: of the verb, as far as they were read
    """
    cause = _cause(error)
    if is_out_of_memory(cause):
        return _out_of_memory(error, options), FAILED
    if isinstance(error, KeyboardInterrupt):
        said, status = (str(cause), cause.status) if isinstance(cause, Terminated) else ("stopped", STOPPED)
        return f"{said}; what had been written is whole", status
    if isinstance(cause, BrokenPipeError):
        return "", READER_GONE
    if isinstance(cause, (D4SError, RankEnded)):
        return str(error), WRONG if isinstance(error, ConfigError) else FAILED
    if isinstance(cause, OSError):
        place = f"{cause.filename}: " if cause.filename else ""
        return f"{place}{cause.strerror or cause}" if error is cause else str(error), FAILED
    said = (
        f"{type(cause).__name__}: {_line(error)}"
        if error is cause
        else f"{_line(error)} ({type(cause).__name__})"
    )
    shown = (
        "the traceback above"
        if getattr(options, "verbose", False)
        else "the traceback, which --verbose shows,"
    )
    return (
        f"{said}; this is a bug of d4s, not of what it was given: report it with {shown} and the command",
        BUG,
    )


def _cause(error: BaseException) -> BaseException:
    """What made a sequence break off; of another error itself."""
    for one in (error, error.__cause__):
        if isinstance(one, EditingInterrupted) and one.__cause__ is not None:
            return one.__cause__
    return error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, the system, or torch on either device had no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def _out_of_memory(error: BaseException, options: Namespace) -> str:
    """With the options of this verb that would take less."""
    given = vars(options)
    less = []
    if (given.get("batch_size") or 1) > 1:
        less.append("a smaller --batch-size")
    if given.get("dtype") in ("auto", "float32"):
        less.append("--dtype bfloat16")
    if "device_map" in given and isinstance(_cause(error), torch.OutOfMemoryError):
        less.append("--device cpu")
    said = _line(error)
    said = said if "out of memory" in said.lower() else f"out of memory: {said}".removesuffix(": ")
    cure = f"; {' or '.join(less)} takes less" if less else "; it needs a machine with more"
    if given.get("model") and given.get("verb") != "plan":
        cure += f", and d4s plan {given['model']} --edits N says how much a sequence takes"
    return said + cure


def _line(error: BaseException) -> str:
    """The text of an error, of whomever, as part of a line."""
    text = " ".join(str(error).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def say(line: str, error: BaseException | None = None) -> None:
    """The line on standard error, after the traceback of `error` where one is given. It may itself be full."""
    with suppress(OSError):
        if error is not None:
            traceback.print_exception(error, file=sys.stderr)
        print(f"d4s: {line}", file=sys.stderr)


class _Output:
    """Standard output whose own errors name it, so that they can be told from those of files.

    One that was swallowed (argparse does) is raised again by `flush`.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._noted(), naming("standard output"):
            return self._stream.write(text)

    def flush(self) -> None:
        if self._error is not None:
            raise self._error
        with self._noted(), naming("standard output"):
            self._stream.flush()

    @contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._error = error
            raise


@contextmanager
def naming_output() -> Iterator[None]:
    """Inside, an OSError of standard output names it; at the end what was printed is written."""
    with redirect_stdout(_Output(sys.stdout)):
        try:
            yield
        except SystemExit as ended:  # of argparse, after --help
            if not ended.code:
                sys.stdout.flush()
            raise
        sys.stdout.flush()


def silence_output() -> None:
    """Standard output, which cannot be written to, leads nowhere: Python's last flush would complain once more."""
    with suppress(OSError):  # of a stream that is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
