"""Published configurations by model, and the rule for every other one.

Each method's function says what is published and what its rule is; all rules go by depth and by width alone.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

from d4s.locate.targets import TargetConfig
from d4s.models.architectures import Anatomy, text_config

# What tells a model of the literature from its relatives: type, blocks, width, and about how many words.
_KNOWN: dict[tuple[str, int, int, int], str] = {
    ("gpt2", 48, 1600, 50257): "gpt2-xl",
    ("gptj", 28, 4096, 50400): "gpt-j-6b",
    ("llama", 32, 4096, 32000): "llama-2-7b",
    ("llama", 32, 4096, 128256): "llama-3-8b",
}
_ADDED_TOKENS = 1_024


def model_key(anatomy: Anatomy) -> str | None:
    """A row's name ("gpt2-xl", "gpt-j-6b", "llama-2-7b", "llama-3-8b", "embedded"), or None."""
    config = text_config(anatomy.model)
    if getattr(config, "d4s_embedded", False):
        return "embedded"
    for (*shape, vocabulary), name in _KNOWN.items():
        near = abs(config.vocab_size - vocabulary) <= _ADDED_TOKENS  # a padding token, a multiple of 64
        if shape == [config.model_type, len(anatomy), config.hidden_size] and near:
            return name
    return None


# MEMIT and its family, as published. The embedded model:
# - layer 0: layers 0 to 2 of its five reach targets, and layer 0 holds the most edits (D4S at 200: .95 on average;
#   layer 1 .84, layer 2 .91 for six times the growth); one layer, since the subject is put together in one;
# - λ 600, between 200, where specificity falls by .05 within 200 edits, and 4,000, where edits no longer take;
# - clamp 1.5: of 100 targets 9 end under p(target) .9; with the published .75 it is 21, with 4 still 8, for a longer δ;
#   15 steps, after which little moves;
# - ridge .1: its corpus is 30,000 tokens;
# - no contexts: it was trained such that a subject's key does not depend on the words before it.
SPREAD: dict[str, dict[str, Any]] = {
    "gpt2-xl": dict(
        layers=(13, 14, 15, 16, 17),
        prior_weight=20_000.0,
        target=TargetConfig(steps=20, learning_rate=0.5, weight_decay=0.5, clamp=0.75),
    ),
    "gpt-j-6b": dict(
        layers=(3, 4, 5, 6, 7, 8),
        prior_weight=15_000.0,
        target=TargetConfig(steps=25, learning_rate=0.5, weight_decay=0.5, clamp=0.75),
    ),
    "llama-2-7b": dict(
        layers=(4, 5, 6, 7, 8),
        prior_weight=15_000.0,
        target=TargetConfig(steps=25, learning_rate=0.5, weight_decay=1e-3, clamp=4.0),
    ),
    "llama-3-8b": dict(
        layers=(4, 5, 6, 7, 8),
        prior_weight=15_000.0,
        target=TargetConfig(steps=25, learning_rate=0.1, weight_decay=0.5, clamp=0.75),
    ),
    "embedded": dict(
        layers=(0,),
        prior_weight=600.0,
        ridge=0.1,
        target=TargetConfig(steps=15, learning_rate=0.5, weight_decay=0.1, clamp=1.5),
        contexts=0,
    ),
}


def spread_preset(anatomy: Anatomy) -> dict[str, Any]:
    """Layers, prior weight and target optimiser of the MEMIT family.

    Without a published row: up to five layers that end at 26 % of the depth, where the published ones do (8
    of 32); one layer where a norm follows the MLP; λ by the share of an edit that arrives (`LocateMethod.settled`).
    """
    key = model_key(anatomy)
    if key is not None:
        return SPREAD[key]
    last = round(0.26 * len(anatomy))
    last = min(last, len(anatomy) - 1)
    first = last if anatomy.architecture.normed_mlp_output else max(0, last - 4)
    return dict(
        layers=tuple(range(first, last + 1)),
        prior_weight=None,
        target=TargetConfig(),
    )


# Models of the literature for which a method's own preset is not published: theirs follows the method's rule.
_ONLY_BY_RULE: dict[str, tuple[str, ...]] = {
    "pmet": ("gpt2-xl", "llama-3-8b"),
    "encore": ("gpt-j-6b",),
    "ultraedit": ("gpt2-xl", "llama-2-7b"),
    "ft-l": ("llama-2-7b", "llama-3-8b"),
    "ft-l-w0": tuple(_KNOWN.values()),
    "ft-m": ("llama-2-7b", "llama-3-8b"),
    "grace": ("llama-3-8b",),
    "kn": tuple(_KNOWN.values()),
}


