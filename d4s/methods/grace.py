"""GRACE (arXiv 2211.11031): one layer is wrapped with a codebook of (key, value, radius, label); no weight
changes. The key is the layer's input at the prompt's last token. For a new edit at distance d from the
nearest key, whose radius is ε:

    d > ε_init + ε          a new entry with radius ε_init
    else, label differs     a new entry with radius d/2, and the near one's becomes d/2 − 1e-5
    else                    the near entry, whose radius grows to d if d > ε

The value is optimised (Adam) to give the target when it stands in for the layer's output at that token.

Inference asks the same question at every position: is its input within the radius of its nearest key? A
position's input does not depend on what comes after it, so the prompt's last token is answered the same when
it is the newest one, when a target follows it, and in a padded batch; what it is given stays in the KV cache
of the blocks above, and generation goes on from there. Nobody has to tell the layer where a prompt ends.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from d4s.edits import Edit
from d4s.errors import ConfigError, D4SError, ModelError
from d4s.files import whole
from d4s.methods.answers import AnswerRows, answer_losses, answer_rows, probabilities
from d4s.methods.base import Editor, Method, Step, Workbench
from d4s.methods.presets import grace_preset
from d4s.models.architectures import Anatomy
from d4s.models.trace import Trace, replaced_forward

CODEBOOK_FILE = "grace_codebook.safetensors"
MARGIN = 1e-5  # between two radii that meet
ROUNDING = 1e-3  # relative: an input on the border of a radius is inside in every batch


@dataclass(frozen=True, kw_only=True)
class GRACE(Method):
    name: ClassVar[str] = "grace"
    paper: ClassVar[str] = "arXiv 2211.11031"
    changes: ClassVar[str] = "no weight: a codebook around one layer"

    layers: Annotated[tuple[int, ...], "the one that is wrapped"]
    module: Annotated[Literal["mlp_input", "mlp_output"], "which projection of the MLP is wrapped"] = (
        "mlp_output"
    )
    epsilon: Annotated[float, "ε_init, the radius of a new entry"] = 1.0
    learning_rate: Annotated[float, "of Adam, on an entry's value"] = 1.0
    steps: Annotated[int, "of Adam, at most"] = 100
    stop_loss: Annotated[float, "a value is good enough below it"] = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.layers) != 1:
            raise ConfigError(f"layers={list(self.layers)}: grace wraps one layer")
        if self.epsilon <= 0 or self.steps < 1 or self.learning_rate <= 0:
            raise ConfigError(
                f"grace needs epsilon > 0, steps ≥ 1 and learning_rate > 0; got epsilon={self.epsilon}, "
                f"steps={self.steps}, learning_rate={self.learning_rate}"
            )

    @classmethod
    def preset(cls, anatomy: Anatomy) -> GRACE:
        return cls(**grace_preset(anatomy))

    def editor(self, bench: Workbench) -> GRACEEditor:
        return GRACEEditor(self, bench)


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
        """Makes room for an edit by the rules above; the entry whose value it is to have.

        key: [d_in]; value: [d_out], where a new entry starts. Two keys within the margin are one question:
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


