"""What every method shares: its configuration, the workbench it stands at, and the editor that runs it."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from d4s.change.weights import EditedWeights
from d4s.configuration import Configuration, sequence_fields
from d4s.edits import Edit, check_batch
from d4s.errors import ConfigError, D4SError, EditError, shown, unknown_name
from d4s.interrupts import Heard
from d4s.locate.covariance import Covariance, cached_covariance
from d4s.locate.kept_targets import KeptTargets
from d4s.locate.targets import TargetConfig, frozen
from d4s.models.architectures import Anatomy, Architecture, text_config
from d4s.models.causal_lm import CausalLM
from d4s.models.prompts import generate_contexts, prompt_and_target_ids
from d4s.ranks import here

# Where sums and priors live: "auto", beside W where there is room, else on the CPU (d4s/methods/sums_place.py).
SumsOn = Literal["auto", "device", "cpu"]


class Workbench:
    """A model ready to be edited: anatomy, tokenizer, key statistics, and contexts from the unedited model.

    covariance: or their file; None: estimated when a method first needs it, from text the model samples, and cached on
        disk
    targets: those of the unedited model that are there already, or their file; others are added as they are found.
        None: none are kept
    sums_on: where sums and priors live, the layer's "device" or the "cpu"; "auto": on the device where there is room.
        Nothing but rounding hangs on it
    seed: of everything random.

    Raises ConfigError for a place that sums_on cannot be.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Any,
        *,
        covariance: Covariance | str | os.PathLike[str] | None = None,
        targets: KeptTargets | str | os.PathLike[str] | None = None,
        architecture: Architecture | None = None,
        sums_on: SumsOn = "auto",
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        if sums_on not in get_args(SumsOn):
            raise ConfigError(unknown_name("sums_on", str(sums_on), get_args(SumsOn)))
        if isinstance(covariance, (str, os.PathLike)):
            covariance = Covariance.load(covariance)
        if isinstance(targets, (str, os.PathLike)):
            targets = KeptTargets.load(targets)
        self.sums_on: SumsOn = sums_on
        # What was decided: by method and layers, those whose sums are on the CPU while their W is not.
        self.sums_on_host: dict[tuple[str, tuple[int, ...]], frozenset[int]] = {}
        self.model, self.tokenizer = model, tokenizer
        self.targets: KeptTargets | None = targets
        self.anatomy, self.architecture = Anatomy(model, architecture), architecture
        self.anatomy.check_placement()
        self.seed, self.progress = seed, progress
        self._covariance: Covariance | None = covariance
        self._contexts: dict[tuple[int, int], tuple[str, ...]] = {}

    def contexts(self, per_seed: int, length: int) -> tuple[str, ...]:
        """Generated prefixes. An editor asks at its start, so they come from the unedited model."""
        wanted = (per_seed, length)
        if per_seed == 0:
            return ()
        if wanted not in self._contexts:
            self._contexts[wanted] = here().from_first(
                lambda: generate_contexts(
                    self.model, self.tokenizer, per_seed=per_seed, length=length, seed=self.seed
                )
            )
        return self._contexts[wanted]

    def statistics_digest(self, layers: Sequence[int]) -> str | None:
        """What tells the key statistics that were used from others; None: none were."""
        return None if self._covariance is None else self._covariance.digest(layers)

    def covariance(self, layers: Sequence[int]) -> Covariance:
        """Key statistics of the layers, checked to be this model's. Asked for before the first edit."""
        if self._covariance is None:
            self._covariance = cached_covariance(
                self.model,
                self.tokenizer,
                layers,
                architecture=self.anatomy.architecture,
                seed=self.seed,
                progress=self.progress,
            )
        self._covariance.check(self.anatomy, layers)
        return self._covariance


