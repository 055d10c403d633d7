"""MEMIT (arXiv 2210.07229), applied again and again to the current weights, nothing cached.

For the edited layers in ascending order, with H_L measured again on the layers edited so far:

    R = (Z − H_L) / (n − i)        ΔW = R Kᵀ (λC + K Kᵀ)⁻¹
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from d4s.change.expert_form import Delta, solve_jointly
from d4s.edits import Edit
from d4s.methods.base import Step, Workbench
from d4s.methods.locate_then_edit import LocateEditor, LocateMethod, step_of


@dataclass(frozen=True, kw_only=True)
class MEMIT(LocateMethod):
    name: ClassVar[str] = "memit"
    paper: ClassVar[str] = "arXiv 2210.07229"
    changes: ClassVar[str] = "MLP output projections"
    needs: ClassVar[tuple[str, ...]] = ("covariance",)
    edits_experts: ClassVar[bool] = True

    def editor(self, bench: Workbench) -> MEMITEditor:
        return MEMITEditor(self, bench)


class MEMITEditor(LocateEditor):
    def __init__(self, method: LocateMethod, bench: Workbench) -> None:
        super().__init__(method, bench)
        self._priors = self.priors()

    def share(self, left: int) -> float:
        """What the residual is divided by when `left` = n − i layers are still to be edited."""
        return left

    def apply(self, batch: Sequence[Edit]) -> Step:
        targets = self.targets(batch)
        rows, bare = self.rows(batch), self.bare_rows(batch)
        layers = self.weights.layers
        with self.ascending() as ascending:
            for i, layer in enumerate(ascending):
                residuals = (targets.target.double() - self.state(bare)) / self.share(len(layers) - i)
                change = self.solved(residuals, self.keys(rows, layer), layer)
                self.weights.add_(layer, self.projected(layer, change))
        return step_of(targets)

    def solved(self, residuals: Tensor, keys: Tensor, layer: int) -> Delta:
        """ΔW of a layer. residuals: [edits, d_out]; keys: [edits, d_in]"""
        return solve_jointly(residuals, keys, self._priors[layer])
