"""Target optimisation: the hidden state z at the subject's last token that makes the model say the new object.

For each request a vector δ, from 0, is added to one place at the subject's last token in every row (each
context + prompt + target, and one extra row "{subject} is a"). Minimised is

    mean over rows and target tokens of −log p(target)
    + kl_factor · KL(p_δ ‖ p_before) at the subject's last token of the extra row
    + weight_decay · ‖δ‖ / ‖v0‖²

by Adam, projected to ‖δ‖ ≤ clamp · ‖v0‖ after each step, where v0 is the unchanged value on the bare prompt
and z = v0 + δ (Meng et al., arXiv 2202.05262 and 2210.07229). As in the released code the loss is looked at `steps`
times, and the last look is followed by no step.

With `target_eos` the token that ends a text is one more token of the target in every row: without it a model says the
new object and goes on. With `target_stop` it is a full stop, unless the target has one: behind the object of a sentence
that is likely already, where the end of the text has to be forced. The probabilities told are those of the target's own
tokens, so that they compare with p after the edit; the loss, and whether the target is the argmax, take in its end.

All other fields are the releases' by default. Of no release: steps whose length the loss itself gives
(`d4s.locate.moves`), looks at the bare prompt before those at every context, an end by the NLL alone (KL keeps the loss
above `stop_loss` long after the target is said), and products of a lower precision. δ then is another vector that is
as good; v0 and the probabilities that are kept mean what they always do.

How little of the model has to run for that: `d4s.locate.request_rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from d4s.configuration import Above, AtLeast, Configuration
from d4s.edits import Edit
from d4s.errors import ConfigError, ModelError
from d4s.interrupts import hear
from d4s.locate.moves import Adam, Moves, Polyak
from d4s.locate.precision import Precision, products_in
from d4s.locate.request_rows import Place, Request, RequestRows, bare, request_of, spares, width_of
from d4s.models.architectures import Anatomy
from d4s.models.causal_lm import CausalLM
from d4s.models.forward import STARTS, evaluating, most_positions, run_in_batches
from d4s.models.prompts import end_of_text, full_stop, is_stopped, pad_id, stop_mark
from d4s.models.recorded import Recorded, is_refused, keep_memory, recorded, release
from d4s.models.trace import Trace
from d4s.ranks import here


@dataclass(frozen=True)
class TargetConfig(Configuration):
    steps: Annotated[int, "of a target's search, at most", AtLeast(1)] = 25  # looks; Adam moves between them
    learning_rate: Annotated[float, "of a target's search (Adam)", Above(0)] = 0.5
    weight_decay: Annotated[float, "weight of ‖δ‖ / ‖v0‖²"] = 0.5
    clamp: Annotated[float, "‖δ‖ is at most this times ‖v0‖", Above(0)] = 0.75
    kl_factor: Annotated[float, "weight of the KL divergence of what follows the subject alone"] = 0.0625
    stop_loss: Annotated[float, "a search ends below it"] = 0.05
    # ENCORE's. Looks at which the target is not the argmax do not count, and do not begin the count anew.
    stop_after_argmax: Annotated[
        int | None, "a search ends so many steps after the target is the argmax in every context"
    ] = None
    # PMET's. KL is weighted by kl_factor here.
    settled_nll_factor: Annotated[
        float, "on the target's NLL once the target is the argmax in every context"
    ] = 1.0
    settled_kl: Annotated[
        float | None, "a search ends below it once the target is the argmax in every context"
    ] = None
    target_eos: Annotated[bool, "a target ends as a text does: by the end token, or else a full stop"] = False
    target_stop: Annotated[bool, "a target ends as a sentence does: with a full stop"] = False
    # Of no release: a search at a fraction of the passes (docs/results/smollm2-targets.md).
    optimizer: Annotated[
        Literal["adam", "polyak"],
        "of a target's search; polyak has no learning rate, and keeps its best look",
    ] = "adam"
    stop_nll: Annotated[float | None, "a search also ends below it, whatever KL and decay add", Above(0)] = (
        None
    )
    bare_looks: Annotated[
        int, "at the bare prompt alone, at most, before those at every context", AtLeast(0)
    ] = 0
    search_precision: Annotated[
        Precision,
        "of the search's float32 products; reduced: bfloat16 on CPUs that have it, TF32 on GPUs; what is kept of a "
        "target beside δ is taken in float32",
    ] = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_eos and self.target_stop:
            raise ConfigError(
                "target_eos and target_stop are both set; a target has one end, so set one of them"
            )


REFINED = 0.02  # nats: a target whose NLL is below is not searched on


def refining(config: TargetConfig, looks: int) -> TargetConfig:
    """The same loss, searched on in a few looks from a target that is nearly right: Polyak's steps, which have no state
    to find first and of which the best look counts."""
    stop = REFINED if config.stop_nll is None else config.stop_nll
    return replace(config, optimizer="polyak", steps=looks, stop_nll=stop, bare_looks=0)


@dataclass(frozen=True)
class Targets:
    """Results a request, on the device of the block where δ is added; float32."""

    start: Tensor  # v0 [requests, d_model]
    delta: Tensor  # δ [requests, d_model]
    first_probability: Tensor  # [requests]: exp(−mean NLL of the target's own tokens) before the first step
    last_probability: Tensor  # the same after the last

    @property
    def target(self) -> Tensor:
        """z = v0 + δ, [requests, d_model]."""
        return self.start + self.delta

    def __getitem__(self, index: slice | Sequence[int]) -> Targets:
        return Targets(
            self.start[index], self.delta[index], self.first_probability[index], self.last_probability[index]
        )

    def to(self, device: torch.device) -> Targets:
        """The same on another device, float32."""
        parts = (self.start, self.delta, self.first_probability, self.last_probability)
        return Targets(*(part.to(device, torch.float32) for part in parts))

    @staticmethod
    def concatenate(parts: Sequence[Targets]) -> Targets:
        return Targets(
            *(
                torch.cat([getattr(part, name) for part in parts])
                for name in ("start", "delta", "first_probability", "last_probability")
            )
        )


def optimise_targets(
    anatomy: Anatomy,
    tokenizer: Any,
    edits: Sequence[Edit],
    prefixes: Sequence[str],
    layer: int,
    config: TargetConfig,
    *,
    places: tuple[Place, ...] = ("block",),
    begin: Tensor | None = None,
    batch_tokens: int | None = None,
    progress: bool = False,
) -> Targets:
    """Targets of all edits, on the model's current weights.

    layer: the block at which δ is added.
    places: where in it, one δ each, optimised together: the block's output ("block"), the MLP's or the
        attention's output projection; start and delta are those of the first place.
    begin: z of one place, found on other weights, [edits, d_model]: the search begins there, within the clamp, and at
        every context; None: at v0.
    batch_tokens: tokens from the subject's last on that go through the model together; None: by device.
    progress: whether a bar, or a line of a log every so often, says how many of several are found

    A request's result does not depend on the others in its batch, up to float32 rounding. Of several processes
    (`d4s.ranks`) each searches its part of them, by the tokens of their rows, and all have the same bits of each.
    """
    if batch_tokens is None:
        batch_tokens = batch_tokens_of(anatomy.device_of(layer))
    ending = _endings(anatomy, tokenizer, edits, config)
    requests = [request_of(tokenizer, edit, prefixes, ending(edit.target_new)) for edit in edits]
    for edit, request in zip(edits, requests, strict=True):
        _check_length(anatomy, edit, request)
    ranks = here()
    ids = [edit.id for edit in edits]
    label = "target search" if progress and len(edits) > 1 else None
    if ranks.count == 1:
        return _search(anatomy, tokenizer, ids, requests, layer, config, places, begin, batch_tokens, label)

    def rows_of_figures(own: Sequence[int]) -> list[NDArray[Any]]:
        names, part = [ids[i] for i in own], [requests[i] for i in own]
        z = None if begin is None else begin[own]
        found = _search(anatomy, tokenizer, names, part, layer, config, places, z, batch_tokens, label)
        return list(_packed(found))

    costs = [len(one.after) * (width_of(one.before) + width_of(one.after)) for one in requests]
    return _unpacked(ranks.share("targets", costs, rows_of_figures), anatomy.device_of(layer))


def check_lengths(
    anatomy: Anatomy, tokenizer: Any, edits: Sequence[Edit], prefixes: Sequence[str], config: TargetConfig
) -> None:
    """Raises ModelError for an edit whose rows are longer than the model's positions, before any is searched."""
    most = most_positions(anatomy.model)
    if most is None:
        return
    longest = max((len(prefix.encode()) for prefix in prefixes), default=0) + STARTS
    ending = _endings(anatomy, tokenizer, edits, config)
    for edit in edits:
        # A token has a byte at the least, so that few have to be cut into tokens here.
        if len(f"{edit.text} {edit.target_new}".encode()) + longest > most:
            _check_length(anatomy, edit, request_of(tokenizer, edit, prefixes, ending(edit.target_new)))


