"""What a page draws, as JSON values: curves, forgetting, and a column a figure of the edits. Knows nothing of HTML."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from d4s.measure.columns import HEADLINES, METRICS, Column, column
from d4s.report.runs import ToldRun
from d4s.sequence.record import Record, first_id

MOST_LAYERS = 8  # drawn a panel each
STRETCHES = 50  # of a curve over single edits, each its mean
FORGETTING = ("efficacy", "efficacy_argmax", "paraphrase")  # asked of the same prompts at every point
STEPS_OF_PROBABILITY = 10_000  # a probability in the table of edits is a whole number of these

_NOW = "target_probability"
_TARGETS = (
    ("first_probability", "as its search begins"),
    ("last_probability", "as its search ends"),
    ("written_probability", "right after the step"),
    (_NOW, "now, after all edits"),
)


def content_of(runs: Sequence[ToldRun]) -> dict[str, Any]:
    """All that the page's script draws; figures that are not finite are None."""
    facts, places = _facts(runs)
    return {
        "runs": [{"label": run.label, "colour": one} for run, one in zip(runs, _colours(runs), strict=True)],
        "groups": _groups(runs),
        "forgetting": [_forgetting(i, run.record) for i, run in enumerate(runs)],
        "facts": facts,
        "edits": [_edits(run, places) for run in runs],
        "unit": STEPS_OF_PROBABILITY,
    }


def last_row(record: Record) -> Mapping[str, Any] | None:
    """The last point after an edit; None: there is none."""
    row = record.history[-1] if record.history else None
    return row if row is not None and row["step"] else None


def _colours(runs: Sequence[ToldRun]) -> list[int]:
    """A number a label: seeds of one method share theirs."""
    labels = [run.label.rpartition(", seed ")[0] or run.label for run in runs]
    order = list(dict.fromkeys(labels))
    return [order.index(label) for label in labels]


