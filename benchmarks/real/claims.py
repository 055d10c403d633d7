"""The paper's claims on what a long run has measured: the figures and criteria of `d4s reproduce`, and no edit anew.

python -m benchmarks.real.claims comparison/sequences --out claims [--at 500] [--d4s d4s-once] [--others memit rome]
    [--data zsRE]

SEQUENCES is the folder that a long run keeps its sequences in. Judged are those that have ended, and those under way of
which fewer than a tenth are still the greedy answer, which have collapsed; with --at all that were scored after so many
edits, under way or stopped too, as they were then. One of D4S's sequences (--d4s) is held against those of other
methods (--others; default: all that are there). OUT gets a folder a figure with its pictures, their data and its table,
and claims.md: claim, criterion, what was measured, and whether it holds. Cost: seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.real.setting import COLLAPSE
from benchmarks.real.tables import sequences
from d4s.errors import ConfigError, unknown_name
from d4s.files import write_table, write_text
from d4s.sequence.comparison import Comparison
from d4s.sequence.record import Record
from d4s.sequence.schedule import Schedule
from d4s.study.model_view import analyze_model
from d4s.study.paper.model_figures import (
    File,
    bottleneck_and_norms,
    forgetting,
    metrics_against_edits,
    norms_and_scores,
)
from d4s.study.paper.setting import Verdict
from d4s.study.paper.tables import chosen_columns, highest_average

# Name → what draws it, and what of the paper it is.
FIGURES = {
    "fig5": (bottleneck_and_norms, "Fig. 5: bottleneck and norms"),
    "fig6": (norms_and_scores, "Fig. 6: norms and what is kept"),
    "fig7": (forgetting, "Fig. 7: forgetting"),
    "fig8": (metrics_against_edits, "Fig. 8: metrics against edits"),
}


def judged(folder: Path, d4s: str, others: Sequence[str] | None, at: int | None = None) -> Comparison:
    """D4S's sequence, under that name, and those of other methods.

    at: edits up to which they are judged; None: as far as each went
    """
    found = {
        label: {seed: one for seed, record in by_seed.items() if (one := _whole(record, at)) is not None}
        for label, by_seed in sequences(folder).results.items()
    }
    found = {label: by_seed for label, by_seed in found.items() if by_seed}
    named = [label for label, one in found.items() if next(iter(one.values())).method != "d4s"]
    for label in (d4s, *(others or ())):
        if label not in found:
            what = "sequence that has ended" if at is None else f"sequence scored after {at} edits"
            raise ConfigError(unknown_name(what, label, found))
    return Comparison({"d4s": found[d4s]} | {label: found[label] for label in others or named})


def _whole(record: Record, at: int | None) -> Record | None:
    """A sequence that has ended or collapsed, up to `at` edits; None: it has not come so far."""
    if at is not None:
        record = _until(record, at)
    why = Schedule(stop_on_collapse=COLLAPSE).collapse(record.history[-1])
    if why is not None:
        return replace(record, failure=f"after edit {record.history[-1]['step']}: {why}")
    return record if record.failure is None else None


def _until(record: Record, at: int) -> Record:
    """As it was after so many edits; one that was scored there has nothing more to do."""
    history = [row for row in record.history if row["step"] <= at]
    return replace(
        record,
        history=history,
        edits_table=record.edits_table[:at],
        evaluations=record.evaluations[: len(history)],
        failure=None if history[-1]["step"] == at else record.failure or f"not scored after {at} edits",
    )


def claims(found: Comparison, out: Path, data: str = "CounterFact") -> dict[str, Verdict]:
    """What of the paper → its verdict; the pictures and tables are written. data: what the edits are of"""
    histories = found.histories()
    whole = [set(histories[label]["step"]) for label in found.results if label not in found.collapsed]
    if not whole:
        raise ConfigError(
            f"{', '.join(found.results)}: all have collapsed, so there are no points to compare; name others"
        )
    counts = sorted(set.intersection(*whole) - {0})
    view = analyze_model(found)
    table = found.table(counts)
    table.insert(0, "data", data)
    number = 2 if data == "zsRE" else 3
    verdicts = {f"Table {number}: methods on {data}": highest_average(table)}
    name = f"table{number}"
    write_table(chosen_columns(table, ("method", "edits")), out / name / f"{name}-table.csv")
    for name, (draw, about) in FIGURES.items():
        place = out / name
        place.mkdir(parents=True, exist_ok=True)
        table, verdicts[about] = draw(found, view, counts, _pictures(place))
        write_table(table, place / f"{name}-table.csv")
    return verdicts


def _pictures(place: Path) -> File:
    return lambda suffix: place / f"{place.name}{suffix}.png"


def markdown(verdicts: dict[str, Verdict]) -> str:
    said = {None: "no judging", True: "**holds**", False: "does not hold"}
    rows = [
        f"| {about} | {one.claim} | {one.criterion} | {one.measured} | {said[one.holds]} |".replace(
            "|w|", "\\|w\\|"
        )
        for about, one in verdicts.items()
    ]
    return "\n".join(["| | the paper | criterion | measured | here |", "|---|---|---|---|---|", *rows, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sequences", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--d4s", default="d4s", help="the sequence that stands for D4S")
    parser.add_argument(
        "--at", type=int, help="edits up to which all are judged; default: as far as each went"
    )
    parser.add_argument("--others", nargs="+", help="the sequences that it is held against")
    parser.add_argument(
        "--data", default="CounterFact", help="what the edits are of; zsRE: Table 2 is judged, not Table 3"
    )
    options = parser.parse_args(arguments)
    found = judged(options.sequences, options.d4s, options.others, options.at)
    text = markdown(claims(found, options.out, options.data))
    write_text(text, options.out / "claims.md")
    print(text)


if __name__ == "__main__":
    main()
