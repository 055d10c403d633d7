"""Architectures as data: where in each model type the blocks, the edited projection and the attention output are.

To add one, add a row to `ARCHITECTURES` and a tiny configuration to `python_tests/support/tiny.py`; tests then build
a random model of that type, check the row, and edit, score, save and restore the model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from d4s.errors import ConfigError, ModelError, unknown_name
from d4s.models.causal_lm import CausalLM
from d4s.models.experts import Experts


@dataclass(frozen=True)
class Architecture:
    """Module paths of one model type. All but `blocks` are relative to a block.

    The module around both MLP projections, where there is one, must treat each position by itself.
    """

    blocks: str  # the ModuleList of transformer blocks, relative to the model
    mlp_output: str  # W: the MLP's output projection, whose input is the key
    mlp_input: str  # the first projection of the MLP (the gate where there are two)
    attention_output: str  # the attention's output projection
    # The module with the matrices of all routed experts, in blocks that have one; such a block has no `mlp_output`. Its
    # parent is the parent of `mlp_output`.
    experts: str | None = None
    # A norm or a factor stands between the MLP's output and the block's (gemma2, olmo2, opt-350m; granite): a residual
    # measured on the stream is then not a residual of W, so targets are taken at the MLP's output instead.
    normed_mlp_output: bool = False
    # Fields of the configuration and their values with which nothing stands there, where that is a model's own choice.
    # With all of them `architecture_of` gives the row without `normed_mlp_output`.
    plain_where: tuple[tuple[str, Any], ...] = ()
    # Which dimension of a block's output counts the rows of the batch (gemma3n's first one counts parallel streams).
    rows_dimension: int = 0

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Architecture:
        """The inverse of `dataclasses.asdict`, also by way of JSON. Raises TypeError for another field."""
        plain = tuple((name, value) for name, value in record.get("plain_where", ()))
        return cls(**{**record, "plain_where": plain})


def _llama_like(**changes: object) -> Architecture:
    base = Architecture("model.layers", "mlp.down_proj", "mlp.gate_proj", "self_attn.o_proj")
    return replace(base, **changes)  # type: ignore[arg-type]


_NORMED = _llama_like(normed_mlp_output=True)
# A model that sees or hears as well: its language part.
_NORMED_WITHIN = replace(_NORMED, blocks="model.language_model.layers")
_NO_GATE = _llama_like(mlp_input="mlp.up_proj")
_FUSED_GATE = _llama_like(mlp_input="mlp.gate_up_proj")
_EXPERTS = _llama_like(experts="mlp.experts")
_SCALED = replace(_NORMED, plain_where=(("residual_multiplier", 1.0),))


ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture("transformer.h", "mlp.c_proj", "mlp.c_fc", "attn.c_proj"),
    "gpt_bigcode": Architecture("transformer.h", "mlp.c_proj", "mlp.c_fc", "attn.c_proj"),
    "gptj": Architecture("transformer.h", "mlp.fc_out", "mlp.fc_in", "attn.out_proj"),
    "codegen": Architecture("transformer.h", "mlp.fc_out", "mlp.fc_in", "attn.out_proj"),
    "gpt_neo": Architecture("transformer.h", "mlp.c_proj", "mlp.c_fc", "attn.attention.out_proj"),
    "gpt_neox": Architecture("gpt_neox.layers", "mlp.dense_4h_to_h", "mlp.dense_h_to_4h", "attention.dense"),
    "persimmon": Architecture("model.layers", "mlp.dense_4h_to_h", "mlp.dense_h_to_4h", "self_attn.dense"),
    "opt": Architecture(
        "model.decoder.layers",
        "fc2",
        "fc1",
        "self_attn.out_proj",
        normed_mlp_output=True,  # opt-350m: norms behind the sums
        plain_where=(("do_layer_norm_before", True),),
    ),
    "xglm": Architecture("model.layers", "fc2", "fc1", "self_attn.out_proj"),
    "biogpt": Architecture("biogpt.layers", "fc2", "fc1", "self_attn.out_proj"),
    "bloom": Architecture("transformer.h", "mlp.dense_4h_to_h", "mlp.dense_h_to_4h", "self_attention.dense"),
    "falcon": Architecture("transformer.h", "mlp.dense_4h_to_h", "mlp.dense_h_to_4h", "self_attention.dense"),
    "llama": _llama_like(),
    "mistral": _llama_like(),
    "ministral": _llama_like(),
    "ministral3": _llama_like(),
    "qwen2": _llama_like(),
    "qwen3": _llama_like(),
    "smollm3": _llama_like(),
    "stablelm": _llama_like(),
    "olmo": _llama_like(),
    "cohere": _llama_like(),
    "cohere2": _llama_like(),
    "ernie4_5": _llama_like(),
    "exaone": _llama_like(),
    "hunyuan_v1_dense": _llama_like(),
    "seed_oss": _llama_like(),
    "helium": _llama_like(),
    "internlm3": _llama_like(),
    "cwm": _llama_like(),
    "diffllama": _llama_like(),
    "bitnet": _llama_like(),
    "youtu": _llama_like(),
    "gemma": _llama_like(),
    "vaultgemma": _llama_like(),
    "gemma2": _NORMED,
    "gemma3_text": _NORMED,
    "gemma3": _NORMED_WITHIN,
    "gemma3n_text": replace(_NORMED, rows_dimension=1),
    "gemma3n": replace(_NORMED_WITHIN, rows_dimension=1),
    "gemma4_text": _NORMED,
    "gemma4": _NORMED_WITHIN,
    "olmo2": _NORMED,
    "olmo3": _NORMED,
    "exaone4": _NORMED,
    "granite": _SCALED,
    "granite_swa": _SCALED,
    "hyperclovax": replace(_SCALED, plain_where=(("residual_multiplier", 1.0), ("use_post_norm", False))),
    "minicpm3": _NORMED,  # times scale_depth / √blocks
    "phi": _llama_like(mlp_output="mlp.fc2", mlp_input="mlp.fc1", attention_output="self_attn.dense"),
    "nanochat": _llama_like(mlp_output="mlp.fc2", mlp_input="mlp.fc1"),
    "phi3": _FUSED_GATE,
    "phi4_multimodal": _FUSED_GATE,
    "glm": _FUSED_GATE,
    "glm4": replace(_FUSED_GATE, normed_mlp_output=True),
    "starcoder2": _llama_like(mlp_output="mlp.c_proj", mlp_input="mlp.c_fc"),
    "nemotron": _NO_GATE,
    "arcee": _NO_GATE,
    "apertus": _NO_GATE,
    "jais2": _NO_GATE,
    "mixtral": _EXPERTS,
    "qwen2_moe": _EXPERTS,  # a shared expert beside them, which no edit changes
    "qwen3_moe": _EXPERTS,
    "olmoe": _EXPERTS,
    "gpt_oss": _EXPERTS,
    "deepseek_v3": _EXPERTS,  # the first blocks are dense
}


def is_projection(module: nn.Module | None) -> bool:
    """Whether it holds a W that can be edited."""
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module | None) -> bool:
    from transformers.pytorch_utils import Conv1D  # here, since transformers is slow to load

    return isinstance(module, Conv1D)


def text_config(model: CausalLM) -> Any:
    """The configuration of the model's language part: its own, but for a model that sees or hears as well."""
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


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