def _check_length(anatomy: Anatomy, edit: Edit, request: Request) -> None:
    most = most_positions(anatomy.model)
    length = max(len(b) + len(a) for b, a in zip(request.before, request.after, strict=True))
    if most is not None and length > most:
        raise ModelError(
            f"edit {edit.id}: prompt and target behind the longest context are {length} tokens long, and the model has "
            f"{most} positions; shorten the prompt, or set contexts=0"
        )


def _endings(
    anatomy: Anatomy, tokenizer: Any, edits: Sequence[Edit], config: TargetConfig
) -> Callable[[str], Sequence[int]]:
    """Text of a target → the tokens that end it."""
    end = end_of_text(anatomy.model, tokenizer) if config.target_eos else ()
    marks = {stop_mark(edit.target_new) for edit in edits} if config.target_stop else set()
    stops = {mark: full_stop(tokenizer, mark) for mark in marks}
    return lambda text: end or (() if not stops or is_stopped(text) else stops[stop_mark(text)])


def _packed(targets: Targets) -> NDArray[Any]:
    """A row a request: v0, δ and both probabilities. [requests, 2 d_model + 2] float32"""
    ends = (targets.first_probability.unsqueeze(1), targets.last_probability.unsqueeze(1))
    return torch.cat([targets.start, targets.delta, *ends], 1).cpu().numpy()


