"""Fine-tuning of the projection W of given layers: Adam, a fixed number of steps an edit, a step skipped for
an edit whose loss is below `stop_loss` already.

FT-L (arXiv 2012.00363, as in arXiv 2202.05262): |W − W_s| ≤ ε, element by element, where W_s is W at the start of
the step, as released: over a sequence W drifts from W0 by up to ε a step. All target tokens are scored from the
prompt's last position, as if each came first: a weakness of the released code, kept since the published figures
have it. FT-L-W0 is no published method: FT-L with |W − W0| ≤ ε over the whole sequence.
FT-M: ordinary cross-entropy on the target's tokens, no bound; with `target_eos` on the token that ends a text behind
them too. The releases train every parameter whose name begins with the projection's, so on GPT-2 and GPT-J its bias
too, and take the mean loss of a whole batch for one; here W alone moves, and an edit that has been learned leaves a
batch. FT-L has no such field: it would be asked for that token right behind the prompt.

Adam works on Δ in float32; the weights are round(W0 + Δ) at every step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from d4s.configuration import Above, AtLeast
from d4s.edits import Edit
from d4s.methods.answers import AnswerRows, losses_in_batches, probabilities
from d4s.methods.base import Holding, LayerSize, MasterEditor, Method, Step, Workbench, holding_of_master
from d4s.methods.published import MODELS, model_key, one_layer
from d4s.models.architectures import Anatomy
from d4s.models.prompts import end_of_text

BOUNDS = {355e6: 2e-3, 774e6: 1e-3, 1558e6: 5e-4, 6053e6: 5e-5}  # parameters of a published model → its ε


@dataclass(frozen=True, kw_only=True)
class FineTuning(Method):
    """Fields shared by all of them."""

    changes: ClassVar[str] = "MLP output projections"
    not_published: ClassVar[tuple[str, ...]] = ("llama-2-7b", "llama-3-8b")
    strength: ClassVar[str] = "learning_rate"
    from_last: ClassVar[bool] = False  # score every target token from the prompt's last position

    layers: Annotated[tuple[int, ...], "whose W is changed"]
    learning_rate: Annotated[float, "of Adam", Above(0)] = 5e-4
    steps: Annotated[int, "of Adam, at most", AtLeast(1)] = 25
    stop_loss: Annotated[float, "an edit below it is not trained on"] = 1e-2

    @property
    def ends_targets(self) -> bool:
        """Whether what ends a text is one more token of each target."""
        return False

    def holding(self, size: LayerSize, edits: int) -> Holding:
        """Δ; in a step its gradient, Adam's two moments and Δ at the step's start."""
        return holding_of_master(size, "gradient and Adam", 4)

    def editor(self, bench: Workbench) -> FTEditor:
        return FTEditor(self, bench, self.layers)

    def bounded_(self, delta: Tensor, start: Tensor) -> None:
        """What Δ may be, in place, where the step started from `start`: anything."""


@dataclass(frozen=True, kw_only=True)
class FTM(FineTuning):
    name: ClassVar[str] = "ft-m"
    paper: ClassVar[str] = "arXiv 2401.01286"
    not_published: ClassVar[tuple[str, ...]] = ("gpt2-xl",)

    target_eos: Annotated[bool, "a target ends as a text does: by the end token, or else a full stop"] = False

    @classmethod
    def preset(cls, anatomy: Anatomy) -> FTM:
        """Layer 21 of GPT-J and both Llamas, as EasyEdit has it; others layer 0, as the bounded files have it; the
        embedded model: the other methods' layer."""
        if model_key(anatomy) in ("gpt-j-6b", "llama-2-7b", "llama-3-8b"):
            return cls(layers=(21,))
        return cls(layers=(_first_layer(anatomy),))

    @property
    def ends_targets(self) -> bool:
        return self.target_eos


