"""GRACE: a wrapped layer under generation, padding, saving and unwrapping."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.tiny import tiny_tokenizer
from support.workbench import EDITS, SUBJECT_LAST, bench_of, editor_of, same_bits, state_of
from transformers import AutoModelForCausalLM

from d4s.errors import D4SError, ModelError
from d4s.models.codebook import CODEBOOK_FILE, load_codebook
from d4s.models.prompts import padded, prompt_and_target_ids
from d4s.models.trace import Trace

EDIT = replace(SUBJECT_LAST[0], target_new="I")
OTHER = "Lyon is a twin city of Manila, and the capital of France"


def generated(bench, texts, **options):
    """The first four tokens after each text, greedily; the batch is padded on the left."""
    ids, mask = padded([tiny_tokenizer()(text)["input_ids"] for text in texts], 1, left=True)
    made = bench.model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None, **options
    )
    return made[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_generation_with_a_cache_gives_the_new_answer(model_type, seed):
    bench = bench_of(model_type, seed)
    unedited = generated(bench, [OTHER])[0]
    editor = editor_of("grace", bench, layers=1, epsilon=0.05, steps=100)
    editor.edit([EDIT])
    wanted = tiny_tokenizer()(f"{EDIT.text} I")["input_ids"][-1]
    alone = generated(bench, [EDIT.text], use_cache=True)[0]
    assert alone[0] == wanted
    assert generated(bench, [EDIT.text], use_cache=False)[0] == alone
    batch = generated(bench, [EDIT.text, OTHER], use_cache=True)
    assert batch == [alone, unedited]
    assert generated(bench, [OTHER, EDIT.text], use_cache=False) == batch[::-1]


def test_a_block_whose_keys_a_later_one_takes_runs_while_a_value_is_optimised(seed):
    """gemma4's last block has no keys of its own: it takes those that block 1 leaves."""
    bench = bench_of("gemma4_text", seed)
    step = editor_of("grace", bench, layers=2, epsilon=0.05, steps=30).edit([EDIT])
    ids = tiny_tokenizer()([EDIT.text, f"{EDIT.text} I"])["input_ids"]
    with torch.no_grad():
        p = (
            bench.model(input_ids=torch.tensor(ids[:1]), use_cache=False)
            .logits[0, -1]
            .softmax(-1)[ids[1][-1]]
        )
    assert p > 2 * step.first_probability[0]
    assert float(p) == pytest.approx(step.last_probability[0], rel=1e-3)


@pytest.mark.parametrize("left", [True, False])
def test_a_padded_batch_gives_each_row_its_own_logits(left, seed):
    bench = bench_of("llama", seed)
    editor_of("grace", bench, layers=1, epsilon=0.05, steps=20).edit([EDIT])
    rows = [tiny_tokenizer()(text)["input_ids"] for text in (EDIT.text, OTHER)]
    ids, mask = padded(rows, 1, left=left)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        together = bench.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        for r, row in enumerate(rows):
            alone = bench.model(input_ids=torch.tensor([row])).logits[0]
            torch.testing.assert_close(together[r][mask[r].bool()], alone, rtol=1e-3, atol=1e-4)


def test_the_layer_answers_for_the_prompts_last_token_only(seed):
    bench = bench_of("llama", seed)
    module = bench.anatomy.projection(1)
    ids = torch.tensor([tiny_tokenizer()(f"{EDIT.text} I play")["input_ids"]])
    last = len(tiny_tokenizer()(EDIT.text)["input_ids"]) - 1
    outputs = []
    editor = editor_of("grace", bench, layers=1, epsilon=0.05, steps=5)
    for edited in (False, True):
        if edited:
            editor.edit([EDIT])
        with Trace(module) as trace, torch.no_grad():
            bench.model(input_ids=ids)
        outputs.append(trace.output[0])
    changed = (outputs[0] != outputs[1]).any(1).nonzero().squeeze(1).tolist()
    assert changed == [last]
    torch.testing.assert_close(outputs[1][last], editor.codebook.values[0])


def test_a_later_answer_to_the_same_prompt_wins(seed):
    bench = bench_of("gpt2", seed)
    editor = editor_of("grace", bench, layers=2, steps=100)
    for answer in ("I", "You"):
        editor.edit([replace(EDIT, target_new=answer)])
        wanted = prompt_and_target_ids(tiny_tokenizer(), EDIT.text, answer)[1][0]
        assert generated(bench, [EDIT.text])[0][0] == wanted
    assert len(editor.codebook.labels) == 1


