"""The edited weights: the unedited copy W0, and the one place that writes W = round(W0 + Δ)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from d4s import ops
from d4s.errors import ModelError
from d4s.models.architectures import Anatomy


class EditedWeights:
    """W0 of the edited layers, and every change made to them.

    W is always rounded once from W0 + Δ, never from an already rounded weight. Memory: one copy of the
    edited weights.
    """

    def __init__(self, anatomy: Anatomy, layers: Sequence[int]) -> None:
        anatomy.check_layers(tuple(layers))
        anatomy.check_finite(tuple(layers))
        self.anatomy = anatomy
        self.layers = tuple(layers)
        self.base = {layer: anatomy.weight(layer).detach().clone() for layer in self.layers}
        sums = ops.l1_norms([self.base[layer] for layer in self.layers])
        self._l1 = dict(zip(self.layers, sums.tolist(), strict=True))
        self._delta_square = {layer: 0.0 for layer in self.layers}

    def write_(self, layer: int, delta: Tensor) -> None:
        """W = round(W0 + delta). delta: [d_out, d_in], float32 | float64, relative to W0.

        Raises ModelError if the shape does not fit or delta is not finite; W is then left as it was.
        """
        weight = self.anatomy.weight(layer)
        if tuple(delta.shape) != self.anatomy.shape(layer):
            raise ModelError(
                f"{self.anatomy.weight_name(layer)} is {list(self.anatomy.shape(layer))} (d_out, d_in), "
                f"the change is {list(delta.shape)}"
            )
        if not torch.isfinite(delta).all():
            raise ModelError(
                f"the change of {self.anatomy.weight_name(layer)} is not finite; nothing was written. "
                "A larger prior_weight or ridge keeps the step bounded"
            )
        if weight.dtype == torch.float16:
            self._check_range(layer, delta)
        l1, square = ops.write_back_(
            weight.data, self.base[layer], delta, transposed=self.anatomy.transposed(layer)
        )
        self._l1[layer], self._delta_square[layer] = float(l1), float(square)

    def _check_range(self, layer: int, delta: Tensor) -> None:
        base = self.base[layer].T if self.anatomy.transposed(layer) else self.base[layer]
        largest = float((base + delta.to(torch.float32)).abs().max())
        if largest > torch.finfo(torch.float16).max:
            raise ModelError(
                f"the change would bring {self.anatomy.weight_name(layer)} to {largest:.3g}, beyond float16; nothing "
                "was written. Load the model in bfloat16 or float32, or take a larger prior_weight"
            )

    def delta(self, layer: int) -> Tensor:
        """W − W0 as stored, [d_out, d_in] float64."""
        change = self.anatomy.weight(layer).detach().double() - self.base[layer].double()
        return change.T if self.anatomy.transposed(layer) else change

    def mean_absolute(self) -> dict[int, float]:
        """Mean |w| a layer: the paper's "L1-norm", ‖W‖₁ / numel."""
        return {layer: self._l1[layer] / self.base[layer].numel() for layer in self.layers}

    def delta_norm(self) -> dict[int, float]:
        """‖W − W0‖_F a layer."""
        return {layer: self._delta_square[layer] ** 0.5 for layer in self.layers}

    def norms(self) -> Tensor:
        """Σ|w| and Σ(ΔW)² a layer as they were last taken, [layers, 2] float64; `set_norms` takes them again."""
        rows = [[self._l1[layer], self._delta_square[layer]] for layer in self.layers]
        return torch.tensor(rows, dtype=torch.float64)

    def set_norms(self, norms: Tensor) -> None:
        for layer, (l1, square) in zip(self.layers, norms.tolist(), strict=True):
            self._l1[layer], self._delta_square[layer] = l1, square

    def measure(self) -> None:
        """Takes the norms again, for methods that write by other means than `write_`."""
        sums = ops.l1_norms([self.anatomy.weight(layer).detach() for layer in self.layers])
        for layer, total in zip(self.layers, sums.tolist(), strict=True):
            self._l1[layer] = total
            self._delta_square[layer] = float(self.delta(layer).square().sum())

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
        before, l1, delta_square = self.current(), dict(self._l1), dict(self._delta_square)
        try:
            yield
        except BaseException:
            for layer, weight in before.items():
                self.anatomy.weight(layer).data.copy_(weight)
            self._l1, self._delta_square = l1, delta_square
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
