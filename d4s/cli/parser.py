"""The parser of the command line. A verb is a file of this folder and a row of `VERBS`."""

from __future__ import annotations

import difflib
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

from d4s.cli import (
    alone,
    analyze,
    compare,
    completion,
    covariance,
    demo,
    edit,
    evaluate,
    import_config,
    log,
    merge,
    methods,
    models,
    patch,
    plan,
    redo,
    report,
    reproduce,
    revise,
    targets,
    tasks,
    try_,
    tune,
    undo,
    verify,
)
from d4s.cli.arguments import seed
from d4s.cli.ending import EPILOG, WRONG
from d4s.errors import unknown_name


class Verb(Protocol):
    """What the file of a verb holds. It imports what is slow to load (models, methods, figures) only where it runs."""

    HELP: str  # a line of `d4s --help`, and the beginning of the verb's own
    # SHARED = True: of processes that torchrun starts all run it together; of any other verb the first runs it alone

    def add(self, verb: ArgumentParser) -> None:
        """Its arguments, beside --json, --seed and --verbose, which every verb has."""

    def run(self, options: Namespace) -> None:
        """Does it, and prints what came of it. Raises D4SError, or OSError of a file that cannot be written."""


# In the order in which `d4s --help` lists them.
VERBS: dict[str, Verb] = {
    "demo": demo,
    "plan": plan,
    "try": try_,
    "edit": edit,
    "alone": alone,
    "tune": tune,
    "targets": targets,
    "evaluate": evaluate,
    "covariance": covariance,
    "compare": compare,
    "analyze": analyze,
    "reproduce": reproduce,
    "report": report,
    "log": log,
    "undo": undo,
    "redo": redo,
    "revise": revise,
    "merge": merge,
    "verify": verify,
    "patch": patch,
    "import-config": import_config,
    "tasks": tasks,
    "models": models,
    "methods": methods,
    "completion": completion,
}


class _Parser(ArgumentParser):
    """Takes options between positional arguments also where one of these may be left out; of a wrong line it says what
    is wrong, and not all that would be right."""

    _within = False

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = sys.argv[1:] if args is None else list(args)
        if self._subparsers is not None and args and args[0] not in (*self._option_string_actions, "--"):
            if args[0].startswith("-"):
                self.error(f"{args[0]} stands before the verb; options go behind it, as d4s edit … {args[0]}")
            if args[0] not in VERBS:
                self.error(unknown_name("verb", args[0], VERBS))
        found, left = self.parse_known_args(args, namespace)
        if left:
            of = self._of_verb(found.verb)
            if (action := getattr(found, "action", None)) is not None and of._subparsers is not None:
                of = of._of_verb(action)
            of.error(of._unknown(left))
        return found

    def _of_verb(self, verb: str) -> _Parser:
        assert self._subparsers is not None
        return next(a.choices[verb] for a in self._subparsers._group_actions if isinstance(a.choices, dict))

    def _unknown(self, left: Sequence[str]) -> str:
        """What is said of arguments that are none, with the nearest option."""
        said = f"unrecognized arguments: {' '.join(left)}"
        if wrong := [one.partition("=")[0] for one in left if one.startswith("-")]:
            near = difflib.get_close_matches(wrong[0], self._option_string_actions, n=1)
            said += f"; did you mean {near[0]}?" if near else ""
        return said

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG, f"{self.prog}: {message.rstrip('.')}; {self.prog} --help lists what it takes\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._within or self._subparsers is not None:
            return super().parse_known_args(args, namespace)
        self._within = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._within = False


def command_line() -> ArgumentParser:
    """The parser of all verbs; what it parses holds the verb's `run`, beside its options."""
    from d4s import __version__

    top = _Parser(prog="d4s", description="Edits facts in language models, in sequence.", epilog=EPILOG)
    top.add_argument("--version", action="version", version=f"d4s {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        made = verbs.add_parser(name, help=verb.HELP, description=verb.HELP, epilog=EPILOG)
        made.set_defaults(run=verb.run)
        made.add_argument("--json", action="store_true", help="figures as JSON on standard output")
        made.add_argument("--seed", type=seed, default=0)
        made.add_argument("--verbose", action="store_true", help="of an error also the traceback")
        verb.add(made)
    return top
