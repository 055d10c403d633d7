"""Tensors that the compiled ops must refuse, each given as every argument of every op: what a tensor can be
other than a dense one of a known type in the memory of the CPU or of a CUDA device.

    python foreign_tensors.py

prints every case before it runs and what came of it. Each op has a process of its own: where the check has a
hole, it is the process that ends.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from d4s import ops
from d4s.errors import D4SError

FLOATING = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


class Wrapper(Tensor):
    """A subclass without memory, as distributed and quantised tensors are."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    @classmethod
    def __torch_dispatch__(cls, *call):
        return NotImplemented


class ComputedInPython(Wrapper):
    """A subclass with memory."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        return Tensor._make_subclass(cls, inner)


def resized(elements: int, like: Tensor) -> Tensor:
    """Of a storage that was made smaller since; of none, as sharded parameters are between uses."""
    tensor = like.clone()
    tensor.untyped_storage().resize_(elements * like.element_size())
    return tensor


def misaligned(like: Tensor) -> Tensor:
    if like.element_size() == 1:
        raise TypeError("a byte lies well everywhere")
    memory = bytearray(like.numel() * like.element_size() + 1)
    return torch.frombuffer(memory, dtype=like.dtype, offset=1).view(like.shape)


def compressed(layout: torch.layout, block: tuple[int, int] | None, like: Tensor) -> Tensor:
    return like.to_sparse(layout=layout, blocksize=block)


# From a tensor that the op takes to one that it must refuse.
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": Tensor.to_sparse,
    "csr": partial(compressed, torch.sparse_csr, None),
    "csc": partial(compressed, torch.sparse_csc, None),
    "bsr": partial(compressed, torch.sparse_bsr, (2, 2)),
    "bsc": partial(compressed, torch.sparse_bsc, (2, 2)),
    "mkldnn": Tensor.to_mkldnn,
    "nested": lambda like: torch.nested.nested_tensor([like[0], like[1]]),
    "jagged": lambda like: torch.nested.nested_tensor([like, like], layout=torch.jagged),
    "meta": lambda like: like.to("meta"),
    "fake": lambda like: FakeTensorMode().from_tensor(like),
    "zeros without memory": lambda like: torch._efficientzerotensor(like.shape, dtype=like.dtype),
    "a wrapper": Wrapper,
    "computed in Python": ComputedInPython,
    "functional": torch._to_functional_tensor,
    "emptied": partial(resized, 0),
    "cut": partial(resized, 3),
    "quantised": lambda like: torch.quantize_per_tensor(like.float(), 0.1, 0, torch.qint8),
    **{
        str(value): partial(torch.empty_like, dtype=value)
        for value in vars(torch).values()
        if isinstance(value, torch.dtype) and value not in FLOATING
    },
    "misaligned": misaligned,
}
# What runs a function of one tensor with another one in its place.
TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], object]] = {
    "vmap": lambda run, like: torch.vmap(run)(torch.stack([like, like])),
    "grad": lambda run, like: torch.func.grad(run)(like),
    "functionalize": lambda run, like: torch.func.functionalize(run)(like),
}


def arguments_that_fit() -> dict[str, dict[str, Tensor]]:
    """Of every op, newly made."""
    zeros, ones = torch.zeros(8, 8), torch.ones(8, 8)
    return {
        "accumulate_key_covariance_": dict(moment=zeros, keys=ones, mask=ones[0] == 1),
        "symmetrize_": dict(matrix=zeros),
        "closed_form": dict(residual_sum=ones[None], key_sum=zeros[None], prior=torch.eye(8)[None]),
        "write_back_": dict(weight=zeros, base=ones, delta=ones.clone()),
        "l1_norms": {"weights[0]": ones, "weights[1]": ones[0]},
    }


def call(op: str, arguments: dict[str, Tensor]) -> object:
    if op == "l1_norms":
        return ops.l1_norms(list(arguments.values()))
    return getattr(ops, op)(**arguments)


def cases(op: str) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Argument, kind and call; leaves out kinds that there are not of a shape or a type."""
    plain = arguments_that_fit()[op]
    for argument, like in plain.items():

        def run(foreign: Tensor, argument: str = argument) -> Tensor:
            call(op, {**plain, argument: foreign})
            return foreign.sum()

        for kind, make in KINDS.items():
            try:
                foreign = make(like)
            except (RuntimeError, TypeError, IndexError):
                continue
            if foreign.dtype != like.dtype or not kind.startswith("torch."):
                yield argument, kind, partial(run, foreign)
        for kind, transform in TRANSFORMS.items():
            if kind != "grad" or like.is_floating_point():
                yield argument, kind, partial(transform, run, like)


def try_all(op: str) -> None:
    call(op, arguments_that_fit()[op])
    for argument, kind, refused in cases(op):
        print(f"{op}: {argument}, {kind}:", end=" ", flush=True)
        try:
            refused()
            print("taken")
        except D4SError as error:
            print("refused" if argument in str(error) and "\n" not in str(error) else f"unclear, {error}")
        except Exception as error:
            print(type(error).__name__, str(error).splitlines()[0])
    print(f"{op}: done", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of prototypes, and of what torch is to lose
    KINDS["jagged"](torch.ones(2, 2))  # imports half of torch, once for all processes
    for op in arguments_that_fit():
        child = os.fork()
        if child == 0:
            try_all(op)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if status != 0:
            print(f"the process ended with {os.waitstatus_to_exitcode(status)}", flush=True)
