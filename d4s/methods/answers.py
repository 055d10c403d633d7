"""Prompt and target as one row, and how likely a model finds the target in it, with a gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from d4s.edits import Edit
from d4s.edits.spacing import continuation
from d4s.models.architectures import Anatomy
from d4s.models.causal_lm import CausalLM
from d4s.models.forward import most_tokens, run_in_batches
from d4s.models.prompts import pad_id, padded, prompt_and_target_ids, text_ids
from d4s.models.trace import head_reads


@dataclass(frozen=True)
class AnswerRows:
    """Rows of prompt + target without its last token, padded on the right."""

    ids: Tensor  # [rows, width] int64
    mask: Tensor  # [rows, width] int64
    last: Tensor  # [rows]: the prompt's last position
    row: Tensor  # [tokens]: the row of each target token
    read: Tensor  # [tokens]: the position whose logits predict it
    wanted: Tensor  # [tokens]: its id


def answer_rows(
    tokenizer: Any,
    edits: Sequence[Edit],
    device: torch.device,
    *,
    from_last: bool = False,
    end: Sequence[int] = (),
) -> AnswerRows:
    """One row an edit.

    end: ids that follow each target and are predicted like its own: those by which a text ends
    from_last: predict every target token from the prompt's last position, which sees none of those before it.
    """
    rows: list[list[int]] = []
    last: list[int] = []
    tokens: list[tuple[int, int, int]] = []
    for r, edit in enumerate(edits):
        prompt, target = prompt_and_target_ids(tokenizer, edit.text, edit.target(edit.target_new))
        target = [*target, *end]
        last.append(len(prompt) - 1)
        rows.append(prompt if from_last else prompt + target[:-1])
        tokens += [(r, last[r] + (0 if from_last else t), token) for t, token in enumerate(target)]
    ids, mask = padded(rows, pad_id(tokenizer))
    row, read, wanted = torch.as_tensor(tokens, device=device).unbind(1)
    ids, mask = ids.to(device), mask.to(device)
    return AnswerRows(ids, mask, torch.as_tensor(last, device=device), row, read, wanted)


def log_probabilities(model: CausalLM, ids: Tensor, mask: Tensor, row: Tensor, read: Tensor) -> Tensor:
    """log p at each (row, read), where alone the head runs. [reads, vocabulary] float32."""
    with head_reads(model, row, read):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits[0].float().log_softmax(-1)


def answer_losses(model: CausalLM, rows: AnswerRows) -> Tensor:
    """Mean over each row's target tokens of −log p. [rows] float32, with a gradient where there is one."""
    log_p = log_probabilities(model, rows.ids, rows.mask, rows.row, rows.read)
    nll = -log_p.gather(1, rows.wanted.unsqueeze(1)).squeeze(1)
    sums = nll.new_zeros(len(rows.ids)).index_add(0, rows.row, nll)
    return sums / torch.bincount(rows.row, minlength=len(rows.ids))


def losses_in_batches(
    anatomy: Anatomy,
    tokenizer: Any,
    edits: Sequence[Edit],
    use: Callable[[AnswerRows, Tensor], None] | None = None,
    *,
    from_last: bool = False,
    end: Sequence[int] = (),
) -> Tensor:
    """`answer_losses` of all edits, [edits] float32; `use(rows, losses)` sees each part with its graph.

    Parts hold as many tokens as go through a backward pass together.
    """
    found = torch.zeros(len(edits), dtype=torch.float32, device=anatomy.device)
    texts = [edit.text + continuation(edit.text, edit.target(edit.target_new)) for edit in edits]
    lengths = [len(ids) + len(end) for ids in text_ids(tokenizer, texts)]

    def run(chosen: list[int]) -> None:
        part = [edits[i] for i in chosen]
        rows = answer_rows(tokenizer, part, anatomy.device, from_last=from_last, end=end)
        losses = answer_losses(anatomy.model, rows)
        found[chosen] = losses.detach()
        if use is not None:
            use(rows, losses)

    run_in_batches(lengths, run, most_tokens(anatomy.model, None) // 4)
    return found


def probabilities(losses: Tensor) -> tuple[float, ...]:
    """exp(−loss) of each edit."""
    return tuple(torch.exp(-losses.detach()).tolist())
