"""How exactly float32 matrix products are taken, for as long as a block of code runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch

Precision = Literal["float32", "reduced"]


@contextmanager
def products_in(precision: Precision, device: torch.device) -> Iterator[None]:
    """float32 products as they are, or reduced: in bfloat16 with float32 sums on a CPU that has instructions for it
    (AMX or AVX512-BF16; others, and torch before 2.9, take them as they are), in TF32 on a GPU.

    A product is then off by about 2e-3 of its size on a CPU and 5e-4 on a GPU. What the backend was set to comes back
    at the end, after an error too. The setting is the process's: other threads' products are reduced as well meanwhile.
    """
    if precision == "float32":
        yield
        return
    if device.type == "cuda":
        backend: Any = torch.backends.cuda.matmul
        name, reduced = "allow_tf32", cast("bool | str", True)
        if hasattr(backend, "fp32_precision"):
            name, reduced = "fp32_precision", "tf32"
    else:
        backend, name, reduced = getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", "bf16"
    if not hasattr(backend, name):
        yield
        return
    before = getattr(backend, name)
    setattr(backend, name, reduced)
    try:
        yield
    finally:
        setattr(backend, name, before)
