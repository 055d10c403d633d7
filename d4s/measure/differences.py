"""What tells two evaluations of the same edits apart: each edit is compared with itself.

Two intervals that overlap decide nothing, for most of their width is of the edits, hard ones and easy ones, and both
methods made the same. Here both means come from the same draws of edits, so that what the edits share cancels out.
"""

from __future__ import annotations

import math

import numpy

from d4s.measure.columns import METRICS
from d4s.measure.metrics import Evaluation, Metric, add_combined, fact_numbers
from d4s.measure.statistics import resampled_means


def differences(one: Evaluation, other: Evaluation, seed: int = 0) -> dict[str, Metric]:
    """Mean of one less mean of the other, of each figure that both have, with its 95 % interval.

    Paired bootstrap over the facts of the edits (by id) that have the figure in both; average and harmonic are those of
    the means.
    Metric's mean, low and high are of the difference. {} where no edit is in both.
    """
    mine = {row["id"]: row for row in one.rows}
    theirs = {row["id"]: row for row in other.rows}
    ids = sorted(mine.keys() & theirs.keys())
    present = [
        name for name in METRICS if any(name in mine[i] for i in ids) and any(name in theirs[i] for i in ids)
    ]
    pairs = numpy.array(
        [[[_figure(rows[i].get(name)) for name in present] for rows in (mine, theirs)] for i in ids],
        dtype=float,
    ).reshape(len(ids), 2, len(present))
    pairs[numpy.isnan(pairs).any(1, keepdims=True).repeat(2, 1)] = math.nan
    counted = (~numpy.isnan(pairs[:, 0])).sum(0)
    present = [name for name, count in zip(present, counted, strict=True) if count]
    if not present:
        return {}
    values = pairs[:, :, counted > 0]
    drawn = resampled_means(values.reshape(len(ids), -1), fact_numbers(mine[i] for i in ids), seed)
    drawn = drawn.reshape(-1, 2, len(present))
    counts = dict(zip(present, counted[counted > 0].tolist(), strict=True))
    halves = []
    for half in range(2):
        means = dict(zip(present, numpy.nanmean(values[:, half], 0), strict=True))
        draws = dict(zip(present, drawn[:, half].T, strict=True))
        combined = add_combined(means, draws, counts)
        halves.append((means, draws))
    found = {}
    for name in halves[0][0]:
        low, high = numpy.nanpercentile(halves[0][1][name] - halves[1][1][name], [2.5, 97.5])
        found[name] = Metric(
            float(halves[0][0][name] - halves[1][0][name]),
            float(low),
            float(high),
            int((counts | combined)[name]),
        )
    return found


def _figure(value: float | None) -> float:
    return math.nan if value is None else value
