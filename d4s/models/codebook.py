"""A codebook around one layer: where the layer's input is near a key, it puts out that key's value.

The entries are (key k, value v, radius ε, label), the label an answer's token ids. For an input h, i its nearest key:

    layer(h) = v_i  if ‖h − k_i‖ ≤ ε_i        else the layer's own

A new key at distance d from the nearest one, whose radius is ε, takes its place so (GRACE, arXiv 2211.11031):

    d > ε_init + ε          a new entry with radius ε_init
    else, label differs     a new entry with radius d/2, and the near one's becomes d/2 − 1e-5
    else                    the near entry, whose radius grows to d if d > ε

Nothing here knows how a value is found: that is `d4s.methods.grace`. A codebook is a part of the edited model, is
saved beside its weights, and comes back with it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from d4s.configuration import Configuration
from d4s.errors import ConfigError, D4SError, ModelError
from d4s.files import whole
from d4s.models.architectures import Anatomy
from d4s.models.causal_lm import CausalLM

CODEBOOK_FILE = "grace_codebook.safetensors"
MARGIN = 1e-5  # between two radii that meet
ROUNDING = 1e-3  # relative: an input on the border of a radius is inside in every batch


class Codebook:
    """Entries in the order they were made. A label is the target's token ids.

    keys [n, d_in], values [n, d_out], radii [n]: float32
    """

    def __init__(self, d_in: int, d_out: int, epsilon: float, device: torch.device) -> None:
        self.epsilon = epsilon
        self.keys = torch.zeros(0, d_in, dtype=torch.float32, device=device)
        self.values = torch.zeros(0, d_out, dtype=torch.float32, device=device)
        self.radii = torch.zeros(0, dtype=torch.float32, device=device)
        self.labels: list[tuple[int, ...]] = []

    def nearest(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """(distance, entry) of the nearest key. inputs: [n, d_in]."""
        # The matrix-product form would lose small distances between large keys to cancellation.
        far = torch.cdist(inputs.float(), self.keys, compute_mode="donot_use_mm_for_euclid_dist")
        distance, entry = far.min(1)
        return distance, entry

    def answer(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """`outputs`, with the value of the nearest key where an input is within its radius. [..., d] both."""
        if not self.labels:
            return outputs
        distance, entry = self.nearest(inputs.reshape(-1, inputs.shape[-1]))
        inside = distance <= self.radii[entry] * (1 + ROUNDING)
        values = self.values[entry].to(outputs.dtype)
        return torch.where(inside.unsqueeze(1), values, outputs.reshape(values.shape)).view(outputs.shape)

    def place(self, key: Tensor, label: tuple[int, ...], value: Tensor) -> int:
        """Makes room for a key by the rules above; the entry whose value it is to have.

        key: [d_in]; value: [d_out], a new entry's to begin with. Two keys within the margin are one question:
        the later label wins.
        """
        if self.labels:
            distances, entries = self.nearest(key.unsqueeze(0))
            d, near = float(distances), int(entries)
            if d <= self.epsilon + float(self.radii[near]):
                if self.labels[near] == label:
                    self.radii[near] = max(d, float(self.radii[near]))
                    return near
                if d / 2 - MARGIN <= 0:
                    self.labels[near] = label
                    self.values[near] = value
                    return near
                self.radii[near] = d / 2 - MARGIN
                return self._append(key, label, value, d / 2)
        return self._append(key, label, value, self.epsilon)

    def _append(self, key: Tensor, label: tuple[int, ...], value: Tensor, radius: float) -> int:
        self.keys = torch.cat([self.keys, key.float().unsqueeze(0)])
        self.values = torch.cat([self.values, value.float().unsqueeze(0)])
        self.radii = torch.cat([self.radii, self.radii.new_tensor([radius])])
        self.labels.append(label)
        return len(self.labels) - 1

    def state_dict(self) -> dict[str, Tensor]:
        """Labels are rows of ids, filled up with −1."""
        width = max((len(label) for label in self.labels), default=0)
        labels = torch.full((len(self.labels), width), -1, dtype=torch.long)
        for row, label in zip(labels, self.labels, strict=True):
            row[: len(label)] = torch.as_tensor(label)
        copies = {name: getattr(self, name).clone() for name in ("keys", "values", "radii")}
        return copies | {"labels": labels}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises ModelError, before anything is changed, where the state is not one of a codebook of this place."""
        if set(state) != set(own := self.state_dict()):
            raise ModelError(f"the state of a grace codebook holds {sorted(own)}; this one {sorted(state)}")
        labels = state["labels"]
        if labels.ndim != 2 or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ModelError(
                f"codebook: labels are {list(labels.shape)} {labels.dtype}, must be [entries, tokens], whole numbers"
            )
        for name in ("keys", "values", "radii"):
            mine, found = getattr(self, name), state[name]
            if not found.is_floating_point() or not torch.isfinite(found).all():
                raise ModelError(f"codebook: {name} are {found.dtype}, must be finite numbers with a point")
            if found.ndim != mine.ndim or found.shape[1:] != mine.shape[1:] or len(found) != len(labels):
                raise ModelError(
                    f"codebook: {name} is {list(found.shape)}, must be {['entries', *mine.shape[1:]]}; "
                    "it belongs to another model or layer"
                )
        for name in ("keys", "values", "radii"):
            setattr(self, name, state[name].to(getattr(self, name)).clone())
        self.labels = [tuple(t for t in row if t >= 0) for row in labels.tolist()]


