"""Patches: bit for bit there and back, refused where they do not belong, and never half applied."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from support.patches import DTYPES, all_bits, changed_, interrupted, refused, same
from support.tiny import tiny_model
from support.workbench import EDITS, SUBJECT_LAST, bench_of, editor_of

import d4s
from d4s.errors import D4SError, DataError, ModelError
from d4s.journal.changes import Change, changes_between, changes_of
from d4s.journal.edits_card import read_edits_card, write_edits_card
from d4s.journal.patch import FORMAT, apply_patch, export_patch, read_patch, remove_patch
from d4s.journal.stored_bits import Step, _change, _gaps, _places, bits, dense, factored, taken
from d4s.locate.covariance import fingerprint_of
from d4s.models.architectures import Anatomy
from d4s.tensor_files import load_tensors, save_tensors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
@pytest.mark.parametrize("known", [True, False], ids=["factors known", "two models"])
def test_applied_and_removed_a_model_is_bit_for_bit_what_it_was(tmp_path, seed, dtype, model_type, known):
    base, edited = (tiny_model(model_type, 3, dtype) for _ in range(2))
    changes = changed_(edited, seed, {0: 1, 2: 3})
    before, after = all_bits(base), all_bits(edited)
    path = tmp_path / "p.safetensors"
    changes = changes if known else changes_between(base, edited)
    export_patch(changes, path, fingerprint=fingerprint_of(base), edits=EDITS)
    patch = apply_patch(base, path)
    assert same(all_bits(base), after) and patch.edits == EDITS
    assert [weight.name for weight in patch.weights] == sorted(change.name for change in changes)
    remove_patch(base, path)
    assert same(all_bits(base), before)


@pytest.mark.parametrize("method", ["d4s", "ft-m"])
def test_a_sequence_of_edits_becomes_a_patch(tmp_path, seed, method):
    bench = bench_of("llama", 5)
    unedited, before = fingerprint_of(bench.model), all_bits(bench.model)
    editor = editor_of(method, bench, layers=(1,))
    editor.apply(list(SUBJECT_LAST))
    after = all_bits(bench.model)

    result = SimpleNamespace(editor=editor)
    changes = changes_of(result)
    path = tmp_path / "p.safetensors"
    export_patch(changes, path, fingerprint=unedited, edits=SUBJECT_LAST)
    editor.restore()
    assert same(all_bits(bench.model), before)
    apply_patch(bench.model, path)
    assert same(all_bits(bench.model), after)
    remove_patch(bench.model, path)
    assert same(all_bits(bench.model), before)
    with pytest.raises(ModelError, match="no weight differs"):
        changes_of(result)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_step_of_few_factors_is_small_and_exact_both_ways(seed, dtype, transposed):
    generator = torch.Generator().manual_seed(seed)
    d_out, d_in, rank = 256, 384, 2
    left = torch.randn(d_out, rank, generator=generator, dtype=torch.float64) * 1e-3
    right = torch.randn(rank, d_in, generator=generator, dtype=torch.float64)
    delta = (left @ right).T if transposed else left @ right
    base = (torch.randn(delta.shape, generator=generator) * 0.02).to(dtype)
    base[0, :5] = torch.tensor([0.0, -0.0, 1e-30, 6e-8, 0.5]).to(dtype)
    edited = (base.double() + delta).to(torch.float32).to(dtype)
    step, whole = factored(base, edited, left, right, transposed), dense(base, edited)
    for one in (step, whole):
        assert torch.equal(bits(taken(one, base, transposed)), bits(edited))
        assert torch.equal(bits(taken(one, edited, transposed, back=True)), bits(base))
    assert step.bytes < 0.6 * whole.bytes
    change = Change("w", base, edited, transposed)
    found = change.factors
    again = factored(base, edited, *found.halves(found.rank), transposed)
    assert found.rank == rank and again.bytes < whole.bytes
    assert torch.equal(bits(taken(again, base, transposed)), bits(edited))


@pytest.mark.parametrize("places", [(), (0,), (254,), (255,), (256,), (0, 1, 511, 766, 1022, 10_000)])
def test_places_of_corrections_are_kept_as_gaps(places):
    at = torch.tensor(places, dtype=torch.int64)
    assert torch.equal(_places(_gaps(at)), at)


def test_the_predicted_change_does_not_depend_on_the_order_of_its_sums(seed):
    """Each sum is exact in float64."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(16, 40, generator=generator, dtype=torch.float64)
    right = torch.randn(40, 24, generator=generator, dtype=torch.float64) * 1e-3
    base = torch.randn(16, 24, generator=generator)
    step = factored(base, (base.double() + left @ right).float(), left, right, False)
    order = torch.randperm(40, generator=generator)
    other = {"left": step.parts["left"][:, order], "right": step.parts["right"][order]}
    found, again = _change(step, False), _change(Step(other, step.exponent), False)
    assert torch.equal(found, again)
    assert (found - left @ right).abs().max() < 1e-11 * (left @ right).abs().max()
    plain = other["left"].double() @ other["right"].double() * 2.0**step.exponent
    assert not torch.equal(plain, found), "as one product it would"


