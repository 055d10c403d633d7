"""Plain-torch twin of every operation in `d4s.ops`: the truth in tests, the baseline in benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def accumulate_key_covariance_(moment: Tensor, keys: Tensor, mask: Tensor | None = None) -> int:
    """moment += Σ k kᵀ; see `ops.accumulate_key_covariance_`. Fills both triangles."""
    k = (keys if mask is None else keys[mask]).reshape(-1, keys.shape[-1]).to(moment.dtype)
    moment += k.T @ k
    return len(k)


def symmetrize_(matrix: Tensor) -> Tensor:
    """Mirror the lower triangle into the upper; see `ops.symmetrize_`."""
    return matrix.copy_(matrix.tril() + matrix.tril(-1).T)


def closed_form(residual_sum: Tensor, key_sum: Tensor, prior: Tensor) -> Tensor:
    """Δ = A (B + λC)⁻¹; see `ops.closed_form`."""
    return torch.linalg.solve(key_sum + prior, residual_sum.mT).mT


def write_back_(
    weight: Tensor, base: Tensor, delta: Tensor, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """W = round(W0 + Δ) with Σ|W| and Σ(W − W0)²; see `ops.write_back_`."""
    delta = delta.T if transposed else delta
    with torch.no_grad():
        weight.copy_((base.double() + delta.double()).to(weight.dtype))
        return weight.double().abs().sum(), (weight.double() - base.double()).square().sum()


def l1_norms(weights: Sequence[Tensor]) -> Tensor:
    """Σ|w| of each weight; see `ops.l1_norms`."""
    with torch.no_grad():
        sums = [w.double().abs().sum() for w in weights]
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.float64)
