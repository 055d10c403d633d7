"""How the real command ends: a status for each way, the line that says why, the traceback where it is asked for."""

from __future__ import annotations

import re
import sys
from argparse import Namespace

import numpy
import pytest
import torch
from support.command import ROOT, run
from support.endings import Case, Ended, endings

from d4s.cli.ending import EPILOG, STATUSES, ended_by, is_out_of_memory
from d4s.cli.parser import VERBS, command_line
from d4s.errors import ConfigError, D4SError, DataError, EditingFailed, EditingStopped
from d4s.interrupts import Terminated

FULL = "d4s: standard output: cannot be written (No space left on device)"
ASKED = "evaluate m edits.json"  # reads its edits, where something may happen, before it loads a model

CASES = {
    Case("methods d4s"): (0, ""),
    Case("--version"): (0, ""),
    Case("log none"): (
        1,
        "d4s: none: is no journal (it has no journal.json); name one, or the --out of d4s edit",
    ),
    Case("log none", stderr="/dev/full"): (1, ""),
    Case("log none --verbose", stderr="/dev/full"): (1, ""),
    Case("methods d4s", stdout="/dev/full"): (1, FULL),
    Case("models --json", stdout="/dev/full"): (1, FULL),
    Case("--help", stdout="/dev/full"): (1, FULL),
    Case("log --help", stdout="/dev/full"): (1, FULL),
    Case("--version", stdout="/dev/full"): (1, FULL),
    Case("methods d5s", stdout="/dev/full"): (2, "d4s: unknown method 'd5s'. Did you mean 'd4s'?"),
    Case("methods d5s"): (2, "d4s: unknown method 'd5s'"),
    Case("log"): (
        2,
        "d4s log: the following arguments are required: DIR; d4s log --help lists what it takes",
    ),
    Case("methods d4s", stdout="gone"): (141, ""),
    Case(ASKED, "memory"): (1, "d4s: out of memory"),
    Case(ASKED, "bug"): (70, "d4s: KeyError: 'no such key'; this is a bug of d4s"),
    Case(ASKED, "SIGHUP"): (129, "d4s: ended by SIGHUP; what had been written is whole"),
    Case(ASKED, "SIGINT"): (130, "d4s: stopped; what had been written is whole"),
    Case(ASKED, "SIGTERM"): (143, "d4s: ended by SIGTERM; what had been written is whole"),
}
VERBOSE = [
    Case(f"{ASKED} --verbose", "bug"),
    Case("log none --verbose"),
    Case(f"{ASKED} --verbose", "SIGINT"),
]


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> dict[Case, Ended]:
    cases = [*CASES, *VERBOSE]
    return dict(zip(cases, endings(cases, tmp_path_factory.mktemp("endings")), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(filter(None, case)).replace("/", ""))
def test_the_command_ends_with_a_status_and_at_most_a_line(case, ended):
    status, said = CASES[case]
    found = ended[case]
    assert found.status == status, found
    assert found.err.startswith(said) and "Traceback" not in found.err
    assert (found.err == "") == (said == "")
    assert found.err.count("\n") == (said != "")
    assert (found.out != "") == (status == 0 and not case.stdout)


def test_every_status_is_told_and_happens():
    assert {status for status, _ in CASES.values()} == set(STATUSES)
    page = (ROOT / "docs" / "guide" / "errors.md").read_text("utf-8")
    told = {
        int(number): words for number, words in re.findall(r"^\| `(\d+)` \| ([^|]*?) \|", page, re.MULTILINE)
    }
    assert {number: told.get(number) for number in STATUSES} == STATUSES
    assert all(f"{number} {words}" in EPILOG for number, words in STATUSES.items())
    assert command_line().epilog == EPILOG


def test_the_traceback_goes_before_the_line_where_it_is_asked_for(ended):
    bug, failed, stopped = (ended[case] for case in VERBOSE)
    assert (bug.status, failed.status, stopped.status) == (70, 1, 130)
    for found, kind in ((bug, "KeyError"), (failed, "DataError"), (stopped, "KeyboardInterrupt")):
        *before, line = found.err.splitlines()
        assert before[0] == "Traceback (most recent call last):" and line.startswith("d4s: ")
        assert any(kind in one for one in before)
    assert "--verbose" in ended[Case(ASKED, "bug")].err and "the traceback above" in bug.err
    for verb in VERBS:
        (one,) = [a for a in command_line()._actions if a.dest == "verb"]
        assert "--verbose" in one.choices[verb]._option_string_actions


def test_an_output_that_was_closed_is_said_before_anything_is_done(tmp_path):
    line = f"{sys.executable} -m d4s covariance embedded corpus.txt --out c.safetensors >&-"
    found = run("bash", "-c", line, cwd=tmp_path)
    assert found.returncode == 1 and not list(tmp_path.iterdir())
    assert found.stderr == "d4s: standard output is closed; lead it to a file, or to /dev/null\n"


# What is said of an error.


def given(**options) -> Namespace:
    return Namespace(**({"verb": "edit", "model": "m", "dtype": "auto", "device_map": None} | options))


def torch_has_no_room() -> BaseException:
    try:
        torch.empty(1 << 55, dtype=torch.float64)
    except RuntimeError as error:
        return error
    raise AssertionError("2⁵⁸ bytes were given")


def numpy_has_no_room() -> BaseException:
    try:
        numpy.empty(1 << 55)
    except MemoryError as error:
        return error
    raise AssertionError("2⁵⁸ bytes were given")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch_has_no_room(),
        numpy_has_no_room(),
    ],
    ids=["python", "system", "cuda", "cpu", "numpy"],
)
def test_out_of_memory_names_the_options_that_take_less(error):
    assert is_out_of_memory(error)
    line, status = ended_by(error, given(batch_size=32))
    assert status == 1 and "out of memory" in line.lower() and "\n" not in line
    assert "a smaller --batch-size or --dtype bfloat16" in line
    assert ("--device cpu" in line) == isinstance(error, torch.OutOfMemoryError)
    assert line.endswith("d4s plan m --edits N says how much a sequence takes")
    line, _ = ended_by(error, given(batch_size=1, dtype="bfloat16"))
    assert "--batch-size" not in line and "--dtype" not in line
    assert ended_by(error, Namespace(verb="methods"))[0].endswith("it needs a machine with more")
    for option in ("--batch-size", "--dtype", "--device"):
        assert (
            option
            in next(a for a in command_line()._actions if a.dest == "verb").choices["edit"].format_help()
        )


