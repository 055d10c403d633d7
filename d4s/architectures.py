"""Architectures as data: where in each model type the blocks, the edited projection and the attention output are.

To add one, add a row to `ARCHITECTURES`; `python_tests/test_architectures.py` then builds a tiny random model
of that type and checks it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from d4s.errors import ConfigError, ModelError, unknown_name


@dataclass(frozen=True)
class Architecture:
    """Module paths of one model type. All but `blocks` are relative to a block.

    The module around both MLP projections, where there is one, must treat each position by itself.
    """

    blocks: str  # the ModuleList of transformer blocks, relative to the model
    mlp_output: str  # W: the MLP's output projection, whose input is the key
    mlp_input: str  # the first projection of the MLP (the gate where there are two)
    attention_output: str  # the attention's output projection
    # A norm stands between the MLP's output and the block's (gemma2, olmo2, opt-350m): a residual measured on the
    # stream is then not a residual of W, so targets are taken at the MLP's output instead.
    normed_mlp_output: bool = False


def _llama_like(**changes: object) -> Architecture:
    base = Architecture("model.layers", "mlp.down_proj", "mlp.gate_proj", "self_attn.o_proj")
    return replace(base, **changes)  # type: ignore[arg-type]


ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture("transformer.h", "mlp.c_proj", "mlp.c_fc", "attn.c_proj"),
    "gptj": Architecture("transformer.h", "mlp.fc_out", "mlp.fc_in", "attn.out_proj"),
    "gpt_neo": Architecture("transformer.h", "mlp.c_proj", "mlp.c_fc", "attn.attention.out_proj"),
    "gpt_neox": Architecture("gpt_neox.layers", "mlp.dense_4h_to_h", "mlp.dense_h_to_4h", "attention.dense"),
    "opt": Architecture("model.decoder.layers", "fc2", "fc1", "self_attn.out_proj"),
    "bloom": Architecture("transformer.h", "mlp.dense_4h_to_h", "mlp.dense_h_to_4h", "self_attention.dense"),
    "falcon": Architecture("transformer.h", "mlp.dense_4h_to_h", "mlp.dense_h_to_4h", "self_attention.dense"),
    "llama": _llama_like(),
    "mistral": _llama_like(),
    "qwen2": _llama_like(),
    "qwen3": _llama_like(),
    "gemma": _llama_like(),
    "gemma2": _llama_like(normed_mlp_output=True),
    "gemma3_text": _llama_like(normed_mlp_output=True),
    "phi": _llama_like(mlp_output="mlp.fc2", mlp_input="mlp.fc1", attention_output="self_attn.dense"),
    "phi3": _llama_like(mlp_input="mlp.gate_up_proj"),
    "olmo2": _llama_like(normed_mlp_output=True),
    "stablelm": _llama_like(),
}


def check_bare(model: object) -> None:
    """Raises ModelError for what is no model, or one in a wrapper, with an adapter, or of tensors of another kind."""
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"model is a {type(model).__name__}; give the model itself, as "
            "AutoModelForCausalLM.from_pretrained(…) loads it"
        )
    name = type(model).__name__
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ModelError(f"the model is wrapped in {name}; give the one inside, model.module, on one device")
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"the model ({name}) carries an adapter of PEFT, on top of the weights that would be edited; put it into "
            "them first: model = model.merge_and_unload()"
        )
    for weight_name, weight in model.named_parameters():
        # Quantisers (torchao) and distributed tensors are tensors of a type of their own, which call themselves
        # floating point and cannot be read or written as one. bitsandbytes' are whole numbers: `check_finite`.
        if isinstance(weight.data, Tensor) and type(weight.data) is not Tensor and weight.is_floating_point():
            raise ModelError(
                f"{weight_name} is a {type(weight.data).__name__}, not a plain tensor; load the model without "
                "quantisation (torchao) and on one device"
            )


def check_on_a_device(model: nn.Module) -> None:
    """Raises ModelError if the model is spread over several devices, or its weights are on none."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or any(device.type == "meta" for device in devices):
        raise ModelError(
            f"the model lies on {', '.join(sorted(map(str, devices)))}; load it on one device, without device_map"
        )


