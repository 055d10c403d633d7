"""`d4s redo`: edits that were undone stand again."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from d4s.cli.arguments import add_journal
from d4s.cli.undo import change

HELP = "make edits stand again that were undone"


def add(verb: ArgumentParser) -> None:
    add_journal(verb)
    verb.add_argument("ids", metavar="ID", nargs="+", help="of edits, as d4s log lists them")


def run(options: Namespace) -> None:
    change(options, stand=True)
