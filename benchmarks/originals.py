"""How the released tools do it, in plain torch: one request at a time, the whole model, every position, each layer
in a pass of its own, a dense float64 solve a step. The baselines of the claims."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from d4s.edits import Edit
from d4s.locate.targets import TargetConfig, frozen
from d4s.models.architectures import Anatomy
from d4s.models.prompts import pad_id, padded, subject_row


def target(
    anatomy: Anatomy, tokenizer: Any, edit: Edit, prefixes: Sequence[str], layer: int, config: TargetConfig
) -> tuple[Tensor, Tensor]:
    """(v0, δ) of one request, [d_model] float32 each."""
    model, device = anatomy.model, anatomy.device
    rows = [subject_row(tokenizer, edit.prompt, edit.subject, edit.target_new, p) for p in ("", *prefixes)]
    extra = subject_row(tokenizer, "{} is a", edit.subject)
    every = [*rows, extra]
    ids, mask = (t.to(device) for t in padded([row.ids for row in every], pad_id(tokenizer)))
    where = torch.tensor([row.subject_last for row in every], device=device)
    number = torch.arange(len(every), device=device)
    labels = torch.full_like(ids, -100)
    for r, row in enumerate(rows):
        labels[r, row.target_start - 1 : len(row.ids) - 1] = ids[r, row.target_start : len(row.ids)]
    delta = torch.zeros(anatomy.shape(layer)[0], device=device, requires_grad=True)
    start: Tensor | None = None

    def add(_module: Any, _arguments: Any, output: Any) -> Any:
        nonlocal start
        hidden = output[0] if isinstance(output, tuple) else output
        if start is None:
            start = hidden[0, where[0]].detach().float()
        hidden = hidden.clone()
        hidden[number, where] += delta.to(hidden.dtype)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    optimiser = torch.optim.Adam([delta], lr=config.learning_rate)
    before: Tensor | None = None
    with frozen(model):  # they too take no gradient of the weights
        for look in range(config.steps):
            handle = anatomy.blocks[layer].register_forward_hook(add)
            output = model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
            handle.remove()
            logits = output.logits.float()
            # They take the KL from the model's own logits, and the NLL from the head applied once more.
            log_p = torch.log_softmax(model.get_output_embeddings()(output.hidden_states[-1]).float(), -1)
            extra_log_p = torch.log_softmax(logits[-1, extra.subject_last], -1)
            if before is None:
                before = extra_log_p.detach()
            wanted = labels != -100
            picked = log_p.gather(2, labels.clamp_min(0).unsqueeze(2)).squeeze(2)
            nll = (-(picked * wanted).sum(1)[:-1] / wanted.sum(1)[:-1]).mean()
            assert start is not None
            loss = nll + config.kl_factor * (extra_log_p.exp() * (extra_log_p - before)).sum()
            loss = loss + config.weight_decay * delta.norm() / start.norm() ** 2
            if loss.item() < config.stop_loss or look == config.steps - 1:
                break
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            bound = config.clamp * start.norm()
            if delta.norm().item() > bound.item():
                with torch.no_grad():
                    delta.mul_(bound / delta.norm())
    assert start is not None
    return start, delta.detach()


@torch.no_grad()
def key(anatomy: Anatomy, tokenizer: Any, edit: Edit, prefixes: Sequence[str], layer: int) -> Tensor:
    """Key of one request, ½ bare + ½ contexts, from a pass through the whole model. [d_in] float32."""
    rows = [subject_row(tokenizer, edit.prompt, edit.subject, prefix=p) for p in ("", *prefixes)]
    ids, mask = (t.to(anatomy.device) for t in padded([row.ids for row in rows], pad_id(tokenizer)))
    caught: list[Tensor] = []
    handle = anatomy.projection(layer).register_forward_pre_hook(lambda _m, a: caught.append(a[0]))
    anatomy.model(input_ids=ids, attention_mask=mask, use_cache=False)
    handle.remove()
    keys = caught[0][torch.arange(len(rows)), [row.subject_last for row in rows]].float()
    return 0.5 * keys[0] + 0.5 * keys[1:].mean(0) if prefixes else keys[0]


@torch.no_grad()
def state(anatomy: Anatomy, tokenizer: Any, edit: Edit, layer: int) -> Tensor:
    """h after the layer at the subject's last token, from a pass through the whole model. [d_model] float32."""
    row = subject_row(tokenizer, edit.prompt, edit.subject)
    ids = torch.tensor([row.ids], device=anatomy.device)
    found = anatomy.model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    return found[layer + 1][0, row.subject_last].float()


@torch.no_grad()
def moment_of_layer(anatomy: Anatomy, batches: Sequence[tuple[Tensor, Tensor]], layer: int) -> Tensor:
    """Σ k kᵀ of one layer, [d_in, d_in] float32: a pass through the whole model for this layer alone."""
    d_in = anatomy.shape(layer)[1]
    moment = torch.zeros(d_in, d_in, device=anatomy.device)
    caught: list[Tensor] = []
    handle = anatomy.projection(layer).register_forward_pre_hook(lambda _m, a: caught.append(a[0]))
    for ids, mask in batches:
        anatomy.model(input_ids=ids, attention_mask=mask, use_cache=False)
        keys = caught.pop().reshape(*ids.shape, -1)[mask.bool()].float()
        moment += keys.T @ keys
    handle.remove()
    return moment


def d4s_sequence(
    anatomy: Anatomy,
    tokenizer: Any,
    edits: Sequence[Edit],
    prefixes: Sequence[str],
    layer: int,
    config: TargetConfig,
    prior: Tensor,
) -> Tensor:
    """D4S on one layer, one edit a step, a dense float64 solve each. Returns Δ, [d_out, d_in] float64."""
    weight = anatomy.weight(layer).data
    base = weight.clone()
    residual_sum = torch.zeros(*anatomy.shape(layer), dtype=torch.float64, device=weight.device)
    key_sum = torch.zeros_like(prior)
    change = residual_sum
    for edit in edits:
        edited = weight.clone()
        weight.copy_(base)
        start, delta = target(anatomy, tokenizer, edit, prefixes, layer, config)
        d = (start + delta - state(anatomy, tokenizer, edit, layer)).double()
        weight.copy_(edited)
        k = key(anatomy, tokenizer, edit, prefixes, layer).double()
        residual_sum = residual_sum + torch.outer(d, k)
        key_sum = key_sum + torch.outer(k, k)
        change = torch.linalg.solve(prior + key_sum, residual_sum.T).T
        written = change.T if anatomy.transposed(layer) else change
        weight.copy_((base.double() + written).to(weight.dtype))
    weight.copy_(base)
    return change
