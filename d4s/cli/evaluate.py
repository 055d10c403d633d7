"""`d4s evaluate`: a model's scores on edits."""

from __future__ import annotations

import json
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d4s.cli.arguments import (
    add_chat,
    add_edits,
    add_model,
    add_scores,
    as_asked,
    check_file,
    loaded_edits,
    loaded_model,
    task_scores,
)
from d4s.cli.printing import print_json
from d4s.errors import ConfigError
from d4s.files import finite_or_none, write_text
from d4s.ranks import here

HELP = "score a model on edits"
SHARED = True


def add(verb: ArgumentParser) -> None:
    add_model(verb)
    add_edits(verb)
    add_chat(verb)
    add_scores(verb)
    verb.add_argument(
        "--fluency", action="store_true", help="also fluency and consistency of generated texts"
    )
    verb.add_argument(
        "--rows",
        type=Path,
        metavar="FILE",
        help="also each edit's figures: a JSON object a line (JSON Lines)",
    )
    verb.add_argument(
        "--baseline",
        metavar="FILE|MODEL",
        help="the unedited model's answers (baseline.json of d4s edit), or that model: for what must not change",
    )


def run(options: Namespace) -> None:
    from d4s.measure.columns import spelled
    from d4s.measure.metrics import evaluate
    from d4s.models.readiness import check_ready

    if options.rows is not None:
        here().on_first(lambda: check_file(options, "rows"))
    edits = loaded_edits(options)
    model, tokenizer = loaded_model(options)
    edits = as_asked(options, edits, tokenizer)
    if options.baseline is None:  # else it has been edited, and may have come to say NaN by that
        check_ready(model, tokenizer, edits)
    measure = task_scores(options, model, tokenizer)
    found = evaluate(
        model,
        tokenizer,
        edits,
        baseline=_baseline(options, edits),
        generate=options.generate,
        fluency=options.fluency,
        seed=options.seed,
        progress=True,
    )
    if options.rows is not None:
        here().on_first(lambda: write_text(_lines(found.rows), options.rows))
    tasks = here().from_first(measure) if measure is not None else {}
    if options.json:
        print_json(found.to_dict(rows=False) | ({"tasks": tasks} if tasks else {}))
    else:
        print(
            "\n".join(
                [found.summary(), *(f"{name}: {spelled(name, value, 2)}" for name, value in tasks.items())]
            )
        )


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(f"{json.dumps(finite_or_none(row), ensure_ascii=False)}\n" for row in rows)


def _baseline(options: Namespace, edits: list[Any]) -> Any:
    """--baseline: a file that d4s edit wrote, or the unedited model itself, which is then asked."""
    from d4s.measure.metrics import Baseline, take_baseline

    if options.baseline is None:
        return None
    place = Path(options.baseline)
    if place.is_file() and place.suffix.lower() != ".gguf":
        return Baseline.load(place)
    if not place.exists() and not _may_be_on_the_hub(options.baseline):
        raise ConfigError(
            f"--baseline {place}: there is no such file or model folder; name the baseline.json of d4s edit, or the "
            "unedited model"
        )
    unedited = Namespace(**{**vars(options), "model": options.baseline})
    return take_baseline(*loaded_model(unedited), edits, progress=True)


def _may_be_on_the_hub(name: str) -> bool:
    """Whether it is spelled as a model of the hub, or of this package, is, and not as a file of answers."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None and not name.endswith(".json")