def _unpacked(rows: Sequence[NDArray[Any]], device: torch.device) -> Targets:
    """What `_packed` made rows of."""
    whole = torch.from_numpy(numpy.stack(rows)).to(device)
    start, delta = (part.contiguous() for part in whole[:, :-2].chunk(2, dim=1))
    return Targets(start, delta, whole[:, -2].contiguous(), whole[:, -1].contiguous())


def _search(
    anatomy: Anatomy,
    tokenizer: Any,
    ids: Sequence[str],
    requests: Sequence[Request],
    layer: int,
    config: TargetConfig,
    places: tuple[Place, ...],
    z: Tensor | None,
    batch_tokens: int,
    label: str | None,
) -> Targets:
    """Of these requests, by this process. ids: their edits', for what is said of one; z: where the search begins;
    label: what a progress bar says"""
    prefixed = any(len(request.before) > 2 for request in requests)
    # Requests of similar length go together, before the subject's last token too: little padding.
    order = sorted(range(len(requests)), key=lambda i: -width_of(requests[i].before))
    found: dict[int, Targets] = {}

    def run(chosen: list[int]) -> None:
        batch = [requests[order[i]] for i in chosen]

        def rows_of(parts: list[Request]) -> RequestRows:
            return RequestRows(anatomy, pad_id(tokenizer), parts, layer, places, whole=whole)

        begin = None
        try:
            if config.bare_looks and prefixed and z is None:
                shorter = rows_of([bare(request) for request in batch])
                begin = _optimise(shorter, config, config.bare_looks)[1]
            rows = rows_of(batch)
            if z is not None:
                v0 = rows.start[0]
                begin = [_clamped(z[[order[i] for i in chosen]].to(v0) - v0, config.clamp * v0.norm(dim=1))]
            targets = _optimise(rows, config, begin=begin)[0]
        except _OverflowError as overflow:
            raise ModelError(f"edit {ids[order[chosen[overflow.request]]]}: {overflow}") from None
        found.update((order[i], targets[at : at + 1]) for at, i in enumerate(chosen))

    with frozen(anatomy.model):
        whole = not spares(anatomy, layer, places)
        after = [requests[i].after for i in order]
        widths = [width_of(rows) for rows in after]
        if whole:
            widths = [w + width_of(requests[i].before) for w, i in zip(widths, order, strict=True)]
        run_in_batches(widths, run, batch_tokens, copies=[len(rows) for rows in after], progress=label)
    if len(requests) > 1 and keep_memory():  # one edit's is little, and the next one takes it
        release()
    return Targets.concatenate([found[i] for i in range(len(requests))]).to(anatomy.device_of(layer))


