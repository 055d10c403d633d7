"""How exactly float32 matrix products are taken, for as long as a block of code runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from d4s.ops.float32 import onednn, set_to

Precision = Literal["float32", "reduced"]


@contextmanager
def products_in(precision: Precision, device: torch.device) -> Iterator[None]:
    """float32 products as they are, or reduced: in TF32 on a GPU; on a CPU, those with weights that are not trained, in
    bfloat16 with float32 sums, where it has instructions for that (AMX or AVX512-BF16; others, and torch before 2.9,
    take them as they are). What was begun in the block may be differentiated behind it.

    A product is then off by about 2e-3 of its size on a CPU and 5e-4 on a GPU. What the backend was set to comes back
    at the end, after an error too. The setting is the process's: other threads' products are reduced as well meanwhile.
    """
    if precision == "float32":
        yield
    elif device.type == "cuda":
        backend: Any = torch.backends.cuda.matmul
        new = hasattr(backend, "fp32_precision")
        with set_to(backend, "fp32_precision" if new else "allow_tf32", "tf32" if new else True):
            yield
    elif hasattr(onednn(), "fp32_precision"):
        with _ReducedProducts():
            yield
    else:
        yield


class _ReducedProducts(TorchFunctionMode):
    """Products with weights go through `_Product`. Those inside attention do not: there are many and small ones, which
    oneDNN takes fifteen times as long for in bfloat16 as torch does in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not kwargs:
            if func is functional.linear and _is_plain(*args[:2]):
                product = _product(args[0], args[1])
                return product if len(args) < 3 or args[2] is None else product + args[2]
            if func is torch.addmm and _is_plain(*args[1:3]):
                return args[0] + _product(args[1], args[2].T)
        return func(*args, **(kwargs or {}))


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    return (
        type(weight) in (Tensor, torch.nn.Parameter)
        and not weight.requires_grad
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
    )


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return cast(Tensor, _Product.apply(x, weight))


class _Product(torch.autograd.Function):
    """x weightᵀ, and in the backward pass g weight, in bfloat16. x: [..., d_in]; weight: [d_out, d_in], not trained"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        with set_to(onednn(), "fp32_precision", "bf16"):
            return functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        with set_to(onednn(), "fp32_precision", "bf16"):
            return gradient @ weight, None
