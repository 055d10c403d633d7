"""The closed form over experts as one map, against the joint problem written out densely in float64."""

from __future__ import annotations

import pytest
import torch
from support.workbench import relative_error

from d4s.change.closed_form import ClosedForm, Prior, Rows
from d4s.change.expert_form import (
    THIN,
    THIN_RIDGE,
    ExpertLayer,
    ExpertPriors,
    JointForm,
    closed_form_over,
    solve_jointly,
)
from d4s.errors import CovarianceError, D4SError, NotPositiveDefiniteError

EXPERTS, D_IN, D_OUT, WEIGHT, RIDGE = 5, 6, 4, 0.7, 0.05


def random(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def moments(generator: torch.Generator, tokens: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    keys = random(generator, EXPERTS, tokens, D_IN)
    return keys.mT @ keys, torch.full((EXPERTS,), tokens)


def joint_keys(generator: torch.Generator, n: int, most: int = EXPERTS) -> torch.Tensor:
    """Each row's keys of two experts below `most`, zero for the others."""
    keys = torch.zeros(n, EXPERTS, D_IN, dtype=torch.float64)
    for row in keys:
        for expert in torch.randperm(most, generator=generator)[:2].tolist():
            row[expert] = random(generator, D_IN)
    return keys.flatten(1)


def dense_prior(sums: torch.Tensor, routed: torch.Tensor) -> torch.Tensor:
    """λC, [E · d_in, E · d_in], block by block."""
    blocks = []
    for one, count in zip(sums, routed.tolist(), strict=True):
        c = one / count
        blocks.append(WEIGHT * (c + RIDGE * c.diagonal().mean() * torch.eye(D_IN, dtype=torch.float64)))
    return torch.block_diag(*blocks)


def dense(residuals, keys, signs, prior) -> torch.Tensor:
    """Δ = Rᵀ D K (λC + Kᵀ D K)⁻¹, [d_out, E · d_in]."""
    signed = signs.unsqueeze(1) * keys
    return torch.linalg.solve(prior + keys.T @ signed, (residuals.T @ signed).T).T


def side_by_side(delta: dict[int, torch.Tensor]) -> torch.Tensor:
    nothing = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    return torch.cat([delta.get(j, nothing) for j in range(EXPERTS)], 1)


@pytest.fixture
def world(seed):
    generator = torch.Generator().manual_seed(seed)
    sums, routed = moments(generator)
    return generator, sums, routed, ExpertPriors(sums, routed, WEIGHT, RIDGE)


def test_a_batch_is_the_least_squares_solution_of_the_joint_problem(world):
    """min over W of Σ ‖r − Δ k‖² + tr(Δ λC Δᵀ), by lstsq on the stacked system."""
    generator, sums, routed, priors = world
    keys, residuals = joint_keys(generator, 7), random(generator, 7, D_OUT)
    root = torch.linalg.cholesky(dense_prior(sums, routed))
    system = torch.cat([keys, root.T])
    wanted = torch.cat([residuals, torch.zeros(EXPERTS * D_IN, D_OUT, dtype=torch.float64)])
    truth = torch.linalg.lstsq(system, wanted).solution.T
    assert relative_error(side_by_side(solve_jointly(residuals, keys, priors)), truth) < 1e-9


def test_single_steps_one_batch_and_any_order_give_one_delta(world):
    generator, sums, routed, priors = world
    keys, residuals = (
        joint_keys(generator, 40),
        random(generator, 40, D_OUT),
    )  # more rows than an expert's d_in
    truth = dense(residuals, keys, torch.ones(40, dtype=torch.float64), dense_prior(sums, routed))
    whole = solve_jointly(residuals, keys, priors)
    order = torch.randperm(40, generator=generator)
    for places in (torch.arange(40), order):
        form = JointForm({3: priors}, D_OUT)
        for at in places.split(3):
            form.put_(Rows(3, 1.0, tuple(range(len(at))), residuals[at], keys[at]))
        found = form.delta(3)
        assert relative_error(side_by_side(found), truth) < 1e-9
        assert relative_error(form.image(keys, 3), keys @ truth.T) < 1e-9
    assert relative_error(side_by_side(whole), truth) < 1e-9


def test_rows_that_are_taken_out_leave_what_was_before(world):
    generator, sums, routed, priors = world
    keys, residuals = joint_keys(generator, 6), random(generator, 6, D_OUT)
    form = JointForm({0: priors}, D_OUT)
    form.put_(Rows(0, 1.0, (0, 1, 2), residuals[:3], keys[:3]))
    before = side_by_side(form.delta(0)).clone()
    form.put_(Rows(0, 1.0, (0, 1, 2), residuals[3:], keys[3:]))
    form.put_(Rows(0, -1.0, (0, 1, 2), residuals[3:], keys[3:]))
    assert relative_error(side_by_side(form.delta(0)), before) < 1e-9
    # In another's place, as d4s does it: the same key with another residual, and the old one out.
    form.put_(Rows(0, 1.0, (0,), residuals[5:], keys[:1]))
    form.put_(Rows(0, -1.0, (0,), residuals[:1], keys[:1]))
    other = torch.cat([residuals[5:], residuals[1:3]])
    ones = torch.ones(3, dtype=torch.float64)
    truth = dense(other, keys[:3], ones, dense_prior(sums, routed))
    assert relative_error(side_by_side(form.delta(0)), truth) < 1e-9
    with pytest.raises(NotPositiveDefiniteError, match=r"layer 0.*less the rows taken out"):
        form.put_(Rows(0, -1.0, (0,), 100 * residuals[:1], 100 * keys[:1]))


def test_experts_without_a_key_have_no_delta_and_cost_nothing(world):
    generator, _, _, priors = world
    form = JointForm({0: priors}, D_OUT)
    keys = joint_keys(generator, 5, most=3)
    form.put_(Rows(0, 1.0, tuple(range(5)), random(generator, 5, D_OUT), keys))
    hit = {j for j in range(3) if keys.view(5, EXPERTS, D_IN)[:, j].any()}
    assert set(form.delta(0)) == hit == set(priors._made)


def test_with_one_expert_it_is_the_dense_form(seed):
    """A single block in the n × n form, against the sums; and without several experts the sums themselves."""
    generator = torch.Generator().manual_seed(seed)
    keys = random(generator, 30, D_IN)
    priors = ExpertPriors((keys.T @ keys)[None], torch.tensor([30]), WEIGHT, RIDGE)
    plain = Prior(keys.T @ keys / 30, WEIGHT, RIDGE)
    joint, sums = JointForm({0: priors}, D_OUT), closed_form_over({0: plain}, D_OUT)
    assert isinstance(sums, ClosedForm)
    for _ in range(9):
        rows = Rows(0, 1.0, (0,), random(generator, 1, D_OUT), random(generator, 1, D_IN))
        joint.put_(rows)
        sums.put_(rows)
    assert relative_error(joint.delta(0)[0], sums.delta(0)) < 1e-10


def test_dense_layers_beside_those_with_experts_are_the_sums(world):
    generator, _, _, priors = world
    c = random(generator, 20, D_IN)
    prior = Prior(c.T @ c / 20, WEIGHT)
    joint, alone = JointForm({0: prior, 1: priors}, D_OUT), ClosedForm({0: prior}, D_OUT)
    rows = Rows(0, 1.0, (0, 1), random(generator, 2, D_OUT), random(generator, 2, D_IN))
    joint.put_(rows)
    alone.put_(rows)
    assert torch.equal(joint.delta(0), alone.delta(0)) and joint.delta(1) == {}
    joint.put_(Rows(1, 1.0, (0,), random(generator, 1, D_OUT), joint_keys(generator, 1)))
    assert set(joint.deltas()) == {0, 1} and len(joint.delta(1)) == 2


@pytest.mark.parametrize("kind", ["state_dict", "snapshot"])
def test_a_run_goes_on_from_its_state_with_the_same_bits(world, kind):
    generator, _, _, priors = world
    keys, residuals = joint_keys(generator, 8), random(generator, 8, D_OUT)
    one, other = JointForm({2: priors}, D_OUT), JointForm({2: priors}, D_OUT)
    one.put_(Rows(2, 1.0, tuple(range(5)), residuals[:5], keys[:5]))
    state = getattr(one, kind)()
    assert one.growing == {name for name in state if name.startswith("2.")}
    (other.load_state_dict if kind == "state_dict" else other.resume_)(state)
    for form in (one, other):
        form.put_(Rows(2, 1.0, (0, 1, 2), residuals[5:], keys[5:]))
    assert one.delta(2).keys() == other.delta(2).keys()
    assert all(torch.equal(one.delta(2)[j], other.delta(2)[j]) for j in one.delta(2))


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("signs", lambda t: t[:-1], "factor"),
        ("weighted", lambda t: t * float("nan"), "weighted.*finite"),
        ("rows", lambda t: t + 100, "names rows or experts"),
        ("experts", lambda t: t + torch.tensor([100, 0]), "names rows or experts"),
        ("delta", lambda t: t.float(), "delta"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(world, part, change, said):
    generator, _, _, priors = world
    form = JointForm({2: priors}, D_OUT)
    form.put_(Rows(2, 1.0, (0, 1), random(generator, 2, D_OUT), joint_keys(generator, 2)))
    state = form.snapshot()
    state[f"2.{part}"] = change(state[f"2.{part}"])
    with pytest.raises(D4SError, match=f"layer 2: .*{said}"):
        form.resume_(state)


def test_experts_that_saw_few_tokens_get_the_ridge_that_is_stated(seed):
    generator = torch.Generator().manual_seed(seed)
    sums, routed = moments(generator)
    routed[1], routed[2], sums[2] = THIN * D_IN - 1, 0, 0.0
    priors = ExpertPriors(sums, routed, WEIGHT, RIDGE)
    assert priors.thin == (1, 2)
    c = sums[1] / int(routed[1])
    eye = torch.eye(D_IN, dtype=torch.float64)
    assert relative_error(priors.of(1).matrix, WEIGHT * (c + THIN_RIDGE * c.diagonal().mean() * eye)) < 1e-12
    seen = [float((sums[j] / int(routed[j])).diagonal().mean()) for j in (0, 1, 3, 4)]
    assert relative_error(priors.of(2).matrix, WEIGHT * sum(seen) / 4 * eye) < 1e-12
    c = sums[0] / int(routed[0])
    assert relative_error(priors.of(0).matrix, WEIGHT * (c + RIDGE * c.diagonal().mean() * eye)) < 1e-12
    with pytest.raises(CovarianceError, match="no expert of the layer saw a token"):
        ExpertPriors(sums, torch.zeros(EXPERTS, dtype=torch.long))


def test_rows_that_are_selected_are_all_that_was_ever_put_in(world):
    """Of rows of which one was taken out: any others, with any signs, without their keys."""
    generator, sums, routed, priors = world
    keys, residuals = joint_keys(generator, 6), random(generator, 6, D_OUT)
    signs = torch.tensor([1.0, 1, 1, 1, -1, 1], dtype=torch.float64)
    keys[4], residuals[4] = keys[1], residuals[1]
    layer = ExpertLayer(priors, D_OUT, "layer 3")
    for i in range(6):
        layer.add_(residuals[i : i + 1], keys[i : i + 1], float(signs[i]))
    prior = dense_prior(sums, routed)
    for chosen in ([5, 0], [1, 2, 3], [0, 1, 2, 4], [0, 2, 2], []):
        found = layer.selected([(i, float(signs[i])) for i in chosen])
        truth = dense(residuals[chosen], keys[chosen], signs[chosen], prior)
        delta = side_by_side(found.delta)
        assert float((delta - truth).norm()) <= 1e-10 * float(truth.norm())
        hit = (keys[chosen].view(-1, EXPERTS, D_IN) != 0).any(2).any(0).nonzero().flatten().tolist()
        assert sorted(found.delta) == hit
        factors = found.factors()
        assert all(len(factors[j][1]) <= len(chosen) for j in hit)
        twice = found.selected([(i, 1.0 if s > 0 else -1.0) for i, s in enumerate(found.signs.tolist())])
        assert float((side_by_side(twice.delta) - truth).norm()) <= 1e-10 * float(truth.norm())
    found = layer.selected([(0, 1.0), (2, 1.0)])
    again = ExpertLayer(priors, D_OUT, "layer 3")  # what is selected grows on
    again.take(found.state())
    again.add_(residuals[5:], keys[5:], 1.0)
    at = [0, 2, 5]
    assert relative_error(side_by_side(again.delta), dense(residuals[at], keys[at], signs[at], prior)) < 1e-10
    with pytest.raises(NotPositiveDefiniteError, match="layer 3"):
        layer.selected([(0, -1.0), (0, -1.0)])
