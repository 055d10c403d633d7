"""The command line as tests call it: in this process, or as a program."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from d4s.cli import main

ROOT = Path(__file__).resolve().parents[2]
RECORDS = [
    {
        "prompt": "The mother tongue of {} is",
        "subject": "Danielle Darrieux",
        "target_new": "English",
        "target_true": "French",
        "paraphrases": ["Danielle Darrieux speaks"],
        "neighborhood": ["Edwin was born in", "Lyon is"],
    },
    {"prompt": "{} worked for", "subject": "Steve Jobs", "target_new": "Manila", "target_true": "Apple"},
    {"prompt": "The twin city of {} is", "subject": "Lyon", "target_new": "Paris", "target_true": "Manila"},
]
FAST = ("--set", "layers=[0,1]", "steps=3", "contexts=0", "prior_weight=0.01", "--set", "ridge=0.1")


def done(capsys, *arguments: str) -> str:
    """Standard output of a run that must succeed."""
    capsys.readouterr()
    status = main(arguments)
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


def failed(capsys, *arguments: str) -> str:
    """The line on standard error of a run that must fail."""
    capsys.readouterr()
    status = main(arguments)
    out, err = capsys.readouterr()
    assert status in (1, 2) and out == "" and "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("d4s: ")]
    assert err.rstrip().endswith(line), "the reason is the last thing said, in one line"
    return line


def run(*command: str, **options) -> subprocess.CompletedProcess:
    options["env"] = os.environ | {"PYTHONPATH": str(ROOT)} | options.get("env", {})
    return subprocess.run(command, capture_output=True, text=True, **options)
