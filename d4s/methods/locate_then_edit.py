"""Plumbing of the locate-then-edit family: contexts, keys, targets and the prior, each made in one place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, overload

import torch
from torch import Tensor, nn

from d4s.change.closed_form import Prior, bytes_of_layer
from d4s.change.expert_form import Delta, ExpertPriors, bytes_of_experts
from d4s.change.projection import Projection
from d4s.configuration import Above, AtLeast, AtMost, Length
from d4s.edits import Edit
from d4s.errors import ConfigError, ModelError
from d4s.locate import norm_anchor
from d4s.locate.ascent import Ascent
from d4s.locate.covariance import Covariance
from d4s.locate.kept_targets import KeptTargets, target_identity
from d4s.locate.keys import SubjectRows, keys_and_output_at, keys_at, output_at, subject_rows
from d4s.locate.request_rows import Place
from d4s.locate.targets import TargetConfig, Targets, check_lengths, optimise_targets
from d4s.methods.base import Editor, Holding, LayerSize, Method, Step, Workbench
from d4s.methods.published import spread_preset
from d4s.methods.sums_place import device_of_sums, on_host
from d4s.models.architectures import Anatomy
from d4s.models.prompts import CONTEXT_SEEDS

EDITS_AHEAD = 64  # requests optimised together when targets do not depend on earlier edits
PROBES = 16  # edits whose keys choose λ; a key costs about a sixtieth of a target's search
ARRIVES = 0.9  # share of a probe's residual that is to arrive over all edited layers
ANCHORS = 64  # edits whose targets say how long a target is by nature


@dataclass(frozen=True, kw_only=True)
class TargetMethod(Method):
    """Fields shared by methods that search a target and solve for the weights."""

    # Where δ is added in the last edited layer, and targets are measured: the first of these.
    places: ClassVar[tuple[Place, ...]] = ("block",)
    sums_move: ClassVar[bool] = True

    layers: Annotated[tuple[int, ...], "whose W is changed; targets are those of the last"]
    target: TargetConfig = field(default_factory=TargetConfig)
    contexts: Annotated[
        int,
        "generated contexts a seed word (five words), of each length; 0: the bare prompt alone",
        AtLeast(0),
    ] = 1
    context_lengths: Annotated[tuple[int, ...], "tokens of a context, its seed word included", AtLeast(1)] = (
        10,
    )
    target_norm: Annotated[
        Literal["found", "anchor"],
        "of what a target asks of the MLP: as it was found, or m for every edit (Norm-Anchor Scaling)",
    ] = "found"
    anchor_norm: Annotated[
        float | None, "m; None: the first edits' mean, on the unedited model", Above(0)
    ] = None
    delta_projection: Annotated[
        tuple[float, ...] | None,
        "α and β of SPHERE: along W0's main directions, which hold the share β, 1 − α of a change is written",
        Length(2, "α and β"),
        AtLeast(0),
        AtMost(1),
    ] = None

    def prefixes(self, bench: Workbench) -> tuple[str, ...]:
        """The generated contexts."""
        return tuple(p for length in self.context_lengths for p in bench.contexts(self.contexts, length))

    @property
    def rows_an_edit(self) -> int:
        """Of the bare prompt and behind each context."""
        return 1 + len(CONTEXT_SEEDS) * self.contexts * len(self.context_lengths)

    def places_in(self, anatomy: Anatomy) -> tuple[Place, ...]:
        """`places`; the MLP's output, where what follows it makes a residual of the stream none of W."""
        return (
            ("mlp",) if anatomy.architecture.normed_mlp_output and self.places == ("block",) else self.places
        )

    def check_experts(self, anatomy: Anatomy, layers: Sequence[int]) -> None:
        super().check_experts(anatomy, layers)
        plain = {
            "delta_projection": self.delta_projection is not None,
            "target_norm": self.target_norm == "anchor",
        }
        for name in (name for name, is_set in plain.items() if is_set):
            self.refuse_experts(name, anatomy, layers)

    @staticmethod
    def refuse_experts(name: str, anatomy: Anatomy, layers: Sequence[int]) -> None:
        """ConfigError for a layer with experts. name: of the field that is not for these"""
        for layer in layers:
            if (experts := anatomy.experts(layer)) is not None:
                raise ConfigError(
                    f"{name} is of layers with one MLP, and {experts.name} is a mixture of {experts.count} "
                    "experts; leave it out"
                )

    @property
    def lacks_norm(self) -> bool:
        """Whether m is wanted, and left to the first edits."""
        return self.target_norm == "anchor" and self.anchor_norm is None

    def settled(self, bench: Workbench, edits: Sequence[Edit]) -> Method:
        """m, where it is wanted and None: the mean norm of what the first edits' targets ask of the MLP.

        The release takes it over 1,000 requests of CounterFact, searched on the bare prompts. Here they are the first
        `ANCHORS` edits, as they are searched for the edit itself: where that is on the unedited model and they are
        kept, nothing is searched twice.
        """
        if not self.lacks_norm:
            return self
        anatomy, last, first = bench.anatomy, self.layers[-1], list(edits[:ANCHORS])
        anatomy.check_layers(self.layers)
        self.check_experts(anatomy, self.layers)
        prefixes, places = self.prefixes(bench), self.places_in(anatomy)

        def search(some: Sequence[Edit]) -> Targets:
            return optimise_targets(
                anatomy,
                bench.tokenizer,
                some,
                prefixes,
                last,
                self.target,
                places=places,
                progress=bench.progress,
            )

        kept = bench.targets if self.searches_ahead else None
        if kept is not None:
            kept.check(target_identity(anatomy, bench.tokenizer, prefixes, last, places, self.target))
        targets = searched(kept, first, search, anatomy.device_of(last))
        outputs = mlp_outputs(anatomy, bench.tokenizer, first, targets, last, places)
        norm = norm_anchor.mean_norm(norm_anchor.norms(targets, outputs))
        if not math.isfinite(norm):
            raise ModelError(
                f"{self.name}: the unedited model gives NaN or infinity for the first edits' targets; check its weights"
            )
        return replace(self, anchor_norm=norm)


