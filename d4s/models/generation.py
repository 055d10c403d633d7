"""Text that a model writes by itself, and what it is worth: n-gram entropy, likeness to reference texts."""

from __future__ import annotations

import math
import random
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from d4s.errors import ConfigError
from d4s.models.causal_lm import CausalLM
from d4s.models.forward import Forward, evaluating, most_tokens, run_in_batches
from d4s.models.prompts import pad_id, text_ids
from d4s.ranks import here


@dataclass(frozen=True)
class Written:
    """What a model wrote after a prompt.

    ids: the new tokens, without the one that ends the text
    text: decoded, without special tokens and what follows the end
    ended: it came to an end by itself, rather than at the most tokens allowed
    """

    ids: tuple[int, ...]
    text: str
    ended: bool


def generate(
    model: CausalLM,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    top_k: int = 1,
    seed: int = 0,
    stop_at_line: bool = True,
    stop_at_end: bool = True,
    enough: Callable[[str, str], bool] | None = None,
    batch_tokens: int | None = None,
    progress: bool = False,
) -> list[Written]:
    """What the model writes after each prompt; the settings of its own generation_config do not count.

    top_k: 1: greedy; otherwise each token is drawn from the k most likely ones, by their probabilities
    seed: with the prompt's text it decides all draws, so that a result depends on no other prompt
    stop_at_line: the text ends before the first line break that follows something
    stop_at_end: it ends at an end-of-text token; otherwise none is ever written
    enough: (prompt, text so far) → whether what follows does not matter: the text is then left there, not ended

    Of several processes (`d4s.ranks`) each writes after its part of the prompts, and all have what was written.
    """
    if max_new_tokens < 1 or top_k < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens} and top_k={top_k} must be 1 or more")
    distinct = list(dict.fromkeys(prompts))
    if not distinct:
        return []
    ids = text_ids(tokenizer, distinct)
    draws = [random.Random(f"{seed}/{prompt}") for prompt in distinct]
    ends = _end_ids(model, tokenizer)
    forward = Forward(model, pad_id(tokenizer))
    written: dict[str, Written] = {}

    def run(chosen: list[int]) -> None:
        states = [(draws[i].getstate(), i) for i in chosen]
        new: dict[int, list[int]] = {i: [] for i in chosen}
        finished: dict[int, Written] = {}
        alive = list(chosen)
        prefix = None
        try:
            for step in range(max_new_tokens):
                if not forward.cached_way:
                    rows = [ids[i] + new[i] for i in alive]
                    logits = forward.whole(rows, [(len(row) - 1,) for row in rows])
                elif prefix is None:
                    logits, prefix = forward.prompts([ids[i] for i in alive])
                else:
                    logits = forward.further(prefix, [new[i][-1:] for i in alive], [(0,)] * len(alive))
                if not stop_at_end:
                    logits[:, sorted(ends)] = -math.inf
                going = []
                for place, (i, token) in enumerate(
                    zip(alive, _choose(logits, top_k, [draws[i] for i in alive]), strict=True)
                ):
                    ended = token in ends
                    if not ended:
                        new[i].append(token)
                    text = tokenizer.decode(new[i], skip_special_tokens=True)
                    if stop_at_line and "\n" in text.lstrip():
                        text, ended = text.lstrip().split("\n", 1)[0], True
                    left = enough is not None and enough(distinct[i], text)
                    if ended or left or step == max_new_tokens - 1:
                        finished[i] = Written(tuple(new[i]), text, ended)
                    else:
                        going.append(place)
                if not going:
                    break
                if prefix is not None and len(going) < len(alive):
                    prefix.select(going)
                alive = [alive[place] for place in going]
        except torch.OutOfMemoryError:
            for state, i in states:  # a smaller batch begins anew, with the same draws
                draws[i].setstate(state)
            raise
        written.update({distinct[i]: one for i, one in finished.items()})

    widths, label = [len(row) + max_new_tokens for row in ids], "generating" if progress else None

    def write(own: Sequence[int]) -> list[Written]:
        budget = most_tokens(model, batch_tokens)
        run_in_batches(
            [widths[i] for i in own], lambda chosen: run([own[i] for i in chosen]), budget, progress=label
        )
        return [written[distinct[i]] for i in own]

    with evaluating(model):
        found = dict(zip(distinct, here().share("texts", widths, write), strict=True))
    return [found[prompt] for prompt in prompts]


def generate_greedy(
    model: CausalLM, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int = 32, **options: Any
) -> list[str]:
    """The texts alone of greedy generation up to an end token or line break; options as `generate`."""
    return [w.text for w in generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens, **options)]