class _Published:
    """What presets look at in a model of the literature, without the model."""

    def __init__(self, model_type: str, blocks: int, width: int, vocabulary: int) -> None:
        config = SimpleNamespace(model_type=model_type, hidden_size=width, vocab_size=vocabulary)
        self.model, self.blocks = SimpleNamespace(config=config), blocks

    def __len__(self) -> int:
        return self.blocks


def describe(method: Any) -> dict[str, Any]:
    """What `d4s methods --json` prints of a method class: paper, what it changes and needs, how it is undone,
    presets a model, and for which of these nothing of its own is published."""
    return {
        "paper": method.paper,
        "changes": method.changes,
        "needs": list(method.needs),
        "undo": method.undo,
        "not_published": list(_ONLY_BY_RULE.get(method.name, ())),
        "presets": {name: asdict(method.preset(_Published(*row))) for row, name in _KNOWN.items()},
    }


# ROME's and EMMET's layer, where it is published.
_ONE_LAYER = {"gpt2-xl": 17, "gpt-j-6b": 5, "llama-2-7b": 5, "llama-3-8b": 5}


def one_layer(anatomy: Anatomy) -> int:
    """The published layer; else the last one of `spread_preset`."""
    key = model_key(anatomy)
    return _ONE_LAYER[key] if key in _ONE_LAYER else spread_preset(anatomy)["layers"][-1]


def rome_preset(anatomy: Anatomy) -> dict[str, Any]:
    """Llama-2 and -3: 25 steps, weight decay 1e-3, C = I. gpt2-xl, GPT-J and all others: 20 steps, .5, C."""
    key = model_key(anatomy)
    layers = (one_layer(anatomy),)
    if key == "embedded":
        return dict(layers=layers) | {name: SPREAD[key][name] for name in ("target", "ridge", "contexts")}
    if key in ("llama-2-7b", "llama-3-8b"):
        target = TargetConfig(steps=25, learning_rate=0.5, weight_decay=1e-3, clamp=4.0)
        return dict(layers=layers, target=target, identity_covariance=True)
    return dict(layers=layers, target=TargetConfig(steps=20, learning_rate=0.5, weight_decay=0.5, clamp=4.0))


def emmet_preset(anatomy: Anatomy) -> dict[str, Any]:
    """One layer, targets as MEMIT's. λ without a row: MEMIT's over ε, so that both weigh the prior alike."""
    spread = spread_preset(anatomy)
    known = {"gpt2-xl": 10_000.0, "gpt-j-6b": 100_000.0, "llama-2-7b": 100_000.0, "llama-3-8b": 100_000.0}
    weight = known.get(model_key(anatomy) or "")
    if weight is None and spread["prior_weight"] is not None:
        weight = 10 * spread["prior_weight"]
    return spread | dict(layers=(one_layer(anatomy),), prior_weight=weight)


def pmet_preset(anatomy: Anatomy) -> dict[str, Any]:
    """Layers, λ and target as MEMIT's where nothing else is published; settled targets end early."""
    spread = spread_preset(anatomy)
    key = model_key(anatomy)
    target = spread["target"]
    if key == "gpt-j-6b":
        spread = spread | dict(prior_weight=6_000.0)
        target = replace(target, steps=30, learning_rate=0.2, kl_factor=1.0)
    elif key == "llama-2-7b":  # as in EasyEdit; the authors' own release has no Llama
        target = TargetConfig(steps=20, learning_rate=0.5, weight_decay=0.5, clamp=1.0)
    return spread | dict(target=replace(target, settled_nll_factor=0.1, settled_kl=0.01))


def encore_preset(anatomy: Anatomy) -> dict[str, Any]:
    """As MEMIT's, but for Llama's targets; λ_n and the updates made after the new object is the argmax everywhere.

    Published for gpt2-xl, Llama-2 and Llama-3. GPT-J: gpt2-xl's; models without a row: Llama-2's λ_n and updates.
    """
    key = model_key(anatomy)
    spread = spread_preset(anatomy)
    target: TargetConfig = spread["target"]
    if key in ("llama-2-7b", "llama-3-8b"):
        target = TargetConfig(steps=25, learning_rate=0.5, weight_decay=0.5, clamp=0.75)
    more = {"gpt2-xl": 3, "gpt-j-6b": 3, "llama-3-8b": 1}.get(key or "", 2)
    norm_weight = 20.0 if key == "llama-3-8b" else 10.0
    return spread | dict(target=replace(target, stop_after_argmax=more), norm_weight=norm_weight)


