"""Hooks as context managers: what went into a module and what came out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from d4s.models.causal_lm import CausalLM


class _Stop(Exception):
    """Ends a forward pass after the last module that is of interest. Never leaves `stopping`."""


def first_tensor(value: Any) -> Tensor:
    """A module's output, or the first element where it returns a tuple."""
    return value[0] if isinstance(value, tuple) else value


class Trace:
    """`with Trace(module) as t: model(...)`; then `t.input` and `t.output` hold the last call's tensors.

    stop: end the forward pass after this module (run the model under `stopping()`).
    edit: a function output -> output that replaces what the module returns.
    copied: keep a copy of the output; Falcon's blocks add to what their modules return where it lies.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        stop: bool = False,
        edit: Callable[[Tensor], Tensor] | None = None,
        copied: bool = False,
    ) -> None:
        self.module, self.stop, self.edit, self.copied = module, stop, edit, copied
        self.input: Tensor
        self.arguments: tuple[Any, ...]  # all that the module was called with, in order
        self.output: Tensor
        self.returned: Any = None  # the whole output, as the module returned it

    def __enter__(self) -> Trace:
        self._handle = self.module.register_forward_hook(self._hook, with_kwargs=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._handle.remove()

    def _hook(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        self.arguments = (*args, *kwargs.values())
        self.input = self.arguments[0]
        if self.edit is not None:
            changed = self.edit(first_tensor(output))
            output = (changed, *output[1:]) if isinstance(output, tuple) else changed
        self.output, self.returned = first_tensor(output), output
        if self.copied:
            self.output = self.output.clone()
        if self.stop:
            raise _Stop
        return output


@contextmanager
def stopping() -> Iterator[None]:
    """Swallows the end of a forward pass that a `Trace(…, stop=True)` inside has brought about."""
    with suppress(_Stop):
        yield


@contextmanager
def replaced_forward(replacements: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Each module returns what its function returns; its own code does not run."""
    saved = {module: module.__dict__.get("forward") for module in replacements}
    try:
        for module, function in replacements.items():
            module.__dict__["forward"] = function
        yield
    finally:
        for module, own in saved.items():
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own


@contextmanager
def head_reads(model: CausalLM, rows: Tensor, positions: Tensor) -> Iterator[bool]:
    """The output head sees hidden[rows, positions] as one sequence: logits come out [1, len(rows), vocabulary].

    Soft-caps and scales after the head stay the model's business. Yields False where the model names no head, and
    nothing is done.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        yield False
        return

    def gather(_head: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = arguments[0]
        return (hidden[rows.to(hidden.device), positions.to(hidden.device)].unsqueeze(0), *arguments[1:])

    handle = head.register_forward_pre_hook(gather)
    try:
        yield True
    finally:
        handle.remove()
