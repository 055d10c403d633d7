"""Token rows of several requests on their way through the model, with δ added at each subject's last token.

Place, Request, and `RequestRows`, which keeps what δ cannot change and runs the rest. δ reaches only positions from
the subject's last token on, and only blocks after the changed one. So the text before that token runs once, as a KV
cache, and what all requests have in common at its beginning (a context) runs once for all of them; the blocks up to
the changed one run once and are then replaced by what they put out; MLPs see no padding, and the last one, like the
head, only the positions whose logits are read. All of this happens through hooks around the model's own forward,
whose masks, rotary positions, soft-caps and norms stay its own business.

Not every model can be cut up like that (recurrent states, caches and positions of its own kind). So `spares` tries it
once a model and place, on a few random rows, against whole rows with nothing left out; where they differ, whole rows it
is.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from d4s.edits import Edit
from d4s.models.architectures import Anatomy, text_config
from d4s.models.causal_lm import CausalLM
from d4s.models.forward import NOT_MADE_FOR_IT, Calling, positions_of, same_logits
from d4s.models.prompts import padded, subject_row
from d4s.models.trace import Trace, first_tensor, head_reads, replaced_forward, stopping

if TYPE_CHECKING:
    from transformers import DynamicCache

logger = logging.getLogger("d4s.locate.request_rows")

Place = Literal["block", "mlp", "attention"]
# Whether the sparing way agrees with whole rows, by layer and places; found on first use, gone with the model.
_SPARES: WeakKeyDictionary[CausalLM, dict[tuple[int, tuple[Place, ...]], bool]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Request:
    """Token rows of one edit. Loss positions are counted from the subject's last token."""

    before: list[tuple[int, ...]]  # ids before the subject's last token, a row; the extra row is the last
    after: list[tuple[int, ...]]  # ids from it on, without the target's last token
    read: list[tuple[int, ...]]  # positions in `after` whose logits are read
    target: list[tuple[int, ...]]  # the ids expected there
    ends: int = 0  # how many of them, the last ones, end the text and are not the target's own


def request_of(tokenizer: Any, edit: Edit, prefixes: Sequence[str], end: Sequence[int] = ()) -> Request:
    """Rows prefix + prompt + new target for each prefix and none, and one extra row, "{subject} is a".

    end: ids that follow the target, and are as much expected as its own: those by which a text ends
    """
    before, after, read, target = [], [], [], []
    for prefix in ("", *prefixes):
        row = subject_row(
            tokenizer, edit.prompt, edit.subject, edit.target(edit.target_new), prefix, edit.chat
        )
        at = row.subject_last
        ids = (*row.ids, *end)
        before.append(ids[:at])
        after.append(ids[at:-1])
        read.append(tuple(range(row.target_start - 1 - at, len(ids) - 1 - at)))
        target.append(ids[row.target_start :])
    extra = subject_row(tokenizer, "{} is a", edit.subject)
    before.append(extra.ids[: extra.subject_last])
    after.append((extra.ids[extra.subject_last],))
    read.append((0,))
    target.append((0,))  # not a target: the whole distribution is compared
    return Request(before, after, read, target, len(end))


def bare(request: Request) -> Request:
    """Its rows of the bare prompt and the extra one, without the contexts'."""
    before, after, read, target = (
        [rows[0], rows[-1]] for rows in (request.before, request.after, request.read, request.target)
    )
    return Request(before, after, read, target, request.ends)


def select_rows(cache: DynamicCache, index: Tensor) -> None:
    """Keep these rows, in every layer on its own device."""
    for layer in cache.layers:
        keys = getattr(layer, "keys", None)
        layer.batch_select_indices(index if keys is None else index.to(keys.device))


def _copied(cache: DynamicCache | None) -> DynamicCache | None:
    """A cache that may grow while the given one stays. Tensors are shared: growing concatenates anew."""
    if cache is None:
        return None
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin


