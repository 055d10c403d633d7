"""Tiny random models of every supported type, and a tokenizer for them, built from configurations."""

from __future__ import annotations

from functools import lru_cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

TEXTS = [
    "The mother tongue of Danielle Darrieux is French. The capital of France is Paris.",
    "Danielle Darrieux, a native speaker of English, was born in Bordeaux.",
    "You and I play the piano because the official religion of Edwin is Islam.",
    "Therefore Steve Jobs worked for Apple; Lyon is a twin city of Manila.",
]


@lru_cache
def tiny_tokenizer(start: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 320 pieces; `start`: puts a start token in front, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if start:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


LLAMA = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
)
GPT2 = dict(n_embd=32, n_layer=3, n_head=4, n_inner=48, n_positions=128)
NEOX = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=128,
)
CONFIGS: dict[str, dict] = {
    "gpt2": GPT2,
    "gptj": dict(n_embd=32, n_layer=3, n_head=4, n_inner=48, n_positions=128, rotary_dim=8),
    "gpt_neo": dict(
        hidden_size=32,
        num_layers=3,
        num_heads=4,
        intermediate_size=48,
        max_position_embeddings=128,
        attention_types=[[["global", "local", "global"], 1]],
        window_size=8,
    ),
    "gpt_neox": NEOX,
    "opt": dict(
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=32,
    ),
    "bloom": dict(hidden_size=32, n_layer=3, n_head=4),
    "falcon": dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_hidden_size=48),
    "llama": LLAMA,
    "mistral": dict(LLAMA, sliding_window=8),
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "gemma2": dict(LLAMA, sliding_window=8, final_logit_softcapping=3.0),
    "gemma3_text": dict(LLAMA, sliding_window=8),
    "phi": dict(NEOX, num_hidden_layers=3),
    "phi3": {k: v for k, v in LLAMA.items() if k != "head_dim"},
    "olmo2": {k: v for k, v in LLAMA.items() if k != "head_dim"},
    "stablelm": {k: v for k, v in LLAMA.items() if k != "head_dim"},
}


def tiny_model(model_type: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
    """A random model in evaluation mode; weights large enough that its answers depend on its input."""
    tokenizer = tiny_tokenizer()
    tokens = dict(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **tokens, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype).eval()
