"""`d4s targets`: the targets of edits, searched on the unedited model and kept in a file."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from d4s.cli.arguments import (
    add_chat,
    add_edits,
    add_fields,
    add_model,
    add_preset,
    as_asked,
    check_file,
    configured,
    loaded_edits,
    loaded_model,
)
from d4s.cli.printing import print_json
from d4s.ranks import here

HELP = (
    "search the targets of edits on the unedited model, for edit and compare --targets; repeated, it goes on"
)
SHARED = True


def add(verb: ArgumentParser) -> None:
    add_model(verb)
    add_edits(verb)
    add_chat(verb)
    verb.add_argument("--out", type=Path, required=True, help="safetensors file")
    add_fields(verb)
    add_preset(verb)


def run(options: Namespace) -> None:
    from d4s.sequence.target_search import search_targets

    here().on_first(lambda: check_file(options))
    edits, (method, config) = loaded_edits(options), configured(options, None)
    model, tokenizer = loaded_model(options)
    edits = as_asked(options, edits, tokenizer)
    kept = search_targets(
        model, tokenizer, edits, method=method, config=config, out=options.out, seed=options.seed
    )
    if options.json:
        print_json({"file": str(options.out), "targets": len(kept)})
    else:
        print(f"{options.out}: {len(kept)} targets")
