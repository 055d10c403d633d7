"""The change of a weight in closed form, Δ = A (λC + B)⁻¹ with A = Σ r kᵀ and B = Σ k kᵀ, at O(d²) an edit.

The sums A and B are all that an edit leaves behind, so memory does not grow with the number of edits, the
order of edits does not matter, runs add up and an edit can be taken out again. Sources: arXiv 2210.07229,
eq. 14 (MEMIT); arXiv 2410.23843 (Dump for Sequence).

For single edits the inverse P = (λC + B)⁻¹ and Δ are kept. With n new keys K [n, d_in], residuals
R [n, d_out], G = P Kᵀ and S = I + K G, the Woodbury identity gives

    P' = P − G S⁻¹ Gᵀ          Δ' = Δ + (Rᵀ − Δ Kᵀ) S⁻¹ Gᵀ

and with −S⁻¹ for S⁻¹ and S = I − K G the terms are taken out. With S = L Lᵀ and U = L⁻¹ Gᵀ, G S⁻¹ Gᵀ = Uᵀ U:
the rows of U are gathered and subtracted from P as one matrix product, and so are those of K and R added to
B and A.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from d4s import ops
from d4s.errors import ConfigError, CovarianceError, D4SError, NotPositiveDefiniteError
from d4s.ops.float32 import whole_products

logger = logging.getLogger(__name__)

DELAYED_ROWS = 64  # rows of U, K and R gathered before they go into P, B and A
PROBE_BOUND = {torch.float64: 1e-9, torch.float32: 1e-4}  # residual of the probe that calls for a refresh
PROBE_GROWTH = 10.0  # and by how much it must exceed that of a fresh inverse, which conditioning decides
# Rows for A and B: residuals; keys; the keys on the right, with signs of their own; a sign of all.
_Term = tuple[Tensor, Tensor, Tensor, float]
GPU_GENERATOR = 16  # bytes of the state of a GPU's generator, of which snapshots on GPUs once were


class Prior:
    """λC of one layer, with its Cholesky factor made when first needed and kept.

    covariance: C = E[k kᵀ], [d_in, d_in], symmetric
    weight: λ > 0
    ridge: adds ridge · mean(diag C) to the diagonal of C, for a C from too few key vectors; logged
    dtype: of every sum and solve with this prior, float64 | float32
    Raises CovarianceError if C is not square or not finite, ConfigError for a bad λ, ridge or dtype.
    """

    def __init__(
        self, covariance: Tensor, weight: float = 1.0, ridge: float = 0.0, dtype: torch.dtype = torch.float64
    ) -> None:
        if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
            raise CovarianceError(f"the covariance is {list(covariance.shape)}, must be [d_in, d_in]")
        if not torch.isfinite(covariance).all():
            raise CovarianceError(
                "the covariance holds NaN or infinity; estimate it again on the unedited model"
            )
        if not weight > 0 or not ridge >= 0:
            raise ConfigError(f"prior weight is {weight} and ridge {ridge}; must be > 0 and ≥ 0")
        if dtype not in PROBE_BOUND:
            raise ConfigError(f"dtype of a prior is {dtype}; must be torch.float64 or torch.float32")
        self.matrix = covariance.to(dtype) * weight
        if ridge:
            extra = ridge * self.matrix.diagonal().mean()
            self.matrix.diagonal().add_(extra)
            logger.info("ridge of %g · mean(diag C) = %.3g added to λC", ridge, extra.item())
        self._factor: Tensor | None = None

    @classmethod
    def identity(
        cls,
        d_in: int,
        weight: float = 1.0,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> Prior:
        """λI, whose factor costs nothing."""
        prior = cls(torch.eye(d_in, dtype=dtype, device=device), weight, dtype=dtype)
        prior._factor = prior.matrix.sqrt()
        return prior

    @property
    def d_in(self) -> int:
        return self.matrix.shape[0]

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes + (0 if self._factor is None else self._factor.nbytes)

    def solve(self, columns: Tensor) -> Tensor:
        """(λC)⁻¹ · columns. columns: [d_in, n], of the prior's dtype and device.

        Raises NotPositiveDefiniteError if λC has no Cholesky factor.
        """
        if self._factor is None:
            self._factor = cholesky(self.matrix, "the prior λC")
        return torch.cholesky_solve(columns, self._factor)

    def rows(self, rows: Tensor) -> Tensor:
        """A copy of `rows` in the dtype and on the device of the prior."""
        return rows.detach().to(self.matrix, copy=True).contiguous()


def solve(residuals: Tensor, keys: Tensor, prior: Prior) -> Tensor:
    """Δ = Rᵀ K (λC + Kᵀ K)⁻¹ of one batch; neither A nor an inverse is kept.

    residuals: R, [n, d_out]; keys: K, [n, d_in]; any floating types
    Returns [d_out, d_in] in the prior's dtype.

    For few keys this is Rᵀ (I + K Y)⁻¹ Yᵀ with Y = (λC)⁻¹ Kᵀ and the prior's kept factor; from the number on
    where that takes more operations, one Cholesky solve of d_in × d_in.
    Raises NotPositiveDefiniteError if there is no Cholesky factor; D4SError if shapes do not fit.
    """
    check_rows(residuals, keys, residuals.shape[-1], prior.d_in, "solve")
    residuals, keys = prior.rows(residuals), prior.rows(keys)
    n, d_in, d_out = len(keys), prior.d_in, residuals.shape[1]
    small = 2 * n * d_in**2 + 2 * n**2 * d_in + n**3 / 3
    large = d_in**3 / 3 + n * d_in**2 + 2 * d_out * d_in**2
    if small <= large:
        weighted = prior.solve(keys.T)
        inner = torch.eye(n, dtype=keys.dtype, device=keys.device) + keys @ weighted
        return residuals.T @ torch.cholesky_solve(weighted.T, cholesky(inner, "I + K (λC)⁻¹ Kᵀ"))
    return ops.closed_form((residuals.T @ keys)[None], (keys.T @ keys)[None], prior.matrix[None])[0]


@dataclass(frozen=True)
class Rows:
    """Rows that a step puts into the sums of one layer.

    sign: +1: A += Rᵀ K, B += Kᵀ K; −1: they are taken out
    edits: of each row, the place of its edit within the step
    residuals: R, [n, d_out]; keys: K, [n, d_in]
    """

    layer: int
    sign: float
    edits: tuple[int, ...]
    residuals: Tensor
    keys: Tensor

    def of(self, edits: Collection[int]) -> Rows:
        """Those of some of the step's edits. edits: their places within it"""
        own = [i for i, edit in enumerate(self.edits) if edit in edits]
        return Rows(
            self.layer, self.sign, tuple(self.edits[i] for i in own), self.residuals[own], self.keys[own]
        )

    def negated(self) -> Rows:
        """The same rows, taken out where they were put in, and the reverse."""
        return replace(self, sign=-self.sign)


