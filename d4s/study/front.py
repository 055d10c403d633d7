"""What a method writes against what it disturbs: a curve along its strength, not a point at one λ.

Of an edit i with its prompt, paraphrases and neighbours, each a share from 0 to 1,

    written = mean over edits of efficacy_i · paraphrase_i        kept = mean over edits of specificity_i

and the same of the greedy answers (`…_argmax`). A point is on the front if no other is at least as good in both and
better in one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d4s.edits import Edit
from d4s.errors import ConfigError, unknown_name
from d4s.figures.plots import plot_points
from d4s.figures.tables import aligned
from d4s.files import finite_or_none, write_table, write_text
from d4s.locate.covariance import Covariance
from d4s.methods import Method, Preset, Workbench
from d4s.methods.base import SumsOn
from d4s.methods.preset import without_probes
from d4s.models.architectures import Anatomy, Architecture
from d4s.models.causal_lm import CausalLM
from d4s.sequence.compare import Configs, by_label, compare, configured_methods
from d4s.sequence.comparison import Comparison
from d4s.sequence.record import Record

if TYPE_CHECKING:
    from pandas import DataFrame

FACTORS = (0.1, 1 / 3, 1.0, 3.0, 10.0)  # of a method's own strength, where no grid is given
KINDS = ("NLL", "greedy")
FIGURES = ("written", "kept", "written_greedy", "kept_greedy", "growth")  # of an outcome
_ENDS = {"NLL": "", "greedy": "_argmax"}  # of the names of the figures
Grid = Sequence[float] | Mapping[str, Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a sequence wrote and what it disturbed; a figure that its edits do not have is NaN.

    by_edit: of each edit its own written · kept, each the mean of both kinds; where it has no neighbours, written
    growth: of mean |w| over the edited layers
    """

    written: float
    written_greedy: float
    kept: float
    kept_greedy: float
    growth: float
    by_edit: tuple[float, ...] = ()

    @property
    def sums(self) -> tuple[float, float]:
        """(written, kept), each the mean of both kinds."""
        return mean_of((self.written, self.written_greedy)), mean_of((self.kept, self.kept_greedy))

    @property
    def total(self) -> float:
        return mean_of(self.by_edit)


def outcome(rows: Sequence[Mapping[str, Any]], growth: float) -> Outcome:
    """From an evaluation's rows, one an edit."""
    written = {kind: [_written(row, _ENDS[kind]) for row in rows] for kind in KINDS}
    kept = {kind: [_figure(row, f"specificity{_ENDS[kind]}") for row in rows] for kind in KINDS}
    by_edit = []
    for i in range(len(rows)):
        said, left = (mean_of([kind[i] for kind in one.values()]) for one in (written, kept))
        by_edit.append(said if left != left else said * left)
    return Outcome(
        written=mean_of(written["NLL"]),
        written_greedy=mean_of(written["greedy"]),
        kept=mean_of(kept["NLL"]),
        kept_greedy=mean_of(kept["greedy"]),
        growth=growth,
        by_edit=tuple(by_edit),
    )


def non_dominated(points: Sequence[Sequence[float]]) -> list[bool]:
    """Whether each point, whose every number is the better the larger, is matched by no other that is better in one.

    Equal points are all on the front; one with a NaN never is, and keeps no other from it.
    """
    whole = [not any(value != value for value in point) for point in points]

    def beats(one: Sequence[float], other: Sequence[float]) -> bool:
        pairs = list(zip(one, other, strict=True))
        return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)

    return [
        fine and not any(whole[j] and beats(other, point) for j, other in enumerate(points))
        for fine, point in zip(whole, points, strict=True)
    ]


