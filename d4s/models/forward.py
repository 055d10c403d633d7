"""Token rows of different lengths through any causal language model, with logits only where they are wanted.

Two ways. Whole rows are padded on the right, which no causal model can notice. Where several continuations of
one prompt are asked for, the prompts run once, padded on the left, and their KV cache is repeated for the
continuations. Not every model does that right (recurrent states see the padding, some positions ignore the
mask), so the second way is tried once a model on a few random rows and used only if it gives the same logits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from d4s.errors import ModelError
from d4s.models import recorded
from d4s.models.architectures import text_config
from d4s.models.causal_lm import CausalLM
from d4s.models.prompts import padded
from d4s.models.trace import head_reads
from d4s.progress import progress_bar
from d4s.ranks import here

logger = logging.getLogger("d4s.models.forward")

# What a forward may call its keys and values of the tokens so far: transformers from 5.20 or so on, and before.
CACHE_NAMES = ("cache", "past_key_values")
# What a model raises whose cache is of another kind, or whose modules are not called as others' are.
NOT_MADE_FOR_IT = (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError)
STARTS = 8  # tokens, at most, that a tokenizer puts around a text of its own accord
# Whether a model's cached way gives the logits of whole rows; found on first use, gone with the model.
_CACHED_WAY: WeakKeyDictionary[CausalLM, bool] = WeakKeyDictionary()


def most_positions(model: CausalLM) -> int | None:
    """The longest row that its configuration allows; None: it does not say."""
    config = text_config(model) if hasattr(model, "config") else None
    most: int | None = getattr(config, "max_position_embeddings", None)
    return most


@dataclass(frozen=True)
class Calling:
    """What a model's forward takes beside ids and a mask, as its signature says.

    cache: its name for the keys and values of earlier tokens; None: it takes none
    use_cache, positions: whether it takes `use_cache` and `position_ids`
    """

    cache: str | None
    use_cache: bool
    positions: bool

    @classmethod
    def of(cls, model: CausalLM) -> Calling:
        # torch.compile's wrapper takes anything, and hands it on to the model inside.
        accepted = signature(getattr(model, "_orig_mod", model).forward).parameters
        rest = any(one.kind is Parameter.VAR_KEYWORD for one in accepted.values())
        cache = next((name for name in CACHE_NAMES if name in accepted), None)
        return cls(cache, "use_cache" in accepted or (rest and cache is not None), "position_ids" in accepted)

    def without_cache(self) -> dict[str, Any]:
        """Arguments with which no cache is made."""
        return {"use_cache": False} if self.use_cache else {}

    def with_cache(self, cache: Any = None) -> dict[str, Any]:
        """Arguments with which `cache` is read and grows; None: a new one is made.

        Raises ModelError for a model that takes none.
        """
        if self.cache is None or not self.use_cache:
            raise ModelError(
                f"the model's forward takes neither {' nor '.join(CACHE_NAMES)}, so that nothing it has read can be "
                "kept; its rows have to run whole"
            )
        return {"use_cache": True} | ({} if cache is None else {self.cache: cache})

    def at(self, positions: Tensor) -> dict[str, Any]:
        """Arguments that say where in their rows the tokens stand."""
        # A copy: XGLM (transformers 5.0) adds to its positions where they lie.
        return (
            {"position_ids": positions.clone(memory_format=torch.contiguous_format)} if self.positions else {}
        )

    def cache_of(self, output: Any) -> Any:
        """What a forward with a cache gave back; None without one."""
        return None if self.cache is None else getattr(output, self.cache, None)


@dataclass
class Prefix:
    """What is kept of prompts that have run: the model's own cache and the mask of the rows so far."""

    cache: Any
    mask: Tensor  # [rows, width] int64

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; one may be repeated."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.mask.device)
        self.cache.reorder_cache(index)
        self.mask = self.mask[index]


