"""What editing changed as a low-rank adapter W0 + BA that other programs load: PEFT and vLLM, llama.cpp."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from d4s.errors import ConfigError, ModelError, unknown_name
from d4s.files import check_place, whole, write_text
from d4s.journal.changes import Change
from d4s.models.architectures import Anatomy, text_config
from d4s.models.causal_lm import CausalLM, plain_name

# vLLM's --max-lora-rank: what it is unless said otherwise, and what it may be (vllm/config/lora.py).
VLLM_RANK = 16
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

# transformers' model type → llama.cpp's architecture, of those whose projections llama.cpp takes as they are: its
# converter reorders queries and keys of some types, but none of `_GGUF_PROJECTIONS`.
GGUF_ARCHITECTURES = {
    "gpt2": "gpt2",
    "gpt_neox": "gptneox",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gemma3": "gemma3",
    "olmo": "olmo",
    "olmo2": "olmo2",
    "phi": "phi2",
    "phi3": "phi3",
    "granite": "granite",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
    "cohere": "command-r",
    "cohere2": "cohere2",
}
_GGUF_PROJECTIONS = ("ffn_down", "ffn_up", "ffn_gate", "attn_output")


@dataclass(frozen=True)
class Fit:
    """How one weight came out.

    exact_rank: what Δ has beyond rounding
    frobenius, spectral: ‖Δ − BA‖ / ‖Δ‖ in either norm, but for rounding BA to float32
    """

    rank: int
    exact_rank: int
    frobenius: float
    spectral: float


@dataclass(frozen=True)
class Adapter:
    """An adapter as written. fits: by the weight's name; notes: what a program that loads it must be told"""

    path: str
    fits: dict[str, Fit]
    notes: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """The largest of its ranks."""
        return max(fit.rank for fit in self.fits.values())


def export_lora(
    changes: Sequence[Change], folder: str | os.PathLike[str], *, model: CausalLM, rank: int | None = None
) -> Adapter:
    """A PEFT adapter folder: adapter_config.json and adapter_model.safetensors, float32, for the unedited model.

    model: the unedited model or the edited one, for the names of its modules and of itself
    rank: the largest; None: each weight's exact rank, that of Δ beyond what rounding the weight explains

    Every factor has alpha = rank, so that its scale is 1 wherever it is loaded; weights of a smaller rank than the
    largest are named in rank_pattern and alpha_pattern.
    Raises ConfigError for a rank below 1 or a folder that holds something; ModelError for changes that are none.
    """
    place = Path(folder)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        check_place(place)
        raise ConfigError(f"{place}: already holds files; name a new or empty folder for the adapter")
    pairs, fits = _factored(changes, rank)
    tensors: dict[str, Tensor] = {}
    for name, (left, right) in pairs.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{module}.lora_A.weight": right, f"{module}.lora_B.weight": left}
    largest = max(fit.rank for fit in fits.values())
    odd = {n.removesuffix(".weight"): fit.rank for n, fit in fits.items() if fit.rank != largest}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": _name_of(model),
        "r": largest,
        "lora_alpha": largest,
        **_targets(model, changes),
        "rank_pattern": odd,
        "alpha_pattern": odd,
        "fan_in_fan_out": any(change.transposed for change in changes),
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    with whole(place) as beside:
        beside.mkdir()
        save_file(tensors, beside / "adapter_model.safetensors", metadata={"format": "pt"})
        write_text(json.dumps(config, indent=2, sort_keys=True), beside / "adapter_config.json")
    return Adapter(os.fspath(folder), fits, _vllm_notes(largest))


def export_gguf_lora(
    changes: Sequence[Change], path: str | os.PathLike[str], *, model: CausalLM, rank: int | None = None
) -> Adapter:
    """The same adapter as one GGUF file, which llama.cpp puts on the unedited model (--lora), float32.

    model, rank: as `export_lora` takes them
    llama.cpp scales each weight's part by alpha over its rank, and alpha is one for the file: smaller ranks are filled
    up with zeros, so that all scales are 1.
    Raises ModelError for a model type or a projection that llama.cpp has none of, or stores otherwise; ConfigError
    where the package gguf is not installed.
    """
    if find_spec("gguf") is None:
        raise ConfigError("to write a GGUF file needs the package gguf: pip install gguf")
    import gguf

    place = Path(path)
    if place.is_dir():
        raise ConfigError(f"{place}: is a folder; name a file in it, as {place / 'adapter.gguf'}")
    _check_single(changes)
    architecture = _gguf_architecture(model)
    names = {change.name: _gguf_name(change.name, model, architecture) for change in changes}
    pairs, fits = _factored(changes, rank)
    largest = max(fit.rank for fit in fits.values())
    with whole(place) as beside:
        writer = gguf.GGUFWriter(beside, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(largest))
        for name, (left, right) in pairs.items():
            missing = largest - left.shape[1]
            right = torch.nn.functional.pad(right, (0, 0, 0, missing))
            left = torch.nn.functional.pad(left, (0, missing))
            writer.add_tensor(f"{names[name]}.lora_a", right.contiguous().numpy())
            writer.add_tensor(f"{names[name]}.lora_b", left.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return Adapter(os.fspath(path), fits)


def _factored(
    changes: Sequence[Change], rank: int | None
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Fit]]:
    """Of each weight B [d_out, r] and A [r, d_in], float32, and how far they are from Δ."""
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ConfigError(f"rank={rank!r}, must be a whole number from 1 on, or None for the exact rank")
    if not changes:
        raise ModelError("nothing was changed, so there is nothing to make an adapter of; make an edit first")
    _check_single(changes)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    fits = {}
    for change in sorted(changes, key=lambda change: change.name):
        if change.name in pairs:
            raise ModelError(f"{change.name} is changed twice; put both changes into one")
        change.check()
        factors = change.factors
        taken = min(factors.rank, rank or factors.rank)
        left, right = factors.halves(taken)
        pairs[change.name] = left.float().contiguous(), right.float().contiguous()
        fits[change.name] = Fit(taken, factors.rank, *factors.missing(taken))
    return pairs, fits


