"""What a target's search costs against the NLL it reaches: each setting on the same edits, a window after another.

python -m benchmarks.real.search smollm2 counterfact.json --out search [--count 60] [--skip 1000] [--settings NAME …]
    [--layer 14]

The edits are those of the comparison's order (`benchmarks.real.comparison`) behind its first `--skip`. What --out holds
is not searched again, so that a run that was ended goes on. Passes are tokens of rows that went through the layers
above the edited one, counted once forward and once backward, as a share of the published search's; seconds are those
that the process computed (one thread), not those that it waited on a busy machine. Beside what a search has reached at
its prompt stands what its δ does in the edit's paraphrases, where it is added to the unedited model by hand, at the
subject's last token: no change of weights that brings δ to every prompt of the subject would do more. Cost,
SmolLM2-135M: 4 s an edit for the published search, 9 s with 50 looks, 1.5 s with Polyak's steps.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pandas
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import d4s
from d4s.edits import Edit
from d4s.figures.plots import plot_lines
from d4s.locate.request_rows import RequestRows, spares
from d4s.locate.targets import TargetConfig, Targets, optimise_targets
from d4s.methods import Workbench, method_for
from d4s.models.architectures import Anatomy
from d4s.models.prompts import subject_row
from d4s.models.trace import Trace

PUBLISHED = "published"
# Label → what differs from the published search.
SETTINGS: dict[str, dict[str, Any]] = {
    PUBLISHED: {},
    "polyak": dict(optimizer="polyak", steps=9, stop_nll=0.04),
    "polyak, bare": dict(optimizer="polyak", steps=7, stop_nll=0.04, bare_looks=6),
    "polyak, bare, to .02": dict(optimizer="polyak", steps=8, stop_nll=0.02, bare_looks=6),
    "polyak, bare, reduced": dict(
        optimizer="polyak", steps=7, stop_nll=0.04, bare_looks=6, search_precision="reduced"
    ),
    "Adam, 50 looks": dict(steps=50, stop_loss=0.01),
    "Adam, stop": dict(stop_nll=0.04),
    "Adam, rate 1.5, stop": dict(learning_rate=1.5, steps=12, stop_nll=0.04),
    "published, reduced": dict(search_precision="reduced"),
}
TOGETHER = 20  # edits a window
BY_HAND = ("paraphrases_said", "paraphrase_nll")


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Tokens through the layers above the edited one, forward and backward, while it is open."""
    found = {"tokens": 0}
    own = RequestRows.log_probabilities

    def counting(rows: RequestRows, deltas: Sequence[torch.Tensor]) -> torch.Tensor:
        found["tokens"] += len(rows.present) * (1 + deltas[0].requires_grad)
        return own(rows, deltas)

    RequestRows.log_probabilities = counting  # type: ignore[method-assign]
    try:
        yield found
    finally:
        RequestRows.log_probabilities = own  # type: ignore[method-assign]


def measured(
    anatomy: Anatomy,
    tokenizer: Any,
    edits: Sequence[Edit],
    prefixes: Sequence[str],
    layer: int,
    config: TargetConfig,
) -> pandas.DataFrame:
    """A row an edit; tokens and seconds are the window's, shared alike."""
    with counted() as passed:
        began = time.process_time()
        targets = optimise_targets(anatomy, tokenizer, edits, prefixes, layer, config)
        seconds = time.process_time() - began
    return pandas.DataFrame(
        {
            "edit": [edit.id for edit in edits],
            "nll": (-targets.last_probability.log()).tolist(),
            "probability": targets.last_probability.tolist(),
            "norm": targets.delta.norm(dim=1).tolist(),
            "relative_norm": (targets.delta.norm(dim=1) / targets.start.norm(dim=1)).tolist(),
            "tokens": passed["tokens"] / len(edits),
            "seconds": seconds / len(edits),
        }
    ).join(by_hand(anatomy, tokenizer, edits, targets, layer))


