"""What verbs print: figures as JSON, words for people, and notes of what was not scored."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

from d4s.files import finite_or_none


def print_json(value: Any) -> None:
    """On standard output. NaN and infinities, which JSON has no words for, are null."""
    print(json.dumps(finite_or_none(value), indent=1))


def words(options: Namespace) -> Callable[[str], None]:
    """What prints words: to stderr where stdout is for figures."""
    return (lambda text: print(text, file=sys.stderr)) if options.json else print


def print_notes(records: Sequence[Any]) -> None:
    """What was not scored, and why, by the last evaluation of each."""
    for note in dict.fromkeys(note for r in records if r.evaluations for note in r.evaluations[-1].notes):
        print(f"note: {note}")
