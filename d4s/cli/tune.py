"""`d4s tune`: a method's settings for a model, found on probe edits within a time, into a preset file."""

from __future__ import annotations

import math
from argparse import ArgumentParser, ArgumentTypeError, Namespace
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
    as_asked,
    check_file,
    configured,
    count,
    loaded_covariance,
    loaded_edits,
    loaded_model,
)
from d4s.cli.printing import print_json
from d4s.errors import ConfigError

HELP = (
    "find a method's settings for a model by sequences of probe edits, drawn from EDITS and named in the file that is "
    "written, which edit, compare and targets take as --preset"
)


def minutes(text: str) -> float:
    """A positive number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ArgumentTypeError(f"{text!r} must be a positive number of minutes")
    return number


def add(verb: ArgumentParser) -> None:
    add_model(verb)
    add_edits(verb)
    add_chat(verb)
    verb.add_argument(
        "--method",
        action=Once,
        help="as d4s, or d4s:fresh for a named preset, from which it begins; default: d4s",
    )
    verb.add_argument("--out", type=Path, required=True, help="JSON file; a figure and its data go beside it")
    verb.add_argument("--minutes", type=minutes, default=10.0, help="that it may take; default: 10")
    verb.add_argument(
        "--probes", type=count, help="edits of the last settings' sequences; default: by the time"
    )
    verb.add_argument(
        "--probe-edits", type=Path, metavar="FILE", help="take the probes from this file, and none from EDITS"
    )
    add_covariance(verb)
    add_sums(verb)
    add_fields(verb)
    add_preset(verb)


def run(options: Namespace) -> None:
    from d4s.edits.formats import load_edits
    from d4s.study.tune import tune

    if options.out.suffix != ".json":
        raise ConfigError(
            f"--out {options.out}: must be a .json file; a .png and a .csv of its name go beside it"
        )
    check_file(options)
    method, config = configured(options, options.method)
    edits = loaded_edits(options)
    own = None
    if options.probe_edits is not None:
        own = load_edits(options.probe_edits, skip_bad=options.skip_bad, zsre_target=options.zsre_target)
    model, tokenizer = loaded_model(options)
    edits = as_asked(options, edits, tokenizer)
    own = None if own is None else as_asked(options, own, tokenizer)
    found = tune(
        model,
        tokenizer,
        edits,
        method=method,
        config=config,
        minutes=options.minutes,
        probes=options.probes,
        probe_edits=own,
        covariance=loaded_covariance(options, model, tokenizer),
        sums_on=options.sums_on,
        seed=options.seed,
    )
    found.save(options.out)
    if options.json:
        print_json(found.to_dict())
    else:
        print(found.summary())
        print(f"preset, figure and its data: {options.out}, {options.out.with_suffix('.png')}, .csv")
