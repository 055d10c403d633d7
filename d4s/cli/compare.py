"""`d4s compare`: the same edits with several methods."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from d4s.cli.arguments import (
    add_collapse,
    add_edits,
    add_model,
    add_scores,
    add_sequences,
    add_targets,
    count,
    loaded_covariance,
    loaded_edits,
    loaded_model,
    names,
    seeds,
    task_scores,
)
from d4s.cli.printing import print_json, print_notes
from d4s.files import check_folder

HELP = "the same edits with several methods"


def add(verb: ArgumentParser) -> None:
    add_model(verb)
    add_edits(verb)
    add_sequences(verb, again="; or that of an earlier run, which then goes on")
    verb.add_argument("--methods", type=names, default=["d4s", "memit"], help="as d4s,memit,rome")
    verb.add_argument("--evaluate-every", type=count, help="edits between evaluations; default: at the end")
    verb.add_argument("--seeds", type=seeds, help="as 0,1,2: means over them; default: --seed")
    verb.add_argument("--shuffle", action="store_true", help="each seed has its own order of the edits")
    verb.add_argument("--count", type=count, help="edits made, the first of that order; default: all")
    add_targets(verb)
    add_collapse(verb)
    add_scores(verb)


def run(options: Namespace) -> None:
    from d4s.sequence.compare import compare

    check_folder(options.out)
    edits = loaded_edits(options)
    model, tokenizer = loaded_model(options)
    found = compare(
        model,
        tokenizer,
        edits,
        options.methods,
        out=options.out,
        covariance=loaded_covariance(options, model, tokenizer),
        targets=options.targets,
        batch_size=options.batch_size or 1,
        evaluate_every=options.evaluate_every,
        seeds=options.seeds or options.seed,
        shuffle=options.shuffle,
        count=options.count,
        neighborhood_limit=options.neighborhood_limit,
        generate=options.generate,
        measure=task_scores(options, model, tokenizer),
        stop_on_collapse=options.stop_on_collapse,
    )
    found.save(options.out)
    if options.json:
        print_json(found.to_dict())
    else:
        print(found.summary())
        print_notes([record for by_seed in found.results.values() for record in by_seed.values()])
        print(f"table, histories, figures: {options.out}")
