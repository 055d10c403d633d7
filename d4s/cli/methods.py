"""`d4s methods`: the methods in a table; of one, its fields and presets."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from d4s.cli.printing import print_json

HELP = "methods and what they need; of one its fields and presets"


def add(verb: ArgumentParser) -> None:
    verb.add_argument(
        "name",
        metavar="NAME",
        nargs="?",
        help="a method, as d4s, or one of its named presets, as d4s:fresh; default: all methods",
    )


def run(options: Namespace) -> None:
    from d4s.methods import METHODS, published, tables
    from d4s.methods.preset import by_name

    if options.json:
        asked = {name: by_name(name) for name in (METHODS if options.name is None else (options.name,))}
        print_json(
            {name: published.describe(METHODS[method], fields) for name, (method, fields) in asked.items()}
        )
    else:
        print(tables.overview() if options.name is None else tables.about(options.name))
        if options.name is None:
            print("d4s methods NAME: a method's fields and presets")
