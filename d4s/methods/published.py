"""Which models of the literature are known, and what several methods' presets share.

Each method's own preset stands in its file, and says what is published and what its rule is for every other model;
all rules go by depth and by width alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from types import MappingProxyType, SimpleNamespace
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

MODELS: tuple[str, ...] = tuple(_KNOWN.values())


def model_key(anatomy: Anatomy) -> str | None:
    """A row's name ("gpt2-xl", "gpt-j-6b", "llama-2-7b", "llama-3-8b", "embedded"), or None."""
    if getattr(text_config(anatomy.model), "d4s_embedded", False):
        return "embedded"
    return _row_of(anatomy, _KNOWN)


def _row_of(anatomy: Anatomy, rows: Mapping[tuple[str, int, int, int], str]) -> str | None:
    config = text_config(anatomy.model)
    for (*shape, vocabulary), name in rows.items():
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


# Models for which nothing is published, and on which it was measured (docs/results/smollm2-long.md). SmolLM2-135M: from
# λ 30 to 1,600 nothing moves by more than chance (1,600 changes the weights least; at 3,000 edits get lost), and fewer
# layers than these write as much for up to 18 times the growth of the weights.
_MEASURED: dict[tuple[str, int, int, int], str] = {("llama", 30, 576, 49152): "smollm2-135m"}
MEASURED: dict[str, dict[str, Any]] = {
    "smollm2-135m": dict(layers=(4, 5, 6, 7, 8), prior_weight=1_600.0, target=TargetConfig()),
}


def measured_key(anatomy: Anatomy) -> str | None:
    """The name of a model for which nothing is published and settings were measured ("smollm2-135m"), or None."""
    return _row_of(anatomy, _MEASURED)


def is_known(anatomy: Anatomy) -> bool:
    """Whether settings for this model are published, or were measured."""
    return model_key(anatomy) is not None or measured_key(anatomy) is not None


def spread_preset(anatomy: Anatomy) -> dict[str, Any]:
    """Layers, prior weight and target optimiser of the MEMIT family.

    Without a row, published or measured: up to five layers that end at 26 % of the depth, where the published ones do
    (8 of 32); one layer where a norm follows the MLP; λ by the share of an edit that arrives (`LocateMethod.settled`).
    """
    key = model_key(anatomy)
    if key is not None:
        return SPREAD[key]
    if (measured := measured_key(anatomy)) is not None:
        return MEASURED[measured]
    last = round(0.26 * len(anatomy))
    last = min(last, len(anatomy) - 1)
    first = last if anatomy.architecture.normed_mlp_output else max(0, last - 4)
    return dict(
        layers=tuple(range(first, last + 1)),
        prior_weight=None,
        target=TargetConfig(),
    )


# ROME's and EMMET's layer, where it is published.
_ONE_LAYER = {"gpt2-xl": 17, "gpt-j-6b": 5, "llama-2-7b": 5, "llama-3-8b": 5}


def one_layer(anatomy: Anatomy) -> int:
    """The published layer; else the last one of `spread_preset`."""
    key = model_key(anatomy)
    return _ONE_LAYER[key] if key in _ONE_LAYER else spread_preset(anatomy)["layers"][-1]


class _Published:
    """What presets look at in a model of the literature, without the model."""

    def __init__(self, model_type: str, blocks: int, width: int, vocabulary: int) -> None:
        config = SimpleNamespace(model_type=model_type, hidden_size=width, vocab_size=vocabulary)
        self.model, self.blocks = SimpleNamespace(config=config), blocks

    def __len__(self) -> int:
        return self.blocks


def undone(method: Any) -> str:
    """How a method's edits are taken back."""
    return "one by one" if method.keeps_sums else "all at once"


def describe(method: Any, named: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """What `d4s methods --json` prints of a method class: paper, what it changes and needs, how it is undone,
    presets a model, and for which of these nothing of its own is published. named: fields that go before presets'"""
    return {
        "paper": method.paper,
        "changes": method.changes,
        "needs": list(method.needs),
        "undo": undone(method),
        "not_published": list(method.not_published),
        "presets": {
            name: asdict(method.preset(_Published(*row)).changed(named)) for row, name in _KNOWN.items()
        },
    }


def some_preset(method: Any) -> Any:
    """A method's configuration for one model of the literature; what values a field can have is the same for all."""
    return method.preset(_Published(*next(iter(_KNOWN))))
