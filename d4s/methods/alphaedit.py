"""AlphaEdit (arXiv 2410.02355): P projects onto the null space of C, the eigenvectors with eigenvalues under
a threshold. With C_p = Σ k kᵀ of earlier edits and R = (z − h_L) / (n − i) from the current weights,

    [P (K Kᵀ + C_p) + L2·I] X = P K Rᵀ        ΔW = Xᵀ        then C_p += K Kᵀ, K taken on the edited weights

X lies in the range of P (the equation shows L2·X = P (…)), so it also solves the symmetric equation over the
projected keys Q = P K,

    ΔW = R Qᵀ (L2·I + P C_p P + Q Qᵀ)⁻¹

which is MEMIT with cached keys, Q for K and L2·I for λC: the sums of `ClosedForm` do it in O(d²) an edit.
A layer is written after those below it and its own write does not reach its keys, so the keys that went in are
the ones on the edited weights: none is taken again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from d4s.change.closed_form import Prior
from d4s.configuration import Above
from d4s.errors import ConfigError
from d4s.locate.keys import SubjectRows
from d4s.locate.targets import TargetConfig
from d4s.methods.base import Holding, LayerSize, Workbench
from d4s.methods.d4s import D4SEditor
from d4s.methods.locate_then_edit import TargetMethod, holding_of_sums
from d4s.methods.published import model_key, spread_preset
from d4s.models.architectures import Anatomy


@dataclass(frozen=True, kw_only=True)
class AlphaEdit(TargetMethod):
    name: ClassVar[str] = "alphaedit"
    paper: ClassVar[str] = "arXiv 2410.02355"
    changes: ClassVar[str] = "MLP output projections"
    keeps_sums: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("covariance", "null space")
    strength: ClassVar[str] = "l2"

    l2: Annotated[float, "weight of the identity in the solve", Above(0)] = 10.0
    null_space_threshold: Annotated[float, "eigenvalues of C under it may be changed", Above(0)] = 2e-2
    threshold_is_relative: Annotated[
        bool, "to their mean; the release's is absolute, and depends on a model's scale"
    ] = False

    @classmethod
    def preset(cls, anatomy: Anatomy) -> AlphaEdit:
        """Layers and target as MEMIT's, but for Llama-2's target; L2 10.

        The published threshold, 2e-2, is absolute. Models without a row: the mean eigenvalue of C. Few
        directions hold most of the keys' energy, so that nine in ten or so lie under it. The embedded model: half of
        it, with L2 30, where 92 of 100 neighbours keep their greedy answer over 200 edits (at the mean with L2 10 it
        is 82, for the same average; at a fifth of it fewer edits reach their paraphrases, at a twentieth few take).
        """
        key = model_key(anatomy)
        spread = spread_preset(anatomy)
        preset = {k: v for k, v in spread.items() if k not in ("prior_weight", "ridge")}
        if key == "llama-2-7b":
            preset["target"] = TargetConfig(steps=25, learning_rate=0.1, weight_decay=0.5, clamp=0.75)
        if key is None:
            preset |= dict(null_space_threshold=1.0, threshold_is_relative=True)
        elif key == "embedded":
            preset |= dict(null_space_threshold=0.5, threshold_is_relative=True, l2=30.0)
        return cls(**preset)

    def holding(self, size: LayerSize, edits: int) -> Holding:
        """The sums, the identity's factor, and at most as many protected directions as there are."""
        sums = holding_of_sums(size, edits, self.rows_an_edit)
        more = 8 * size.d_in**2
        return Holding({**sums.parts, "statistics": sums.parts["statistics"] + 2 * more}, sums.state)

    def editor(self, bench: Workbench) -> AlphaEditEditor:
        return AlphaEditEditor(self, bench)


class AlphaEditEditor(D4SEditor):
    def __init__(self, method: AlphaEdit, bench: Workbench) -> None:
        super().__init__(method, bench, anchor="current")
        self.protected = {
            layer: protected_directions(c, method.null_space_threshold, method.threshold_is_relative, layer)
            for layer, c in self.second_moments().items()
        }

    def priors(self) -> dict[int, Prior]:
        shapes = {layer: self.anatomy.shape(layer) for layer in self.weights.layers}
        return {
            layer: Prior.identity(d_in, self.method.l2, device=self.sums_device(layer))
            for layer, (_, d_in) in shapes.items()
        }

    def keys(self, rows: SubjectRows, layer: int) -> Tensor:
        """Q = P K, where the sums are."""
        protected = self.protected[layer]
        keys = super().keys(rows, layer).to(protected.device)
        return keys - keys @ protected @ protected.T


def protected_directions(covariance: Tensor, threshold: float, relative: bool, layer: int) -> Tensor:
    """Eigenvectors of C that are not in its null space, V with P = I − V Vᵀ. [d_in, count] float64.

    threshold: eigenvalues under it count as 0; relative: to their mean, mean(diag C)
    Raises ConfigError if all are above it: nothing could then be changed.
    """
    values, vectors = torch.linalg.eigh(covariance)
    bound = threshold * float(values.mean()) if relative else threshold
    if values[0] >= bound:
        raise ConfigError(
            f"layer {layer}: C has no null space at null_space_threshold={threshold} "
            f"(eigenvalues from {values[0]:.3g} to {values[-1]:.3g}, mean {values.mean():.3g}); raise it, "
            "or set threshold_is_relative=True"
        )
    return vectors[:, values >= bound].contiguous()