def _end_ids(model: CausalLM, tokenizer: Any) -> frozenset[int]:
    """The ids that end a text, as the tokenizer and the model's generation settings name them."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = {*(named if isinstance(named, (list, tuple)) else [named]), tokenizer.eos_token_id}
    return frozenset(int(i) for i in ids if i is not None)


def _choose(logits: Tensor, top_k: int, draws: Sequence[random.Random]) -> list[int]:
    """One token a row: the argmax, or drawn from the k most likely ones."""
    if top_k == 1:
        return logits.argmax(-1).tolist()
    values, tokens = logits.float().topk(min(top_k, logits.shape[-1]), dim=-1)
    reached = values.softmax(-1).cumsum(-1)
    drawn = torch.tensor([draw.random() for draw in draws], dtype=reached.dtype, device=logits.device)
    place = (reached < drawn.unsqueeze(1)).sum(1).clamp_max(tokens.shape[1] - 1)
    return tokens.gather(1, place.unsqueeze(1)).squeeze(1).tolist()


def says(written: Written, answers: Iterable[str]) -> bool:
    """Whether the text is one of the answers: exact match after `normalised`.

    A model that has answered may go on with another sentence, so the text up to the end of any of its
    sentences may match too. Text cut off by the token limit counts only up to its last sentence's end.
    """
    sentences = [match.start() for match in re.finditer(r"[.!?;](?=\s|$)|[。！？；]", written.text)]
    candidates = {normalised(written.text[:end]) for end in sentences}
    if written.ended:
        candidates.add(normalised(written.text))
    candidates.discard("")
    return any(normalised(answer) in candidates for answer in answers)


# One that no letter or digit follows, as in "3.5" and "U.S": and those of Chinese, Japanese, Hindi and Urdu.
_FULL_STOP = re.compile(r"\.(?!\w)|[。｡।۔]")


def is_exactly(written: Written, answers: Iterable[str], *, strict: bool = False) -> bool:
    """Whether the text up to its first full stop is one of the answers, and nothing else.

    answers: as they stand behind the prompt
    strict: alike but for blanks around them; otherwise after `normalised(joined=True)`

    A full stop behind which the answer itself goes on is none: that of "St. Louis" does not end it. One with which the
    answer ends may be both: "U.S. It is" says "U.S.". A text that the token limit cut off is taken as it stands.
    """
    fold = str.strip if strict else _joined
    return any(_up_to_stop_is(written.text, answer, fold) for answer in answers)


def is_decided(text: str, answers: Iterable[str]) -> bool:
    """Whether `is_exactly` will say the same, strict and not, however the text goes on."""
    if text.endswith("\ufffd"):  # part of a letter, maybe
        return False
    stops = [_full_stop(text, answer, fold) for answer in answers for fold in (str.strip, _joined)]
    return all(stop is not None and stop.end() < len(text) for stop in stops)


def _up_to_stop_is(text: str, answer: str, fold: Callable[[str], str]) -> bool:
    stop = _full_stop(text, answer, fold)
    ways = (text,) if stop is None else (text[: stop.start()], text[: stop.end()])
    return fold(answer) in map(fold, ways)


def _full_stop(text: str, answer: str, fold: Callable[[str], str]) -> re.Match[str] | None:
    """The text's first one behind which the answer does not go on."""
    inner = {fold(answer[: s.end()]) for s in _FULL_STOP.finditer(answer) if answer[s.end() :].strip()}
    inner.discard(fold(answer))
    return next((s for s in _FULL_STOP.finditer(text) if fold(text[: s.end()]) not in inner), None)


def _joined(text: str) -> str:
    return normalised(text, joined=True)


SHORTEST_NAME = 4  # letters: of a shorter one, a wrong letter makes another word
LETTERS_A_SLIP = 8  # of a name, for each letter that may be wrong in it; one always may
WORDS_BEFORE = 2  # how far from the answer's beginning a name may stand


def can_be_misspelt(answer: str) -> bool:
    """Whether `misspelt` says anything of it: a name of `SHORTEST_NAME` letters or more, and no digit, of which a wrong
    one is another number."""
    letters = _folded(answer)
    return sum(c.isalpha() for c in letters) >= SHORTEST_NAME and not any(c.isdigit() for c in letters)