@dataclass(frozen=True, kw_only=True)
class LocateMethod(TargetMethod):
    """And with the prior λC."""

    strength: ClassVar[str] = "prior_weight"

    prior_weight: Annotated[
        float | None, "λ, the weight of the prior C; None: by the share of an edit that arrives", Above(0)
    ] = 15_000.0
    ridge: Annotated[
        float,
        "added to C, relative to mean(diag C), where a small corpus leaves C nearly singular",
        AtLeast(0),
    ] = 0.0

    @classmethod
    def preset(cls, anatomy: Anatomy) -> Method:
        return cls(**spread_preset(anatomy))

    def holding(self, size: LayerSize, edits: int) -> Holding:
        """λC and its factor; of experts those that edits touch, and the sums of all."""
        if size.experts == 1:
            return Holding({"statistics": 2 * 8 * size.d_in**2}, size.weight)
        touched = min(size.experts, edits * size.routed)
        priors = 2 * 8 * touched * size.d_in**2
        return Holding({"statistics": priors + size.experts * 4 * size.d_in**2}, size.weight)

    @property
    def measures_again(self) -> bool:
        """Whether a layer's residual is measured behind the layers edited before it."""
        return True

    def weighed(self, weight: float) -> LocateMethod:
        """With λC weighing as much as `weight` does in ΔW = R Kᵀ (λC + …)⁻¹."""
        return replace(self, prior_weight=weight)

    def settled(self, bench: Workbench, edits: Sequence[Edit]) -> Method:
        """λ, where it is None: of the first edits' residuals `ARRIVES` arrives (the median of them)."""
        method = super().settled(bench, edits)
        assert isinstance(method, LocateMethod)
        if self.prior_weight is not None:
            return method
        on_host(bench, self, len(edits))
        squares = self.key_squares(bench, edits)
        return method.weighed(weight_at_which(squares, ARRIVES, self.measures_again))

    def key_squares(self, bench: Workbench, edits: Sequence[Edit]) -> Tensor:
        """q = kᵀ C⁻¹ k of the first edits on the unedited model, layers ascending. [edits, layers] float64

        A single edit with key k moves its layer by the share q / (λ + q) of what is asked.
        """
        anatomy = bench.anatomy
        anatomy.check_layers(self.layers)
        self.check_experts(anatomy, self.layers)
        covariance = bench.covariance(self.layers)
        rows = subject_rows(bench.tokenizer, edits[:PROBES], self.prefixes(bench))
        squares = []
        for layer in self.layers:
            prior = prior_of(covariance, layer, 1.0, self.ridge, device_of_sums(bench, self, layer))
            keys = prior.rows(keys_at(anatomy, rows, layer)).T
            squares.append((keys * prior.solve(keys)).sum(0).cpu())
        return torch.stack(squares, 1)


