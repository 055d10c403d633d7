"""The compiled operations, on CPU and CUDA tensors: the only door to `d4s.ops._C`. Each docstring states the
plain-torch equal; `d4s.ops.reference` holds it as code.

Tensors are dense, and their elements lie in memory. Any other (sparse, mkldnn, nested, quantised, meta, fake, a
subclass that computes in Python, one that torch.func follows, one whose storage was freed) is a D4SError."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from d4s.errors import ExtensionError
from d4s.ops.float32 import whole_products


def _release(version: str) -> list[str]:
    """'2.13.0+cpu' → ['2', '13']: within one minor release the C++ interface of torch does not change."""
    return version.split("+")[0].split(".")[:2]


# Build isolation hides a torch on PYTHONPATH from the build, which then fetches one of its own.
_CURE = (
    "'pip install --no-build-isolation .', with setuptools>=77, cmake and ninja installed, "
    "builds against this torch in any case"
)

try:
    from d4s.ops import _C
except ImportError as error:
    # Where there is no such file Python speaks of a circular import.
    reason = "it is not built" if "partially initialized" in str(error) else error
    raise ExtensionError(
        f"the compiled extension d4s.ops._C does not load ({reason}); run 'pip install .' in the d4s checkout, "
        f"with the torch {torch.__version__} of this environment in place; {_CURE}"
    ) from error
if _release(_C.torch_version) != _release(torch.__version__):
    raise ExtensionError(
        f"d4s.ops._C was built against torch {_C.torch_version}, and this is torch {torch.__version__}; "
        f"in the d4s checkout {_CURE}"
    )


def accumulate_key_covariance_(moment: Tensor, keys: Tensor, mask: Tensor | None = None) -> int:
    """Add Σ k kᵀ to the lower triangle of a sum; equal to `moment += tril(k.T @ k)` with `k = keys[mask]`.

    moment: [d, d], float32 | float64, contiguous; changed in place. Products and sums are of its type.
    keys:   [batch, tokens, d] or [n, d], float32 | float16 | bfloat16 (float64 with a float64 moment)
    mask:   [batch, tokens] or [n], bool, True where a key counts; None: all do

    Above the diagonal `moment` holds nothing of use until `symmetrize_` mirrors it, once, after the last
    call. Gathering the masked rows and up-casting them is part of the same pass, but for bfloat16 keys and a
    float32 moment on Hopper GPUs and later, which are multiplied by cuBLAS: masked rows are copied there, and a
    product of [1024, d] float32 is held. Returns the number of keys
    added; on CUDA a mask costs one wait for the device, since the number is counted there. There tensor cores
    add up 16-bit keys for a float32 moment and cut what does not fit: a relative error of up to n · 2⁻²⁶.
    Raises D4SError if shapes, types or devices do not fit.
    """
    with whole_products(moment.dtype, moment.device):
        return _C.accumulate_key_covariance_(moment, keys, mask)


def symmetrize_(matrix: Tensor) -> Tensor:
    """Mirror the lower triangle into the upper; equal to `matrix.copy_(matrix.tril() + matrix.tril(-1).T)`.

    matrix: [d, d], float32 | float64, contiguous; changed in place and returned.
    Raises D4SError if it is not square, not contiguous, or of another type.
    """
    _C.symmetrize_(matrix)
    return matrix


def closed_form(residual_sum: Tensor, key_sum: Tensor, prior: Tensor) -> Tensor:
    """Δ = A (B + λC)⁻¹ for m layers, by Cholesky; equal to `linalg.solve(B + λC, A.mT).mT` up to rounding.

    residual_sum: A = Σ r kᵀ, [m, d_out, d_in], float64 | float32
    key_sum:      B = Σ k kᵀ, [m, d_in, d_in], of the same type; the lower triangle is read
    prior:        λC, [m, d_in, d_in], of the same type; the lower triangle is read

    Returns Δ [m, d_out, d_in]. Source: arXiv 2210.07229, eq. 14; arXiv 2410.23843.
    Raises NotPositiveDefiniteError, naming the layer's index among the m, if B + λC has no Cholesky factor or
    holds NaN; D4SError if shapes, types or devices do not fit.
    """
    with whole_products(prior.dtype, prior.device):
        return _C.closed_form(residual_sum, key_sum, prior)


def write_back_(
    weight: Tensor, base: Tensor, delta: Tensor, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """W = round(W0 + Δ), rounded once, with two norms of the result.

    Equal, bit for bit, to `weight.copy_((base.double() + delta.double()).to(weight.dtype))`.

    weight: [d_out, d_in], or [d_in, d_out] if `transposed` (GPT-2's Conv1D); changed in place.
            float64 | float32 | float16 | bfloat16, dense along its rows or its columns
    base:   W0, of the same shape and type
    delta:  Δ, [d_out, d_in], float64 | float32, any strides

    Returns Σ|W| and Σ(W − W0)² of the rounded values, as they are stored: two float64 scalars on the
    weight's device, taken in the same pass over memory and the same in every run on the same device.
    Raises D4SError if shapes, types or devices do not fit.
    """
    return _C.write_back_(weight, base, delta, transposed)


def l1_norms(weights: Sequence[Tensor]) -> Tensor:
    """Sum of absolute values of each weight; equal to `stack([w.double().abs().sum() for w in weights])`.

    To rounding in float64; of bfloat16 on a CPU to 2⁻²³, since numbers are added in float32 by fours.

    weights: any shapes and strides, one device, float64 | float32 | float16 | bfloat16
    Returns [len(weights)], float64, the same in every run on the same device.
    Raises D4SError, naming the weight's index, if a weight is not floating point, or the devices differ.
    """
    return _C.l1_norms(list(weights))
