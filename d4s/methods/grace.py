"""GRACE (arXiv 2211.11031): one layer is wrapped with a codebook of (key, value, radius, label); no weight
changes. With i the nearest key to the layer's input h,

    layer(h) = v_i  if ‖h − k_i‖ ≤ ε_i        else the layer's own

The key of an edit is the layer's input at its prompt's last token; where it goes and how radii change is said and done
in `d4s.models.codebook`, which holds the entries. Its value is optimised (Adam) from what the layer itself puts out,

    v = argmin −log p(target),  v in the place of the layer's output at that token

Inference asks the same question at every position: is its input within the radius of its nearest key? A
position's input does not depend on what comes after it, so the prompt's last token is answered the same when
it is the newest one, when a target follows it, and in a padded batch; what it is given stays in the KV cache
of the blocks above, and generation goes on from there. Nobody has to tell the layer where a prompt ends.

Of the releases each has another place: the authors' file replaces what stands before the key's token, EasyEdit the last
token alone. Both run all their steps and keep the last value, where here the best one stays and `stop_loss` ends it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from d4s.configuration import Above, AtLeast, Length
from d4s.edits import Edit
from d4s.methods.answers import AnswerRows, answer_losses, answer_rows, probabilities
from d4s.methods.base import Editor, Holding, LayerSize, Method, Step, Workbench
from d4s.methods.published import model_key
from d4s.models.architectures import Anatomy
from d4s.models.causal_lm import CausalLM
from d4s.models.codebook import Codebook, WrappedLayer, Wrapping
from d4s.models.trace import Trace, replaced_forward


@dataclass(frozen=True, kw_only=True)
class GRACE(Method):
    name: ClassVar[str] = "grace"
    paper: ClassVar[str] = "arXiv 2211.11031"
    changes: ClassVar[str] = "no weight: a codebook around one layer"
    not_published: ClassVar[tuple[str, ...]] = ("llama-3-8b",)
    strength: ClassVar[str] = "epsilon"

    layers: Annotated[tuple[int, ...], "the one that is wrapped", Length(1, "one layer is wrapped")]
    module: Annotated[Literal["mlp_input", "mlp_output"], "which projection of the MLP is wrapped"] = (
        "mlp_output"
    )
    epsilon: Annotated[float, "ε_init, the radius of a new entry", Above(0)] = 1.0
    learning_rate: Annotated[float, "of Adam, on an entry's value", Above(0)] = 1.0
    steps: Annotated[int, "of Adam, at most", AtLeast(1)] = 100
    stop_loss: Annotated[float, "a value is good enough below it"] = 1e-2

    @property
    def wrapping(self) -> Wrapping:
        return Wrapping(layers=self.layers, module=self.module, epsilon=self.epsilon)

    @classmethod
    def preset(cls, anatomy: Anatomy) -> GRACE:
        """Published: late layers, and 100 steps (gpt2-xl), 200 (GPT-J) and 50 (Llama-2). Without a row: 85 % of the
        depth, W; the embedded model: its last layer."""
        key = model_key(anatomy)
        if key == "gpt2-xl":
            return cls(layers=(35,), module="mlp_input")
        last = len(anatomy) - 1
        known = {"gpt-j-6b": 25, "llama-2-7b": 27, "embedded": last}
        steps = {"gpt-j-6b": 200, "llama-2-7b": 50}.get(key or "", 100)
        return cls(layers=(known.get(key or "", min(last, round(0.85 * len(anatomy)))),), steps=steps)

    def holding(self, size: LayerSize, edits: int) -> Holding:
        """Of each edit an entry, where none of them shares one."""
        entries = 4 * edits * (size.d_in + size.d_out + 1)
        return Holding({"codebook": entries}, entries)

    def editor(self, bench: Workbench) -> GRACEEditor:
        return GRACEEditor(self, bench)


class GRACEEditor(Editor):
    """While its codebook is attached, `model.save_pretrained(folder)` writes it beside the weights, which alone would
    be the unedited model's. `d4s.load_model(folder)` brings both back.
    """

    growing = frozenset({"keys", "values", "radii", "labels"})

    def __init__(self, method: GRACE, bench: Workbench) -> None:
        super().__init__(method, bench, method.layers)
        self.wrapped = WrappedLayer(self.anatomy, method.wrapping, asdict(method))
        self.wrapped.check_free()  # before anything is asked of a model that is not unedited
        self.layer, self.module = self.wrapped.layer, self.wrapped.module
        self.model: CausalLM = self.anatomy.model

    @property
    def codebook(self) -> Codebook:
        return self.wrapped.codebook

    def reset(self) -> None:
        """An empty codebook, and the layer unwrapped."""
        self.wrapped.reset()

    def apply(self, batch: Sequence[Edit]) -> Step:
        self.wrapped.attach()
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
        self.wrapped.load_state_dict(state)
