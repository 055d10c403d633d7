"""Fields of a record, fetched with checks that name the field, and subjects found in prompts."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from d4s.edits import Question
from d4s.errors import shown

Fields = Mapping[str, Any]


class FieldError(Exception):
    """A field that is missing or wrong; the loader adds file and record."""


def fetch(record: Fields, path: str) -> Any:
    """The value at a dotted path such as 'requested_rewrite.target_new.str'."""
    value: Any = record
    for part in path.split("."):
        if not isinstance(value, Mapping) or value.get(part) is None:
            raise FieldError(f"field {path!r} is missing")
        value = value[part]
    return value


def text(record: Fields, path: str) -> str:
    """The text at a dotted path, which must not be blank."""
    value = fetch(record, path)
    if not isinstance(value, str):
        raise FieldError(f"field {path!r} must be text, not {type(value).__name__}")
    if not value.strip():
        raise FieldError(f"field {path!r} is empty")
    return value


def optional_text(record: Fields, name: str) -> str | None:
    """The text of a field, or None if the record does not have it."""
    return None if record.get(name) is None else text(record, name)


def target(record: Fields, path: str) -> str:
    """The text at a dotted path, given as it is or as {"str": text}: both spellings are found of every answer."""
    value = fetch(record, path)
    return text(record, f"{path}.str" if isinstance(value, Mapping) else path)


def answers(record: Fields, path: str) -> tuple[str, ...]:
    """Answers given as one text, as {"str": text}, as a list of these, or as a list of lists of aliases; blank ones
    are none. A last part that is left out is an empty list."""
    parent, _, name = path.rpartition(".")
    holder = fetch(record, parent) if parent else record
    value = holder.get(name) if isinstance(holder, Mapping) else fetch(record, path)
    return () if value is None else tuple(_answers(value, path, 2))


def _answers(value: Any, path: str, lists: int) -> list[str]:
    if isinstance(value, Mapping):
        value = target({"answer": value}, "answer")
    if isinstance(value, str):
        return [value] if value.strip() else []
    if not isinstance(value, list):
        raise FieldError(f"field {path!r} must be text or a list of texts, not {type(value).__name__}")
    if not lists:
        raise FieldError(
            f"field {path!r} holds lists in lists of lists; a list of lists of aliases is the most"
        )
    return [answer for item in value for answer in _answers(item, path, lists - 1)]


def identifier(record: Fields, path: str) -> str:
    """A whole number or a text, as text; 12.0, which tables make of 12, is 12."""
    value = fetch(record, path)
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        return text(record, path).strip()
    raise FieldError(f"field {path!r} must be a whole number or text, not {shown(value)}")


def texts(record: Fields, path: str) -> tuple[str, ...]:
    """The list of texts at a dotted path; a last part that is left out is an empty list."""
    parent, _, name = path.rpartition(".")
    holder = fetch(record, parent) if parent else record
    if isinstance(holder, Mapping) and holder.get(name) is None:
        return ()
    value = fetch(record, path)
    if not isinstance(value, list):
        raise FieldError(f"field {path!r} must be a list of texts, not {type(value).__name__}")
    for i, item in enumerate(value):
        if not isinstance(item, str):
            raise FieldError(f"field '{path}[{i}]' must be text, not {type(item).__name__}")
    return tuple(value)


def objects(record: Fields, path: str) -> list[Fields]:
    """The list of objects at a dotted path."""
    return _objects(fetch(record, path), path)


def _objects(value: Any, path: str) -> list[Fields]:
    if not isinstance(value, list):
        raise FieldError(f"field {path!r} must be a list of objects, not {type(value).__name__}")
    for i, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise FieldError(f"field '{path}[{i}]' must be an object, not {type(item).__name__}")
    return value


def questions(record: Fields, part: str, kind: str) -> tuple[Question, ...]:
    """The questions of 'locality' or 'portability', in whichever form a set has them:

    - {group: [{"prompt": …, "ground_truth": …}, …]}, or one such object, or its prompts and answers as two lists
    - one such object without a group, or a list of them
    A question's kind is its group's name in lower case, or `kind`. The answer may also be called 'target', 'answer',
    or 'loc_ans' where the prompt is called 'loc'. A part that is left out is none.
    """
    value = record.get(part)
    if value is None:
        return ()
    if isinstance(value, list):
        groups: Mapping[str, Any] = {"": value}
    elif isinstance(value, Mapping):
        groups = {"": value} if _prompt_name(value) else value
    else:
        raise FieldError(f"field {part!r} must be an object or a list of objects, not {type(value).__name__}")
    return tuple(
        question
        for name, group in groups.items()
        for question in _group(group, f"{part}.{name}" if name else part, name.lower() or kind)
    )


def _group(value: Any, path: str, kind: str) -> list[Question]:
    if isinstance(value, Mapping) and (name := _prompt_name(value)) is not None:
        value = _rows_of_columns(value, name, path) if isinstance(value[name], list) else [value]
    made = []
    for i, entry in enumerate(_objects(value, path)):
        name = _prompt_name(entry)
        if name is None:
            raise FieldError(f"field '{path}[{i}].prompt' is missing")
        try:
            if name == "loc":
                fetch(entry, "loc_ans")
            made.append(Question(text(entry, name), answers(entry, _answer_name(entry)), kind))
        except FieldError as error:
            raise FieldError(f"{error} (in '{path}[{i}]')") from None
    return made


def _rows_of_columns(value: Fields, prompt_name: str, path: str) -> list[Fields]:
    """One object with a list of prompts and a list of answers, as a list of objects."""
    prompts, name = value[prompt_name], _answer_name(value)
    found = value.get(name)
    if not isinstance(found, list) or len(found) != len(prompts):
        raise FieldError(f"field '{path}.{name}' must be a list of {len(prompts)} answers, one a prompt")
    return [{prompt_name: p, name: a} for p, a in zip(prompts, found, strict=True)]


def _prompt_name(entry: Fields) -> str | None:
    return next((name for name in ("prompt", "loc") if name in entry), None)


def _answer_name(entry: Fields) -> str:
    if "prompt" not in entry:
        return "loc_ans"
    return next((name for name in ("ground_truth", "target", "answer") if name in entry), "ground_truth")


def split_subject(prompt: str, subject: str, field: str) -> tuple[str, str]:
    """Template and subject of a full prompt: the prompt with '{}' for the subject, and the subject as it
    stands there. Filled again, the template is the prompt, letter by letter, in Unicode's composed form (NFC).
    A prompt in which '{}' stands once is the template already.

    Of several occurrences one that is a word of its own comes before one inside a word ('i' in 'in'), then
    the last one counts: there the model has read all of the question that leads up to the subject. An
    occurrence in other letter case is taken only if there is none in the subject's own.
    Raises FieldError if the subject does not occur.
    """
    # The same name may be spelt with composed letters in one field and with combining marks in the other.
    prompt, name = (unicodedata.normalize("NFC", text_) for text_ in (prompt, subject.strip()))
    if prompt.count("{}") == 1 and name:
        return prompt, name
    places = _occurrences(prompt, name) or _occurrences(prompt, name, re.IGNORECASE)
    if not places:
        raise FieldError(f"field {field!r} does not contain the subject {shown(name)}: {shown(prompt)}")
    whole = [p for p in places if _is_word(prompt, p, len(name))]
    at = (whole or places)[-1]
    return prompt[:at] + "{}" + prompt[at + len(name) :], prompt[at : at + len(name)]


def filled(prompt: str, subject: str) -> str:
    """A full text: the subject in the place of '{}', where the prompt still has it."""
    return prompt.replace("{}", subject)


def _occurrences(prompt: str, name: str, flags: int = 0) -> list[int]:
    return [match.start() for match in re.finditer(re.escape(name), prompt, flags)] if name else []


def _is_word(prompt: str, at: int, length: int) -> bool:
    before, after = prompt[at - 1 : at] if at else "", prompt[at + length : at + length + 1]
    return not (before.isalnum() and prompt[at].isalnum()) and not (
        after.isalnum() and prompt[at + length - 1].isalnum()
    )
