"""Intervals and tests, against scipy and cases worked by hand."""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import scipy.stats
import torch

from d4s.measure.columns import Column
from d4s.measure.statistics import (
    RESAMPLES,
    correlation,
    mcnemar,
    over_seeds,
    resampled_means,
    student_interval,
    student_t,
)


def test_intervals_are_those_of_the_mean(seed: int) -> None:
    generator = numpy.random.default_rng(seed)
    values = generator.random((400, 2))
    values[:, 1] = 0.25
    means = resampled_means(values, numpy.arange(len(values)), seed)
    assert means.shape == (RESAMPLES, 2)
    low, high = numpy.percentile(means[:, 0], [2.5, 97.5])
    error = values[:, 0].std() / math.sqrt(400)
    assert low == pytest.approx(values[:, 0].mean() - 1.96 * error, abs=0.25 * error)
    assert high == pytest.approx(values[:, 0].mean() + 1.96 * error, abs=0.25 * error)
    assert means[:, 1] == pytest.approx(0.25)


def test_absent_figures_are_left_out_ofresampled_means(seed: int) -> None:
    values = numpy.full((50, 1), numpy.nan)
    values[:20] = 0.5
    assert numpy.nanmax(abs(resampled_means(values, numpy.arange(len(values)), seed) - 0.5)) < 1e-12


def test_copies_in_one_group_are_one_sample(seed: int) -> None:
    values = numpy.random.default_rng(seed).random((40, 1))
    copies = numpy.repeat(values, 25, 0)
    once = resampled_means(values, numpy.arange(40), seed)
    assert resampled_means(copies, numpy.repeat(numpy.arange(40), 25), seed) == pytest.approx(once)


def test_whole_groups_are_drawn(seed: int) -> None:
    """Two groups, of one and three edits: four draws are equally likely, and their means are known."""
    values, groups = numpy.array([[1.0], [0.0], [0.0], [0.0]]), numpy.array([0, 1, 1, 1])
    means = resampled_means(values, groups, seed)[:, 0]
    assert set(means) == {0.0, 0.25, 1.0}
    for mean, share in ((0.0, 0.25), (0.25, 0.5), (1.0, 0.25)):
        assert (means == mean).mean() == pytest.approx(share, abs=5 * math.sqrt(share / RESAMPLES))


def test_bounds_of_shares_end_at_0_and_1():
    row = over_seeds(
        [{"step": 4, "efficacy": 0.0, "l1_growth": 0.0}, {"step": 4, "efficacy": 1.0, "l1_growth": 1.0}]
    )
    assert (row["efficacy.low"], row["efficacy.high"]) == (0.0, 1.0) and row["l1_growth.high"] > 1.0


def test_a_mean_leaves_out_the_seeds_that_lack_a_figure():
    row = over_seeds([{"step": 4, "x": 1.0, "x.low": 0.0}, {"step": 2, "x": 3.0}, {"step": 3, "x": None}])
    assert (row["step"], row["x"]) == (2, 2.0)
    assert row["x.high"] - 2.0 == pytest.approx(12.7062047)  # t of one degree of freedom


@pytest.mark.parametrize("freedom", [1, 2, 4, 9, 20, 21, 40, 200])
def test_students_quantiles_leave_two_and_a_half_percent_above(freedom):
    t = torch.linspace(0, 1, 200_001, dtype=torch.float64) * student_t(freedom)
    constant = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    density = torch.exp(constant - (freedom + 1) / 2 * torch.log1p(t**2 / freedom))
    assert 0.5 - float(torch.trapezoid(density, t)) == pytest.approx(0.025, abs=1e-4)


def test_students_interval_is_scipys(seed: int) -> None:
    values = numpy.random.default_rng(seed).normal(3.0, 2.0, size=5)
    expected = scipy.stats.t.interval(0.95, 4, values.mean(), scipy.stats.sem(values))
    assert student_interval(values.tolist()) == pytest.approx(expected)
    assert student_t(2) == pytest.approx(scipy.stats.t.ppf(0.975, 2)) == pytest.approx(4.302653, abs=1e-6)
    half = 4.302653 * statistics.stdev([1.0, 2.0, 6.0]) / math.sqrt(3)
    assert student_interval([1.0, 2.0, 6.0]) == pytest.approx((3 - half, 3 + half))


def test_clocks_have_a_mean_over_seeds_and_no_interval() -> None:
    row = over_seeds([{"step": 2, "edit_seconds": 1.0}, {"step": 2, "edit_seconds": 4.0}])
    assert row == {"step": 2, "edit_seconds": 2.5}


def test_bounds_of_a_share_that_a_measure_declares_end_at_0_and_1() -> None:
    rows = [{"step": 4, "kept": 0.0}, {"step": 4, "kept": 1.0}]
    own = {"kept": Column("kept", "share", "up")}
    assert over_seeds(rows)["kept.high"] > 1.0 == over_seeds(rows, own)["kept.high"]


def test_bounds_of_a_probability_end_at_0_and_1() -> None:
    rows = [{"step": 4, "target_probability": 0.0}, {"step": 4, "target_probability": 1.0}]
    found = over_seeds(rows)
    assert (found["target_probability.low"], found["target_probability.high"]) == (0.0, 1.0)


def test_mcnemar_is_a_binomial_test_of_the_facts_that_changed_sides() -> None:
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1
    assert mcnemar(5, 0) == pytest.approx(2 / 32) and mcnemar(0, 6) == pytest.approx(2 / 64)
    assert mcnemar(8, 1) == mcnemar(1, 8) == pytest.approx(2 * (9 + 1) / 2**9)
    assert mcnemar(2000, 0) == 0.0


def test_correlations_are_of_values_and_of_ranks() -> None:
    found = correlation([1, 2.5, 2.5, 4, math.nan], [1, 3, 2, 4, 5])
    assert found["pearson"] == pytest.approx(numpy.corrcoef([1, 2.5, 2.5, 4], [1, 3, 2, 4])[0, 1])
    assert found["spearman"] == pytest.approx(numpy.corrcoef([1, 2.5, 2.5, 4], [1, 3, 2, 4])[0, 1])
    assert found["n"] == 4
    bent = correlation([1, 2, 3, 4], [1, 10, 100, 1000])
    assert bent["spearman"] == pytest.approx(1.0) and bent["pearson"] < 0.95
    for x, y in (([1, 1, 1], [1, 2, 3]), ([1, 2], [1, 2]), ([1, 2, math.inf], [1, 2, 3])):
        found = correlation(x, y)
        assert math.isnan(found["pearson"]) and math.isnan(found["spearman"])


def test_importing_d4s_loads_no_scipy_stats() -> None:
    check = "import sys, d4s, d4s.sequence.compare; assert 'scipy.stats' not in sys.modules"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", check], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
