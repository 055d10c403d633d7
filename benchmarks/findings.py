"""What the README says of the embedded model beyond its comparisons: `python -m benchmarks.findings [NAME …]`.

    configurations  D4S and AlphaEdit over 200 edits with a field of their presets changed
    changed_again   100 edits, the first 50 of them then changed once more: which answer is given
    generated       questions answered by forced tokens and freely, 100 edits, ten a step
    overlap         how much of an edit's change arrives at its own key, and at those of other edits

Each prints a table and writes it to benchmarks/results/findings/NAME.csv.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import replace
from pathlib import Path

import torch
from pandas import DataFrame

from d4s import edit_sequence, evaluate
from d4s.embedded import load_demo_edits
from d4s.embedded.statistics import demo_covariance
from d4s.figures.tables import frame_lines
from d4s.files import write_table
from d4s.methods import Workbench, method_for
from d4s.models.loading import load_model
from d4s.sequence.compare import compare

OUT = Path(__file__).parent / "results" / "findings"
LAYERS = (0, 1, 2)


class Bench:
    """The embedded model, its key statistics, and its edits in the order of seed 0."""

    def __init__(self) -> None:
        self.model, self.tokenizer = load_model("embedded", dtype=torch.bfloat16)
        self.covariance = demo_covariance(self.model, self.tokenizer, layers=LAYERS)
        self.edits = load_demo_edits()
        random.Random(0).shuffle(self.edits)


def configurations(bench: Bench) -> DataFrame:
    changes: dict[str, list[dict[str, object]]] = {
        "d4s": [
            {},
            {"anchor": "current"},
            *({"prior_weight": value} for value in (200.0, 2_000.0)),
            *({"ridge": value} for value in (0.01, 1.0)),
            *({"clamp": value} for value in (0.75, 1.0)),
            *({"layers": layers} for layers in ((1,), (2,), (0, 1))),
        ],
        "alphaedit": [
            {},
            *({"null_space_threshold": value} for value in (0.05, 0.2, 1.0)),
            *({"l2": value} for value in (10.0, 100.0)),
            {"null_space_threshold": 1.0, "l2": 10.0},
        ],
    }
    runs = {
        (method, ", ".join(f"{k}={v}" for k, v in change.items()) or "preset"): change
        for method, several in changes.items()
        for change in several
    }
    found = compare(
        bench.model,
        bench.tokenizer,
        bench.edits[:200],
        {f"{method}: {label}": {"method": method, **change} for (method, label), change in runs.items()},
        covariance=bench.covariance,
        neighborhood_limit=2,
        original=False,
    )
    names = ("efficacy", "paraphrase", "specificity", "average", "specificity_argmax", "l1_growth")
    table = found.table()[["edits", *names]]
    table.insert(0, "configuration", [label for _, label in runs])
    table.insert(0, "method", [method for method, _ in runs])
    return table


def changed_again(bench: Bench) -> DataFrame:
    edits = bench.edits[:100]
    objects = {
        edit.relation: [e.target_new for e in bench.edits if e.relation == edit.relation] for edit in edits
    }
    later = []
    for edit in edits[:50]:
        others = [o for o in objects[edit.relation] if o not in (edit.target_new, edit.target_true)]
        if others:
            again = random.Random(edit.id).choice(others)
            later.append(replace(edit, target_new=again, target_true=edit.target_new, id=f"{edit.id}, again"))
    rows = []
    for name, config in {
        "d4s": {},
        "d4s, anchor=current": {"anchor": "current"},
        "memit": {},
        "memit-seq": {},
        "alphaedit": {},
        "rome": {},
    }.items():
        result = edit_sequence(
            bench.model,
            bench.tokenizer,
            [*edits, *later],
            method=name.partition(",")[0],
            config=config,
            covariance=bench.covariance,
            original=False,
            neighborhood_limit=0,
        )
        changed = evaluate(bench.model, bench.tokenizer, later)
        others = evaluate(bench.model, bench.tokenizer, edits[50:])
        result.restore()
        row = {"method": name, "changed again": len(later)}
        row |= {n: changed[n] for n in ("efficacy", "efficacy_argmax", "paraphrase")}
        rows.append(row | {f"others' {n}": others[n] for n in ("efficacy", "paraphrase", "specificity")})
    return DataFrame(rows)


def generated(bench: Bench) -> DataFrame:
    questions = [replace(edit, kind="question") for edit in bench.edits[:100]]
    result = edit_sequence(
        bench.model,
        bench.tokenizer,
        questions,
        covariance=bench.covariance,
        batch_size=10,
        original=False,
        generate=True,
        neighborhood_limit=1,
    )
    result.restore()
    row = result.history[-1]
    rows = [
        {"prompts": name, "forced tokens right": row[name], "forced, all right": row[f"{name}_argmax"]}
        | {"generated, exact match": row[f"{name}_generated"]}
        for name in ("efficacy", "paraphrase")
    ]
    return DataFrame(rows)


def overlap(bench: Bench) -> DataFrame:
    """Of a single edit's residual, the share kᵢᵀ (λC)⁻¹ kⱼ / (1 + kᵢᵀ (λC)⁻¹ kᵢ) that arrives at key j."""
    workbench = Workbench(bench.model, bench.tokenizer, covariance=bench.covariance)
    editor = method_for("d4s", workbench.anatomy).editor(workbench)
    layer = editor.weights.layers[0]
    keys = editor.keys(editor.rows(bench.edits[:200]), layer)
    products = keys @ editor.priors()[layer].solve(keys.T)
    shares = products / (1 + products.diagonal().unsqueeze(1))
    others = shares[~torch.eye(len(keys), dtype=torch.bool)]
    rows = {
        "own key, median": shares.diagonal().median(),
        "another's key, median of absolute values": others.abs().median(),
        "another's key, root mean square": others.square().mean().sqrt(),
    }
    return DataFrame([{"share that arrives at": name, "value": float(value)} for name, value in rows.items()])


FINDINGS = {
    "configurations": configurations,
    "changed_again": changed_again,
    "generated": generated,
    "overlap": overlap,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="; ".join(FINDINGS))
    chosen = parser.parse_args().names or list(FINDINGS)
    for name in chosen:
        if name not in FINDINGS:
            parser.error(f"unknown finding {name!r}; known: {', '.join(FINDINGS)}")
    bench = Bench()
    for name in chosen:
        table = FINDINGS[name](bench)
        write_table(table, OUT / f"{name}.csv")
        print("\n".join([name, *frame_lines(table), ""]), flush=True)


if __name__ == "__main__":
    main()
