"""The closed form over the experts of a layer as ONE linear map, exact: W = [W_1 … W_E] of K = [g_1 k_1; …; g_E k_E].

With rows K [n, E · d_in] of which only the routed experts' parts are not zero, a block-diagonal prior and C_j =
E[g_j² k_j k_jᵀ] over the tokens that are routed to expert j (arXiv 2605.16686),

    Y_j = K_j (λC_j)⁻¹        S = D + Σ_j Y_j K_jᵀ        Δ_j = Rᵀ S⁻¹ Y_j

where D holds +1 for a row that was put in and −1 for one that was taken out again. The keys of one token couple its
experts, so B = Kᵀ D K is not block-diagonal, and (λC + B)⁻¹ would be (E · d_in)². Kept is therefore the n × n side: S =
L D Lᵀ, grown by the new rows alone. With T = L⁻¹ R and U_j = L⁻¹ Y_j,

    X = L⁻¹ Y K'ᵀ        L' L'ᵀ = D' (D' + Y' K'ᵀ − Xᵀ D X)
    T' = L'⁻¹ (R' − Xᵀ D T)        U'_j = L'⁻¹ (Y'_j − Xᵀ D L⁻¹ Y_j)        Δ_j += T'ᵀ D' U'_j

where a prime says "of the new rows". Nothing is dropped or rounded away: Δ is the solution of the joint problem, an
expert that no key was routed to has none, and its weights keep their bits.

Since S has the products of all rows with one another, any of them can be left out again without their keys
(`JointRows.selected`).

A layer holds, for n rows: n² of L, n · d_out of T, and of each row d_in for each expert that it is routed to (of all
its contexts); beside them Δ_j, d_out · d_in, and λC_j with its factor, d_in² twice, of each expert that was touched. A
single edit costs O(n² + n · d_in · experts) and d_out · d_in for each touched expert.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor

from d4s.change.closed_form import ClosedForm, Prior, Rows, check_rows, cholesky, solve
from d4s.errors import CovarianceError, D4SError

logger = logging.getLogger(__name__)

THIN = 2  # tokens an input dimension, below which an expert's C_j is not taken as it is
THIN_RIDGE = 0.1  # what it then gets at least, relative to mean(diag C_j)

# Δ of a layer: of one matrix, or of each expert that was touched.
Delta = Tensor | dict[int, Tensor]


class ExpertPriors:
    """λC_j of the experts of one layer, each made when it is first needed and kept.

    moments: Σ g_j² k_j k_jᵀ over the tokens routed to j, [experts, d_in, d_in]
    routed: how many these are, [experts]
    weight, ridge: λ and the ridge, as in `Prior`
    device: of every sum and solve, in float64

    An expert that saw fewer than `THIN` tokens a dimension gets a ridge of `THIN_RIDGE` · mean(diag C_j) at least; one
    that saw none the identity times what mean(diag C_j) is on the average. How many these are is logged.
    Raises CovarianceError where no expert saw a token.
    """

    def __init__(
        self,
        moments: Tensor,
        routed: Tensor,
        weight: float = 1.0,
        ridge: float = 0.0,
        device: torch.device | str | None = None,
    ) -> None:
        self.moments, self.routed, self.weight, self.ridge = moments, routed.tolist(), weight, ridge
        self.experts, self.d_in = moments.shape[0], moments.shape[1]
        self.device = moments.device if device is None else torch.device(device)
        scales = [
            float(moments[j].diagonal().double().mean()) / count
            for j, count in enumerate(self.routed)
            if count
        ]
        if not scales:
            raise CovarianceError("no expert of the layer saw a token; estimate the statistics on more text")
        self._scale = sum(scales) / len(scales)
        self._made: dict[int, Prior] = {}
        if thin := self.thin:
            logger.info(
                "%d of %d experts saw fewer than %d tokens: ridge of %g · mean(diag C) for them",
                len(thin),
                self.experts,
                THIN * self.d_in,
                max(ridge, THIN_RIDGE),
            )

    @property
    def thin(self) -> tuple[int, ...]:
        """Experts that saw too few tokens for a C_j of their own."""
        return tuple(j for j, count in enumerate(self.routed) if count < THIN * self.d_in)

    @property
    def nbytes(self) -> int:
        return self.moments.nbytes + sum(prior.nbytes for prior in self._made.values())

    def of(self, expert: int) -> Prior:
        """λC_j."""
        if expert not in self._made:
            count = self.routed[expert]
            if not count:
                c = torch.eye(self.d_in, dtype=torch.float64, device=self.device) * self._scale
                prior = Prior(c, self.weight)
            else:
                c = self.moments[expert].to(self.device).double() / count
                thin = count < THIN * self.d_in
                prior = Prior(c, self.weight, max(self.ridge, THIN_RIDGE) if thin else self.ridge)
            self._made[expert] = prior
        return self._made[expert]

    def rows(self, rows: Tensor) -> Tensor:
        """A copy of `rows` in float64 on the priors' device."""
        return rows.detach().to(self.device, torch.float64, copy=True).contiguous()

    def split(self, keys: Tensor) -> dict[int, Tensor]:
        """Joint keys [n, experts · d_in] by the experts that any of them is routed to: [n, d_in] each."""
        blocks = keys.view(len(keys), self.experts, self.d_in)
        hit = (blocks != 0).any(2).any(0).nonzero().squeeze(1).tolist()
        return {j: blocks[:, j].contiguous() for j in hit}

    def solve(self, columns: Tensor) -> Tensor:
        """(λC)⁻¹ · columns, block by block. columns: [experts · d_in, n], float64."""
        found = torch.zeros_like(columns)
        for j, keys in self.split(columns.T.contiguous()).items():
            found[j * self.d_in : (j + 1) * self.d_in] = self.of(j).solve(keys.T)
        return found


