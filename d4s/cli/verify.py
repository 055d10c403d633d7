"""`d4s verify`: whether a journal is whole, and its model what it says."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser, Namespace

from d4s.cli.printing import print_json
from d4s.cli.undo import add_journal
from d4s.errors import DataError

HELP = "check a journal: every file, the weights rebuilt from it, and the model saved beside it"


def add(verb: ArgumentParser) -> None:
    add_journal(verb)


def run(options: Namespace) -> None:
    from d4s.journal.journal import Journal

    found = Journal(options.journal).verify()
    if options.json:
        print_json(dataclasses.asdict(found) | {"sound": found.sound})
    else:
        print(found)
    if not found.sound:
        raise DataError(f"{options.journal}: {len(found.problems)} things are wrong with this journal")
