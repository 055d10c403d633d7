"""`d4s alone`: each edit by itself, from the unedited model."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from d4s.cli.arguments import (
    Once,
    add_chat,
    add_covariance,
    add_edits,
    add_fields,
    add_model,
    add_preset,
    add_sums,
    add_targets,
    as_asked,
    check_file,
    check_room,
    configured,
    count,
    covariance_of,
    limit,
    loaded_edits,
    loaded_model,
)
from d4s.cli.printing import print_json
from d4s.ranks import here

HELP = (
    "score each edit by itself, from the unedited model: the protocol of single edits (EasyEdit without "
    "sequential_edit). The same command again goes on where it was interrupted"
)
SHARED = True


def add(verb: ArgumentParser) -> None:
    add_model(verb)
    add_edits(verb)
    add_chat(verb)
    verb.add_argument(
        "--method",
        action=Once,
        help="as d4s, or d4s:fresh for a named preset; default: that of a --preset file, else d4s",
    )
    verb.add_argument("--out", type=Path, required=True, help="JSON file of the figures")
    add_covariance(verb)
    verb.add_argument(
        "--batch-size", type=count, default=1, help="edits that are made, scored and taken back together"
    )
    verb.add_argument(
        "--neighborhood-limit", type=limit, help="neighbours an edit that are scored; default: all"
    )
    verb.add_argument("--generate", action="store_true", help="also score what the model freely says")
    add_fields(verb)
    add_preset(verb)
    add_targets(verb)
    add_sums(verb)


def run(options: Namespace) -> None:
    from d4s.sequence.alone import edit_alone

    here().on_first(lambda: check_file(options))
    edits, (method, config) = loaded_edits(options), configured(options, options.method)
    model, tokenizer = loaded_model(options)
    edits = as_asked(options, edits, tokenizer)
    check_room(
        model,
        {method: config},
        options.batch_size,
        batch_size=options.batch_size,
        keep_vectors=False,
        sums_on=options.sums_on,
        saves=False,
    )
    found = edit_alone(
        model,
        tokenizer,
        edits,
        method=method,
        config=config,
        covariance=covariance_of(method, options, model, tokenizer),
        targets=options.targets,
        batch_size=options.batch_size,
        neighborhood_limit=options.neighborhood_limit,
        generate=options.generate,
        seed=options.seed,
        out=options.out,
        sums_on=options.sums_on,
    )
    if options.json:
        print_json(found.to_dict(rows=False))
    else:
        print(found.summary())
        print(f"metrics: {options.out}")
