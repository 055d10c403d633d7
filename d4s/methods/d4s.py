"""D4S, Dump for Sequence (arXiv 2410.23843). One edit a step; per layer two sums are kept, whatever their number:

    A = Σ d kᵀ   [d_model, d_in]        B = Σ k kᵀ   [d_in, d_in]        W = W0 + A (B + λC)⁻¹

anchor="base", the paper's: d = (z − h_L) / (n − i), z and h_L from the unedited weights W0, measured once;
k at each layer with the layers below already holding their new weights. Targets then do not depend on earlier
edits and are optimised ahead, in batches.

anchor="current": z and h_L from the current weights; the residual r = (z − h_L) / (n − i) is measured again
before each layer and put back on the base, d = r + (W − W0) k. W0 + A (B + λC)⁻¹ is then the recursive
least-squares step W + r kᵀ (B + λC)⁻¹, and the method is MEMIT with cached keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from d4s.closed_form import ClosedForm
from d4s.edits import Edit
from d4s.keys import SubjectRows
from d4s.methods.base import Step, Workbench
from d4s.methods.locate import Ahead, LocateEditor, LocateMethod, TargetMethod, step_of


@dataclass(frozen=True, kw_only=True)
class D4S(LocateMethod):
    name: ClassVar[str] = "d4s"
    paper: ClassVar[str] = "arXiv 2410.23843"
    changes: ClassVar[str] = "MLP output projections"
    needs: ClassVar[tuple[str, ...]] = ("covariance",)

    anchor: Literal["base", "current"] = "base"

    def editor(self, bench: Workbench) -> D4SEditor:
        return D4SEditor(self, bench, self.anchor)


class D4SEditor(LocateEditor):
    def __init__(
        self, method: TargetMethod, bench: Workbench, anchor: Literal["base", "current"] = "current"
    ) -> None:
        super().__init__(method, bench)
        self.anchor = anchor
        self._priors = self.priors()
        self.ahead = Ahead(self)
        self.reset()

    def reset(self) -> None:
        self.closed_form = ClosedForm(
            self._priors,
            self.anatomy.shape(self.last)[0],
            transposed=self.anatomy.transposed(self.last),
            seed=self.bench.seed,
        )

    def announce(self, edits: Sequence[Edit]) -> None:
        self.ahead.announce(edits)

    def apply(self, batch: Sequence[Edit]) -> Step:
        base = self.anchor == "base"
        targets, lowest = self.ahead.take(batch) if base else (self.targets(batch), None)
        rows, bare = self.rows(batch), self.bare_rows(batch)
        layers = self.weights.layers
        used: dict[int, Tensor] = {}
        for i, layer in enumerate(layers):
            share = len(layers) - i  # n − i
            keys = lowest if i == 0 and lowest is not None else self.keys(rows, layer)
            used[layer] = keys
            if base:
                residuals = targets.delta.double() / share
            else:
                residuals = (targets.target.double() - self.state(bare)) / share
                residuals = residuals + keys @ self.closed_form.delta(layer).T
            self.closed_form.add_(residuals, keys, layer)
            self.weights.write_(layer, self.closed_form.delta(layer))
        self.settle(rows, used)
        return step_of(targets)

    def settle(self, rows: SubjectRows, used: Mapping[int, Tensor]) -> None:
        """After the last layer is written; `used` are the keys that went in. Nothing is left to do here."""

    def consolidate(self, edits: Sequence[Edit]) -> None:
        """Takes keys and targets of all given edits again and solves once: one batch edit from W0.

        edits: all that this editor has made. Old keys at upper layers were taken on weights that have since
        changed below them; after this none is stale.
        """
        self.restore()
        self.announce(edits)
        self.edit(edits)

    def state_dict(self) -> dict[str, Tensor]:
        return self.closed_form.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.closed_form.load_state_dict(state)
        for layer, delta in self.closed_form.deltas().items():
            self.weights.write_(layer, delta)