def test_edits_written_over_large_weights_take_the_smaller_of_both_forms(tmp_path, seed):
    model = tiny_model("gpt2", 1)
    few = changed_(model, seed, {1: 1})
    path = tmp_path / "p.safetensors"
    export_patch(few, path, fingerprint="a")
    assert read_patch(path).weights[0].exponent is not None
    generator = torch.Generator().manual_seed(seed)
    full = few[0].base + torch.randn(few[0].base.shape, generator=generator)
    sizes = export_patch([Change(few[0].name, few[0].base, full, True)], path, fingerprint="a")
    assert read_patch(path).weights[0].exponent is None
    assert sizes == {few[0].name: few[0].base.numel() * 4}


def exported(tmp_path: Path, seed: int, model_type: str = "llama", dtype=torch.float32):
    """(unedited model, edited model, patch)"""
    base, edited = (tiny_model(model_type, 3, dtype) for _ in range(2))
    changed_(edited, seed, {0: 1, 2: 2})
    path = tmp_path / "p.safetensors"
    export_patch(changes_between(base, edited), path, fingerprint=fingerprint_of(base), edits=EDITS)
    return base, edited, path


def test_a_patch_is_refused_where_it_does_not_belong(tmp_path, seed):
    base, edited, path = exported(tmp_path, seed)
    name = Anatomy(base).weight_name
    refused(apply_patch, tiny_model("llama", 4), path, f"another model: {name(0)} is not the unedited")
    refused(apply_patch, tiny_model("gpt2", 3), path, "no parameter 'model.layers.0.mlp.down_proj.weight'")
    refused(apply_patch, tiny_model("llama", 3, intermediate_size=40), path, "is .32, 48. there and .32, 40.")
    refused(apply_patch, tiny_model("llama", 3, torch.bfloat16), path, "load the model with dtype='float32'")
    refused(apply_patch, edited, path, "applied to this model already")
    refused(remove_patch, base, path, f"not applied to this model: {name(0)} is the unedited model's")
    other = tiny_model("llama", 3)
    other.model.norm.weight.data[0] += 1
    refused(
        apply_patch, other, path, "the 2 weights that it changes are as they should be, and others are not"
    )


def test_a_patch_of_which_one_weight_was_changed_since_is_neither_applied_nor_removed(tmp_path, seed):
    base, _, path = exported(tmp_path, seed)
    apply_patch(base, path)
    Anatomy(base).weight(2).data[0, 0] += 1
    refused(remove_patch, base, path, "layers.2.* was changed since")
    refused(apply_patch, base, path, "layers.0.* has this patch already")


def test_a_failure_while_weights_are_written_leaves_all_of_them(tmp_path, seed, monkeypatch):
    base, _, path = exported(tmp_path, seed)
    interrupted(monkeypatch, apply_patch, base, path, Anatomy(base).weight(2))


