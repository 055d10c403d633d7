"""`d4s completion`: the script by which a shell completes verbs, options, choices, methods and files."""

from __future__ import annotations

import importlib.util
from argparse import Action, ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from d4s.cli.printing import print_json
from d4s.errors import ConfigError

HELP = 'the script by which a shell completes what is typed, as in: eval "$(d4s completion bash)"'
SHELLS = ("bash", "zsh", "fish")

# By what the help of an argument shows for it, where its type is not Path; the rest is free text.
FILES = ("MODEL", "EDITED", "EDITS", "CORPUS", "FILE", "FILE|MODEL", "FILE|NAME", "DIR")
METHODS_OF = ("method", "against", "methods")  # options whose value is a method's name, or begins with one


def add(verb: ArgumentParser) -> None:
    verb.add_argument("shell", metavar="SHELL", choices=SHELLS, help=", ".join(SHELLS))


def run(options: Namespace) -> None:
    from d4s.cli.parser import command_line

    text = script(command_line(), options.shell)
    if options.json:
        print_json({"shell": options.shell, "script": text})
    else:
        print(text)


def script(parser: ArgumentParser, shell: str) -> str:
    """For one of `SHELLS`. The parser is marked by what its arguments take, so it should be of this use alone.

    Raises ConfigError where shtab is not installed, or is too old for the shell.
    """
    if importlib.util.find_spec("shtab") is None:
        raise ConfigError("completion needs shtab, which is not installed: pip install shtab")
    import shtab

    if shell not in shtab.SUPPORTED_SHELLS:
        raise ConfigError(f"this shtab knows no {shell}, a newer one does: pip install -U shtab")
    _mark(parser, shtab.FILE)
    return shtab.complete(parser, shell)


def _mark(parser: ArgumentParser, file: Any, verb: str | None = None) -> None:
    """Says of each argument without choices whether it is a file (or folder), or a method's name."""
    from d4s.methods import METHODS

    for action in parser._actions:  # argparse lists them nowhere else
        if isinstance(action.choices, dict):
            for name, inner in action.choices.items():
                _mark(inner, file, name)
        elif action.dest in METHODS_OF or (verb, action.dest) == ("methods", "name"):
            action.choices = list(METHODS)
        elif action.choices is None and _is_file(action):
            action.complete = file  # type: ignore[attr-defined]


def _is_file(action: Action) -> bool:
    return action.type is Path or action.metavar in FILES or action.dest == "model"
