"""Patches of mixtures of experts: bit for bit there and back, of the experts that changed and of no other."""

from __future__ import annotations

import json

import pytest
import torch
from support.patches import DTYPES, all_bits, changed_, interrupted, refused, same
from support.sequences import EDITS, FAST, ready, sequence
from support.tiny import tiny_model

from d4s.errors import DataError, ModelError
from d4s.journal.changes import Change, changes_between, changes_of
from d4s.journal.journal import Journal
from d4s.journal.lora import export_gguf_lora, export_lora
from d4s.journal.patch import FORMAT, apply_patch, export_patch, read_patch, remove_patch
from d4s.journal.stored_bits import bits
from d4s.locate.covariance import fingerprint_of
from d4s.models.architectures import Anatomy
from d4s.tensor_files import load_tensors, save_tensors

OF_EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss")  # the last keeps its matrices as [d_in, d_out]


def experts_that_differ(base: dict[str, torch.Tensor], edited: dict[str, torch.Tensor]) -> set[str]:
    return {
        f"{name}[{expert}]"
        for name, stored in base.items()
        if stored.ndim == 3
        for expert in range(len(stored))
        if not torch.equal(stored[expert], edited[name][expert])
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model_type", OF_EXPERTS)
@pytest.mark.parametrize("known", [True, False], ids=["factors known", "two models"])
def test_experts_are_bit_for_bit_what_they_were(tmp_path, seed, dtype, model_type, known):
    base, edited = (tiny_model(model_type, 3, dtype) for _ in range(2))
    changes = changed_(edited, seed, {(0, 2): 1, (2, 0): 3, (2, 3): 1})
    before, after = all_bits(base), all_bits(edited)
    path = tmp_path / "p.safetensors"
    found = changes_between(base, edited)
    assert [(c.name, c.expert, c.transposed) for c in found] == [
        (c.name, c.expert, model_type == "gpt_oss") for c in changes
    ]
    sizes = export_patch(changes if known else found, path, fingerprint=fingerprint_of(base), edits=EDITS[:2])
    patch = apply_patch(base, path)
    assert same(all_bits(base), after) and patch.edits == EDITS[:2]
    named = {f"model.layers.{i}.mlp.experts.down_proj[{j}]" for i, j in ((0, 2), (2, 0), (2, 3))}
    assert (
        {weight.label for weight in patch.weights}
        == set(sizes)
        == experts_that_differ(before, after)
        == named
    )
    remove_patch(base, path)
    assert same(all_bits(base), before)


def test_an_expert_that_no_edit_reached_costs_nothing(tmp_path, seed):
    """As large as a patch of one dense weight of that shape, however many experts there are."""
    bytes_written = []
    for count in (2, 6):
        model = tiny_model("qwen3_moe", 3, num_experts=count, num_experts_per_tok=2)
        path = tmp_path / f"{count}.safetensors"
        changes = changed_(model, seed, {(1, 1): 2})
        delta = torch.rand(changes[0].base.shape, generator=torch.Generator().manual_seed(seed))
        whole = Change(changes[0].name, changes[0].base, changes[0].base + delta, expert=1)
        assert export_patch([whole], path, fingerprint="a") == {whole.label: whole.base.numel() * 4}
        bytes_written.append(path.stat().st_size)
        (weight,) = read_patch(path).weights
        assert weight.shape == changes[0].shape == (32, 24) and weight.expert == 1
    assert bytes_written[0] == bytes_written[1]


def test_a_change_of_few_factors_is_small_for_an_expert_too(tmp_path, seed):
    """Also where it lies as [d_in, d_out], and of a width that is not d_out."""
    model = tiny_model("gpt_oss", 3, hidden_size=128, intermediate_size=192, head_dim=32)
    changes = changed_(model, seed, {(1, 3): 1})
    path = tmp_path / "p.safetensors"
    (size,) = export_patch(changes, path, fingerprint="a").values()
    (weight,) = read_patch(path).weights
    assert weight.transposed and weight.shape == (192, 128) and weight.exponent is not None
    assert size < 0.6 * changes[0].base.nbytes


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_a_sequence_becomes_a_patch_and_so_does_its_journal(tmp_path, seed, model_type):
    """In deepseek_v3 the first of the edited blocks is dense."""
    model, covariance = ready(seed, model_type, torch.bfloat16)
    unedited, before = fingerprint_of(model), all_bits(model)
    result = sequence(model, covariance, EDITS[:2], config=FAST | dict(layers=[0, 1]), journal=tmp_path / "j")
    after = all_bits(model)
    path, journals = tmp_path / "p.safetensors", tmp_path / "j.safetensors"
    export_patch(changes_of(result), path, fingerprint=unedited, edits=EDITS[:2])
    Journal(tmp_path / "j").export_patch(journals)
    result.restore()
    assert same(all_bits(model), before)
    for file in (path, journals):
        patch = apply_patch(model, file)
        assert same(all_bits(model), after) and [edit.id for edit in patch.edits] == ["e0", "e1"]
        reached = experts_that_differ(before, after)
        assert {weight.label for weight in patch.weights if weight.expert is not None} == reached
        dense = [weight.name for weight in patch.weights if weight.expert is None]
        assert dense == ([Anatomy(model).weight_name(0)] if model_type == "deepseek_v3" else [])
        remove_patch(model, file)
        assert same(all_bits(model), before)
    with pytest.raises(ModelError, match="no weight differs"):
        changes_of(result)


def exported(tmp_path, seed: int, model_type: str = "mixtral"):
    """(unedited model, edited model, patch)"""
    base, edited = (tiny_model(model_type, 3) for _ in range(2))
    changed_(edited, seed, {(0, 1): 1, (2, 3): 2})
    path = tmp_path / "p.safetensors"
    export_patch(changes_between(base, edited), path, fingerprint=fingerprint_of(base))
    return base, edited, path


def test_a_patch_of_experts_is_refused_where_it_does_not_belong(tmp_path, seed):
    base, edited, path = exported(tmp_path, seed)
    name = Anatomy(base).weight_name
    other = tiny_model("mixtral", 4)
    refused(apply_patch, other, path, r"another model: .*layers\.0.*down_proj\[1\] is not the unedited")
    refused(apply_patch, tiny_model("llama", 3), path, f"no parameter '{name(0)}'")
    fewer = tiny_model("mixtral", 3, num_local_experts=3)
    refused(apply_patch, fewer, path, r"it changes expert 3 of .*layers\.2.*, which has 3 here")
    narrow = tiny_model("mixtral", 3, intermediate_size=40)
    refused(apply_patch, narrow, path, r"is .experts, 32, 48. there and .4, 32, 40. here")
    refused(
        apply_patch, tiny_model("mixtral", 3, torch.bfloat16), path, "load the model with dtype='float32'"
    )
    refused(apply_patch, edited, path, "applied to this model already")
    refused(remove_patch, base, path, r"not applied to this model: .*down_proj\[1\] is the unedited model's")
    Anatomy(base).weight(0).data[0, 0, 0] += 1  # an expert that the patch does not change
    refused(
        apply_patch, base, path, "the 2 weights that it changes are as they should be, and others are not"
    )
    Anatomy(edited).weight(0).data[0, 0, 0] += 1
    remove_patch(edited, path)  # what else was changed since stays
    assert same(all_bits(edited), all_bits(base))


def test_a_patch_of_which_one_expert_was_changed_since_is_neither_applied_nor_removed(tmp_path, seed):
    base, _, path = exported(tmp_path, seed)
    apply_patch(base, path)
    Anatomy(base).weight(2).data[3, 0, 0] += 1
    refused(remove_patch, base, path, r"layers\.2.*\[3\] was changed since")
    refused(apply_patch, base, path, r"layers\.0.*\[1\] has this patch already")


def test_a_failure_while_experts_are_written_leaves_all_of_them(tmp_path, seed, monkeypatch):
    base, _, path = exported(tmp_path, seed)
    interrupted(monkeypatch, apply_patch, base, path, Anatomy(base).weight(2)[3])


def test_hostile_numbers_of_experts_are_refused(tmp_path, seed):
    """Each file is whole and has its digest: who makes it can do that."""
    base, _, path = exported(tmp_path, seed)
    file = load_tensors(path, FORMAT, "", DataError)

    def hostile(match: str, error=DataError, **changes) -> None:
        records = json.loads(file.facts["weights"])
        records[0] |= changes
        records[0] = {n: v for n, v in records[0].items() if v != "nothing"}
        save_tensors(path, file.tensors, {**file.facts, "weights": json.dumps(records)})
        refused(apply_patch, base, path, match, error)

    for number in (-1, 1.0, "1", True, None, 2**40):
        hostile("'expert' of .* must be a whole number", expert=number)
    hostile("it changes expert 4 of", ModelError, expert=4)
    hostile("is 'nothing'", expert=2)  # its parts are another's
    hostile(r"is .32, 48. there and .4, 32, 48. here", ModelError, expert="nothing")
    hostile("two whole numbers", shape=[4, 32, 48])
    hostile("must be name, .*, and of an expert's expert", more=1)
    twice = json.loads(file.facts["weights"])
    save_tensors(path, file.tensors, {**file.facts, "weights": json.dumps([*twice, twice[0]])})
    refused(apply_patch, base, path, r"down_proj\[1\]' twice", DataError)


def test_a_patch_of_dense_weights_says_nothing_of_experts(tmp_path, seed):
    """So that it is what it was before experts could be in one."""
    path = tmp_path / "p.safetensors"
    export_patch(changed_(tiny_model("llama", 3), seed, {1: 1}), path, fingerprint="a")
    (record,) = json.loads(load_tensors(path, FORMAT, "", DataError).facts["weights"])
    assert list(record) == ["name", "dtype", "shape", "transposed", "base", "edited", "exponent"]


def test_what_cannot_be_put_into_a_patch_or_adapter_is_said(tmp_path, seed):
    base, edited, path = exported(tmp_path, seed)
    changes = changes_between(base, edited)
    with pytest.raises(ModelError, match=r"adapters take none; write a patch .*save_pretrained"):
        export_lora(changes, tmp_path / "lora", model=base)
    pytest.importorskip("gguf")
    with pytest.raises(ModelError, match=r"down_proj\[1\] is one expert's matrix"):
        export_gguf_lora(changes, tmp_path / "a.gguf", model=base)
    one = changes[0]
    weights = [dict(model.named_parameters())[one.name].detach() for model in (base, edited)]
    for wrong, match in (
        ([Change(one.name, *weights)], "give one change for each that differs"),
        ([one, one], r"down_proj\[1\] is changed twice"),
        ([Change(one.name, one.base, one.edited, expert=-1)], "counted from 0"),
    ):
        with pytest.raises(ModelError, match=match):
            export_patch(wrong, path, fingerprint="a")
    edited.model.layers[0].mlp.gate.weight.data[0] += 1
    with pytest.raises(ModelError, match=r"mlp\.gate\.weight, which editing does not change"):
        changes_between(base, edited)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert torch.equal(bits(one.base), bits(weights[0][1]))