def test_what_editing_does_not_change_is_refused_by_name(seed):
    base, edited = (tiny_model("llama", 3) for _ in range(2))
    with pytest.raises(ModelError, match="not differ in a single bit"):
        changes_between(base, edited)
    edited.model.norm.weight.data[0] += 1
    edited.model.embed_tokens.weight.data[0] += 1
    with pytest.raises(
        ModelError, match=r"embed_tokens\.weight, model\.norm\.weight, which editing does not"
    ):
        changes_between(base, edited)
    with pytest.raises(ModelError, match="two models"):
        changes_between(base, tiny_model("gpt2", 3))
    with pytest.raises(ModelError, match="load both in one dtype"):
        changes_between(base, tiny_model("llama", 3, torch.float16))
    other = tiny_model("llama", 3)
    other.model.layers[1].self_attn.o_proj.weight.data[0, 0] = -0.0
    base.model.layers[1].self_attn.o_proj.weight.data[0, 0] = 0.0
    (change,) = changes_between(base, other)  # a bit is a change
    assert change.name == "model.layers.1.self_attn.o_proj.weight"


def test_factors_that_are_not_the_change_are_refused(tmp_path, seed):
    (change,) = changed_(tiny_model("gpt2", 1), seed, {1: 2})
    wrong = Change(change.name, change.base, change.edited, True, change.left, change.right * 1.01)
    with pytest.raises(ModelError, match="factors give another change"):
        export_patch([wrong], tmp_path / "p.safetensors", fingerprint="a")
    with pytest.raises(ModelError, match="twice"):
        export_patch([change, change], tmp_path / "p.safetensors", fingerprint="a")
    with pytest.raises(ModelError, match="nothing"):
        export_patch([], tmp_path / "p.safetensors", fingerprint="a")
    assert not list(tmp_path.iterdir())


def test_damaged_patches_are_refused_and_write_nothing(tmp_path, seed):
    base, _, path = exported(tmp_path, seed)
    whole, before = path.read_bytes(), all_bits(base)
    header = struct.unpack("<Q", whole[:8])[0]
    draw = random.Random(seed)
    for number in range(400):
        data = bytearray(whole)
        kind = number % 4
        place = draw.randrange(8 + header if kind < 2 else len(data))  # half of them in the head
        if kind == 3:
            del data[place:]
        elif kind == 1:
            data[place : place + 4] = draw.randbytes(draw.randrange(9))
        else:
            data[place] ^= 1 << draw.randrange(8)
        if data == whole:
            continue
        path.write_bytes(data)
        try:
            apply_patch(base, path)
        except D4SError as error:
            assert 0 < len(str(error)) < 6_000
        except Exception as error:
            pytest.fail(f"mutation {number}: {type(error).__name__}: {error}")
        else:
            pytest.fail(f"mutation {number} was applied")
        assert same(all_bits(base), before)