@dataclass(frozen=True)
class LayerSize:
    """An edited weight, as far as what is kept of it depends on it.

    experts: how many matrices there are; routed: how many of them a token goes to
    itemsize: bytes of one number of W
    """

    d_out: int
    d_in: int
    itemsize: int
    experts: int = 1
    routed: int = 1

    @classmethod
    def of(cls, anatomy: Anatomy, layer: int) -> LayerSize:
        d_out, d_in = anatomy.shape(layer)
        experts, size = anatomy.experts(layer), anatomy.weight(layer).element_size()
        if experts is None:
            return cls(d_out, d_in, size)
        routed = getattr(text_config(anatomy.model), "num_experts_per_tok", None) or 1
        return cls(d_out, d_in, size, experts.count, min(routed, experts.count))

    @property
    def weight(self) -> int:
        """Bytes of W."""
        return self.experts * self.d_out * self.d_in * self.itemsize


@dataclass(frozen=True)
class Holding:
    """What an editor holds of one layer beside W and the copy of W0, in bytes.

    parts: by name, on the layer's device, or that of its sums
    state: of the layer's part in a snapshot
    """

    parts: Mapping[str, int]
    state: int


@dataclass(frozen=True, kw_only=True)
class Method(Configuration, ABC):
    """A method's configuration. What it does while it runs is its `Editor`.

    Class attributes describe it in `d4s methods`.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    changes: ClassVar[str]  # what in the model is changed
    needs: ClassVar[tuple[str, ...]] = ()  # "covariance", "null space"
    # Models of the literature for which nothing of its own is published: their presets follow its rule.
    not_published: ClassVar[tuple[str, ...]] = ()
    # Whether its editor keeps A and B of a dense layer, so that a journal can take single edits back. Of every method
    # `Editor.restore` puts W0 back bit for bit.
    keeps_sums: ClassVar[bool] = False
    # Whether, in the sums, an edit takes the place of an earlier one of the same prompt; else both stay.
    replaces: ClassVar[bool] = False
    # The field by which less is written and less disturbed, or more of both; a method is compared along it.
    strength: ClassVar[str] = ""
    # Named presets: what of the configuration differs from the model's own.
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    edits_experts: ClassVar[bool] = False  # whether its layers may be mixtures of experts
    # Whether its editor makes what `holding` tells where `device_of_sums` says, and not where W is.
    sums_move: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def preset(cls, anatomy: Anatomy) -> Method:
        """The published configuration for this model, else its rule for every other one."""

    @abstractmethod
    def editor(self, bench: Workbench) -> Editor:
        """The running method, on the unedited model."""

    @property
    def searches_ahead(self) -> bool:
        """Whether its targets are those of the unedited model, and can be kept."""
        return False

    def check_experts(self, anatomy: Anatomy, layers: Sequence[int]) -> None:
        """Raises ConfigError if one of the layers has experts, and the method does not edit such ones."""
        if self.edits_experts:
            return
        for layer in layers:
            if (experts := anatomy.experts(layer)) is not None:
                raise ConfigError(
                    f"{experts.name} is a mixture of {experts.count} experts, which {self.name} does not edit; d4s, "
                    "memit and memit-seq do"
                )

    def holding(self, size: LayerSize, edits: int) -> Holding:
        """What its editor holds of a layer after so many edits; here nothing but the weights themselves."""
        return Holding({}, size.weight)

    def crossing(self, size: LayerSize) -> int:
        """Bytes that come to W's device for a write, of experts for each, where sums are on the CPU: Δ in float64."""
        return 8 * size.d_out * size.d_in

    @property
    def keys_an_edit(self) -> int:
        """Rows that an edit puts into the sums of a layer, where there are any."""
        return 1

    def settled(self, bench: Workbench, edits: Sequence[Edit]) -> Method:
        """With what is left open decided, on the unedited model, by the edits that are to be made."""
        return self

    def decided(self, settled: Method) -> dict[str, Any]:
        """The fields that are open here, as `settled` has them."""
        return {name: value for name, value in vars(settled).items() if value != vars(self)[name]}

    def value(self, name: str) -> Any:
        """A field's value, by the name that `changed` takes; None where there is no such field."""
        return getattr(self, name, getattr(getattr(self, "target", None), name, None))

    def changed(self, overrides: Mapping[str, Any]) -> Method:
        """A copy with single fields replaced; fields of the target optimiser go by their own names.

        Raises ConfigError for a field that does not exist, or a value of the wrong type or out of range.
        """
        if not isinstance(overrides, Mapping):
            raise ConfigError(
                f"config is {shown(overrides)}; must be a mapping of fields of {self.name}, as {{'steps': 30}}, or a "
                "whole configuration"
            )
        own, inner = field_names(type(self))
        for name in overrides:
            if name not in own | inner:
                raise ConfigError(unknown_name(f"field of {self.name}", str(name), own | inner))
        direct = {k: v for k, v in overrides.items() if k in own}
        for name in direct.keys() & sequence_fields(type(self)):
            value = [direct[name]] if isinstance(direct[name], int | float | str) else direct[name]
            direct[name] = tuple(value) if isinstance(value, list | range) else value
        if isinstance(direct.get("target"), Mapping):
            for name in direct["target"]:
                if name not in inner:
                    raise ConfigError(unknown_name(f"field of {self.name}'s target", str(name), inner))
            direct["target"] = replace(self.target, **direct["target"])  # type: ignore[attr-defined]
        changed = replace(self, **direct)
        nested = {k: v for k, v in overrides.items() if k in inner}
        if nested:
            changed = replace(changed, target=replace(changed.target, **nested))  # type: ignore[call-arg, attr-defined]
        return changed


