"""Errors that a user can cause. Each text says what was wrong, where, and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

_LONGEST_SHOWN = 100


class D4SError(Exception):
    """Base of every error that d4s raises on purpose."""


class EditError(D4SError, ValueError):
    """An edit that cannot be made: no subject, no target, a prompt without '{}', a contradiction."""


class DataError(D4SError, ValueError):
    """A file that cannot be read: unknown format, truncated, a wrong field. Names file, record, field."""


class ModelError(D4SError, ValueError):
    """A model that cannot be edited: unknown architecture, NaN weights, a shape that does not fit."""


class TokenizerError(D4SError, ValueError):
    """A tokenizer that cannot say where in the text a token stands."""


class CovarianceError(D4SError, ValueError):
    """Key statistics that do not belong to this model, or have the wrong size."""


class ConfigError(D4SError, ValueError):
    """An argument or configuration field that does not exist or is out of range."""


class NotPositiveDefiniteError(D4SError, ArithmeticError):
    """λC + B has no Cholesky factor: too few key vectors behind C, or a damaged sum."""


class ExtensionError(D4SError, ImportError):
    """The compiled extension is missing or was built against another torch."""


class EditingInterrupted(BaseException):
    """A sequence broke off after it had begun; what did it is the `__cause__`.

    result: what was measured so far, with the model as the last whole step left it; `result.restore()` is the way back
    """

    def __init__(self, text: str, result: Any) -> None:
        super().__init__(text)
        self.result = result


class EditingFailed(EditingInterrupted, D4SError):
    """By an error: of a step, an evaluation, a measure or an observer."""


class EditingStopped(EditingInterrupted, KeyboardInterrupt):
    """By Ctrl-C, or a signal that ends the program."""


class RankEnded(BaseException):
    """Another process of the run has failed or was ended, so that this one cannot go on."""


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """Text for a failed look-up: what was asked for, the nearest known name, and all of them."""
    known = sorted(known)
    spelled = {one.casefold(): one for one in known}  # MEMIT is memit
    near = difflib.get_close_matches(name[:_LONGEST_SHOWN].casefold(), spelled, n=1)
    hint = f" Did you mean {spelled[near[0]]!r}?" if near else ""
    return f"unknown {what} {shown(name)}.{hint} Known: {', '.join(known)}."


def shown(value: object) -> str:
    """A value as an error names it: text, its beginning where it is long, and of anything else a number or its type."""
    if isinstance(value, str):
        return repr(value) if len(value) <= _LONGEST_SHOWN else f"{value[:_LONGEST_SHOWN]!r}…"
    if value is None or isinstance(value, (bool, float)):
        return repr(value)
    if isinstance(value, int) and value.bit_length() < 64:
        return repr(value)
    return f"a value of type {type(value).__name__}"