@dataclass(frozen=True)
class Front:
    """Methods along their strength.

    comparison: the sequences; places: label of a sequence → (label of the method, its field, the value)
    """

    comparison: Comparison
    places: Mapping[str, tuple[str, str, float]]

    def outcomes(self) -> dict[str, Outcome]:
        """Label → mean over seeds, of the sequences that went through."""
        found = {}
        for label, by_seed in self.comparison.results.items():
            ended = [_of_record(record) for record in by_seed.values() if record.failure is None]
            if ended and len(ended) == len(by_seed):
                figures: dict[str, Any] = {
                    name: mean_of([getattr(one, name) for one in ended]) for name in FIGURES
                }
                found[label] = Outcome(**figures)
        return found

    def table(self) -> DataFrame:
        """A row a sequence that went through: method, field, value, the five figures of `Outcome`, and whether it is on
        the front of all methods (`front`, `front_greedy`)."""
        import pandas

        outcomes = self.outcomes()
        rows = []
        for label, one in outcomes.items():
            method, name, value = self.places[label]
            figures = {n: getattr(one, n) for n in FIGURES}
            rows.append({"label": label, "method": method, "field": name, "value": value, **figures})
        for row, plain, greedy in zip(
            rows,
            non_dominated([(one.written, one.kept) for one in outcomes.values()]),
            non_dominated([(one.written_greedy, one.kept_greedy) for one in outcomes.values()]),
            strict=True,
        ):
            row |= {"front": plain, "front_greedy": greedy}
        return pandas.DataFrame(rows)

    def points(self) -> DataFrame:
        """The figure's data, shares in percent: a panel of NLLs and one of greedy answers, a line a method."""
        import pandas

        rows = []
        for kind, end in (("NLL", ""), ("greedy", "_greedy")):
            for _, row in self.table().iterrows():
                point = {"x": 100 * row[f"kept{end}"], "y": 100 * row[f"written{end}"]}
                about = {"panel": kind, "line": row["method"], "label": spelled(row["field"], row["value"])}
                rows.append({**about, **point, "front": row[f"front{end}"]})
        return pandas.DataFrame(rows, columns=["panel", "line", "label", "x", "y", "front"])

    def summary(self) -> str:
        """The points that no other dominates, in either kind; and what broke off."""
        table = self.table()
        lines = []
        if len(table):
            best = table[table["front"] | table["front_greedy"]].sort_values("kept", kind="stable")
            marks = [
                " ".join(kind for kind, on in zip(KINDS, pair, strict=True) if on)
                for pair in zip(best["front"], best["front_greedy"], strict=True)
            ]
            lines += aligned(
                [
                    ("on the front", list(best["label"])),
                    ("of", marks),
                    *(
                        (name.replace("_", " "), [plain_percent(v) for v in best[name]])
                        for name in FIGURES[:4]
                    ),
                    ("mean |w|", [f"{100 * v:+.2f} %" for v in best["growth"]]),
                ]
            )
            lines.append(
                f"Of {len(table)} sequences. Shares in percent: written is efficacy · paraphrase, kept is specificity."
            )
        if len(table) and table["kept"].isna().all():
            lines.append(
                "note: these edits bring nothing that must not change, so there is no front and no figure"
            )
        lines += [f"{label} broke off: {why}" for label, why in self.comparison.collapsed.items()]
        lines += [f"note: {note}" for note in self.comparison.notes]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; figures that are not finite are None."""
        return {
            "format": "d4s-front-1",
            "collapsed": self.comparison.collapsed,
            "notes": list(self.comparison.notes),
            "points": finite_or_none(self.table().to_dict("records")),
        }

    def save(self, folder: str | os.PathLike[str]) -> None:
        """What `Comparison.save` writes, front.json, front-points.csv, and, where it could be scored what is kept,
        front.png with front.csv."""
        folder = Path(folder)
        self.comparison.save(folder)
        write_text(json.dumps(self.to_dict(), indent=1), folder / "front.json")
        if len(table := self.table()):
            write_table(table, folder / "front-points.csv")
            if table["kept"].notna().any():
                plot_points(self.points(), folder / "front.png", x_label="kept (%)", y_label="written (%)")


def front(
    model: CausalLM,
    tokenizer: Any,
    edits: Sequence[Edit],
    methods: Configs = ("d4s", "memit"),
    *,
    grid: Grid | None = None,
    covariance: Covariance | str | os.PathLike[str] | None = None,
    architecture: Architecture | None = None,
    seeds: int | Sequence[int] = (0,),
    sums_on: SumsOn = "auto",
    progress: bool = True,
    **options: Any,
) -> Front:
    """Compares methods along their fronts: each at several values of its strength (`Method.strength`), a sequence each.

    grid: label → values of that method's strength; or values of λ for all methods that have one. Of the others, and
        with None: `FACTORS` times the method's own
    sums_on, options: as of `compare`, `out` among them, in which what has been made is kept; a sequence is labelled
        "d4s λ 300"

    Raises ConfigError for a grid of no method, a value out of range, two values of one label, and a method without a
    strength.
    """
    if isinstance(covariance, (str, os.PathLike)):
        covariance = Covariance.load(covariance)
    named = by_label(methods)
    edits, notes = without_probes(edits, [one for one in named.values() if isinstance(one, Preset)])
    anatomy = Anatomy(model, architecture)
    configured = configured_methods(named, anatomy)
    if isinstance(grid, Mapping):
        for label in grid:
            if label not in configured:
                raise ConfigError(unknown_name("method of a grid", label, configured))
    first = seeds if isinstance(seeds, int) else next(iter(seeds), 0)
    bench = Workbench(
        model,
        tokenizer,
        covariance=covariance,
        architecture=architecture,
        sums_on=sums_on,
        seed=first,
        progress=progress,
    )
    points: dict[str, Method] = {}
    places: dict[str, tuple[str, str, float]] = {}
    for label, method in configured.items():
        for value in strengths(label, method, grid, bench, edits):
            sequence = f"{label} {spelled(method.strength, value)}"
            points[sequence] = method.changed({method.strength: value})
            places[sequence] = (label, method.strength, value)
    found = compare(
        model,
        tokenizer,
        edits,
        points,
        covariance=covariance,
        architecture=architecture,
        seeds=seeds,
        sums_on=sums_on,
        progress=progress,
        **options,
    )
    return Front(Comparison(found.results, found.unfinished, (*notes, *found.notes)), places)


def strengths(
    label: str, method: Method, grid: Grid | None, bench: Workbench, edits: Sequence[Edit]
) -> list[float]:
    """Values of a method's strength, ascending, each once."""
    if not method.strength:
        raise ConfigError(
            f"{label}: {method.name} has no field that it could be compared along; leave it out"
        )
    given: Iterable[float] | None = None
    if isinstance(grid, Mapping):
        given = grid.get(label)
    elif grid is not None and method.strength == "prior_weight":
        given = grid
    if given is None:
        own = method.settled(bench, edits).value(method.strength)
        given = [v for factor in FACTORS if _may_be(method, v := float(f"{factor * own:.2g}"))]
    found = sorted({float(value) for value in given})
    if not found:
        raise ConfigError(f"{label}: its grid is empty; give values of {method.strength}, as 30, 300, 3000")
    for value, following in pairwise(found):
        if spelled(method.strength, value) == spelled(method.strength, following):
            raise ConfigError(
                f"{label}: its grid has {value!r} and {following!r}, which are both {spelled(method.strength, value)} "
                "in the label of a sequence; give values that differ in six digits"
            )
    return found


