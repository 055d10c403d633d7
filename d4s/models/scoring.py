"""How likely a model finds targets after prompts, and which tokens it would have said instead.

Teacher forcing: each token of a target is predicted from the prompt and the target's tokens before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from d4s.edits.spacing import Target, continuation
from d4s.errors import ConfigError, TokenizerError
from d4s.models.causal_lm import CausalLM
from d4s.models.forward import Forward, evaluating, most_tokens, run_in_batches
from d4s.models.prompts import pad_id, prompt_and_target_ids, start_ids, text_ids
from d4s.ranks import here

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """One target after one prompt.

    nll: mean over the target's tokens of −log p, nats; infinite where the model's logits are not finite
    predicted: the argmax token at each of the target's places
    target: the target's tokens
    """

    nll: float
    predicted: Ids
    target: Ids

    @property
    def right(self) -> float:
        """Share of the target's tokens that are the argmax."""
        hits = sum(p == t for p, t in zip(self.predicted, self.target, strict=True))
        return hits / len(self.target)

    @property
    def exact(self) -> bool:
        """Whether greedy decoding begins with the target: every one of its tokens is the argmax."""
        return self.predicted == self.target


@dataclass
class _Question:
    """A prompt, different targets after it, and their scores as they are found."""

    prompt: Ids
    targets: tuple[Ids, ...]
    scores: dict[Ids, Score] = field(default_factory=dict)

    @property
    def long(self) -> list[Ids]:
        """Targets whose later tokens need more than the prompt's own pass."""
        return [target for target in self.targets if len(target) > 1]

    @property
    def tokens(self) -> int:
        """What it costs to answer, about."""
        return len(self.prompt) + sum(len(target) for target in self.targets)

    def one_by_one(self) -> list[_Question]:
        return [_Question(self.prompt, (target,), self.scores) for target in self.targets]


def score(
    model: CausalLM,
    tokenizer: Any,
    questions: Sequence[tuple[str, Sequence[Target]]],
    *,
    batch_tokens: int | None = None,
    progress: bool = False,
) -> list[list[Score]]:
    """Scores of each prompt's targets, in their order.

    A target is text, joined to the prompt by the rule of `d4s.edits.spacing.joint`, or (text, what stands before it).

    Equal prompts run once, similar lengths together, and the head sees only the positions that are read. A
    prompt with several targets of more than one token runs once and its cache goes on with each of them; all
    others need a single pass. A result does not depend on what else is asked (to rounding; float32: 1e-5). Of several
    processes (`d4s.ranks`) each asks its part of the prompts, and all have the scores.

    batch_tokens: tokens that go through the model together; None: by device
    Raises TokenizerError for a prompt or target without tokens, ModelError for a row that is too long.
    """
    targets_of: dict[str, dict[Target, None]] = {}
    for prompt, targets in questions:
        targets_of.setdefault(prompt, {}).update(dict.fromkeys(targets))
    ids_of = _tokenised(tokenizer, targets_of)
    asked = {
        prompt: _Question(ids, tuple(dict.fromkeys(targets.values())))
        for prompt, (ids, targets) in ids_of.items()
        if targets
    }
    forward = Forward(model, pad_id(tokenizer))
    budget = most_tokens(model, batch_tokens)
    label = "scoring" if progress else None
    all_of_them = list(asked.values())

    def answers(chosen: Sequence[int]) -> list[dict[Ids, Score]]:
        own = [all_of_them[i] for i in chosen]
        _answer(forward, own, budget, label)
        return [question.scores for question in own]

    with evaluating(model):
        found = here().share("scores", [question.tokens for question in all_of_them], answers)
    for question, scores in zip(all_of_them, found, strict=True):
        question.scores = scores
    return [
        [asked[prompt].scores[ids_of[prompt][1][target]] for target in targets]
        for prompt, targets in questions
    ]


def _answer(forward: Forward, questions: Sequence[_Question], budget: int, label: str | None) -> None:
    """budget: tokens that go through the model together; label: what a progress bar says"""
    several = [q for q in questions if len(q.long) > 1]
    single = [q for q in questions if len(q.long) <= 1]
    if several and not forward.cached_way:
        single += chain.from_iterable(q.one_by_one() for q in several)
        several = []
    run_in_batches(
        [len(q.prompt) for q in several],
        lambda chosen: _cached(forward, [several[i] for i in chosen]),
        budget,
        copies=[1 + len(q.long) for q in several],
        progress=label,
    )
    run_in_batches(
        [len(q.prompt) + max(len(target) for target in q.targets) - 1 for q in single],
        lambda chosen: _one_pass(forward, [single[i] for i in chosen]),
        budget,
        progress=label,
    )


def _tokenised(
    tokenizer: Any, targets_of: dict[str, dict[Target, None]]
) -> dict[str, tuple[Ids, dict[Target, Ids]]]:
    """As `prompt_and_target_ids` of each pair, with the tokenizer called once for all of them."""
    if not targets_of:
        return {}
    prompts = text_ids(tokenizer, list(targets_of))
    pairs = [
        prompt + continuation(prompt, target) for prompt, targets in targets_of.items() for target in targets
    ]
    wholes = iter(text_ids(tokenizer, pairs))
    found: dict[str, tuple[Ids, dict[Target, Ids]]] = {}
    for (prompt, targets), prompt_ids in zip(targets_of.items(), map(tuple, prompts), strict=True):
        target_ids: dict[Target, Ids] = {}
        for target in targets:
            whole = tuple(next(wholes))
            if len(whole) > len(prompt_ids) and whole[: len(prompt_ids)] == prompt_ids:
                target_ids[target] = whole[len(prompt_ids) :]
            else:
                target_ids[target] = tuple(prompt_and_target_ids(tokenizer, prompt, target)[1])
            if not prompt_ids or not target_ids[target]:
                what = f"target {target!r}" if prompt_ids else "prompt"
                raise TokenizerError(
                    f"the tokenizer makes no token of the {what} (prompt {prompt!r}); write text that it knows"
                )
        found[prompt] = (prompt_ids, target_ids)
    return found


