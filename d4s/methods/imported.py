"""Hyperparameter files of other programs as presets: EasyEdit's YAML files, and the JSON ones of ROME, MEMIT and
AlphaEdit.

Each of their names is one of three things: fields of the method here, something that is so here in any case, or
something that has no counterpart. What it is, and why, is said of every one. Steps of a target's search are counted as
there: looks at the loss, the last of which is followed by no move.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from d4s import files
from d4s.errors import ConfigError, DataError, shown, unknown_name
from d4s.locate.targets import TargetConfig
from d4s.methods import METHODS
from d4s.methods.preset import PROJECTION, Preset
from d4s.methods.published import some_preset
from d4s.models.architectures import ARCHITECTURES
from d4s.models.prompts import CONTEXT_SEEDS
from d4s.version import __version__

MOST_BYTES = 1 << 20
DEEPEST = 100  # lists and mappings within each other; a row of settings has two
PLAIN = "write names and values, as layers: [4, 5, 6]"
WHAT = "hyperparameters of EasyEdit, ROME, MEMIT or AlphaEdit"

# Their name of a method, in small letters without hyphens → ours. FT is ft-l or ft-m, by what else the file says.
ALGORITHMS = {
    **{name.replace("-", ""): name for name in METHODS},
    "ft": "ft-l",
}

Kind = Literal["set", "as here", "none"]


@dataclass(frozen=True)
class Row:
    """What became of one of their names.

    kind: "set": `fields` hold it; "as here": it is so in any case, or is said elsewhere than in a preset; "none": it
        has no counterpart
    """

    name: str
    value: Any
    kind: Kind
    fields: Mapping[str, Any]
    why: str


@dataclass(frozen=True)
class Imported:
    """A file, read. source: its path; rows: of each of its names, in its order"""

    source: str
    preset: Preset
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class _File:
    """What a translation looks at. has: the fields that the method here has"""

    path: str
    method: str
    values: Mapping[str, Any]
    has: frozenset[str]


# (fields, kind, why) of one name's value.
_Said = tuple[Mapping[str, Any], Kind, str]
_Translation = Callable[[_File, Any], _Said]


def read_hyperparameters(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a YAML file (whatever its name, but .json) or a JSON one.

    Texts that are numbers become numbers, as 5e-1, which YAML takes for text. No YAML tag makes anything but numbers,
    texts, lists and mappings. Raises DataError, in one line, for a file that holds anything else.
    """
    data = files.read_bytes(path, WHAT)
    if len(data) > MOST_BYTES:
        raise DataError(f"{path}: has {len(data) >> 20} MiB, and {WHAT} take a few KiB; name a file of them")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {error.start} is 0x{data[error.start]:02x}, which is no UTF-8 text; name a file of {WHAT}"
        ) from None
    values = files.parse_json(text, str(path)) if Path(path).suffix == ".json" else _yaml(text, path)
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise DataError(f"{path}: holds {shown(values)}; must be names and values, as layers: [4, 5, 6]")
    try:
        for name, value in values.items():
            files.as_json(value, name)
    except files.WrongType as error:  # lists in lists, or, in YAML, a list in itself
        raise DataError(f"{path}: {error}") from None
    return {name: _number(value) for name, value in values.items()}


def _yaml(text: str, path: str | os.PathLike[str]) -> Any:
    import yaml

    opening = (
        yaml.FlowSequenceStartToken,
        yaml.FlowMappingStartToken,
        yaml.BlockSequenceStartToken,
        yaml.BlockMappingStartToken,
    )
    closing = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)
    try:
        depth = 0
        for token in yaml.scan(text):
            # A few aliases of aliases are a value of any size.
            if isinstance(token, yaml.AliasToken):
                raise DataError(f"{path}: has an alias (*name); write the value itself in its place")
            # Reading takes the square of the depth.
            depth += isinstance(token, opening) - isinstance(token, closing)
            if depth > DEEPEST:
                raise DataError(f"{path}: not plain YAML: lists and mappings {depth} deep; {PLAIN}")
        return yaml.safe_load(text)
    except DataError:  # a ValueError, too
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise DataError(f"{path}: not plain YAML: {error.problem or error.context}{where}; {PLAIN}") from None
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError, TypeError) as error:
        said = " ".join(str(error).split())[:100]
        raise DataError(f"{path}: not plain YAML: {said}; {PLAIN}") from None