@torch.no_grad()
def by_hand(
    anatomy: Anatomy, tokenizer: Any, edits: Sequence[Edit], targets: Targets, layer: int
) -> pandas.DataFrame:
    """A row an edit: what its δ, added behind the block where the subject ends, makes of its paraphrases that name the
    subject. said: share whose greedy answer is the target; nll: nats a token; NaN without such paraphrases"""
    rows = []
    for edit, delta in zip(edits, targets.delta, strict=True):
        found = []
        for text in edit.paraphrases:
            before, subject, after = text.rpartition(edit.subject)
            if not subject:
                continue
            row = subject_row(tokenizer, f"{before}{{}}{after}", subject, edit.target(edit.target_new))

            def plus(states: Tensor, at: int = row.subject_last, delta: Tensor = delta) -> Tensor:
                states = states.clone()
                states[0, at] += delta.to(states)
                return states

            with Trace(anatomy.blocks[layer], edit=plus):
                logits = anatomy.model(input_ids=torch.tensor([row.ids], device=anatomy.device)).logits[0]
            wanted = torch.tensor(row.ids[row.target_start :], device=logits.device)
            logits = logits[row.target_start - 1 : -1].float()
            found.append((bool((logits.argmax(1) == wanted).all()), float(cross_entropy(logits, wanted))))
        means = [sum(column) / len(column) for column in zip(*found, strict=True)]
        rows.append(means or [math.nan, math.nan])
    return pandas.DataFrame(rows, columns=list(BY_HAND))


def table_of(rows: pandas.DataFrame) -> pandas.DataFrame:
    """A row a setting, of the edits that all settings have."""
    counts = rows.groupby("edit")["setting"].nunique()
    shared = rows[rows["edit"].isin(counts[counts == rows["setting"].nunique()].index)]
    groups = shared.groupby("setting", sort=False)
    table = pandas.DataFrame(
        {
            "edits": groups["nll"].size(),
            "tokens": groups["tokens"].mean(),
            "seconds": groups["seconds"].mean(),
            "nll": groups["nll"].mean(),
            "nll_90th": groups["nll"].quantile(0.9),
            "nll_most": groups["nll"].max(),
            "probability_from_.9": groups["probability"].apply(lambda p: (p >= 0.9).mean()),
            "norm": groups["norm"].mean(),
            "relative_norm": groups["relative_norm"].mean(),
            **{name: groups[name].mean() for name in BY_HAND if name in shared},
        }
    )
    table.insert(2, "passes", table["tokens"] / table.loc[PUBLISHED, "tokens"])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("edits", type=Path, help="CounterFact, original or flat")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument(
        "--skip", type=int, default=1000, help="edits of the order that others are measured on"
    )
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--layer", type=int, help="of the targets; default: the preset's last one")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.set_num_threads(1)
    model, tokenizer = d4s.load_model(options.model)
    anatomy = Anatomy(model)
    method = method_for("d4s", anatomy)
    prefixes = method.prefixes(Workbench(model, tokenizer, seed=options.seed, progress=False))
    layer = method.layers[-1] if options.layer is None else options.layer
    spares(anatomy, layer, ("block",))  # asked once a model, and not a search's cost
    edits = d4s.load_edits(options.edits)
    order = Random(options.seed).sample(edits, len(edits))[options.skip : options.skip + options.count]

    options.out.mkdir(parents=True, exist_ok=True)
    place = options.out / "edits.csv"
    rows = pandas.read_csv(place) if place.exists() else pandas.DataFrame(columns=["setting", "edit"])
    for at in range(0, len(order), TOGETHER):
        for name in options.settings:
            held = set(rows.loc[rows["setting"] == name, "edit"].astype(str))
            window = [edit for edit in order[at : at + TOGETHER] if edit.id not in held]
            if not window:
                continue
            config = replace(method.target, **SETTINGS[name])
            found = measured(anatomy, tokenizer, window, prefixes, layer, config)
            rows = pandas.concat([rows, found.assign(setting=name)], ignore_index=True)
            rows.to_csv(place, index=False)
            print(f"{at + len(window)} edits, {name}: NLL {found['nll'].mean():.4f}", flush=True)
    table = table_of(rows)
    table.to_csv(options.out / "table.csv")
    print(table.to_string(float_format="{:.3f}".format))
    lines = [
        pandas.DataFrame({"panel": panel, "line": table.index, "x": table["seconds"], "y": table[column]})
        for column, panel in (("nll", "mean"), ("nll_90th", "90th percentile"))
    ]
    plot_lines(
        pandas.concat(lines),
        options.out / "search.png",
        x_label="seconds an edit, one thread",
        y_label="NLL of the target",
    )


if __name__ == "__main__":
    main()