def check_on_devices(model: CausalLM) -> None:
    """Raises ModelError if some weights are on no device, or on several without hooks that move what runs through."""
    devices: dict[torch.device, str] = {}
    for name, parameter in model.named_parameters():
        devices.setdefault(parameter.device, name)
    for device, name in devices.items():
        if device.type == "meta":
            raise ModelError(
                f"{name} lies on meta, as weights do that are left out or offloaded to the CPU or to disk between "
                "calls, where no edit could be written; load the model whole: on more devices (device_map='auto' "
                "without 'cpu' and 'disk' in it), in dtype=torch.bfloat16, or on the CPU (device='cpu')"
            )
    if len(devices) > 1 and not hasattr(model, "_hf_hook"):
        raise ModelError(
            f"the model lies on {', '.join(sorted(map(str, devices)))}, and nothing moves what runs through it from "
            "one to the other; load it with device_map='auto' (accelerate), or on one device"
        )


def architecture_of(model: CausalLM, architecture: Architecture | None = None) -> Architecture:
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
                " attention_output=…) with the paths of its modules"
            )
        architecture = ARCHITECTURES[model_type]
    if architecture.plain_where:
        config = text_config(model)
        plain = all(getattr(config, name, None) == value for name, value in architecture.plain_where)
        architecture = replace(architecture, normed_mlp_output=not plain, plain_where=())
    try:
        blocks = model.get_submodule(architecture.blocks)
    except AttributeError as error:
        raise ModelError(
            f"{type(model).__name__} has no module {architecture.blocks!r} ({error}); "
            "name those it has, in architecture="
        ) from None
    if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
        raise ModelError(
            f"{type(model).__name__}: {architecture.blocks!r} is a {type(blocks).__name__}, must be the ModuleList of "
            "the model's blocks"
        )
    of_experts = architecture.experts is not None and _has(blocks[0], architecture.experts)
    mlp = () if of_experts else (architecture.mlp_output, architecture.mlp_input)
    for path in (*mlp, architecture.attention_output):
        try:
            blocks[0].get_submodule(path)
        except AttributeError as error:
            raise ModelError(
                f"{type(model).__name__}: {architecture.blocks}.0 has no {path!r} ({error}); "
                "name those it has, in architecture="
            ) from None
    return architecture


def _has(block: nn.Module, path: str) -> bool:
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True


