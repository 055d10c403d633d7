"""The command line: `d4s VERB …`. Its exit statuses are those of `d4s.cli.ending.STATUSES`."""

from __future__ import annotations

import logging
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout

from d4s.cli.ending import DONE, FAILED, ended_by, naming_output, say, silence_output
from d4s.cli.parser import VERBS, command_line
from d4s.errors import RankEnded
from d4s.interrupts import ending_signals_raise
from d4s.ranks import Ranks, alone, joined


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the verb that the arguments name (None: those of the process); returns the exit status.

    Raises SystemExit of status 2 where they cannot be read, and of 0 after --help and --version.
    """
    if sys.stderr is None:  # closed, as by 2>&-
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        say("standard output is closed; lead it to a file, or to /dev/null")
        return FAILED
    options, ranks = Namespace(), Ranks()
    try:
        with naming_output():
            options = command_line().parse_args(arguments)
            logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
            with ending_signals_raise(), joined() as ranks:
                _run(options, ranks)
                sys.stdout.flush()
    except (Exception, KeyboardInterrupt, RankEnded) as error:
        line, status = ended_by(error, options)
        told_by_first = isinstance(error, (KeyboardInterrupt, RankEnded)) or ranks.all_know(error)
        if line and (ranks.is_first or not told_by_first):
            say(f"{_of_rank(ranks)}{line}", error if getattr(options, "verbose", False) else None)
        try:
            sys.stdout.flush()
        except OSError:
            silence_output()
        return status
    return DONE


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