def alphaedit_preset(anatomy: Anatomy) -> dict[str, Any]:
    """Layers and target as MEMIT's, but for Llama-2's target; L2 10.

    The published threshold, 2e-2, is absolute. Models without a row: the mean eigenvalue of C. Few
    directions hold most of the keys' energy, so that nine in ten or so lie under it. The embedded model: half of
    it, with L2 30, where 92 of 100 neighbours keep their greedy answer over 200 edits (at the mean with L2 10 it is
    82, for the same average; at a fifth of it fewer edits reach their paraphrases, at a twentieth few take).
    """
    key = model_key(anatomy)
    spread = spread_preset(anatomy)
    preset = {k: v for k, v in spread.items() if k not in ("prior_weight", "ridge")}
    if key == "llama-2-7b":
        preset["target"] = TargetConfig(steps=25, learning_rate=0.1, weight_decay=0.5, clamp=0.75)
    if key is None:
        preset |= dict(null_space_threshold=1.0, threshold_is_relative=True)
    elif key == "embedded":
        preset |= dict(null_space_threshold=0.5, threshold_is_relative=True, l2=30.0)
    return preset


def ft_preset(anatomy: Anatomy, *, whole: bool = False) -> dict[str, Any]:
    """Layer 0 with ε 5e-4, GPT-J 5e-5.

    whole: the bound is on all steps together. Nothing is published: the same ε
    The embedded model: the other methods' layer, and the ε at which 50 edits take. A step: 2e-3, efficacy .98 and
    specificity .88 (5e-3: 1.0 and .62; 5e-4: .12 and .98; from 1.25e-2 on, 25 steps of Adam, it binds nothing).
    The whole sequence: 5e-2, 1.0 and .65 (2e-2: .29 and .97).
    """
    key = model_key(anatomy)
    if key == "embedded":
        return dict(layers=(one_layer(anatomy),), epsilon=5e-2 if whole else 2e-3)
    return dict(layers=(0,), epsilon=5e-5 if key == "gpt-j-6b" else 5e-4)


def ultraedit_preset(anatomy: Anatomy) -> dict[str, Any]:
    """Learning rate 1e-6. GPT-J: W of layers 18 to 26. Llama-3: the gate of 11 to 15 and the up projection of 18 to 24.

    Both are those of the release for zsRE and UltraEditBench. For gpt2-xl and Llama-2 nothing is published; they and
    all others have MEMIT's layers and W. The embedded model, whose keys are short: learning rate 2e-3, at which a
    turn of 100 edits takes.
    """
    key = model_key(anatomy)
    if key == "gpt-j-6b":
        return dict(layers=tuple(range(18, 27)), learning_rate=1e-6)
    if key == "llama-3-8b":
        modules = ("mlp.gate_proj",) * 5 + ("mlp.up_proj",) * 7
        return dict(layers=(*range(11, 16), *range(18, 25)), modules=modules, learning_rate=1e-6)
    rate = 2e-3 if key == "embedded" else 1e-6
    return dict(layers=spread_preset(anatomy)["layers"], learning_rate=rate)


def kn_preset(anatomy: Anatomy) -> dict[str, Any]:
    """All layers: the search decides. The embedded model, whose facts hang on more and weaker neurons: threshold
    .05 and share .3, without which few edits take."""
    layers = dict(layers=tuple(range(len(anatomy))))
    return layers | (dict(threshold=0.05, share=0.3) if model_key(anatomy) == "embedded" else {})


def grace_preset(anatomy: Anatomy) -> dict[str, Any]:
    """Published: late layers. Without a row: 85 % of the depth, W; the embedded model: its last layer."""
    key = model_key(anatomy)
    if key == "gpt2-xl":
        return dict(layers=(35,), module="mlp_input")
    last = len(anatomy) - 1
    known = {"gpt-j-6b": 25, "llama-2-7b": 27, "embedded": last}
    return dict(layers=(known.get(key or "", min(last, round(0.85 * len(anatomy)))),))
