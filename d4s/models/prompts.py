"""Text to token ids: where the subject ends, where the target starts, generated contexts, padding."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from d4s.edits.spacing import Target, continuation
from d4s.errors import EditError, ModelError, TokenizerError
from d4s.models.causal_lm import CausalLM

if TYPE_CHECKING:
    from transformers import GenerationConfig

CONTEXT_SEEDS = ("The", "Therefore", "Because", "I", "You")
# First word of a letter's Unicode name → how its script ends a sentence; the others end it with ".".
_STOPS = dict.fromkeys(("CJK", "HIRAGANA", "KATAKANA"), "。") | dict.fromkeys(
    ("DEVANAGARI", "BENGALI", "GURMUKHI", "ORIYA"), "।"
)


@dataclass(frozen=True)
class Row:
    """One tokenised text: prompt, and the target where there is one."""

    ids: tuple[int, ...]
    subject_last: int  # position of the subject's last token
    target_start: int  # position of the target's first token; len(ids) without a target


@dataclass(frozen=True)
class _Around:
    """What the tokenizer puts around any text: <s> or [CLS] in front, </s> or [SEP] behind."""

    front: tuple[int, ...]
    behind: int

    @classmethod
    def of(cls, tokenizer: Any) -> _Around:
        whole, plain = (
            list(tokenizer("a", add_special_tokens=added)["input_ids"]) for added in (True, False)
        )
        for first in range(len(whole) - len(plain), -1, -1):
            if plain and whole[first : first + len(plain)] == plain:
                return cls(tuple(whole[:first]), len(whole) - first - len(plain))
        return cls((), 0)

    def span(self, ids: Sequence[int]) -> slice:
        """The part of a text's ids that counts: without what stands behind it, and with one start where the text
        begins with the start token itself, as chat templates do."""
        begin, width = 0, len(self.front)
        while width and tuple(ids[begin : begin + width]) == self.front == tuple(
            ids[begin + width : begin + 2 * width]
        ):
            begin += width
        return slice(begin, len(ids) - self.behind)


def text_ids(tokenizer: Any, texts: Sequence[str], *, are_cut: bool = False) -> list[list[int]]:
    """Token ids of texts that go on: with what the tokenizer puts in front of any text, not what it puts behind.

    That is <s> or [CLS], once, also where the text begins with it, and </s> or [SEP] of a tokenizer that adds them.

    are_cut: whether the model is given pieces of them, so that transformers need not warn of long ones
    """
    if not texts:
        return []
    around = _Around.of(tokenizer)
    quiet = {"verbose": False} if are_cut else {}
    return [list(ids[around.span(ids)]) for ids in tokenizer(list(texts), **quiet)["input_ids"]]


def start_ids(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts in front of any text: <s>, [CLS], or nothing."""
    return list(_Around.of(tokenizer).front)


def end_of_text(model: CausalLM, tokenizer: Any) -> list[int]:
    """The ids by which a text of this tokenizer ends: its end token, or a full stop where it has none.

    Raises TokenizerError for a tokenizer that can write neither, ModelError for an end token that the model lacks.
    """
    end = tokenizer.eos_token_id
    ids = [int(end)] if end is not None else _stop_ids(tokenizer)
    if not ids:
        raise TokenizerError(
            f"{type(tokenizer).__name__} has neither an end token nor a full stop by which a target could end; name "
            "one (tokenizer.eos_token = …), or set target_eos=False"
        )
    size = model.get_input_embeddings().num_embeddings
    if max(ids) >= size:
        raise ModelError(
            f"the tokenizer ends a text by {tokenizer.convert_ids_to_tokens(max(ids))!r} (id {max(ids)}), and the "
            f"model's embeddings end at {size - 1}; take the tokenizer the model was trained with, or set "
            "target_eos=False"
        )
    return ids


