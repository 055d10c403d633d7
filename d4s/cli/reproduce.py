"""`d4s reproduce`: a table or figure of the D4S paper, on any model and data."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from d4s.cli.arguments import (
    add_covariance,
    add_downstream,
    add_model,
    add_skip_bad,
    count,
    empty_folder,
    limit,
    loaded_covariance,
    loaded_model,
    names,
    refuse,
    whole_numbers,
)
from d4s.cli.printing import print_json
from d4s.errors import ConfigError
from d4s.files import check_folder
from d4s.study.paper.protocols import PROTOCOLS

HELP = "a table or figure of the D4S paper"


def add(verb: ArgumentParser) -> None:
    verb.add_argument("name", metavar="NAME", choices=tuple(PROTOCOLS), help=", ".join(PROTOCOLS))
    add_model(verb)
    verb.add_argument(
        "--edits", type=Path, nargs="+", help="a file a data set; default: the embedded model's"
    )
    add_skip_bad(verb)
    verb.add_argument("--counts", type=whole_numbers, help="edits at which is scored; default: the paper's")
    verb.add_argument("--methods", type=names, help="as rome,memit,d4s; default: the paper's")
    verb.add_argument("--out", type=Path, required=True, help="new folder for table, figure and statement")
    verb.add_argument(
        "--facts",
        type=count,
        help="asked unedited at most (fig2, fig3, fig6, and table4 in place of tasks); default: 200",
    )
    verb.add_argument("--text", type=Path, help="text whose perplexity is taken where facts are asked")
    verb.add_argument(
        "--neighborhood-limit",
        type=limit,
        help="neighbours an edit that are scored on the way; default: 2, of tables 2 and 3 all",
    )
    add_covariance(verb)
    add_downstream(verb)  # for table4 and fig6


def run(options: Namespace) -> None:
    from d4s.edits.formats import load_edits
    from d4s.study.paper.reproduce import MOST_FACTS, reproduce
    from d4s.study.retained import paragraphs

    if options.name not in ("table4", "fig6"):
        refuse(options, ("tasks", "task_folder", "task_limit", "trust_task_code"), options.name)
    if not PROTOCOLS[options.name].retained:
        refuse(options, ("facts", "text"), options.name)
    if options.tasks:
        refuse(options, ("facts", "text"), "--tasks, which are asked in place of facts")
    elif not PROTOCOLS[options.name].tasks:
        refuse(options, ("task_folder", "task_limit", "trust_task_code"), "--tasks", beside=False)
    if options.edits is None:
        refuse(options, ("skip_bad",), "--edits", beside=False)
    asks_facts = options.facts is not None or options.text is not None
    if asks_facts:
        refuse(
            options,
            ("task_folder", "task_limit", "trust_task_code"),
            "--facts and --text, which are asked in place of tasks",
        )
    if options.name in ("fig2", "fig3"):
        refuse(options, ("neighborhood_limit",), options.name)
    out = options.out
    if any(out.glob(f"{options.name}*-details/**/settings.json")):  # it goes on where it was
        check_folder(out)
    else:
        out = empty_folder(out)
    edits = {
        label: load_edits(path, skip_bad=options.skip_bad)
        for label, path in labels(options.edits or ()).items()
    }
    model, tokenizer = loaded_model(options)
    found = reproduce(
        options.name,
        model,
        tokenizer,
        edits or None,
        out=out,
        counts=options.counts,
        methods=options.methods,
        facts=options.facts or MOST_FACTS,
        texts=None if options.text is None else paragraphs(options.text),
        neighborhood_limit=options.neighborhood_limit,
        covariance=loaded_covariance(options, model, tokenizer),
        tasks=[] if asks_facts else options.tasks,
        task_folder=options.task_folder,
        task_limit=options.task_limit,
        trust_task_code=options.trust_task_code,
        seed=options.seed,
    )
    if options.json:
        print_json(found.to_dict())
    else:
        print(f"{found.summary()}\nfigure, data, details: {out}")


def labels(paths: Sequence[Path]) -> dict[str, Path]:
    """Names of data sets: the files', with their folders' where two files are called the same."""
    stems = [path.stem for path in paths]
    labels = [
        path.stem if stems.count(path.stem) == 1 else f"{path.resolve().parent.name}-{path.stem}"
        for path in paths
    ]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"--edits: two of the files are both called {label!r}; rename one")
    return dict(zip(labels, paths, strict=True))
