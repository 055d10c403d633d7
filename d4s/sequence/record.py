"""What was measured in a sequence, and what of it is kept in a file."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from d4s import files
from d4s.edits.edit import AGAIN, pass_told
from d4s.errors import shown
from d4s.files import finite_or_none, write_json
from d4s.measure.columns import HEADLINES, Column, column
from d4s.measure.metrics import Evaluation, Metric

if TYPE_CHECKING:
    from pandas import DataFrame

FORMAT = "d4s-result-1"
NAMED = 10  # edits that a summary names at most


@dataclass
class Record:
    """What was measured in a sequence: all of it but the model.

    method, config: its name and configuration
    history: one row an evaluation point; row 0 is the unedited model. `measure.columns` says of each column what it
        is
        step: edits made so far
        efficacy, paraphrase, specificity, average, harmonic (and the _argmax, _exact, _generated figures): of ALL edits
            made so far ("current" evaluation)
        efficacy.unedited, …: the unedited model's, of the same edits and prompts
        original_efficacy, original_paraphrase: of the same edits, each tested right after its own step
        l1_norm.<layer>: mean |w| of an edited layer; l1_growth: its mean relative growth over the layers
        delta_norm.<layer>: ‖W − W0‖_F
        seconds: wall-clock time since the start, evaluation included; edit_seconds: without it
        and what `measure` gave
    edits_table: one row an edit made: id, step, first_probability and last_probability of its target's optimisation,
        and written_probability: p(target) on the edit prompt right after the step; of one that a later pass has made
        again as "<id>~2", also the first's id: again
    evaluations: the full evaluation behind each history row
    chosen: fields of the configuration that were left open (None), as they were decided by the edits
    failure: why the sequence ended before its last edit; None: it did not
    columns: of what `measure` gave, by name, those that it declared
    notes: what has to be said of the figures
    """

    method: str
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    edits_table: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    failure: str | None = None
    chosen: dict[str, float] = field(default_factory=dict)
    columns: dict[str, Column] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def measured(self) -> list[str]:
        """Names of what `measure` gave."""
        names = self.history[0] if self.history else {}
        return [name for name in names if column(name, self.columns).origin == "measure"]

    def to_frame(self) -> DataFrame:
        """The history as a DataFrame."""
        import pandas

        return pandas.DataFrame(self.history)

    def summary(self) -> str:
        """The history as a short text table; mean |w| growth in percent."""
        names = [n for n in HEADLINES if any(n in row for row in self.history)] + self.measured
        widths = {n: max(11, len(n)) for n in names}
        lines = [f"{'edits':>6}  " + "  ".join(f"{n:>{widths[n]}}" for n in names) + "  mean |w|    s/edit"]
        for row in self.history:
            cells = "  ".join(
                f"{row[n]:{widths[n]}.3f}" if row.get(n) is not None else " " * widths[n] for n in names
            )
            pace = row["edit_seconds"] / row["step"] if row["step"] else 0.0
            lines.append(f"{row['step']:6d}  {cells}  {100 * row['l1_growth']:+7.2f} %  {pace:8.3f}")
        lines += told_chosen(self.chosen)
        lines += self.missing()
        lines += [f"note: {note}" for note in self.notes]
        if self.failure:
            lines.append(f"broke off: {self.failure}")
        return "\n".join(lines)

    def missing(self) -> list[str]:
        """A line for the edits whose target was not found, and one for those whose target did not arrive, with ids."""
        made, lines = len(self.last_rows()), []
        if lost := self.not_found():
            target = self.config.get("target")
            looks = target.get("steps") if isinstance(target, Mapping) else None
            within = ""
            rows = self.last_rows()
            if isinstance(looks, int) and not any(AGAIN in rows[edit_id] for edit_id in lost):
                within = f" within {looks} looks; a longer search, as steps={2 * looks}, may"
            lines.append(
                f"{len(lost)} of {made} edits: no target that makes the answer likelier than ½ was found{within}: "
                f"{_named(lost)}"
            )
        if lost := self.not_arrived():
            lines.append(
                f"{len(lost)} of {made} edits: the target was found, but half of its probability or more was lost on "
                f"the way into the weights: {_named(lost)}"
            )
        return lines

    def last_rows(self) -> dict[str, dict[str, Any]]:
        """Id → the row of its edit; of one that was made again, by its first id, that of the last time."""
        return {first_id(row): row for row in self.edits_table}

    def not_found(self) -> list[str]:
        """Ids of edits whose target was less likely than ½ as its search ended. Of an edit that was made again the last
        time counts."""
        return [
            edit_id
            for edit_id, row in self.last_rows().items()
            if row.get("last_probability") is not None and row["last_probability"] < 0.5
        ]

    def not_arrived(self) -> list[str]:
        """Ids of edits whose optimised target did not arrive: p(target) was ½ or more at the end of its optimisation,
        and right after the step, on the edit prompt, less than half of that. Of an edit that was made again the last
        time counts."""
        return [
            edit_id
            for edit_id, row in self.last_rows().items()
            if row.get("written_probability") is not None
            and row.get("last_probability") is not None
            and row["last_probability"] >= 0.5
            and row["written_probability"] < 0.5 * row["last_probability"]
        ]

    def pass_ends(self) -> list[int]:
        """Edits made at the end of each pass; one under way ends where it has come to. [] before the first edit"""
        passes = [pass_told(str(row["id"]), row.get(AGAIN)) for row in self.edits_table]
        return [i + 1 for i in range(len(passes)) if passes[i + 1 : i + 2] != [passes[i]]]

    def forgetting(self, metric: str = "efficacy") -> DataFrame:
        """How edits made in one stretch fare later: rows: made up to step i, columns: tested at step t.

        Each cell is the mean of `metric` over the edits made between the evaluation point before i and i.
        """
        import pandas

        points = [row["step"] for row in self.history if row["step"]]
        matrix = pandas.DataFrame(index=points, columns=points, dtype=float)
        matrix.index.name, matrix.columns.name = "made up to", "tested at"
        done = [e for e, row in zip(self.evaluations, self.history, strict=True) if row["step"]]
        begin = 0
        for made in points:
            ids = {first_id(row) for row in self.edits_table[begin:made]}
            for tested, evaluation in zip(points, done, strict=True):
                if tested >= made:
                    values = [
                        r[metric] for r in evaluation.rows if r["id"] in ids and r.get(metric) is not None
                    ]
                    matrix.loc[made, tested] = sum(values) / len(values) if values else math.nan
            begin = made
        return matrix

    def to_dict(self) -> dict[str, Any]:
        """JSON values; figures that are not finite are None."""
        return {
            "format": FORMAT,
            "method": self.method,
            "config": self.config,
            "edits": len(self.edits_table),
            "failure": self.failure,
            "chosen": self.chosen,
            "columns": {name: one.to_dict() for name, one in self.columns.items()},
            "notes": list(self.notes),
            "history": finite_or_none(self.history),
            "edits_table": finite_or_none(self.edits_table),
            "evaluations": [e.to_dict() for e in self.evaluations],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """JSON of all but the model, with a digest of its content; written beside its place, then renamed."""
        write_json(self.to_dict(), path, indent=1)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Record:
        """What `save` wrote. Raises DataError for a file of another format, and one that has changed since."""
        names = ("method", "config", "edits", "failure", "history", "edits_table", "evaluations")
        stored = files.read_json(
            path, writer="Result.save", format=FORMAT, fields=names, later=("chosen", "columns", "notes")
        )
        with files.checking(path, "Result.save"):
            record = Record(
                files.as_text(stored["method"], "method"),
                files.as_json(files.as_object(stored["config"], "config"), "config"),
                _rows(stored["history"], "history", needed=("step", "l1_growth", "edit_seconds")),
                _rows(stored["edits_table"], "edits_table", needed=("id", "step")),
                [
                    read_evaluation(one, f"evaluations[{i}]")
                    for i, one in enumerate(files.as_list(stored["evaluations"], "evaluations"))
                ],
                None if stored["failure"] is None else files.as_text(stored["failure"], "failure"),
                {
                    name: math.nan
                    if (found := files.as_number(value, f"chosen, {shown(name)}")) is None
                    else found
                    for name, value in files.as_object(stored.get("chosen", {}), "chosen").items()
                },
                {
                    name: Column.from_dict(name, value, f"columns, {shown(name)}")
                    for name, value in files.as_object(stored.get("columns", {}), "columns").items()
                },
                tuple(
                    files.as_text(note, f"notes[{i}]")
                    for i, note in enumerate(files.as_list(stored.get("notes", []), "notes"))
                ),
            )
            if len(record.evaluations) != len(record.history):
                raise files.WrongType("history and evaluations are not equally long")
            return record


def told_chosen(chosen: Mapping[str, Any]) -> list[str]:
    """A line for each field that was left open."""
    return [f"{name}={value:g}, chosen by the edits" for name, value in chosen.items()]


def _named(ids: Sequence[str]) -> str:
    return ", ".join(ids[:NAMED]) + (" …" if len(ids) > NAMED else "")


def first_id(row: Mapping[str, Any]) -> str:
    """Of a row of `edits_table` the id under which an evaluation has its fact."""
    return str(row.get(AGAIN, row["id"]))


def read_history_row(value: Any, place: str) -> dict[str, Any]:
    """A history row from its JSON values. Raises files.WrongType for others."""
    (row,) = _rows([value], place, needed=("step", "l1_growth", "edit_seconds"))
    return row


def _rows(
    value: Any,
    place: str,
    *,
    needed: Collection[str],
    evaluated: bool = False,
) -> list[dict[str, Any]]:
    """Stored rows of figures. Null is a figure that was not finite: NaN in a history, and left null in an evaluation.

    needed: columns that every row must have; of these id is a text, step and count are whole numbers
    evaluated: rows of an evaluation, where a cell may be a list of figures
    """
    rows = []
    for i, row in enumerate(files.as_list(value, place)):
        cells: dict[str, Any] = {}
        for name in needed:
            if name not in files.as_object(row, f"{place}[{i}]"):
                raise files.WrongType(f"{place}[{i}] has no {name!r}")
        for name, cell in files.as_object(row, f"{place}[{i}]").items():
            at = f"{place}[{i}], {shown(name)}"
            if (name in ("id", AGAIN) and "id" in needed) or (
                name in ("kind", "same_as", "misspelt_as") and evaluated
            ):
                cells[name] = files.as_text(cell, at)
            elif name in ("step", "count") and name in needed:
                cells[name] = files.as_count(cell, at)
            elif evaluated and isinstance(cell, list):
                cells[name] = [files.as_number(one, at) for one in cell]
            else:
                cells[name] = math.nan if cell is None and not evaluated else files.as_number(cell, at)
        rows.append(cells)
    return rows


def read_evaluation(value: Any, place: str) -> Evaluation:
    """An evaluation from its JSON values. Raises files.WrongType for others."""
    stored = files.as_object(value, place)
    metrics = {}
    for name, metric in files.as_object(stored.get("metrics"), f"{place}.metrics").items():
        at = f"{place}.metrics, {shown(name)}"
        (figures,) = _rows([metric], at, needed=("mean", "low", "high", "count"))
        if len(figures) > 4:
            raise files.WrongType(f"{at} has more than mean, low, high and count")
        metrics[name] = Metric(**figures)
    notes = files.as_list(stored.get("notes"), f"{place}.notes")
    return Evaluation(
        _rows(stored.get("rows"), f"{place}.rows", needed=("id",), evaluated=True),
        metrics,
        tuple(files.as_text(note, f"{place}.notes") for note in notes),
    )
