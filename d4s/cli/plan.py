"""`d4s plan`: what a sequence will take, before anything runs."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from d4s.cli.arguments import (
    Once,
    add_fields,
    add_model,
    add_passes,
    add_preset,
    add_sums,
    configured,
    count,
    hide_loading_bars,
    loaded_model,
)
from d4s.cli.printing import print_json, words
from d4s.models.causal_lm import CausalLM

HELP = "bytes, passes and time of a sequence, before anything runs; a model is loaded only to be measured"


def add(verb: ArgumentParser) -> None:
    add_model(verb)
    verb.add_argument("--edits", type=count, required=True, metavar="N", help="how many")
    verb.add_argument(
        "--method",
        action=Once,
        help="as d4s, or d4s:fresh for a named preset; default: that of a --preset file, else d4s",
    )
    verb.add_argument("--batch-size", type=count, default=1, help="edits a step")
    add_passes(verb)
    verb.add_argument("--evaluate-every", type=count, help="edits between evaluations")
    verb.add_argument("--ranks", type=count, default=1, help="devices that share the passes, a model on each")
    add_fields(verb)
    add_preset(verb)
    verb.add_argument("--covariance", type=Path, help="file of key statistics, which then are not estimated")
    verb.add_argument(
        "--keep-vectors",
        choices=("yes", "no"),
        default="yes",
        help="no: a journal without keys and residuals",
    )
    add_sums(verb)
    verb.add_argument("--out", type=Path, help="folder whose disk has to hold it; default: this one")
    verb.add_argument(
        "--no-measure", action="store_true", help="leave out the 5 seconds that measure this machine"
    )


def run(options: Namespace) -> None:
    from d4s.errors import ConfigError
    from d4s.methods import method_for
    from d4s.models.architectures import Anatomy
    from d4s.models.loading import skeleton
    from d4s.sequence.schedule import Schedule
    from d4s.study.plan import free_bytes, plan
    from d4s.study.planned import Plan

    hide_loading_bars()
    method, config = configured(options, options.method)
    schedule = Schedule(
        batch_size=options.batch_size, evaluate_every=options.evaluate_every, passes=options.passes
    )

    def planned(model: CausalLM, measure: bool = False) -> Plan:
        return plan(
            model,
            method_for(method, Anatomy(model), config),
            options.edits,
            schedule=schedule,
            keep_vectors=options.keep_vectors == "yes",
            statistics=options.covariance is None,
            ranks=options.ranks,
            sums_on=options.sums_on,
            device=options.device,
            measure=measure,
        )

    # Of several devices only the loaded model says which holds what.
    model = None if options.device_map is None else loaded_model(options)[0]
    found = planned(skeleton(options.model, dtype=options.dtype) if model is None else model)
    free = free_bytes(found.places, _existing(options.out or Path()))
    lacks = None
    try:
        found.check(free, loaded=model is not None)
    except ConfigError as error:
        lacks = str(error)
    if lacks is None and not options.no_measure:
        found = planned(loaded_model(options)[0] if model is None else model, measure=True)
    if options.json:
        print_json(found.to_dict() | {"free": free, "fits": lacks is None})
    else:
        print(found.summary())
    if lacks is not None:
        words(options)(f"does not fit: {lacks}")


def _existing(folder: Path) -> Path:
    """The nearest folder above that is there."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder
