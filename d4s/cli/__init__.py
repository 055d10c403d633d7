"""The command line: `d4s VERB …`. Exit status 0: done; 1: failed, with one line that says why; 2: wrong arguments."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from d4s.cli.parser import command_line
from d4s.errors import ConfigError, D4SError, EditingStopped
from d4s.interrupts import Terminated, ending_signals_raise


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the verb that the arguments name (None: those of the process); returns the exit status.

    Raises SystemExit of status 2 where they cannot be read, and of 0 after --help and --version.
    """
    options = command_line().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        with ending_signals_raise():
            options.run(options)
            sys.stdout.flush()
    except D4SError as error:
        print(f"d4s: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt as error:
        cause = error.__cause__ if isinstance(error, EditingStopped) else error
        said, status = (str(cause), cause.status) if isinstance(cause, Terminated) else ("stopped", 1)
        print(f"d4s: {said}; what had been written is whole", file=sys.stderr)
        return status
    except BrokenPipeError:
        # Who read standard output (head) has had enough; Python's last flush of it would complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # as a program that SIGPIPE ends
    except OSError as error:
        print(f"d4s: {error.filename or ''} {error.strerror or error}".replace("  ", " "), file=sys.stderr)
        return 1
    return 0
