"""`d4s methods`: the methods in a table; of one, its fields and presets."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from d4s.cli.printing import print_json

HELP = "methods and what they need; of one its fields and presets"


def add(verb: ArgumentParser) -> None:
    verb.add_argument("name", metavar="NAME", nargs="?", help="a method; default: all of them")


def run(options: Namespace) -> None:
    from d4s.methods import METHODS, published, tables

    told = tables.overview() if options.name is None else tables.about(options.name)
    if options.json:
        names = METHODS if options.name is None else (options.name,)
        print_json({name: published.describe(METHODS[name]) for name in names})
    else:
        print(told)
        if options.name is None:
            print("d4s methods NAME: a method's fields and presets")
