"""What `d4s methods` prints: all methods in one table; of one method its fields and presets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from itertools import groupby
from typing import Any, get_type_hints

from d4s.figures.tables import aligned
from d4s.locate.targets import TargetConfig
from d4s.methods import METHODS
from d4s.methods.preset import by_name
from d4s.methods.published import describe, undone


def overview() -> str:
    """A line a method: name, paper, what it changes, what it needs, how it is undone."""
    rows = [
        (name, cls.paper, cls.changes, ", ".join(cls.needs) or "nothing", undone(cls))
        for name, cls in METHODS.items()
    ]
    return (
        _table(("method", "paper", "changes", "needs", "undone"), rows)
        + "\nUndone one by one: by d4s undo, from a journal; all at once, with every method: restore() of a result."
    )


def about(name: str) -> str:
    """A method's fields with their defaults and meanings, and its presets: a row a field, a column a model.

    name: as "d4s", or "d4s:fresh", whose named preset then stands in every column
    Fields of the target optimiser stand among them: `--set` and `config=` take them by their own names.
    Raises ConfigError for a method or a named preset that does not exist.
    """
    known, named = by_name(name)
    method = METHODS[known]
    told = describe(method, named)
    presets = {model: _flat(preset) for model, preset in told["presets"].items()}
    return "\n".join(
        [
            f"{name}: {method.paper}; changes {method.changes}",
            f"needs: {', '.join(method.needs) or 'nothing'}; undone: {undone(method)}",
            f"compared along: {method.strength}; named presets: {_named(method)}",
            "",
            _table(("field", "default", "meaning"), _fields(method)),
            "",
            _table(
                ("preset", *(f"{model}*" if model in told["not_published"] else model for model in presets)),
                [
                    (field, *(_spelled(preset[field]) for preset in presets.values()))
                    for field, _, _ in _fields(method)
                ],
            ),
            *(["* not published for this method: by its rule."] if told["not_published"] else []),
            "Any other model: by its depth and width; result.json of a run holds what it was.",
        ]
    )


def _named(cls: Any) -> str:
    told = (
        f"{name} ({', '.join(f'{field}={_spelled(value)}' for field, value in fields_.items())})"
        for name, fields_ in cls.presets.items()
    )
    return ", ".join(told) or "none"


def _fields(cls: Any) -> list[tuple[str, str, str]]:
    """(name, default, meaning) of each field; those of a target's configuration in its place."""
    hints = get_type_hints(cls, include_extras=True)
    rows: list[tuple[str, str, str]] = []
    for field in fields(cls):
        if field.name == "target":
            rows += _fields(TargetConfig)
            continue
        said = [text for text in getattr(hints[field.name], "__metadata__", ()) if isinstance(text, str)]
        rows.append((field.name, _default(field), " ".join(said)))
    return rows


def _default(field: Field[Any]) -> str:
    return "" if field.default is MISSING else _spelled(field.default)


def _flat(preset: dict[str, Any]) -> dict[str, Any]:
    return preset | preset.get("target", {})


def _spelled(value: Any) -> str:
    """As --set takes it, but layers as 4–8 and what stands there several times as name ×5."""
    if isinstance(value, list | tuple):
        if value and all(isinstance(item, int) for item in value):
            return ", ".join(_runs(value))
        return ", ".join(
            f"{item} ×{count}" if (count := len(list(same))) > 1 else str(item)
            for item, same in groupby(value)
        )
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _runs(numbers: Sequence[int]) -> list[str]:
    """Neighbours together: 4–8"""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return [f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    columns = zip(*rows, strict=True) if rows else ([] for _ in head)
    return "\n".join(aligned([(name, list(c)) for name, c in zip(head, columns, strict=True)], numbers=False))