def field_names(method: type[Method]) -> tuple[set[str], set[str]]:
    """(a method's own fields that can be given, those of its target optimiser, which are given by their own names)"""
    own = {f.name for f in fields(method) if f.init}
    return own, {f.name for f in fields(TargetConfig)} if "target" in own else set()


@dataclass(frozen=True)
class Step:
    """What one call of `Editor.edit` tells; one entry an edit."""

    # Of the target before its optimisation, in the editor's own loss.
    first_probability: tuple[float, ...] = ()
    last_probability: tuple[float, ...] = ()  # and after: the "bottleneck" (NaN where nothing is optimised)

    def select(self, places: Sequence[int]) -> Step:
        """The entries at these places."""
        first, last = self.first_probability, self.last_probability
        return Step(tuple(first[i] for i in places), tuple(last[i] for i in places))


class Editor(ABC):
    """A method at work on one model. The model is changed in place."""

    weights: EditedWeights
    growing: frozenset[str] = frozenset()  # parts of the state whose size is not fixed

    def __init__(
        self,
        method: Any,
        bench: Workbench,
        layers: Sequence[int],
        modules: Mapping[int, str] | None = None,
    ) -> None:
        """modules: layer → path within its block of the projection that is W there; others: the MLP's output's."""
        self.method, self.bench = method, bench
        self.anatomy, self.tokenizer = bench.anatomy, bench.tokenizer
        self.anatomy.check_layers(tuple(layers))
        method.check_experts(self.anatomy, layers)
        if modules:
            self.anatomy = self.anatomy.at(modules)
        self.weights = EditedWeights(self.anatomy, layers)
        self._torn = False  # a step failed between its start and its end

    def announce(self, edits: Sequence[Edit]) -> None:  # noqa: B027
        """The edits to come, in order. A method may prepare what does not depend on earlier ones."""

    def edit(self, batch: Sequence[Edit]) -> Step:
        """Makes the edits of one step.

        Raises EditError, before anything is changed, if two contradict or a target has no token, or if an earlier
        step failed half-way: its keys and residuals may be in the sums without being in the weights.
        """
        if self._torn:
            raise EditError(
                f"an earlier step of this {self.method.name} editor failed half-way, so what it keeps no longer fits "
                "the weights; restore() it, or load the last stored state into a new editor"
            )
        check_batch(batch)
        for edit in batch:
            if not prompt_and_target_ids(self.tokenizer, edit.text, edit.target(edit.target_new))[1]:
                raise EditError(
                    f"edit {edit.id}: target_new {edit.target_new!r} has no token in this vocabulary; "
                    "write another, or give the tokenizer it"
                )
        self._torn = True
        try:
            with frozen(self.anatomy.model):
                step = self.apply(batch)
        except Heard:  # in the search of a target, before anything has changed
            self._torn = False
            raise
        self._torn = False
        return step

    @property
    def torn(self) -> bool:
        """Whether a step failed half-way, so that what the editor keeps may not be what the weights hold."""
        return self._torn

    def tear(self) -> None:
        """A step was taken back by the caller: `edit` refuses another one, as after a step that failed half-way."""
        self._torn = True

    @abstractmethod
    def apply(self, batch: Sequence[Edit]) -> Step:
        """The method itself, in evaluation mode and with no gradient to weights."""

    def restore(self) -> None:
        """The original weights back, bit for bit; the editor forgets all edits."""
        self.weights.restore_()
        self.reset()
        self._torn = False

    def reset(self) -> None:  # noqa: B027
        """Forgets all edits; the weights are restored by the caller. Here nothing is remembered but them."""

    def state_dict(self) -> dict[str, Tensor]:
        """All that is needed to go on later, as plain tensors."""
        return {f"weight.{layer}": w for layer, w in self.weights.current().items()}

    def snapshot(self) -> dict[str, Tensor]:
        """All that is needed to go on with the same bits; `resume_` takes it. May be larger than `state_dict`."""
        return self.state_dict() | {"norms": self.weights.norms()}

    def resume_(self, state: Mapping[str, Tensor]) -> None:
        """Takes what `snapshot` gave, on the same model with the same configuration.

        Raises D4SError if it does not fit.
        """
        rest = {name: tensor for name, tensor in state.items() if name != "norms"}
        norms = state.get("norms", torch.empty(0))
        if norms.shape != (own := self.weights.norms()).shape:
            raise D4SError(
                f"the norms of a {self.method.name} snapshot are {list(norms.shape)}, must be {list(own.shape)}"
            )
        self.load_state_dict(rest)
        self.weights.set_norms(norms)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from `state_dict`, on the same model with the same configuration.

        Raises D4SError, before anything is changed, if names or shapes are not those of this editor's own state.
        """
        own = self.state_dict()
        if set(state) != set(own):
            raise D4SError(
                f"the state of a {self.method.name} editor holds {sorted(own)}; this one {sorted(state)}"
            )
        for name, tensor in own.items():
            if name not in self.growing and state[name].shape != tensor.shape:
                raise D4SError(
                    f"{name} is {list(state[name].shape)}, must be {list(tensor.shape)}; the state belongs to another "
                    "model or configuration"
                )
        self.take_state(state)
        self._torn = False

    def take_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes a state whose names and shapes are right."""
        self.weights.load_({layer: state[f"weight.{layer}"] for layer in self.weights.layers})