def holding_of_sums(size: LayerSize, edits: int, rows: int) -> Holding:
    """What `D4SEditor` holds of a layer. rows: of each edit, its contexts counted in"""
    if size.experts == 1:
        parts = bytes_of_layer(size.d_out, size.d_in)
        state = parts["sums"] + parts["change"] + parts["inverse"] + parts["rows"]
        return Holding(parts, state)
    parts = bytes_of_experts(size.d_out, size.d_in, size.experts, size.routed * rows, edits)
    return Holding(parts, parts["sums"] + parts["change"] + size.weight)


def prior_of(
    covariance: Covariance, layer: int, weight: float, ridge: float, device: torch.device
) -> Prior | ExpertPriors:
    """λ (C + ridge · mean(diag C) · I) of a layer; of several experts one each. device: of its sums"""
    if layer in covariance.routed:
        moments, routed = covariance.of_experts(layer)
        if len(routed) > 1:
            return ExpertPriors(moments, routed, weight, ridge, device)
        return Prior(moments[0].double().to(device) / int(routed[0]), weight, ridge)
    return Prior(covariance.mean(layer).to(device), weight, ridge)


def arriving(squares: Tensor, weight: float, measured: bool) -> Tensor:
    """Share of a residual that arrives over n layers, each of which is asked for 1 / (n − i) of it.

    squares: q = kᵀ C⁻¹ k of the layers, ascending, [edits, layers]; weight: λ
    measured: layer i is asked for its part of what the layers below have left; else of the whole
    Returns [edits].
    """
    shares = squares / (weight + squares) / torch.arange(squares.shape[1], 0, -1, dtype=squares.dtype)
    return 1 - (1 - shares).prod(1) if measured else shares.sum(1)


def weight_at_which(squares: Tensor, share: float, measured: bool) -> float:
    """λ at which the median over edits of `arriving` is `share`, to two digits."""
    low, high = 1e-9, 1e9  # times the mean square: what arrives falls with λ
    scale = float(squares.mean())
    for _ in range(60):
        middle = (low * high) ** 0.5
        if float(arriving(squares, middle * scale, measured).median()) > share:
            low = middle
        else:
            high = middle
    return float(f"{low * scale:.2g}")


