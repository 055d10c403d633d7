"""UltraEdit (arXiv 2505.14679): no training, no subject, no target search. One forward and backward pass on
the answers gives, at each position that predicts an answer token, W's input h and the gradient g of the
loss in W's output. With mean and deviation of concat(h, g) over every such token the editor has ever seen, in all
layers whose W has this shape, as released,

    ĥ, ĝ = (concat(h, g) − mean) / deviation        v = −lr ‖ĥ‖² ĝ        ΔW = [(Hᵀ H + I)⁻¹ Hᵀ V]ᵀ

H holds the h themselves. The loss of an edit is the mean over its tokens, and edits are summed, so that a
gradient does not depend on the batch it comes in. A deviation needs two tokens: a first edit of one token
changes nothing, and of the released code's 100 edits a turn every one has company. The deviation is the sample's; the
release adds n and not n − 1 times a turn's variance, so that its steps are some hundredths shorter.

W is one projection a layer, in some models as published not the MLP's output (`modules`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from d4s.change.closed_form import Prior, solve
from d4s.edits import Edit
from d4s.errors import ConfigError
from d4s.methods.answers import AnswerRows, losses_in_batches, probabilities
from d4s.methods.base import Holding, LayerSize, MasterEditor, Method, Step, Workbench, holding_of_master
from d4s.methods.published import measured_key, model_key, spread_preset
from d4s.models.architectures import Anatomy
from d4s.models.trace import Trace


@dataclass(frozen=True, kw_only=True)
class UltraEdit(Method):
    name: ClassVar[str] = "ultraedit"
    paper: ClassVar[str] = "arXiv 2505.14679"
    changes: ClassVar[str] = "projections of the MLP"
    not_published: ClassVar[tuple[str, ...]] = ("gpt2-xl", "llama-2-7b")
    strength: ClassVar[str] = "learning_rate"

    layers: Annotated[tuple[int, ...], "whose W is changed"]
    modules: Annotated[
        tuple[str, ...], "path of W within each layer's block; empty: the MLP's output projection"
    ] = ()
    learning_rate: Annotated[float, "factor on the step"] = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.modules and len(self.modules) != len(self.layers):
            raise ConfigError(
                f"modules={list(self.modules)}: must be one for each of layers={list(self.layers)}, or none"
            )

    @classmethod
    def preset(cls, anatomy: Anatomy) -> UltraEdit:
        """Learning rate 1e-6. GPT-J: W of layers 18 to 26. Llama-3: the gate of 11 to 15 and the up projection of 18
        to 24.

        Both are those of the release for zsRE and UltraEditBench. For gpt2-xl and Llama-2 nothing is published; they
        and all others have the MLP's output of GPT-J's depth, 64 to 93 %: in MEMIT's layers no rate made an edit of
        SmolLM2-135M take. There the rate is 3e-4: at 1e-4 half as many of 50 single edits are said, at 1e-3 as many,
        for twice the harm (found with a mean and deviation of each layer's own). The embedded model, whose keys are
        short, has MEMIT's layer, and 2e-3, at which a turn of 100 edits takes.
        """
        key = model_key(anatomy)
        if key == "gpt-j-6b":
            return cls(layers=tuple(range(18, 27)), learning_rate=1e-6)
        if key == "llama-3-8b":
            modules = ("mlp.gate_proj",) * 5 + ("mlp.up_proj",) * 7
            return cls(layers=(*range(11, 16), *range(18, 25)), modules=modules, learning_rate=1e-6)
        if key == "embedded":
            return cls(layers=spread_preset(anatomy)["layers"], learning_rate=2e-3)
        count = len(anatomy)
        first, last = (count * of_28 // 28 for of_28 in (18, 26))
        rate = 3e-4 if measured_key(anatomy) == "smollm2-135m" else 1e-6
        return cls(layers=tuple(range(first, last + 1)), learning_rate=rate)

    def holding(self, size: LayerSize, edits: int) -> Holding:
        """Δ; the identity, which all layers of a width share, is left out."""
        return holding_of_master(size)

    def editor(self, bench: Workbench) -> UltraEditEditor:
        return UltraEditEditor(self, bench)


class Moments:
    """Mean and deviation of all rows seen so far, float64."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self.squares = torch.zeros(width, dtype=torch.float64, device=device)  # Σ (x − mean)²

    def add_(self, rows: Tensor) -> None:
        """rows: [n, width]. Merging of two sets' moments: Chan, Golub and LeVeque, 1979."""
        rows = rows.double().to(self.mean.device)
        total = self.count + len(rows)
        away = rows.mean(0) - self.mean
        self.squares += (rows - rows.mean(0)).square().sum(0) + away.square() * self.count * len(rows) / total
        self.mean += away * len(rows) / total
        self.count = total

    def normalised(self, rows: Tensor) -> Tensor:
        """(rows − mean) / deviation, the sample's (n − 1); float64, where the rows are."""
        deviation = (self.squares / (self.count - 1).clamp_min(1)).sqrt()
        return (rows.double() - self.mean.to(rows.device)) / (deviation.to(rows.device) + 1e-7)


class UltraEditEditor(MasterEditor):
    def __init__(self, method: UltraEdit, bench: Workbench) -> None:
        super().__init__(method, bench, method.layers, dict(zip(method.layers, method.modules, strict=False)))
        places = {(self.anatomy.shape(layer)[1], self.anatomy.device_of(layer)) for layer in method.layers}
        self._identities = {
            (d_in, device): Prior.identity(d_in, dtype=torch.float32, device=device)
            for d_in, device in places
        }

    def reset(self) -> None:
        super().reset()
        anatomy = self.anatomy
        self.moments: dict[tuple[int, int], Moments] = {}
        for layer in self.weights.layers:
            shape = anatomy.shape(layer)
            self.moments.setdefault(shape, Moments(sum(shape), anatomy.device_of(layer)))

    def apply(self, batch: Sequence[Edit]) -> Step:
        losses, inputs, gradients = self.answers(batch)
        rows = {layer: torch.cat([inputs[layer], gradients[layer]], 1) for layer in self.deltas}
        for layer, both in rows.items():
            self.moments[self.anatomy.shape(layer)].add_(both)
        for layer, delta in self.deltas.items():
            h = inputs[layer]
            normed = self.moments[self.anatomy.shape(layer)].normalised(rows[layer])
            h_hat, g_hat = normed.split([h.shape[1], normed.shape[1] - h.shape[1]], 1)
            v = -self.method.learning_rate * h_hat.square().sum(1, keepdim=True) * g_hat
            delta += solve(v, h, self._identities[h.shape[1], h.device])
        self.write()
        return Step(probabilities(losses), (float("nan"),) * len(batch))

    def answers(self, batch: Sequence[Edit]) -> tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]:
        """Losses [edits], and h [tokens, d_in] and g [tokens, d_out] a layer, float32."""
        layers = self.weights.layers
        inputs: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        gradients: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        outputs: dict[int, Tensor] = {}

        def keep(layer: int) -> Callable[[Tensor], Tensor]:
            def kept(output: Tensor) -> Tensor:
                # No weight has a gradient here: the graph begins at the lowest edited layer's output.
                outputs[layer] = output if output.requires_grad else output.detach().requires_grad_(True)
                return outputs[layer].clone()

            return kept

        with ExitStack() as stack:
            traces = {
                layer: stack.enter_context(Trace(self.anatomy.projection(layer), edit=keep(layer)))
                for layer in layers
            }

            def use(rows: AnswerRows, losses: Tensor) -> None:
                found = torch.autograd.grad(losses.sum(), [outputs[layer] for layer in layers])
                for layer, gradient in zip(layers, found, strict=True):
                    for kept, values in ((inputs, traces[layer].input), (gradients, gradient)):
                        places = (rows.row.to(values.device), rows.read.to(values.device))
                        at_tokens = values.detach().reshape(*rows.ids.shape, -1)[places]
                        kept[layer].append(at_tokens.float())

            losses = losses_in_batches(self.anatomy, self.tokenizer, batch, use)
        return (
            losses,
            {layer: torch.cat(parts) for layer, parts in inputs.items()},
            {layer: torch.cat(parts) for layer, parts in gradients.items()},
        )

    def state_dict(self) -> dict[str, Tensor]:
        state = super().state_dict()
        return state | {name: tensor.clone() for name, tensor in self._statistics().items()}

    def take_state(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in self._statistics().items():
            tensor.copy_(state[name])
        super().take_state(state)

    def _statistics(self) -> dict[str, Tensor]:
        return {
            f"moments.{d_out}x{d_in}.{name}": tensor
            for (d_out, d_in), moments in self.moments.items()
            for name, tensor in vars(moments).items()
        }
