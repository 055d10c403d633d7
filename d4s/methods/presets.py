"""Published configurations by model, and the rule for every other one."""

from __future__ import annotations

from typing import Any

from d4s.architectures import Anatomy
from d4s.targets import TargetConfig

# What tells a model of the literature from its relatives: type, blocks, width, vocabulary.
_KNOWN: dict[tuple[str, int, int, int], str] = {
    ("gpt2", 48, 1600, 50257): "gpt2-xl",
    ("gptj", 28, 4096, 50400): "gpt-j-6b",
    ("llama", 32, 4096, 32000): "llama-2-7b",
    ("llama", 32, 4096, 128256): "llama-3-8b",
}


def model_key(anatomy: Anatomy) -> str | None:
    """"gpt2-xl", "gpt-j-6b", "llama-2-7b", "llama-3-8b", "embedded", or None."""
    config = anatomy.model.config
    if getattr(config, "d4s_embedded", False):
        return "embedded"
    return _KNOWN.get((config.model_type, len(anatomy), config.hidden_size, config.vocab_size))


# MEMIT and its family (methods.md, "Presets used in the literature").
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
        layers=(1,),
        prior_weight=200.0,
        ridge=0.1,
        target=TargetConfig(steps=30, learning_rate=0.3, weight_decay=0.1, clamp=2.0),
    ),
}


def spread_preset(anatomy: Anatomy) -> dict[str, Any]:
    """Layers, prior weight and target optimiser of the MEMIT family.

    Without a published row: up to five layers that end at 26 % of the depth, where the published ones do (8
    of 32); one layer where a norm follows the MLP; λ = d_in, since E[kᵀ C⁻¹ k] = d_in puts prior and one edit
    on the same footing.
    """
    key = model_key(anatomy)
    if key is not None:
        return SPREAD[key]
    last = round(0.26 * len(anatomy))
    last = min(last, len(anatomy) - 1)
    first = last if anatomy.architecture.normed_mlp_output else max(0, last - 4)
    return dict(
        layers=tuple(range(first, last + 1)),
        prior_weight=float(anatomy.shape(last)[1]),
        target=TargetConfig(),
    )


def describe(method: Any) -> dict[str, Any]:
    """What `d4s methods` prints of a method class: paper, what it changes and needs, presets a model."""
    return {
        "paper": method.paper,
        "changes": method.changes,
        "needs": list(method.needs),
        "presets": method.presets(),
    }