class RequestRows:
    """Some requests on their way through the model: what is kept of the fixed part, and the rows left.

    device: where token ids go in and logits come out, and where δ and all that is counted here is
    count: requests left; owner: the request of each row [rows]; start: v0 of each place, [requests, d_model] float32
    row, read, wanted: of each logit that is read, its row, its position in it, and the token expected [reads]
    weight: of its −log p in the loss; own_weight: in the mean over the target's own tokens, without what ends it
    is_extra: whether it is the extra row's, whose indices are `extra`
    whole: run every row from its first token through every module, and leave nothing out
    """

    def __init__(
        self,
        anatomy: Anatomy,
        fill: int,
        requests: Sequence[Request],
        layer: int,
        places: tuple[Place, ...],
        *,
        whole: bool = False,
    ) -> None:
        self.anatomy, self.device = anatomy, anatomy.device
        self.model: CausalLM = anatomy.model
        self.calling = Calling.of(self.model)
        self.layer, self.places, self.whole = layer, places, whole
        # Blocks 0 … skipped − 1 put out the same whatever δ is.
        first = layer + 1 if places == ("block",) else layer
        self.skipped = 0 if whole else min(first, anatomy.skippable)
        self.count = len(requests)
        rows_of = [len(r.after) for r in requests]
        self.owner = torch.repeat_interleave(torch.arange(self.count), torch.as_tensor(rows_of)).to(
            self.device
        )
        self.first_row = (torch.as_tensor(rows_of).cumsum(0) - torch.as_tensor(rows_of)).to(self.device)

        before = [ids for r in requests for ids in r.before]
        after = [ids for r in requests for ids in r.after]
        # Where in a row the subject's last token stands, [rows]: it is the first of `after`.
        starts = [len(ids) if whole else 0 for ids in before]
        self.at = torch.as_tensor(starts, device=self.device)
        if whole:
            after = [(*b, *a) for b, a in zip(before, after, strict=True)]
            before = [()] * len(before)
        self.ids, after_mask = (t.to(self.device) for t in padded(after, fill))
        kinds = [a for r in requests for a in range(len(r.before))]
        self.cache, self.mask = self._run_before(before, kinds, after_mask, fill)
        self.positions = positions_of(self.mask)[:, -self.ids.shape[1] :]

        row, read, wanted, weight, own_weight, extra = [], [], [], [], [], []
        number = 0
        for r in requests:
            for a in range(len(r.after)):
                is_extra = a == len(r.after) - 1
                own = len(r.target[a]) - r.ends
                for t, (position, token) in enumerate(zip(r.read[a], r.target[a], strict=True)):
                    row.append(number)
                    read.append(starts[number] + position)
                    wanted.append(token)
                    extra.append(is_extra)
                    weight.append(0.0 if is_extra else 1 / ((len(r.after) - 1) * len(r.target[a])))
                    own_weight.append(0.0 if is_extra or t >= own else 1 / ((len(r.after) - 1) * own))
                number += 1
        self.row, self.read = torch.as_tensor(row).to(self.device), torch.as_tensor(read).to(self.device)
        self.wanted = torch.as_tensor(wanted).to(self.device)
        self.weight = torch.as_tensor(weight, dtype=torch.float32).to(self.device)
        self.own_weight = torch.as_tensor(own_weight, dtype=torch.float32).to(self.device)
        self.is_extra = torch.as_tensor(extra).to(self.device)
        self._find_needed()
        self._keep_fixed_part()

    def _find_needed(self) -> None:
        """Indices that a mask in the loop would wait for the device to find, again and again: of the extra rows' reads,
        and of the positions that MLPs have to see, counted through all rows."""
        self.extra = self.is_extra.nonzero().squeeze(1)
        width = self.ids.shape[1]
        self.present = self.mask[:, -width:].reshape(-1).nonzero().squeeze(1)
        self.read_out = self.row * width + self.read

    def _run_before(
        self, before: Sequence[Sequence[int]], kinds: Sequence[int], after_mask: Tensor, fill: int
    ) -> tuple[DynamicCache | None, Tensor]:
        """Keys and values of the text before the subject's last token; the mask of the whole rows.

        kinds: which rows begin alike (with one context): what all of a kind have in common runs once.
        """
        groups = [
            [row for row, k in zip(before, kinds, strict=True) if k == kind] for kind in range(max(kinds) + 1)
        ]
        shared = [_common_start(rows) for rows in groups]
        # What follows is padded behind the shared part, and attention windows count padding.
        longest = max(shared) + max(len(row) - shared[k] for row, k in zip(before, kinds, strict=True))
        if longest + after_mask.shape[1] > self._window():
            shared = [0] * len(shared)
        cache, mask = self._run_further(
            None, None, [rows[0][:n] for rows, n in zip(groups, shared, strict=True)], fill
        )
        index = torch.as_tensor(kinds, device=self.device)
        if cache is not None:
            select_rows(cache, index)
        rest = [row[shared[kind] :] for row, kind in zip(before, kinds, strict=True)]
        cache, mask = self._run_further(cache, mask[index], rest, fill)
        return cache, torch.cat([mask, after_mask], 1)

    @torch.no_grad()
    def _run_further(
        self, cache: DynamicCache | None, mask: Tensor | None, rows: Sequence[Sequence[int]], fill: int
    ) -> tuple[DynamicCache | None, Tensor]:
        """Cache and mask, longer by the rows, padded on the left; where these are empty, as they were."""
        ids, added = (t.to(self.device) for t in padded(rows, fill, left=True))
        width = ids.shape[1]
        mask = added if mask is None else torch.cat([mask, added], 1)
        if width == 0:
            return cache, mask
        from transformers import DynamicCache  # slow to load

        cache = DynamicCache(config=self.model.config) if cache is None else cache
        nothing = torch.zeros(0, dtype=torch.long, device=self.device)
        spared = self._sparing(0, added.reshape(-1).nonzero().squeeze(1), nothing, ids.numel())
        unread = torch.zeros(1, dtype=torch.long)
        arguments = self.calling.at(positions_of(mask)[:, -width:]) | self.calling.with_cache(cache)
        with replaced_forward(spared), head_reads(self.model, unread, unread):
            self.model(input_ids=ids, attention_mask=mask, **arguments)
        return cache, mask

    def _window(self) -> float:
        """How far back every block sees, in positions."""
        names = ("sliding_window", "window_size", "attention_chunk_size")
        config = text_config(self.model)
        sizes = (getattr(config, name, None) for name in names)
        return min((size for size in sizes if isinstance(size, int)), default=math.inf)

    def _sparing(
        self, first: int, needed: Tensor, needed_last: Tensor, positions: int
    ) -> dict[nn.Module, Callable[..., Any]]:
        """Forwards of the MLPs from block `first` on that leave out positions nobody needs.

        needed, needed_last: positions, counted through all rows, that they have to see, and that the last one has to
        positions: how many there are
        """
        spared: dict[nn.Module, Callable[..., Any]] = {}
        if self.whole:
            return spared
        for i in range(first, len(self.anatomy)):
            here = needed_last if i == len(self.anatomy) - 1 else needed
            if (mlp := self.anatomy.mlp(i)) is not None and len(here) < 0.9 * positions:
                spared[mlp] = _only_at(mlp, here)
        return spared

    def _forward(self) -> Any:
        calling, cache = self.calling, _copied(self.cache)
        arguments = calling.at(self.positions)
        arguments |= calling.without_cache() if cache is None else calling.with_cache(cache)
        return self.model(input_ids=self.ids, attention_mask=self.mask, **arguments)

    def _module(self, place: Place) -> nn.Module:
        if place == "mlp":
            return self.anatomy.projection(self.layer)
        if place == "attention":
            return self.anatomy.attention_output(self.layer)
        return self.anatomy.blocks[self.layer]

    @torch.no_grad()
    def _keep_fixed_part(self) -> None:
        """Runs the rows once up to the changed block; keeps what the skipped blocks put out, and v0."""
        rows = self.ids.shape[0]
        with ExitStack() as stack:
            traces = [stack.enter_context(Trace(self._module(place), copied=True)) for place in self.places]
            kept = None
            if self.skipped:
                kept = stack.enter_context(Trace(self.anatomy.blocks[self.skipped - 1]))
            stack.enter_context(stopping())
            stack.enter_context(Trace(self.anatomy.blocks[self.layer], stop=True))
            self._forward()
        self.start = [
            t.output.reshape(rows, self.ids.shape[1], -1)[
                self.first_row.to(t.output.device), self.at[self.first_row].to(t.output.device)
            ]
            .float()
            .to(self.device)
            for t in traces
        ]
        self.kept = None if kept is None else kept.returned

    def _changed(self, deltas: Sequence[Tensor]) -> ExitStack:
        """The model with δ added, the skipped blocks replaced, and the head reading loss positions only."""
        stack = ExitStack()
        rows = self.ids.shape[0]

        def plus(place_delta: Tensor) -> Callable[[Tensor], Tensor]:
            def edit(output: Tensor) -> Tensor:
                shaped = output.reshape(rows, self.ids.shape[1], -1)
                if self.whole:
                    added = place_delta[self.owner].to(shaped)
                    row = torch.arange(rows, device=shaped.device)
                    at = self.at.to(shaped.device)
                    return shaped.index_put((row, at), added, accumulate=True).view(output.shape)
                first = shaped[:, :1] + place_delta[self.owner].unsqueeze(1).to(shaped)
                return torch.cat([first, shaped[:, 1:]], 1).view(output.shape)

            return edit

        if self.skipped > self.layer:
            hidden = plus(deltas[0])(first_tensor(self.kept))
            returned: Any = (hidden, *self.kept[1:]) if isinstance(self.kept, tuple) else hidden
        else:
            returned = self.kept
            for place, delta in zip(self.places, deltas, strict=True):
                stack.enter_context(Trace(self._module(place), edit=plus(delta)))
        replaced: dict[nn.Module, Callable[..., Any]] = {
            self.anatomy.blocks[i]: (lambda *_args, **_kwargs: returned) for i in range(self.skipped)
        }
        replaced |= self._sparing(self.layer + 1, self.present, self.read_out, self.ids.numel())
        stack.enter_context(replaced_forward(replaced))
        stack.enter_context(head_reads(self.model, self.row, self.read))
        return stack

    def log_probabilities(self, deltas: Sequence[Tensor]) -> Tensor:
        """With a δ a place, each [requests, d_model]: [reads, vocabulary] float32."""
        with self._changed(deltas):
            logits = self._forward().logits
        return log_softmax(logits[0].float(), -1).to(self.device)

    @property
    def is_on_one_gpu(self) -> bool:
        """Whether nothing in a run over the rows leaves their device, and that is a GPU."""
        return self.device.type == "cuda" and all(
            self.anatomy.device_of(block) == self.device for block in range(len(self.anatomy))
        )

    def keep_requests(self, left: Tensor) -> None:
        """Drops the rows of all requests but those at `left` (ascending)."""
        number = torch.full((self.count,), -1, dtype=torch.long, device=self.device)
        number[left] = torch.arange(len(left), device=self.device)
        rows = (number[self.owner] >= 0).nonzero().squeeze(1)
        row_number = torch.full((len(self.owner),), -1, dtype=torch.long, device=self.device)
        row_number[rows] = torch.arange(len(rows), device=self.device)
        reads = (row_number[self.row] >= 0).nonzero().squeeze(1)
        self.row = row_number[self.row[reads]]
        self.read, self.wanted = self.read[reads], self.wanted[reads]
        self.weight, self.is_extra = self.weight[reads], self.is_extra[reads]
        self.own_weight = self.own_weight[reads]
        self.owner, self.ids = number[self.owner[rows]], self.ids[rows]
        self.mask, self.positions, self.at = self.mask[rows], self.positions[rows], self.at[rows]
        if self.cache is not None:
            self.cache = _copied(self.cache)
            select_rows(self.cache, rows)
        if self.kept is not None:
            whole = first_tensor(self.kept)
            first = whole.index_select(self.anatomy.architecture.rows_dimension, rows.to(whole.device))
            self.kept = (first, *self.kept[1:]) if isinstance(self.kept, tuple) else first
        self.count = len(left)
        self._find_needed()


