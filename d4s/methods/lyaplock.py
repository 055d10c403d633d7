"""LyapLock (arXiv 2505.15702, as reimplemented with Norm-Anchor Scaling): MEMIT with cached keys whose λ follows the
damage. z and r = (z − h_L) / (n − i) from the current weights, at every step and layer

    W = W0 + [Σ (v − W0 k) kᵀ] (B + y λC)⁻¹        B = Σ k kᵀ
    D = tr((W − W0) C (W − W0)ᵀ)                   y ← max(y + D / (α D_base) − 1, 1)

v is W k + r, what is asked, for the keys of this step, and for earlier ones what W gave right after their own step
(values="given", as released; "asked" keeps what was asked, and is then D4S with anchor="current" while y stays 1). D is
the mean square by which outputs on the corpus behind C have moved. y begins at 1, and D_base is D after the first
`base_steps` steps.

The release's queue Z, with its step a = 1 / √(α D_base) and its floor √(α D_base), is y = a Z; its V is 1 and its b 0.
It takes v of the corpus with W's bias, where W has one (GPT-2), here it has none: D is 0 at W0.

Every step solves anew, one Cholesky factor of d_in × d_in a layer (d_in³ / 3 + 2 d_out d_in² operations), whether λ has
changed or not: with values="given" the sum of the v moves at every step too, and no kept inverse would serve. So a step
wants many edits, as in the release, which makes 100 a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from d4s import ops
from d4s.change.closed_form import Prior
from d4s.configuration import Above, AtLeast
from d4s.edits import Edit
from d4s.errors import NotPositiveDefiniteError
from d4s.methods.base import Holding, LayerSize, Method, Step, Workbench
from d4s.methods.locate_then_edit import LocateEditor, LocateMethod, step_of
from d4s.methods.published import model_key, spread_preset
from d4s.models.architectures import Anatomy

BELOW_MEMIT = 15.0  # λ 1,000, where MEMIT's is 15,000: λ only rises, so it begins low


@dataclass(frozen=True, kw_only=True)
class LyapLock(LocateMethod):
    name: ClassVar[str] = "lyaplock"
    paper: ClassVar[str] = "arXiv 2505.15702"
    changes: ClassVar[str] = "MLP output projections"
    needs: ClassVar[tuple[str, ...]] = ("covariance",)
    not_published: ClassVar[tuple[str, ...]] = ("llama-2-7b",)

    allowed_damage: Annotated[
        float, "α, times D_base, from which on the damage raises λ", Above(0, "the damage is never under it")
    ] = 60.0
    base_steps: Annotated[int, "the damage after them is D_base", AtLeast(1)] = 1
    values: Annotated[
        Literal["given", "asked"], "v of earlier edits: what W gave after their step, or what was asked of it"
    ] = "given"

    @classmethod
    def preset(cls, anatomy: Anatomy) -> LyapLock:
        """Layers and target as MEMIT's, and λ 1,000; other models: a fifteenth of MEMIT's λ, as that is of Llama's and
        GPT-J's. The reimplementation leaves GPT-J's last layer out (`layers=(3, 4, 5, 6, 7)`)."""
        preset = dict(spread_preset(anatomy))
        if model_key(anatomy) not in (None, "embedded"):
            preset["prior_weight"] = 1_000.0
        elif preset["prior_weight"] is not None:
            preset["prior_weight"] /= BELOW_MEMIT
        return cls(**preset)

    def settled(self, bench: Workbench, edits: Sequence[Edit]) -> Method:
        """λ, where it is None: a fifteenth of what MEMIT would have."""
        method = super().settled(bench, edits)
        if self.prior_weight is not None:
            return method
        assert isinstance(method, LyapLock) and method.prior_weight is not None
        return method.weighed(method.prior_weight / BELOW_MEMIT)

    def holding(self, size: LayerSize, edits: int) -> Holding:
        """λC, both sums, and at the most W − W0 with its solve."""
        sums = 8 * (size.d_in**2 + size.d_out * size.d_in)
        return Holding({"statistics": 8 * size.d_in**2, "sums": sums}, size.weight + sums)

    def editor(self, bench: Workbench) -> LyapLockEditor:
        return LyapLockEditor(self, bench)


class LyapLockEditor(LocateEditor):
    def __init__(self, method: LyapLock, bench: Workbench) -> None:
        super().__init__(method, bench)
        self._priors = self.priors()
        self.reset()

    def priors(self) -> dict[int, Prior]:
        return self.plain_priors(self.method.prior_weight)

    def reset(self) -> None:
        shapes = {layer: self.anatomy.shape(layer) for layer in self.weights.layers}
        priors = {
            layer: prior.matrix for layer, prior in self._priors.items()
        }  # float64, where the sums are to be
        self.value_sums = {layer: priors[layer].new_zeros(shape) for layer, shape in shapes.items()}
        self.key_sums = {layer: torch.zeros_like(matrix) for layer, matrix in priors.items()}
        self.pressure = dict.fromkeys(shapes, 1.0)  # y
        self.damage_base = dict.fromkeys(shapes, math.nan)  # D_base, once it is known
        self.steps = 0

    def apply(self, batch: Sequence[Edit]) -> Step:
        targets = self.targets(batch)
        rows, bare = self.rows(batch), self.bare_rows(batch)
        layers = self.weights.layers
        self.steps += 1
        with self.ascending() as ascending:
            for i, layer in enumerate(ascending):
                k = self.keys(rows, layer)
                r = ((targets.target.double() - self.state(bare)) / (len(layers) - i)).to(k.device)
                now, there = self.weights.delta(layer), self.sums_device(layer)
                asked, kept = r + k @ now.T, k.to(there)  # v − W0 k, and k beside the sums
                self.key_sums[layer] += kept.T @ kept
                solved = self.solved(layer, self.value_sums[layer] + asked.to(there).T @ kept)
                self.weights.write_(layer, now + self.projected(layer, solved.to(now.device) - now))
                given = k @ self.weights.delta(layer).T
                value = given if self.method.values == "given" else asked
                self.value_sums[layer] += value.to(there).T @ kept
                self.follow(layer)
        return step_of(targets)

    def solved(self, layer: int, value_sum: Tensor) -> Tensor:
        """W − W0 = Σ (v − W0 k) kᵀ (B + y λC)⁻¹, [d_out, d_in]"""
        prior = self.pressure[layer] * self._priors[layer].matrix
        try:
            return ops.closed_form(value_sum[None], self.key_sums[layer][None], prior[None])[0]
        except NotPositiveDefiniteError:
            raise NotPositiveDefiniteError(
                f"layer {layer}: yλC + B is not positive definite; C needs more key vectors than its size "
                f"{len(prior)}, or a ridge"
            ) from None

    def damage(self, layer: int) -> float:
        """D = tr((W − W0) C (W − W0)ᵀ)"""
        change = self.weights.delta(layer).to(self.sums_device(layer))
        return float(((change @ self._priors[layer].matrix) * change).sum()) / self.method.prior_weight

    def follow(self, layer: int) -> None:
        """y after a step."""
        damage = self.damage(layer)
        if self.steps == self.method.base_steps:
            self.damage_base[layer] = damage
        allowed = self.method.allowed_damage * self.damage_base[layer]
        if allowed > 0:  # NaN before there is a base; 0 where the first steps moved nothing
            self.pressure[layer] = max(self.pressure[layer] + damage / allowed - 1, 1.0)

    def state_dict(self) -> dict[str, Tensor]:
        state = super().state_dict()
        for layer in self.weights.layers:
            state[f"value_sum.{layer}"] = self.value_sums[layer].clone()
            state[f"key_sum.{layer}"] = self.key_sums[layer].clone()
        queue = [[self.pressure[layer], self.damage_base[layer]] for layer in self.weights.layers]
        return state | {
            "queue": torch.tensor(queue, dtype=torch.float64),
            "steps": torch.tensor(self.steps),
        }

    def take_state(self, state: Mapping[str, Tensor]) -> None:
        for layer, (pressure, base) in zip(self.weights.layers, state["queue"].tolist(), strict=True):
            self.value_sums[layer].copy_(state[f"value_sum.{layer}"])
            self.key_sums[layer].copy_(state[f"key_sum.{layer}"])
            self.pressure[layer], self.damage_base[layer] = pressure, base
        self.steps = int(state["steps"])
        super().take_state(state)
