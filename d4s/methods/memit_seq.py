"""MEMIT (arXiv 2210.07229) with cached keys, as in AlphaEdit's release (arXiv 2410.02355); MEMIT's paper caches none
between batches. Each step's solve also holds the keys of all earlier edits,

    ΔW = R Kᵀ (λC + B + K Kᵀ)⁻¹        B += K Kᵀ

with z, h and R = (z − h_L) / (n − i) from the current weights. This is D4S with anchor="current" (see
d4s.py), whose sums keep the same least-squares problem relative to W0. As in that release, a prompt that is edited
again has its key in B twice, and moves only about half of the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from d4s.methods.base import Holding, LayerSize, Workbench
from d4s.methods.d4s import D4SEditor
from d4s.methods.locate_then_edit import LocateMethod, holding_of_sums


@dataclass(frozen=True, kw_only=True)
class MEMITSeq(LocateMethod):
    name: ClassVar[str] = "memit-seq"
    paper: ClassVar[str] = "arXiv 2210.07229"
    changes: ClassVar[str] = "MLP output projections"
    keeps_sums: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("covariance",)
    edits_experts: ClassVar[bool] = True

    def holding(self, size: LayerSize, edits: int) -> Holding:
        return holding_of_sums(size, edits, self.rows_an_edit)

    def editor(self, bench: Workbench) -> D4SEditor:
        return D4SEditor(self, bench, anchor="current")