def misspelt(written: Written, answer: str, others: Iterable[str] = ()) -> str | None:
    """What the text has in the place of the answer, where that is not the answer and nearly its spelling; else None.

    answer: as it stands behind the prompt; others: answers that are right in themselves, as the one before the edit

    Both are compared in lower case, without articles, punctuation, accents and extra blanks. Looked at are the text's
    first words up to its first full stop (as `is_exactly` takes it), two more than the answer has; in them, all runs of
    as many words as the answer, of one less and one more. A near miss is a run that differs from the answer by at most
    one letter for every eight of the answer (blanks counted), one at least: put in, left out, replaced, or swapped
    with its neighbour, each letter in one of these alone. None where

    - a run is the answer: it is spelled right, whatever stands around it;
    - the run goes on where the answer ends or ends before it does ("Italians", "Ital"): a plural, another form of the
      name, or a text that the token limit cut off;
    - the run is one of the others.

    Another name, or the same one in another language, that is as near counts as misspelt: "Roma" and "Rome", "Brasil"
    and "Brazil", "Iran" and "Iraq". Garbled beyond that it does not count, and in scripts without blanks hardly ever.
    """
    name = _folded(answer)
    count = len(name.split())
    stop = _full_stop(written.text, answer, _joined)
    words = _folded(written.text if stop is None else written.text[: stop.end()]).split()
    words = words[: count + WORDS_BEFORE]
    runs = [
        " ".join(words[first : first + length])
        for first in range(len(words))
        for length in (count, count - 1, count + 1)
        if length > 0 and first + length <= len(words)
    ]
    if not can_be_misspelt(answer) or name in runs:
        return None
    known = {_folded(other) for other in others}
    most = max(1, len(name) // LETTERS_A_SLIP)
    near = [
        (slips, run)
        for run in runs
        if run not in known
        and not run.startswith(name)
        and not name.startswith(run)
        and (slips := _slips(run, name, most)) <= most
    ]
    return min(near, key=lambda one: one[0])[1] if near else None


def _folded(text: str) -> str:
    """`normalised(joined=True)` without accents."""
    apart = unicodedata.normalize("NFD", _joined(text))
    return "".join(c for c in apart if not unicodedata.combining(c))


def _slips(one: str, other: str, most: int) -> int:
    """Letters put in, left out, replaced or swapped with their neighbour between two texts; more than `most`: some
    number above it. A letter is part of one of these at most (optimal string alignment)."""
    if abs(len(one) - len(other)) > most:
        return most + 1
    before, last = [0] * (len(other) + 1), list(range(len(other) + 1))
    for i, letter in enumerate(one, start=1):
        row = [i]
        for j, wanted in enumerate(other, start=1):
            least = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != wanted))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == wanted:
                least = min(least, before[j - 2] + 1)
            row.append(least)
        before, last = last, row
    return last[-1]


def normalised(text: str, *, joined: bool = False) -> str:
    """Lower case, without punctuation, articles and extra blanks (after SQuAD, arXiv 1606.05250).

    joined: what stands around punctuation meets, as in SQuAD: "U.S." is "US", and "Jean-Paul" not "Jean Paul". It is
        that of every script; otherwise a blank takes the place of what is ASCII, "。" and "、"
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    if joined:
        words = "".join(c for c in folded if not _is_punctuation(c)).split()
    else:
        words = "".join(" " if c in string.punctuation or c in "。、" else c for c in folded).split()
    without_articles = [word for word in words if word not in ("a", "an", "the")]
    return " ".join(without_articles or words or folded.split())  # "A" may be the answer, or "%"


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def _words(text: str) -> list[str]:
    """Words and punctuation marks in lower case."""
    return re.findall(r"\w+|[^\w\s]", text.casefold())


def fluency(text: str) -> float:
    """Weighted entropy of the text's bigrams and trigrams, bits; low where a model repeats itself.

    ½ (⅔ H₂ + 4⁄3 H₃) over words and punctuation marks (arXiv 1809.05972; weights as ROME, arXiv 2202.05262).
    """
    words = _words(text)
    return (2 / 3 * _entropy(words, 2) + 4 / 3 * _entropy(words, 3)) / 2


def _entropy(words: Sequence[str], n: int) -> float:
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    total = counts.total()
    return -sum(c / total * math.log2(c / total) for c in counts.values()) if total else 0.0


def _terms(text: str) -> list[str]:
    return re.findall(r"\w\w+", text.casefold())


class TermWeights:
    """TF-IDF of a set of n texts: tf · (ln((1 + n) / (1 + texts with the word)) + 1).

    Terms are words of two characters and more, in lower case: commas would make any two texts alike.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        documents: Counter[str] = Counter()
        count = 0
        for text in texts:
            documents.update(set(_terms(text)))
            count += 1
        self.weight = {word: math.log((1 + count) / (1 + n)) + 1 for word, n in documents.items()}

    def cosine(self, a: str, b: str) -> float:
        """Cosine of two texts; words that the set of texts does not have do not count. 0 for empty ones."""
        x, y = self._vector(a), self._vector(b)
        product = sum(value * y[word] for word, value in x.items() if word in y)
        lengths = math.sqrt(sum(v * v for v in x.values()) * sum(v * v for v in y.values()))
        return product / lengths if lengths else 0.0

    def _vector(self, text: str) -> dict[str, float]:
        words = Counter(word for word in _terms(text) if word in self.weight)
        return {word: n * self.weight[word] for word, n in words.items()}
