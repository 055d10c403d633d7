"""Text tables: columns that line up, of cells that are text already or of a DataFrame."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy

if TYPE_CHECKING:
    from pandas import DataFrame


def aligned(columns: Sequence[tuple[str, Sequence[str]]], *, numbers: bool = True) -> list[str]:
    """Lines of a text table, of (head, cells) each: the first column to the left, the others to the right.

    numbers: False: all to the left, as of words
    """
    widths = [max(len(head), *map(len, cells), 0) for head, cells in columns]
    lines = []
    for row in zip(*([head, *cells] for head, cells in columns), strict=True):
        cells = [
            cell.rjust(width) if numbers and place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def frame_lines(frame: DataFrame) -> list[str]:
    """A DataFrame as lines of text, without its empty columns; bounds of an interval behind their value.

    frame: beside a column <name> may stand <name>.low and <name>.high
    """
    columns = []
    for name in frame.columns:
        if str(name).endswith((".low", ".high")):
            continue
        cells = []
        for _, row in frame.iterrows():
            low, high = row.get(f"{name}.low"), row.get(f"{name}.high")
            text = cell(row[name])
            cells.append(text if low is None or not text else f"{text} [{cell(low)}, {cell(high)}]")
        if any(cells):
            columns.append((str(name).replace("_", " "), cells))
    return aligned(columns)


def cell(value: Any) -> str:
    """A cell: four significant digits, "never" for an infinite number, nothing for what is missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, (float, numpy.floating)):
        return ("never" if value > 0 else "-inf") if math.isinf(value) else f"{value:.4g}"
    return str(value)