def solve_jointly(residuals: Tensor, keys: Tensor, prior: Prior | ExpertPriors) -> Delta:
    """Δ of one batch, as `closed_form.solve`; over experts as one map, of each expert that a key is routed to.

    residuals: R, [n, d_out]; keys: K, [n, d_in] or [n, experts · d_in]
    Errors as `closed_form.solve`.
    """
    if isinstance(prior, Prior):
        return solve(residuals, keys, prior)
    layer = ExpertLayer(prior, residuals.shape[-1], "solve")
    layer.add_(residuals, keys, 1.0)
    return layer.delta


class JointRows:
    """The rows of one layer in their n × n form, and the Δ_j that follow from them.

    factor: L, signs: the diagonal of D, steps: T; parts: of each touched expert its rows and their Y_j
    """

    def __init__(self, experts: int, d_in: int, d_out: int, name: str, device: torch.device) -> None:
        self.experts, self.d_in, self.d_out = experts, d_in, d_out
        self.name, self.device = name, device
        nothing = torch.zeros(0, dtype=torch.float64, device=device)
        self.factor, self.signs, self.steps = nothing.view(0, 0), nothing, nothing.view(0, d_out)
        self.parts: dict[int, tuple[Tensor, Tensor]] = {}
        self.delta: dict[int, Tensor] = {}

    def _corner(
        self, residuals: Tensor, inner: Tensor, cross: Tensor, sign: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(L', D X, T') of new rows. inner: D' + Y' K'ᵀ; cross: Y K'ᵀ; NotPositiveDefiniteError if there is no L'."""
        x = torch.linalg.solve_triangular(self.factor, cross, upper=False)
        signed = self.signs.unsqueeze(1) * x  # D X, which is also the transpose of L's new rows
        inner = sign * (inner - x.T @ signed)
        what = f"{self.name}: D + K (λC)⁻¹ Kᵀ" + (" less the rows taken out" if sign < 0 else "")
        corner = cholesky((inner + inner.T) / 2, what)
        steps = torch.linalg.solve_triangular(corner, residuals - signed.T @ self.steps, upper=False)
        return corner, signed, steps

    def _append(self, corner: Tensor, signed: Tensor, steps: Tensor, sign: float) -> None:
        n, m = signed.shape
        factor = corner.new_zeros(n + m, n + m)
        factor[:n, :n], factor[n:, :n], factor[n:, n:] = self.factor, signed.T, corner
        self.factor = factor
        self.signs = torch.cat([self.signs, self.signs.new_full((m,), sign)])
        self.steps = torch.cat([self.steps, steps])

    def _take_part(self, expert: int, rows: Tensor, weighted: Tensor) -> None:
        old = self.parts.get(expert)
        self.parts[expert] = (
            (rows, weighted) if old is None else (torch.cat([old[0], rows]), torch.cat([old[1], weighted]))
        )

    def selected(self, rows: Sequence[tuple[int, float]]) -> JointRows:
        """Some of the rows alone, as if no other had ever been put in: (number, sign) of each, in this order.

        Neither keys nor the prior are needed: S = L D Lᵀ = D + G has the product G = Y Kᵀ of any two rows, and R = L T.
        Raises NotPositiveDefiniteError if more is taken out than is in.
        """
        products = self.factor * self.signs @ self.factor.T - self.signs.diag()
        residuals = self.factor @ self.steps
        found = JointRows(self.experts, self.d_in, self.d_out, self.name, self.device)
        before = torch.zeros(0, dtype=torch.long, device=self.device)
        for sign, run in groupby(rows, key=itemgetter(1)):
            at = torch.tensor([number for number, _ in run], dtype=torch.long, device=self.device)
            inner = products[at][:, at] + sign * torch.eye(len(at), dtype=products.dtype, device=self.device)
            made = found._corner(residuals[at], inner, products[before][:, at], sign)
            found._append(*made, sign)
            for j, (held, weighted) in self.parts.items():
                place, which = (at.unsqueeze(1) == held).nonzero(as_tuple=True)
                if len(place):
                    found._take_part(j, place + len(before), weighted[which])
            before = torch.cat([before, at])
        found.delta = {j: left @ right for j, (left, right) in found.factors().items()}
        return found

    def factors(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Δ_j = (S⁻¹ R)ᵀ Y_j of each touched expert as left [d_out, r] and right [r, d_in], r its rows."""
        solved = torch.linalg.solve_triangular(
            self.factor.T, self.signs.unsqueeze(1) * self.steps, upper=True
        )
        return {j: (solved[rows].T, weighted) for j, (rows, weighted) in self.parts.items()}

    def state(self) -> dict[str, Tensor]:
        """All that the next Δ hangs on; copies."""
        touched = sorted(self.parts)
        count = len(touched)
        d_in, new = self.d_in, self.factor.new_zeros
        rows = [self.parts[j][0] for j in touched]
        return {
            "factor": self.factor.clone(),
            "signs": self.signs.clone(),
            "steps": self.steps.clone(),
            "experts": torch.tensor(
                [[j, len(r)] for j, r in zip(touched, rows, strict=True)], dtype=torch.long, device="cpu"
            ).view(count, 2),
            "rows": torch.cat([torch.zeros(0, dtype=torch.long, device=self.factor.device), *rows]),
            "weighted": torch.cat([new(0, d_in), *(self.parts[j][1] for j in touched)]),
            "delta": torch.cat([new(0, self.d_out, d_in), *(self.delta[j][None] for j in touched)]),
        }

    def check(self, state: Mapping[str, Tensor]) -> None:
        """Raises D4SError for what `state` of such a layer does not give."""
        own = self.state()
        if set(state) != set(own):
            raise D4SError(f"{self.name}: a state of experts holds {sorted(state)}, must hold {sorted(own)}")
        n, groups, d_in = len(state["signs"]), state["experts"], self.d_in
        sound = groups.ndim == 2 and groups.shape[1] == 2 and groups.dtype == torch.long
        sound = sound and bool((groups[:, 1] >= 1).all())
        held = int(groups[:, 1].sum()) if sound else -1
        shapes = {
            "factor": (n, n),
            "signs": (n,),
            "steps": (n, self.d_out),
            "experts": (len(groups), 2),
            "rows": (held,),
            "weighted": (held, d_in),
            "delta": (len(groups), self.d_out, d_in),
        }
        for name, shape in shapes.items():
            found = state[name]
            if (
                tuple(found.shape) != shape
                or found.dtype != own[name].dtype
                or not torch.isfinite(found).all()
            ):
                raise D4SError(
                    f"{self.name}: {name} of a state of experts is {list(found.shape)} {found.dtype}; must be "
                    f"{list(shape)} {own[name].dtype} and finite"
                )
        rows, experts = state["rows"], groups[:, 0]
        if (held and not 0 <= int(rows.min()) <= int(rows.max()) < n) or any(
            not 0 <= j < self.experts for j in experts.tolist()
        ):
            raise D4SError(
                f"{self.name}: a state of experts names rows or experts that it has not; "
                "load one of this model and these layers"
            )

    def take(self, state: Mapping[str, Tensor]) -> None:
        """What `state` gave and `check` has passed."""
        place = self.device
        held = {name: tensor.to(place, copy=True) for name, tensor in state.items()}
        self.factor, self.signs, self.steps = held["factor"], held["signs"], held["steps"]
        groups = state["experts"].tolist()
        lengths = [length for _, length in groups]
        rows, weighted = held["rows"].split(lengths), held["weighted"].split(lengths)
        self.parts = {j: (rows[i], weighted[i]) for i, (j, _) in enumerate(groups)}
        self.delta = {j: held["delta"][i] for i, (j, _) in enumerate(groups)}


class ExpertLayer(JointRows):
    """`JointRows` that grow: by keys, with the prior of each expert."""

    def __init__(self, prior: ExpertPriors, d_out: int, name: str) -> None:
        super().__init__(prior.experts, prior.d_in, d_out, name, prior.device)
        self.prior = prior

    @property
    def nbytes(self) -> int:
        held = [self.factor, self.signs, self.steps, *self.delta.values()]
        held += [tensor for part in self.parts.values() for tensor in part]
        return self.prior.nbytes + sum(tensor.nbytes for tensor in held)

    def add_(self, residuals: Tensor, keys: Tensor, sign: float) -> None:
        """Rows put in (sign +1) or taken out (−1). NotPositiveDefiniteError if more is taken out than was in."""
        prior = self.prior
        check_rows(residuals, keys, self.d_out, self.experts * self.d_in, self.name)
        n, m = len(self.signs), len(keys)
        if m == 0:
            return
        residuals, new = prior.rows(residuals), prior.split(prior.rows(keys))
        weighted = {j: prior.of(j).solve(k.T).T for j, k in new.items()}  # Y'
        inner = sign * torch.eye(m, dtype=torch.float64, device=self.device)
        cross = inner.new_zeros(n, m)  # Y K'ᵀ
        for j, k in new.items():
            inner += weighted[j] @ k.T
            if j in self.parts:
                rows, held = self.parts[j]
                cross[rows] += held @ k.T
        corner, signed, steps = self._corner(residuals, inner, cross, sign)
        mixing = torch.linalg.solve_triangular(self.factor.T, signed, upper=True)  # L⁻ᵀ D X
        for j in sorted({*self.parts, *new}):
            own = weighted[j].clone() if j in new else inner.new_zeros(m, self.d_in)
            if j in self.parts:
                rows, held = self.parts[j]
                own -= mixing[rows].T @ held
            own = torch.linalg.solve_triangular(corner, own, upper=False)  # U'
            change = sign * (steps.T @ own)
            self.delta[j] = self.delta[j] + change if j in self.delta else change
        self._append(corner, signed, steps, sign)
        for j, k in new.items():
            here = (k != 0).any(1).nonzero().squeeze(1)
            self._take_part(j, here + n, weighted[j][here])

    def image(self, keys: Tensor) -> Tensor:
        """Σ_j Δ_j of the keys, [n, d_out], on their device."""
        rows = self.prior.rows(keys)
        found = rows.new_zeros(len(rows), self.d_out)
        for j, k in self.prior.split(rows).items():
            if j in self.delta:
                found += k @ self.delta[j].T
        return found.to(keys.device)


def bytes_of_experts(d_out: int, d_in: int, experts: int, routed: int, rows: int) -> dict[str, int]:
    """What `ExpertLayer` holds of so many rows, at most; its parts add up to `nbytes`.

    routed: experts that one row is routed to, those of all its contexts
    """
    routed = min(experts, routed)
    touched = min(experts, rows * routed)
    return {
        "statistics": 4 * experts * d_in**2 + 8 * 2 * touched * d_in**2,
        "sums": 8 * (rows**2 + rows + rows * d_out + rows * routed * (d_in + 1)),
        "change": 8 * touched * d_out * d_in,
    }


class JointForm:
    """`ClosedForm` for layers some of which have experts; the dense ones are a `ClosedForm`.

    priors: layer → Prior, or ExpertPriors
    d_out, transposed, seed: as in `ClosedForm`
    dense, of_experts: what holds the layers of either kind
    """

    def __init__(
        self,
        priors: Mapping[int, Prior | ExpertPriors],
        d_out: int,
        *,
        transposed: bool = False,
        seed: int = 0,
    ) -> None:
        self.layers = tuple(priors)
        self.dense = ClosedForm(
            {layer: prior for layer, prior in priors.items() if isinstance(prior, Prior)},
            d_out,
            transposed=transposed,
            seed=seed,
        )
        self.of_experts = {
            layer: ExpertLayer(prior, d_out, f"layer {layer}")
            for layer, prior in priors.items()
            if isinstance(prior, ExpertPriors)
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held, priors included."""
        return self.dense.nbytes + sum(layer.nbytes for layer in self.of_experts.values())

    @property
    def growing(self) -> frozenset[str]:
        """Parts of the state whose size grows with the rows."""
        return frozenset(
            f"{layer}.{name}" for layer, held in self.of_experts.items() for name in held.state()
        )

    def put_(self, rows: Rows) -> None:
        """The rows into their layer, or out of it, by their sign. Errors as `ClosedForm.add_`."""
        if rows.layer in self.of_experts:
            self.of_experts[rows.layer].add_(rows.residuals, rows.keys, rows.sign)
        else:
            self.dense.put_(rows)

    def image(self, keys: Tensor, layer: int) -> Tensor:
        """Δ of the keys, [n, d_out]."""
        if layer in self.of_experts:
            return self.of_experts[layer].image(keys)
        return self.dense.image(keys, layer)

    def delta(self, layer: int) -> Delta:
        """Δ relative to W0: of one matrix, or of each expert that was touched. Overwritten by the next rows."""
        return self.of_experts[layer].delta if layer in self.of_experts else self.dense.delta(layer)

    def deltas(self) -> dict[int, Delta]:
        """`delta` of every layer."""
        return {layer: self.delta(layer) for layer in self.layers}

    def state_dict(self) -> dict[str, Tensor]:
        """'{layer}.{name}': of dense layers the sums, of experts `ExpertLayer.state`."""
        return self.dense.state_dict() | self._states()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes what `state_dict` gave in place of what is held. D4SError if names or shapes differ."""
        dense, experts = self._divided(state)
        self.dense.load_state_dict(dense)
        self._take(experts)

    def snapshot(self) -> dict[str, Tensor]:
        """All that the next Δ hangs on; `resume_` takes it."""
        return self.dense.snapshot() | self._states()

    def resume_(self, state: Mapping[str, Tensor]) -> None:
        """Takes what `snapshot` gave in place of what is held. D4SError, before that, if it does not fit."""
        dense, experts = self._divided(state)
        self.dense.resume_(dense)
        self._take(experts)

    def _states(self) -> dict[str, Tensor]:
        return {
            f"{layer}.{name}": tensor
            for layer, held in self.of_experts.items()
            for name, tensor in held.state().items()
        }

    def _divided(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]:
        """The dense layers' part of a state, and that of each layer of experts, which is checked."""
        dense: dict[str, Tensor] = {}
        experts: dict[int, dict[str, Tensor]] = {layer: {} for layer in self.of_experts}
        for name, tensor in state.items():
            layer, _, part = name.partition(".")
            if layer.isdecimal() and int(layer) in experts:
                experts[int(layer)][part] = tensor
            else:
                dense[name] = tensor
        for number, held in self.of_experts.items():
            held.check(experts[number])
        return dense, experts

    def _take(self, experts: Mapping[int, Mapping[str, Tensor]]) -> None:
        for layer, held in self.of_experts.items():
            held.take(experts[layer])


def closed_form_over(
    priors: Mapping[int, Prior | ExpertPriors], d_out: int, *, transposed: bool = False, seed: int = 0
) -> ClosedForm | JointForm:
    """The closed form of these layers: `ClosedForm` itself where each is one matrix."""
    dense = {layer: prior for layer, prior in priors.items() if isinstance(prior, Prior)}
    if len(dense) == len(priors):
        return ClosedForm(dense, d_out, transposed=transposed, seed=seed)
    return JointForm(priors, d_out, transposed=transposed, seed=seed)
