"""Configurations that say what is wrong with them: every field's value is checked against its type."""

from __future__ import annotations

import math
from dataclasses import fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

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


class Configuration:
    """Base of frozen dataclasses that hold a configuration.

    `__post_init__` raises ConfigError, with the class, the field, its value and what would be right. A subclass with
    limits of its own calls it first.
    """

    def __post_init__(self) -> None:
        hints = _hints(type(self))  # type: ignore[arg-type]
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            what = getattr(self, "name", type(self).__name__)
            if not _fits(value, hints[field.name]):
                raise ConfigError(
                    f"{what}: {field.name} is {_spelled(value)}, must be {_called(hints[field.name])}"
                )
            most = MOST.get(field.name, math.inf)
            for count in value if isinstance(value, tuple) else (value,):
                if isinstance(count, int) and count > most:
                    raise ConfigError(f"{what}: {field.name} is {_spelled(value)}, must be at most {most:,}")


def _spelled(value: Any) -> str:
    """As Python writes it, cut where it is long; a number of thousands of digits cannot be written at all."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return "a value too long to be written"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
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
    if origin in (Union, UnionType):
        return " or ".join(_called(argument) for argument in arguments)
    if origin is Literal:
        return " or ".join(repr(argument) for argument in arguments)
    if origin is tuple:
        return f"a list, each of it {_called(arguments[0])}"
    return str(_CALLED.get(hint, f"a {getattr(hint, '__name__', hint)}"))
