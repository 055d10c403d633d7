"""`d4s tasks`: downstream tasks, those that are known or local ones that are made."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from d4s.cli.arguments import count, refuse
from d4s.cli.printing import print_json
from d4s.errors import ConfigError
from d4s.files import check_folder

HELP = (
    "downstream tasks: list those that lm-evaluation-harness knows, d4s tasks list [PART OF A NAME]; or make local "
    "ones that need no network, d4s tasks make FOLDER DATA …, DATA being folders with arc_challenge.jsonl, "
    "hellaswag_val.txt.bz2, winogrande.jsonl, gsm8k.jsonl, truthfulqa.csv or mmlu/test, and files of edits, whose old "
    "answers are asked"
)


def add(verb: ArgumentParser) -> None:
    verb.add_argument("do", choices=("list", "make"))
    verb.add_argument("names", nargs="*", metavar="NAME", help="part of a task's name; or FOLDER DATA …")
    verb.add_argument(
        "--questions",
        type=count,
        help="make: of each task, drawn by --seed, of mmlu over all its subjects; default: all",
    )


def run(options: Namespace) -> None:
    from d4s.measure.downstream import known_tasks
    from d4s.measure.downstream_tasks import make_tasks

    if options.do == "list":
        refuse(options, ("questions",), "list")
        if len(options.names) > 1:
            raise ConfigError(
                "d4s tasks list takes one part of a name; leave the rest out, as d4s tasks list mmlu"
            )
        found = known_tasks(*options.names)
        if options.json:
            print_json(found)
        else:
            print("\n".join(found))
        return
    if len(options.names) < 2:
        raise ConfigError("d4s tasks make needs FOLDER and DATA, as d4s tasks make my-tasks facts.json")
    folder, *data = options.names
    check_folder(folder)
    made = make_tasks(data, folder, questions=options.questions, seed=options.seed)
    if options.json:
        print_json({"folder": folder, "tasks": made})
    else:
        print(f"{folder}: {', '.join(made)}; use them by --task-folder {folder} --tasks {made[-1]}")
