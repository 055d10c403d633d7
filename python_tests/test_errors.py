"""What errors say: every text that d4s can raise is read from its source and has the manner of CONTRIBUTING.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from d4s import errors

ROOT = Path(__file__).resolve().parents[1]
GAP = "\0"  # stands for what is filled in
LOOK_UP = f"unknown {GAP}"  # what `unknown_name` makes, which says itself what is known

# What a user reads as it stands, and what stands in brackets or after a place in one of those.
WHOLE = {name for name in vars(errors) if name.endswith("Error")} | {"RankEnded", "ArgumentTypeError"}
PART = {"FieldError", "WrongType", "ValueError", "OSError"}
CURE = re.compile(r";|\bmust\b|\bneeds?\b|pip install|^(name|give) ")


class Text(NamedTuple):
    place: str
    kind: str
    said: str


def templates(node: ast.expr) -> list[str]:
    """The texts that an expression may give, with gaps for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        found = [""]
        for part in node.values:
            inner = part.value if isinstance(part, ast.FormattedValue) else part
            found = [before + after for before in found for after in templates(inner)]
        return found
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [a + b for a in templates(node.left) for b in templates(node.right)]
    if isinstance(node, ast.IfExp):
        return templates(node.body) + templates(node.orelse)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "unknown_name":
        return [LOOK_UP]
    return [GAP]


def texts(source: str, place: str) -> Iterator[Text]:
    """Of every error that a file makes."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        kind = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if kind in WHOLE | PART:
            said = node.args[1 if kind == "OSError" and len(node.args) > 1 else 0]
            yield from (Text(f"{place}:{node.lineno}", kind, text) for text in templates(said))


def faults(text: Text) -> list[str]:
    """What is not in the manner."""
    said = text.said
    found = []
    if re.match(r"[A-Z][a-z]", said):
        found.append("begins with a capital")
    if "\n" in said:
        found.append("has more than one line")
    if said.endswith((".", "!")):
        found.append("ends with a mark")
    if re.search(r"[.!?] [A-Z]", said) and not said.startswith("unknown "):
        found.append("has a second sentence; put ';' between")
    if re.match(r"error\b|invalid\b|please\b", said, re.IGNORECASE):
        found.append("says that it is an error, and not which")
    handed_on = "unknown " in said or not re.search("[a-z]{2}", said) or said.endswith(f": {GAP}")
    if text.kind in WHOLE and not handed_on and not CURE.search(said):
        found.append("does not say what would be right")
    return found


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("raise DataError('There is no such file; name one')", "begins with a capital"),
        ("raise DataError('no file; name one.')", "ends with a mark"),
        ("raise DataError('no file; ' + (f'{x}\\nor y' if x else 'z'))", "has more than one line"),
        ("raise files.WrongType('no file. Name one')", "has a second sentence; put ';' between"),
        ("raise ConfigError('invalid value; name one')", "says that it is an error, and not which"),
        ("raise ConfigError(f'{path}: no file')", "does not say what would be right"),
        ("raise ConfigError(f'{path}: no file; name one')", None),
        ("raise ConfigError(unknown_name('method', name, METHODS))", None),
        ("raise OSError(5, 'is gone. Look', path)", "has a second sentence; put ';' between"),
        ("raise FieldError('is empty')", None),
    ],
)
def test_a_text_of_another_manner_is_found(code, fault):
    found = [one for text in texts(code, "x.py") for one in faults(text)]
    assert found == ([] if fault is None else [fault])


def test_every_error_has_the_manner():
    found = [
        text
        for path in sorted((ROOT / "d4s").rglob("*.py"))
        for text in texts(path.read_text("utf-8"), path.relative_to(ROOT).as_posix())
    ]
    assert len(found) > 300, "texts are no longer found"
    wrong = [
        f"{text.place}: {'; '.join(said)}: {text.said.replace(GAP, '…')!r}"
        for text in found
        if (said := faults(text))
    ]
    assert not wrong, "\n" + "\n".join(wrong)
