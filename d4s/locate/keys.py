"""Keys and outputs at the subject's last token, and keys at the prompt's other tokens.

Nothing after the subject can change what is at its last token, so a row ends there, and the forward pass ends at the
module that is asked about. Where an `Ascent` is given, it begins where that has come to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from d4s.edits import Edit
from d4s.locate.ascent import Ascent
from d4s.models.architectures import Anatomy
from d4s.models.forward import most_tokens, run_in_batches
from d4s.models.prompts import pad_id, padded, subject_row
from d4s.models.trace import Trace, stopping


@dataclass(frozen=True)
class SubjectRows:
    """Token ids up to the subject's last token, and how the rows of one edit are averaged."""

    ids: tuple[tuple[int, ...], ...]
    shares: Tensor  # [rows of one edit] float32: what each counts in the edit's mean; they add up to 1
    fill: int


def subject_rows(
    tokenizer: Any, edits: Sequence[Edit], prefixes: Sequence[str] = (), *, bare_share: float | None = 0.5
) -> SubjectRows:
    """Rows of the bare prompt and of the prompt behind each prefix.

    bare_share: weight of the bare prompt (MEMIT: ½, the prefixed ones share the rest); None: all rows alike.
    """
    ids: list[tuple[int, ...]] = []
    for edit in edits:
        for prefix in ("", *prefixes):
            row = subject_row(tokenizer, edit.prompt, edit.subject, prefix=prefix, head=edit.chat)
            ids.append(row.ids[: row.subject_last + 1])
    bare = 1 / (1 + len(prefixes)) if bare_share is None or not prefixes else bare_share
    shares = torch.tensor([bare] + [(1 - bare) / len(prefixes) for _ in prefixes], dtype=torch.float32)
    return SubjectRows(tuple(ids), shares, pad_id(tokenizer))


@dataclass(frozen=True)
class PromptRows:
    """Token ids of whole prompts, and the positions of all but the subject's last token.

    edits: of each position, the place of its edit among those given
    """

    ids: tuple[tuple[int, ...], ...]
    positions: tuple[tuple[int, ...], ...]
    fill: int

    @property
    def edits(self) -> tuple[int, ...]:
        return tuple(edit for edit, here in enumerate(self.positions) for _ in here)


def prompt_rows(tokenizer: Any, edits: Sequence[Edit], most: int) -> PromptRows:
    """Rows of the bare prompts. most: positions of a prompt, the last ones, of those other than the subject's last"""
    rows = [subject_row(tokenizer, edit.prompt, edit.subject, head=edit.chat) for edit in edits]
    positions = [[i for i in range(len(row.ids)) if i != row.subject_last][-most:] for row in rows]
    return PromptRows(tuple(row.ids for row in rows), tuple(map(tuple, positions)), pad_id(tokenizer))


@torch.no_grad()
def keys_beside(anatomy: Anatomy, rows: PromptRows, layer: int, ascent: Ascent | None = None) -> Tensor:
    """Keys at the rows' positions, in their order. [positions, d_in] float32. The layer has no experts."""
    model, device, d_in = anatomy.model, anatomy.device, anatomy.shape(layer)[1]
    taken: dict[int, Tensor] = {}

    def run(chosen: list[int]) -> None:
        part = [rows.ids[i] for i in chosen]
        ids, mask = padded(part, rows.fill)
        with _passing(ascent, part), Trace(anatomy.projection(layer), stop=True) as trace, stopping():
            model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
        keys = trace.input.view(len(chosen), ids.shape[1], d_in)  # OPT flattens rows and positions
        taken.update((i, row[list(rows.positions[i])].float()) for i, row in zip(chosen, keys, strict=True))

    run_in_batches([len(row) for row in rows.ids], run, most_tokens(model, None))
    return torch.cat([taken[i] for i in range(len(rows.ids))])


def _passing(ascent: Ascent | None, rows: Sequence[tuple[int, ...]]) -> AbstractContextManager[None]:
    return nullcontext() if ascent is None else ascent.passing(tuple(rows))