def _may_be(method: Method, value: float) -> bool:
    """Whether its strength may have this value: of a share nothing above 1."""
    try:
        method.changed({method.strength: value})
    except ConfigError:
        return False
    return True


def spelled(name: str, value: Any) -> str:
    """A field and its value as a label: λ 300"""
    return f"{'λ' if name == 'prior_weight' else name} {value:g}"


def plain_percent(share: float) -> str:
    """Without the sign, for tables; of NaN nothing."""
    return "" if share != share else f"{100 * share:.1f}"


def mean_of(values: Iterable[float]) -> float:
    """Of those that are there; NaN where none is."""
    there = [value for value in values if value == value]
    return sum(there) / len(there) if there else math.nan


def _of_record(record: Record) -> Outcome:
    return outcome(record.evaluations[-1].rows, record.history[-1]["l1_growth"])


def _written(row: Mapping[str, Any], end: str) -> float:
    """efficacy · paraphrase, of an edit without paraphrases efficacy alone."""
    efficacy, paraphrase = (_figure(row, f"{name}{end}") for name in ("efficacy", "paraphrase"))
    return efficacy if paraphrase != paraphrase else efficacy * paraphrase


def _figure(row: Mapping[str, Any], name: str) -> float:
    value = row.get(name)
    return math.nan if value is None else float(value)
