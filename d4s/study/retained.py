"""What a model must still know after it was edited: facts that no edit touches, and plain text."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterable, Sequence
from typing import Any

from d4s.edits import Edit
from d4s.edits.questions import AnswerPool
from d4s.edits.spacing import Target, continuation
from d4s.errors import ConfigError, DataError
from d4s.files import read_bytes
from d4s.models.causal_lm import CausalLM
from d4s.models.scoring import perplexity, score

CHARACTERS = 30_000  # of a text for the perplexity


def paragraphs(path: str | os.PathLike[str], characters: int = CHARACTERS) -> list[str]:
    """The first lines of a text file that are no headings (200 characters or more), until they hold so many characters.

    Raises DataError where no line is, or the file cannot be read.
    """
    found: list[str] = []
    text = read_bytes(path, "the text").decode("utf-8", "replace")
    for line in text.splitlines():
        if sum(map(len, found)) >= characters:
            break
        if len(line) >= 200:
            found.append(line.strip())
    if not found:
        raise DataError(f"{path}: no line has 200 characters or more; a paragraph must be one line")
    return found


def is_askable(fact: Edit) -> bool:
    """Whether the fact has an old answer that could be asked for: one is known, and it is no statement to judge."""
    return fact.target_true is not None and fact.kind != "statement"


class Retained:
    """What the model must still know: facts that are not edited, as multiple choice, and plain text.

    facts: edits that are NOT made, with their target_true. Each is asked with up to three wrong answers of its
        relation; the likeliest by mean token NLL counts.
    texts: for the perplexity; None: the facts as sentences
    Calling it gives `retained`, the share of facts answered right, and `text_perplexity`.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Any,
        facts: Sequence[Edit],
        texts: Sequence[str] | None = None,
        *,
        seed: int = 0,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        known = [fact for fact in facts if is_askable(fact)]
        if not known:
            raise ConfigError(
                "no fact that could be asked for what the model retains; give edits with a target_true that are "
                "not to be made (facts=…), or a larger set of edits"
            )
        pool = AnswerPool(known)
        self.questions: list[tuple[str, tuple[Target, ...]]] = []
        for fact in known:
            wrong = pool.draw(fact, 3, random.Random(f"{seed}/{fact.id}"))
            right = fact.target_true or ""
            options = dict.fromkeys([right, fact.target_new, *wrong])
            self.questions.append((fact.text, tuple(map(fact.target, options))))
        self.texts = (
            list(texts)
            if texts is not None
            else [f"{text}{continuation(text, options[0])}." for text, options in self.questions]
        )

    @property
    def settings(self) -> dict[str, str]:
        """What tells one from another."""
        asked = json.dumps([self.questions, self.texts])
        return {"facts": hashlib.blake2b(asked.encode(), digest_size=16).hexdigest()}

    def __call__(self) -> dict[str, float]:
        return self.facts() | self._perplexity()

    def facts(self) -> dict[str, float]:
        """`retained` alone."""
        return _share_of(self._right())

    def by_fact(self) -> dict[str, float]:
        """What calling it gives, and `right.<number>`, 1 or 0, of each of the `questions`."""
        right = self._right()
        each = {f"right.{i}": float(one) for i, one in enumerate(right)}
        return _share_of(right) | self._perplexity() | each

    def _perplexity(self) -> dict[str, float]:
        return {"text_perplexity": perplexity(self.model, self.tokenizer, self.texts)}

    def _right(self) -> list[bool]:
        scores = score(self.model, self.tokenizer, self.questions)
        return [all(options[0].nll < other.nll for other in options[1:]) for options in scores]


def _share_of(right: Sequence[bool]) -> dict[str, float]:
    return {"retained": sum(right) / len(right)}


def hold_out(edits: Sequence[Edit], share: float = 0.3) -> tuple[list[Edit], list[Edit]]:
    """(edits to make, facts to leave alone): of the last `share` of the edits, those that no other one touches."""
    made = len(edits) - max(1, round(share * len(edits)))
    if made < 1:
        raise ConfigError(f"{len(edits)} edits are too few to leave some of them unedited; give two or more")
    return list(edits[:made]), untouched(edits[made:], edits[:made])


def untouched(facts: Iterable[Edit], made: Iterable[Edit]) -> list[Edit]:
    """Facts about subjects that no edit is about, each text once."""
    subjects = {edit.subject for edit in made}
    return list({fact.text: fact for fact in facts if fact.subject not in subjects}.values())
