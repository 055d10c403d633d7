"""PMET (arXiv 2308.08742): δ of the attention's and of the MLP's output in the last edited layer are
optimised together, and only the MLP's is used: v* = v + δ_mlp. For the edited layers in ascending order,
with v measured again on the layers edited so far:

    R = (v* − v) / √(n − i)        ΔW = R Kᵀ (λC + K Kᵀ)⁻¹

Once the target is the argmax its NLL weighs a tenth, and the search ends when the KL is then ≤ .01: fields
`settled_nll_factor` and `settled_kl` of the target optimiser.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

from d4s.methods.base import Workbench
from d4s.methods.locate_then_edit import LocateMethod
from d4s.methods.memit import MEMITEditor
from d4s.methods.presets import pmet_preset
from d4s.models.architectures import Anatomy


@dataclass(frozen=True, kw_only=True)
class PMET(LocateMethod):
    name: ClassVar[str] = "pmet"
    paper: ClassVar[str] = "arXiv 2308.08742"
    changes: ClassVar[str] = "MLP output projections"
    needs: ClassVar[tuple[str, ...]] = ("covariance",)

    @classmethod
    def preset(cls, anatomy: Anatomy) -> PMET:
        return cls(**pmet_preset(anatomy))

    def editor(self, bench: Workbench) -> PMETEditor:
        return PMETEditor(self, bench)


class PMETEditor(MEMITEditor):
    places = ("mlp", "attention")

    def share(self, left: int) -> float:
        return sqrt(left)