class Anatomy:
    """A model seen through its architecture: blocks, edited projections, widths.

    model: a causal language model of transformers
    Raises ModelError as `architecture_of`.
    """

    def __init__(self, model: CausalLM, architecture: Architecture | None = None) -> None:
        self.model = model
        self.architecture = architecture_of(model, architecture)
        self.blocks: nn.ModuleList = model.get_submodule(self.architecture.blocks)  # type: ignore[assignment]
        self._places: dict[int, str] = {}  # layers whose W is another projection, and its path

    def at(self, places: Mapping[int, str]) -> Anatomy:
        """The same model with another projection for W in some layers.

        places: layer → its path within the block, as "mlp.up_proj"
        Raises ConfigError where the path does not lead to a projection of the block.
        """
        other = copy.copy(self)
        other._places = dict(places)
        for layer, path in places.items():
            self.check_layers((layer,))
            try:
                module = other.projection(layer)
            except ModelError:
                module = None
            if not is_projection(module):
                linear = (n for n, m in self.blocks[layer].named_modules() if is_projection(m))
                raise ConfigError(
                    unknown_name(f"projection of {self.architecture.blocks}.{layer}", path, linear)
                )
        return other

    def __len__(self) -> int:
        return len(self.blocks)

    def check_layers(self, layers: tuple[int, ...]) -> None:
        """Raises ConfigError unless layers are distinct, ascending and within the model."""
        if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= len(self):
            raise ConfigError(
                f"layers={list(layers)}: must be distinct, ascending and within 0…{len(self) - 1} for this model"
            )

    @property
    def skippable(self) -> int:
        """How many of the first blocks need not run again where their output is known.

        All, but where later blocks attend to keys and values that an earlier one has left for them (gemma3n, gemma4).
        """
        config = text_config(self.model)
        shared = getattr(config, "num_kv_shared_layers", 0) or 0
        if not shared:
            return len(self)
        own, taking = config.layer_types[:-shared], config.layer_types[-shared:]
        # Of each kind, the last block that has keys of its own is the one that leaves them.
        return min(max((i for i, kind in enumerate(own) if kind == taken), default=0) for taken in taking)

    def experts(self, layer: int) -> Experts | None:
        """The routed experts of a block; None where its MLP is dense, or `at` put another projection in its place."""
        path = self.architecture.experts
        if path is None or layer in self._places or not _has(self.blocks[layer], path):
            return None
        return Experts(self.blocks[layer].get_submodule(path), f"{self.architecture.blocks}.{layer}.{path}")

    @property
    def has_experts(self) -> bool:
        return any(self.experts(layer) is not None for layer in range(len(self)))

    def projection(self, layer: int) -> nn.Module:
        """The MLP's output projection of a block, or what `at` put in its place; its `weight` is W."""
        return self._module(layer, self._path(layer))

    def _path(self, layer: int) -> str:
        return self._places.get(layer, self.architecture.mlp_output)

    def _module(self, layer: int, path: str) -> nn.Module:
        """ModelError where a block is built otherwise than the first, as the sparse ones of a mixture of experts."""
        try:
            return self.blocks[layer].get_submodule(path)
        except AttributeError as error:
            raise ModelError(
                f"{type(self.model).__name__}: {self.architecture.blocks}.{layer} has no {path!r} ({error}), though "
                f"{self.architecture.blocks}.0 has; edit other layers"
            ) from None

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
        """W as stored: [d_out, d_in], or [d_in, d_out] where `transposed`; of a block with experts one for each,
        [experts, …, …]. ModelError if it is neither."""
        if (experts := self.experts(layer)) is not None:
            return experts.weight
        weight = getattr(self.projection(layer), "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.ndim != 2:
            found = f"has the shape {list(weight.shape)}" if isinstance(weight, Tensor) else "is not there"
            raise ModelError(
                f"{self.weight_name(layer)} {found}; W must be one matrix [d_out, d_in] (mixtures of experts have "
                "one for each expert, and can be edited where the table of architectures says where they are)"
            )
        return weight

    def transposed(self, layer: int) -> bool:
        """True where W is stored [d_in, d_out] (GPT-2's Conv1D, the experts of gpt_oss)."""
        if (experts := self.experts(layer)) is not None:
            return experts.transposed
        return _is_conv1d(self.projection(layer))

    def weight_name(self, layer: int) -> str:
        """Name of W in the model's state dict."""
        if (experts := self.experts(layer)) is not None:
            return f"{experts.name}.down_proj"
        return f"{self.architecture.blocks}.{layer}.{self._path(layer)}.weight"

    def shape(self, layer: int) -> tuple[int, int]:
        """(d_out, d_in) of W, whichever way it is stored; of one expert's, where there are several."""
        if (experts := self.experts(layer)) is not None:
            return experts.shape
        rows, columns = self.weight(layer).shape
        return (columns, rows) if self.transposed(layer) else (rows, columns)

    @property
    def width(self) -> int:
        """d_model, of what the blocks put out."""
        return self.shape(0)[0]

    @property
    def device(self) -> torch.device:
        """Where token ids go in, and logits come out: that of the first parameter."""
        return next(self.model.parameters()).device

    def device_of(self, layer: int) -> torch.device:
        """Where a block's W is, and with it its keys, sums and statistics."""
        return self.weight(layer).device

    def check_placement(self) -> None:
        """Raises ModelError as `check_on_devices`."""
        check_on_devices(self.model)

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
