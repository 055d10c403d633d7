"""What a sequence measured, drawn: scores, norms, targets and forgetting, each with its data beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from d4s.errors import ConfigError
from d4s.figures.plots import lines_of, plot_heat_map, plot_lines
from d4s.measure.columns import Column, column, layers

if TYPE_CHECKING:
    from pandas import DataFrame

_DRAWN = ("efficacy", "paraphrase", "specificity", "average")
_MOST_LAYERS = 8  # of a method whose norms are drawn layer by layer


def plot_metrics(histories: Mapping[str, DataFrame], path: str | os.PathLike[str]) -> None:
    """Efficacy, paraphrase, specificity and their average against edits made: a panel each, a line a method.

    histories: method → `Result.to_frame()`; shares from 0 to 1, drawn in percent with their 95 % interval.
    The unedited model's level on the same edits (`<name>.unedited`; without it, the row of step 0) is a dotted
    line.
    """
    parts: list[dict[str, Any]] = []
    levels: dict[str, float | tuple[Any, Any]] = {}
    for method, history in histories.items():
        for name in (n for n in _DRAWN if n in history):
            factor = column(name).factor
            rows = history[["step", name]].dropna()
            edited = rows[rows["step"] > 0]
            part = {"panel": name, "line": method, "x": edited["step"], "y": factor * edited[name]}
            for bound in ("low", "high"):
                if f"{name}.{bound}" in history:
                    part[bound] = factor * history.loc[edited.index, f"{name}.{bound}"]
            parts.append(part)
            unedited = rows[rows["step"] == 0]
            same = history.loc[edited.index].get(f"{name}.unedited")
            if same is not None and not same.isna().any():
                longest = levels.get(name)
                if not isinstance(longest, tuple) or len(longest[0]) < len(edited):
                    levels[name] = (edited["step"], factor * same)
            elif len(unedited):
                levels.setdefault(name, factor * float(unedited[name].iloc[0]))
    data = lines_of(parts, "plot_metrics needs columns 'step' and one of " + ", ".join(_DRAWN))
    plot_lines(
        data,
        path,
        x_label="edits made",
        y_label="share (%)",
        levels=levels,
        level_name="unedited",
        y_range=(0, 100),
    )


def plot_norms(histories: Mapping[str, DataFrame], path: str | os.PathLike[str]) -> None:
    """Growth of mean |w| of each edited layer, in percent of the unedited layer: a panel a layer.

    histories: method → `Result.to_frame()` with columns `l1_norm.<layer>`, the unedited first
    Where growths are decades apart the axis is logarithmic (linear next to 0).
    """
    parts: list[dict[str, Any]] = []
    found = layers(name for history in histories.values() for name in history.columns)
    for layer, name in found.items():
        for method, history in histories.items():
            if name in history:
                norms = history[name]
                part = {"panel": f"layer {layer}", "line": method, "x": history["step"]}
                parts.append(part | {"y": 100 * (norms / norms.iloc[0] - 1)})
    data = lines_of(parts, "plot_norms needs columns 'step' and 'l1_norm.<layer>'")
    plot_lines(data, path, x_label="edits made", y_label="growth of mean |w| (%)")


def few_layers(histories: Mapping[str, DataFrame]) -> dict[str, DataFrame]:
    """Without methods that edit too many layers to be drawn a panel each, if others remain."""
    few = {label: frame for label, frame in histories.items() if len(layers(frame.columns)) <= _MOST_LAYERS}
    return dict(few or histories)


def plot_target_probability(tables: Mapping[str, DataFrame], path: str | os.PathLike[str]) -> None:
    """p(target) at the first and last step of each target's optimisation: the "bottleneck" curve.

    tables: method → DataFrame of `Result.edits_table` (`first_probability`, `last_probability`). Points are
    means over a fiftieth of the sequence each, drawn at its last edit.
    """
    parts: list[dict[str, Any]] = []
    for method, table in tables.items():
        for panel, name in (("first step", "first_probability"), ("last step", "last_probability")):
            if name in table and len(table):
                stretch = -(-len(table) // 50)
                values = table[name].reset_index(drop=True)
                means = values.groupby(values.index // stretch).mean()
                ends = [min(len(table), (i + 1) * stretch) for i in means.index]
                parts.append({"panel": panel, "line": method, "x": ends, "y": means.to_numpy()})
    data = lines_of(parts, "plot_target_probability needs 'first_probability' or 'last_probability'")
    plot_lines(data, path, x_label="edit", y_label="p(target)", y_range=(0, 1))


def plot_forgetting(
    matrix: DataFrame,
    path: str | os.PathLike[str],
    *,
    metric: str = "efficacy",
    own: Mapping[str, Column] | None = None,
) -> None:
    """Heat map of `Result.forgetting()`: a row for when edits were made, a column for when they were tested.

    metric: what the matrix holds; shares are drawn in percent, on a scale from 0 to 100
    own: columns that a `measure` has declared
    """
    if not len(matrix):
        raise ConfigError("plot_forgetting needs a matrix with a row for each evaluation point")
    about = column(metric, own or {})
    plot_heat_map(
        matrix,
        path,
        x_label="tested after (edits)",
        y_label="made up to (edits)",
        label=about.axis,
        value_range=(0, 100) if about.is_share else None,
        scale=about.factor,
    )