class LocateEditor(Editor):
    """An editor with keys, targets and a prior.

    Raises ConfigError where targets are to be put on a norm that is not there yet.
    """

    bare_share: float | None = 0.5  # weight of the bare prompt in a key

    def __init__(self, method: TargetMethod, bench: Workbench) -> None:
        if isinstance(method, LocateMethod) and method.prior_weight is None:
            # No edits to choose by: E[kᵀ C⁻¹ k] = d_in, of which half arrives in each of several layers.
            d_in = bench.anatomy.shape(method.layers[-1])[1]
            method = method.weighed(d_in if len(method.layers) > 1 else d_in / 10)
        on_host(bench, method)  # before the copy of W0 takes of what is free
        super().__init__(method, bench, method.layers)
        self.prefixes = method.prefixes(bench)
        self.places = method.places_in(self.anatomy)
        self._ascent: Ascent | None = None
        if method.lacks_norm:
            raise ConfigError(
                f"{method.name}: target_norm is 'anchor' and anchor_norm None; an editor needs the norm itself, which "
                "method.settled(bench, edits) takes from the first edits"
            )
        self.projections: dict[int, Projection] = {}
        if method.delta_projection is not None:
            strength, share = method.delta_projection
            for layer, base in self.weights.base.items():
                weight = base.T if self.anatomy.transposed(layer) else base
                self.projections[layer] = Projection(weight, strength, share)

    @property
    def last(self) -> int:
        return self.weights.layers[-1]

    def sums_device(self, layer: int) -> torch.device:
        """Where the prior of a layer, and what is solved with it, is."""
        return device_of_sums(self.bench, self.method, layer)

    def second_moments(self) -> dict[int, Tensor]:
        """C of every edited layer, where its sums are, float64."""
        covariance, place = self.bench.covariance(self.weights.layers), self.sums_device
        return {layer: covariance.mean(layer).to(place(layer)) for layer in self.weights.layers}

    def plain_priors(self, weight: float) -> dict[int, Prior]:
        """λ (C + ridge · mean(diag C) · I) of every edited layer, none of which has experts. weight: λ"""
        return {layer: Prior(c, weight, self.method.ridge) for layer, c in self.second_moments().items()}

    def priors(self) -> Mapping[int, Prior | ExpertPriors]:
        """`prior_of` every edited layer."""
        method, covariance = self.method, self.bench.covariance(self.weights.layers)
        return {
            layer: prior_of(covariance, layer, method.prior_weight, method.ridge, self.sums_device(layer))
            for layer in self.weights.layers
        }

    @contextmanager
    def ascending(self) -> Iterator[Iterable[int]]:
        """The edited layers, for a step that writes each before it asks for the next: inside, keys and states are read
        by passes that begin at the layer."""
        self._ascent = Ascent(self.anatomy)
        try:
            yield self._ascent.through(self.weights.layers)
        finally:
            self._ascent = None

    def rows(self, edits: Sequence[Edit]) -> SubjectRows:
        return subject_rows(self.tokenizer, edits, self.prefixes, bare_share=self.bare_share)

    def bare_rows(self, edits: Sequence[Edit]) -> SubjectRows:
        return subject_rows(self.tokenizer, edits)

    def keys(self, rows: SubjectRows, layer: int) -> Tensor:
        """[edits, d_in] float64, with the layers below as they are now."""
        return keys_at(self.anatomy, rows, layer, self._ascent).double()

    def state(self, rows: SubjectRows) -> Tensor:
        """What targets are measured against: h after the last edited layer (or its MLP output). [edits, d_model]"""
        return output_at(self.anatomy, rows, self._measured, self._ascent).double()

    def keys_and_state(self, rows: SubjectRows, layer: int) -> tuple[Tensor, Tensor]:
        """`keys` and `state` of every row by itself. [edits · rows, d_in] and [edits · rows, d_model] float64"""
        keys, state = keys_and_output_at(self.anatomy, rows, layer, self._measured, self._ascent)
        return keys.double(), state.double()

    @property
    def _measured(self) -> nn.Module:
        block = self.places[0] == "block"
        return self.anatomy.blocks[self.last] if block else self.anatomy.projection(self.last)

    def unedited(self, edits: Sequence[Edit]) -> Tensor:
        """What a step needs of the unedited weights, which the model holds now, beside targets: here the keys of the
        lowest edited layer, whose input no edit changes. [edits, …] float64"""
        return self.keys(self.rows(edits), self.weights.layers[0])

    def search(
        self, edits: Sequence[Edit], config: TargetConfig | None = None, begin: Tensor | None = None
    ) -> Targets:
        """Targets on the model's current weights, as they are found.

        config: None: the method's; begin: z of other weights to begin from [edits, d_model]; None: v0
        """
        return optimise_targets(
            self.anatomy,
            self.tokenizer,
            edits,
            self.prefixes,
            self.last,
            config or self.method.target,
            places=self.places,
            begin=begin,
            progress=self.bench.progress,
        )

    def check_lengths(self, edits: Sequence[Edit]) -> None:
        """Raises ModelError for an edit that is too long to be searched."""
        check_lengths(self.anatomy, self.tokenizer, edits, self.prefixes, self.method.target)

    def normed(self, edits: Sequence[Edit], targets: Targets) -> Targets:
        """As the method wants what was found, on the weights that it was found on, which the model has to hold."""
        if self.method.target_norm == "found":
            return targets
        outputs = mlp_outputs(self.anatomy, self.tokenizer, edits, targets, self.last, self.places)
        return norm_anchor.anchored(targets, outputs, self.method.anchor_norm)

    def targets(self, edits: Sequence[Edit]) -> Targets:
        """Targets on the model's current weights."""
        return self.normed(edits, self.search(edits))

    @overload
    def projected(self, layer: int, change: Tensor) -> Tensor: ...

    @overload
    def projected(self, layer: int, change: Delta) -> Delta: ...

    def projected(self, layer: int, change: Delta) -> Delta:
        """What of a change is written: [d_out, d_in], or of each expert. It is projected where W is."""
        if layer not in self.projections or not isinstance(change, Tensor):
            return change
        return self.projections[layer](change.to(self.anatomy.device_of(layer)))


