"""How many edits a model still takes: a curve of decline fitted to what a sequence measured, and its own test."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import scipy.optimize
from numpy.typing import NDArray
from scipy.special import erf, erfinv

from d4s.errors import ConfigError
from d4s.measure.columns import layers
from d4s.sequence.record import Record

Floats = NDArray[numpy.float64]


@dataclass(frozen=True)
class Decline:
    """A share of right answers against the number of edits t.

    Every edit adds noise to what the layers say about other facts. A fact is answered right while its margin
    exceeds that noise. With margins N(μ, s²) over facts and noise N(0, v D²), where D = ‖W − W0‖_F, a share
    Φ(μ / √(s² + v D²)) is right; it falls to the ½ of a coin flip between two answers. For a general floor f:

        share(t) = f + (1 − f) · erf(1 / √(2 (a + b D²))),   a = s²/μ²,  b = v/μ²,   D² = c t^q

    q is 1 where edits add up like a random walk, 2 where they pull together, below 1 where a prior holds W to
    W0. So the share is a monotone function of the measured norm, and the norm is extrapolated by a power law.
    """

    floor: float
    a: float
    b: float
    c: float
    q: float

    def share(self, edits: Any) -> Any:
        """At numbers of edits (a number or an array)."""
        spread = self.c * numpy.asarray(edits, dtype=float) ** self.q
        return _share(self.a, self.b, spread, self.floor)

    def edits_until(self, bound: float) -> float:
        """The number of edits at which the share falls to `bound`; infinite if it never does."""
        if bound <= self.floor or self.b == 0:
            return math.inf
        spread = (_margin(bound, self.floor) - self.a) / self.b
        if spread <= 0:
            return 0.0
        if self.c == 0 or self.q <= 0:
            return math.inf
        exponent = math.log(spread / self.c) / self.q
        return math.exp(exponent) if exponent < 700 else math.inf


def _margin(share: float, floor: float) -> float:
    """a + b D² at a share; the inverse of `_share`."""
    above = (min(share, 1 - 1e-9) - floor) / (1 - floor)
    if above <= 0:
        return float(_A[-1])
    return float(1 / (2 * erfinv(above) ** 2))


def _share(a: Any, b: Any, spread: Any, floor: float) -> Any:
    return floor + (1 - floor) * erf(numpy.maximum(2 * (a + b * spread), 1e-12) ** -0.5)


# Both in units of the squared mean margin. a from a share of 1 to next to the floor, b · max D² likewise.
_A = numpy.concatenate([[0.0], numpy.geomspace(1e-2, 30, 80)])
_B = numpy.concatenate([[0.0], numpy.geomspace(1e-3, 300, 160)])


def fit_decline(
    steps: Floats,
    squares: Floats,
    shares: Floats,
    weights: Floats,
    floor: float,
    resamples: int = 0,
    seed: int = 0,
) -> tuple[Decline, list[Decline]]:
    """Weighted least squares: on a grid, then downhill from its best point.

    steps, squares, shares: edits made, D² and the share at each evaluation point; weights: edits behind it
    resamples: also fit that many draws of the points with replacement; returned second
    """
    largest = float(squares.max())
    edited = (steps > 0) & (squares > 0)
    if edited.sum() < 2 or largest == 0:
        c, q = largest, 0.0
    else:
        q, log_c = numpy.polyfit(numpy.log(steps[edited]), numpy.log(squares[edited]), 1)
        c, q = float(numpy.exp(log_c)), float(q)
    scaled = squares / largest if largest else squares

    def errors(a: Floats, b: Floats) -> Floats:
        guess = _share(a[:, None, None], b[None, :, None], scaled, floor)
        return (guess - shares) ** 2  # [a, b, points]

    def decline(a: float, b: float) -> Decline:
        return Decline(floor, float(a), float(b) / largest if largest else 0.0, c, q)

    # The constant share is always among the guesses, lest a run without decline be given a little of it.
    level = _margin(float(numpy.average(shares, weights=weights)), floor)
    spreads = numpy.sort(numpy.append(_A, level))
    coarse = errors(spreads, _B)

    def lowest(point_weights: Floats) -> tuple[int, int]:
        return divmod(int((coarse @ point_weights).argmin()), len(_B))

    i, j = lowest(weights)
    start = numpy.array([spreads[i], _B[j]])
    a, b = _descended(start, scaled, shares, weights, floor)
    constant, fitted = (_error(x, y, scaled, shares, weights, floor) for x, y in ((level, 0.0), (a, b)))
    if constant <= fitted + 1e-24 * weights.sum():  # no better by more than rounding
        a, b = level, 0.0
    draws = numpy.random.default_rng(seed).integers(len(steps), size=(resamples, len(steps)))
    drawn = [lowest(numpy.bincount(draw, minlength=len(steps)) * weights) for draw in draws]
    return decline(a, b), [decline(spreads[i], _B[j]) for i, j in drawn]


def _error(a: float, b: float, squares: Floats, shares: Floats, weights: Floats, floor: float) -> float:
    guess = _share(a, b, squares, floor)
    return float((guess - shares) ** 2 @ weights)


def _descended(
    point: Floats, squares: Floats, shares: Floats, weights: Floats, floor: float
) -> tuple[float, float]:
    """The least-squares point next to `point` = (a, b), both kept at 0 or above."""
    root = numpy.sqrt(weights)

    def away(point: Floats) -> Any:
        return root * (_share(point[0], point[1], squares, floor) - shares)

    def jacobian(point: Floats) -> Floats:
        twice = numpy.maximum(2 * (point[0] + point[1] * squares), 1e-12)
        # d share / d (a + b D²)
        slope = -2 * (1 - floor) / math.sqrt(math.pi) * numpy.exp(-1 / twice) * twice**-1.5
        return root[:, None] * numpy.stack([slope, slope * squares], axis=1)

    # dogbox stops on a bound itself, where no decline is b = 0; the others stay a little inside.
    found = scipy.optimize.least_squares(
        away,
        point,
        jacobian,
        bounds=(0, math.inf),
        method="dogbox",
        x_scale="jac",
        ftol=1e-15,
        xtol=1e-15,
        gtol=1e-15,
    )
    return float(found.x[0]), float(found.x[1])


def estimate_remaining(
    record: Record, metric: str, bound: float | None = None, *, resamples: int = 200, seed: int = 0
) -> dict[str, Any]:
    """How many edits the model still takes before `metric` falls under `bound`, and how wrong that is.

    bound: None: 90 % of the first level (specificity: of the unedited model; others: of the first point)
    Shares of what must not change are taken relative to the unedited model's on the same edits, times its level
    on all of them: the first edits of a file may be easier than the rest, which is no decline. Points at which
    it has nothing right are left out: nothing can be lost there.
    at: edits made; under_at: where the fit to the whole run (`Decline`) falls under the bound, with the interval
        of fits to resampled points; remaining = under_at − at, at least 0; observed: where the run did fall
        under it, between two points by straight line, or None
    The test: a fit to the first half of the points foretells the second half. half_error: mean absolute error
    of the shares it foretold; constant_error: of foretelling that all stays as it was at the half's end;
    half_under_at: where it saw the bound; half_off: by how much that missed `observed`, relative, where the
    run fell under the bound in the second half.
    Raises ConfigError with fewer than four evaluation points, or for a metric the run does not have.
    """
    rows = [row for row in record.history if row.get(metric) is not None and not math.isnan(row[metric])]
    # Before any edit there is no edited fact to remember; what must not change has its level there too.
    starts = 0 if metric.startswith(("specificity", "retained", "locality")) else 1
    rows = [row for row in rows if row["step"] >= starts and math.isfinite(_square(row))]
    if starts == 0:
        rows = [row for row in rows if row.get(f"{metric}.unedited", 1.0) > 0]
    if len(rows) < 4:
        raise ConfigError(
            f"{len(rows)} evaluation points with {metric!r} are too few to fit a decline; evaluate_every must give 4"
        )
    steps = numpy.array([float(row["step"]) for row in rows])
    shares = numpy.array([float(row[metric]) for row in rows])
    if starts == 0:
        levels = [row.get(f"{metric}.unedited", shares[0]) for row in rows]
        # A first level of 0 leaves nothing to divide by, and nothing to fall.
        shares = numpy.minimum(shares / numpy.maximum(levels, 1e-12) * shares[0], 1.0)
    squares = numpy.array([_square(row) for row in rows])
    # A point over few edits is noisy; the unedited model is scored on all of them.
    weights = numpy.where(steps == 0, steps.max(), steps)
    compared = any("nll_true" in row for evaluation in record.evaluations for row in evaluation.rows)
    floor = 0.5 if compared and metric in ("efficacy", "paraphrase", "specificity") else 0.0
    bound = 0.9 * float(shares[0]) if bound is None else bound
    half = max(len(rows) // 2, 2 + int(steps[0] == 0))  # two points with edits, or there is no growth to see
    observed = _crossing(steps, shares, bound)
    found: dict[str, Any] = {
        "metric": metric,
        "bound": bound,
        "at": int(steps[-1]),
        "level": float(shares[-1]),
    }
    whole, drawn = fit_decline(steps, squares, shares, weights, floor, resamples, seed)
    under = [d.edits_until(bound) for d in drawn]
    low, high = _quantile(under, 0.025), _quantile(under, 0.975)
    found |= {"under_at": whole.edits_until(bound), "under_at.low": low, "under_at.high": high}
    found["remaining"] = max(0.0, found["under_at"] - found["at"]) if observed is None else 0.0
    found["observed"] = observed
    early, _ = fit_decline(steps[:half], squares[:half], shares[:half], weights[:half], floor)
    found["half_at"] = int(steps[half - 1])
    found["half_error"] = float(numpy.abs(early.share(steps[half:]) - shares[half:]).mean())
    found["constant_error"] = float(numpy.abs(shares[half - 1] - shares[half:]).mean())
    found["half_under_at"] = early.edits_until(bound)
    in_second = observed is not None and observed > steps[half - 1]
    found["half_off"] = found["half_under_at"] / observed - 1 if in_second and observed else None
    return found


def _square(row: Mapping[str, Any]) -> float:
    """‖W − W0‖² over all edited layers; NaN where a stored one was not finite."""
    norms = [row[name] for name in layers(row, "delta_norm.<layer>").values()]
    return math.nan if None in norms else sum(v * v for v in norms)


def _crossing(steps: Floats, shares: Floats, bound: float) -> float | None:
    """Where the shares fall under the bound for the first time, by straight lines between points."""
    below = numpy.flatnonzero(shares < bound)
    if not len(below):
        return None
    i = int(below[0])
    if i == 0:
        return float(steps[0])
    part = (shares[i - 1] - bound) / (shares[i - 1] - shares[i])
    return float(steps[i - 1] + part * (steps[i] - steps[i - 1]))


def _quantile(values: Sequence[float], at: float) -> float:
    """A value of the list, so that infinite ones are in their place."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(at * len(ordered)))] if ordered else math.nan
