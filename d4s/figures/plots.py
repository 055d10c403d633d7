"""Figures of edit sequences. Each is written with its data beside it: figure.png and figure.csv.

One style: the colours of Okabe and Ito (2008), which the colour-blind and black-and-white print tell apart
with the markers and line styles that go with them; legends stand outside the axes. No display is needed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d4s.errors import ConfigError
from d4s.files import whole
from d4s.measure.metrics import is_share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", (0, (5, 1)), (0, (3, 1, 1, 1)))  # dotted is the unedited model's
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.handlelength": 3.0,
    "pdf.fonttype": 42,  # text in PDFs stays text
    "svg.fonttype": "none",
}
_PANEL = (3.1, 2.5)  # inches
_MOST_MARKERS = 12
_MOST_TICKS = 12
_DECADES = 1.5  # of values apart before an axis turns logarithmic


def plot_metrics(histories: Mapping[str, DataFrame], path: str | os.PathLike[str]) -> None:
    """Efficacy, paraphrase, specificity and their average against edits made: a panel each, a line a method.

    histories: method → `Result.to_frame()`; shares from 0 to 1, drawn in percent with their 95 % interval.
    The unedited model's level on the same edits (`<name>.unedited`; without it, the row of step 0) is a dotted
    line.
    """
    names = ("efficacy", "paraphrase", "specificity", "average")
    parts: list[dict[str, Any]] = []
    levels: dict[str, float | tuple[Any, Any]] = {}
    for method, history in histories.items():
        for name in (n for n in names if n in history):
            rows = history[["step", name]].dropna()
            edited = rows[rows["step"] > 0]
            part = {"panel": name, "line": method, "x": edited["step"], "y": 100 * edited[name]}
            for bound in ("low", "high"):
                if f"{name}.{bound}" in history:
                    part[bound] = 100 * history.loc[edited.index, f"{name}.{bound}"]
            parts.append(part)
            unedited = rows[rows["step"] == 0]
            same = history.loc[edited.index].get(f"{name}.unedited")
            if same is not None and not same.isna().any():
                longest = levels.get(name)
                if not isinstance(longest, tuple) or len(longest[0]) < len(edited):
                    levels[name] = (edited["step"], 100 * same)
            elif len(unedited):
                levels.setdefault(name, 100 * float(unedited[name].iloc[0]))
    data = _table(parts, "plot_metrics needs columns 'step' and one of " + ", ".join(names))
    plot_lines(data, path, x_label="edits made", y_label="share (%)", levels=levels, y_range=(0, 100))


def plot_norms(histories: Mapping[str, DataFrame], path: str | os.PathLike[str]) -> None:
    """Growth of mean |w| of each edited layer, in percent of the unedited layer: a panel a layer.

    histories: method → `Result.to_frame()` with columns `l1_norm.<layer>`, the unedited first
    Where growths are decades apart the axis is logarithmic (linear next to 0).
    """
    prefix = "l1_norm."
    parts: list[dict[str, Any]] = []
    layers = {c for h in histories.values() for c in h.columns if str(c).startswith(prefix)}
    for column in sorted(layers, key=lambda c: int(c.removeprefix(prefix))):
        for method, history in histories.items():
            if column in history:
                norms = history[column]
                part = {"panel": f"layer {column.removeprefix(prefix)}", "line": method, "x": history["step"]}
                parts.append(part | {"y": 100 * (norms / norms.iloc[0] - 1)})
    data = _table(parts, "plot_norms needs columns 'step' and 'l1_norm.<layer>'")
    plot_lines(data, path, x_label="edits made", y_label="growth of mean |w| (%)")


def plot_target_probability(tables: Mapping[str, DataFrame], path: str | os.PathLike[str]) -> None:
    """p(target) at the first and last step of each target's optimisation: the "bottleneck" curve.

    tables: method → DataFrame of `Result.edits_table` (`first_probability`, `last_probability`). Points are
    means over a fiftieth of the sequence each, drawn at its last edit.
    """
    parts: list[dict[str, Any]] = []
    for method, table in tables.items():
        for panel, column in (("first step", "first_probability"), ("last step", "last_probability")):
            if column in table and len(table):
                stretch = -(-len(table) // 50)
                values = table[column].reset_index(drop=True)
                means = values.groupby(values.index // stretch).mean()
                ends = [min(len(table), (i + 1) * stretch) for i in means.index]
                parts.append({"panel": panel, "line": method, "x": ends, "y": means.to_numpy()})
    data = _table(parts, "plot_target_probability needs 'first_probability' or 'last_probability'")
    plot_lines(data, path, x_label="edit", y_label="p(target)", y_range=(0, 1))


def plot_forgetting(matrix: DataFrame, path: str | os.PathLike[str], *, metric: str = "efficacy") -> None:
    """Heat map of `Result.forgetting()`: a row for when edits were made, a column for when they were tested.

    metric: what the matrix holds; shares are drawn in percent, on a scale from 0 to 100
    """
    if not len(matrix):
        raise ConfigError("plot_forgetting needs a matrix with a row for each evaluation point")
    share = is_share(metric)
    values = (100 if share else 1) * matrix.to_numpy(dtype=float)
    rows, columns = values.shape

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        image = axes.imshow(
            values, cmap="cividis", vmin=0 if share else None, vmax=100 if share else None, aspect="auto"
        )
        darkest, lightest = image.get_clim()
        for axis, labels in ((axes.xaxis, matrix.columns), (axes.yaxis, matrix.index)):
            places = range(0, len(labels), -(-len(labels) // _MOST_TICKS))
            axis.set_ticks(list(places), [str(labels[place]) for place in places])
        axes.set(xlabel="tested after (edits)", ylabel="made up to (edits)")
        axes.grid(False)
        if max(rows, columns) <= _MOST_TICKS:
            for r in range(rows):
                for c in range(columns):
                    if not math.isnan(values[r, c]):
                        # Cividis is dark below the middle of its range.
                        middle = darkest + 0.55 * (lightest - darkest)
                        colour = "white" if values[r, c] < middle else "black"
                        shown = f"{values[r, c]:.0f}" if share else f"{values[r, c]:.3g}"
                        axes.text(c, r, shown, ha="center", va="center", color=colour, fontsize=8)
        figure.colorbar(image, label=f"{metric} (%)" if share else metric)

    size = (min(7.0, 2.4 + 0.42 * columns), min(6.0, 1.6 + 0.36 * rows))
    _write(draw, size, matrix.to_csv, path)


def plot_lines(
    data: DataFrame,
    path: str | os.PathLike[str],
    *,
    x_label: str,
    y_label: str,
    levels: Mapping[str, float | tuple[Any, Any]] | None = None,
    y_range: tuple[float, float] | None = None,
    x_log: bool = False,
) -> None:
    """Lines in panels, one style for each line's name in all of them.

    data: long form, columns panel, line, x, y and, where there are intervals, low and high; saved as the CSV.
        A column group names what stands at each x
    levels: panel → a dotted line, the unedited model's: one height, or (x, y)
    y_range: None: as the data, logarithmic where they span decades
    """
    for column in ("panel", "line", "x", "y"):
        if column not in data:
            raise ConfigError(
                f"plot_lines: no column {column!r} in the data ({', '.join(map(str, data.columns))})"
            )
    panels, lines = list(dict.fromkeys(data["panel"])), list(dict.fromkeys(data["line"]))
    if not panels:
        raise ConfigError("plot_lines: no data")
    alone = list(data["x"].unique()) if data["x"].nunique() == 1 else []
    across = min(len(panels), 2 if len(panels) == 4 else 3)
    down = -(-len(panels) // across)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
        for axes, panel in zip(grid.flat, panels, strict=False):
            for number, line in enumerate(lines):
                rows = data[(data["panel"] == panel) & (data["line"] == line)]
                _line(axes, rows, number, line, 0.1 * (number - (len(lines) - 1) / 2) if alone else 0.0)
            if alone:
                axes.set_xticks(alone)
                axes.set_xlim(*(alone[0] + side * (0.05 * len(lines) + 0.2) for side in (-1, 1)))
            if levels is not None and panel in levels:
                level = levels[panel]
                style: dict[str, Any] = dict(
                    color="#555555", linestyle=":", linewidth=1.3, marker="", label="unedited"
                )
                if isinstance(level, tuple) and len(level[0]) > 1:
                    axes.plot(*level, **style)
                else:
                    axes.axhline(float(level[1].iloc[0]) if isinstance(level, tuple) else level, **style)
            if "group" in data:
                for (x, group), part in data[data["panel"] == panel].groupby(["x", "group"]):
                    axes.annotate(
                        str(group).replace("_", " "),
                        (x, part["y"].max()),
                        xytext=(0, 6),
                        textcoords="offset points",
                        rotation=90,
                        ha="center",
                        va="bottom",
                        fontsize=7,
                    )
            axes.set_title(panel)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for place, axes in enumerate(grid.flat[: len(panels)]):
            below = place + across >= len(panels)  # no panel below: it carries the label
            axes.tick_params(labelbottom=below)
            axes.set_xlabel(x_label if below else "")
            axes.set_ylabel(y_label if place % across == 0 else "")
        if x_log:
            from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

            grid[0, 0].set_xscale("log")
            for axes in grid.flat:
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
                axes.xaxis.set_minor_formatter(NullFormatter())
        if y_range is not None:
            margin = 0.03 * (y_range[1] - y_range[0])
            grid[0, 0].set_ylim(y_range[0] - margin, y_range[1] + margin)
        else:
            _scale(grid[0, 0], data)
        named: dict[str, Any] = {}
        for axes in grid.flat[: len(panels)]:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                named.setdefault(label, handle)
        shown = [name for name in names if name in named]
        figure.legend([named[n] for n in shown], shown, loc="outside lower center", ncols=columns)

    names = [*map(str, lines), *(["unedited"] if levels else [])]
    width = _PANEL[0] * across + (0.9 if across == 1 else 0.3)
    columns = min(len(names), max(1, int(width * 9 / (6 + max(map(len, names))))))
    below = 0.3 + 0.18 * -(-len(names) // columns)  # inches that the legend needs
    _write(draw, (width, _PANEL[1] * down + below), lambda file: data.to_csv(file, index=False), path)


def _line(axes: Axes, rows: DataFrame, number: int, label: str, shift: float) -> None:
    """shift: to the side, of a line that is one point"""
    if not len(rows):
        return
    colour = COLOURS[number % len(COLOURS)]
    if rows["x"].nunique() == 1:  # a band of no width shows nothing
        _point(axes, rows.iloc[0], number, colour, label, shift)
        return
    # Markers of different lines stand at different places, so that one does not hide the other.
    every = max(1, len(rows) // _MOST_MARKERS)
    axes.plot(
        rows["x"],
        rows["y"],
        label=label,
        color=colour,
        linestyle=DASHES[number % len(DASHES)],
        marker=MARKERS[number % len(MARKERS)],
        markevery=(number % every, every),
    )
    if "low" in rows and "high" in rows:
        axes.fill_between(rows["x"], rows["low"], rows["high"], color=colour, alpha=0.15, linewidth=0)


def _point(axes: Axes, row: Any, number: int, colour: str, label: str, shift: float) -> None:
    """One number of edits: its interval as a bar."""
    bounded = "low" in row and row["low"] == row["low"]
    reach = [[max(0.0, row["y"] - row["low"])], [max(0.0, row["high"] - row["y"])]] if bounded else None
    axes.errorbar(
        [row["x"] + shift],
        [row["y"]],
        yerr=reach,
        label=label,
        color=colour,
        linestyle="",
        marker=MARKERS[number % len(MARKERS)],
        capsize=3,
    )


def _scale(axes: Axes, data: DataFrame) -> None:
    """Logarithmic where the lines' largest values are decades apart; linear next to 0 if some are 0 or below."""
    values = data[data["y"].abs() < math.inf]
    sizes = values["y"].abs().groupby([values["panel"], values["line"]]).max()
    sizes = sizes[sizes > 0]
    if not len(sizes) or math.log10(sizes.max() / sizes.min()) < _DECADES:
        return
    if values["y"].min() > 0:
        axes.set_yscale("log")
    else:
        from matplotlib.ticker import SymmetricalLogLocator

        nearest = 10 ** (math.floor(math.log10(sizes.min())) - 1)
        axes.set_yscale("symlog", linthresh=nearest)
        locator = SymmetricalLogLocator(base=10, linthresh=nearest)
        locator.set_params(numticks=6)
        axes.yaxis.set_major_locator(locator)
        if values["y"].min() >= 0:
            axes.set_ylim(bottom=0)


def _table(parts: list[dict[str, Any]], needs: str) -> DataFrame:
    import pandas

    frames = [pandas.DataFrame({k: list(v) if k in "xylowhigh" else v for k, v in p.items()}) for p in parts]
    frames = [frame for frame in frames if len(frame)]
    if not frames:
        raise ConfigError(f"{needs}; there is nothing to draw")
    return pandas.concat(frames, ignore_index=True)


def _write(
    draw: Callable[[Figure], None],
    size: tuple[float, float],
    save_data: Callable[[Path], Any],
    path: str | os.PathLike[str],
) -> None:
    """Figure and data, each beside its place, then renamed. The figure's format goes by its suffix."""
    # A figure of its own: no window system, no state of pyplot.
    import matplotlib
    from matplotlib.figure import Figure

    path = Path(path)
    known = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix[1:].lower() not in known:
        raise ConfigError(f"{path}: figures are written as {', '.join('.' + k for k in known)}")
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)

        def save_figure(file: Path) -> None:
            figure.savefig(file, format=path.suffix[1:].lower(), dpi=200)

        for place, save in ((path, save_figure), (path.with_suffix(".csv"), save_data)):
            with whole(place) as beside:
                save(beside)