def _check_single(changes: Sequence[Change]) -> None:
    """ModelError for a change of an expert: adapters hang on modules, and a module holds all of its experts."""
    if of_expert := next((change for change in changes if change.expert is not None), None):
        raise ModelError(
            f"{of_expert.label} is one expert's matrix of several in a parameter, of which adapters take none; write "
            "a patch (export_patch, d4s patch export), or save the edited model itself (save_pretrained)"
        )


def _targets(model: CausalLM, changes: Sequence[Change]) -> dict[str, Any]:
    """target_modules and layers_to_transform that name the changed projections and no other of the model.

    The shortest endings of their names that do so, as "down_proj", which is how other programs' lists have them; where
    none do (another projection in another layer), the whole names.
    """
    blocks = Anatomy(model).architecture.blocks
    within = re.compile(rf"{re.escape(blocks)}\.(\d+)\.(.+)")
    every = [plain_name(name) for name, _ in model.named_modules()]
    wanted = {change.module for change in changes}
    if unknown := sorted(wanted - set(every)):
        raise ModelError(
            f"{type(model).__name__} has no module {unknown[0]!r}; give the model that was edited"
        )
    found = [within.fullmatch(name) for name in sorted(wanted)]
    parts = [match.groups() for match in found if match is not None]
    if len(parts) == len(wanted):
        layers = sorted({int(layer) for layer, _ in parts})
        paths = sorted({path for _, path in parts})
        pattern = blocks.rpartition(".")[2]
        for length in range(1, max(path.count(".") for path in paths) + 2):
            endings = sorted({".".join(path.split(".")[-length:]) for path in paths})
            if wanted == {name for name in every if _targeted(name, endings, layers, pattern)}:
                return {
                    "target_modules": endings,
                    "layers_to_transform": layers,
                    "layers_pattern": pattern,
                }
    return {"target_modules": sorted(wanted), "layers_to_transform": None, "layers_pattern": None}


def _targeted(name: str, endings: Sequence[str], layers: Sequence[int], pattern: str) -> bool:
    """Whether PEFT puts an adapter on a module of this name."""
    layer = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
    return (
        any(name == ending or name.endswith(f".{ending}") for ending in endings)
        and layer is not None
        and int(layer[1]) in layers
    )


def _vllm_notes(rank: int) -> tuple[str, ...]:
    if rank <= VLLM_RANK:
        return ()
    if rank > VLLM_RANKS[-1]:
        return (
            f"rank {rank} is more than vLLM takes ({VLLM_RANKS[-1]}); give a smaller rank, or serve the edited model",
        )
    return (f"rank {rank}: start vLLM with --max-lora-rank {min(r for r in VLLM_RANKS if r >= rank)}",)


def _name_of(model: CausalLM) -> str | None:
    return getattr(model, "name_or_path", None) or None


def _gguf_architecture(model: CausalLM) -> str:
    for config in (model.config, text_config(model)):
        if config.model_type in GGUF_ARCHITECTURES:
            return GGUF_ARCHITECTURES[config.model_type]
    raise ModelError(
        unknown_name("model type for a GGUF adapter", str(model.config.model_type), GGUF_ARCHITECTURES)
    )


def _gguf_name(name: str, model: CausalLM, architecture: str) -> str:
    """A weight's name in llama.cpp, as blk.4.ffn_down.weight."""
    import gguf

    (number,) = (key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    table = gguf.get_tensor_name_map(number, len(Anatomy(model)))
    found = table.get_name(name.replace("model.language_model.", "model.", 1), try_suffixes=(".weight",))
    if found is None or found.split(".")[-2] not in _GGUF_PROJECTIONS:
        raise ModelError(
            f"{name}: llama.cpp has {'no such weight' if found is None else f'it as {found}, in another order'} in its "
            f"architecture {architecture!r}; a GGUF adapter can hold the MLP's projections and the attention's output"
        )
    return found
