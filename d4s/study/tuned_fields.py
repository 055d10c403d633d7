"""Which fields of a method are searched, and which values of each are tried."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal, get_args, get_origin, get_type_hints

from d4s.locate.targets import TargetConfig
from d4s.methods import Method
from d4s.models.architectures import Anatomy


def other_layers(method: Method, anatomy: Anatomy) -> list[tuple[int, ...]]:
    """Fewer layers below the same last one, which share its targets; and as many that end elsewhere."""
    own: tuple[int, ...] = method.value("layers")
    many, last = len(own), own[-1]
    fewer = [own[-count:] for count in dict.fromkeys((1, (many + 1) // 2)) if count < many]
    step = max(1, round(0.1 * len(anatomy)))
    ends = [end for end in (last - step, last + step) if 0 <= end < len(anatomy)]
    return fewer + [tuple(range(max(0, end - many + 1), end + 1)) for end in ends]


def scaled(*factors: float) -> Callable[[Method, Anatomy, str], list[Any]]:
    def values(method: Method, _anatomy: Anatomy, name: str) -> list[Any]:
        own = method.value(name)
        return [] if own is None else [float(f"{factor * own:.3g}") for factor in factors]

    return values


def _counts(*counts: int) -> Callable[[Method, Anatomy, str], list[Any]]:
    def values(method: Method, _anatomy: Anatomy, name: str) -> list[Any]:
        return [count for count in counts if count != method.value(name)]

    return values


def _others(method: Method, _anatomy: Anatomy, name: str) -> list[Any]:
    """Of a field that is one of a few words, or true or false, the other ones; of others none."""
    kind = _type_of(method, name)
    known = get_args(kind) if get_origin(kind) is Literal else (False, True) if kind is bool else ()
    return [value for value in known if value != method.value(name)]


# The fields that are searched, in the order in which they are let go where time lacks, from the end. A method that
# lacks a field is not searched along it. target_stop is not there: what it brings only free text would show; nor
# prompt_weight, which goes by how many edits there are to be.
SEARCHED: dict[str, Callable[[Method, Anatomy, str], list[Any]]] = {
    "layers": lambda method, anatomy, _name: other_layers(method, anatomy),
    "context_keys": _others,
    "clamp": scaled(0.5, 2.0),
    "target_norm": _others,
    "target_eos": _others,
    "contexts": _counts(1, 0),
    "anchor": _others,
}


def _type_of(method: Method, name: str) -> Any:
    """The declared type of a field, of the method's own or its target's."""
    owner = type(method) if name in asdict(method) else TargetConfig
    return get_type_hints(owner).get(name)
