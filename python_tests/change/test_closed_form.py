"""Identities of the closed form, in float64 unless said otherwise."""

from __future__ import annotations

import logging

import pytest
import torch

from d4s.change.closed_form import DELAYED_ROWS, ClosedForm, Prior, keys_worth_a_solve, solve
from d4s.errors import ConfigError, CovarianceError, D4SError, NotPositiveDefiniteError

D_OUT, D_IN = 48, 160  # from 15 keys on a solve is cheaper than an update


def covariance_of(d_in: int) -> torch.Tensor:
    """A well-posed E[k kᵀ] with eigenvalues over two orders of magnitude."""
    keys = torch.randn(4 * d_in, d_in, dtype=torch.float64) * torch.logspace(0, 1, d_in, dtype=torch.float64)
    return keys.T @ keys / len(keys)


def edits_of(n: int, d_out: int = D_OUT, d_in: int = D_IN) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, d_out, dtype=torch.float64), 3 * torch.randn(n, d_in, dtype=torch.float64)


def true_delta(residuals: torch.Tensor, keys: torch.Tensor, prior: Prior) -> torch.Tensor:
    """Rᵀ K (λC + Kᵀ K)⁻¹ by LU."""
    matrix = prior.matrix.double() + keys.T @ keys
    return torch.linalg.solve(matrix, keys.T @ residuals).T


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm()).item()


@pytest.fixture
def prior() -> Prior:
    return Prior(covariance_of(D_IN), weight=20.0)


def single_steps(prior: Prior, residuals: torch.Tensor, keys: torch.Tensor) -> ClosedForm:
    closed = ClosedForm({0: prior}, residuals.shape[1])
    for i in range(len(keys)):
        closed.add_(residuals[i : i + 1], keys[i : i + 1], 0)
        closed.delta(0)
    return closed


def test_single_steps_equal_one_batch(prior):
    residuals, keys = edits_of(3 * DELAYED_ROWS + 5)
    closed = single_steps(prior, residuals, keys)
    truth = true_delta(residuals, keys, prior)
    assert relative_error(closed.delta(0), truth) <= 1e-9
    assert relative_error(solve(residuals, keys, prior), truth) <= 1e-9
    assert closed.refreshes == 0


@pytest.mark.parametrize("step", [2, 7, 14, 15, 100])
def test_steps_of_any_size_equal_one_batch(prior, step):
    assert keys_worth_a_solve(D_OUT, D_IN) in range(10, 100)  # both ways are taken below
    residuals, keys = edits_of(300)
    closed = ClosedForm({0: prior}, D_OUT)
    for r, k in zip(residuals.split(step), keys.split(step), strict=True):
        closed.add_(r, k, 0)
        closed.delta(0)
    assert relative_error(closed.delta(0), true_delta(residuals, keys, prior)) <= 1e-9


@pytest.mark.parametrize("transposed", [False, True])
def test_delta_is_right_after_every_step(prior, transposed):
    residuals, keys = edits_of(2 * DELAYED_ROWS)
    closed = ClosedForm({0: prior}, D_OUT, transposed=transposed)
    assert not closed.delta(0).any()
    for i in range(len(keys)):
        closed.add_(residuals[i : i + 1], keys[i : i + 1], 0)
        truth = true_delta(residuals[: i + 1], keys[: i + 1], prior)
        assert relative_error(closed.delta(0), truth) <= 1e-9
        assert closed.delta(0).stride() == ((1, D_OUT) if transposed else (D_IN, 1))


def test_the_order_of_edits_does_not_matter(prior):
    residuals, keys = edits_of(100)
    order = torch.randperm(100)
    one, other = single_steps(prior, residuals, keys), single_steps(prior, residuals[order], keys[order])
    assert relative_error(one.delta(0), other.delta(0)) <= 1e-9