class GRACEEditor(Editor):
    """While it is attached, `model.save_pretrained(folder)` also writes grace_codebook.safetensors: the
    weights alone would be the unedited model's. To use it again, load the model and `load_codebook` it.
    """

    growing = frozenset({"keys", "values", "radii", "labels"})

    def __init__(self, method: GRACE, bench: Workbench) -> None:
        super().__init__(method, bench, method.layers)
        (self.layer,) = method.layers
        wanted = {"mlp_input": self.anatomy.mlp_input, "mlp_output": self.anatomy.projection}
        self.module: Any = wanted[method.module](self.layer)
        self.model: Any = self.anatomy.model
        self._hook: Any = None
        self.reset()

    def reset(self) -> None:
        """An empty codebook, and the layer unwrapped."""
        self.detach()
        d_out, d_in = self.module.weight.shape
        if self.anatomy.transposed(self.layer):
            d_in, d_out = d_out, d_in
        self.codebook = Codebook(d_in, d_out, self.method.epsilon, self.anatomy.device)

    def attach(self) -> None:
        if self._hook is None:
            if "save_pretrained" in vars(self.model):
                raise ModelError(
                    "another GRACE codebook is attached to this model, and the two could not be saved together; "
                    "restore() its editor first"
                )
            self._hook = self.module.register_forward_hook(
                lambda _module, arguments, output: self.codebook.answer(arguments[0], output)
            )
            self.model.save_pretrained = self.save_pretrained

    def detach(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            del self.model.save_pretrained  # the instance's; the class's own shows again

    def save_pretrained(self, folder: str | os.PathLike[str], *arguments: Any, **options: Any) -> None:
        """The model's own `save_pretrained`, and the codebook beside it."""
        type(self.model).save_pretrained(self.model, folder, *arguments, **options)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()}
        with whole(Path(folder) / CODEBOOK_FILE) as beside:
            save_file(tensors, beside, metadata={"config": json.dumps(asdict(self.method))})

    def apply(self, batch: Sequence[Edit]) -> Step:
        self.attach()
        first, last = zip(*(self.apply_one(edit) for edit in batch), strict=True)
        return Step(tuple(first), tuple(last))

    def apply_one(self, edit: Edit) -> tuple[float, float]:
        rows = answer_rows(self.tokenizer, [edit], self.anatomy.device)
        with torch.no_grad():
            first = answer_losses(self.model, rows)
            with Trace(self.module) as trace:
                self.model(input_ids=rows.ids, attention_mask=rows.mask, use_cache=False)
            key = trace.input.reshape(rows.ids.shape[1], -1)[rows.last[0]]
            own = self.module.forward(key.unsqueeze(0))[0]  # what the layer says without the codebook
        entry = self.codebook.place(key, tuple(rows.wanted.tolist()), own)
        value, last = self.optimised(rows, self.codebook.values[entry].clone())
        self.codebook.values[entry] = value
        return probabilities(first)[0], probabilities(last)[0]

    def optimised(self, rows: AnswerRows, start: Tensor) -> tuple[Tensor, Tensor]:
        """The best value on the way, and its loss [1]. rows: one row."""
        value = start.requires_grad_(True)
        optimiser = torch.optim.Adam([value], lr=self.method.learning_rate)
        position = int(rows.last[0])

        def stand_in(output: Tensor) -> Tensor:
            flat = output.reshape(rows.ids.shape[1], -1)
            parts = (flat[:position], value.unsqueeze(0).to(flat.dtype), flat[position + 1 :])
            return torch.cat(parts).view(output.shape)

        best, lowest = start.detach().clone(), torch.inf
        blocks = self.anatomy.blocks
        fixed = {}
        skipped = min(self.layer, self.anatomy.skippable)
        if skipped > 0:  # the blocks below put out the same whatever the value is
            with torch.no_grad(), Trace(blocks[skipped - 1]) as below:
                self.model(input_ids=rows.ids, attention_mask=rows.mask, use_cache=False)
            fixed = {block: lambda *_a, **_k: below.returned for block in blocks[:skipped]}
        with Trace(self.module, edit=stand_in), replaced_forward(fixed):
            for step in range(self.method.steps + 1):
                loss = answer_losses(self.model, rows).sum()
                if loss.item() < lowest:
                    best, lowest = value.detach().clone(), loss.item()
                if step == self.method.steps or lowest < self.method.stop_loss:
                    break
                (value.grad,) = torch.autograd.grad(loss, [value])
                optimiser.step()
        return best, torch.tensor([lowest], dtype=torch.float32)

    def state_dict(self) -> dict[str, Tensor]:
        return self.codebook.state_dict()

    def take_state(self, state: Mapping[str, Tensor]) -> None:
        self.codebook.load_state_dict(state)
        if self.codebook.labels:
            self.attach()


def load_codebook(model: Any, tokenizer: Any, folder: str | os.PathLike[str]) -> GRACEEditor:
    """Attaches to a model, loaded from `folder`, the codebook that its `save_pretrained` has written there.

    Raises ModelError if the file is not such a codebook, or another model's.
    """
    path = Path(folder) / CODEBOOK_FILE
    try:
        with safe_open(path, framework="pt") as file:
            config: dict[str, Any] = json.loads((file.metadata() or {})["config"])
        state = load_file(path)
        method = GRACE(**{**config, "layers": tuple(config["layers"])})
    # Of another kind of file, or with content of another kind: ConfigError is a ValueError.
    except (KeyError, OSError, RecursionError, SafetensorError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: not a codebook that GRACE's save_pretrained wrote ({error!r})") from None
    bench = Workbench(model, tokenizer)
    try:
        editor = GRACEEditor(method, bench)
        editor.load_state_dict(state)
    except D4SError as error:
        raise ModelError(f"{path}: {error}") from None
    return editor
