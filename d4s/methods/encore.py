"""ENCORE (arXiv 2502.01636): MEMIT with cached keys (see memit_seq.py), two things added:

- the norm of the change is held down, by λ_n I beside the prior: ΔW = R Kᵀ (λC + λ_n I + B + K Kᵀ)⁻¹
- a target's optimisation ends a few steps after the new object is the argmax in every context
  (`stop_after_argmax` of the target optimiser), before it is made needlessly certain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from d4s.change.closed_form import Prior
from d4s.errors import ConfigError
from d4s.methods.base import Workbench
from d4s.methods.d4s import D4SEditor
from d4s.methods.locate_then_edit import LocateMethod
from d4s.methods.presets import encore_preset
from d4s.models.architectures import Anatomy


@dataclass(frozen=True, kw_only=True)
class ENCORE(LocateMethod):
    name: ClassVar[str] = "encore"
    paper: ClassVar[str] = "arXiv 2502.01636"
    changes: ClassVar[str] = "MLP output projections"
    needs: ClassVar[tuple[str, ...]] = ("covariance",)

    norm_weight: Annotated[float, "λ_n, the weight of the identity beside the prior"] = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm_weight < 0:
            raise ConfigError(f"norm_weight (λ_n) is {self.norm_weight}, must be 0 or more")

    @classmethod
    def preset(cls, anatomy: Anatomy) -> ENCORE:
        return cls(**encore_preset(anatomy))

    def editor(self, bench: Workbench) -> ENCOREEditor:
        return ENCOREEditor(self, bench)


class ENCOREEditor(D4SEditor):
    def __init__(self, method: ENCORE, bench: Workbench) -> None:
        super().__init__(method, bench, anchor="current", replaces=False)

    def priors(self) -> dict[int, Prior]:
        priors = super().priors()
        for prior in priors.values():
            prior.matrix.diagonal().add_(self.method.norm_weight)  # λC + λ_n I, before any factor is made
        return priors
