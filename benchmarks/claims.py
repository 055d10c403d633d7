"""Every claim of the project, measured here and now: `python -m benchmarks.claims [--json] [--device cuda]`.

A row a claim: name, measured, target, whether it holds, device. Exit status 1 if a benchmark failed (an
operation gave a wrong result, say); a claim that does not hold is a row that says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.conftest import rows_key
from benchmarks.measure import Row


class Taker:
    """Hands each row of a pytest run on as soon as it is there, so that none is lost if the run is cut off."""

    def __init__(self, take: Callable[[Row], None]) -> None:
        self.take = take

    def pytest_configure(self, config: pytest.Config) -> None:
        config.stash[rows_key] = self.take


def measure(device: str, large: bool, only: str, take: Callable[[Row], None]) -> int:
    """Takes the rows of the claims whose name holds `only`. Returns pytest's exit status; its report goes to stderr."""
    options = ["--benchmark-enable", "--benchmark-columns=median,rounds", f"--device={device}", "-q"]
    options += ["--large"] if large else []
    options += ["-k", only] if only else []
    with contextlib.redirect_stdout(sys.stderr):
        status = pytest.main([str(Path(__file__).parent), *options], plugins=[Taker(take)])
    return int(status)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--large", action="store_true", help="claims that take minutes and 16 GiB on a CPU too"
    )
    parser.add_argument("--only", default="", help="a pytest -k expression")
    arguments = parser.parse_args()
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")  # pytest captures what tests print

    def say(row: Row) -> None:
        if arguments.json:
            line = json.dumps({**vars(row), "holds": row.holds})
        else:
            bound = "≥" if row.at_least else "≤"
            verdict = "holds" if row.holds else "does not hold"
            line = f"{row.name}: {row.measured:.3g} ({bound} {row.target:g}, {verdict}; {row.device})"
        print(line, file=out, flush=True)

    return 1 if measure(arguments.device, arguments.large, arguments.only, say) else 0


if __name__ == "__main__":
    sys.exit(main())
