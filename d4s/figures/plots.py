"""Lines and points in panels, and heat maps. Each figure is written with its data beside it: figure.png and figure.csv.

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

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", (0, (5, 1)), (0, (3, 1, 1, 1)))  # dotted is the level to compare with
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


def plot_heat_map(
    matrix: DataFrame,
    path: str | os.PathLike[str],
    *,
    x_label: str,
    y_label: str,
    label: str,
    value_range: tuple[float, float] | None = None,
    scale: float = 1.0,
) -> None:
    """A cell a figure, with its value where there is room; the matrix itself is saved as the CSV.

    label: beside the colour bar
    value_range: of the colours, in units of what is drawn; None: as the figures
    scale: what is drawn of a figure is this many times it, as 100 of a share
    """
    if not len(matrix):
        raise ConfigError("plot_heat_map needs a matrix of one row or more; there is nothing to draw")
    values = scale * matrix.to_numpy(dtype=float)
    rows, columns = values.shape
    lowest, highest = value_range if value_range is not None else (None, None)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        image = axes.imshow(values, cmap="cividis", vmin=lowest, vmax=highest, aspect="auto")
        darkest, lightest = image.get_clim()
        for axis, labels in ((axes.xaxis, matrix.columns), (axes.yaxis, matrix.index)):
            places = range(0, len(labels), -(-len(labels) // _MOST_TICKS))
            axis.set_ticks(list(places), [str(labels[place]) for place in places])
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.grid(False)
        if max(rows, columns) <= _MOST_TICKS:
            for r in range(rows):
                for c in range(columns):
                    if not math.isnan(values[r, c]):
                        # Cividis is dark below the middle of its range.
                        middle = darkest + 0.55 * (lightest - darkest)
                        colour = "white" if values[r, c] < middle else "black"
                        shown = f"{values[r, c]:.3g}" if value_range is None else f"{values[r, c]:.0f}"
                        axes.text(c, r, shown, ha="center", va="center", color=colour, fontsize=8)
        figure.colorbar(image, label=label)

    size = (min(7.0, 2.4 + 0.42 * columns), min(6.0, 1.6 + 0.36 * rows))
    _write(draw, size, matrix.to_csv, path)


def plot_lines(
    data: DataFrame,
    path: str | os.PathLike[str],
    *,
    x_label: str,
    y_label: str,
    levels: Mapping[str, float | tuple[Any, Any]] | None = None,
    level_name: str = "level",
    y_range: tuple[float, float] | None = None,
    x_log: bool = False,
) -> None:
    """Lines in panels, one style for each line's name in all of them.

    data: long form, columns panel, line, x, y and, where there are intervals, low and high; saved as the CSV.
        A column group names what stands at each x
    x_label: empty: where all lines are one point at one place, the place is not told
    levels: panel → a dotted line, to compare with: one height, or (x, y); level_name: its name in the legend
    y_range: None: as the data, logarithmic where they span decades
    """
    for column in ("panel", "line", "x", "y"):
        if column not in data:
            raise ConfigError(
                f"plot_lines: no column {column!r} in the data; it has {', '.join(map(str, data.columns))}"
            )
    panels, lines = list(dict.fromkeys(data["panel"])), list(dict.fromkeys(data["line"]))
    if not panels:
        raise ConfigError("plot_lines: no data; give a frame with rows")
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
                axes.set_xticks(alone if x_label else [])
                axes.set_xlim(*(alone[0] + side * (0.05 * len(lines) + 0.2) for side in (-1, 1)))
            if levels is not None and panel in levels:
                level = levels[panel]
                style: dict[str, Any] = dict(
                    color="#555555", linestyle=":", linewidth=1.3, marker="", label=level_name
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

    names = [*map(str, lines), *([level_name] if levels else [])]
    width = _PANEL[0] * across + (0.9 if across == 1 else 0.3)
    columns = min(len(names), max(1, int(width * 9 / (6 + max(map(len, names))))))
    below = 0.3 + 0.18 * -(-len(names) // columns)  # inches that the legend needs
    _write(draw, (width, _PANEL[1] * down + below), lambda file: data.to_csv(file, index=False), path)


def plot_points(
    data: DataFrame,
    path: str | os.PathLike[str],
    *,
    x_label: str,
    y_label: str,
    joined: bool = True,
    chosen: str = "",
) -> None:
    """Points in panels, each with its label beside it, one style for each line's name in all of them.

    data: columns panel, line, label, x, y; saved as the CSV. A point without x or y is not drawn
    joined: whether a line's points are joined, in the order given
    chosen: the label of a point that is ringed
    """
    for column in ("panel", "line", "label", "x", "y"):
        if column not in data:
            raise ConfigError(
                f"plot_points: no column {column!r} in the data; it has {', '.join(map(str, data.columns))}"
            )
    drawn = data[data["x"].notna() & data["y"].notna()]
    panels, lines = list(dict.fromkeys(drawn["panel"])), list(dict.fromkeys(drawn["line"]))
    if not panels:
        raise ConfigError("plot_points: no point has both x and y; there is nothing to draw")
    names = list(map(str, lines))

    def draw(figure: Figure) -> None:
        grid = figure.subplots(1, len(panels), squeeze=False)
        named: dict[str, Any] = {}
        for axes, panel in zip(grid.flat, panels, strict=True):
            for number, line in enumerate(lines):
                rows = drawn[(drawn["panel"] == panel) & (drawn["line"] == line)]
                if not len(rows):
                    continue
                style = dict(color=COLOURS[number % len(COLOURS)], marker=MARKERS[number % len(MARKERS)])
                dash: Any = DASHES[number % len(DASHES)] if joined else ""
                (handle,) = axes.plot(rows["x"], rows["y"], linestyle=dash, label=str(line), **style)
                named.setdefault(str(line), handle)
                for label, x, y in zip(rows["label"], rows["x"], rows["y"], strict=True):
                    axes.annotate(str(label), (x, y), xytext=(4, 4), textcoords="offset points", fontsize=6)
                    if chosen and label == chosen:
                        axes.plot(
                            [x],
                            [y],
                            linestyle="",
                            marker="o",
                            markersize=11,
                            fillstyle="none",
                            color="#555555",
                        )
            axes.margins(0.15)
            axes.set(title=panel, xlabel=x_label)
        grid[0, 0].set_ylabel(y_label)
        figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=columns)

    width = 1.3 * _PANEL[0] * len(panels) + 0.3
    columns = min(len(names), max(1, int(width * 9 / (6 + max(map(len, names))))))
    below = 0.3 + 0.18 * -(-len(names) // columns)
    size = (width, 1.3 * _PANEL[1] + below)
    _write(draw, size, lambda file: data.to_csv(file, index=False), path)


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
    """A line of one point: its interval as a bar."""
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


def lines_of(parts: list[dict[str, Any]], needs: str) -> DataFrame:
    """The long form that `plot_lines` draws, of parts with panel, line, x, y and, where there are intervals, low and
    high: each a line in a panel.

    Raises ConfigError, with what is needed, where no part has a point.
    """
    import pandas

    listed = ("x", "y", "low", "high")
    frames = [pandas.DataFrame({k: list(v) if k in listed else v for k, v in p.items()}) for p in parts]
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
        raise ConfigError(f"{path}: must end in {', '.join('.' + k for k in known)}")
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)

        def save_figure(file: Path) -> None:
            figure.savefig(file, format=path.suffix[1:].lower(), dpi=200)

        for place, save in ((path, save_figure), (path.with_suffix(".csv"), save_data)):
            with whole(place) as beside:
                save(beside)
