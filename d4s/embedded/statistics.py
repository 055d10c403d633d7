"""Key statistics of the embedded model, over what it was trained on."""

from __future__ import annotations

from random import Random
from typing import Any

from d4s.embedded import folder
from d4s.embedded.facts import facts_of, read_records
from d4s.locate.covariance import Covariance, estimate_covariance
from d4s.models.causal_lm import CausalLM


def demo_covariance(
    model: CausalLM, tokenizer: Any, *, layers: tuple[int, ...], progress: bool = False
) -> Covariance:
    """Key statistics over sentences of the facts that the embedded model was trained on, in a seeded order."""
    sentences = facts_of(read_records(folder() / "counterfact.json")).sentences
    texts = [f"{s.text} {s.object}" for s in sentences]
    Random(0).shuffle(texts)
    return estimate_covariance(model, tokenizer, texts, layers=layers, tokens=30_000, progress=progress)