def _number(value: Any) -> float | None:
    """As it is drawn: four digits."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.4g}")


# Curves


def _groups(runs: Sequence[ToldRun]) -> list[dict[str, Any]]:
    names = list(dict.fromkeys(name for run in runs for row in run.record.history for name in row))
    own = {name: one for run in runs for name, one in run.record.columns.items()}
    scores = [*HEADLINES, *(f"{name}_argmax" for name in HEADLINES[:3])]
    measured = [
        n for n in names if (c := column(n, own)).origin == "measure" and not c.bound and c.unit != "text"
    ]
    others = [name for name in METRICS if name in names and name not in (*scores, _NOW)]
    others += [name for name in ("routing_change",) if name in names]
    groups = [
        ("scores", "Scores", [_curve(runs, column(n, own)) for n in scores if n in names]),
        ("norms", "Norms", _norms(runs)),
        (
            "targets",
            "Target probability",
            _targets(runs, [_curve(runs, column(_NOW))] if _NOW in names else []),
        ),
        ("others", "Other figures", [_curve(runs, column(name, own)) for name in [*others, *measured]]),
    ]
    return [{"id": one, "title": title, "panels": panels} for one, title, panels in groups if panels]


def _curve(runs: Sequence[ToldRun], about: Column, title: str = "") -> dict[str, Any]:
    """A panel: a line a run, with its interval; the same edits right after their own step, and the unedited model."""
    name, lines = about.name, []
    kinds = (("now", name), ("right after", f"original_{name}"), ("unedited", f"{name}.unedited"))
    for i, run in enumerate(runs):
        for kind, key in kinds:
            rows = [
                row
                for row in run.record.history
                if row.get(key) is not None and (row["step"] or about.layer is not None)
            ]
            if not rows:
                continue
            line: dict[str, Any] = {"run": i, "kind": kind, "x": [row["step"] for row in rows]}
            line["y"] = [_number(about.factor * row[key]) for row in rows]
            for bound in ("low", "high"):
                if f"{key}.{bound}" in rows[0]:
                    line[bound] = [
                        _number(about.factor * row.get(f"{key}.{bound}", math.nan)) for row in rows
                    ]
            lines.append(line)
    return {
        "title": title or about.title,
        "meaning": about.meaning,
        "unit": about.symbol,
        "x": "edits made",
        "range": [0, 100] if about.is_share else [0, 1] if about.unit == "probability" else None,
        "lines": lines,
    }


def _norms(runs: Sequence[ToldRun]) -> list[dict[str, Any]]:
    growth = [
        {
            "run": i,
            "kind": "now",
            "x": [row["step"] for row in run.record.history],
            "y": [_number(100 * row["l1_growth"]) for row in run.record.history],
        }
        for i, run in enumerate(runs)
        if run.record.history
    ]
    panels = []
    if growth:
        panels.append(
            {
                "title": "growth of mean |w|",
                "meaning": column("l1_growth").meaning,
                "unit": "%",
                "x": "edits made",
                "range": None,
                "lines": growth,
            }
        )
    names = [name for run in runs for row in run.record.history[:1] for name in row]
    changed = {
        n: column(name)
        for name in names
        if (n := column(name).layer) is not None and name.startswith("delta")
    }
    if len(changed) <= MOST_LAYERS:
        panels += [_curve(runs, changed[n], f"‖W − W0‖, layer {n}") for n in sorted(changed)]
    return panels


def _targets(runs: Sequence[ToldRun], panels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Behind the panels given: one for each moment of an edit, means over stretches of edits."""
    panels = list(panels)
    for name, title in _TARGETS:
        lines = []
        for i, run in enumerate(runs):
            now = {row["id"]: row for row in _evaluated(run.record, last=True)}
            values = [row.get(name, now.get(first_id(row), {}).get(name)) for row in run.record.edits_table]
            stretch = max(1, -(-len(values) // STRETCHES))
            x, y = [], []
            for begin in range(0, len(values), stretch):
                part = [v for v in values[begin : begin + stretch] if v is not None and math.isfinite(v)]
                if part:
                    x.append(min(len(values), begin + stretch))
                    y.append(_number(sum(part) / len(part)))
            if x:
                lines.append({"run": i, "kind": "now", "x": x, "y": y})
        if lines:
            panels.append(
                {
                    "title": f"p(target) {title}",
                    "meaning": column(name).meaning,
                    "unit": "",
                    "x": "edit",
                    "range": [0, 1],
                    "lines": lines,
                }
            )
    return panels


def _forgetting(run: int, record: Record) -> dict[str, Any]:
    """Metric → the lower half of `Record.forgetting`, in percent."""
    points = [row["step"] for row in record.history if row["step"]]
    cells = {}
    for metric in FORGETTING if len(points) > 1 else ():
        matrix = 100 * record.forgetting(metric)
        if not matrix.isna().all(axis=None):
            cells[column(metric).title] = [[_number(v) for v in row] for row in matrix.to_numpy().tolist()]
    return {"run": run, "points": points, "cells": cells}


# Edits


def _facts(runs: Sequence[ToldRun]) -> tuple[dict[str, list[Any]], dict[str, int]]:
    """Every edit once, a column a text; and the place of each id."""
    places: dict[str, int] = {}
    for run in runs:
        for row in run.record.edits_table:
            places.setdefault(row["id"], len(places))
    known = {one: fact for run in reversed(runs) for one, fact in run.facts.items()}
    found = [known.get(one) for one in places]
    return {
        "id": list(places),
        "sentence": [fact.sentence if fact else None for fact in found],
        "new": [fact.new if fact else None for fact in found],
        "old": [fact.old if fact else None for fact in found],
    }, places


def _evaluated(record: Record, *, last: bool) -> Sequence[Mapping[str, Any]]:
    """Rows of the last point after an edit, or of the unedited model."""
    if not record.history or bool(record.history[-1 if last else 0]["step"]) != last:
        return ()
    return record.evaluations[-1 if last else 0].rows


def _edits(run: ToldRun, places: Mapping[str, int]) -> dict[str, list[Any]]:
    """A column a figure of the run's edits, in the order made. Probabilities and shares are whole numbers of
    1 / STEPS_OF_PROBABILITY."""
    table = run.record.edits_table
    before = {row["id"]: row for row in _evaluated(run.record, last=False)}
    now = {row["id"]: row for row in _evaluated(run.record, last=True)}
    lost = set(run.record.not_arrived())
    last = run.record.last_rows()

    def whole(values: Iterable[Any]) -> list[int | None]:
        return [
            None if v is None or not math.isfinite(v) else round(STEPS_OF_PROBABILITY * v) for v in values
        ]

    def of(rows: Mapping[str, Mapping[str, Any]], name: str) -> list[int | None]:
        return whole(rows.get(first_id(row), {}).get(name) for row in table)

    def likely(rows: Mapping[str, Mapping[str, Any]], name: str) -> list[int | None]:
        nlls = (rows.get(first_id(row), {}).get(name) for row in table)
        return whole(None if nll is None else math.exp(-nll) for nll in nlls)

    columns: dict[str, list[Any]] = {
        "fact": [places[row["id"]] for row in table],
        "new_before": likely(before, "nll_new"),
        "old_before": likely(before, "nll_true"),
        "searched": whole(row.get("last_probability") for row in table),
        "written": whole(row.get("written_probability") for row in table),
        "new_now": likely(now, "nll_new"),
        "old_now": likely(now, "nll_true"),
        "greedy": of(now, "efficacy_argmax"),
        "paraphrase": of(now, "paraphrase"),
        "specificity": of(now, "specificity"),
        "misspelt": [now.get(first_id(row), {}).get("misspelt_as") for row in table],
        "lost": [int(first_id(row) in lost and last[first_id(row)] is row) for row in table],
        "undone": [int(row["id"] in run.facts and not run.facts[row["id"]].stands) for row in table],
    }
    return {name: values for name, values in columns.items() if any(v is not None for v in values)}