@dataclass(frozen=True, kw_only=True)
class FTL(FineTuning):
    name: ClassVar[str] = "ft-l"
    paper: ClassVar[str] = "arXiv 2012.00363"
    strength: ClassVar[str] = "epsilon"
    from_last: ClassVar[bool] = True

    epsilon: Annotated[float, "ε, by how much each weight may move", Above(0, "ft-m has no bound")] = 5e-4

    @classmethod
    def preset(cls, anatomy: Anatomy) -> FTL:
        """Layer 0; of ROME's files the ε of the GPT that is nearest in size: medium 2e-3, large 1e-3, XL 5e-4,
        GPT-J 5e-5; of the Llamas only files without a bound are published (`FTM.preset`).

        The embedded model: the ε at which 50 edits take, 2e-3, with efficacy .98 and specificity .88 (5e-3: 1.0 and
        .62; 5e-4: .12 and .98; from 1.25e-2 on, 25 steps of Adam, it binds nothing).
        """
        key = model_key(anatomy) or ""
        known = {"gpt2-xl": 5e-4, "gpt-j-6b": 5e-5, "llama-2-7b": 5e-5, "llama-3-8b": 5e-5, "embedded": 2e-3}
        epsilon = known[key] if key in known else _bound_of(anatomy)
        return cls(layers=(_first_layer(anatomy),), epsilon=epsilon)

    def bounded_(self, delta: Tensor, start: Tensor) -> None:
        torch.clamp(delta, start - self.epsilon, start + self.epsilon, out=delta)


def _bound_of(anatomy: Anatomy) -> float:
    """ε of the GPT that is nearest in the number of parameters."""
    size = sum(p.numel() for p in anatomy.model.parameters())
    return BOUNDS[min(BOUNDS, key=lambda published: abs(math.log(published / size)))]


@dataclass(frozen=True, kw_only=True)
class FTLW0(FTL):
    name: ClassVar[str] = "ft-l-w0"
    not_published: ClassVar[tuple[str, ...]] = MODELS

    @classmethod
    def preset(cls, anatomy: Anatomy) -> FTLW0:
        """FT-L's. The embedded model: ε 5e-2, at which 50 edits take, with 1.0 and .65 (2e-2: .29 and .97)."""
        a_step = FTL.preset(anatomy)
        whole = 5e-2 if model_key(anatomy) == "embedded" else a_step.epsilon
        return cls(layers=a_step.layers, epsilon=whole)

    def bounded_(self, delta: Tensor, start: Tensor) -> None:
        delta.clamp_(-self.epsilon, self.epsilon)


def _first_layer(anatomy: Anatomy) -> int:
    """Layer 0; of the embedded model that of the other methods."""
    return one_layer(anatomy) if model_key(anatomy) == "embedded" else 0


class FTEditor(MasterEditor):
    def __init__(self, method: FineTuning, bench: Workbench, layers: Sequence[int]) -> None:
        super().__init__(method, bench, layers)
        self.end = end_of_text(bench.model, bench.tokenizer) if method.ends_targets else []

    def apply(self, batch: Sequence[Edit]) -> Step:
        optimiser = torch.optim.Adam(self.deltas.values(), lr=self.method.learning_rate)
        start = {layer: delta.clone() for layer, delta in self.deltas.items()}
        losses = self.gradients(batch)
        first = self.told(batch, losses)
        for _ in range(self.method.steps):
            if bool((losses < self.method.stop_loss).all()):
                break
            optimiser.step()
            for layer, delta in self.deltas.items():
                self.method.bounded_(delta, start[layer])
            self.write()
            losses = self.gradients(batch)
        for delta in self.deltas.values():
            delta.grad = None
        return Step(first, self.told(batch, losses))

    def told(self, batch: Sequence[Edit], losses: Tensor) -> tuple[float, ...]:
        """p of the targets' own tokens, without what ends them: it compares with p after the edit."""
        if self.end:
            with torch.no_grad():
                losses = losses_in_batches(self.anatomy, self.tokenizer, batch)
        return probabilities(losses)

    def trained_on(self, losses: Tensor) -> Tensor:
        """Which edits a step is made for. [edits] bool"""
        return losses >= self.method.stop_loss

    def gradients(self, batch: Sequence[Edit]) -> Tensor:
        """Losses [edits]; every Δ then holds the gradient of the losses of those that are trained on, over the
        number of edits of the batch."""
        weights = {layer: self.anatomy.weight(layer) for layer in self.weights.layers}
        sums = {layer: torch.zeros_like(delta) for layer, delta in self.deltas.items()}

        def use(_rows: AnswerRows, losses: Tensor) -> None:
            wanted = losses * self.trained_on(losses.detach())
            found = torch.autograd.grad(wanted.sum() / len(batch), list(weights.values()))
            for layer, gradient in zip(weights, found, strict=True):
                sums[layer] += gradient.T if self.anatomy.transposed(layer) else gradient

        try:
            for weight in weights.values():
                weight.requires_grad_(True)
            from_last = self.method.from_last
            losses = losses_in_batches(
                self.anatomy, self.tokenizer, batch, use, from_last=from_last, end=self.end
            )
        finally:
            for weight in weights.values():
                weight.requires_grad_(False)
        for layer, delta in self.deltas.items():
            delta.grad = sums[layer]
        return losses
