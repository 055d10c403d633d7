"""A pass over a model that is made again and again with other numbers, recorded once as a CUDA graph.

A small model's pass keeps a GPU waiting for Python: over a thousand kernels of a few microseconds, each launched by
itself. A recorded one is launched as one. Recording costs about what one pass does, and nothing is computed by it.

A pass can be recorded that waits for the device nowhere, and whose shapes no number decides. Most models of
transformers have such; the others say so by an error, and are run as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from d4s.models.causal_lm import CausalLM

logger = logging.getLogger("d4s.models.recorded")

# Models whose passes could not be recorded, or gave other numbers; gone with the model.
_REFUSED: WeakKeyDictionary[CausalLM, bool] = WeakKeyDictionary()


class Recorded:
    """A function of some tensors, all on one GPU, as it ran once. There is one at a time: they share memory.

    function: takes as many tensors as `inputs`, and gives tensors; something like it must have run before, so that
        nothing in it is set up for the first time
    inputs: of the shapes and types that all later ones have

    What a call gives is overwritten by the next one.
    Raises RuntimeError for a function that waits for the device.
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> None:
        self.function = function  # keeps the other tensors whose addresses the graph has
        self.inputs = [one.detach().clone() for one in inputs]
        device = self.inputs[0].device
        self.graph, self.outputs = _record(
            lambda: function(*self.inputs), device, _pool(device.index or 0)[0]
        )

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given.detach())
        self.graph.replay()
        return self.outputs


def is_refused(model: CausalLM) -> bool:
    """Whether the model's passes are known to be launched kernel by kernel."""
    return _REFUSED.get(model, False)


def recorded(
    model: CausalLM, function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]
) -> Recorded | None:
    """The function of a model, recorded; None: it cannot be, or not in the memory that there is.

    A model's first recording is run with `inputs`, and taken if it gives what the function does.
    """
    if is_refused(model):
        return None
    right, found, why = None, None, ""
    try:
        if model not in _REFUSED:
            right = [one.clone() for one in function(*inputs)]
        found = Recorded(function, inputs)
    except torch.OutOfMemoryError:
        pass
    except RuntimeError as error:
        why = str(error).splitlines()[0]
    if found is None:  # outside the handlers, whose tracebacks hold the tensors of the pass
        _recover(inputs[0].device)
        if why:
            _refuse(model, why)
        return None
    if right is not None:
        if not all(_is_close(one, other) for one, other in zip(found(*inputs), right, strict=True)):
            _refuse(model, "a recorded pass gives other numbers")
            return None
        _REFUSED[model] = False
    return found


def _is_close(found: Tensor, right: Tensor) -> bool:
    """Whether two runs of a pass differ by rounding alone. bool, or floating point"""
    if not right.is_floating_point():
        return found.equal(right)
    bound = 1e-3 if right.dtype in (torch.float32, torch.float64) else 2e-2
    mine, theirs = (torch.nan_to_num(one.double(), posinf=0.0, neginf=0.0) for one in (found, right))
    return bool((mine - theirs).norm() <= bound * theirs.norm())


def keep_memory() -> bool:
    """Whether recordings that are gone still keep some of a GPU's memory."""
    return _pool.cache_info().currsize > 0


def release() -> None:
    """Gives back what recordings that are gone keep of a GPU's memory, and all else that nothing uses."""
    _pool.cache_clear()
    torch.cuda.empty_cache()


def _recover(device: torch.device) -> None:
    """After a recording that failed: torch's generator stays in it until one succeeds, in other memory."""
    if device.type != "cuda":
        return
    try:
        release()
        _pool(device.index or 0)
    except RuntimeError as error:
        logger.warning("torch does not come out of a recording that failed on %s (%s)", device, error)


def _refuse(model: CausalLM, why: str) -> None:
    _REFUSED[model] = True
    logger.info("%s: its passes are launched kernel by kernel (%s)", type(model).__name__, why)


@cache
def _pool(index: int) -> tuple[Any, torch.cuda.CUDAGraph, Sequence[Tensor]]:
    """Memory that all recordings on a GPU share, one after another, and the graph that keeps it."""
    device = torch.device("cuda", index)
    pool = torch.cuda.graph_pool_handle()
    one = torch.zeros(1, device=device)
    return pool, *_record(lambda: [one + 1], device, pool)


@cache
def _stream(index: int) -> torch.cuda.Stream:
    """On which all are recorded: memory serves the stream for which it was taken."""
    return torch.cuda.Stream(index)


def _record(
    work: Callable[[], Sequence[Tensor]], device: torch.device, pool: Any
) -> tuple[torch.cuda.CUDAGraph, Sequence[Tensor]]:
    """torch.cuda.graph without its synchronisation and emptied cache, which cost more than the recording here."""
    graph = torch.cuda.CUDAGraph()
    index = device.index or 0
    own, side = torch.cuda.current_stream(device), _stream(index)
    side.wait_stream(own)
    with torch.cuda.stream(side):
        graph.capture_begin(pool=pool)
        try:
            outputs = work()
        except BaseException:
            _abandon(graph, index, pool)
            raise
        graph.capture_end()
    own.wait_stream(side)
    return graph, outputs


def _abandon(graph: torch.cuda.CUDAGraph, index: int, pool: Any) -> None:
    """Ends a recording that has failed. torch before 2.12 stays recording to its memory, and empties no cache then."""
    try:
        graph.capture_end()
    except RuntimeError:
        with suppress(RuntimeError, AttributeError):
            torch.cuda.memory._cuda_endAllocateToPool(index, pool)
            torch.cuda.memory._cuda_releasePool(index, pool)
