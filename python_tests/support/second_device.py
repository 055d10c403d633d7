"""A second device where there is only a CPU: tensors that say they are on cpu:0, and refuse others beside them.

Values are computed by the CPU, with the bits they would have there. As on a GPU, an operation whose tensors are on two
devices is an error; a number without dimensions and an index may come from the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

from d4s import ops
from d4s.models import architectures, readiness
from d4s.models.architectures import Anatomy
from d4s.ops import reference

FIRST, SECOND = torch.device("cpu"), torch.device("cpu:0")
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
MOVING = {"aten::_to_copy", "aten::copy_"}


class Elsewhere(Tensor):
    """A tensor on the second device. held: its values"""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=SECOND,
        )
        made.held = held
        return made

    @property
    def data(self) -> Any:
        return self.detach()

    @data.setter
    def data(self, other: Any) -> None:
        self.held = other.held

    def tolist(self) -> Any:
        return self.held.tolist()

    def cpu(self, *_: Any, **__: Any) -> Tensor:  # type: ignore[override]
        """torch itself takes a tensor of any CPU for one that is there already."""
        return self.to(FIRST)

    def new_tensor(self, data: Any) -> Tensor:  # type: ignore[override]
        return Elsewhere(self.held.new_tensor(data))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class TwoDevices(TorchDispatchMode):
    """Inside, tensors can be made on and moved to both."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    given = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
    away = any(isinstance(one, Elsewhere) for one in given)
    if kwargs.get("device") is not None:
        away = torch.device(kwargs["device"]) == SECOND
        kwargs = kwargs | {"device": FIRST}
    elif name == "aten::copy_":
        away = isinstance(args[0], Elsewhere)
    if name not in MOVING:
        seen = [args[0]] if name in INDEXING else given
        if name in INDEXING and not away:
            seen = given
        places = {type(one) is Elsewhere for one in seen if one.ndim and one.numel()}
        if len(places) > 1:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found cpu and cpu:0")
        if (
            name in INDEXING
            and isinstance(args[0], Elsewhere) is False
            and any(isinstance(one, Elsewhere) for one in given)
        ):
            raise RuntimeError(f"{name}: indices on cpu:0 of a tensor on cpu")

    plain = tree_map(lambda one: one.held if isinstance(one, Elsewhere) else one, (args, kwargs))
    found = func(*plain[0], **plain[1])
    if not away:
        return found
    own = {id(one.held): one for one in given if isinstance(one, Elsewhere)}
    wrapped = tree_map(lambda one: own.get(id(one), _away(one)), found)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if given else wrapped


def _away(value: Any) -> Any:
    return Elsewhere(value) if isinstance(value, Tensor) and not isinstance(value, Elsewhere) else value


def spread(model: Any, modules: Iterable[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts these modules on the second device, and lets accelerate's hooks move what runs through the model.

    The compiled ops read memory, which such tensors have none of: their plain twins take their place.
    """
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    class Hook(AlignDevicesHook):
        def init_hook(self, module: nn.Module) -> nn.Module:  # everything is in its place
            return module

    block = type(Anatomy(model).blocks[0])
    away = {id(part) for module in modules for part in module.modules()}
    for module in model.modules():
        if id(module) in away:
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    wrapped = nn.Parameter(Elsewhere(parameter.data), requires_grad=parameter.requires_grad)
                    module._parameters[name] = wrapped
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = Elsewhere(buffer)
    skipped = getattr(model, "_skip_keys_device_placement", None)
    for module in model.modules():
        if not list(module.children()) or id(module) in away or isinstance(module, block):
            place = SECOND if id(module) in away else FIRST
            add_hook_to_module(module, Hook(execution_device=place, skip_keys=skipped))
    add_hook_to_module(model, Hook(execution_device=FIRST, io_same_device=True, skip_keys=skipped))
    plain_ops(monkeypatch)
    for place in (architectures, readiness):
        monkeypatch.setattr(place, "check_bare", lambda _model: None)


def plain_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain twins in place of the compiled ops."""
    for name, own in vars(reference).items():
        if isinstance(own, Callable) and hasattr(ops, name) and own.__module__ == reference.__name__:  # type: ignore[arg-type]
            monkeypatch.setattr(ops, name, own)