def keys_at(anatomy: Anatomy, rows: SubjectRows, layer: int, ascent: Ascent | None = None) -> Tensor:
    """Keys: the input of W at the subject's last token, averaged an edit. [edits, d_in] float32.

    Of a layer with experts: those of all of them side by side, each times its gate, [edits, experts · d_in].
    """
    experts = anatomy.experts(layer)
    if experts is None:
        projection = anatomy.projection(layer)
        return _at_last(anatomy, rows, projection, lambda trace, *at: _read(trace.input, *at), ascent)

    def joint(trace: Trace, width: int, last: Tensor) -> Tensor:
        return experts.joint_keys(trace, torch.arange(len(last), device=last.device) * width + last)

    return _at_last(anatomy, rows, experts.module, joint, ascent)


def output_at(anatomy: Anatomy, rows: SubjectRows, module: nn.Module, ascent: Ascent | None = None) -> Tensor:
    """What a module puts out at the subject's last token, averaged an edit. [edits, width] float32."""
    return _at_last(anatomy, rows, module, lambda trace, *at: _read(trace.output, *at), ascent)


def _read(values: Tensor, width: int, last: Tensor) -> Tensor:
    """At position `last` of each row, all of them `width` positions wide. [rows, features]"""
    values = values.view(len(last), width, -1)  # OPT flattens rows and positions
    last = last.to(values.device)
    return values[torch.arange(len(last), device=last.device), last]


def keys_and_output_at(
    anatomy: Anatomy, rows: SubjectRows, layer: int, module: nn.Module, ascent: Ascent | None = None
) -> tuple[Tensor, Tensor]:
    """Of every row by itself: its key, [edits · rows, d_in], and what a module of this layer or a later one puts out,
    [edits · rows, width]; float32, from one forward pass. The layer has no experts.
    """
    with Trace(anatomy.projection(layer)) as below:

        def both(trace: Trace, *at: Any) -> Tensor:
            parts = (_read(below.input, *at), _read(trace.output, *at))
            return torch.cat([part.to(trace.output.device, torch.float32) for part in parts], 1)

        found = _of_rows(anatomy, rows, module, both, ascent)
    d_in = anatomy.shape(layer)[1]
    return found[:, :d_in].contiguous(), found[:, d_in:].contiguous()


def _at_last(
    anatomy: Anatomy,
    rows: SubjectRows,
    module: nn.Module,
    read: Callable[[Trace, int, Tensor], Tensor],
    ascent: Ascent | None,
) -> Tensor:
    """`_of_rows`, averaged an edit. [edits, features]"""
    found = _of_rows(anatomy, rows, module, read, ascent)
    return rows.shares.to(found.device) @ found.view(-1, len(rows.shares), found.shape[1])


@torch.no_grad()
def _of_rows(
    anatomy: Anatomy,
    rows: SubjectRows,
    module: nn.Module,
    read: Callable[[Trace, int, Tensor], Tensor],
    ascent: Ascent | None,
) -> Tensor:
    """At every row's last position. [edits · rows, features] float32

    read: what is taken of the traced call, (trace, positions a row, the last one of each row) → [rows, features]
    """
    model, device = anatomy.model, anatomy.device
    # Rows of one text but for its end are equal here; each distinct one runs once, short ones together.
    distinct = list(dict.fromkeys(rows.ids))
    taken: dict[tuple[int, ...], Tensor] = {}

    def run(chosen: list[int]) -> None:
        part = [distinct[i] for i in chosen]
        ids, mask = padded(part, rows.fill)
        with _passing(ascent, part), Trace(module, stop=True) as trace, stopping():
            model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
        last = torch.tensor([len(row) - 1 for row in part]).to(trace.output.device)
        taken.update(zip(part, read(trace, ids.shape[1], last).float(), strict=True))

    run_in_batches([len(row) for row in distinct], run, most_tokens(model, None))
    return torch.stack([taken[ids] for ids in rows.ids])
