"""PMET (arXiv 2308.08742): δ of the attention's and of the MLP's output in the last edited layer are
optimised together, and only the MLP's is used: v* = v + δ_mlp. For the edited layers in ascending order,
with v measured again on the layers edited so far:

    R = (v* − v) / √(n − i)        ΔW = R Kᵀ (λC + K Kᵀ)⁻¹

Once the target is the argmax its NLL weighs a tenth, and the search ends when the KL is then ≤ .01: fields
`settled_nll_factor` and `settled_kl` of the target optimiser.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt
from typing import ClassVar

from d4s.locate.request_rows import Place
from d4s.locate.targets import TargetConfig
from d4s.methods.base import Workbench
from d4s.methods.locate_then_edit import LocateMethod
from d4s.methods.memit import MEMITEditor
from d4s.methods.published import model_key, spread_preset
from d4s.models.architectures import Anatomy


@dataclass(frozen=True, kw_only=True)
class PMET(LocateMethod):
    name: ClassVar[str] = "pmet"
    paper: ClassVar[str] = "arXiv 2308.08742"
    changes: ClassVar[str] = "MLP output projections"
    needs: ClassVar[tuple[str, ...]] = ("covariance",)
    not_published: ClassVar[tuple[str, ...]] = ("gpt2-xl", "llama-3-8b")
    places: ClassVar[tuple[Place, ...]] = ("mlp", "attention")

    @classmethod
    def preset(cls, anatomy: Anatomy) -> PMET:
        """Layers, λ and target as MEMIT's where nothing else is published; settled targets end early.

        The authors' files have kl_factor 1 (GPT-J) and .8 (GPT-NeoX), with which the bound on the KL makes a search go
        on; by MEMIT's .0625, which EasyEdit's Llama has, it ends a few looks after the target is the argmax.
        """
        spread = spread_preset(anatomy)
        key = model_key(anatomy)
        target = replace(spread["target"], kl_factor=1.0)
        if key == "gpt-j-6b":
            spread = spread | dict(prior_weight=6_000.0)
            target = replace(target, steps=30, learning_rate=0.2)
        elif key == "llama-2-7b":  # as in EasyEdit; the authors' own release has no Llama
            target = TargetConfig(steps=20, learning_rate=0.5, weight_decay=0.5, clamp=1.0)
        return cls(**spread | dict(target=replace(target, settled_nll_factor=0.1, settled_kl=0.01)))

    def editor(self, bench: Workbench) -> PMETEditor:
        return PMETEditor(self, bench)


class PMETEditor(MEMITEditor):
    def share(self, left: int) -> float:
        return sqrt(left)
