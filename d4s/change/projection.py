"""What of a change is written: its part along the main directions of the unedited weight is damped.

SPHERE (arXiv 2510.01172): ΔW ← ΔW (I − α U Uᵀ), where the columns of U are the top eigenvectors of Ŵᵀ Ŵ / d_out, Ŵ
being W with each row at unit length, as many as it takes for their eigenvalues to exceed the share β of all.

U is W0's, once for all: the map is then linear, so a sum of projected steps is the projection of their sum, and what
is kept of edits stays as it was without it.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Projection:
    """ΔW ↦ ΔW (I − α U Uᵀ) for one layer.

    weight: W0, [d_out, d_in]; strength: α, 0 to 1; share: β, 0 to 1
    """

    def __init__(self, weight: Tensor, strength: float, share: float) -> None:
        self.strength = strength
        self.directions = main_directions(weight, share)  # U, [d_in, count] float64

    def __call__(self, change: Tensor) -> Tensor:
        """change: [d_out, d_in] float64 | float32; a new tensor of its type."""
        u = self.directions.to(change)
        return change - self.strength * (change @ u) @ u.T


def main_directions(weight: Tensor, share: float) -> Tensor:
    """U, [d_in, count], orthonormal columns, float64, on the weight's device. weight: [d_out, d_in]"""
    rows = weight.detach().double()
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    # The eigenvectors of the smaller of Ŵᵀ Ŵ and Ŵ Ŵᵀ: the one's are the other's times Ŵ.
    tall = rows.shape[0] >= rows.shape[1]
    values, vectors = torch.linalg.eigh(rows.T @ rows if tall else rows @ rows.T)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    reached = values.cumsum(0) <= share * values.sum()
    count = min(int(reached.sum()) + 1, int((values > 1e-12 * values[0]).sum()))
    found = vectors[:, :count] if tall else rows.T @ vectors[:, :count]
    return torch.linalg.qr(found)[0]
