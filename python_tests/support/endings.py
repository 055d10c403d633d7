"""The command `d4s` in processes of its own, forked from one that has loaded it: what each leaves, and its status."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from support.command import run

# What happens where `d4s evaluate` reads its edits, before a model is loaded.
HAPPENS = {
    "": "pass",
    "bug": "{}['no such key']",
    "memory": "raise MemoryError",
    "SIGHUP": "os.kill(os.getpid(), signal.SIGHUP)",
    "SIGINT": "os.kill(os.getpid(), signal.SIGINT)",
    "SIGTERM": "os.kill(os.getpid(), signal.SIGTERM)",
}

# A child runs to the end of this program, and so through Python's own last flush, which has a status of its own.
PROGRAM = """
import json, os, signal, sys
import d4s.edits.formats
from d4s.cli import main

def open_for(place):
    if place != "gone":
        return os.open(place, os.O_WRONLY | os.O_CREAT, 0o600)
    ours, theirs = os.pipe()
    os.close(ours)  # nobody reads
    return theirs

statuses = []
for arguments, stdout, stderr, code in json.load(sys.stdin):
    child = os.fork()
    if child == 0:
        def load_edits(*_arguments, **_options):
            exec(code)
            return []
        d4s.edits.formats.load_edits = load_edits
        os.dup2(open_for(stdout), 1)
        os.dup2(open_for(stderr), 2)
        sys.exit(main(arguments))
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(statuses))
"""


class Case(NamedTuple):
    """line: what is behind `d4s`; happens: of `HAPPENS`; stdout, stderr: a device, "gone" (a pipe that nobody reads),
    or "" for a file"""

    line: str
    happens: str = ""
    stdout: str = ""
    stderr: str = ""


class Ended(NamedTuple):
    status: int
    out: str
    err: str


def endings(cases: Sequence[Case], folder: Path) -> list[Ended]:
    """How each ends; `folder` is where they run, and keeps what they say."""
    files = [(folder / f"{i}.out", folder / f"{i}.err") for i in range(len(cases))]
    told = [
        (one.line.split(), one.stdout or str(out), one.stderr or str(err), HAPPENS[one.happens])
        for one, (out, err) in zip(cases, files, strict=True)
    ]
    done: subprocess.CompletedProcess = run(
        sys.executable, "-c", PROGRAM, cwd=folder, input=json.dumps(told), env={"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    said = [[file.read_text("utf-8") if file.exists() else "" for file in pair] for pair in files]
    return [Ended(status, *pair) for status, pair in zip(json.loads(done.stdout), said, strict=True)]
