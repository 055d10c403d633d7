"""The routed experts of one block: which of them each token goes to, how much of each it takes, and their keys.

    output = Σ_j g_j (W_j k_j + b_j)        k_j = act(gate_j x) · up_j x

over the experts j that a token x is routed to. transformers keeps the matrices of all experts in one parameter and has
several ways through them, which all begin with one call, experts(x, indices, gates). What that was called with is
all that is read here: k_j is computed again from it, by the experts' own weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from d4s.errors import ModelError
from d4s.models.trace import Trace


class Experts:
    """The experts of one block.

    module: with `gate_up_proj` and `down_proj` of all of them, three dimensions each
    name: of the module within the model
    Raises ModelError where the module is built otherwise.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        weight, inner = (getattr(module, part, None) for part in ("down_proj", "gate_up_proj"))
        if not all(isinstance(w, nn.Parameter) and w.ndim == 3 for w in (weight, inner)):
            raise ModelError(
                f"{name} ({type(module).__name__}) keeps its experts otherwise than in the parameters gate_up_proj and "
                "down_proj, [experts, …, …], of transformers 5; they cannot be edited"
            )
        assert isinstance(weight, nn.Parameter) and isinstance(inner, nn.Parameter)
        self.weight, self.inner = weight, inner

    @property
    def count(self) -> int:
        return self.weight.shape[0]

    @property
    def transposed(self) -> bool:
        """Whether each W_j is stored [d_in, d_out] (gpt_oss)."""
        # Told by the inner projections, [2 d_in, d_model] or [d_model, 2 d_in], since W_j may be square.
        _, rows, columns = self.weight.shape
        _, inner_rows, inner_columns = self.inner.shape
        upright = inner_rows == 2 * columns and inner_columns == rows
        lying = inner_columns == 2 * rows and inner_rows == columns
        if upright == lying:
            raise ModelError(
                f"{self.name}: gate_up_proj is {list(self.inner.shape)} and down_proj {list(self.weight.shape)}; which "
                "way they lie cannot be told"
            )
        return lying

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of one expert's W_j."""
        _, rows, columns = self.weight.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def routed(self, trace: Trace) -> tuple[Tensor, Tensor, Tensor]:
        """(x [tokens, d_model], experts [tokens, k] int64, gates [tokens, k]) of the traced call.

        Raises ModelError where the module was not called, as where a kernel has taken the place of the whole MLP.
        """
        arguments: tuple[Any, ...] = getattr(trace, "arguments", ())
        if len(arguments) < 3:
            raise ModelError(
                f"{self.name} was called with {len(arguments)} arguments, must be hidden states, the experts of each "
                "token and their gates; load the model without kernels of its own (use_kernels=False)"
            )
        hidden, index, gates = arguments[:3]
        return hidden.reshape(-1, hidden.shape[-1]), index.reshape(-1, index.shape[-1]), gates

    def parts(self, trace: Trace) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Of each expert j that a token was routed to: (j, the tokens [n_j], their g_j k_j [n_j, d_in]).

        In the model's own dtype, or float32 where that is a half: g_j k_j is a product that the model never rounds.
        """
        hidden, index, gates = self.routed(trace)
        for expert in index.unique().tolist():
            if expert >= self.count:  # where experts are spread over devices: another one's
                continue
            tokens, place = (index == expert).nonzero(as_tuple=True)
            key, gate = self._inner(expert, hidden[tokens]), gates[tokens, place].unsqueeze(1)
            if key.element_size() < 4:
                key = key.float()
            yield expert, tokens, key * gate.to(key.dtype)

    def joint_keys(self, trace: Trace, tokens: Tensor) -> Tensor:
        """The keys of some tokens side by side, zero where a token is not routed: [n, experts · d_in]."""
        d_in = self.shape[1]
        found: Tensor | None = None
        for expert, here, keys in self.parts(trace):
            if found is None:
                found = keys.new_zeros(len(tokens), self.count, d_in)
            row, place = (tokens.unsqueeze(1) == here.unsqueeze(0)).nonzero(as_tuple=True)
            found[row, expert] = keys[place]
        if found is None:
            raise ModelError(
                f"{self.name}: no token was routed to any of its {self.count} experts; give it tokens"
            )
        return found.flatten(1)

    def _inner(self, expert: int, x: Tensor) -> Tensor:
        """k_j of tokens x [n, d_model]: what W_j takes, [n, d_in]."""
        module: Any = self.module
        weight = self.inner[expert]
        both = x @ weight if self.transposed else linear(x, weight)
        bias = getattr(module, "gate_up_proj_bias", None)
        if bias is not None:
            both = both + bias[expert]
        if hasattr(module, "_apply_gate"):  # gpt_oss: interleaved and clamped
            inner: Tensor = module._apply_gate(both)
            return inner
        gate, up = both.chunk(2, dim=-1)
        product: Tensor = module.act_fn(gate) * up
        return product


def same_experts(one: Tensor, other: Tensor) -> Tensor:
    """Whether tokens [tokens, k] are routed to the same set of experts, in whatever order. [tokens] bool"""
    return (torch.sort(one, -1).values == torch.sort(other, -1).values).all(-1)
