"""How δ moves: Adam as published, bit for bit, and steps of the length that the loss gives, against scipy's answer."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import minimize
from support.tiny import tiny_model, tiny_tokenizer
from support.workbench import EDITS

from d4s.locate.moves import FARTHEST, Adam, Polyak
from d4s.locate.request_rows import RequestRows, request_of
from d4s.locate.targets import TargetConfig, _optimise, frozen, loss_terms
from d4s.models.architectures import Anatomy

PREFIXES = ("The capital. ", "You play the piano because. ")


def rows_of(anatomy, prefixes=PREFIXES, edits=EDITS):
    return RequestRows(anatomy, 1, [request_of(tiny_tokenizer(), e, prefixes) for e in edits], 1, ("block",))


def published(rows, config):
    """The published search written down plainly, no request left out: δ as the search ends."""
    start = rows.start[0]
    delta, mean, variance = (torch.zeros_like(start) for _ in range(3))
    ended = torch.zeros(rows.count, dtype=torch.bool)
    before = None
    for look in range(config.steps):
        delta = delta.detach().requires_grad_(True)
        log_p = rows.log_probabilities([delta])
        before = log_p[rows.extra].detach() if before is None else before
        loss = sum(loss_terms(rows, log_p, [delta], before, [start.square().sum(1)], config))
        ended |= loss.detach() < config.stop_loss
        if look == config.steps - 1 or ended.all():
            return delta.detach()
        gradient = torch.autograd.grad(loss.sum(), delta)[0]
        with torch.no_grad():
            mean = 0.9 * mean + 0.1 * gradient
            variance = 0.999 * variance + 0.001 * gradient.square()
            root = (variance / (1 - 0.999 ** (look + 1))).sqrt() + 1e-8
            moved = delta - config.learning_rate * mean / (1 - 0.9 ** (look + 1)) / root
            share = (config.clamp * start.norm(dim=1) / moved.norm(dim=1).clamp_min(1e-30)).clamp_max(1.0)
            delta = torch.where(ended.unsqueeze(1), delta, moved * share.unsqueeze(1))
    raise AssertionError


def test_the_default_search_is_the_published_one_bit_for_bit(seed):
    anatomy = Anatomy(tiny_model("llama", seed))
    config = TargetConfig(steps=9, stop_loss=-1.0)  # nobody leaves: products of the same shape
    with frozen(anatomy.model):
        found = _optimise(rows_of(anatomy), config)[0]
        assert torch.equal(found.delta, published(rows_of(anatomy), config))


def test_adam_is_torchs(seed):
    like = torch.zeros(3, 5, dtype=torch.float64)
    own, theirs = Adam([like], 0.1), torch.nn.Parameter(like.clone())
    optimiser, delta = torch.optim.Adam([theirs], lr=0.1), like
    for _ in range(6):
        theirs.grad = torch.randn_like(like)
        (delta,) = own.move([delta], [theirs.grad], like[:, 0], [like[:, 0]])
        optimiser.step()
        torch.testing.assert_close(delta, theirs.detach(), rtol=1e-9, atol=1e-12)


def test_requests_that_leave_take_their_state_along(seed):
    like = torch.zeros(3, 5, dtype=torch.float64)
    gradients, left = torch.randn(4, 3, 5, dtype=torch.float64), torch.tensor([0, 2])
    whole, part = Adam([like], 0.1), Adam([like], 0.1)
    for gradient in gradients[:2]:
        for one in (whole, part):
            one.move([like], [gradient], like[:, 0], [like[:, 0]])
    part.keep_requests(left)
    (moved,) = whole.move([like], [gradients[2]], like[:, 0], [like[:, 0]])
    (few,) = part.move([like[left]], [gradients[2][left]], like[left, 0], [like[left, 0]])
    assert torch.equal(moved[left], few)


def test_a_straight_line_is_at_its_floor_in_one_step_and_no_step_goes_too_far():
    """nll = 5 − 3 δ₁ − 4 δ₂ is 0 at (.6, .8); with a clamp of 1 the step ends at half of that."""
    gradient, nll = torch.tensor([[-3.0, -4.0]]), torch.tensor([5.0])
    for bound, reached in ((100.0, 1.0), (1.0, FARTHEST)):
        (moved,) = Polyak().move([torch.zeros(1, 2)], [gradient], nll, [torch.tensor([bound])])
        torch.testing.assert_close(moved, reached * torch.tensor([[0.6, 0.8]]))


def test_two_places_share_one_step():
    """nll = 5 − 3 δ − 4 ε, a place each, is at 0 with δ = .6 and ε = .8; each keeps to its own clamp."""
    gradients, nll, zero = (
        [torch.tensor([[-3.0]]), torch.tensor([[-4.0]])],
        torch.tensor([5.0]),
        torch.zeros(1, 1),
    )
    wide = Polyak().move([zero, zero], gradients, nll, [torch.tensor([9.0])] * 2)
    assert [float(d) for d in wide] == pytest.approx([0.6, 0.8])
    tight = Polyak().move([zero, zero], gradients, nll, [torch.tensor([9.0]), torch.tensor([0.8])])
    assert [float(d) for d in tight] == pytest.approx([0.3, 0.4])


def test_a_convex_loss_with_floor_0_ends_where_scipy_ends_and_comes_nearer_each_step(seed):
    """½ ‖M δ − b‖² with fewer equations than unknowns, a request each: both stay in the span of the rows of M."""
    matrix = torch.linalg.qr(torch.randn(2, 6, 3, dtype=torch.float64)).Q.mT
    matrix = matrix * (1 + torch.rand(2, 3, 1, dtype=torch.float64))  # singular values from 1 to 2
    right = torch.randn(2, 3, dtype=torch.float64)
    delta, wide = torch.zeros(2, 6, dtype=torch.float64), [torch.full((2,), 1e6, dtype=torch.float64)]
    least = [
        minimize(
            lambda d, m=m, b=b: (0.5 * ((m @ d - b) ** 2).sum(), m.T @ (m @ d - b)),
            [0.0] * 6,
            jac=True,
            tol=1e-14,
        ).x
        for m, b in zip(matrix.numpy(), right.numpy(), strict=True)
    ]
    answer = torch.tensor([list(x) for x in least], dtype=torch.float64)
    away = (delta - answer).norm(dim=1)
    for _ in range(400):
        error = (matrix @ delta.unsqueeze(2)).squeeze(2) - right
        gradient = (matrix.mT @ error.unsqueeze(2)).squeeze(2)
        (delta,) = Polyak().move([delta], [gradient], 0.5 * error.square().sum(1), wide)
        nearer = (delta - answer).norm(dim=1)
        assert (nearer <= away + 1e-6).all()
        away = nearer
    torch.testing.assert_close(delta, answer, rtol=1e-4, atol=1e-4)
