"""Configurations that say what is wrong with them: every field's value is checked against its type and its bounds.

A field declares its bounds beside its meaning, and nowhere else:

    steps: Annotated[int, "of the search, at most", AtLeast(1)] = 25
    epsilon: Annotated[float, "weight of the norm", Above(0, "0 would be ROME")] = 0.1
    share: Annotated[float, "of the texts that must agree", AtLeast(0), Below(1)] = 0.7
    layers: Annotated[tuple[int, ...], "whose W is changed", Length(1, "one layer is changed")]
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from d4s.errors import ConfigError

# The most that a count may be, in whichever configuration it stands: beyond it a run would not end, or not begin.
MOST = {"contexts": 1_000, "context_lengths": 1_000, "steps": 100_000, "stop_after_argmax": 100_000}
_LONGEST = 100  # characters of a value that an error repeats

_CALLED = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    NoneType: "none",
}


@dataclass(frozen=True)
class Bound(ABC):
    """What a field's value must keep to: a number itself, of a list each item. None is bound by nothing.

    why: said behind the bound, where it is no matter of course
    """

    limit: float
    why: str = ""

    @abstractmethod
    def holds(self, number: float) -> bool: ...

    @abstractmethod
    def words(self) -> str:
        """What follows "must be"."""

    def broken_by(self, value: Any) -> bool:
        numbers = value if isinstance(value, tuple) else (value,)
        return not all(self.holds(number) for number in numbers if isinstance(number, int | float))


class AtLeast(Bound):
    def holds(self, number: float) -> bool:
        return number >= self.limit

    def words(self) -> str:
        return f"{self.limit:,} or more"


class Above(Bound):
    def holds(self, number: float) -> bool:
        return number > self.limit

    def words(self) -> str:
        return "positive" if self.limit == 0 else f"above {self.limit:,}"


class AtMost(Bound):
    def holds(self, number: float) -> bool:
        return number <= self.limit

    def words(self) -> str:
        return f"at most {self.limit:,}"


class Below(Bound):
    def holds(self, number: float) -> bool:
        return number < self.limit

    def words(self) -> str:
        return f"below {self.limit:,}"


class Length(Bound):
    """Of a list: how many items it holds."""

    def holds(self, number: float) -> bool:
        return number == self.limit

    def words(self) -> str:
        return f"a list of {self.limit}"

    def broken_by(self, value: Any) -> bool:
        return isinstance(value, tuple) and not self.holds(len(value))


class Configuration:
    """Base of frozen dataclasses that hold a configuration.

    `__post_init__` raises ConfigError, with the class, the field, its value and what would be right. A subclass whose
    fields must fit each other says that in its own, and calls this one first.
    """

    def __post_init__(self) -> None:
        what = getattr(self, "name", type(self).__name__)
        hints = _hints(type(self))  # type: ignore[arg-type]
        for field in fields(self):  # type: ignore[arg-type]
            value, hint = getattr(self, field.name), hints[field.name]
            if not _fits(value, hint):
                raise ConfigError(f"{what}: {field.name} is {_spelled(value)}, must be {_called(hint)}")
            for bound in _bounds(field.name, hint):
                if bound.broken_by(value):
                    why = f" ({bound.why})" if bound.why else ""
                    raise ConfigError(
                        f"{what}: {field.name} is {_spelled(value)}, must be {bound.words()}{why}"
                    )

    def as_known_to(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """`asdict`, to be compared with that of an earlier version: without fields that it lacks and that are at their
        default, at which a new field changes nothing.
        """
        told = asdict(self)  # type: ignore[call-overload]
        for field in fields(self):  # type: ignore[arg-type]
            name, value = field.name, getattr(self, field.name)
            if isinstance(value, Configuration) and isinstance(stored.get(name), Mapping):
                told[name] = value.as_known_to(stored[name])
            elif name not in stored and (
                value == field.default
                or (field.default_factory is not MISSING and value == field.default_factory())
            ):
                del told[name]
        return dict(told)


def _bounds(name: str, hint: Any) -> Iterator[Bound]:
    """Those that the field declares, and the one that goes with its name."""
    yield from (said for said in getattr(hint, "__metadata__", ()) if isinstance(said, Bound))
    if name in MOST:
        yield AtMost(MOST[name])


def _spelled(value: Any) -> str:
    """As Python writes it, cut where it is long; a number of thousands of digits cannot be written at all."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return "a value too long to be written"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


@cache
def sequence_fields(cls: type) -> frozenset[str]:
    """The fields that hold several values, as tuples."""
    return frozenset(name for name, hint in _hints(cls).items() if _takes_tuples(hint))


def _takes_tuples(hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _takes_tuples(arguments[0])
    return origin is tuple or (origin in (Union, UnionType) and any(map(_takes_tuples, arguments)))


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _fits(value, arguments[0])
    if origin in (Union, UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return any(type(value) is type(argument) and value == argument for argument in arguments)
    if origin is tuple:  # tuple[X, ...]
        return isinstance(value, tuple) and all(_fits(item, arguments[0]) for item in value)
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        try:
            return math.isfinite(value)
        except OverflowError:  # a whole number beyond what a float holds
            return False
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _called(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _called(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join(_called(argument) for argument in arguments)
    if origin is Literal:
        return " or ".join(repr(argument) for argument in arguments)
    if origin is tuple:
        return f"a list, each of it {_called(arguments[0])}"
    return str(_CALLED.get(hint, f"a {getattr(hint, '__name__', hint)}"))