@pytest.mark.parametrize("asked_between", [True, False])
@pytest.mark.parametrize("removed", [1, 3, 60])
def test_an_edit_taken_out_leaves_the_run_without_it(prior, removed, asked_between):
    residuals, keys = edits_of(100)
    closed = single_steps(prior, residuals, keys)
    for i in range(removed):
        closed.subtract_(residuals[i : i + 1], keys[i : i + 1], 0)
        if asked_between:
            closed.delta(0)
    more_residuals, more_keys = edits_of(2)
    closed.add_(more_residuals, more_keys, 0)
    rest = torch.cat([residuals[removed:], more_residuals]), torch.cat([keys[removed:], more_keys])
    assert relative_error(closed.delta(0), true_delta(*rest, prior)) <= 1e-9
    fresh = ClosedForm({0: prior}, D_OUT)
    fresh.add_(*rest, 0)
    for name, value in fresh.state_dict().items():
        torch.testing.assert_close(closed.state_dict()[name], value, rtol=1e-9, atol=1e-9)


def test_taking_out_more_than_was_added_is_refused(prior):
    residuals, keys = edits_of(2)
    closed = single_steps(prior, residuals, keys)
    closed.delta(0)
    closed.subtract_(residuals[:1], 100 * keys[:1], 0)
    with pytest.raises(NotPositiveDefiniteError, match="layer 0"):
        closed.delta(0)


@pytest.mark.parametrize("good", [0, 64])  # rows that can be taken out, before the one that cannot
def test_sums_stay_right_after_rows_that_cannot_be_taken_out(prior, good):
    residuals, keys = edits_of(good + 20)
    closed = single_steps(prior, residuals, keys)
    closed.delta(0)
    wrong = 100 * keys[:1]
    out = torch.cat([residuals[:good], residuals[:1]]), torch.cat([keys[:good], wrong])
    for row in range(good + 1):  # few at a time, or Δ would come from a solve
        closed.subtract_(out[0][row : row + 1], out[1][row : row + 1], 0)
    before = closed.state_dict()
    with pytest.raises(NotPositiveDefiniteError):
        closed.delta(0)
    for name, tensor in closed.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-9, atol=1e-9)
    closed.add_(residuals[:1], wrong, 0)
    truth = true_delta(residuals[good:], keys[good:], prior)
    assert relative_error(closed.delta(0), truth) <= 1e-8


@pytest.mark.parametrize("asked", [0, 1, 2])  # times for Δ before: no solve, a solve, a kept inverse
def test_a_delta_that_could_not_be_had_is_not_an_old_one_when_asked_for_again(prior, asked):
    residuals, keys = edits_of(3)
    closed = ClosedForm({0: prior}, D_OUT)
    for i in range(asked):
        closed.add_(residuals[i : i + 1], keys[i : i + 1], 0)
        closed.delta(0)
    closed.subtract_(residuals[:1], 100 * keys[:1], 0)
    for _ in range(2):
        with pytest.raises(NotPositiveDefiniteError):
            closed.delta(0)


@pytest.mark.parametrize("asked_before", [True, False])
def test_two_runs_add_up(prior, asked_before):
    residuals, keys = edits_of(40)
    if asked_before:
        one, other = (
            single_steps(prior, residuals[:25], keys[:25]),
            single_steps(prior, residuals[25:], keys[25:]),
        )
    else:
        one, other = ClosedForm({0: prior}, D_OUT), ClosedForm({0: prior}, D_OUT)
        one.add_(residuals[:25], keys[:25], 0)
        other.add_(residuals[25:], keys[25:], 0)
    one.merge_(other)
    assert relative_error(one.delta(0), true_delta(residuals, keys, prior)) <= 1e-9
    one.add_(*edits_of(1), 0)
    assert relative_error(other.delta(0), true_delta(residuals[25:], keys[25:], prior)) <= 1e-9


def test_runs_with_other_layers_or_priors_do_not_add_up(prior):
    one = ClosedForm({0: prior}, D_OUT)
    with pytest.raises(D4SError, match="layers"):
        one.merge_(ClosedForm({1: prior}, D_OUT))
    with pytest.raises(CovarianceError, match="layer 0"):
        one.merge_(ClosedForm({0: Prior(covariance_of(D_IN), 20.0)}, D_OUT))


