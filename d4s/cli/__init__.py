"""The command line: `d4s VERB …`. Exit status 0: done; 1: failed, with one line that says why; 2: wrong arguments."""

from __future__ import annotations

import logging
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout

from d4s.cli.parser import VERBS, command_line
from d4s.errors import ConfigError, D4SError, EditingStopped, RankEnded
from d4s.interrupts import Terminated, ending_signals_raise
from d4s.ranks import Ranks, alone, joined


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the verb that the arguments name (None: those of the process); returns the exit status.

    Raises SystemExit of status 2 where they cannot be read, and of 0 after --help and --version.
    """
    options = command_line().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    ranks = Ranks()
    try:
        with ending_signals_raise(), joined() as ranks:
            _run(options, ranks)
            sys.stdout.flush()
    except D4SError as error:
        if ranks.is_first or not ranks.all_know(error):
            print(f"d4s: {_of_rank(ranks)}{error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except RankEnded as error:
        if ranks.is_first:
            print(f"d4s: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        cause = error.__cause__ if isinstance(error, EditingStopped) else error
        said, status = (str(cause), cause.status) if isinstance(cause, Terminated) else ("stopped", 1)
        if ranks.is_first:
            print(f"d4s: {said}; what had been written is whole", file=sys.stderr)
        return status
    except BrokenPipeError:
        # Who read standard output (head) has had enough; Python's last flush of it would complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # as a program that SIGPIPE ends
    except OSError as error:
        said = f"{error.filename or ''} {error.strerror or error}"
        print(f"d4s: {_of_rank(ranks)}{said}".replace("  ", " "), file=sys.stderr)
        return 1
    return 0


def _run(options: Namespace, ranks: Ranks) -> None:
    """The verb, in each process of those started together if it is one that they can share; else in the first."""
    if not getattr(VERBS[options.verb], "SHARED", False):
        if ranks.is_first:
            with alone():
                options.run(options)
        return
    with nullcontext() if ranks.is_first else _silent():
        ranks.agree(options.verb, lambda: options.run(options))


@contextmanager
def _silent() -> Iterator[None]:
    """Inside, nothing is printed: the first process says it."""
    log = logging.getLogger()
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield
    finally:
        log.setLevel(level)


def _of_rank(ranks: Ranks) -> str:
    """Which process it is that says something, where it is not the only one."""
    return f"rank {ranks.rank}: " if ranks.count > 1 and not ranks.is_first else ""