class Ahead:
    """What does not depend on earlier edits, taken in batches on the unedited weights: the targets, and what else the
    editor needs of them (`LocateEditor.unedited`). Targets that the workbench keeps are not searched again.

    Made while the model is unedited; raises DataError where kept targets were found for something else.
    """

    def __init__(self, editor: LocateEditor) -> None:
        self.editor = editor
        self._coming: list[Edit] = []
        self._at: dict[str, int] = {}  # place among those announced, by id
        self._ready: dict[str, tuple[Edit, Targets, Tensor]] = {}
        if (kept := editor.bench.targets) is not None:
            kept.check(
                target_identity(
                    editor.anatomy,
                    editor.tokenizer,
                    editor.prefixes,
                    editor.last,
                    editor.places,
                    editor.method.target,
                )
            )

    def announce(self, edits: Sequence[Edit]) -> None:
        self._coming, self._ready = list(edits), {}
        self._at = {edit.id: place for place, edit in enumerate(edits)}

    def take(self, batch: Sequence[Edit]) -> tuple[Targets, Tensor]:
        """Targets of the batch, and its `LocateEditor.unedited`.

        Announced edits are done `EDITS_AHEAD` together, always the same ones: a sequence that goes on after an
        interruption groups them, and so rounds, as one that was never interrupted.
        """
        ready = {edit.id: self._ready[edit.id] for edit in batch if self._is_ready(edit)}
        if len(ready) < len(batch):
            self._ready = ready
            for window in self._windows([edit for edit in batch if edit.id not in ready]):
                with self.editor.weights.at_base():
                    targets = self.targets(window)
                    more = self.editor.unedited(window)
                self._ready |= {
                    edit.id: (edit, targets[i : i + 1], more[i : i + 1]) for i, edit in enumerate(window)
                }
        found = [self._ready[edit.id] for edit in batch]
        return Targets.concatenate([t for _, t, _ in found]), torch.cat([m for _, _, m in found])

    def _is_ready(self, edit: Edit) -> bool:
        return edit.id in self._ready and self._ready[edit.id][0] == edit

    def _windows(self, edits: Sequence[Edit]) -> list[list[Edit]]:
        """What is done together so that these edits are: their windows among those announced, and the others."""
        begins: dict[int, None] = {}
        others: list[Edit] = []
        for edit in edits:
            place = self._at.get(edit.id)
            if place is None or self._coming[place] != edit:
                others.append(edit)
            else:
                begins[place - place % EDITS_AHEAD] = None
        windows = [self._coming[begin : begin + EDITS_AHEAD] for begin in begins]
        return [*windows, others] if others else windows

    def targets(self, edits: Sequence[Edit]) -> Targets:
        """Those kept, and those of other edits searched on the unedited weights, which the model has to hold now.

        Kept is what was found; what the method makes of it comes after.
        """
        editor = self.editor
        place = editor.anatomy.device_of(editor.last)
        found = searched(editor.bench.targets, edits, editor.search, place)
        return editor.normed(edits, found)


def searched(
    kept: KeptTargets | None,
    edits: Sequence[Edit],
    search: Callable[[Sequence[Edit]], Targets],
    device: torch.device,
) -> Targets:
    """Those kept, and those of other edits, which `search` finds and which are kept from then on."""
    if kept is None:
        return search(edits)
    if new := kept.lacking(edits):
        kept.add(new, search(new))
    return kept.take(edits, device)


def mlp_outputs(
    anatomy: Anatomy,
    tokenizer: Any,
    edits: Sequence[Edit],
    targets: Targets,
    layer: int,
    places: tuple[Place, ...],
) -> Tensor:
    """v0: what the MLP puts out at the subject's last token of the bare prompt. [edits, d_model]

    Where targets are those of the MLP's output it is what they start from.
    """
    if places[0] == "mlp":
        return targets.start
    return output_at(anatomy, subject_rows(tokenizer, edits), anatomy.projection(layer))


def step_of(targets: Targets) -> Step:
    return Step(tuple(targets.first_probability.tolist()), tuple(targets.last_probability.tolist()))
