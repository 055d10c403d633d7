"""Δ of an edited weight as few factors: what its rank is, and how far a product of fewer is from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Factors:
    """Δ = U diag(singular) Vᵀ in float64, by its first `rank` singular vectors and all singular values, largest first.

    u [d_out, rank], singular [rank or more], vt [rank, d_in]
    rank: how many singular values are more than rounding; of a Δ that is all below it, 1
    """

    u: Tensor
    singular: Tensor
    vt: Tensor

    @property
    def rank(self) -> int:
        return len(self.vt)

    def halves(self, rank: int) -> tuple[Tensor, Tensor]:
        """(left [d_out, rank], right [rank, d_in]), float64, each with the roots of the singular values."""
        root = self.singular[:rank].sqrt()
        return self.u[:, :rank] * root, root[:, None] * self.vt[:rank]

    def missing(self, rank: int) -> tuple[float, float]:
        """(‖·‖_F, ‖·‖₂) of what the first `rank` leave out, as shares of Δ's own."""
        if not float(self.singular[0]):
            return 0.0, 0.0
        rest = self.singular[rank:]
        spectral = float(rest[0] / self.singular[0]) if len(rest) else 0.0
        return float(rest.norm() / self.singular.norm()), spectral


def factors_of_product(left: Tensor, right: Tensor) -> Factors:
    """Of Δ = left right, [d_out, r] and [r, d_in] in float64, by two QRs and an SVD of [r, r]."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, singular, vt = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    floor = max(len(left), right.shape[1]) * torch.finfo(torch.float64).eps * float(singular[0])
    return _above(floor, q_left @ u, singular, vt @ q_right.T)


def factors_of_matrix(delta: Tensor, rounding: float) -> Factors:
    """Of Δ [d_out, d_in], float64, that holds what rounding has added. rounding: the largest ‖·‖₂ of that"""
    return _above(rounding, *torch.linalg.svd(delta, full_matrices=False))


def _above(floor: float, u: Tensor, singular: Tensor, vt: Tensor) -> Factors:
    rank = max(1, int((singular > floor).sum()))
    return Factors(u[:, :rank].clone(), singular, vt[:rank].clone())
