"""What d4s asks of a model: the part of transformers' causal language models that it uses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor, nn


class CausalLM(Protocol):
    """A causal language model, as transformers' `AutoModelForCausalLM` gives it.

    It is an `nn.Module` too; a protocol can only say which parts of one are used.
    config: of transformers; `model_type` names the row of `ARCHITECTURES`
    """

    config: Any
    generation_config: Any
    training: bool

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """input_ids [rows, tokens] and attention_mask → an output with `logits` [rows, tokens, vocabulary]."""

    def forward(self, *arguments: Any, **options: Any) -> Any: ...

    def generate(self, *arguments: Any, **options: Any) -> Any: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def buffers(self) -> Iterator[Tensor]: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

    def get_submodule(self, target: str) -> nn.Module: ...

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...

    def get_input_embeddings(self) -> Any: ...

    def get_output_embeddings(self) -> Any: ...

    def save_pretrained(self, save_directory: Any, **options: Any) -> Any: ...


def plain_name(name: str) -> str:
    """Of a parameter or module, without what torch.compile puts in front."""
    return name.replace("_orig_mod.", "")


def parameters_by_name(model: CausalLM) -> dict[str, nn.Parameter]:
    """A model's parameters by their plain names."""
    return {plain_name(name): parameter for name, parameter in model.named_parameters()}