def _number(value: Any) -> Any:
    if isinstance(value, list):
        return [_number(item) for item in value]
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", value.strip()):
        return float(value)
    # What YAML has beyond JSON: dates, sets, bytes.
    return value if value is None or isinstance(value, (bool, int, float, str, dict)) else str(value)


def import_config(path: str | os.PathLike[str], method: str | None = None) -> Imported:
    """A hyperparameter file as a preset, checked, and what became of each of its names.

    method: whose settings they become; None: the one that the file's alg_name says, or else its folder's name

    Raises DataError for a file that holds something else, and ConfigError for a method that is not known, for weights
    that d4s does not edit, and for a file that says nothing of the method.
    """
    values = read_hyperparameters(path)
    name = _method_of(path, values) if method is None else method
    if name not in METHODS:
        raise ConfigError(unknown_name("method", name, METHODS))
    own = {field.name for field in fields(METHODS[name])}
    inner = {field.name for field in fields(TargetConfig)} if "target" in own else set()
    file = _File(os.fspath(path), name, values, frozenset(own | inner))
    rows = tuple(_row(file, name, value) for name, value in values.items())
    found: dict[str, Any] = {}
    for row in rows:
        found |= row.fields
    if not found:
        raise ConfigError(
            f"{path}: nothing in it is a setting of {name}; it is to hold {WHAT}, with names as layers, v_lr, lr"
        )
    try:
        some_preset(METHODS[name]).changed(found)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    projection = _projection(file)
    preset = Preset(
        method=name,
        fields=found,
        model={} if projection is None else {PROJECTION: projection},
        versions={"d4s": __version__},
        path=os.fspath(path),
    )
    return Imported(os.fspath(path), preset, rows)


def _method_of(path: str | os.PathLike[str], values: Mapping[str, Any]) -> str:
    told = values.get("alg_name", values.get("alg"))
    named = told if told is not None else Path(path).resolve().parent.name
    name = ALGORITHMS.get(re.sub(r"[^a-z0-9]", "", str(named).lower()))
    if name is None:
        where = "alg_name is" if told is not None else "it has no alg_name, and its folder is"
        raise ConfigError(
            f"{path}: {where} {shown(named)}, which is no method of d4s ({', '.join(METHODS)}); --method NAME takes "
            "its settings for one of these"
        )
    if name == "ft-l" and values.get("objective_optimization") == "target_new":
        return "ft-m"
    return name


def _row(file: _File, name: str, value: Any) -> Row:
    said, kind, why = _TRANSLATIONS.get(name, _unknown)(file, value)
    lacking = [field for field in said if field not in file.has]
    if lacking:
        return Row(name, value, "none", {}, f"{file.method} has no {' and no '.join(lacking)}")
    return Row(name, value, kind, said, why)


# What a name becomes.


def _sets(field: str, why: str = "") -> _Translation:
    return lambda file, value: ({field: value}, "set", why)


def _elsewhere(why: str) -> _Translation:
    return lambda file, value: ({}, "as here", why)


def _nothing(why: str) -> _Translation:
    return lambda file, value: ({}, "none", why)


def _only(right: Any, here: str, otherwise: str) -> _Translation:
    """A switch of which one position is how it is here."""

    def said(file: _File, value: Any) -> _Said:
        return ({}, "as here", here) if value == right else ({}, "none", otherwise)

    return said


def _unknown(file: _File, value: Any) -> _Said:
    return {}, "none", "this name is not known"


def _layers(file: _File, value: Any) -> _Said:
    # YAML's 5 and 5.0 are one layer: `_number` never sees a whole number that is no text.
    return {"layers": value if isinstance(value, list) else [value]}, "set", ""


def _steps(file: _File, value: Any) -> _Said:
    return {"steps": _whole(value)}, "set", "looks at the loss, as there: the last is followed by no move"


def _prior_weight(file: _File, value: Any) -> _Said:
    if file.method in ("alphaedit", "nas", "sphere"):
        return {}, "none", "λ: there, too, this method's solve does not read it; L2 is its weight"
    return {"prior_weight": _real(value)}, "set", "λ"


def _adjustment(file: _File, value: Any) -> _Said:
    if file.method in ("rome", "r-rome"):
        return {"identity_covariance": not value}, "set", "false: the identity in place of C"
    return {}, "as here", "C is always in the solve, as there: only ROME reads it"


