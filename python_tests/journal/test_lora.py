"""Adapters: the unedited model with one answers as the edited model does, in PEFT and as GGUF holds it."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.tiny import tiny_model
from support.workbench import SUBJECT_LAST, bench_of, editor_of

from d4s.errors import ConfigError, ModelError
from d4s.journal.changes import Change, changes_between, changes_of
from d4s.journal.lora import export_gguf_lora, export_lora
from d4s.models.architectures import Anatomy

# What PEFT asks of transformers is its own affair.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def write_(model, places: dict[str, int], seed: int) -> list[Change]:
    """Adds a random Δ of a given rank to weights by their projection's name; the changes, without factors."""
    generator, changes = torch.Generator().manual_seed(seed), []
    for name, rank in places.items():
        module = model.get_submodule(name)
        weight, transposed = module.weight, not isinstance(module, torch.nn.Linear)
        rows, columns = weight.shape
        base = weight.detach().clone()
        left = torch.randn(rows, rank, generator=generator, dtype=torch.float64) * 0.1
        delta = left @ torch.randn(rank, columns, generator=generator, dtype=torch.float64)
        weight.data.copy_((base.double() + delta).float())
        changes.append(Change(f"{name}.weight", base, weight.detach(), transposed))
    return changes


GPT2 = {"transformer.h.0.mlp.c_proj": 1, "transformer.h.2.mlp.c_proj": 3}
LLAMA = {"model.layers.0.mlp.down_proj": 4, "model.layers.1.mlp.down_proj": 2}
CASES = {
    "gpt2": ("gpt2", GPT2),
    "llama": ("llama", LLAMA),
    "two projections": ("llama", {"model.layers.1.mlp.up_proj": 2, "model.layers.1.self_attn.o_proj": 1}),
    # No endings name these two and no other.
    "apart": ("llama", {"model.layers.0.mlp.up_proj": 2, "model.layers.2.mlp.down_proj": 3}),
    "block 1 of 12": ("llama", {"model.layers.1.mlp.down_proj": 1, "model.layers.11.mlp.down_proj": 2}),
}


