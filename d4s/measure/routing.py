"""How many tokens go to other experts than in the unedited model.

An edit moves what later blocks read, and with it their routers' choices: a token that changes an expert is answered by
weights that nobody looked at. Counted are tokens of prompts that no edit is about.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor

from d4s.models.architectures import Anatomy
from d4s.models.experts import same_experts
from d4s.models.forward import most_tokens, run_in_batches
from d4s.models.prompts import pad_id, padded, text_ids
from d4s.models.trace import Trace, stopping

MOST_PROMPTS = 256


def routing_change(
    anatomy: Anatomy,
    tokenizer: Any,
    prompts: Sequence[str],
    lowest: int,
    at_base: Callable[[], AbstractContextManager[None]],
    seed: int = 0,
) -> float | None:
    """Share of tokens, over the layers above `lowest`, whose set of experts is not the unedited model's.

    prompts: all are asked, or `MOST_PROMPTS` of them, drawn by the seed
    lowest: the lowest edited layer, whose own router sees what it always saw
    at_base: inside it the model is unedited
    Returns None where no layer above has experts, or there is no prompt.
    """
    layers = [i for i in range(lowest + 1, len(anatomy)) if anatomy.experts(i) is not None]
    distinct = list(dict.fromkeys(prompts))
    if not layers or not distinct:
        return None
    if len(distinct) > MOST_PROMPTS:
        distinct = random.Random(seed).sample(distinct, MOST_PROMPTS)
    rows = [ids for ids in text_ids(tokenizer, distinct) if ids]
    if not rows:
        return None
    now = _chosen(anatomy, tokenizer, rows, layers)
    with at_base():
        before = _chosen(anatomy, tokenizer, rows, layers)
    return 1 - float(same_experts(now, before).double().mean())


@torch.no_grad()
def _chosen(anatomy: Anatomy, tokenizer: Any, rows: Sequence[Sequence[int]], layers: Sequence[int]) -> Tensor:
    """The experts of every token of the rows in every layer, in the same order each time. [tokens · layers, k]"""
    found: list[Tensor] = []
    device = anatomy.device

    def run(chosen: list[int]) -> None:
        ids, mask = (t.to(device) for t in padded([rows[i] for i in chosen], pad_id(tokenizer)))
        with ExitStack() as stack:
            stack.enter_context(stopping())
            traced = []
            for layer in layers:
                if (experts := anatomy.experts(layer)) is not None:
                    trace = stack.enter_context(Trace(experts.module, stop=layer == layers[-1]))
                    traced.append((experts, trace))
            anatomy.model(input_ids=ids, attention_mask=mask, use_cache=False)
        found.extend(experts.routed(trace)[1][mask.flatten().bool()].cpu() for experts, trace in traced)

    run_in_batches([len(row) for row in rows], run, most_tokens(anatomy.model, None))
    return torch.cat(found)