class Forward:
    """A model's own forward pass over rows of token ids.

    model: a causal language model of transformers, in any dtype and on any device
    fill: a token id for padded positions; they are masked, so any will do
    """

    def __init__(self, model: CausalLM, fill: int) -> None:
        self.model, self.fill = model, fill
        self.calling = Calling.of(model)
        self.device = next(model.parameters()).device
        self.most_positions = most_positions(model)

    def whole(self, rows: Sequence[Sequence[int]], reads: Sequence[Sequence[int]]) -> Tensor:
        """Logits at `reads[r]` of each row r. [all reads, vocabulary], row after row, the model's dtype."""
        self._check_length(max(len(row) for row in rows))
        ids, mask = padded(rows, self.fill)
        mask = mask.to(self.device)
        return self._run(ids.to(self.device), reads, attention_mask=mask, **self.calling.without_cache())[0]

    def prompts(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Prefix]:
        """Logits after each prompt's last token, [rows, vocabulary], and what further tokens need."""
        self._check_length(max(len(row) for row in rows))
        ids, mask = (t.to(self.device) for t in padded(rows, self.fill, left=True))
        last = [(ids.shape[1] - 1,)] * len(rows)
        arguments = self.calling.at(positions_of(mask)) | self.calling.with_cache()
        logits, cache = self._run(ids, last, attention_mask=mask, **arguments)
        return logits, Prefix(cache, mask)

    def further(
        self, prefix: Prefix, rows: Sequence[Sequence[int]], reads: Sequence[Sequence[int]]
    ) -> Tensor:
        """Logits at `reads[r]` of each row r that goes on after prefix row r; the prefix grows by the rows.

        Only after rows of equal length can the prefix be used again: it keeps their padding.
        """
        ids, mask = (t.to(self.device) for t in padded(rows, self.fill))
        prefix.mask = torch.cat([prefix.mask, mask], 1)
        self._check_length(int(prefix.mask.sum(1).max()))  # padding takes no position
        positions = positions_of(prefix.mask)[:, -ids.shape[1] :]
        arguments = self.calling.at(positions) | self.calling.with_cache(prefix.cache)
        logits, prefix.cache = self._run(ids, reads, attention_mask=prefix.mask, **arguments)
        return logits

    @property
    def cached_way(self) -> bool:
        """Whether `prompts` and `further` give this model's logits of whole rows."""
        if self.model not in _CACHED_WAY:
            _CACHED_WAY[self.model] = self._cached_way_agrees()
            if not _CACHED_WAY[self.model]:
                logger.warning(
                    "%s: with a KV cache its answers are not those of whole rows; rows run whole, which takes longer",
                    type(self.model).__name__,
                )
        return _CACHED_WAY[self.model]

    def _run(self, ids: Tensor, reads: Sequence[Sequence[int]], **arguments: Any) -> tuple[Tensor, Any]:
        rows = torch.as_tensor([r for r, read in enumerate(reads) for _ in read])
        positions = torch.as_tensor([p for read in reads for p in read])

        with torch.no_grad(), head_reads(self.model, rows, positions) as gathered:
            output = self.model(input_ids=ids, **arguments)
        logits = output.logits
        read = logits[0] if gathered else logits[rows.to(logits.device), positions.to(logits.device)]
        return read, self.calling.cache_of(output)

    def _check_length(self, length: int) -> None:
        if self.most_positions is not None and length > self.most_positions:
            raise ModelError(
                f"a row of {length} tokens does not fit into the model's {self.most_positions} positions; "
                "shorten the text"
            )

    def _cached_way_agrees(self) -> bool:
        """Two random prompts of different length and two continuations, both ways.

        The relative difference is 1e-6 or so where only rounding differs (1e-2 in half precision), and near 1
        where the padding is seen or positions are wrong.
        """
        if self.calling.cache is None or not self.calling.use_cache:
            return False
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(text_config(self.model).vocab_size, (2, 17), generator=generator).tolist()
        prompts, tails = [rows[0][:8], rows[1][:13]], [rows[0][8:12], rows[1][13:15]]
        reads = [range(len(p) - 1, len(p) + len(t)) for p, t in zip(prompts, tails, strict=True)]
        whole = self.whole([p + t for p, t in zip(prompts, tails, strict=True)], reads)
        try:
            first, prefix = self.prompts(prompts)
            if not hasattr(prefix.cache, "reorder_cache"):
                return False
            prefix.select([1, 0])
            rest = self.further(prefix, tails[::-1], [range(2), range(4)])
        except torch.OutOfMemoryError:
            raise
        except NOT_MADE_FOR_IT:
            return False
        cached = torch.cat([first[:1], rest[2:], first[1:], rest[:2]])
        return same_logits(self.model, cached, whole)


def same_logits(model: CausalLM, found: Tensor, right: Tensor) -> bool:
    """Whether two ways of a model to the same logits [reads, vocabulary] differ by rounding alone."""
    weight = next(model.parameters())
    exact = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64)
    centred = right.float() - right.float().mean(1, keepdim=True)
    difference = found.float() - found.float().mean(1, keepdim=True) - centred
    return bool(difference.norm() <= (1e-4 if exact else 0.1) * centred.norm())


def positions_of(mask: Tensor) -> Tensor:
    """Each real token's place in its row; 0 at padding. [rows, width] int64."""
    return (mask.cumsum(-1) - 1).clamp_min(0)


@contextmanager
def evaluating(model: CausalLM) -> Iterator[None]:
    """Evaluation mode, and back to what it was. Tensors are made on the CPU where nothing says where, and go from there
    to their device: `torch.set_default_device` is for the caller's own."""
    training = model.training
    model.eval()
    try:
        with nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
            yield
    finally:
        model.train(training)


def most_tokens(model: CausalLM, batch_tokens: int | None) -> int:
    """Tokens that go through the model together: as asked, or by the device."""
    return batch_tokens if batch_tokens is not None else tokens_together(next(model.parameters()).device)


def tokens_together(device: torch.device) -> int:
    """Tokens that go forward through a model on this device together."""
    return 4_096 if device.type == "cpu" else 32_768


def run_in_batches(
    widths: Sequence[int],
    run: Callable[[list[int]], None],
    batch_tokens: int,
    *,
    copies: Sequence[int] | None = None,
    progress: str | None = None,
) -> None:
    """Calls `run` with the indices of rows of similar width, the widest first, until each has had its turn.

    A batch holds rows × widest ≤ batch_tokens (or a single row). `copies[i]` counts row i several times.
    Where CUDA memory runs out the batch is halved, and later ones with it, and what recorded passes keep is given back;
    a single row that does not fit then raises torch.OutOfMemoryError.
    progress: what a progress bar, or a line of a log every so often, says is being done; None: neither
    """
    order = sorted(range(len(widths)), key=lambda i: -widths[i])
    count = [1] * len(widths) if copies is None else copies
    at, again = 0, -1
    with progress_bar(len(order), "row", progress or "", shown=progress is not None, leave=False) as bar:
        while at < len(order):
            here().look()
            stop, rows = at + 1, count[order[at]]
            while stop < len(order) and (rows + count[order[stop]]) * widths[order[at]] <= batch_tokens:
                rows += count[order[stop]]
                stop += 1
            try:
                run(order[at:stop])
            except torch.OutOfMemoryError:
                if stop - at > 1:
                    batch_tokens = max(1, rows * widths[order[at]] // 2)
                elif again == at or not recorded.keep_memory():
                    raise
                again = at
            else:
                bar.update(stop - at)
                at = stop
                continue
            recorded.release()  # outside the handler, whose traceback still holds the batch's tensors
