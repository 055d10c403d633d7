"""`d4s verify`: whether a journal is whole, and its model what it says."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser, Namespace

from d4s.cli.arguments import add_covariance, add_journal, add_sums, loaded_covariance, loaded_model, refuse
from d4s.cli.printing import print_json
from d4s.errors import DataError

HELP = "check a journal: every file, the weights rebuilt from it, and the model saved beside it"


def add(verb: ArgumentParser) -> None:
    add_journal(verb)
    verb.add_argument(
        "--again", metavar="MODEL", help="also make every edit again from the log, on the unedited MODEL"
    )
    verb.add_argument("--device", help="of MODEL: cpu, cuda …; default: cuda where there is one")
    add_covariance(verb)
    add_sums(verb)


def run(options: Namespace) -> None:
    from d4s.journal.journal import Journal

    journal = Journal(options.journal)
    if options.again is None:
        refuse(options, ("device", "covariance", "sums_on"), "--again", beside=False)
        found = journal.verify()
    else:
        options.model, options.dtype, options.device_map = options.again, journal.head["dtype"], None
        model, tokenizer = loaded_model(options)
        covariance = loaded_covariance(options, model, tokenizer)
        found = journal.verify(
            model=model, tokenizer=tokenizer, covariance=covariance, sums_on=options.sums_on
        )
    if options.json:
        print_json(dataclasses.asdict(found) | {"sound": found.sound})
    else:
        print(found)
    if not found.sound:
        raise DataError(
            f"{options.journal}: {len(found.problems)} things are wrong with this journal; they are listed above"
        )