class MasterEditor(Editor):
    """An editor that keeps Δ itself, in float32: steps smaller than the last bit of a half-precision weight
    add up."""

    def __init__(
        self,
        method: Any,
        bench: Workbench,
        layers: Sequence[int],
        modules: Mapping[int, str] | None = None,
    ) -> None:
        super().__init__(method, bench, layers, modules)
        self.reset()

    def reset(self) -> None:
        anatomy = self.anatomy
        self.deltas = {
            layer: torch.zeros(anatomy.shape(layer), dtype=torch.float32, device=anatomy.device_of(layer))
            for layer in self.weights.layers
        }

    def write(self) -> None:
        for layer, delta in self.deltas.items():
            self.weights.write_(layer, delta)

    def state_dict(self) -> dict[str, Tensor]:
        return {f"delta.{layer}": delta.clone() for layer, delta in self.deltas.items()}

    def take_state(self, state: Mapping[str, Tensor]) -> None:
        for layer, delta in self.deltas.items():
            delta.copy_(state[f"delta.{layer}"])
        self.write()


def holding_of_master(size: LayerSize, name: str = "", copies: int = 0) -> Holding:
    """What `MasterEditor` holds of a layer, and under a name so many tensors of Δ's size while it makes a step."""
    delta = 4 * size.experts * size.d_out * size.d_in
    return Holding({"change": delta} | ({name: copies * delta} if name else {}), delta)


def not_optimised(batch: Sequence[Edit]) -> Step:
    """The step of a method that searches no target."""
    nothing = (float("nan"),) * len(batch)
    return Step(nothing, nothing)