def _threshold(file: _File, value: Any) -> _Said:
    return (
        {"null_space_threshold": _real(value), "threshold_is_relative": False},
        "set",
        "of C's eigenvalues as they are, and so of a model's own scale",
    )


def _suppression(file: _File, value: Any) -> _Said:
    share = file.values.get("cumulative_ratio")
    if share is None:
        return {}, "none", "α; β (cumulative_ratio) lacks beside it"
    return {"delta_projection": [_real(value), _real(share)]}, "set", "α and β"


def _context_lengths(file: _File, value: Any) -> _Said:
    """[[length, how many], …]; here as many of each length, by the five words that contexts begin with."""
    pairs = value if isinstance(value, list) else []
    if not pairs or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
        raise DataError(
            f"{file.path}: context_template_length_params is {shown(value)}, must be pairs, as [[5, 10]]"
        )
    (lengths, counts) = zip(*pairs, strict=True)
    words = len(CONTEXT_SEEDS)
    if not all(type(count) is int for count in counts) or len(set(counts)) != 1 or counts[0] % words:
        return (
            {},
            "none",
            f"here there are as many contexts of each length, a multiple of {words}: contexts, context_lengths",
        )
    return (
        {"contexts": counts[0] // words, "context_lengths": list(lengths)},
        "set",
        f"contexts are counted for each of {words} words",
    )


def _norm_constraint(file: _File, value: Any) -> _Said:
    if file.method == "ft-m":
        return {}, "as here" if not value else "none", "ft-m has no bound"
    if not value:
        return {"epsilon": 1e9}, "set", "no bound: one that binds nothing"
    return {"epsilon": _real(value)}, "set", "around the weights that a step starts from"


def _objective(file: _File, value: Any) -> _Said:
    own = {"ft-l": "prompt_last", "ft-l-w0": "prompt_last", "ft-m": "target_new", "ft-bf": "target_new"}
    if own.get(file.method) == value:
        return {}, "as here", f"that is {file.method}"
    return {}, "none", f"{file.method} has {own.get(file.method, 'none')}"


def _batch_size(file: _File, value: Any) -> _Said:
    if file.method == "kn":
        return {}, "as here", "of the integral's points: chosen by the device"
    return {}, "as here", f"edits a step, of a run: --batch-size {shown(value)}"


def _integral(file: _File, value: Any) -> _Said:
    if _whole(value) == 1:
        return {}, "none", "one step is a gradient at one point, not an integral; the method's own stays"
    return {"steps": _whole(value)}, "set", "points of the integral"


def _kn_only(translation: _Translation) -> _Translation:
    def said(file: _File, value: Any) -> _Said:
        return translation(file, value) if file.method == "kn" else _unknown(file, value)

    return said


def _modules(file: _File, value: Any) -> _Said:
    """inner_params: paths of weights, of GRACE the one that is wrapped, of UltraEdit W of each layer."""
    paths = value if isinstance(value, list) else [value]
    layers, modules = [], []
    for text in paths:
        found = re.fullmatch(r"(.+?)(?:\.(\d+)|\[(\d+)\])\.(.+?)(?:\.weight)?", str(text))
        if found is None:
            raise DataError(
                f"{file.path}: inner_params has {shown(text)}, must be paths of weights with a block's number"
            )
        layers.append(int(found[2] or found[3]))
        modules.append(found[4])
    if "modules" in file.has:
        if sorted(set(layers)) != sorted(layers):
            twice = next(layer for layer in layers if layers.count(layer) > 1)
            raise ConfigError(
                f"{file.path}: inner_params has two weights of layer {twice}; {file.method} changes one of each layer"
            )
        order = sorted(range(len(layers)), key=layers.__getitem__)
        return (
            {"layers": [layers[i] for i in order], "modules": [modules[i] for i in order]},
            "set",
            "",
        )
    if "module" in file.has:
        ends: dict[str, str] = {}
        for one in ARCHITECTURES.values():
            ends |= {one.mlp_input: "mlp_input", one.mlp_output: "mlp_output"}
        module = ends.get(modules[0])
        if module is None or len(paths) != 1:
            raise ConfigError(
                f"{file.path}: inner_params is {shown(paths[0])}; {file.method} wraps one projection of an MLP, its "
                "first or its last"
            )
        return {"layers": layers, "module": module}, "set", ""
    return _unknown(file, value)


def _written(file: _File, value: Any) -> _Said:
    of = _types_with(_projection(file) or "")
    return (
        {},
        "as here",
        f"W of {', '.join(of[:4])}{' …' if len(of) > 4 else ''}; the preset is refused with any other",
    )


def _projection(file: _File) -> str | None:
    """rewrite_module_tmp, which has to be W of a known architecture; None where the file has none."""
    told = file.values.get("rewrite_module_tmp")
    if told is None:
        return None
    path = str(told).removesuffix(".weight")
    if not _types_with(path):
        known = dict.fromkeys(_path(one) for one in ARCHITECTURES.values())
        raise ConfigError(f"{file.path}: {unknown_name('MLP output in rewrite_module_tmp', path, known)}")
    return path


def _types_with(path: str) -> list[str]:
    return [name for name, one in ARCHITECTURES.items() if _path(one) == path]


def _path(architecture: Any) -> str:
    return f"{architecture.blocks}.{{}}.{architecture.mlp_output}"


def _whole(value: Any) -> Any:
    """A count; 25.0 is one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _real(value: Any) -> Any:
    plain = isinstance(value, int) and not isinstance(value, bool) and value.bit_length() < 64
    return float(value) if plain else value


def _real_field(field: str, why: str = "") -> _Translation:
    return lambda file, value: ({field: _real(value)}, "set", why)


def _refine(file: _File, value: Any) -> _Said:
    if value:
        return {}, "as here", "neurons are kept by the share of texts"
    return (
        {"paraphrases": False},
        "set",
        "the prompt alone, of which every neuron above the threshold is kept",
    )


def _norm_weight(file: _File, value: Any) -> _Said:
    if "norm_weight" in file.has:
        return {"norm_weight": _real(value)}, "set", ""
    return _only(0, "nothing is added", "encore has such a weight, norm_weight")(file, value)


def _looks_as_argmax(file: _File, value: Any) -> _Said:
    """ENCORE's: a negative whole number; its search ends at the |n|-th look at which the target is the argmax."""
    if "stop_after_argmax" in file.has and isinstance(value, int | float) and value <= -1:
        return {"stop_after_argmax": -_whole(value) - 1}, "set", "moves after the target is the argmax"
    return _unknown(file, value)


_FOUND = _elsewhere("found by the model's type")
_STATISTICS = _elsewhere("of the key statistics, which are a file of their own: d4s covariance")
_RUN_DEVICE = _elsewhere("of a run: --device, --device-map, --dtype")
_CODEBOOK = _nothing("grace here has one way: d4s methods grace")

# In the order in which a file usually has them.
_TRANSLATIONS: dict[str, _Translation] = {
    "alg_name": _elsewhere("the method"),
    "alg": _elsewhere("the method"),
    "model_name": _elsewhere("of a run: MODEL"),
    "model_class": _FOUND,
    "class_name": _FOUND,
    "tokenizer_class": _FOUND,
    "tokenizer_name": _elsewhere("of a run: MODEL brings its tokenizer"),
    "device": _RUN_DEVICE,
    "model_parallel": _RUN_DEVICE,
    "fp16": _RUN_DEVICE,
    "half": _RUN_DEVICE,
    "max_length": _elsewhere("nothing is cut: what is too long is refused"),
    "batch_size": _batch_size,
    # ROME, MEMIT and what follows them
    "layers": _layers,
    "layer_selection": _only(
        "all", "the layers that are named", "here it is always the layers that are named"
    ),
    "fact_token": _only(
        "subject_last",
        "keys and targets are those of the subject's last token",
        "keys and targets here are always those of the subject's last token: this is another method",
    ),
    "v_num_grad_steps": _steps,
    "v_lr": _real_field("learning_rate"),
    "v_loss_layer": _elsewhere("the loss is taken behind the last block"),
    "v_weight_decay": _real_field("weight_decay"),
    "clamp_norm_factor": _real_field("clamp"),
    "kl_factor": lambda file, value: (
        _real_field("kl_factor")(file, value)
        if "kl_factor" in file.has
        else ({}, "none" if value else "as here", f"{file.method} has no such term")
    ),
    "mom2_adjustment": _adjustment,
    "mom2_update_weight": _prior_weight,
    "mom2_dataset": _STATISTICS,
    "mom2_n_samples": _STATISTICS,
    "mom2_dtype": _STATISTICS,
    "stats_dir": _STATISTICS,
    "context_template_length_params": _context_lengths,
    "rewrite_module_tmp": _written,
    "rewrite_module_tmps": _FOUND,
    "layer_module_tmp": _FOUND,
    "mlp_module_tmp": _FOUND,
    "attn_module_tmp": _FOUND,
    "ln_f_module": _FOUND,
    "lm_head_module": _FOUND,
    # AlphaEdit, SPHERE, EMMET, PMET, R-ROME
    "nullspace_threshold": _threshold,
    "L2": _real_field("l2"),
    "P_loc": _elsewhere("P is made from the key statistics"),
    "suppression_strength": _suppression,
    "cumulative_ratio": _elsewhere("β, in delta_projection beside α (suppression_strength)"),
    "emmet_lambda": _real_field("epsilon", "ε"),
    "update_norm_lambda": _norm_weight,
    "prob_cutoff": _looks_as_argmax,
    "nll_loss_factor": _only(
        1, "the NLL weighs 1", "the NLL weighs 1; kl_factor and weight_decay weigh against it"
    ),
    "enable_prompt_keys": _only(False, "r-rome", "rome has the bare prompt's key"),
    "enable_random_prefix_keys": _only(True, "r-rome", "r-rome has the mean key over contexts"),
    "original_implementation": _only(False, "r-rome", "that is rome"),
    # Fine-tuning
    "num_steps": _sets("steps", "of Adam"),
    "lr": _real_field("learning_rate"),
    "weight_decay": _only(0, "there is none", "fine-tuning here has none"),
    "norm_constraint": _norm_constraint,
    "objective_optimization": _objective,
    # GRACE
    "inner_params": _modules,
    "edit_lr": _real_field("learning_rate"),
    "n_iter": _sets("steps", "of Adam"),
    "eps": _real_field("epsilon", "the radius of a new entry"),
    "dist_fn": _only("euc", "distances are Euclidean", "distances here are Euclidean"),
    "val_init": _only(
        "warm", "a value begins with the layer's own output", "here it begins with the layer's own output"
    ),
    "val_train": _only("sgd", "a value is searched by its gradient", "here it is searched by its gradient"),
    "val_reg": _CODEBOOK,
    "reg": _CODEBOOK,
    "replacement": _CODEBOOK,
    "eps_expand": _CODEBOOK,
    "num_pert": _CODEBOOK,
    "dropout": _only(0, "there is none", "there is none here"),
    # KN
    "p": _kn_only(_real_field("share")),
    "adaptive_threshold": _kn_only(_real_field("threshold")),
    "steps": _kn_only(_integral),
    "refine": _kn_only(_refine),
    "lr_scale": _kn_only(_nothing("columns are rewritten by the lengths of column and embedding")),
    "n_toks": _kn_only(_nothing("an answer is represented by its first token")),
    # UltraEdit
    "token": _only(
        "ans",
        "the positions that predict an answer's tokens",
        "here: those that predict an answer's tokens, not all",
    ),
    "no_grad_layers": _nothing("gradients are taken where they are needed"),
    "batch_size_once": _elsewhere("how many go through the model together is chosen by the device"),
    "editor_batch_size": _elsewhere("how many go through the model together is chosen by the device"),
    "silent": _elsewhere("of a run"),
    "results_dir": _elsewhere("of a run: --out"),
}


def summary(imported: Imported) -> Iterator[str]:
    """What became of each name, in lines: what is set, what has no counterpart, what is so in any case."""
    from d4s.figures.tables import aligned

    parts: tuple[tuple[Kind, str], ...] = (
        ("set", f"fields of {imported.preset.method}"),
        ("none", "without a counterpart"),
        ("as here", "nothing to set"),
    )
    for kind, head in parts:
        rows = [row for row in imported.rows if row.kind == kind]
        if not rows:
            continue
        columns = [("", [f"{row.name}: {_spelled(row.value)}" for row in rows])]
        if kind == "set":
            became = (", ".join(f"{n}={_spelled(v)}" for n, v in row.fields.items()) for row in rows)
            columns.append(("", list(became)))
        columns.append(("", [row.why for row in rows]))
        yield head
        yield from (f"  {line}" for line in aligned(columns, numbers=False)[1:])


def _spelled(value: Any) -> str:
    text = " ".join(str(value).split()) if not isinstance(value, bool) else str(value).lower()
    return text if len(text) <= 40 else f"{text[:39]}…"
