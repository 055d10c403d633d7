"""The edited weights: the unedited copy W0, and the one place that writes W = round(W0 + Δ)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from d4s import ops
from d4s.errors import ModelError
from d4s.interrupts import changed
from d4s.models.architectures import Anatomy


class EditedWeights:
    """W0 of the edited layers, and every change made to them.

    W is always rounded once from W0 + Δ, never from an already rounded weight. Memory: one copy of the
    edited weights.

    A layer of experts is a stack of matrices, W_j of each. Δ then is a mapping expert → Δ_j, and what it does not name
    keeps the bits of W0; where there is a single expert, a matrix, as of a dense layer.
    """

    def __init__(self, anatomy: Anatomy, layers: Sequence[int]) -> None:
        anatomy.check_layers(tuple(layers))
        anatomy.check_finite(tuple(layers))
        self.anatomy = anatomy
        self.layers = tuple(layers)
        self.base = {layer: anatomy.weight(layer).detach().clone() for layer in self.layers}
        # A number for each matrix of a layer: one, or one an expert.
        self._l1 = {layer: ops.l1_norms(_matrices(self.base[layer])).tolist() for layer in self.layers}
        self._delta_square = {layer: [0.0] * len(self._l1[layer]) for layer in self.layers}

    def write_(self, layer: int, delta: Tensor | Mapping[int, Tensor]) -> None:
        """W = round(W0 + delta). delta: [d_out, d_in], float32 | float64, relative to W0; of experts by their number.

        From another device it is brought to W's, of experts one matrix at a time.
        Raises ModelError if the shape does not fit or delta is not finite; W is then left as it was.
        """
        changed()
        place = self.anatomy.device_of(layer)
        if isinstance(delta, Tensor):
            delta = delta.to(place)
        parts = {0: delta} if isinstance(delta, Tensor) else dict(delta)
        weights, base = _matrices(self.anatomy.weight(layer).data), _matrices(self.base[layer])
        shape, name = self.anatomy.shape(layer), self.anatomy.weight_name(layer)
        if isinstance(delta, Tensor) and len(base) > 1:
            raise ModelError(f"{name} has {len(base)} experts; their change is given by expert")
        for part, change in parts.items():
            if tuple(change.shape) != shape or not 0 <= part < len(base):
                raise ModelError(
                    f"{name} is {list(shape)} (d_out, d_in), so its change must be, and is {list(change.shape)}"
                    + (f", of expert {part} of {len(base)}" if len(base) > 1 else "")
                )
            if not torch.isfinite(change).all():
                raise ModelError(
                    f"the change of {name} is not finite; nothing was written; "
                    "a larger prior_weight or ridge keeps the step bounded"
                )
            if weights[part].dtype == torch.float16:
                self._check_range(layer, base[part], change.to(place))
        for part, change in parts.items():
            l1, square = ops.write_back_(
                weights[part], base[part], change.to(place), transposed=self.anatomy.transposed(layer)
            )
            self._l1[layer][part], self._delta_square[layer][part] = float(l1), float(square)
        for part in self._written(layer) - set(parts):  # by an earlier Δ, and no longer changed
            weights[part].copy_(base[part])
            self._l1[layer][part] = float(ops.l1_norms([base[part]])[0])
            self._delta_square[layer][part] = 0.0

    def add_(self, layer: int, change: Tensor | Mapping[int, Tensor]) -> None:
        """W = round(W + change), by way of W0: what `write_` makes of the layer's Δ and this together."""
        place = self.anatomy.device_of(layer)
        if isinstance(change, Tensor):
            self.write_(layer, self.delta(layer) + change.to(place))
            return
        before = self.expert_deltas(layer)
        added = {
            part: before[part] + more.to(place) if part in before else more for part, more in change.items()
        }
        self.write_(layer, before | added)

    def _written(self, layer: int) -> set[int]:
        """Matrices of the layer that are not W0."""
        return {part for part, square in enumerate(self._delta_square[layer]) if square}

    def _check_range(self, layer: int, base: Tensor, delta: Tensor) -> None:
        base = base.T if self.anatomy.transposed(layer) else base
        largest = float((base + delta.to(torch.float32)).abs().max())
        if largest > torch.finfo(torch.float16).max:
            raise ModelError(
                f"the change would bring {self.anatomy.weight_name(layer)} to {largest:.3g}, beyond float16; nothing "
                "was written; load the model in bfloat16 or float32, or take a larger prior_weight"
            )

    def delta(self, layer: int) -> Tensor:
        """W − W0 as stored, [d_out, d_in] float64. ModelError for a layer of several experts."""
        if len(self._l1[layer]) > 1:
            raise ModelError(
                f"{self.anatomy.weight_name(layer)} holds several experts, not one matrix; "
                "their change is given by expert"
            )
        return self._delta_of(layer, 0)

    def expert_deltas(self, layer: int) -> dict[int, Tensor]:
        """W_j − W_j0 of every expert whose W_j is not W_j0, [d_out, d_in] float64 each."""
        return {part: self._delta_of(layer, part) for part in sorted(self._written(layer))}

    def _delta_of(self, layer: int, part: int) -> Tensor:
        weight, base = (_matrices(w)[part] for w in (self.anatomy.weight(layer).detach(), self.base[layer]))
        change = weight.double() - base.double()
        return change.T if self.anatomy.transposed(layer) else change

    def mean_absolute(self) -> dict[int, float]:
        """Mean |w| a layer: the paper's "L1-norm", ‖W‖₁ / numel."""
        return {layer: sum(self._l1[layer]) / self.base[layer].numel() for layer in self.layers}

    def mean_absolute_of_experts(self, layer: int) -> tuple[float, ...]:
        """Mean |w| of each matrix of a layer: of each expert, or of the one there is."""
        each = self.base[layer].numel() / len(self._l1[layer])
        return tuple(total / each for total in self._l1[layer])

    def delta_norm(self) -> dict[int, float]:
        """‖W − W0‖_F a layer."""
        return {layer: sum(self._delta_square[layer]) ** 0.5 for layer in self.layers}

    def norms(self) -> Tensor:
        """Σ|w| and Σ(ΔW)² as they were last taken, a row a matrix: [layers, 2] float64, or more where layers have
        experts; `set_norms` takes them again."""
        rows = [
            pair
            for layer in self.layers
            for pair in zip(self._l1[layer], self._delta_square[layer], strict=True)
        ]
        return torch.tensor(rows, dtype=torch.float64)

    def set_norms(self, norms: Tensor) -> None:
        rows = iter(norms.tolist())
        for layer in self.layers:
            for part in range(len(self._l1[layer])):
                self._l1[layer][part], self._delta_square[layer][part] = next(rows)

    def measure(self) -> None:
        """Takes the norms again, for methods that write by other means than `write_`."""
        for layer in self.layers:
            weights, base = _matrices(self.anatomy.weight(layer).detach()), _matrices(self.base[layer])
            self._l1[layer] = ops.l1_norms(weights).tolist()
            self._delta_square[layer] = [
                float((w.double() - w0.double()).square().sum()) for w, w0 in zip(weights, base, strict=True)
            ]

    @contextmanager
    def at_base(self) -> Iterator[None]:
        """Inside, the model holds W0; nothing is copied. Do not write inside."""
        edited = {layer: self.anatomy.weight(layer).data for layer in self.layers}
        try:
            for layer in self.layers:
                self.anatomy.weight(layer).data = self.base[layer]
            yield
        finally:
            for layer, data in edited.items():
                self.anatomy.weight(layer).data = data

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """A failure inside puts the edited weights back as they were at the start. Memory: one more copy of them."""
        before, norms = self.current(), self.norms()
        try:
            yield
        except BaseException:
            for layer, weight in before.items():
                self.anatomy.weight(layer).data.copy_(weight)
            self.set_norms(norms)
            raise

    def restore_(self) -> None:
        """Puts W0 back, bit for bit."""
        for layer in self.layers:
            self.anatomy.weight(layer).data.copy_(self.base[layer])
        self.measure()

    def load_(self, weights: Mapping[int, Tensor]) -> None:
        """Puts stored weights back (as `current` gave them), bit for bit."""
        for layer in self.layers:
            self.anatomy.weight(layer).data.copy_(weights[layer])
        self.measure()

    def changed(self) -> tuple[int, ...]:
        """Layers whose weights are not W0, bit for bit."""
        return tuple(i for i in self.layers if not torch.equal(self.anatomy.weight(i).detach(), self.base[i]))

    def current(self) -> dict[int, Tensor]:
        """The edited weights as stored; copies."""
        return {layer: self.anatomy.weight(layer).detach().clone() for layer in self.layers}


def _matrices(weight: Tensor) -> list[Tensor]:
    """Views of the matrices of a layer's weight: the one that it is, or one an expert."""
    return list(weight.unbind(0)) if weight.ndim == 3 else [weight]
