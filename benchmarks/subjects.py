"""What model claims are measured on: the embedded model on a CPU, a Llama-3-8B-shaped random one on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from d4s.edits import Edit
from d4s.embedded import load_demo_edits
from d4s.models.architectures import Anatomy
from d4s.models.loading import load_model
from d4s.models.prompts import generate_contexts


def subject_of_measurement(
    device: torch.device, *, count: int
) -> tuple[Anatomy, Any, Sequence[Edit], tuple[str, ...], int]:
    """(model, tokenizer, edits, contexts, edited layer); the tokenizer and edits are the embedded model's."""
    model, tokenizer = load_model("embedded")
    edits = load_demo_edits(count)
    prefixes = generate_contexts(model, tokenizer)
    if device.type == "cpu":
        return Anatomy(model), tokenizer, edits, prefixes, 0
    large = random_llama(
        device,
        torch.bfloat16,
        vocab_size=128_256,
        hidden_size=4_096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8_192,
        rope_theta=500_000.0,
    )
    return Anatomy(large), tokenizer, edits, prefixes, 8


def of_smollm2s_shape(device: torch.device) -> Any:
    """A random model of SmolLM2-135M's shape, float32."""
    return random_llama(
        device,
        torch.float32,
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1_536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )


def random_llama(device: torch.device, dtype: torch.dtype, **shape: Any) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM._from_config(LlamaConfig(**shape), dtype=dtype).eval()
