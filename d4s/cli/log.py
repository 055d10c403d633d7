"""`d4s log`: what was done to a model, by its journal."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from d4s.cli.arguments import add_journal
from d4s.cli.printing import print_json

HELP = "which edits a model was given: when, by whom, how they took, and which of them stand"


def add(verb: ArgumentParser) -> None:
    add_journal(verb)


def run(options: Namespace) -> None:
    from d4s.figures.tables import aligned
    from d4s.journal.journal import Journal

    journal = Journal(options.journal)
    rows = journal.log()
    if options.json:
        print_json({"method": journal.head["method"], "model": journal.head["source"], "edits": rows})
        return
    head = journal.head
    print(
        f"{head['method']} on {head['source'] or 'a model'} (weights {head['model'][:12]}), "
        f"d4s {head['versions']['d4s']}"
    )
    columns = {
        "id": [row["id"] for row in rows],
        "when": [str(row["at"])[:19] for row in rows],
        "by": [str(row["by"]) for row in rows],
        "stands": ["yes" if row["stands"] else "no" for row in rows],
        "p right after": [
            "" if row.get("written_probability") is None else f"{row['written_probability']:.3f}"
            for row in rows
        ],
        "fact": [f"{row['prompt'].replace('{}', row['subject'])} → {row['target_new']}" for row in rows],
    }
    print("\n".join(aligned(list(columns.items()), numbers=False)))