def test_cached_residuals_put_back_on_the_base_are_recursive_least_squares(prior):
    """W0 + A (B + λC)⁻¹ with A += (r + (W − W0) k) kᵀ equals W + r kᵀ (B + λC)⁻¹."""
    residuals, keys = edits_of(90)
    closed = ClosedForm({0: prior}, D_OUT)
    matrix = prior.matrix.clone()
    recursive = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    for r, k in zip(residuals, keys, strict=True):
        closed.add_((r + closed.delta(0) @ k)[None], k[None], 0)
        matrix += torch.outer(k, k)
        recursive += torch.outer(r, torch.linalg.solve(matrix, k))
        assert relative_error(closed.delta(0), recursive) <= 1e-9


def test_layers_do_not_touch_each_other(prior):
    small = Prior(covariance_of(40), 3.0)
    closed = ClosedForm({3: prior, 7: small}, D_OUT)
    edits = {3: edits_of(20), 7: edits_of(20, d_in=40)}
    for i in range(20):
        for layer, (residuals, keys) in edits.items():
            closed.add_(residuals[i : i + 1], keys[i : i + 1], layer)
            closed.delta(layer)
    deltas = closed.deltas()
    assert relative_error(deltas[3], true_delta(*edits[3], prior)) <= 1e-9
    assert relative_error(deltas[7], true_delta(*edits[7], small)) <= 1e-9


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_thousands_of_steps_do_not_drift(dtype, bound):
    d_out, d_in, steps = 12, 64, 4000
    prior = Prior(covariance_of(d_in), 20.0, dtype=dtype)
    residuals, keys = edits_of(steps, d_out, d_in)
    closed = single_steps(prior, residuals, keys)
    assert relative_error(closed.delta(0), true_delta(residuals, keys, prior)) <= bound


def test_a_damaged_inverse_is_noticed_and_made_afresh(prior, caplog):
    residuals, keys = edits_of(2 * DELAYED_ROWS)
    closed = single_steps(prior, residuals[:10], keys[:10])
    closed._layers[0].inverse[3] *= 1.001
    with caplog.at_level(logging.INFO, logger="d4s"):
        for i in range(10, len(keys)):
            closed.add_(residuals[i : i + 1], keys[i : i + 1], 0)
            closed.delta(0)
    assert closed.refreshes == 1
    assert "made afresh" in caplog.text
    assert relative_error(closed.delta(0), true_delta(residuals, keys, prior)) <= 1e-9


@pytest.mark.parametrize("damage", [1e-6, torch.nan])
def test_a_damaged_delta_is_noticed_and_made_afresh(prior, damage):
    residuals, keys = edits_of(2 * DELAYED_ROWS)
    closed = single_steps(prior, residuals[:10], keys[:10])
    closed._layers[0].delta += damage
    for i in range(10, len(keys)):
        closed.add_(residuals[i : i + 1], keys[i : i + 1], 0)
        closed.delta(0)
    assert closed.refreshes == 1
    assert relative_error(closed.delta(0), true_delta(residuals, keys, prior)) <= 1e-9


