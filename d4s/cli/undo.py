"""`d4s undo`: edits of a journal are taken back, as if they had never been made."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from d4s.cli.arguments import add_journal
from d4s.cli.printing import print_json, words
from d4s.errors import D4SError, EditError

if TYPE_CHECKING:
    from d4s.journal.journal import Journal

HELP = "take edits back, as if they had never been made; a model saved beside the journal follows"


def add(verb: ArgumentParser) -> None:
    add_journal(verb)
    verb.add_argument("ids", metavar="ID", nargs="+", help="of edits, as d4s log lists them")


def run(options: Namespace) -> None:
    change(options, stand=False)


def change(options: Namespace, *, stand: bool) -> None:
    from d4s.journal.journal import Journal

    journal = Journal(options.journal)
    try:
        (journal.redo if stand else journal.undo)(options.ids)
    except EditError:
        states = {row["id"]: row["stands"] for row in journal.log()}
        if any(states.get(one) is not stand for one in options.ids) or journal.model_follows():
            raise
        follow(
            options, journal, "the model was behind its journal, and follows it now; nothing else was changed"
        )
        return
    follow(options, journal, f"{'redone' if stand else 'undone'}: {', '.join(options.ids)}")


def follow(options: Namespace, journal: Journal, said: str) -> None:
    """The saved model becomes what the journal comes to; and what was done is said.

    Raises D4SError, with the way on, where it cannot be written: the journal has changed already.
    """
    model = journal.folder.model
    if model.is_dir():
        try:
            journal.write_to_folder(model)
        except OSError as error:
            again = next(iter(journal.edits), None)
            way = (
                "d4s undo of an edit that is undone"
                if again is None
                else f"d4s redo {options.journal} {again.id}"
            )
            raise D4SError(
                f"{model}: {error.strerror or error}; the journal has changed ({said}), and its model has not; make "
                f"room, and {way} writes the model, and changes nothing else"
            ) from error
    left = [edit.id for edit in journal.edits]
    if options.json:
        print_json({"stand": left, "model": str(model) if model.is_dir() else None})
    words(options)(
        f"{said}; {len(left)} edits stand"
        + (
            f"\nedited model: {model}"
            if model.is_dir()
            else "\nno model is saved beside it: d4s patch export DIR …"
        )
    )
