"""Every claim of the project, measured here and now: `python -m benchmarks.claims [--json] [--device cuda]`.

A row a claim: name, measured, target, whether it holds, device. Exit status 1 if a benchmark failed (an
operation gave a wrong result, say); a claim that does not hold is a row that says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path

import pytest

from benchmarks.conftest import rows_key
from benchmarks.measure import Row


class Rows:
    """Collects the rows of a pytest run."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.rows = session.config.stash.get(rows_key, [])


def measure(device: str, large: bool, only: str) -> tuple[list[Row], int]:
    """Rows of the claims whose name holds `only`, and pytest's exit status. Its report goes to stderr."""
    collected = Rows()
    options = ["--benchmark-enable", "--benchmark-columns=median,rounds", f"--device={device}", "-q"]
    options += ["--large"] if large else []
    options += ["-k", only] if only else []
    with contextlib.redirect_stdout(sys.stderr):
        status = pytest.main([str(Path(__file__).parent), *options], plugins=[collected])
    return collected.rows, int(status)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--large", action="store_true", help="claims that take minutes and 16 GiB on a CPU too"
    )
    parser.add_argument("--only", default="", help="a pytest -k expression")
    arguments = parser.parse_args()
    rows, status = measure(arguments.device, arguments.large, arguments.only)
    for row in rows:
        if arguments.json:
            print(json.dumps({**vars(row), "holds": row.holds}))
        else:
            bound = "≥" if row.at_least else "≤"
            verdict = "holds" if row.holds else "does not hold"
            print(f"{row.name}: {row.measured:.3g} ({bound} {row.target:g}, {verdict}; {row.device})")
    return 1 if status else 0


if __name__ == "__main__":
    sys.exit(main())
