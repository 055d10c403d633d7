"""What a search of settings has tried: its front, what is chosen of it and by what rule, and the preset file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d4s.figures.plots import plot_points
from d4s.figures.tables import aligned
from d4s.methods import Method, Preset
from d4s.study.front import FIGURES, Outcome, mean_of, non_dominated, plain_percent

if TYPE_CHECKING:
    from pandas import DataFrame

FEWEST = 16  # probes that a setting is chosen by, where the time allows; below it, it is said


@dataclass(frozen=True)
class Trial:
    """A setting: what it is called, its configuration, and what is changed in its method's own."""

    label: str
    line: str  # the field it differs in
    method: Method
    changes: Mapping[str, Any] = field(default_factory=dict)  # the share that arrives among them


@dataclass(frozen=True)
class Scored:
    """A trial on the first `probes` probes."""

    trial: Trial
    probes: int
    found: Outcome


@dataclass(frozen=True)
class Tuning:
    """What was found.

    preset: the chosen setting, with its probes; chosen: its label
    scored: every setting, by the most probes it was given, in the order tried
    unedited: the unedited model's outcome on the probes
    failed: label → why a setting could not be measured; left_out: labels for which no time was left
    seconds, budget: spent, and to be spent at most; costs: seconds a target's search and a probe made and scored took
    """

    preset: Preset
    chosen: str
    scored: tuple[Scored, ...]
    unedited: Outcome
    failed: Mapping[str, str]
    left_out: tuple[str, ...]
    seconds: float
    budget: float
    costs: Mapping[str, float]

    @property
    def most(self) -> int:
        """Probes of the settings that are chosen from."""
        return max(one.probes for one in self.scored)

    def on_front(self) -> set[str]:
        """Labels of the settings, of those with the most probes, that no other one dominates."""
        last = [one for one in self.scored if one.probes == self.most]
        marks = non_dominated([one.found.sums for one in last])
        return {one.trial.label for one, on in zip(last, marks, strict=True) if on}

    def points(self) -> DataFrame:
        """The figure's data: settings with the most probes, a panel of NLLs and one of greedy answers, in percent."""
        import pandas

        front = self.on_front()
        rows = [
            {
                "panel": kind,
                "line": one.trial.line,
                "label": one.trial.label,
                "x": 100 * getattr(one.found, f"kept{end}"),
                "y": 100 * getattr(one.found, f"written{end}"),
                "growth": 100 * one.found.growth,
                "front": one.trial.label in front,
                "chosen": one.trial.label == self.chosen,
            }
            for kind, end in (("NLL", ""), ("greedy", "_greedy"))
            for one in self.scored
            if one.probes == self.most
        ]
        return pandas.DataFrame(rows)

    def summary(self) -> str:
        """A row a setting, those with the most probes and the most written · kept first; and what was chosen, by what
        rule."""
        front = self.on_front()
        rows = sorted(self.scored, key=lambda one: (-one.probes, -one.found.total))
        marks = {self.chosen: "chosen"}
        columns = [
            ("setting", [one.trial.label for one in rows]),
            (
                as_told(rows[0].trial.method.strength),
                [in_short(one.trial.method.value(one.trial.method.strength)) for one in rows],
            ),
            ("probes", [str(one.probes) for one in rows]),
            *(
                (name.replace("_", " "), [plain_percent(getattr(one.found, name)) for one in rows])
                for name in FIGURES[:4]
            ),
            ("mean |w|", [f"{100 * one.found.growth:+.2f} %" for one in rows]),
            (
                "",
                [
                    " ".join(
                        filter(
                            None,
                            (
                                "front" if one.probes == self.most and one.trial.label in front else "",
                                marks.get(one.trial.label, ""),
                            ),
                        )
                    )
                    for one in rows
                ],
            ),
        ]
        lines = aligned(columns)
        lines.append(
            f"unedited: written {plain_percent(self.unedited.written)}, kept {plain_percent(self.unedited.kept)}. "
            "Shares in percent: written is efficacy · paraphrase, kept is specificity; greedy: of whole answers."
        )
        lines.append(f"chosen: {self.chosen}; {self.preset.measured['because']}")
        lines.append(
            f"  {', '.join(f'{name}={in_short(value)}' for name, value in self.preset.fields.items())}"
        )
        if self.most < FEWEST:
            lines.append(
                f"note: {self.most} probes are few: what edits do to each other hardly shows; more --minutes give more"
            )
        lines += [f"{label} failed: {why}" for label, why in self.failed.items()]
        if self.left_out:
            lines.append(f"no time was left for: {', '.join(self.left_out)}")
        spent = ", ".join(f"{seconds:.2f} s {name}" for name, seconds in self.costs.items())
        lines.append(f"{self.seconds:.0f} of {self.budget:.0f} s ({spent}).")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "method": self.preset.method,
            "fields": dict(self.preset.fields),
            "chosen": self.chosen,
            "measured": dict(self.preset.measured),
            "probes": [list(one) for one in self.preset.probes],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """The preset, and beside it the front as a figure of its name (.png) with its data (.csv)."""
        place = Path(path)
        self.preset.save(place)
        plot_points(
            self.points(),
            place.with_suffix(".png"),
            x_label="kept (%)",
            y_label="written (%)",
            joined=False,
            chosen=self.chosen,
        )


def chosen_of(last: Sequence[Scored], own: Scored) -> tuple[Scored, str]:
    """(the setting that is chosen, why): the largest written · kept, or the method's own where it is no worse by more
    than one standard error of the difference over probes."""
    best = max(last, key=lambda one: (one.found.total, -one.found.growth))
    if own not in last:
        return best, f"own did not make {best.probes} probes"
    if best.trial.label == own.trial.label:
        return own, "nothing that was tried is better than the method's own"
    differences = [a - b for a, b in zip(best.found.by_edit, own.found.by_edit, strict=True)]
    gain, error = mean_of(differences), standard_error(differences)
    said = f"{100 * gain:.1f} ± {100 * error:.1f} points better in written · kept"
    if gain <= error:
        return own, f"{best.trial.label} is {said}, which may be chance"
    return best, f"{said} than the method's own"


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; infinite for fewer than two values."""
    if len(values) < 2:
        return math.inf
    middle = sum(values) / len(values)
    return math.sqrt(sum((value - middle) ** 2 for value in values) / (len(values) - 1) / len(values))


def figures_of(found: Outcome) -> dict[str, float]:
    return {name: getattr(found, name) for name in (*FIGURES, "total")}


def as_told(name: str) -> str:
    return "λ" if name == "prior_weight" else name


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def in_short(value: Any) -> str:
    if isinstance(value, tuple | list) and len(value) > 1:
        return f"{value[0]}–{value[-1]}"
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