class ClosedForm:
    """The sums A and B of a run with their prior λC, for each edited layer, and the Δ that follows from them.

    priors: layer → Prior; sums live in its dtype on its device
    d_out: rows of Δ
    transposed: Δ lies in memory as GPT-2's Conv1D keeps its weight, [d_in, d_out], so that the write-back reads
        both in order; its shape is [d_out, d_in] all the same
    seed: of the random probes that watch the kept inverse

    Whatever the number of edits, a layer holds λC, B, A, Δ and, once Δ is asked for again after a few edits,
    P = (λC + B)⁻¹ and `DELAYED_ROWS` rows. Which way Δ is had:
    - the first time, and whenever as many keys are new as `keys_worth_a_solve` says: a Cholesky solve;
    - else by updating P and Δ, in O(d_in (d_in + d_out)) a key, the same for the last edit as for the first.
    Every `DELAYED_ROWS` keys a random vector probes P and Δ against the sums; when rounding has grown too
    large (`PROBE_BOUND`, `PROBE_GROWTH`), both are made afresh from the sums.
    """

    def __init__(
        self, priors: Mapping[int, Prior], d_out: int, *, transposed: bool = False, seed: int = 0
    ) -> None:
        self.d_out = d_out
        self._layers = {
            layer: _Layer(prior, d_out, transposed, name=f"layer {layer}", seed=seed)
            for layer, prior in priors.items()
        }

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self._layers)

    @property
    def priors(self) -> dict[int, Prior]:
        return {layer: state.prior for layer, state in self._layers.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held, priors included."""
        return sum(state.nbytes for state in self._layers.values())

    @property
    def refreshes(self) -> int:
        """How often a probe has called for a fresh inverse, over all layers."""
        return sum(state.refreshes for state in self._layers.values())

    def add_(self, residuals: Tensor, keys: Tensor, layer: int) -> None:
        """A += Rᵀ K, B += Kᵀ K.

        residuals: R, [n, d_out]; keys: K, [n, d_in]; any floating types
        Raises D4SError if the layer is not one of this run, or the rows do not fit or are not finite.
        """
        self._state(layer).add_(residuals, keys, 1.0)

    def subtract_(self, residuals: Tensor, keys: Tensor, layer: int) -> None:
        """A −= Rᵀ K, B −= Kᵀ K: takes out edits that were added with these same rows.

        Errors as `add_`; the next `delta` raises NotPositiveDefiniteError if more was taken out than was in.
        """
        self._state(layer).add_(residuals, keys, -1.0)

    def put_(self, rows: Rows) -> None:
        """`add_` or `subtract_`, by the rows' sign."""
        (self.add_ if rows.sign > 0 else self.subtract_)(rows.residuals, rows.keys, rows.layer)

    def delta(self, layer: int) -> Tensor:
        """Δ = A (λC + B)⁻¹, [d_out, d_in], relative to W0.

        This is the kept tensor, overwritten by the next call for this layer: clone it to keep it.
        Raises NotPositiveDefiniteError if λC + B has no Cholesky factor.
        """
        return self._state(layer).current_delta()

    def image(self, keys: Tensor, layer: int) -> Tensor:
        """Δ of the keys, [n, d_out], on their device; equal to `keys @ delta(layer).T`."""
        delta = self.delta(layer)
        with whole_products(delta.dtype, delta.device):
            return (keys.to(delta.device) @ delta.T).to(keys.device)

    def settle_(self, bound: float = 1e-11) -> None:
        """Makes P and Δ afresh where a probe finds them further than `bound` from the sums.

        Taking out rows that were much of a sum costs digits; a sequence's own probes, every `DELAYED_ROWS` rows, would
        find that later.
        """
        for state in self._layers.values():
            state.settle(bound)

    def deltas(self) -> dict[int, Tensor]:
        """`delta` of every layer."""
        return {layer: self.delta(layer) for layer in self._layers}

    def merge_(self, other: ClosedForm) -> None:
        """Adds the sums of another run from the same W0 with the same priors.

        Raises D4SError if layers, shapes or priors differ.
        """
        if self.layers != other.layers or self.d_out != other.d_out:
            raise D4SError(
                f"runs over layers {list(self.layers)} with d_out {self.d_out} and layers "
                f"{list(other.layers)} with d_out {other.d_out} do not add up; "
                "name runs of one model and one configuration"
            )
        for layer, state in self._layers.items():
            theirs = other._layers[layer]
            if state.prior is not theirs.prior and not torch.equal(state.prior.matrix, theirs.prior.matrix):
                raise CovarianceError(
                    f"layer {layer}: the two runs have different priors λC, so their sums do not add up; "
                    "give both the same λ and C"
                )
        for layer, state in self._layers.items():
            mine, theirs_sums = state.sums(), other._layers[layer].sums()
            state.set_sums(*(a + b for a, b in zip(mine, theirs_sums, strict=True)))

    def state_dict(self) -> dict[str, Tensor]:
        """'{layer}.residual_sum' A [d_out, d_in], '{layer}.key_sum' B [d_in, d_in] of every layer; copies."""
        state = {}
        for layer, sums in self._layers.items():
            state[f"{layer}.residual_sum"], state[f"{layer}.key_sum"] = sums.sums()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes the sums of `state_dict` in place of those held. D4SError if names or shapes differ."""
        wanted = {name for layer in self._layers for name in (f"{layer}.residual_sum", f"{layer}.key_sum")}
        if set(state) != wanted:
            raise D4SError(f"closed-form state holds {sorted(state)}; must hold {sorted(wanted)}")
        for layer, sums in self._layers.items():
            residual_sum, key_sum = state[f"{layer}.residual_sum"], state[f"{layer}.key_sum"]
            for name, found, shape in [
                ("residual_sum", residual_sum, (self.d_out, sums.prior.d_in)),
                ("key_sum", key_sum, (sums.prior.d_in, sums.prior.d_in)),
            ]:
                if tuple(found.shape) != shape or not torch.isfinite(found).all():
                    raise D4SError(f"{layer}.{name} is {list(found.shape)}; must be {list(shape)} and finite")
            sums.set_sums(sums.prior.rows(residual_sum), sums.prior.rows(key_sum))

    def snapshot(self) -> dict[str, Tensor]:
        """All that the next Δ hangs on, rounding and probes included; '{layer}.{name}', copies.

        A run that goes on from `resume_` gives the bits that this one would. `state_dict`, a third to a half as large,
        gives the same sums, from which Δ is solved for anew.
        """
        return {
            f"{layer}.{name}": tensor
            for layer, state in self._layers.items()
            for name, tensor in state.snapshot().items()
        }

    def resume_(self, state: Mapping[str, Tensor]) -> None:
        """Takes what `snapshot` gave in place of what is held. D4SError, before that, if it does not fit."""
        parts: dict[int, dict[str, Tensor]] = {layer: {} for layer in self._layers}
        for name, tensor in state.items():
            layer, _, part = name.partition(".")
            if not layer.isdecimal() or int(layer) not in parts:
                raise D4SError(
                    f"closed-form snapshot holds {name!r}; this run edits layers {list(self.layers)}"
                )
            parts[int(layer)][part] = tensor
        for number, held in self._layers.items():
            held.check_snapshot(parts[number])
        for number, held in self._layers.items():
            held.resume_(parts[number])

    def _state(self, layer: int) -> _Layer:
        if layer not in self._layers:
            raise D4SError(f"layer {layer} has no sums; this run edits layers {list(self.layers)}")
        return self._layers[layer]


def bytes_of_layer(d_out: int, d_in: int, dtype: torch.dtype = torch.float64) -> dict[str, int]:
    """What one layer of a `ClosedForm` holds once Δ is updated edit by edit, whatever the number of edits; its parts
    add up to `ClosedForm.nbytes`, but for rows that wait for a solve.

    statistics: λC; sums: A and B; change: Δ; inverse: P; rows: the buffers
    """
    size = dtype.itemsize
    return {
        "statistics": size * d_in**2,
        "sums": size * (d_out * d_in + d_in**2),
        "change": size * d_out * d_in,
        "inverse": size * d_in**2,
        "rows": size * DELAYED_ROWS * (2 * d_in + d_out + 1),
    }


def keys_worth_a_solve(d_out: int, d_in: int) -> int:
    """New keys from which a Cholesky solve takes fewer operations than updating P and Δ.

    Update: 4 d_in (d_in + d_out) a key, for G, UᵀU, Δ Kᵀ and the product into Δ. Solve: d_in³ / 3 for the
    factor and 2 d_out d_in² for Δ.
    """
    return max(1, round((d_in**3 / 3 + 2 * d_out * d_in**2) / (4 * d_in * (d_in + d_out))))


def _in_whole_products(method: Callable[..., Any]) -> Callable[..., Any]:
    """Of a method of `_Layer`: its products are not reduced."""

    @wraps(method)
    def wrapped(self: _Layer, *args: Any, **kwargs: Any) -> Any:
        with whole_products(self.key_sum.dtype, self.key_sum.device):
            return method(self, *args, **kwargs)

    return wrapped


class _Layer:
    """Sums, kept inverse and Δ of one layer.

    Rows pass through two places: `waiting`, from when they were added until Δ is asked for; then, P and Δ
    being updated by them, the buffers, until all buffers go into A, B and P in one product each.
    """

    def __init__(self, prior: Prior, d_out: int, transposed: bool, name: str, seed: int) -> None:
        self.prior, self.transposed, self.name = prior, transposed, name
        zeros = prior.matrix.new_zeros
        self.residual_sum = zeros(d_out, prior.d_in)  # A
        self.key_sum = zeros(prior.d_in, prior.d_in)  # B
        self.delta: Tensor | None = self._laid_out(zeros(d_out, prior.d_in))  # None: to be solved for
        self.inverse: Tensor | None = None  # P, still without the rows in the buffers
        self.fresh_residual = 0.0
        self.solved = False
        self.half_way = False  # rows are in A and B in part, and nothing tells which
        self.refreshes = 0
        self.waiting: list[tuple[Tensor, Tensor, float]] = []
        self.many = keys_worth_a_solve(d_out, prior.d_in)
        self.rows = 0  # in the buffers
        self.key_rows = zeros(DELAYED_ROWS, prior.d_in)
        self.residual_rows = zeros(DELAYED_ROWS, d_out)
        self.factor_rows = zeros(DELAYED_ROWS, prior.d_in)  # U
        self.signs = zeros(DELAYED_ROWS, 1)  # +1 added, −1 taken out
        # On the CPU wherever the sums are: what one place has begun another can go on with.
        self.generator = torch.Generator("cpu").manual_seed(seed)

    @property
    def nbytes(self) -> int:
        held = [self.residual_sum, self.key_sum, self.delta, self.inverse]
        held += [self.key_rows, self.residual_rows, self.factor_rows, self.signs]
        held += [rows for residuals, keys, _ in self.waiting for rows in (residuals, keys)]
        return self.prior.nbytes + sum(tensor.nbytes for tensor in held if tensor is not None)

    @_in_whole_products
    def add_(self, residuals: Tensor, keys: Tensor, sign: float) -> None:
        check_rows(residuals, keys, self.residual_sum.shape[0], self.prior.d_in, self.name)
        if len(keys) == 0:
            return
        self.waiting.append((self.prior.rows(residuals), self.prior.rows(keys), sign))
        if sum(len(k) for _, k, _ in self.waiting) >= self.many:
            self._fold()  # Δ will come from a solve; until then the rows need not be held

    @_in_whole_products
    def sums(self) -> tuple[Tensor, Tensor]:
        """A and B with every row added so far; copies."""
        self._check_sums()
        sums = self.residual_sum.clone(), self.key_sum.clone()
        _add(*sums, [self._buffered(), *self._joined_waiting()])
        return sums

    def set_sums(self, residual_sum: Tensor, key_sum: Tensor) -> None:
        self.residual_sum, self.key_sum = residual_sum, key_sum
        self.delta = self.inverse = None
        self.waiting.clear()
        self.rows, self.half_way = 0, False

    def snapshot(self) -> dict[str, Tensor]:
        self._check_sums()
        state = {"residual_sum": self.residual_sum, "key_sum": self.key_sum}
        state |= {name: t for name in ("delta", "inverse") if (t := getattr(self, name)) is not None}
        buffers = ("key_rows", "residual_rows", "factor_rows", "signs")
        state |= {name: getattr(self, name)[: self.rows] for name in buffers}
        if self.waiting:
            residuals, keys, signs = zip(*self.waiting, strict=True)
            state |= {"waiting_residuals": torch.cat(residuals), "waiting_keys": torch.cat(keys)}
            state["waiting_signs"] = torch.tensor(
                [[sign, len(rows)] for sign, rows in zip(signs, keys, strict=True)],
                dtype=torch.float64,
                device="cpu",
            )
        state["counts"] = torch.tensor(
            [self.fresh_residual, float(self.solved), float(self.refreshes)],
            dtype=torch.float64,
            device="cpu",
        )
        state["generator"] = self.generator.get_state()
        return {name: tensor.contiguous().clone() for name, tensor in state.items()}

    def check_snapshot(self, state: Mapping[str, Tensor]) -> None:
        d_out, d_in = self.residual_sum.shape
        rows = len(state["signs"]) if "signs" in state and state["signs"].ndim == 2 else 0
        waiting = "waiting_signs" in state
        shapes: dict[str, tuple[int, ...]] = {
            "residual_sum": (d_out, d_in),
            "key_sum": (d_in, d_in),
            "key_rows": (rows, d_in),
            "residual_rows": (rows, d_out),
            "factor_rows": (rows, d_in),
            "signs": (rows, 1),
            "counts": (3,),
            "generator": tuple(self.generator.get_state().shape),
        }
        if "generator" in state and state["generator"].shape == (GPU_GENERATOR,):
            shapes["generator"] = (GPU_GENERATOR,)
        shapes |= {
            name: shape
            for name, shape in (("delta", (d_out, d_in)), ("inverse", (d_in, d_in)))
            if name in state
        }
        if waiting:
            groups = state["waiting_signs"]
            sound = (
                groups.ndim == 2
                and groups.shape[1] == 2
                and torch.isfinite(groups).all()
                and (groups[:, 1] >= 1).all()
            )
            held = int(groups[:, 1].sum()) if sound else -1
            shapes |= {"waiting_residuals": (held, d_out), "waiting_keys": (held, d_in)}
            shapes["waiting_signs"] = tuple(groups.shape) if sound else (-1,)
        if set(state) != set(shapes) or rows > DELAYED_ROWS:
            raise D4SError(
                f"{self.name}: a closed-form snapshot holds {sorted(state)}, must hold {sorted(shapes)}"
            )
        for name, shape in shapes.items():
            found = state[name]
            wanted = torch.uint8 if name == "generator" else self.residual_sum.dtype
            if name in ("counts", "waiting_signs"):
                wanted = torch.float64
            if tuple(found.shape) != shape or found.dtype != wanted or not torch.isfinite(found).all():
                raise D4SError(
                    f"{self.name}: {name} of a closed-form snapshot is {list(found.shape)} {found.dtype}; must be "
                    f"{list(shape)} {wanted} and finite"
                )

    def resume_(self, state: Mapping[str, Tensor]) -> None:
        place, self.half_way = self.residual_sum.device, False
        self.residual_sum = state["residual_sum"].to(place, copy=True)
        self.key_sum = state["key_sum"].to(place, copy=True)
        self.delta = self._laid_out(state["delta"].to(place, copy=True)) if "delta" in state else None
        self.inverse = state["inverse"].to(place, copy=True) if "inverse" in state else None
        self.rows = len(state["signs"])
        for name in ("key_rows", "residual_rows", "factor_rows", "signs"):
            getattr(self, name)[: self.rows] = state[name].to(place)
        self.waiting = []
        if "waiting_signs" in state:
            lengths = [int(length) for length in state["waiting_signs"][:, 1]]
            for sign, residuals, keys in zip(
                state["waiting_signs"][:, 0].tolist(),
                state["waiting_residuals"].to(place).split(lengths),
                state["waiting_keys"].to(place).split(lengths),
                strict=True,
            ):
                self.waiting.append((residuals, keys, sign))
        self.fresh_residual = float(state["counts"][0])
        self.solved, self.refreshes = bool(state["counts"][1]), int(state["counts"][2])
        if len(state["generator"]) != GPU_GENERATOR:  # else the probes, of which no Δ is made, begin anew
            self.generator.set_state(state["generator"].cpu())

    def _check_sums(self) -> None:
        if self.half_way:
            raise D4SError(
                f"{self.name}: rows went into its sums by half when something failed before; resume_ a snapshot, load "
                "a state, or begin anew"
            )

    @_in_whole_products
    def current_delta(self) -> Tensor:
        self._check_sums()
        if self.delta is None or (self.waiting and not self.solved):
            self._fold()
            self._solve()
        elif self.waiting and self.inverse is None:
            self._fold()
            self._refresh()
        elif self.waiting:
            todo = [
                (r, k, sign)
                for residuals, keys, _, sign in self._joined_waiting()
                for r, k in zip(residuals.split(DELAYED_ROWS), keys.split(DELAYED_ROWS), strict=True)
            ]
            for done, rows in enumerate(todo):
                try:
                    self._update(*rows)
                except BaseException:
                    self.waiting = todo[done:]  # what is not in yet goes in: the sums stay right
                    self._fold()
                    raise
            self.waiting.clear()
        assert self.delta is not None
        return self.delta

    @_in_whole_products
    def settle(self, bound: float) -> None:
        self.current_delta()
        if self.inverse is not None:
            self._flush()
            if not self._probe() <= bound:
                self._refresh()

    def _laid_out(self, delta: Tensor) -> Tensor:
        return delta.T.contiguous().T if self.transposed else delta.contiguous()

    def _solve(self) -> None:
        """Δ from A and B, without P."""
        arguments = (self.residual_sum, self.key_sum, self.prior.matrix)
        try:
            self.delta = self._laid_out(ops.closed_form(*(a[None] for a in arguments))[0])
        except NotPositiveDefiniteError:
            raise NotPositiveDefiniteError(_no_factor(f"{self.name}: λC + B", self.prior.d_in)) from None
        self.solved = True

    def _refresh(self) -> None:
        """P and Δ from A and B."""
        factor = cholesky(self.prior.matrix + self.key_sum, f"{self.name}: λC + B")
        self.delta = self._laid_out(torch.cholesky_solve(self.residual_sum.T, factor).T)
        self.inverse = torch.cholesky_inverse(factor).contiguous()  # how it lies decides how it is rounded
        self.fresh_residual = self._probe()

    def _update(self, residuals: Tensor, keys: Tensor, sign: float) -> None:
        """P and Δ with at most DELAYED_ROWS rows added (sign 1) or taken out (−1)."""
        assert self.inverse is not None and self.delta is not None
        n = len(keys)
        if self.rows + n > DELAYED_ROWS:
            self._flush()
        held = self.factor_rows[: self.rows]
        weighted = keys @ self.inverse - (keys @ held.T * self.signs[: self.rows].T) @ held  # Gᵀ
        inner = torch.eye(n, dtype=keys.dtype, device=keys.device) + sign * (weighted @ keys.T)
        # Only taking out can fail. Elsewhere asking would wait for the device at every edit.
        if sign < 0:
            factor = cholesky(inner, f"{self.name}: λC + B less the rows taken out")
        else:
            factor = torch.linalg.cholesky_ex(inner)[0]
        rows = torch.linalg.solve_triangular(factor, weighted, upper=False)  # U
        error = residuals - keys @ self.delta.T
        steps = torch.linalg.solve_triangular(factor, error, upper=False)
        self.delta.addmm_(steps.T, rows, alpha=sign)

        here = slice(self.rows, self.rows + n)
        self.key_rows[here], self.residual_rows[here], self.factor_rows[here] = keys, residuals, rows
        self.signs[here] = sign
        self.rows += n

    def _flush(self) -> None:
        """The buffers into A, B and P; then a look at how well P and Δ still agree with the sums."""
        assert self.inverse is not None
        rows = self.factor_rows[: self.rows]
        signed = (rows * self.signs[: self.rows]).T
        self._take_in(waiting=False)
        try:
            self.inverse.addmm_(signed, rows, alpha=-1.0)
        except BaseException:
            self.delta = self.inverse = None  # the next Δ is solved for
            raise
        residual = self._probe()
        bound = max(PROBE_BOUND[self.inverse.dtype], PROBE_GROWTH * self.fresh_residual)
        if not residual <= bound:  # NaN too
            logger.info("%s: probe residual %.2g > %.2g, P is made afresh", self.name, residual, bound)
            self.refreshes += 1
            self._refresh()

    def _probe(self) -> float:
        """The larger of ‖(λC + B) P v − v‖ / ‖v‖ and ‖Δ (λC + B) P v − A P v‖ / ‖A P v‖ for one random v."""
        assert self.inverse is not None and self.delta is not None
        v = torch.randn(self.prior.d_in, dtype=self.inverse.dtype, device="cpu", generator=self.generator)
        v = v.to(self.inverse.device)
        solved = self.inverse @ v
        back = self.prior.matrix @ solved + self.key_sum @ solved
        image = self.residual_sum @ solved
        of_inverse = (back - v).norm() / v.norm()
        of_delta = (self.delta @ back - image).norm() / image.norm().clamp_min(torch.finfo(v.dtype).tiny)
        return torch.maximum(of_inverse, of_delta).item()

    def _fold(self) -> None:
        """Every row into A and B. P and Δ, which would be left behind, are dropped: the next Δ is solved for."""
        self.delta = self.inverse = None
        self._take_in(waiting=True)

    def _take_in(self, *, waiting: bool) -> None:
        """Rows of the buffers, and those that wait, into A and B, and out of where they were.

        What of them asks for memory is made before, so that a row is in one place or the other.
        """
        self._check_sums()
        terms = [self._buffered(), *(self._joined_waiting() if waiting else ())]
        self.rows = 0
        if waiting:
            self.waiting = []
        self.half_way = True
        _add(self.residual_sum, self.key_sum, terms)
        self.half_way = False

    def _buffered(self) -> _Term:
        keys = self.key_rows[: self.rows]
        return self.residual_rows[: self.rows], keys, keys * self.signs[: self.rows], 1.0

    def _joined_waiting(self) -> Iterator[_Term]:
        """The waiting rows, neighbours of one sign joined: one large product instead of many small ones."""
        for sign, group in groupby(self.waiting, key=itemgetter(2)):
            residuals, parts, _ = zip(*group, strict=True)
            keys = torch.cat(parts)
            yield torch.cat(residuals), keys, keys, sign


def _add(residual_sum: Tensor, key_sum: Tensor, terms: Sequence[_Term]) -> None:
    for residuals, keys, right, sign in terms:
        residual_sum.addmm_(residuals.T, right, alpha=sign)
        key_sum.addmm_(keys.T, right, alpha=sign)


def _no_factor(what: str, size: int) -> str:
    return (
        f"{what} is not positive definite; C needs more key vectors than its size {size}, or a ridge, "
        "and no more may be taken out than was added"
    )


def cholesky(matrix: Tensor, what: str) -> Tensor:
    """Lower Cholesky factor; NotPositiveDefiniteError, naming `what`, if there is none or it holds NaN."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed.item() or not torch.isfinite(factor.diagonal()).all():
        raise NotPositiveDefiniteError(_no_factor(what, len(matrix)))
    return factor


def check_rows(residuals: Tensor, keys: Tensor, d_out: int, d_in: int, where: str) -> None:
    """Raises D4SError unless residuals are [n, d_out] and keys [n, d_in], both finite."""
    if residuals.ndim != 2 or keys.ndim != 2 or len(residuals) != len(keys):
        raise D4SError(
            f"{where}: residuals are {list(residuals.shape)} and keys {list(keys.shape)}; "
            "must be [n, d_out] and [n, d_in]"
        )
    if residuals.shape[1] != d_out or keys.shape[1] != d_in:
        raise D4SError(
            f"{where}: residuals are {list(residuals.shape)} and keys {list(keys.shape)}; "
            f"must be [n, {d_out}] and [n, {d_in}]"
        )
    for name, rows in (("residuals", residuals), ("keys", keys)):
        if not rows.is_floating_point() or not torch.isfinite(rows).all():
            raise D4SError(f"{where}: {name} must be finite floating-point numbers")
