"""The same edits with several methods: one order, one seed, the same weights to begin with, one table."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from d4s.errors import ConfigError, unknown_name
from d4s.figures.tables import aligned
from d4s.files import finite_or_none, write_table, write_text
from d4s.measure.columns import HEADLINES, Column, column
from d4s.measure.differences import differences
from d4s.measure.metrics import Evaluation
from d4s.measure.statistics import over_seeds, student_interval
from d4s.sequence.curves import few_layers, plot_metrics, plot_norms, plot_target_probability
from d4s.sequence.record import Record

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Comparison:
    """What each method did.

    results: label of the method → seed → what was measured; a sequence that broke off has a `failure`. Row 0
        of every history is the unedited model, the same for all
    unfinished: (label, seed) of sequences worth another try, which `save` does not keep
    notes: what has to be said of the figures
    """

    results: dict[str, dict[int, Record]]
    unfinished: frozenset[tuple[str, int]] = frozenset()
    notes: tuple[str, ...] = ()

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(seed for by_seed in self.results.values() for seed in by_seed))

    @property
    def columns(self) -> dict[str, Column]:
        """What the sequences' `measure` has declared of its figures."""
        records = (record for by_seed in self.results.values() for record in by_seed.values())
        return {name: one for record in records for name, one in record.columns.items()}

    @property
    def interval(self) -> str:
        """What the 95 % intervals are taken over, and how."""
        return "; ".join(dict.fromkeys(_interval(len(by_seed)) for by_seed in self.results.values()))

    @property
    def collapsed(self) -> dict[str, str]:
        """Label → where and why it broke off; methods that went through are not in it."""
        several = len(self.seeds) > 1
        found = {}
        for label, by_seed in self.results.items():
            ends = [
                f"seed {seed}, {record.failure}" if several else record.failure
                for seed, record in by_seed.items()
                if record.failure is not None
            ]
            if ends:
                found[label] = "; ".join(ends)
        return found

    def histories(self) -> dict[str, DataFrame]:
        """Label → history as a DataFrame, mean over seeds with intervals <name>.low and <name>.high.

        Up to where all seeds went: a mean over those that are left would rise where another one broke off. The end of
        a later pass, which each seed reaches at a number of edits of its own, stands at their mean.
        """
        import pandas

        frames = {}
        for label, by_seed in self.results.items():
            if points := _points(by_seed.values()):
                rows = [over_seeds(found, self.columns) | {"step": step} for step, found in points.items()]
                frames[label] = pandas.DataFrame(rows)
        return frames

    def table(self, points: Sequence[int] | None = None) -> DataFrame:
        """A row a method (and a point): its figures, each with `.low` and `.high`.

        points: numbers of edits, of those at which was evaluated; None: the last that all seeds reached, the end of a
            later pass at the mean of their numbers
        Columns: method, edits, the figures of the history, l1_growth, seconds_an_edit (evaluation not counted),
        interval (what the bounds are), collapsed (where and why the method broke off; empty: it did not).
        """
        import pandas

        rows, own = [], self.columns
        for label, by_seed in self.results.items():
            reached = _points(by_seed.values())
            for point in points if points is not None else list(reached)[-1:] or (0,):
                found = reached.get(point, [])
                if not found and points is not None and label not in self.collapsed:
                    continue  # of one that broke off the row says so
                cells: dict[str, Any] = {"method": label, "edits": point}
                if found:
                    timed = [
                        row
                        | {"seconds_an_edit": row["edit_seconds"] / row["step"] if row["step"] else math.nan}
                        for row in found
                    ]
                    figures = over_seeds(timed, own)
                    cells |= {n: value for n, value in figures.items() if column(n, own).in_tables}
                cells |= {"interval": _interval(len(by_seed)), "collapsed": self.collapsed.get(label, "")}
                rows.append(cells)
        last = ["interval", "collapsed"]
        table = pandas.DataFrame(rows, columns=None if rows else ["method", "edits", "l1_growth", *last])
        return table[[c for c in table.columns if c not in last] + last]

    def differences(self, against: str | None = None, points: Sequence[int] | None = None) -> DataFrame:
        """Edit by edit, how far each method is from one of them: a row a method (and a point).

        against: label; None: the first
        points: numbers of edits, of those at which both were scored; None: the end of both where they made the same
            edits, else the last point that both reached
        Columns: method, against, edits, and each figure that both have, its mean less that of `against`, with `.low`
        and `.high`: a paired bootstrap over edits (`measure.differences`); over seeds that both have, Student's t of
        the differences.

        Raises ConfigError for a label that is not compared.
        """
        import pandas

        chosen = next(iter(self.results), "") if against is None else against
        if chosen not in self.results and against is not None:
            raise ConfigError(unknown_name("label", against, self.results))
        rows = []
        for label, by_seed in self.results.items():
            if label == chosen:
                continue
            pairs = [(by_seed[seed], one) for seed, one in self.results[chosen].items() if seed in by_seed]
            for point in points if points is not None else (None,):
                if (cells := _apart(pairs, point)) is not None:
                    rows.append({"method": label, "against": chosen} | cells)
        return pandas.DataFrame(rows, columns=None if rows else ["method", "against", "edits"])

    def target_probabilities(self) -> dict[str, DataFrame]:
        """Label → edits_table, mean over seeds edit by edit in the order made, of methods that search a target."""
        import pandas

        tables = {}
        for label, by_seed in self.results.items():
            parts = [pandas.DataFrame(record.edits_table) for record in by_seed.values()]
            columns = ["first_probability", "last_probability"]
            parts = [part[columns] for part in parts if set(columns) <= set(part.columns)]
            if parts and not (mean := sum(parts) / len(parts)).isna().all(axis=None):
                tables[label] = mean
        return tables

    def summary(self, points: Sequence[int] | None = None) -> str:
        """The table as text: growth and what is known to be a share in percent, other figures as they are; intervals
        in brackets."""
        table, own = self.table(points), self.columns
        measured = {n for r in self.results.values() for one in r.values() for n in one.measured}
        names = [n for n in HEADLINES if n in table]
        for name in table.columns:
            one = column(name, own)
            if name not in names and not one.bound and (one.shown == "summary" or name in measured):
                names.append(name)
        shown = [_spelled(table, column(name, own)) for name in names]
        columns = [("method", list(table["method"])), ("edits", [str(n) for n in table["edits"]])]
        columns += list(zip([column(n, own).title for n in names], shown, strict=True))
        if "l1_growth" in table:
            columns.append(("mean |w|", [f"{100 * g:+.2f} %" if g == g else "" for g in table["l1_growth"]]))
            columns.append(("s/edit", [f"{s:.3f}" if s == s else "" for s in table["seconds_an_edit"]]))
        lines = aligned(columns)
        others = [one.title for one in (column(n, own) for n in names) if not one.is_share]
        plain = f" ({', '.join(others)}: as measured)" if others else ""
        lines.append(
            f"Shares in percent{plain}, [95 % interval {self.interval}]; mean |w|: growth over the edited layers."
        )
        lines += self._apart_lines(points)
        lines += [f"{label} broke off: {why}" for label, why in self.collapsed.items()]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _apart_lines(self, points: Sequence[int] | None) -> list[str]:
        """`differences` as text; nothing where there is one method alone."""
        apart = self.differences(points=points)
        if not len(apart):
            return []
        columns = [("method", list(apart["method"])), ("edits", [str(n) for n in apart["edits"]])]
        columns += [
            (column(name).title, _spelled(apart, column(name), signed=True))
            for name in apart.columns
            if not column(name).bound and column(name).shown in ("headline", "summary")
        ]
        return [
            "",
            f"Difference from {apart['against'].iloc[0]}, edit by edit, in points (+: the row has more); an interval "
            "without 0 tells the two apart:",
            *aligned(columns),
            "",
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON values of the table; figures that are not finite are None."""
        return {
            "format": "d4s-comparison-1",
            "interval": self.interval,
            "seeds": list(self.seeds),
            "collapsed": self.collapsed,
            "notes": list(self.notes),
            "rows": finite_or_none(self.table().to_dict("records")),
            "differences": finite_or_none(self.differences().to_dict("records")),
        }

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Each sequence as results/<label>-<seed>.json, and of all that are there, these and those of earlier calls,
        table.csv, table.json, differences.csv, history.csv and the figures.

        Raises DataError for a result there that cannot be read; these are kept by then.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for label, by_seed in self.results.items():
            for seed, record in by_seed.items():
                if (label, seed) not in self.unfinished:
                    record.save(record_place(folder, label, seed))
        replace(self, results=self.results | _stored_beside(self.results, folder))._write_tables(folder)

    def _write_tables(self, folder: Path) -> None:
        import pandas

        write_table(self.table(), folder / "table.csv")
        told = self.to_dict()
        write_text(json.dumps(told, indent=1), folder / "table.json")
        if told["differences"]:
            write_table(pandas.DataFrame(told["differences"]), folder / "differences.csv")
        frames = []
        for label, by_seed in self.results.items():
            for seed, record in by_seed.items():
                frame = record.to_frame()
                frame.insert(0, "seed", seed)
                frame.insert(0, "method", label)
                frames.append(frame)
        write_table(pandas.concat(frames, ignore_index=True), folder / "history.csv")
        histories = self.histories()
        plot_metrics(histories, folder / "metrics.png")
        plot_norms(few_layers(histories), folder / "norms.png")
        if probabilities := self.target_probabilities():
            plot_target_probability(probabilities, folder / "target_probability.png")


def _apart(pairs: Sequence[tuple[Record, Record]], point: int | None) -> dict[str, Any] | None:
    """edits, and what `differences` finds over pairs of records, one a seed; None where they share no point."""
    found, steps = [], []
    for one, other in pairs:
        if (same := _same_edits(one, other, point)) is None:
            return None
        steps.append(same[0])
        found.append(differences(*same[1:]))
    if not found or not all(found):
        return None
    cells: dict[str, Any] = {"edits": round(sum(steps) / len(steps))}
    for name in found[0]:
        if not all(name in one for one in found):
            continue
        metrics = [one[name] for one in found]
        low, high = (
            student_interval([metric.mean for metric in metrics])
            if len(metrics) > 1
            else (metrics[0].low, metrics[0].high)
        )
        mean = sum(metric.mean for metric in metrics) / len(metrics)
        cells |= {name: mean, f"{name}.low": low, f"{name}.high": high}
    return cells


def _same_edits(one: Record, other: Record, point: int | None) -> tuple[int, Evaluation, Evaluation] | None:
    """(edits made by the first, both evaluations) at the point; None: at the last at which both made the same edits."""
    mine, theirs = (
        {
            row["step"]: found
            for row, found in zip(record.history, record.evaluations, strict=False)
            if row["step"]
        }
        for record in (one, other)
    )
    if point is None and mine and theirs:
        ends = mine[max(mine)], theirs[max(theirs)]
        if {row["id"] for row in ends[0].rows} == {row["id"] for row in ends[1].rows}:
            return max(mine), *ends
    shared = mine.keys() & theirs.keys()
    if point is not None:
        shared &= {point}
    return None if not shared else (max(shared), mine[max(shared)], theirs[max(shared)])


def _stored_beside(results: Mapping[str, Mapping[int, Record]], folder: Path) -> dict[str, dict[int, Record]]:
    """Label → seed → record, of all labels of which the folder holds others than these."""
    found: dict[str, dict[int, Record]] = {}
    for path in sorted((folder / "results").glob("*.json")):
        name, _, seed = path.stem.rpartition("-")
        label = unquote(name)
        if seed.isdecimal() and int(seed) not in results.get(label, {}):
            found.setdefault(label, dict(results.get(label, {})))[int(seed)] = Record.load(path)
    return found


def record_place(folder: Path, label: str, seed: int) -> Path:
    return folder / "results" / f"{file_name(label)}-{seed}.json"


def file_name(label: str) -> str:
    """Quoted, so that no two labels share a file: a/b is a%2Fb, and a-b stays as it is."""
    return quote(label, safe=" +,=()[]")


def _interval(seeds: int) -> str:
    return f"over {seeds} seeds, Student's t" if seeds > 1 else "over edits, bootstrap"


def _points(records: Iterable[Record]) -> dict[int, list[dict[str, Any]]]:
    """Number of edits → the row of every sequence that began, of points that all of them reached, ascending.

    Within the first pass, and wherever they made the same number, rows of one number belong together; of later
    passes, in which each makes again what it had lost, those at the end of one pass, at the mean of their numbers. A
    sequence that had lost nothing is at its end there.
    """
    begun = [record for record in records if record.history]
    if not begun:
        return {}
    rows = [{row["step"]: row for row in record.history} for record in begun]
    found = {step: [one[step] for one in rows] for step in set.intersection(*map(set, rows))}
    ends = [record.pass_ends() for record in begun]
    for number in range(1, max(map(len, ends))):
        if any(len(one) <= number and record.failure for one, record in zip(ends, begun, strict=True)):
            break
        steps = [one[min(number, len(one) - 1)] for one in ends if one]
        if len(steps) == len(rows) and all(step in row for step, row in zip(steps, rows, strict=True)):
            found[round(sum(steps) / len(steps))] = [row[s] for s, row in zip(steps, rows, strict=True)]
    return dict(sorted(found.items()))


def _spelled(table: DataFrame, about: Column, *, signed: bool = False) -> list[str]:
    def number(value: float) -> str:
        text = about.spelled(value).removesuffix(" %")  # said once, below the table
        return f"+{text}" if signed and value > 0 else text

    cells, name = [], about.name
    for _, row in table.iterrows():
        value, low, high = (row.get(n, math.nan) for n in (name, f"{name}.low", f"{name}.high"))
        text = "" if value != value else number(value)
        cells.append(text if low != low or not text else f"{text} [{number(low)}, {number(high)}]")
    return cells
