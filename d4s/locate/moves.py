"""How δ moves from one look at its loss to the next: a request a row, each with a state of its own.

Adam (arXiv 1412.6980), as the published searches use it, with β = (.9, .999) and ε = 1e-8. And steps of a length that
the loss itself gives, as Polyak's (Introduction to Optimization, 1987): −log p of the target is known to end near 0, so
that along a direction s with slope gᵀs the step −(nll / gᵀs) s would bring it there, were it a straight line. It has no
learning rate; what bends the line is held by `FARTHEST`. Once p is near 1 the loss falls as e^−margin, and so does its
slope: the step then keeps its length, and each look takes the NLL down by about a factor e.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

FARTHEST = 0.5  # of the clamp's radius: the most that one of Polyak's steps goes


class Moves(ABC):
    """The state of a search's moves; deltas and gradients are those of its places, [requests, d_model] each."""

    @abstractmethod
    def move(
        self,
        deltas: Sequence[Tensor],
        gradients: Sequence[Tensor],
        nll: Tensor,
        bounds: Sequence[Tensor],
    ) -> list[Tensor]:
        """Where the deltas go, before they are clamped.

        nll: of the target, at these deltas [requests]; bounds: radius of the clamp of each place [requests]
        """

    @abstractmethod
    def keep_requests(self, left: Tensor) -> None:
        """Drops the state of all requests but those at `left` (ascending)."""


class Adam(Moves):
    def __init__(self, like: Sequence[Tensor], learning_rate: float) -> None:
        self.learning_rate, self.number = learning_rate, 0
        self.mean = [torch.zeros_like(s) for s in like]
        self.variance = [torch.zeros_like(s) for s in like]

    def move(
        self,
        deltas: Sequence[Tensor],
        gradients: Sequence[Tensor],
        nll: Tensor,
        bounds: Sequence[Tensor],
    ) -> list[Tensor]:
        self.number += 1
        moved = []
        for p, (delta, gradient) in enumerate(zip(deltas, gradients, strict=True)):
            self.mean[p] = 0.9 * self.mean[p] + 0.1 * gradient
            self.variance[p] = 0.999 * self.variance[p] + 0.001 * gradient.square()
            root = (self.variance[p] / (1 - 0.999**self.number)).sqrt() + 1e-8
            moved.append(delta - self.learning_rate * self.mean[p] / (1 - 0.9**self.number) / root)
        return moved

    def keep_requests(self, left: Tensor) -> None:
        self.mean, self.variance = [m[left] for m in self.mean], [v[left] for v in self.variance]


class Polyak(Moves):
    """Along the gradient of all places together, for the share of NLL that it has to lose."""

    def move(
        self,
        deltas: Sequence[Tensor],
        gradients: Sequence[Tensor],
        nll: Tensor,
        bounds: Sequence[Tensor],
    ) -> list[Tensor]:
        square = torch.stack([g.square().sum(1) for g in gradients]).sum(0)
        length = nll / square.clamp_min(1e-30)  # times the gradient
        for gradient, bound in zip(gradients, bounds, strict=True):
            farthest = FARTHEST * bound / gradient.norm(dim=1).clamp_min(1e-30)
            length = torch.minimum(length, farthest)
        return [d - length.unsqueeze(1) * g for d, g in zip(deltas, gradients, strict=True)]

    def keep_requests(self, left: Tensor) -> None:
        """It remembers nothing."""