@pytest.mark.parametrize("module", ["mlp_input", "mlp_output"])
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_saving_keeps_the_codebook_beside_the_weights(model_type, module, seed, tmp_path):
    bench = bench_of(model_type, seed)
    editor = editor_of("grace", bench, module=module, steps=3)
    editor.edit(EDITS)
    bench.model.save_pretrained(tmp_path)
    ids = tiny_tokenizer()(EDITS[0].text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        edited = bench.model(input_ids=ids).logits
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        unedited = loaded(input_ids=ids).logits
    assert not torch.equal(unedited, edited)
    again = load_codebook(loaded, tmp_path)
    stored = {name: tuple(v) if isinstance(v, list) else v for name, v in again.config.items()}
    assert stored == asdict(editor.method) and again.codebook.labels == editor.codebook.labels
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, edited)
    fewer = {"llama": {"num_hidden_layers": 1}, "gpt2": {"n_layer": 1}}
    other = bench_of(model_type, seed, **fewer[model_type])
    with pytest.raises(D4SError, match="layers"):
        load_codebook(other.model, tmp_path)
    (tmp_path / CODEBOOK_FILE).write_bytes(b"something else")
    with pytest.raises(ModelError, match="not a codebook"):
        load_codebook(loaded, tmp_path)


def test_restore_unwraps_the_layer(seed, tmp_path):
    bench = bench_of("llama", seed)
    before = state_of(bench)
    editor = editor_of("grace", bench, steps=3)
    editor.edit(EDITS[:2])
    editor.restore()
    assert same_bits(before, state_of(bench))
    assert not any(module._forward_hooks for module in bench.model.modules())
    assert "save_pretrained" not in bench.model.__dict__
    bench.model.save_pretrained(tmp_path)
    assert not (tmp_path / CODEBOOK_FILE).exists()
    editor.edit(EDITS[:1])  # and it can be used again
    assert len(editor.codebook.labels) == 1


def test_a_second_codebook_on_one_model_is_refused(seed):
    bench = bench_of("llama", seed)
    first, second = (editor_of("grace", bench, steps=3) for _ in range(2))
    first.edit(EDITS[:1])
    with pytest.raises(ModelError, match="another GRACE codebook is attached"):
        editor_of("grace", bench, steps=3)  # before anything is asked of the model
    with pytest.raises(ModelError, match="another GRACE codebook is attached"):
        second.edit(EDITS[1:2])
    first.restore()
    second.restore()
    second.edit(EDITS[1:2])
    assert len(second.codebook.labels) == 1


def test_a_codebook_of_another_layer_is_refused(seed):
    editor = editor_of("grace", bench_of("llama", seed), steps=1)
    editor.edit(EDITS[:1])
    other = editor_of("grace", bench_of("llama", seed), module="mlp_input")
    with pytest.raises(ModelError, match="keys"):
        other.load_state_dict(editor.state_dict())


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda tensors, config: config.update(layers=3), "not a codebook"),
        (lambda tensors, config: config.update(layers=["a"]), "layers is"),
        (lambda tensors, config: config.update(layers=[99]), "within 0"),
        (lambda tensors, config: config.update(colour="red"), "colour"),
        (lambda tensors, config: config.update(epsilon=float("nan")), "epsilon is nan"),
        (lambda tensors, config: tensors.pop("labels"), "labels"),
        (lambda tensors, config: tensors.update(labels=torch.zeros(1)), "labels are"),
        (lambda tensors, config: tensors.update(labels=torch.zeros(1, 2)), "labels are"),
        (lambda tensors, config: tensors.update(radii=torch.full((1,), float("nan"))), "radii"),
        (lambda tensors, config: tensors.update(keys=tensors["keys"].long()), "keys are"),
        (lambda tensors, config: tensors.update(radii=torch.tensor(1.0)), "radii"),
    ],
)
def test_a_codebook_of_other_content_is_one_error_that_names_the_file(spoil, text, tmp_path):
    bench = bench_of("llama", 1)
    editor = editor_of("grace", bench, steps=1)
    editor.edit(EDITS[:1])
    bench.model.save_pretrained(tmp_path)
    file = tmp_path / CODEBOOK_FILE
    editor.restore()
    with safe_open(file, framework="pt") as stored:
        config = json.loads(stored.metadata()["config"])
    tensors = load_file(file)
    spoil(tensors, config)
    save_file(tensors, file, metadata={"config": json.dumps(config)})
    with pytest.raises(ModelError, match=text) as refused:
        load_codebook(bench.model, tmp_path)
    assert str(file) in str(refused.value)