def full_stop(tokenizer: Any, mark: str = ".") -> list[int]:
    """The ids of a full stop behind a text: of this mark (`stop_mark`), or of "." where the tokenizer lacks it.

    TokenizerError for a tokenizer that can write neither.
    """
    ids = _stop_ids(tokenizer, mark) or _stop_ids(tokenizer)
    if not ids:
        raise TokenizerError(
            f"{type(tokenizer).__name__} has no full stop by which a target could end; set target_stop=False"
        )
    return ids


def _stop_ids(tokenizer: Any, mark: str = ".") -> list[int]:
    """Of a full stop behind a text; none where the tokenizer cannot write it."""
    ids = _ids_behind_a_text(tokenizer, mark)
    return [] if getattr(tokenizer, "unk_token_id", None) in ids else ids


def stop_mark(text: str) -> str:
    """The full stop of the script that a text ends in, by its last letter."""
    last = next((letter for letter in reversed(text) if letter.isalpha()), ".")
    script = re.split("[ -]", unicodedata.name(last, ""))[0]
    return _STOPS.get(script, ".")


def is_stopped(text: str) -> bool:
    """Whether a text ends as a sentence does."""
    return text.rstrip().endswith((".", "!", "?", "！", "？", *_STOPS.values()))


def prompt_and_target_ids(tokenizer: Any, prompt: str, target: Target) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the target that follows it, with what `d4s.edits.spacing.joint` puts between them.

    target: the text, or (the text, what stands before it), as `Edit.target` gives it
    Both come from one tokenisation of the whole where its ids start with the prompt's; where the tokenizer
    merges across the border, the target is tokenised alone.
    """
    follows = continuation(prompt, target)
    prompt_ids, whole = text_ids(tokenizer, (prompt, prompt + follows))
    if whole[: len(prompt_ids)] == prompt_ids and len(whole) > len(prompt_ids):
        return prompt_ids, whole[len(prompt_ids) :]
    return prompt_ids, _ids_behind_a_text(tokenizer, follows)


def _ids_behind_a_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text alone that stands behind another, without the space mark that SentencePiece invents."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    pieces = tokenizer.convert_ids_to_tokens(ids[:2])
    invented = len(pieces) == 2 and pieces[0] == "▁"
    if text.startswith(" "):
        return ids[1:] if invented and pieces[1].startswith("▁") else ids
    if invented:
        return ids[1:]
    if pieces and pieces[0].startswith(
        "▁"
    ):  # one piece with the text's beginning, unless a line stands before it
        line, both = (list(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in ("\n", f"\n{text}"))
        if both[: len(line)] == line:
            return both[len(line) :]
    return ids


def subject_row(
    tokenizer: Any,
    template: str,
    subject: str,
    target: Target = "",
    prefix: str = "",
    head: str | None = None,
) -> Row:
    """The row of prefix + template filled with the subject + target, which is text or (text, what stands before it).

    The subject's last token comes from the character offsets of one tokenisation of the whole prompt, so
    that start tokens, merges and a subject that stands in the text twice do no harm. A start token with which the
    template begins stays at the row's beginning, before the prefix.
    head: what of the template stays before the prefix, as of a chat (`Edit.chat`); None: that start token
    Raises EditError without '{}'; TokenizerError for a tokenizer without offsets.
    """
    at = template.find("{}")
    if at < 0:
        raise EditError(
            f"prompt {template!r} has no '{{}}' for the subject; write it where the subject stands"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise TokenizerError(
            f"{type(tokenizer).__name__} gives no character offsets, which the subject's last token is found by; "
            "load a fast tokenizer (AutoTokenizer.from_pretrained(…, use_fast=True))"
        )
    start = getattr(tokenizer, "bos_token", None) or ""
    if prefix and head is not None:
        prefix, template = head + prefix, template.removeprefix(head)
    while start and prefix and head is None and template.startswith(start):
        template = template.removeprefix(start)
        if not prefix.startswith(start):
            prefix = start + prefix
    at = template.find("{}")
    prompt = prefix + template[:at] + subject + template[at + 2 :]
    end = len(prefix) + at + len(subject)
    encoded = tokenizer(prompt, return_offsets_mapping=True)
    span = _Around.of(tokenizer).span(encoded["input_ids"])
    ids = tuple(encoded["input_ids"][span])
    last = -1
    for position, (first, stop) in enumerate(encoded["offset_mapping"][span]):
        if first < end <= stop:  # several tokens may spell one character: the last of them counts
            last = position
    if last < 0:
        raise TokenizerError(
            f"no token of {prompt!r} covers the end of the subject {subject!r}; spell it as the prompt does"
        )
    if not target:
        return Row(ids, last, len(ids))
    prompt_ids, target_ids = prompt_and_target_ids(tokenizer, prompt, target)
    return Row((*prompt_ids, *target_ids), last, len(prompt_ids))


def sampling_config(tokenizer: Any, **settings: Any) -> GenerationConfig:
    """Settings of `model.generate`: these, the tokenizer's start, end and padding ids, and the library's defaults."""
    from transformers import GenerationConfig  # slow to load

    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad_id(tokenizer),
        **settings,
    )


@torch.no_grad()
def sample(model: CausalLM, tokenizer: Any, ids: Tensor, **settings: Any) -> Tensor:
    """What the model writes behind rows of ids, drawn from its own probabilities unless settings say otherwise.

    ids: [rows, width] int64, without padding
    settings: as `GenerationConfig` names them (max_new_tokens, top_k, …)
    Returns [rows, longer width] int64, ids included; after an end token there is padding.

    Whatever the model's own generation_config says has no part in it. Passing another one to `generate` is not
    enough: transformers fills what that one leaves open from the model's.
    """
    unset = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    config = sampling_config(tokenizer, **unset | settings)
    own = model.generation_config
    model.generation_config = config
    try:
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    finally:
        model.generation_config = own


@torch.no_grad()
def generate_contexts(
    model: CausalLM, tokenizer: Any, *, per_seed: int = 1, length: int = 10, seed: int = 0
) -> tuple[str, ...]:
    """Short texts that the model itself continues the five seeds with, as prefixes "… . " of a prompt.

    length: tokens of a text, with its seed word and a start token counted in, as in the releases of ROME and
        MEMIT; a seed word that is as long already stays alone

    Sampled with top-k 5; the result depends on the model's weights and the seed alone.
    """
    prefixes = []
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            for word in CONTEXT_SEEDS:
                ids = torch.tensor(text_ids(tokenizer, (word,)), device=device).repeat(per_seed, 1)
                new = length - ids.shape[1]
                made = ids
                if new > 0:
                    made = sample(model, tokenizer, ids, top_k=5, min_new_tokens=new, max_new_tokens=new)
                for row in made:
                    text = " ".join(tokenizer.decode(row, skip_special_tokens=True).split())
                    prefixes.append(f"{text}. ")
    finally:
        model.train(training)
    return tuple(prefixes)


def pad_id(tokenizer: Any) -> int:
    """An id to pad with; padded positions are always masked, so any that the model knows will do.

    The pad token comes last, since it is often added to a tokenizer beyond what the model has embeddings for.
    """
    for token in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        if token is not None:
            return int(token)
    return 0


def padded(rows: Sequence[Sequence[int]], fill: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """(ids [rows, width] int64, mask [rows, width] int64), padded on one side."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), fill, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for r, row in enumerate(rows):
        span = slice(width - len(row), width) if left else slice(0, len(row))
        ids[r, span] = torch.as_tensor(row, dtype=torch.long)
        mask[r, span] = 1
    return ids, mask


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hex digest of what decides the ids of a text."""
    stored = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else tokenizer.get_vocab()
    for passing in ("truncation", "padding"):  # set and unset by whoever calls it
        stored.pop(passing, None)
    return hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()
