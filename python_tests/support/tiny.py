"""Tiny random models of every supported type, and a tokenizer for them, built from configurations."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import is_timm_available

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
FREE = {k: v for k, v in LLAMA.items() if k != "head_dim"}  # heads as wide as they come out
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
# The last block takes its keys and values from the one before it.
SHARED = dict(
    LLAMA,
    sliding_window=8,
    layer_types=["sliding_attention", "full_attention", "full_attention"],
    num_kv_shared_layers=1,
    hidden_size_per_layer_input=4,
    vocab_size_per_layer_input=320,
)
GEMMA3N = dict(SHARED, intermediate_size=[48] * 3, activation_sparsity_pattern=[0.0, 0.5, 0.0], laurel_rank=4)
GEMMA4 = dict(SHARED, global_head_dim=8)
MLA = dict(FREE, num_key_value_heads=4, kv_lora_rank=8, q_lora_rank=16, v_head_dim=8) | dict(
    qk_rope_head_dim=4, qk_nope_head_dim=8
)
TOWER = dict(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
)
EAR = dict(hidden_size=16, intermediate_size=16, num_blocks=1, num_attention_heads=2) | dict(
    ext_pw_out_channel=16, depthwise_separable_out_channel=16, nemo_conv_channels=16
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
    "smollm3": dict(FREE, no_rope_layer_interval=2),
    "olmo": FREE,
    "granite": dict(FREE, embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.2)
    | dict(logits_scaling=2.0),
    "granite_swa": dict(FREE, residual_multiplier=0.22, sliding_window=8),
    "cohere": dict(FREE, logit_scale=0.25),
    "cohere2": dict(LLAMA, logit_scale=0.25, sliding_window=8, layer_types=LAYERS),
    "ernie4_5": LLAMA,
    "exaone": LLAMA,
    "hunyuan_v1_dense": LLAMA,
    "seed_oss": LLAMA,
    "ministral": dict(LLAMA, sliding_window=8, layer_types=LAYERS),
    "ministral3": LLAMA,
    "helium": LLAMA,
    "internlm3": LLAMA,
    "cwm": dict(LLAMA, sliding_window=8, layer_types=LAYERS),
    "diffllama": LLAMA,
    "bitnet": FREE,
    "vaultgemma": dict(LLAMA, sliding_window=8, layer_types=LAYERS, query_pre_attn_scalar=8),
    "nemotron": LLAMA,
    "arcee": LLAMA,
    "apertus": FREE,
    "jais2": LLAMA,
    "glm": LLAMA,
    "starcoder2": dict(FREE, sliding_window=8),
    "gpt_bigcode": GPT2,
    "codegen": dict(GPT2, rotary_dim=8),
    "biogpt": NEOX,
    "xglm": dict(d_model=32, ffn_dim=48, num_layers=3, attention_heads=4, max_position_embeddings=128),
    "nanochat": FREE,
    "persimmon": NEOX,
    "olmo3": dict(FREE, sliding_window=8, layer_types=LAYERS),
    "exaone4": dict(LLAMA, sliding_window=8, layer_types=LAYERS),
    "glm4": LLAMA,
    "gemma3n_text": GEMMA3N,
    "gemma4_text": GEMMA4,
    "gemma3": dict(text_config=dict(LLAMA, sliding_window=8), vision_config=TOWER, mm_tokens_per_image=4),
    "gemma3n": dict(text_config=GEMMA3N),
    "gemma4": dict(text_config=GEMMA4, vision_config=None, audio_config=None),
    "phi4_multimodal": dict(FREE, vision_config=dict(TOWER, crop_size=28), audio_config=EAR),
    "youtu": dict(MLA, pad_token_id=None),  # loading it puts zeros at the padding token
    "minicpm3": dict(MLA, scale_emb=2, dim_model_base=16),
    "hyperclovax": dict(LLAMA, residual_multiplier=0.5, attention_multiplier=0.3),
    "mixtral": dict(LLAMA, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": dict(FREE, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24)
    | dict(shared_expert_intermediate_size=40, norm_topk_prob=False),
    "qwen3_moe": dict(LLAMA, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24)
    | dict(norm_topk_prob=True),
    "olmoe": dict(FREE, num_experts=5, num_experts_per_tok=2, norm_topk_prob=False),
    "gpt_oss": dict(LLAMA, num_local_experts=4, num_experts_per_tok=2, sliding_window=8)
    | dict(layer_types=LAYERS),
    "deepseek_v3": dict(MLA, n_routed_experts=6, num_experts_per_tok=3, moe_intermediate_size=24)
    | dict(n_shared_experts=1, n_group=2, topk_group=2, first_k_dense_replace=1, routed_scaling_factor=1.5),
}
# Types of which a block may be a mixture of experts, and is from block 1 on.
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3")
DENSE = tuple(model_type for model_type in CONFIGS if model_type not in EXPERTS)


# Types that stand for all others in the tests of single parts. The whole table goes through test_model_types.py.
REPRESENTATIVE: tuple[str, ...] = (
    *("gpt2", "gptj", "gpt_neo", "gpt_neox", "opt", "bloom", "falcon", "llama", "mistral", "qwen2", "qwen3"),
    *("gemma", "gemma2", "gemma3_text", "phi", "phi3", "olmo2", "stablelm"),
    # Scaled sums and logits; attention beside the MLP; positions from the mask; low-rank keys; another block's keys.
    *("granite", "cohere2", "biogpt", "youtu", "gemma4_text"),
)


def why_not_built(model_type: str) -> str | None:
    """What the installed packages lack for a model of this type; None: nothing."""
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return f"transformers {transformers.__version__} has no {model_type}"
    if model_type == "gemma3n" and not is_timm_available():
        return "gemma3n sees through timm, which is not installed"
    if model_type.startswith("gemma3n") and not hasattr(transformers.cache_utils, "KVSharingDict"):
        return f"{model_type} without a cache is another model in transformers {transformers.__version__}"
    if model_type == "apertus" and transformers.__version__.startswith("5.0."):
        return f"transformers {transformers.__version__} cannot load apertus"
    return None


def tiny_model(model_type: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
    """A random model in evaluation mode; weights large enough that its answers depend on its input.

    Skips the test where the installed packages have no such type.
    """
    if (reason := why_not_built(model_type)) is not None:
        pytest.skip(reason)
    tokenizer = tiny_tokenizer()
    tokens = dict(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    settings = {**CONFIGS[model_type], **changes}
    if "text_config" in settings:  # a model that sees or hears as well
        settings["text_config"] = {**settings["text_config"], **tokens}
    else:
        settings = {**tokens, **settings}
    config = AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype).eval()