def _one_pass(forward: Forward, questions: Sequence[_Question]) -> None:
    """Questions with at most one target of several tokens, which stands behind the prompt."""
    rows, reads, places = [], [], []
    start = 0
    for question in questions:
        tail = question.long[0][:-1] if question.long else ()
        rows.append((*question.prompt, *tail))
        reads.append(range(len(question.prompt) - 1, len(rows[-1])))
        places += [start + j for target in question.targets for j in range(len(target))]
        start += len(tail) + 1
    tokens = [token for question in questions for target in question.targets for token in target]
    readings = _read(forward.whole(rows, reads), places, tokens)
    for question in questions:
        for target in question.targets:
            question.scores[target] = _score(target, readings)


def _cached(forward: Forward, questions: Sequence[_Question]) -> None:
    """Questions with several targets of several tokens: the prompt runs once for all of them."""
    logits, prefix = forward.prompts([question.prompt for question in questions])
    places = [q for q, question in enumerate(questions) for _ in question.targets]
    firsts = _read(logits, places, [target[0] for question in questions for target in question.targets])
    del logits
    tails = [(q, target) for q, question in enumerate(questions) for target in question.long]
    prefix.select([q for q, _ in tails])
    rows = [target[:-1] for _, target in tails]
    logits = forward.further(prefix, rows, [range(len(row)) for row in rows])
    rest = _read(logits, range(len(logits)), [token for _, target in tails for token in target[1:]])
    for question in questions:
        for target in question.targets:
            question.scores[target] = _score(target, chain([next(firsts)], rest))


def _read(logits: Tensor, places: Sequence[int], tokens: Sequence[int]) -> Iterator[tuple[float, int]]:
    """(−log p(token), argmax token) for each (place, token) that is asked; log p in float32.

    logits: [all places, vocabulary], any float dtype
    """
    # In parts: a float32 copy of all the logits could be large.
    normaliser = torch.cat([torch.logsumexp(part.float(), -1) for part in logits.split(1024)])
    at = torch.as_tensor(places, device=logits.device)
    chosen = logits[at, torch.as_tensor(tokens, device=logits.device)].float()
    nll = (normaliser[at] - chosen).tolist()
    return zip(nll, logits.argmax(-1)[at].tolist(), strict=True)


def _score(target: Ids, readings: Iterator[tuple[float, int]]) -> Score:
    """Takes the readings of one target's tokens."""
    nll, predicted = zip(*(next(readings) for _ in target), strict=True)
    mean = math.fsum(nll) / len(target)
    return Score(mean if math.isfinite(mean) else math.inf, predicted, target)


def perplexity(
    model: CausalLM,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    window: int = 512,
    overlap: int | None = None,
    batch_tokens: int | None = None,
    progress: bool = False,
) -> float:
    """exp of the mean token NLL of running text; each token is scored once.

    window: tokens the model sees at a time (at most as many as it has positions)
    overlap: of these, tokens of the window before, which are read but not scored again; None: a quarter

    Every window starts as the tokenizer starts a text (<s>), also in the middle of one.
    Raises ConfigError if the numbers do not fit together, or the texts hold fewer than two tokens each.
    """
    forward = Forward(model, pad_id(tokenizer))
    start = start_ids(tokenizer)
    window = min(window, forward.most_positions or window)
    overlap = window // 4 if overlap is None else overlap
    if not 0 <= overlap < window - 1 - len(start):
        raise ConfigError(
            f"overlap={overlap}: must be from 0 to {window - 2 - len(start)}, the window less "
            f"{2 + len(start)}, so that each window scores a token"
        )
    rows: list[list[int]] = []
    reads: list[range] = []
    tokens: list[list[int]] = []
    for ids in text_ids(tokenizer, texts):
        scored = max(1, len(start))  # the first token of a text without a start token has nothing before it
        begin = 0
        while scored < len(ids):
            head = start if begin else []
            stop = min(len(ids), begin + window + 1 - len(head))
            rows.append([*head, *ids[begin : stop - 1]])
            reads.append(range(len(head) + scored - 1 - begin, len(head) + stop - 1 - begin))
            tokens.append(ids[scored:stop])
            scored = stop
            begin = scored - overlap - 1 if scored - overlap - 1 > len(start) else 0
    if not rows:
        raise ConfigError("perplexity needs a text of two tokens or more")
    # Every position is read here: a quarter of the tokens makes up for the room that their logits take.
    budget = max(1, most_tokens(model, batch_tokens) // 4)
    label = "perplexity" if progress else None

    def sums(own: Sequence[int]) -> list[float]:
        nll: dict[int, float] = {}

        def run(chosen: list[int]) -> None:
            part = [own[i] for i in chosen]
            logits = forward.whole([rows[i] for i in part], [reads[i] for i in part])
            readings = _read(logits, range(len(logits)), [token for i in part for token in tokens[i]])
            nll.update((i, math.fsum(next(readings)[0] for _ in tokens[i])) for i in part)

        run_in_batches([len(rows[i]) for i in own], run, budget, progress=label)
        return [nll[i] for i in own]

    with evaluating(model):
        nll = here().share("perplexity", [len(row) for row in rows], sums)
    mean = math.fsum(nll) / sum(map(len, tokens))
    return math.exp(mean) if math.isfinite(mean) and mean < 700 else math.inf