def architecture_of(model: nn.Module, architecture: Architecture | None = None) -> Architecture:
    """The row for `model.config.model_type`, or `architecture` itself; checked against the model.

    Raises ModelError for an unknown type, or where a path does not lead to a module.
    """
    check_bare(model)
    if architecture is None:
        model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        if model_type not in ARCHITECTURES:
            raise ModelError(
                unknown_name("model type", str(model_type), ARCHITECTURES)
                + " For another one pass architecture=d4s.Architecture(blocks=…, mlp_output=…, mlp_input=…,"
                " attention_output=…) with the paths of its modules."
            )
        architecture = ARCHITECTURES[model_type]
        if getattr(model.config, "do_layer_norm_before", True) is False:  # opt-350m: norms behind the sums
            architecture = replace(architecture, normed_mlp_output=True)
    try:
        blocks = model.get_submodule(architecture.blocks)
    except AttributeError as error:
        raise ModelError(f"{type(model).__name__} has no module {architecture.blocks!r} ({error})") from None
    if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
        raise ModelError(
            f"{type(model).__name__}: {architecture.blocks!r} is a {type(blocks).__name__}, must be the ModuleList of "
            "the model's blocks"
        )
    for path in (architecture.mlp_output, architecture.mlp_input, architecture.attention_output):
        try:
            blocks[0].get_submodule(path)
        except AttributeError as error:
            raise ModelError(
                f"{type(model).__name__}: {architecture.blocks}.0 has no {path!r} ({error})"
            ) from None
    return architecture


class Anatomy:
    """A model seen through its architecture: blocks, edited projections, widths.

    model: a causal language model of transformers
    Raises ModelError as `architecture_of`.
    """

    def __init__(self, model: nn.Module, architecture: Architecture | None = None) -> None:
        self.model = model
        self.architecture = architecture_of(model, architecture)
        self.blocks: nn.ModuleList = model.get_submodule(self.architecture.blocks)  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self.blocks)

    def check_layers(self, layers: tuple[int, ...]) -> None:
        """Raises ConfigError unless layers are distinct, ascending and within the model."""
        if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= len(self):
            raise ConfigError(
                f"layers={list(layers)}: must be distinct, ascending and within 0…{len(self) - 1} for this model"
            )

    def _module(self, layer: int, path: str) -> nn.Module:
        """ModelError where a block is built otherwise than the first, as the sparse ones of a mixture of experts."""
        try:
            return self.blocks[layer].get_submodule(path)
        except AttributeError as error:
            raise ModelError(
                f"{type(self.model).__name__}: {self.architecture.blocks}.{layer} has no {path!r} ({error}), though "
                f"{self.architecture.blocks}.0 has; edit other layers"
            ) from None

    def projection(self, layer: int) -> nn.Module:
        """The MLP's output projection of a block; its `weight` is W."""
        return self._module(layer, self.architecture.mlp_output)

    def mlp_input(self, layer: int) -> nn.Module:
        return self._module(layer, self.architecture.mlp_input)

    def mlp(self, layer: int) -> nn.Module | None:
        """The module around both projections of a block's MLP; None where they stand in the block itself (OPT)."""
        around, other = (
            p.rpartition(".")[0] for p in (self.architecture.mlp_output, self.architecture.mlp_input)
        )
        return self.blocks[layer].get_submodule(around) if around and around == other else None

    def attention_output(self, layer: int) -> nn.Module:
        return self._module(layer, self.architecture.attention_output)

    def weight(self, layer: int) -> nn.Parameter:
        """W as stored: [d_out, d_in], or [d_in, d_out] where `transposed`. ModelError if it is not one matrix."""
        weight = getattr(self.projection(layer), "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.ndim != 2:
            found = f"has the shape {list(weight.shape)}" if isinstance(weight, Tensor) else "is not there"
            raise ModelError(
                f"{self.weight_name(layer)} {found}; W must be one matrix [d_out, d_in]. Mixtures of experts have "
                "one for each expert, and cannot be edited there"
            )
        return weight

    def transposed(self, layer: int) -> bool:
        """True where W is stored [d_in, d_out] (GPT-2's Conv1D)."""
        return isinstance(self.projection(layer), Conv1D)

    def weight_name(self, layer: int) -> str:
        """Name of W in the model's state dict."""
        return f"{self.architecture.blocks}.{layer}.{self.architecture.mlp_output}.weight"

    def shape(self, layer: int) -> tuple[int, int]:
        """(d_out, d_in) of W, whichever way it is stored."""
        rows, columns = self.weight(layer).shape
        return (columns, rows) if self.transposed(layer) else (rows, columns)

    @property
    def device(self) -> torch.device:
        return self.weight(0).device

    def check_placement(self) -> None:
        """Raises ModelError if the model is spread over several devices, or its weights are on none."""
        check_on_a_device(self.model)

    def check_finite(self, layers: tuple[int, ...]) -> None:
        """Raises ModelError if an edited weight holds NaN or infinity: no edit could mend that."""
        for layer in layers:
            weight: Tensor = self.weight(layer).detach()
            if not weight.is_floating_point() or weight.element_size() < 2:
                raise ModelError(
                    f"{self.weight_name(layer)} is {weight.dtype}; weights must be float32, float16 or bfloat16 "
                    "(load the model without quantisation)"
                )
            if not torch.isfinite(weight).all():
                bad = int((~torch.isfinite(weight)).sum())
                raise ModelError(
                    f"{self.weight_name(layer)} holds {bad} values that are NaN or infinite; "
                    "load the model again from an intact file"
                )
