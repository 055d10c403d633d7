"""What editing changed: one `Change` a matrix, from two models or from a sequence of edits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from d4s.errors import ModelError
from d4s.journal.factors import Factors, factors_of_matrix, factors_of_product
from d4s.journal.stored_bits import INTEGERS, bits
from d4s.models.architectures import Anatomy, Architecture, check_bare, is_projection
from d4s.models.causal_lm import CausalLM, plain_name


@dataclass(frozen=True, eq=False)
class Change:
    """One edited weight; of a parameter that holds one matrix an expert, one of these.

    name: of the parameter, as "model.layers.4.mlp.down_proj.weight"
    base, edited: as stored in the model, in its dtype and layout
    transposed: the weight lies as [d_in, d_out] (GPT-2's Conv1D, the experts of gpt_oss)
    left [d_out, r], right [r, d_in]: exact factors of Δ in float64 where they are known, else None
    expert: which matrix of the parameter; None: the parameter is one matrix
    """

    name: str
    base: Tensor
    edited: Tensor
    transposed: bool = False
    left: Tensor | None = None
    right: Tensor | None = None
    expert: int | None = None

    @property
    def label(self) -> str:
        """`matrix_label` of it."""
        return matrix_label(self.name, self.expert)

    @property
    def module(self) -> str:
        """Name of the projection that holds the weight."""
        return self.name.removesuffix(".weight")

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in), whichever way the weight is stored."""
        rows, columns = self.base.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def delta(self) -> Tensor:
        """edited − base, [d_out, d_in] float64 on the CPU."""
        change = self.edited.detach().cpu().double() - self.base.detach().cpu().double()
        return change.T if self.transposed else change

    @cached_property
    def factors(self) -> Factors:
        """Of Δ; from `left` and `right` where they are known, else an SVD of edited − base.

        In the first case what was lost in rounding the weights is not part of Δ. In the second it is, as singular
        values that rounding alone explains, which do not count for the rank.
        """
        if self.left is not None and self.right is not None:
            return factors_of_product(self.left.detach().cpu().double(), self.right.detach().cpu().double())
        return factors_of_matrix(self.delta(), self.rounding())

    def rounding(self) -> float:
        """‖·‖₂ of what rounding `edited` to its dtype can have added to Δ.

        Each element is off by half a unit in the last place at most, and independently: such a matrix has a norm below
        the longest row's and the longest column's together (Latała's bound, with √3 to spare).
        """
        weight = self.edited.detach().cpu().double()
        half = torch.finfo(self.edited.dtype).eps / 2
        return half * float(weight.norm(dim=1).max() + weight.norm(dim=0).max())

    def check(self) -> None:
        """Raises ModelError for what no edit of d4s leaves: types, shapes, values, factors that do not fit."""
        base, edited = self.base, self.edited
        if base.ndim == 3:
            raise ModelError(
                f"{self.name} holds the matrices of several experts; give one change for each that differs, with its "
                "number (expert), as changes_of and changes_between do"
            )
        if base.ndim != 2 or not base.numel() or base.shape != edited.shape or base.dtype != edited.dtype:
            raise ModelError(
                f"{self.label}: {list(base.shape)} {base.dtype} before and {list(edited.shape)} {edited.dtype} after; "
                "must be matrices of one shape and type"
            )
        if self.expert is not None and self.expert < 0:
            raise ModelError(f"{self.name}: expert {self.expert}; experts must be counted from 0 on")
        if base.dtype not in INTEGERS:
            raise ModelError(f"{self.label} is {base.dtype}; weights must be float32, float16 or bfloat16")
        if not (torch.isfinite(base).all() and torch.isfinite(edited).all()):
            raise ModelError(f"{self.label} holds NaN or infinity; get the model from intact files")
        if (self.left is None) != (self.right is None):
            raise ModelError(f"{self.label}: of its factors one is missing; give both, or none")
        if self.left is None or self.right is None:
            return
        d_out, d_in = self.shape
        rank = self.left.shape[-1]
        if rank < 1 or self.left.shape != (d_out, rank) or self.right.shape != (rank, d_in):
            raise ModelError(
                f"{self.label}: its factors are {list(self.left.shape)} and {list(self.right.shape)}; must be "
                f"[{d_out}, r] and [r, {d_in}]"
            )
        off = float((self.delta() - self.left.cpu().double() @ self.right.cpu().double()).norm())
        # The weight was rounded once, by half a unit each; Δ may have been rounded to float32 on the way to it.
        most = torch.finfo(base.dtype).eps * float(edited.double().norm()) + 1e-6 * float(self.delta().norm())
        if not off <= most:
            raise ModelError(
                f"{self.label}: its factors give another change than the weights have (they are {off:.3g} apart, and "
                f"rounding makes {most:.3g} at most); give those of this change, or none"
            )


def changes_between(
    base: CausalLM, edited: CausalLM, architecture: Architecture | None = None
) -> list[Change]:
    """Every weight in which two models differ, bit for bit; the tensors are the models' own, not copies. Of a layer of
    experts every expert that differs.

    Raises ModelError if they are not one model, do not differ at all, or differ in anything but projections within
    blocks, which alone d4s edits. The text names what.
    """
    anatomy = Anatomy(base, architecture)
    check_bare(edited)
    before, after = dict(_tensors(base)), dict(_tensors(edited))
    if before.keys() != after.keys():
        name = min(before.keys() ^ after.keys())
        raise ModelError(
            f"these are two models: {name} is in {'the first' if name in before else 'the second'} alone; "
            "name a model and one that was made from it by editing"
        )
    for name, tensor in before.items():
        if tensor.shape != after[name].shape or tensor.dtype != after[name].dtype:
            raise ModelError(
                f"these are two models: {name} is {list(tensor.shape)} {tensor.dtype} in the first and "
                f"{list(after[name].shape)} {after[name].dtype} in the second; of one shape, load both in one dtype"
            )
    modules = dict(base.named_modules())
    blocks = f"{anatomy.architecture.blocks}."
    of_experts = {
        anatomy.weight_name(i): anatomy.transposed(i)
        for i in range(len(anatomy))
        if anatomy.experts(i) is not None
    }
    changes: list[Change] = []
    foreign = []
    for name, tensor in before.items():
        if same_bits(tensor, after[name]):
            continue
        if name in of_experts:
            changes += changes_within(name, tensor, after[name], of_experts[name])
            continue
        module = modules.get(name.removesuffix(".weight"))
        if not (name.startswith(blocks) and name.endswith(".weight") and is_projection(module)):
            foreign.append(name)
            continue
        changes.append(Change(name, tensor, after[name], transposed=not isinstance(module, nn.Linear)))
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise ModelError(
            f"they differ in {', '.join(foreign[:3])}{more}, which editing does not change: only weights of "
            f"projections (nn.Linear, Conv1D, down_proj of experts) in {anatomy.architecture.blocks} can be put "
            "into a patch; name a model and one that was made from it by editing, not by training"
        )
    if not changes:
        raise ModelError(
            "they do not differ in a single bit, so there is nothing to put into a patch; name an edited one"
        )
    return changes


def changes_of(result: Any) -> list[Change]:
    """What a sequence of edits (`d4s.Result`) changed, as the model is now; copies. Of a layer of experts every expert
    that differs.

    Raises ModelError if no weight has changed, as with methods that keep their edits beside the weights (GRACE).
    """
    weights = result.editor.weights
    anatomy = weights.anatomy
    changes = [
        replace(change, edited=change.edited.clone())
        for layer in weights.layers
        for change in changes_within(
            anatomy.weight_name(layer),
            weights.base[layer],
            anatomy.weight(layer).detach(),
            anatomy.transposed(layer),
        )
    ]
    if not changes:
        raise ModelError(
            "no weight differs from the unedited model's: no edit was made, or all were undone, or the method keeps "
            "its edits beside the weights (GRACE); there is nothing to put into a patch"
        )
    return changes


def changes_within(name: str, base: Tensor, edited: Tensor, transposed: bool) -> list[Change]:
    """What differs between a parameter before and after, bit for bit: it, or of experts each that does.

    base, edited: [rows, columns], or [experts, rows, columns]
    """
    if base.ndim != 3 or base.shape != edited.shape:
        return [] if same_bits(base, edited) else [Change(name, base, edited, transposed)]
    return [
        Change(name, before, after, transposed, expert=expert)
        for expert, (before, after) in enumerate(zip(base, edited, strict=True))
        if not same_bits(before, after)
    ]


def matrix_label(name: str, expert: int | None) -> str:
    """One matrix of a model in words: the parameter's name, and of one that holds experts' matrices the expert's
    number, as "model.layers.4.mlp.experts.down_proj[17]"."""
    return name if expert is None else f"{name}[{expert}]"


def _tensors(model: CausalLM) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, without what torch.compile puts in front."""
    assert isinstance(model, nn.Module)
    for named in (model.named_parameters(), model.named_buffers()):
        for name, tensor in named:
            yield plain_name(name), tensor.detach()


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two weights of one shape and type are the same, bit by bit, on whatever devices they lie."""
    if one.dtype in INTEGERS:  # 0 and −0, which are equal, are two
        return torch.equal(bits(one), bits(other))
    return torch.equal(one.cpu(), other.cpu())