def batch_tokens_of(device: torch.device) -> int:
    """Tokens from the subject's last on that go through a model on this device together."""
    return 2_048 if device.type == "cpu" else 16_384


@contextmanager
def frozen(model: CausalLM) -> Iterator[None]:
    """No dropout, and no gradient to weights: only δ has one."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


class _OverflowError(Exception):
    """A forward or backward pass in float16 went beyond its range. request: the first one that it happened to"""

    def __init__(self, message: str, request: int) -> None:
        super().__init__(message)
        self.request = request


def _overflow(
    rows: RequestRows, failing: Sequence[Tensor], request: int, config: TargetConfig
) -> _OverflowError:
    """The error, with the first block whose output is not finite. failing: δ of each place, where it happened"""
    cure = (
        "load the model in bfloat16 (--dtype bfloat16) or float32, or take a smaller clamp "
        f"(clamp={config.clamp:g} now)"
    )
    if not all(bool(torch.isfinite(delta).all()) for delta in failing):
        return _OverflowError(
            f"the search of its target overflowed float16, which ends at 65504, in the backward pass; {cure}",
            request,
        )
    blocks = rows.anatomy.blocks
    first = None
    with ExitStack() as stack, torch.no_grad():
        traces = [stack.enter_context(Trace(block)) for block in blocks]
        rows.log_probabilities(failing)
    for number, trace in enumerate(traces):
        if hasattr(trace, "output") and not torch.isfinite(trace.output).all():
            first = number
            break
    where = "behind the last block" if first is None else f"in {rows.anatomy.architecture.blocks}.{first}"
    length = float(failing[0][request].norm())
    return _OverflowError(
        f"the search of its target overflowed float16, which ends at 65504, {where}, with δ of length {length:.3g}; "
        f"{cure}",
        request,
    )


def _optimise(
    rows: RequestRows,
    config: TargetConfig,
    looks: int | None = None,
    begin: Sequence[Tensor] | None = None,
) -> tuple[Targets, list[Tensor]]:
    """Moves every δ at once, a request a row; requests that are done leave. (targets, δ of each place)

    looks: None: as many as configured
    begin: δ of each place, [requests, d_model], within the clamp; None: 0
    """
    looks = config.steps if looks is None else looks
    count, device = rows.count, rows.device
    start = [s.clone() for s in rows.start]
    bound = [config.clamp * s.norm(dim=1) for s in start]
    square = [s.square().sum(1) for s in start]
    result = [torch.zeros_like(s) for s in start]
    first = torch.zeros(count, dtype=torch.float32, device=device)
    last = torch.zeros_like(first)
    alive = torch.arange(count, device=device)  # requests still in the batch, by their first number
    deltas = [torch.zeros_like(s) for s in start]
    moves: Moves = Adam(start, config.learning_rate) if config.optimizer == "adam" else Polyak()
    done = torch.zeros(count, dtype=torch.bool, device=device)
    looks_as_argmax = torch.zeros(count, dtype=torch.long, device=device)
    nll_factor = torch.ones_like(first)
    least = torch.full_like(first, torch.inf)  # loss of the look that counts, where the best does
    reference: Tensor | None = None
    ends_early = config.stop_nll is not None or begin is not None
    pause = 1 if ends_early and device.type == "cpu" else 4  # looks
    # float16 overflows where others have room: the first δ with which it did is kept, and told at the end.
    narrow = next(rows.model.parameters()).dtype == torch.float16
    overflowed = torch.zeros(count, dtype=torch.bool, device=device)
    failing = [torch.zeros_like(s) for s in start]

    # Probabilities that are kept, and what KL compares with, are δ = 0's in float32.
    apart = config.search_precision != "float32"
    everything = copy(rows) if apart or narrow else rows  # the copy keeps what `rows` will lose
    ahead = begin is not None or apart or _is_worth_recording(rows, looks)
    if ahead:
        with torch.no_grad():
            log_p = rows.log_probabilities(deltas)
        reference = log_p[rows.extra]
        first = torch.exp(-mean_nll(rows, log_p, rows.own_weight))
        deltas = deltas if begin is None else list(begin)

    again: Recorded | None = None
    tried = False  # to record looks at these requests
    for look in range(looks):
        if here().count == 1:  # several processes end a step together
            hear()
        goes_on = look < looks - 1
        square_left = [q[alive] for q in square]
        if not tried and reference is not None and _is_worth_recording(rows, looks - look):
            tried = True
            look_on = partial(_recorded_look, rows, config, reference, square_left)
            again = recorded(rows.model, look_on, [nll_factor, *deltas])
        if again is not None:
            seen = _Look.of(again(nll_factor, *deltas))
        else:
            seen = _look(rows, config, reference, square_left, nll_factor, deltas, goes_on)
        reference = seen.extra if reference is None else reference
        deltas = [d.detach() for d in deltas]
        if narrow:
            lost = ~torch.isfinite(seen.loss) & ~done
            overflowed[alive] |= lost
            for total, delta in zip(failing, deltas, strict=True):
                total[alive] = torch.where(lost.unsqueeze(1), delta, total[alive])
            done = done | lost
        if look == 0 and not ahead:
            first[alive] = seen.probability
        counts = ~done
        if config.optimizer != "adam":
            counts = counts & (seen.loss < least)
            least = torch.where(counts, seen.loss, least)
        last[alive] = torch.where(counts, seen.probability, last[alive])
        for total, delta in zip(result, deltas, strict=True):
            total[alive] = torch.where(counts.unsqueeze(1), delta, total[alive])
        done = done | (seen.loss < config.stop_loss)
        if config.stop_nll is not None:
            done = done | (seen.nll < config.stop_nll)
        if config.stop_after_argmax is not None:
            looks_as_argmax = looks_as_argmax + seen.settled
            done = done | (looks_as_argmax > config.stop_after_argmax)
        if config.settled_kl is not None:
            done = done | (seen.settled & (seen.weighted_kl <= config.settled_kl))
        nll_factor = torch.where(seen.settled, config.settled_nll_factor, 1.0).to(first.dtype)
        if not goes_on:
            break
        with torch.no_grad():
            limits = [limit[alive] for limit in bound]
            for p, moved in enumerate(moves.move(deltas, seen.gradients, seen.nll, limits)):
                deltas[p] = torch.where(done.unsqueeze(1), deltas[p], _clamped(moved, limits[p]))
        # The only look at the device: are enough requests done to shrink the batch? A GPU waits for it, and a release's
        # search ends late; a CPU waits for nothing.
        if look % pause == pause - 1:
            left = (~done).nonzero().squeeze(1)
            if len(left) == 0:
                break
            if len(left) <= 0.75 * rows.count:
                deltas = [d[left] for d in deltas]
                moves.keep_requests(left)
                looks_as_argmax, nll_factor = looks_as_argmax[left], nll_factor[left]
                reference, alive, done, least = reference[left], alive[left], done[left], least[left]
                rows.keep_requests(left)
                again, tried = None, False
    if narrow and bool(overflowed.any()):
        raise _overflow(everything, failing, int(overflowed.nonzero()[0]), config)
    if apart:
        with torch.no_grad():
            last = torch.exp(
                -mean_nll(everything, everything.log_probabilities(result), everything.own_weight)
            )
    return Targets(start[0], result[0], first, last), result


@dataclass(frozen=True)
class _Look:
    """What a look at δ has seen, without a gradient of its own; [requests] but for `extra` and `gradients`."""

    loss: Tensor
    nll: Tensor
    weighted_kl: Tensor
    probability: Tensor  # of the target's own tokens
    settled: Tensor
    extra: Tensor  # log p at the extra rows, [requests, vocabulary]
    gradients: tuple[Tensor, ...]  # of each place, [requests, d_model]; of the last look nobody asks

    @classmethod
    def of(cls, parts: Sequence[Tensor]) -> _Look:
        loss, nll, weighted_kl, probability, settled, extra, *gradients = parts
        return cls(loss, nll, weighted_kl, probability, settled, extra, tuple(gradients))

    @property
    def parts(self) -> tuple[Tensor, ...]:
        once = (self.loss, self.nll, self.weighted_kl, self.probability, self.settled, self.extra)
        return (*once, *self.gradients)


def _look(
    rows: RequestRows,
    config: TargetConfig,
    reference: Tensor | None,
    square: Sequence[Tensor],
    nll_factor: Tensor,
    deltas: Sequence[Tensor],
    goes_on: bool,
) -> _Look:
    """reference: of `loss_terms`; None: these δ are 0. goes_on: whether gradients are wanted"""
    deltas = [d.detach().requires_grad_(goes_on) for d in deltas]
    with products_in(config.search_precision, rows.device):
        with torch.set_grad_enabled(goes_on):
            log_p = rows.log_probabilities(deltas)
            extra = log_p[rows.extra].detach()
            before = extra if reference is None else reference
            nll, weighted_kl, decay = loss_terms(rows, log_p, deltas, before, square, config)
            loss = nll_factor * nll + weighted_kl + decay
        gradients = torch.autograd.grad(loss.sum(), deltas) if goes_on else ()
    log_p = log_p.detach()
    return _Look(
        loss.detach(),
        nll.detach(),
        weighted_kl.detach(),
        torch.exp(-mean_nll(rows, log_p, rows.own_weight)),
        _settled(rows, log_p),
        extra,
        tuple(gradients),
    )


def _recorded_look(
    rows: RequestRows,
    config: TargetConfig,
    reference: Tensor,
    square: Sequence[Tensor],
    nll_factor: Tensor,
    *deltas: Tensor,
) -> tuple[Tensor, ...]:
    return _look(rows, config, reference, square, nll_factor, deltas, True).parts


# Positions times weights of a look that is recorded, at most: with more a GPU has enough to do, and what a recording
# keeps of its memory matters. 64 edits of a model of 135 M have half of it.
RECORDED_WORK = 10**12
RECORDED_LOOKS = 4  # that are left at least


def _is_worth_recording(rows: RequestRows, looks: int) -> bool:
    """Whether looks, so many of which are left, are run as one CUDA graph."""
    # Routing to experts is found on the device, and waited for.
    if not rows.is_on_one_gpu or looks < RECORDED_LOOKS or rows.anatomy.has_experts or is_refused(rows.model):
        return False
    return rows.ids.numel() * sum(weight.numel() for weight in rows.model.parameters()) <= RECORDED_WORK


def _clamped(deltas: Tensor, radius: Tensor) -> Tensor:
    """Shortened to ‖δ‖ ≤ radius. deltas: [requests, d_model]; radius: [requests]"""
    return deltas * (radius / deltas.norm(dim=1).clamp_min(1e-30)).clamp_max(1.0).unsqueeze(1)


def loss_terms(
    rows: RequestRows,
    log_p: Tensor,
    deltas: Sequence[Tensor],
    before: Tensor,
    square: Sequence[Tensor],
    config: TargetConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean −log p of the target, kl_factor · KL(p_δ ‖ p_before), weight_decay · Σ ‖δ‖ / ‖v0‖²), [requests] each.

    log_p: at the reads of `rows`, [reads, vocabulary]; before: of the extra rows at δ = 0, [requests, vocabulary]
    deltas, square: δ [requests, d_model] and ‖v0‖² [requests] of each place
    """
    extra = log_p[rows.extra]
    kl = (extra.exp() * (extra - before)).sum(1)
    decay = torch.stack([d.norm(dim=1) / s for d, s in zip(deltas, square, strict=True)]).sum(0)
    return mean_nll(rows, log_p, rows.weight), config.kl_factor * kl, config.weight_decay * decay


def mean_nll(rows: RequestRows, log_p: Tensor, weight: Tensor) -> Tensor:
    """Σ weight · −log p(the token expected), of each request's reads. [requests]"""
    chosen = log_p.gather(1, rows.wanted.unsqueeze(1)).squeeze(1)
    nothing = torch.zeros(rows.count, dtype=log_p.dtype, device=rows.device)
    return nothing.index_add(0, rows.owner[rows.row], -chosen * weight)


def _settled(rows: RequestRows, log_p: Tensor) -> Tensor:
    """Requests whose target tokens, its end included, are all the argmax. [requests] bool."""
    wrong = ((log_p.detach().argmax(1) != rows.wanted) & ~rows.is_extra).long()
    return (
        torch.zeros(rows.count, dtype=torch.long, device=rows.device).index_add(
            0, rows.owner[rows.row], wrong
        )
        == 0
    )
