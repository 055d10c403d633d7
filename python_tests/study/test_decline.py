"""The curve of decline: what it says, that a fit finds it again, and how its own test is worked out."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy
import pytest

from d4s.errors import ConfigError
from d4s.measure.metrics import Evaluation
from d4s.sequence.record import Record
from d4s.study.decline import Decline, estimate_remaining, fit_decline

STEPS = numpy.arange(1.0, 21) * 50


def record_of(steps, shares, squares, metric="efficacy", compared=True):
    """A sequence that measured these; two layers hold the change between them."""
    rows = [
        {
            "step": int(t),
            metric: float(s),
            "delta_norm.3": math.sqrt(0.36 * d),
            "delta_norm.4": math.sqrt(0.64 * d),
        }
        for t, s, d in zip(steps, shares, squares, strict=True)
    ]
    rival = [{"id": "a", "nll_true": 1.0}] if compared else [{"id": "a"}]
    return Record("memit", history=rows, evaluations=[Evaluation(rival, {})])


def random_decline(floor=0.5):
    draw = numpy.random.default_rng().uniform
    curve = Decline(floor, a=draw(0.05, 0.3), b=draw(0.005, 0.02), c=draw(0.2, 0.6), q=draw(0.7, 1.3))
    print(curve)
    return curve


def test_the_share_is_that_of_margins_above_noise():
    """Counted over drawn margins and noise; the edges are 1 and the coin flip."""
    draw = numpy.random.default_rng()
    mean, spread, size = 1.7, 0.6, 0.9
    margins = draw.normal(mean, spread, 400_000) + draw.normal(0, size, 400_000)
    curve = Decline(0.5, a=spread**2 / mean**2, b=1 / mean**2, c=size**2 / 100, q=1.0)
    assert curve.share(100) == pytest.approx((margins > 0).mean(), abs=0.004)
    assert Decline(0.5, a=0.0, b=1.0, c=1.0, q=1.0).share(1e-9) == pytest.approx(1.0)
    assert curve.share(1e12) == pytest.approx(0.5, abs=1e-3)
    assert Decline(0.0, a=0.0, b=1.0, c=1.0, q=1.0).share(1e12) == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_the_number_of_edits_is_the_inverse_of_the_share(floor):
    curve = random_decline(floor)
    for bound in (0.55, 0.7, float(curve.share(300))):
        if bound < curve.share(0):
            assert curve.share(curve.edits_until(bound)) == pytest.approx(bound, abs=1e-9)
    assert curve.edits_until(floor) == math.inf
    assert curve.edits_until(float(curve.share(0)) + 1e-6) == 0.0
    assert Decline(floor, 0.1, 0.0, 1.0, 1.0).edits_until(0.9) == math.inf  # no harm by the norm
    assert Decline(floor, 0.1, 1e-9, 1.0, 0.0).edits_until(0.6) == math.inf  # a norm that stays


def test_a_fit_finds_the_curve_again(seed):
    truth = random_decline()
    squares = truth.c * STEPS**truth.q
    fit, drawn = fit_decline(STEPS, squares, truth.share(STEPS), STEPS, 0.5, resamples=5, seed=seed)
    assert fit.q == pytest.approx(truth.q) and fit.c == pytest.approx(truth.c)
    numpy.testing.assert_allclose(fit.share(STEPS), truth.share(STEPS), atol=1e-4)
    assert fit.share(2000) == pytest.approx(truth.share(2000), abs=1e-3)
    assert len(drawn) == 5


def test_a_fit_at_the_edge_of_what_is_allowed_is_the_best_there():
    """Shares that stay at 1 and then fall more steeply than the curve can: a is 0, and no other b is nearer."""
    draw = numpy.random.default_rng().uniform
    a, b = -draw(0.1, 0.3), draw(0.005, 0.02)
    print(a, b)
    squares = 0.3 * STEPS
    shares = Decline(0.5, a, b, c=0.3, q=1.0).share(STEPS)
    fit, _ = fit_decline(STEPS, squares, shares, STEPS, 0.5)

    def error(b):
        return (Decline(0.5, 0.0, b, fit.c, fit.q).share(STEPS) - shares) ** 2 @ STEPS

    assert fit.a == 0
    assert error(fit.b) < min(error(fit.b * 0.9999), error(fit.b * 1.0001))


def test_the_first_half_foretells_a_run_that_follows_the_curve():
    truth = Decline(0.5, a=0.15, b=0.004, c=0.3, q=1.0)
    shares = truth.share(STEPS)
    found = estimate_remaining(record_of(STEPS, shares, truth.c * STEPS), "efficacy", 0.82)
    wanted = truth.edits_until(0.82)
    assert 600 < wanted < 1000
    assert found["observed"] == pytest.approx(wanted, abs=5)
    assert found["remaining"] == 0.0
    assert (found["half_at"], found["at"]) == (500, 1000)
    assert found["half_error"] < 0.005 < found["constant_error"]
    assert found["constant_error"] == pytest.approx(numpy.abs(shares[9] - shares[10:]).mean())
    assert found["half_off"] == pytest.approx(found["half_under_at"] / found["observed"] - 1)
    assert abs(found["half_off"]) < 0.1


def test_the_half_that_foretells_has_two_points_with_edits():
    """Five points of specificity, the first before any edit: with one edited point there is no growth to see."""
    truth = Decline(0.5, a=0.15, b=0.004, c=0.3, q=1.0)
    steps = numpy.arange(5) * 250.0
    record = record_of(steps, truth.share(steps), truth.c * steps, metric="specificity")
    found = estimate_remaining(record, "specificity", 0.85)
    assert found["half_at"] == 500 and math.isfinite(found["half_under_at"])


def test_what_is_left_is_counted_from_the_last_edit():
    truth = Decline(0.5, a=0.05, b=0.001, c=0.3, q=1.0)
    found = estimate_remaining(record_of(STEPS, truth.share(STEPS), truth.c * STEPS), "efficacy", 0.9)
    wanted = truth.edits_until(0.9)
    assert wanted > 1100 and found["observed"] is None and found["half_off"] is None
    assert found["remaining"] == pytest.approx(wanted - 1000, rel=0.15)
    assert found["under_at"] == pytest.approx(found["remaining"] + 1000)
    assert found["under_at.low"] <= 1.1 * wanted and found["under_at.high"] >= 0.9 * wanted


def test_a_run_without_decline_is_never_under_the_bound():
    found = estimate_remaining(record_of(STEPS, numpy.full(20, 0.95), 0.3 * STEPS), "efficacy")
    assert found["bound"] == pytest.approx(0.9 * 0.95)
    assert found["under_at"] == found["remaining"] == math.inf
    found = estimate_remaining(
        record_of(STEPS, numpy.full(20, 0.95), 0 * STEPS), "efficacy"
    )  # no weight changed
    assert found["remaining"] == math.inf


def test_where_the_run_fell_is_read_off_between_two_points():
    shares = numpy.array([0.9, 0.8, 0.8, 0.6, 0.9])
    found = estimate_remaining(record_of(STEPS[:5], shares, STEPS[:5]), "efficacy", 0.75)
    assert found["observed"] == pytest.approx(150 + 50 / 4)
    assert estimate_remaining(record_of(STEPS[:5], shares, STEPS[:5]), "efficacy", 0.95)["observed"] == 50


def test_only_specificity_has_a_level_before_the_first_edit():
    steps, shares = [0, 1, 2, 3, 4], [0.2, 0.9, 0.9, 0.9, 0.9]
    assert estimate_remaining(record_of(steps, shares, steps), "efficacy")["bound"] == pytest.approx(0.81)
    found = estimate_remaining(record_of(steps, shares, steps, "specificity"), "specificity")
    assert found["bound"] == pytest.approx(0.18)


def test_edits_that_are_harder_are_no_decline():
    steps, easier = [0, 100, 200, 300, 400], [0.6, 0.9, 0.8, 0.7, 0.6]
    record = record_of(steps, easier, steps, "specificity", compared=False)
    assert estimate_remaining(record, "specificity")["level"] == pytest.approx(0.6)
    for row, level in zip(record.history[1:], easier[1:], strict=True):
        row["specificity.unedited"] = level
    found = estimate_remaining(record, "specificity")
    assert found["under_at"] == math.inf and found["observed"] is None and found["half_error"] < 1e-6
    for row in record.history[3:]:
        row["specificity"] *= 0.5
    assert estimate_remaining(record, "specificity")["observed"] == pytest.approx(200 + 100 / 5)


@pytest.mark.parametrize("level", [0.0, math.nan])
def test_where_the_unedited_model_has_nothing_right_nothing_is_lost(level):
    steps, shares = [0, 100, 200, 300, 400, 500], [0.8, 0.0, 0.6, 0.6, 0.6, 0.6]
    record = record_of(steps, shares, steps, "specificity", compared=False)
    for row, unedited in zip(record.history[1:], [level, *shares[2:]], strict=True):
        row["specificity.unedited"] = unedited
    found = estimate_remaining(record, "specificity")
    assert found["observed"] is None and found["level"] == pytest.approx(0.8)
    assert found["half_error"] < 1e-6


def test_a_level_of_0_from_the_beginning_does_not_fall():
    record = record_of(STEPS, [0.0] * len(STEPS), STEPS, "specificity", compared=False)
    assert estimate_remaining(record, "specificity")["observed"] is None


def test_shares_of_tokens_have_no_coin_flip_to_fall_to():
    truth = Decline(0.0, a=0.1, b=0.02, c=0.3, q=1.0)
    record = record_of(STEPS, truth.share(STEPS), truth.c * STEPS, compared=False)
    assert truth.share(1000) < 0.4
    assert estimate_remaining(record, "efficacy", 0.3)["under_at"] == pytest.approx(
        truth.edits_until(0.3), rel=0.1
    )


def test_too_few_points_are_refused():
    with pytest.raises(ConfigError, match="3 evaluation points"):
        estimate_remaining(record_of(STEPS[:3], [0.9, 0.8, 0.7], STEPS[:3]), "efficacy")
    with pytest.raises(ConfigError, match="'paraphrase'"):
        estimate_remaining(record_of(STEPS, 0.9 * STEPS / STEPS, STEPS), "paraphrase")


def test_the_quantile_of_a_margin_is_the_normal_one():
    """One noise, no spread: the share is Φ(1/√(b D²)), so b D² = 1/z²."""
    curve = Decline(0.5, a=0.0, b=1.0, c=1.0, q=1.0)
    z = NormalDist().inv_cdf(0.9)
    assert curve.edits_until(0.9) == pytest.approx(1 / z**2)
