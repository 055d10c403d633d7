"""`d4s models`: the model types that can be edited."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import asdict

from d4s.cli.printing import print_json

HELP = "model types that can be edited"


def add(verb: ArgumentParser) -> None:
    """It takes no argument of its own."""


def run(options: Namespace) -> None:
    from d4s.models.architectures import ARCHITECTURES

    if options.json:
        print_json({name: asdict(row) for name, row in ARCHITECTURES.items()})
        return
    width, blocks = max(map(len, ARCHITECTURES)), max(len(row.blocks) for row in ARCHITECTURES.values())
    print(f"{'model type':{width}}  {'blocks':{blocks}}  edited projection (W)")
    for name, row in sorted(ARCHITECTURES.items()):
        print(f"{name:{width}}  {row.blocks:{blocks}}  {row.mlp_output}")
