"""LocFT-BF (arXiv 2509.22072): the edits of a step are learned together, breadth first: again and again through all of
them, in mini-batches of new order, where FT-M trains until one edit is learned and goes on to the next,

    each round, each mini-batch:   ℓ = mean over its edits of −log p(target and end token)
                                   ℓ ≥ stop_loss: Adam's step along ∂ℓ / ∂W
    until the round's mean of ℓ is below stop_loss, or for `steps` rounds

W is one projection, late in the model, where Llama-3's is published; the release has layer 6 for Qwen2.5-7B and whole
blocks for Mistral, which no rule of depth gives. Adam is one for all rounds of a step, and begins anew with the next;
it works on Δ as in ft.py. With a single edit a step this is FT-M with `target_eos`: as published all edits are one step
(`batch_size`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from d4s.configuration import AtLeast
from d4s.edits import Edit
from d4s.methods.answers import losses_in_batches, probabilities
from d4s.methods.base import Step, Workbench
from d4s.methods.ft import FineTuning, FTEditor
from d4s.methods.published import model_key, one_layer
from d4s.models.architectures import Anatomy


@dataclass(frozen=True, kw_only=True)
class FTBF(FineTuning):
    name: ClassVar[str] = "ft-bf"
    paper: ClassVar[str] = "arXiv 2509.22072"
    changes: ClassVar[str] = "one MLP output projection"
    not_published: ClassVar[tuple[str, ...]] = ("gpt2-xl", "gpt-j-6b", "llama-2-7b")

    steps: Annotated[int, "rounds through all edits of a step, at most", AtLeast(1)] = 25
    stop_loss: Annotated[float, "a mini-batch below it is passed over, and a round below it is the last"] = (
        1e-2
    )
    mini_batch: Annotated[int, "edits of one step of Adam", AtLeast(1)] = 100
    target_eos: Annotated[bool, "a target ends as a text does: by the end token, or else a full stop"] = True

    @classmethod
    def preset(cls, anatomy: Anatomy) -> FTBF:
        """Layer 22 of Llama-3's 32, and at that depth in all others; the embedded model: the other methods' layer."""
        if model_key(anatomy) == "embedded":
            return cls(layers=(one_layer(anatomy),))
        return cls(layers=(len(anatomy) * 22 // 32,))

    @property
    def ends_targets(self) -> bool:
        return self.target_eos

    def editor(self, bench: Workbench) -> FTBFEditor:
        return FTBFEditor(self, bench, self.layers)


class FTBFEditor(FTEditor):
    def apply(self, batch: Sequence[Edit]) -> Step:
        optimiser = torch.optim.Adam(self.deltas.values(), lr=self.method.learning_rate)
        first = self.probabilities(batch)
        edits, order = list(batch), Random(self.bench.seed)
        for _ in range(self.method.steps):
            order.shuffle(edits)
            total = 0.0
            for at in range(0, len(edits), self.method.mini_batch):
                losses = self.gradients(edits[at : at + self.method.mini_batch])
                total += float(losses.sum())
                if float(losses.mean()) >= self.method.stop_loss:
                    optimiser.step()
                    self.write()
            if total / len(edits) < self.method.stop_loss:
                break
        for delta in self.deltas.values():
            delta.grad = None
        return Step(first, self.probabilities(batch))

    def trained_on(self, losses: Tensor) -> Tensor:
        """Every edit of a mini-batch: it is passed over as a whole, or not at all."""
        return torch.ones_like(losses, dtype=torch.bool)

    def probabilities(self, batch: Sequence[Edit]) -> tuple[float, ...]:
        """p of the targets' own tokens, without what ends them."""
        with torch.no_grad():
            return probabilities(losses_in_batches(self.anatomy, self.tokenizer, batch))