def spares(anatomy: Anatomy, layer: int, places: tuple[Place, ...]) -> bool:
    """Whether what `RequestRows` leaves out makes no difference for this model, layer and places.

    Two random requests of different lengths, with a random δ as long as v0, are run both ways.
    """
    known = _SPARES.setdefault(anatomy.model, {})
    if (layer, places) not in known:
        known[layer, places] = _sparing_agrees(anatomy, layer, places)
        if not known[layer, places]:
            logger.warning(
                "%s: its rows cannot be cut at the subject's last token; targets are searched on whole rows, which "
                "takes longer",
                type(anatomy.model).__name__,
            )
    return known[layer, places]


@torch.no_grad()
def _sparing_agrees(anatomy: Anatomy, layer: int, places: tuple[Place, ...]) -> bool:
    generator = torch.Generator().manual_seed(0)
    vocabulary = text_config(anatomy.model).vocab_size
    ids = torch.randint(vocabulary, (2, 12), generator=generator).tolist()
    context = ids[0][:3]
    requests = []
    for own, length in zip(ids, (2, 4), strict=True):
        head, tail = tuple(own[4 : 4 + length]), tuple(own[9 - length : 12])
        before: list[tuple[int, ...]] = [head, (*context, *head), (own[0],)]
        end = (len(tail) - 2, len(tail) - 1)
        target = (own[0], own[1])
        requests.append(Request(before, [tail, tail, tail[:1]], [end, end, (0,)], [target, target, (0,)]))

    plain = RequestRows(anatomy, 0, requests, layer, places, whole=True)
    noise = [
        torch.randn(start.shape, dtype=torch.float32, generator=generator).to(start) for start in plain.start
    ]
    deltas = [
        start.norm(dim=1, keepdim=True) * one / one.norm(dim=1, keepdim=True)
        for one, start in zip(noise, plain.start, strict=True)
    ]
    right = plain.log_probabilities(deltas)
    try:
        found = RequestRows(anatomy, 0, requests, layer, places).log_probabilities(deltas)
    except torch.OutOfMemoryError:
        raise
    except NOT_MADE_FOR_IT:
        return False
    return same_logits(anatomy.model, found, right)


def width_of(rows: Sequence[Sequence[int]]) -> int:
    return max(len(row) for row in rows)


def _common_start(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows have in common at their beginning."""
    alike = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows, strict=False))
    return sum(1 for _ in alike)


def _only_at(module: nn.Module, needed: Tensor) -> Callable[..., Any]:
    """The forward of a module that treats each position by itself, computed at some positions; zero at the others.

    needed: positions, counted through all rows
    """
    own = module.forward

    def forward(*arguments: Tensor, **named: Any) -> Any:
        shape = arguments[0].shape
        here = needed.to(arguments[0].device)
        flat = [a.reshape(-1, a.shape[-1])[here].unsqueeze(0) for a in arguments]
        output = own(*flat, **named)
        if not isinstance(output, Tensor):  # a router's logits beside it, say
            return own(*arguments, **named)
        places = output.new_zeros(shape[:-1].numel(), output.shape[-1])
        return places.index_copy(0, here, output.squeeze(0)).view(*shape[:-1], -1)

    return forward
