"""Products of float32 numbers in float32, whatever the process has been set to take them in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def whole_products(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Products of this type are not reduced to TF32 or bfloat16, as `torch.set_float32_matmul_precision("medium")` has
    them (off by 2e-3 on a CPU): sums and solves are made of them. Other types, and other devices, are left alone.

    What the backend was set to comes back at the end, after an error too. The setting is the process's: meanwhile other
    threads' products are whole as well.
    """
    if dtype != torch.float32 or device.type not in ("cpu", "cuda"):
        yield
        return
    backend: Any = torch.backends.cuda.matmul if device.type == "cuda" else onednn()
    if hasattr(backend, "fp32_precision"):
        with set_to(backend, "fp32_precision", "ieee"):
            yield
    elif device.type == "cuda":  # before torch 2.9
        with set_to(backend, "allow_tf32", False):
            yield
    else:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def onednn() -> Any:
    """The setting of a CPU's products; None: this torch has none."""
    return getattr(torch.backends.mkldnn, "matmul", None)


@contextmanager
def set_to(backend: Any, name: str, value: str | bool) -> Iterator[None]:
    before = getattr(backend, name)
    setattr(backend, name, value)
    try:
        yield
    finally:
        setattr(backend, name, before)
