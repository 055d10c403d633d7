"""Intervals and tests: over edits by bootstrap, over seeds by Student's t, over facts that changed sides by McNemar's.

scipy's where it has them, loaded when first asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy
from numpy.typing import NDArray

from d4s.measure.columns import Column, column

RESAMPLES = 2_000


def resampled_means(values: NDArray[Any], groups: NDArray[Any], seed: int) -> NDArray[Any]:
    """Means over edits, of which whole groups are drawn with replacement, [resamples, figures].

    values: [edits, figures], NaN where an edit has no such figure
    groups: [edits], the number of each edit's group, from 0 on
    """
    count = int(groups.max()) + 1
    generator = numpy.random.default_rng(seed)
    here, filled = numpy.zeros((count, values.shape[1])), numpy.zeros((count, values.shape[1]))
    numpy.add.at(here, groups, ~numpy.isnan(values))
    numpy.add.at(filled, groups, numpy.where(numpy.isnan(values), 0.0, values))
    means = []
    part = max(1, min(RESAMPLES, 2_000_000 // count))  # resamples at a time: 16 MB of drawn numbers
    for begin in range(0, RESAMPLES, part):
        size = min(part, RESAMPLES - begin)
        drawn = generator.integers(count, size=(size, count)) + count * numpy.arange(size)[:, None]
        times = numpy.bincount(drawn.ravel(), minlength=size * count).reshape(size, count).astype(float)
        with numpy.errstate(invalid="ignore"):
            means.append((times @ filled) / (times @ here))
    return numpy.concatenate(means)


def over_seeds(rows: Sequence[Mapping[str, Any]], own: Mapping[str, Column] | None = None) -> dict[str, Any]:
    """The mean of history rows of several seeds, with 95 % intervals by Student's t; one row stays as it is.

    own: columns that a `measure` has declared
    """
    if len(rows) == 1:
        return dict(rows[0])
    combined: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        about = column(name, own or {})
        if about.bound in ("low", "high"):
            continue
        values = [float(row[name]) for row in rows if row.get(name) is not None]
        if not values:
            continue
        combined[name] = sum(values) / len(values)
        if about.interval and len(values) > 1:
            low, high = student_interval(values)
            if about.unit in ("share", "probability"):  # Student's t does not know that these end at 0 and 1
                low, high = max(low, 0.0), min(high, 1.0)
            combined |= {f"{name}.low": low, f"{name}.high": high}
    combined["step"] = min(row["step"] for row in rows)
    return combined


def student_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of two or more values, by Student's t; not finite where a value is not."""
    mean = sum(values) / len(values)
    # Products, since a square that overflows raises; a collapsed model's perplexity may.
    deviation = math.sqrt(sum((v - mean) * (v - mean) for v in values) / (len(values) - 1))
    half = student_t(len(values) - 1) * deviation / math.sqrt(len(values))
    return mean - half, mean + half


@lru_cache
def student_t(freedom: int) -> float:
    """97.5 % quantile of Student's t."""
    from scipy.special import stdtrit  # what scipy.stats.t.ppf asks; scipy.stats itself is slow to load

    return float(stdtrit(freedom, 0.975))


def mcnemar(lost: int, regained: int) -> float:
    """Exact two-sided p of McNemar's test: the chance of as uneven a split, were it heads or tails for each of the
    facts that changed sides. 1 where none did."""
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + regained).pvalue) if lost + regained else 1.0


def correlation(x: Any, y: Any) -> dict[str, Any]:
    """Pearson's and Spearman's coefficients and n, of the pairs that are finite; NaN where one of the two does not
    vary or n < 3."""
    pairs = numpy.stack([numpy.asarray(x, dtype=float), numpy.asarray(y, dtype=float)])
    x, y = pairs[:, numpy.isfinite(pairs).all(0)]
    found: dict[str, Any] = {"pearson": math.nan, "spearman": math.nan, "n": len(x)}
    if len(x) > 2 and len(set(x)) > 1 and len(set(y)) > 1:
        from scipy.stats import pearsonr, spearmanr

        found["pearson"] = float(pearsonr(x, y).statistic)
        found["spearman"] = float(spearmanr(x, y).statistic)
    return found