def test_state_is_the_sums_and_comes_back(prior):
    residuals, keys = edits_of(70)
    closed = single_steps(prior, residuals[:66], keys[:66])
    closed.add_(residuals[66:], keys[66:], 0)  # not asked for yet
    state = closed.state_dict()
    torch.testing.assert_close(state["0.residual_sum"], residuals.T @ keys, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(state["0.key_sum"], keys.T @ keys, rtol=1e-12, atol=1e-9)
    again = ClosedForm({0: prior}, D_OUT)
    again.load_state_dict(state)
    assert relative_error(again.delta(0), true_delta(residuals, keys, prior)) <= 1e-9
    state["0.key_sum"].zero_()  # a copy, on both sides
    more = edits_of(1)
    for run in (closed, again):
        run.add_(*more, 0)
        truth = true_delta(torch.cat([residuals, more[0]]), torch.cat([keys, more[1]]), prior)
        assert relative_error(run.delta(0), truth) <= 1e-9


def test_state_of_another_run_is_refused(prior):
    closed = ClosedForm({0: prior}, D_OUT)
    state = closed.state_dict()
    with pytest.raises(D4SError, match=r"0\.residual_sum"):
        closed.load_state_dict({"1.key_sum": state["0.key_sum"]})
    with pytest.raises(D4SError, match=r"0\.key_sum"):
        closed.load_state_dict(state | {"0.key_sum": torch.zeros(3, 3)})
    with pytest.raises(D4SError, match="finite"):
        closed.load_state_dict(state | {"0.key_sum": state["0.key_sum"] * torch.nan})


def test_memory_does_not_grow_with_the_number_of_edits(prior):
    residuals, keys = edits_of(5 * DELAYED_ROWS)
    closed = single_steps(prior, residuals[:20], keys[:20])
    early = closed.nbytes
    for i in range(20, len(keys)):
        closed.add_(residuals[i : i + 1], keys[i : i + 1], 0)
        closed.delta(0)
    assert closed.nbytes == early
    for i in range(len(keys)):  # without asking for Δ
        closed.add_(residuals[i : i + 1], keys[i : i + 1], 0)
    assert closed.nbytes <= early * 1.1


@pytest.mark.parametrize("n", [1, 5, 150, 1000])
def test_solve_takes_few_and_many_keys(prior, n):
    residuals, keys = edits_of(n)
    truth = true_delta(residuals, keys, prior)
    for _ in range(2):  # the second time with the prior's factor kept
        assert relative_error(solve(residuals, keys, prior), truth) <= 1e-9


def test_solve_reads_half_precision_rows_in_float64(prior):
    residuals, keys = edits_of(5)
    residuals, keys = residuals.bfloat16(), keys.half()
    delta = solve(residuals, keys, prior)
    assert delta.dtype == torch.float64
    assert relative_error(delta, true_delta(residuals.double(), keys.double(), prior)) <= 1e-9


def test_prior_solves_for_the_direction_of_a_single_key(prior):
    key = torch.randn(D_IN, 1, dtype=torch.float64)
    torch.testing.assert_close(prior.matrix @ prior.solve(key), key, rtol=1e-9, atol=1e-9)


def test_identity_prior_is_that_of_its_matrix():
    residuals, keys = edits_of(9)
    identity = Prior.identity(D_IN, 10.0)
    assert relative_error(solve(residuals, keys, identity), true_delta(residuals, keys, identity)) <= 1e-9
    assert torch.equal(identity.matrix, 10.0 * torch.eye(D_IN, dtype=torch.float64))


def test_a_ridge_makes_a_singular_covariance_usable_and_is_logged(caplog):
    keys = torch.randn(D_IN // 2, D_IN, dtype=torch.float64)
    covariance = keys.T @ keys
    residuals, new_keys = edits_of(3)
    with pytest.raises(NotPositiveDefiniteError, match="ridge"):
        solve(residuals, new_keys, Prior(covariance - 1e-6 * torch.eye(D_IN)))
    with caplog.at_level(logging.INFO, logger="d4s"):
        prior = Prior(covariance, weight=2.0, ridge=0.01)
    assert "ridge" in caplog.text
    expected = 2.0 * (covariance + 0.01 * covariance.diagonal().mean() * torch.eye(D_IN))
    torch.testing.assert_close(prior.matrix, expected)
    assert relative_error(solve(residuals, new_keys, prior), true_delta(residuals, new_keys, prior)) <= 1e-9


def test_a_covariance_without_a_factor_names_its_layer():
    covariance = covariance_of(D_IN)
    covariance[5, 5] = -1.0
    closed = ClosedForm({11: Prior(covariance)}, D_OUT)
    closed.add_(*edits_of(1), 11)
    with pytest.raises(NotPositiveDefiniteError, match="layer 11"):
        closed.delta(11)


def test_bad_arguments_are_refused(prior):
    closed = ClosedForm({4: prior}, D_OUT)
    residuals, keys = edits_of(2)
    for bad_residuals, bad_keys, layer, word in [
        (residuals, keys, 5, "layer 5"),
        (residuals[:1], keys, 4, "layer 4"),
        (residuals, keys[:, :-1], 4, str(D_IN)),
        (residuals[0], keys[0], 4, "d_out"),
        (residuals * torch.nan, keys, 4, "residuals must be finite"),
        (residuals, keys.long(), 4, "keys must be finite"),
    ]:
        with pytest.raises(D4SError, match=word):
            closed.add_(bad_residuals, bad_keys, layer)
    assert not closed.delta(4).any()
    for arguments, error in [
        ((torch.zeros(3, 4),), CovarianceError),
        ((torch.full((3, 3), torch.nan),), CovarianceError),
        ((torch.eye(3), 0.0), ConfigError),
        ((torch.eye(3), 1.0, -1.0), ConfigError),
        ((torch.eye(3), 1.0, 0.0, torch.bfloat16), ConfigError),
    ]:
        with pytest.raises(error):
            Prior(*arguments)


def test_rows_given_to_the_sums_may_be_overwritten_afterwards(prior):
    residuals, keys = edits_of(1)
    closed = ClosedForm({0: prior}, D_OUT)
    closed.add_(residuals, keys, 0)
    truth = true_delta(residuals, keys, prior)
    residuals.zero_(), keys.zero_()
    assert relative_error(closed.delta(0), truth) <= 1e-9


def test_everything_stays_on_the_device_of_the_prior(device):
    prior = Prior(covariance_of(D_IN).to(device), 20.0)
    residuals, keys = edits_of(DELAYED_ROWS + 5)
    closed = single_steps(prior, residuals, keys)
    assert closed.delta(0).device.type == device.type
    truth = true_delta(residuals.to(device), keys.to(device), prior)
    assert relative_error(closed.delta(0), truth) <= 1e-9


@pytest.mark.parametrize("transposed", [False, True])
def test_a_snapshot_goes_on_with_the_same_bits(transposed, seed):
    """At every number of edits, waiting rows and taken-out rows among them."""
    generator = torch.Generator().manual_seed(seed)
    d_in, d_out = 24, 5

    def draw(n, d):
        return torch.randn(n, d, generator=generator, dtype=torch.float64)

    c = draw(60, d_in)
    prior = Prior(c.T @ c / 60, 0.5)
    steps = [(draw(n, d_out), draw(n, d_in)) for n in [1, 1, 3, 1, 2, *[1] * 150]]

    def go(run, begin, end):
        for number in range(begin, end):
            run.add_(*steps[number], 0)
            if number % 7 == 3:
                run.subtract_(steps[number - 1][0], steps[number - 1][1], 0)
            if number % 5 != 4:  # else the rows wait
                run.delta(0)

    whole = ClosedForm({0: prior}, d_out, transposed=transposed, seed=3)
    stored = {}
    for number in range(len(steps)):
        go(whole, number, number + 1)
        stored[number + 1] = whole.snapshot()
    for made in (1, 2, 4, 5, 9, 10, 70, 75, 100, 154):
        again = ClosedForm({0: prior}, d_out, transposed=transposed, seed=4)
        again.resume_(stored[made])
        go(again, made, len(steps))
        assert torch.equal(again.delta(0), whole.delta(0)), made
        assert all(
            torch.equal(a, b)
            for a, b in zip(again.snapshot().values(), whole.snapshot().values(), strict=True)
        )


def test_a_snapshot_that_does_not_fit_is_refused_and_changes_nothing(seed):
    generator = torch.Generator().manual_seed(seed)
    run = ClosedForm({0: Prior.identity(4), 2: Prior.identity(4)}, 3)
    for _ in range(30):  # many more than are worth a solve
        for layer in (0, 2):
            run.add_(torch.randn(1, 3, generator=generator), torch.randn(1, 4, generator=generator), layer)
            run.delta(layer)
    sound = run.snapshot()
    wrong = {
        "another layer": sound | {"1.signs": sound["0.signs"]},
        "a missing part": {name: t for name, t in sound.items() if name != "2.key_sum"},
        "another shape": sound | {"2.key_sum": torch.zeros(5, 5, dtype=torch.float64)},
        "another type": sound | {"0.delta": sound["0.delta"].float()},
        "not finite": sound | {"2.key_sum": sound["2.key_sum"] * float("nan")},
        "too many rows": sound
        | {
            f"0.{name}": torch.zeros(65, d, dtype=torch.float64)
            for name, d in (("key_rows", 4), ("residual_rows", 3), ("factor_rows", 4), ("signs", 1))
        },
        "a strange name": sound | {"x": sound["0.signs"]},
    }
    before = run.delta(0).clone()
    for what, state in wrong.items():
        with pytest.raises(D4SError):
            run.resume_(state)
        assert torch.equal(run.delta(0), before), what


class NoRoom(RuntimeError):
    """Raised in the place of what asks for memory."""


def fails(monkeypatch, name, call):
    """The call-th use of `torch.<name>`, or of a tensor's method, fails once."""
    owner = torch if hasattr(torch, name) and not name.endswith("_") else torch.Tensor
    plain, calls = getattr(owner, name), []

    def failing(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            raise NoRoom(name)
        return plain(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize("more", [1, 200])
@pytest.mark.parametrize(
    ("name", "call"), [("cat", 1), ("cat", 2), ("addmm_", 1), ("addmm_", 2), ("addmm_", 3), ("addmm_", 4)]
)
def test_after_a_failure_every_row_is_in_the_sums_once_or_that_is_said(prior, monkeypatch, name, call, more):
    """Rows in the buffers, and rows that wait: each is in one place, also where memory ran out between the two."""
    residuals, keys = edits_of(DELAYED_ROWS + more)
    closed = single_steps(prior, residuals[:DELAYED_ROWS], keys[:DELAYED_ROWS])
    try:
        with monkeypatch.context() as patch:
            fails(patch, name, call)
            closed.add_(residuals[DELAYED_ROWS:], keys[DELAYED_ROWS:], 0)
            closed.delta(0)
    except NoRoom:
        pass
    try:
        found = closed.delta(0).clone()
        sums = closed.state_dict()
    except D4SError as error:
        assert "by half" in str(error) and name == "addmm_"
        more_rows = edits_of(2 * closed._state(0).many)
        for asked in (closed.state_dict, closed.snapshot, closed.settle_, lambda: closed.add_(*more_rows, 0)):
            with pytest.raises(D4SError, match="by half"):
                asked()
        with pytest.raises(D4SError, match="by half"):
            closed.delta(0)
        closed.load_state_dict(single_steps(prior, residuals, keys).state_dict())  # and it goes on
        found, sums = closed.delta(0), closed.state_dict()
    assert relative_error(sums["0.key_sum"], keys.T @ keys) < 1e-12
    assert relative_error(sums["0.residual_sum"], residuals.T @ keys) < 1e-12
    assert relative_error(found, true_delta(residuals, keys, prior)) < 1e-9


def test_sums_in_float32_are_whole_whatever_the_process_is_set_to(reduced):
    prior = Prior(covariance_of(D_IN), weight=20.0, dtype=torch.float32)
    residuals, keys = edits_of(3 * DELAYED_ROWS)
    one_by_one = single_steps(prior, residuals.float(), keys.float())
    at_once = ClosedForm({0: prior}, D_OUT)
    at_once.add_(residuals.float(), keys.float(), 0)
    found = [closed.delta(0).clone() for closed in (one_by_one, at_once)]
    image = at_once.image(keys.float(), 0)
    assert torch.get_float32_matmul_precision() == reduced
    truth = true_delta(residuals, keys, prior)
    assert all(relative_error(delta, truth) < 1e-4 for delta in found)
    assert relative_error(image, keys @ truth.T) < 1e-4


def test_another_default_device_does_not_matter(prior):
    residuals, keys = edits_of(2 * DELAYED_ROWS)
    torch.set_default_device("meta")
    try:
        closed = single_steps(prior, residuals, keys)
        closed.settle_()
    finally:
        torch.set_default_device(None)
    assert relative_error(closed.delta(0), true_delta(residuals, keys, prior)) < 1e-9
