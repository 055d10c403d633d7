"""A DataFrame as lines of text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy

from d4s.sequence.comparison import aligned

if TYPE_CHECKING:
    from pandas import DataFrame


def frame_lines(frame: DataFrame) -> list[str]:
    """A DataFrame as lines of text, without its empty columns; bounds of an interval behind their value."""
    columns = []
    for name in frame.columns:
        if str(name).endswith((".low", ".high")):
            continue
        cells = []
        for _, row in frame.iterrows():
            low, high = row.get(f"{name}.low"), row.get(f"{name}.high")
            text = _cell(row[name])
            cells.append(text if low is None or not text else f"{text} [{_cell(low)}, {_cell(high)}]")
        if any(cells):
            columns.append((str(name).replace("_", " "), cells))
    return aligned(columns)


def _cell(value: Any) -> str:
    """A cell: four significant digits, "never" for an infinite number of edits, nothing for what is missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, (float, numpy.floating)):
        return ("never" if value > 0 else "-inf") if math.isinf(value) else f"{value:.4g}"
    return str(value)