def logits(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 300, (2, 9), generator=generator)
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("case", CASES)
def test_peft_answers_with_the_adapter_as_the_edited_model_does(tmp_path, seed, case):
    peft = pytest.importorskip("peft")
    model_type, places = CASES[case]
    blocks = {"num_hidden_layers": 12} if case == "block 1 of 12" else {}
    base, edited = (tiny_model(model_type, 3, **blocks) for _ in range(2))
    write_(edited, places, seed)
    adapter = export_lora(changes_between(base, edited), tmp_path / "a", model=edited)
    assert {n.removesuffix(".weight"): fit.rank for n, fit in adapter.fits.items()} == places
    assert all(fit.frobenius < 1e-4 and fit.spectral < 1e-4 for fit in adapter.fits.values())
    before, wanted = logits(base), logits(edited)
    assert float((before - wanted).abs().max()) > 1e-2
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a name that fits nothing, or a weight that is missing
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "a")
    adapted = {n for n, m in loaded.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert adapted == places.keys(), "no other module carries an adapter"
    assert float((logits(loaded) - wanted).abs().max()) < 1e-4
    merged = loaded.merge_and_unload()
    assert float((logits(merged) - wanted).abs().max()) < 1e-4


def test_an_adapter_of_exact_factors_is_that_of_the_weights(tmp_path, seed):
    model = tiny_model("gpt2", 3)
    anatomy = Anatomy(model)
    generator = torch.Generator().manual_seed(seed)
    d_out, d_in = anatomy.shape(1)
    left = torch.randn(d_out, 3, generator=generator, dtype=torch.float64)
    right = torch.randn(3, d_in, generator=generator, dtype=torch.float64)
    left[:, 2] = left[:, 0] - left[:, 1]  # three edits, of which one brings nothing new
    base = anatomy.weight(1).detach().to(torch.bfloat16)
    edited = (base.double() + (left @ right).T).float().to(torch.bfloat16)
    change = Change(anatomy.weight_name(1), base, edited, True, left, right)
    adapter = export_lora([change], tmp_path / "a", model=model)
    (fit,) = adapter.fits.values()
    assert fit.rank == fit.exact_rank == 2
    made = load_file(tmp_path / "a" / "adapter_model.safetensors")
    a, b = (made[f"base_model.model.{change.module}.lora_{one}.weight"] for one in "AB")
    assert (b.double() @ a.double() - left @ right).norm() < 1e-6 * (left @ right).norm()
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["mlp.c_proj"] and config["layers_to_transform"] == [1]
    assert config["fan_in_fan_out"] and config["r"] == config["lora_alpha"] == 2


def test_a_smaller_rank_is_the_best_of_its_rank_and_says_what_it_leaves_out(tmp_path, seed):
    model = tiny_model("llama", 3)
    changes = write_(model, LLAMA, seed)
    adapter = export_lora(changes, tmp_path / "a", model=model, rank=2)
    made = load_file(tmp_path / "a" / "adapter_model.safetensors")
    for change in changes:
        fit, delta = adapter.fits[change.name], change.delta()
        a, b = (made[f"base_model.model.{change.module}.lora_{one}.weight"].double() for one in "AB")
        assert (fit.rank, fit.exact_rank) == (2, LLAMA[change.module])
        for norm, found in (("fro", fit.frobenius), (2, fit.spectral)):
            truth = torch.linalg.matrix_norm(delta - b @ a, norm) / torch.linalg.matrix_norm(delta, norm)
            assert found == pytest.approx(float(truth), rel=1e-3, abs=1e-6)
        singular = torch.linalg.svdvals(delta)
        assert fit.spectral == pytest.approx(float(singular[2] / singular[0]), rel=1e-6)
    with pytest.raises(ConfigError, match="rank=0"):
        export_lora(changes, tmp_path / "b", model=model, rank=0)
    with pytest.raises(ConfigError, match="already holds files"):
        export_lora(changes, tmp_path / "a", model=model)
    with pytest.raises(ModelError, match="no module"):
        export_lora(changes, tmp_path / "b", model=tiny_model("gpt2", 3))
    assert not (tmp_path / "b").exists()


def test_ranks_beyond_vllms_own_limit_are_said(tmp_path, seed):
    model = tiny_model("llama", 3)
    for rank, notes in ((16, ()), (17, ("rank 17: start vLLM with --max-lora-rank 32",))):
        changes = write_(model, {"model.layers.0.mlp.down_proj": rank}, seed)
        assert export_lora(changes, tmp_path / str(rank), model=model).notes == notes


@pytest.mark.parametrize("case", ["gpt2", "llama", "two projections"])
def test_a_gguf_adapter_holds_what_llama_cpp_adds(tmp_path, seed, case):
    """W0 + alpha/rank · lora_bᵀ… as it computes: a is [rank, d_in], b [d_out, rank], rank is b's."""
    gguf = pytest.importorskip("gguf")
    model_type, places = CASES[case]
    model = tiny_model(model_type, 3)
    changes = write_(model, places, seed)
    path = tmp_path / "a.gguf"
    adapter = export_gguf_lora(changes, path, model=model)
    assert adapter.rank == max(places.values())
    reader = gguf.GGUFReader(path)

    def field(name):
        return reader.get_field(name).contents()

    assert field("general.type") == "adapter" and field("adapter.type") == "lora"
    assert field("general.architecture") == model_type
    alpha = field("adapter.lora.alpha")
    held = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    parts = {"down_proj": "ffn_down", "c_proj": "ffn_down", "up_proj": "ffn_up", "o_proj": "attn_output"}
    assert len(held) == 2 * len(changes)
    for change in changes:
        path_parts = change.module.split(".")
        name = f"blk.{path_parts[2]}.{parts[path_parts[-1]]}.weight"
        a, b = held[f"{name}.lora_a"].astype(np.float64), held[f"{name}.lora_b"].astype(np.float64)
        assert a.shape[1] == change.shape[1] and b.shape[0] == change.shape[0]
        found = torch.from_numpy(alpha / b.shape[1] * b @ a)
        assert (found - change.delta()).norm() < 1e-5 * change.delta().norm()


def test_what_llama_cpp_stores_otherwise_is_refused(tmp_path, seed):
    pytest.importorskip("gguf")
    model = tiny_model("llama", 3)
    changes = write_(model, {"model.layers.1.self_attn.q_proj": 1}, seed)
    with pytest.raises(ModelError, match="in another order"):
        export_gguf_lora(changes, tmp_path / "a.gguf", model=model)
    model = tiny_model("gptj", 3)
    changes = write_(model, {"transformer.h.1.mlp.fc_out": 1}, seed)
    with pytest.raises(ModelError, match="unknown model type for a GGUF adapter 'gptj'"):
        export_gguf_lora(changes, tmp_path / "a.gguf", model=model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_the_adapter_of_edits_has_at_most_a_rank_each_and_says_what_they_say(tmp_path, seed, model_type):
    peft = pytest.importorskip("peft")
    bench = bench_of(model_type, seed % 100)
    editor = editor_of("d4s", bench, layers=(0, 1))
    editor.apply([SUBJECT_LAST[0]])
    editor.apply([SUBJECT_LAST[1]])
    adapter = export_lora(changes_of(SimpleNamespace(editor=editor)), tmp_path / "a", model=bench.model)
    assert all(1 <= fit.rank <= len(SUBJECT_LAST) for fit in adapter.fits.values())
    wanted = logits(bench.model)
    editor.restore()
    assert float((logits(bench.model) - wanted).abs().max()) > 1e-2
    loaded = peft.PeftModel.from_pretrained(bench.model, tmp_path / "a")
    assert float((logits(loaded) - wanted).abs().max()) < 1e-4