def test_other_errors_are_not_out_of_memory():
    assert not any(
        map(is_out_of_memory, (RuntimeError("shapes differ"), OSError(28, "No space left"), KeyError()))
    )


def broken_off(error: BaseException, kind: type = EditingFailed) -> BaseException:
    """As `edit_sequence` raises it, and what `d4s edit` makes of it."""
    found = kind(f"after edit 3: {error}", None)
    found.__cause__ = error
    return found


def saved(error: BaseException) -> BaseException:
    found = D4SError(f"{error}. 3 edits were made before")
    found.__cause__ = error
    return found


def test_a_sequence_that_broke_off_ends_as_what_broke_it():
    for error, status, said in (
        (DataError("a.json: is empty; fill it"), 1, "after edit 3: a.json: is empty; fill it"),
        (OSError(28, "No space left on device", "x"), 1, "after edit 3: [Errno 28]"),
        (KeyError("x"), 70, "after edit 3: 'x' (KeyError); this is a bug of d4s"),
        (MemoryError("no"), 1, "out of memory: after edit 3: no"),
    ):
        line, found = ended_by(broken_off(error), given())
        assert found == status and line.startswith(said)
        line, found = ended_by(saved(broken_off(error)), given())
        first = said.partition(" (")[0]
        assert found == status and line.startswith(first) and ". 3 edits were made before" in line
        assert (type(error).__name__ in line) == (status == 70)
    stopped = broken_off(Terminated(15), EditingStopped)
    assert ended_by(stopped, given()) == ("ended by SIGTERM; what had been written is whole", 143)
    stopped = broken_off(KeyboardInterrupt(), EditingStopped)
    assert ended_by(stopped, given()) == ("stopped; what had been written is whole", 130)


def test_a_bug_with_a_long_text_is_still_a_line():
    line, status = ended_by(RuntimeError("one\n  two " + "x" * 5_000), given())
    assert (
        status == 70 and line.startswith("RuntimeError: one two x") and len(line) < 700 and "\n" not in line
    )


def test_wrong_arguments_and_failures_differ():
    assert ended_by(ConfigError("--x 3: must be 4"), given()) == ("--x 3: must be 4", 2)
    assert ended_by(FileNotFoundError(2, "No such file", "x.json"), given()) == ("x.json: No such file", 1)
