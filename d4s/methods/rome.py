"""ROME (arXiv 2202.05262) and r-ROME (arXiv 2403.07175): one edit at a time as a rank-one change of one
layer. v* is optimised at the MLP's output, over the bare prompt and 20 generated contexts; k̄ is the key's
mean over all of them:

    u = C⁻¹ k̄ / ‖C⁻¹ k̄‖        ΔW = (v* − v) uᵀ / (kᵀ u)

`rome`, as released: k and v = W k (+ bias) are those of the bare prompt. Where k and k̄ point apart, kᵀ u is
small and a single edit can ruin a model. `r-rome`: k = k̄, and v is the mean output.
This is EMMET with one edit and ε → 0, where k = k̄.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from d4s.change.closed_form import Prior
from d4s.configuration import AtLeast, Length
from d4s.edits import Edit
from d4s.locate.request_rows import Place
from d4s.locate.targets import TargetConfig, Targets
from d4s.methods.base import Holding, LayerSize, Step, Workbench
from d4s.methods.locate_then_edit import LocateEditor, TargetMethod, step_of
from d4s.methods.published import SPREAD, model_key, one_layer
from d4s.models.architectures import Anatomy


@dataclass(frozen=True, kw_only=True)
class ROME(TargetMethod):
    name: ClassVar[str] = "rome"
    paper: ClassVar[str] = "arXiv 2202.05262"
    changes: ClassVar[str] = "one MLP output projection"
    needs: ClassVar[tuple[str, ...]] = ("covariance",)
    strength: ClassVar[str] = "clamp"
    bare_key: ClassVar[bool] = True  # k of the bare prompt beside u of k̄: the released code's flaw
    places: ClassVar[tuple[Place, ...]] = ("mlp",)

    layers: Annotated[
        tuple[int, ...],
        "whose W is changed; targets are those of the last",
        Length(1, "one layer is changed"),
    ]
    contexts: Annotated[
        int,
        "generated contexts a seed word (five words), of each length; 0: the bare prompt alone",
        AtLeast(0),
    ] = 2
    context_lengths: Annotated[tuple[int, ...], "tokens of a context, its seed word included", AtLeast(1)] = (
        5,
        10,
    )
    ridge: Annotated[
        float,
        "added to C, relative to mean(diag C), where a small corpus leaves C nearly singular",
        AtLeast(0),
    ] = 0.0
    identity_covariance: Annotated[bool, "take the identity for C"] = False

    @classmethod
    def preset(cls, anatomy: Anatomy) -> ROME:
        """Llama-2 and -3: 25 steps, weight decay 1e-3, C = I. gpt2-xl, GPT-J and all others: 20 steps, .5, C."""
        key = model_key(anatomy)
        layers = (one_layer(anatomy),)
        if key == "embedded":
            return cls(layers=layers, **{name: SPREAD[key][name] for name in ("target", "ridge", "contexts")})
        if key in ("llama-2-7b", "llama-3-8b"):
            target = TargetConfig(steps=25, learning_rate=0.5, weight_decay=1e-3, clamp=4.0)
            return cls(layers=layers, target=target, identity_covariance=True)
        target = TargetConfig(steps=20, learning_rate=0.5, weight_decay=0.5, clamp=4.0)
        return cls(layers=layers, target=target)

    def holding(self, size: LayerSize, edits: int) -> Holding:
        """C and its factor."""
        return Holding({"statistics": 2 * 8 * size.d_in**2}, size.weight)

    def crossing(self, size: LayerSize) -> int:
        """u alone: C⁻¹ k̄ is all that C is for."""
        return 8 * size.d_in

    def editor(self, bench: Workbench) -> ROMEEditor:
        return ROMEEditor(self, bench)


@dataclass(frozen=True, kw_only=True)
class RROME(ROME):
    name: ClassVar[str] = "r-rome"
    paper: ClassVar[str] = "arXiv 2403.07175"
    not_published: ClassVar[tuple[str, ...]] = ("llama-3-8b",)
    bare_key: ClassVar[bool] = False


class ROMEEditor(LocateEditor):
    bare_share = None  # k̄: bare prompt and contexts count alike

    def __init__(self, method: ROME, bench: Workbench) -> None:
        super().__init__(method, bench)
        if method.identity_covariance:
            self._prior = Prior.identity(self.anatomy.shape(self.last)[1], device=self.sums_device(self.last))
        else:
            self._prior = Prior(self.second_moments()[self.last], 1.0, method.ridge)

    def apply(self, batch: Sequence[Edit]) -> Step:
        return step_of(Targets.concatenate([self.apply_one(edit) for edit in batch]))

    def apply_one(self, edit: Edit) -> Targets:
        targets = self.targets([edit])
        averaged = self.rows([edit])
        rows = self.bare_rows([edit]) if self.method.bare_key else averaged
        k = self.keys(rows, self.last)
        residual = targets.target.double() - self.state(rows)  # v* − v
        change = rank_one(residual[0], k[0], self.keys(averaged, self.last)[0], self._prior)
        self.weights.write_(self.last, self.weights.delta(self.last) + self.projected(self.last, change))
        return targets


def rank_one(residual: Tensor, key: Tensor, mean_key: Tensor, prior: Prior) -> Tensor:
    """(v* − v) uᵀ / (kᵀ u) with u ∝ C⁻¹ k̄. residual [d_out], keys [d_in]; returns [d_out, d_in], where the key is."""
    u = prior.solve(prior.rows(mean_key).unsqueeze(1)).squeeze(1)
    u = (u / u.norm()).to(key.device)
    return residual.outer(u) / key.dot(u)
