"""`d4s analyze`: why editing makes a model decline, seen from the data or from inside the model."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from d4s.cli.arguments import (
    Once,
    add_edits,
    add_model,
    add_sequences,
    count,
    empty_folder,
    loaded_covariance,
    loaded_edits,
    loaded_model,
    names,
    refuse,
    share,
)
from d4s.cli.printing import print_json
from d4s.errors import ConfigError

HELP = (
    "why editing makes a model decline: by what it is edited with (data), or by what changes inside it (model). "
    "The model view also takes the result of an earlier run: d4s analyze model RESULT.json"
)
BOUNDED = ("efficacy", "specificity")


def add(verb: ArgumentParser) -> None:
    verb.add_argument("view", choices=("data", "model"))
    add_model(verb)
    add_edits(verb, optional=True)  # a file of results comes without
    add_sequences(verb)
    verb.add_argument("--methods", action=Once, type=names, help="as rome,memit,d4s; default: rome,memit")
    verb.add_argument(
        "--evaluate-every", type=count, help="edits between evaluations; default: a tenth of them"
    )
    for name in BOUNDED:
        verb.add_argument(
            f"--{name}-bound",
            type=share,
            help="share it must not fall under; default: 90 %% of its first level",
        )


def run(options: Namespace) -> None:
    from d4s.sequence.compare import compare
    from d4s.sequence.record import Record
    from d4s.study.data_view import analyze_data
    from d4s.study.model_view import analyze_model

    bounds = {name: bound for name in BOUNDED if (bound := getattr(options, f"{name}_bound")) is not None}
    view: Any
    if options.view == "data":
        refuse(options, ("neighborhood_limit", "efficacy_bound", "specificity_bound"), "analyze data")
    if options.edits is None:
        if options.view == "data":
            raise ConfigError("analyze data needs EDITS, as d4s analyze data MODEL EDITS --out DIR")
        of_a_run = (
            "methods",
            "batch_size",
            "covariance",
            "evaluate_every",
            "neighborhood_limit",
            "device",
            "device_map",
            "dtype",
            "limit",
            "skip_bad",
            "zsre_target",
        )
        refuse(options, of_a_run, "the result of an earlier run")
        record = Record.load(options.model)
        out = empty_folder(options.out)
        view = analyze_model(record, bounds=bounds, seed=options.seed)
    else:
        out = empty_folder(options.out)
        edits = loaded_edits(options)
        model, tokenizer = loaded_model(options)
        settings: dict[str, Any] = {
            "methods": options.methods or ["rome", "memit"],
            "covariance": loaded_covariance(options, model, tokenizer),
            "batch_size": options.batch_size or 1,
            "evaluate_every": options.evaluate_every or max(1, len(edits) // 10),
        }
        if options.view == "data":
            view = analyze_data(model, tokenizer, edits, **settings, seed=options.seed)
        else:
            limit = options.neighborhood_limit
            found = compare(model, tokenizer, edits, **settings, seeds=options.seed, neighborhood_limit=limit)
            view = analyze_model(found, bounds=bounds, seed=options.seed)
    view.save(out)
    if options.json:
        print_json(view.to_dict())
    else:
        print(f"{view.summary()}\ntables, figures: {out}")