@dataclass(frozen=True, kw_only=True)
class Wrapping(Configuration):
    """Where a codebook stands, and the radius of its new entries.

    Raises ConfigError where a field is of another type or out of range.
    """

    name: ClassVar[str] = "grace"

    layers: tuple[int, ...]  # the one that is wrapped
    module: Literal["mlp_input", "mlp_output"]  # which projection of its MLP
    epsilon: float  # ε_init

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.layers) != 1:
            raise ConfigError(f"layers={list(self.layers)}: must be one layer, which grace wraps")
        if self.epsilon <= 0:
            raise ConfigError(f"grace needs epsilon > 0; got epsilon={self.epsilon}")


class WrappedLayer:
    """A projection of a model's MLP with a codebook, empty at first, around it.

    While it is attached, `model.save_pretrained(folder)` also writes grace_codebook.safetensors: the weights alone
    would be the unedited model's. `load_codebook`, and with it `load_model`, brings it back.
    config: of the method that makes the entries, its `Wrapping` among it; it is stored with them
    """

    def __init__(self, anatomy: Anatomy, wrapping: Wrapping, config: Mapping[str, Any]) -> None:
        self.anatomy, self.wrapping, self.config = anatomy, wrapping, dict(config)
        (self.layer,) = wrapping.layers
        anatomy.check_layers(wrapping.layers)
        wanted = {"mlp_input": anatomy.mlp_input, "mlp_output": anatomy.projection}
        self.module: Any = wanted[wrapping.module](self.layer)
        self.model: CausalLM = anatomy.model
        self._hook: Any = None
        self.reset()

    def reset(self) -> None:
        """An empty codebook, and the layer unwrapped."""
        self.detach()
        d_out, d_in = self.module.weight.shape
        if self.anatomy.transposed(self.layer):
            d_in, d_out = d_out, d_in
        self.codebook = Codebook(d_in, d_out, self.wrapping.epsilon, self.module.weight.device)

    def check_free(self) -> None:
        """ModelError where the model has another codebook."""
        if "save_pretrained" in vars(self.model):
            raise ModelError(
                "another GRACE codebook is attached to this model, and the two could not be saved together; "
                "restore() its editor first"
            )

    def attach(self) -> None:
        """From now on the codebook answers. Raises ModelError where the model has another one."""
        if self._hook is None:
            self.check_free()
            self._hook = self.module.register_forward_hook(
                lambda _module, arguments, output: self.codebook.answer(arguments[0], output)
            )
            vars(self.model)["save_pretrained"] = self.save_pretrained

    def detach(self) -> None:
        """The layer is itself again; the codebook stays as it is."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            del self.model.save_pretrained  # the instance's; the class's own shows again

    def save_pretrained(self, folder: str | os.PathLike[str], *arguments: Any, **options: Any) -> None:
        """The model's own `save_pretrained`, and the codebook beside it."""
        type(self.model).save_pretrained(self.model, folder, *arguments, **options)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.codebook.state_dict().items()}
        with whole(Path(folder) / CODEBOOK_FILE) as beside:
            save_file(tensors, beside, metadata={"config": json.dumps(self.config)})

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes the entries of a codebook of the same place, and answers by them where there are any."""
        self.codebook.load_state_dict(state)
        if self.codebook.labels:
            self.attach()


# What the stored configuration holds beside its `Wrapping`: how values are searched, which no longer matters.
_SEARCH = frozenset({"learning_rate", "steps", "stop_loss"})


def load_codebook(model: CausalLM, folder: str | os.PathLike[str]) -> WrappedLayer:
    """Attaches to a model, loaded from `folder`, the codebook that its `save_pretrained` has written there.

    Raises ModelError if the file is not such a codebook, or another model's.
    """
    path = Path(folder) / CODEBOOK_FILE
    try:
        with safe_open(path, framework="pt") as file:
            config: dict[str, Any] = json.loads((file.metadata() or {})["config"])
        state = load_file(path)
        place = {name: value for name, value in config.items() if name not in _SEARCH}
        wrapping = Wrapping(**{**place, "layers": tuple(config["layers"])})
    # Of another kind of file, or with content of another kind: ConfigError is a ValueError.
    except (
        AttributeError,
        KeyError,
        OSError,
        RecursionError,
        SafetensorError,
        TypeError,
        ValueError,
    ) as error:
        raise ModelError(
            f"{path}: not a codebook that GRACE's save_pretrained wrote ({error!r}); save it again"
        ) from None
    try:
        anatomy = Anatomy(model)
        anatomy.check_placement()
        wrapped = WrappedLayer(anatomy, wrapping, config)
        wrapped.load_state_dict(state)
    except D4SError as error:
        raise ModelError(f"{path}: {error}") from None
    return wrapped
