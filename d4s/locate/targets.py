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
new object and goes on. The probabilities told are those of the target's own tokens, so that they compare with p after
the edit; the loss, and whether the target is the argmax, take in its end.

How little of the model has to run for that: `d4s.locate.request_rows`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from d4s.configuration import Above, AtLeast, Configuration
from d4s.edits import Edit
from d4s.errors import ModelError
from d4s.locate.request_rows import Place, RequestRows, request_of, spares, width_of
from d4s.models.architectures import Anatomy, text_config
from d4s.models.causal_lm import CausalLM
from d4s.models.forward import evaluating, run_in_batches
from d4s.models.prompts import end_of_text, pad_id


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


@dataclass(frozen=True)
class Targets:
    """Results a request, on the model's device; float32."""

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
    batch_tokens: int | None = None,
) -> Targets:
    """Targets of all edits, on the model's current weights.

    layer: the block at which δ is added.
    places: where in it, one δ each, optimised together: the block's output ("block"), the MLP's or the
        attention's output projection; start and delta are those of the first place.
    batch_tokens: tokens from the subject's last on that go through the model together; None: by device.

    A request's result does not depend on the others in its batch, up to float32 rounding.
    """
    if batch_tokens is None:
        batch_tokens = 2_048 if anatomy.device.type == "cpu" else 16_384
    end = end_of_text(anatomy.model, tokenizer) if config.target_eos else ()
    requests = [request_of(tokenizer, edit, prefixes, end) for edit in edits]
    most = getattr(text_config(anatomy.model), "max_position_embeddings", None)
    for edit, request in zip(edits, requests, strict=True):
        length = max(len(b) + len(a) for b, a in zip(request.before, request.after, strict=True))
        if most is not None and length > most:
            raise ModelError(
                f"edit {edit.id}: prompt and target behind the longest context are {length} tokens long, and the model "
                f"has {most} positions; shorten the prompt, or set contexts=0"
            )
    # Requests of similar length go together, before the subject's last token too: little padding.
    order = sorted(range(len(edits)), key=lambda i: -width_of(requests[i].before))
    found: dict[int, Targets] = {}

    def run(chosen: list[int]) -> None:
        batch = [requests[order[i]] for i in chosen]
        rows = RequestRows(anatomy, pad_id(tokenizer), batch, layer, places, whole=whole)
        targets = _optimise(rows, config)
        found.update((order[i], targets[at : at + 1]) for at, i in enumerate(chosen))

    with frozen(anatomy.model):
        whole = not spares(anatomy, layer, places)
        after = [requests[i].after for i in order]
        widths = [width_of(rows) for rows in after]
        if whole:
            widths = [w + width_of(requests[i].before) for w, i in zip(widths, order, strict=True)]
        run_in_batches(widths, run, batch_tokens, copies=[len(rows) for rows in after])
    return Targets.concatenate([found[i] for i in range(len(edits))])


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


def _optimise(rows: RequestRows, config: TargetConfig) -> Targets:
    """Adam on every δ at once, a request a row; requests that are done leave."""
    count, device = rows.count, rows.device
    start = [s.clone() for s in rows.start]
    bound = [config.clamp * s.norm(dim=1) for s in start]
    square = [s.square().sum(1) for s in start]
    result = [torch.zeros_like(s) for s in start]
    first = torch.zeros(count, dtype=torch.float32, device=device)
    last = torch.zeros_like(first)
    alive = torch.arange(count, device=device)  # requests still in the batch, by their first number
    deltas = [torch.zeros_like(s) for s in start]
    mean = [torch.zeros_like(s) for s in start]
    variance = [torch.zeros_like(s) for s in start]
    done = torch.zeros(count, dtype=torch.bool, device=device)
    looks_as_argmax = torch.zeros(count, dtype=torch.long, device=device)
    nll_factor = torch.ones_like(first)
    reference: Tensor | None = None

    for look in range(config.steps):
        moves = look < config.steps - 1
        deltas = [d.detach().requires_grad_(moves) for d in deltas]
        with torch.set_grad_enabled(moves):
            log_p = rows.log_probabilities(deltas)
            extra = log_p[rows.extra]
            if reference is None:
                reference = extra.detach()
            norms = [q[alive] for q in square]
            nll, weighted_kl, decay = loss_terms(rows, log_p, deltas, reference, norms, config)
            loss = nll_factor * nll + weighted_kl + decay
        settled = _settled(rows, log_p)
        probability = torch.exp(-mean_nll(rows, log_p.detach(), rows.own_weight))
        if look == 0:
            first[alive] = probability
        last[alive] = torch.where(done, last[alive], probability)
        done = done | (loss.detach() < config.stop_loss)
        if config.stop_after_argmax is not None:
            looks_as_argmax = looks_as_argmax + settled
            done = done | (looks_as_argmax > config.stop_after_argmax)
        if config.settled_kl is not None:
            done = done | (settled & (weighted_kl.detach() <= config.settled_kl))
        nll_factor = torch.where(settled, config.settled_nll_factor, 1.0).to(first.dtype)
        for total, delta in zip(result, deltas, strict=True):
            total[alive] = delta.detach()
        if not moves:
            break
        gradients = torch.autograd.grad(loss.sum(), deltas)
        with torch.no_grad():
            for p, gradient in enumerate(gradients):
                # Adam (arXiv 1412.6980), β = (.9, .999), ε = 1e-8, a request a row.
                # At δ = 0 the norm has no gradient; torch gives 0 there, as wanted.
                mean[p] = 0.9 * mean[p] + 0.1 * gradient
                variance[p] = 0.999 * variance[p] + 0.001 * gradient.square()
                root = (variance[p] / (1 - 0.999 ** (look + 1))).sqrt() + 1e-8
                moved = deltas[p] - config.learning_rate * mean[p] / (1 - 0.9 ** (look + 1)) / root
                limit = bound[p][alive]
                moved = moved * (limit / moved.norm(dim=1).clamp_min(1e-30)).clamp_max(1.0).unsqueeze(1)
                deltas[p] = torch.where(done.unsqueeze(1), deltas[p], moved)
        # The only look at the device, every fourth step: are enough requests done to shrink the batch?
        if look % 4 == 3:
            left = (~done).nonzero().squeeze(1)
            if len(left) == 0:
                break
            if len(left) <= 0.75 * rows.count:
                deltas = [d.detach()[left] for d in deltas]
                mean, variance = [m[left] for m in mean], [v[left] for v in variance]
                looks_as_argmax, nll_factor = looks_as_argmax[left], nll_factor[left]
                reference, alive, done = reference[left], alive[left], done[left]
                rows.keep_requests(left)
    return Targets(start[0], result[0], first, last)


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
    nll = mean_nll(rows, log_p, rows.weight)
    extra = log_p[rows.extra]
    kl = (extra.exp() * (extra - before)).sum(1)
    decay = torch.stack([d.norm(dim=1) / s for d, s in zip(deltas, square, strict=True)]).sum(0)
    return nll, config.kl_factor * kl, config.weight_decay * decay


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
