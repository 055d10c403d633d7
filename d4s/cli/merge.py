"""`d4s merge`: sequences made apart become one."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from d4s.cli.printing import print_json, words

HELP = "make one journal of sequences that were made apart on the same model"


def add(verb: ArgumentParser) -> None:
    verb.add_argument(
        "journals", metavar="DIR", nargs="+", help="journals, or the --out of d4s edit; two or more"
    )
    verb.add_argument(
        "--into", type=Path, required=True, help="new folder for the journal of all their edits"
    )
    rule = verb.add_mutually_exclusive_group()
    rule.add_argument(
        "--latest",
        dest="on_conflict",
        action="store_const",
        const="latest",
        default="latest",
        help="of two answers to one prompt take the one that was made last (default)",
    )
    rule.add_argument(
        "--fail",
        dest="on_conflict",
        action="store_const",
        const="fail",
        help="refuse two answers to one prompt",
    )


def run(options: Namespace) -> None:
    from d4s.journal.merge import merge

    journal, conflicts = merge(options.journals, options.into, on_conflict=options.on_conflict)
    if options.json:
        told = [{"prompt": c.prompt, "edits": [edit.to_dict() for _, edit in c.edits]} for c in conflicts]
        print_json({"journal": str(options.into), "edits": len(journal.edits), "conflicts": told})
    say = words(options)
    for conflict in conflicts:
        say(f"two answers, the last is taken: {conflict}")
    say(f"{len(journal.edits)} edits in {options.into}")
