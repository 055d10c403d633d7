"""ENCORE (arXiv 2502.01636): MEMIT with cached keys (see memit_seq.py), two things added:

- the norm of the change is held down, by λ_n I beside the prior: ΔW = R Kᵀ (λC + λ_n I + B + K Kᵀ)⁻¹
- a target's optimisation ends a few steps after the new object is the argmax in every context
  (`stop_after_argmax` of the target optimiser), before it is made needlessly certain. The release does not ask the bare
  prompt, so that its count may begin earlier.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from d4s.change.closed_form import Prior
from d4s.configuration import AtLeast
from d4s.locate.targets import TargetConfig
from d4s.methods.base import Holding, LayerSize, Workbench
from d4s.methods.d4s import D4SEditor
from d4s.methods.locate_then_edit import LocateMethod, holding_of_sums
from d4s.methods.published import model_key, spread_preset
from d4s.models.architectures import Anatomy


@dataclass(frozen=True, kw_only=True)
class ENCORE(LocateMethod):
    name: ClassVar[str] = "encore"
    paper: ClassVar[str] = "arXiv 2502.01636"
    changes: ClassVar[str] = "MLP output projections"
    keeps_sums: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("covariance",)
    not_published: ClassVar[tuple[str, ...]] = ("gpt-j-6b",)

    norm_weight: Annotated[float, "λ_n, the weight of the identity beside the prior", AtLeast(0)] = 10.0

    @classmethod
    def preset(cls, anatomy: Anatomy) -> ENCORE:
        """As MEMIT's, but for Llama's targets; λ_n and the updates made after the new object is the argmax everywhere.

        Published for gpt2-xl, Llama-2 and Llama-3. GPT-J: gpt2-xl's; models without a row: Llama-2's λ_n and updates.
        """
        key = model_key(anatomy)
        spread = spread_preset(anatomy)
        target: TargetConfig = spread["target"]
        if key in ("llama-2-7b", "llama-3-8b"):
            target = TargetConfig(steps=25, learning_rate=0.5, weight_decay=0.5, clamp=0.75)
        more = {"gpt2-xl": 3, "gpt-j-6b": 3, "llama-3-8b": 1}.get(key or "", 2)
        norm_weight = 20.0 if key == "llama-3-8b" else 10.0
        return cls(**spread | dict(target=replace(target, stop_after_argmax=more), norm_weight=norm_weight))

    def holding(self, size: LayerSize, edits: int) -> Holding:
        return holding_of_sums(size, edits, self.rows_an_edit)

    def editor(self, bench: Workbench) -> ENCOREEditor:
        return ENCOREEditor(self, bench)


class ENCOREEditor(D4SEditor):
    def __init__(self, method: ENCORE, bench: Workbench) -> None:
        super().__init__(method, bench, anchor="current")

    def priors(self) -> dict[int, Prior]:
        priors = self.plain_priors(self.method.prior_weight)
        for prior in priors.values():
            prior.matrix.diagonal().add_(self.method.norm_weight)  # λC + λ_n I, before any factor is made
        return priors