def test_hostile_patches_are_refused_before_their_tensors_are_read(tmp_path, seed, monkeypatch):
    """Each is whole and has its digest: who makes it can do that."""
    base, _, path = exported(tmp_path, seed)
    file = load_tensors(path, FORMAT, "", DataError)
    name = Anatomy(base).weight_name(0)
    gaps, left = f"{name}:back.gaps", f"{name}:left"

    def hostile(tensors=(), match="not what d4s patch export wrote", error=DataError, **facts):
        changed = {**file.tensors, **dict(tensors)}
        save_tensors(
            path,
            {n: t for n, t in changed.items() if t is not None},
            {n: f for n, f in {**file.facts, **facts}.items() if f is not None},
        )
        refused(apply_patch, base, path, match, error)

    def weights(**changes) -> str:
        records = json.loads(file.facts["weights"])
        records[0] |= changes
        return json.dumps(records)

    monkeypatch.setattr("d4s.tensor_files._digest", lambda *_: "same")
    hostile({left: file.tensors[left].double()}, "is 'F64'")
    hostile({left: torch.zeros(9, 9, dtype=torch.int64)}, "not of its shape")
    hostile({left: None}, "is 'nothing'")
    hostile({"more": torch.zeros(3)}, "which no weight of it needs")
    hostile({"../../etc/passwd:xor": torch.zeros(3)}, "which no weight of it needs")
    hostile({left: torch.full_like(file.tensors[left], 2**63 - 1)}, "too large")
    hostile({left: -file.tensors[left]}, "does not lead to the weight")
    far = torch.full((3_000,), 254, dtype=torch.uint8)
    forth = {f"{name}:forth.gaps": far[:2_000], f"{name}:forth.xor": torch.ones(2_000, dtype=torch.int32)}
    hostile(forth, "not of its shape|not within the weight")
    hostile(
        {f"{name}:forth.gaps": far, f"{name}:forth.xor": torch.ones(0, dtype=torch.int32)},
        "not as many|shape",
    )
    hostile({gaps: far.to(torch.int16)}, "is 'I16'")
    hostile(weights=weights(name="../../etc/passwd"), match="no parameter", error=ModelError)
    hostile(weights=weights(shape=[2**40, 2**40]), match="two whole numbers")
    hostile(weights=weights(shape=[2**30, 2**30]), match="another model", error=ModelError)
    hostile(weights=weights(exponent=10**9), match="too large")
    hostile(weights=weights(exponent=None), match="is 'nothing'")
    hostile(weights=weights(dtype="complex64"), match="complex64")
    hostile(weights=weights(name=3), match="must be text")
    hostile(weights="[" * 5_000, match="nested too deeply")
    hostile(weights="[]", match="no weight")
    hostile(edits="[3]", match="must be an object")
    hostile(edits='[{"prompt": "no place"}]')
    hostile(edits=None, match="facts must be")


def test_a_head_that_claims_terabytes_is_refused(tmp_path, seed):
    base, _, path = exported(tmp_path, seed)
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    name = f"{Anatomy(base).weight_name(0)}:xor"
    head = {"__metadata__": facts, name: {"dtype": "I32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    text = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    refused(apply_patch, base, path, "not a readable safetensors file", DataError)
    path.write_bytes(struct.pack("<Q", 2**62) + text)
    refused(apply_patch, base, path, "not a readable safetensors file", DataError)
    for bytes_said, reason in ((2**33, "is 'nothing'"), (2**42, "is 'nothing'|not a readable")):
        head[name] = {"dtype": "I32", "shape": [bytes_said // 4], "data_offsets": [0, bytes_said]}
        text = json.dumps(head).encode()
        with open(path, "wb") as sparse:  # as large as it says, on a disk that keeps no zeros
            sparse.write(struct.pack("<Q", len(text)) + text)
            sparse.truncate(8 + len(text) + bytes_said)
        refused(apply_patch, base, path, reason, DataError)
    refused(apply_patch, base, tmp_path / "none", "No such file", DataError)
    refused(apply_patch, base, tmp_path, "not a readable", DataError)


def test_the_card_says_what_was_written_into_a_model(tmp_path):
    assert read_edits_card(tmp_path) is None
    facts = dict(base_fingerprint="ab", base_name="gpt2", method="d4s", when="2026-01-01T00:00:00+00:00")
    path = write_edits_card(tmp_path, EDITS, **facts)
    assert path.name == "d4s_edits.json" and [p.name for p in tmp_path.iterdir()] == [path.name]
    card = read_edits_card(tmp_path)
    assert card is not None and card.edits == EDITS
    assert (card.base_fingerprint, card.base_name, card.method, card.when) == tuple(facts.values())
    path.write_text(path.read_text().replace("gpt2", "gpt3"))
    with pytest.raises(DataError, match="has changed since"):
        read_edits_card(tmp_path)


def test_the_public_names_are_those():
    assert d4s.apply_patch is apply_patch and d4s.remove_patch is remove_patch
    assert d4s.export_patch is export_patch and d4s.Change is Change
