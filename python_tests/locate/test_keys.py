"""Keys and outputs at the subject's last token, against one unpadded pass a row through the whole model."""

from __future__ import annotations

import pytest
import torch
from support.tiny import REPRESENTATIVE, tiny_model, tiny_tokenizer

from d4s.edits import Edit
from d4s.locate import keys
from d4s.locate.keys import keys_and_output_at, keys_at, output_at, subject_rows
from d4s.models.architectures import Anatomy
from d4s.models.prompts import subject_row

EDITS = [
    Edit(prompt="The mother tongue of {} is", subject="Danielle Darrieux", target_new="English"),
    Edit(prompt="{} worked for", subject="Jobs", target_new="Manila Lyon"),
    Edit(prompt="What is the twin city of {}? It is not Lyon but", subject="Lyon", target_new="Paris"),
]
PREFIXES = ("The capital. ", "You play the piano because the official. ", "I. ")


def seen_at_subject(anatomy, module, edit, prefix="", *, whole=True):
    """(input, output) of a module at the subject's last token in one unpadded pass over the row.

    whole: with everything that follows the subject, target included; otherwise with other words there
    """
    tokenizer = tiny_tokenizer()
    row = subject_row(tokenizer, edit.prompt, edit.subject, edit.target_new, prefix)
    ids = list(row.ids)
    if not whole:
        ids[row.subject_last + 1 :] = torch.randint(2, len(tokenizer), (7,)).tolist()
    seen = []

    def hook(_module, args, kwargs, output):
        output = output[0] if isinstance(output, tuple) else output
        put_in = args[0] if args else kwargs["hidden_states"]
        # Falcon adds to what its modules return where it lies.
        seen.extend(t.reshape(len(ids), -1)[row.subject_last].clone() for t in (put_in, output))

    handle = module.register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        anatomy.model(input_ids=torch.tensor([ids]), use_cache=False)
    handle.remove()
    return seen


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("model_type", REPRESENTATIVE)
@pytest.mark.parametrize("whole", [True, False])
def test_a_padded_batch_gives_what_each_full_row_gives_alone(model_type, whole, seed):
    """Nothing behind the subject's last token matters, and neither do the rows beside it."""
    anatomy = Anatomy(tiny_model(model_type, seed))
    rows = subject_rows(tiny_tokenizer(), EDITS)
    for layer in (0, 2):
        found = keys_at(anatomy, rows, layer)
        assert found.dtype == torch.float32 and found.shape == (3, anatomy.shape(layer)[1])
        out = output_at(anatomy, rows, anatomy.blocks[layer])
        for e, edit in enumerate(EDITS):
            close(found[e], seen_at_subject(anatomy, anatomy.projection(layer), edit, whole=whole)[0])
            close(out[e], seen_at_subject(anatomy, anatomy.blocks[layer], edit, whole=whole)[1])


@pytest.mark.parametrize("model_type", REPRESENTATIVE)
@pytest.mark.parametrize("layers", [(0, 2), (1, 1)])
def test_one_pass_gives_the_key_of_a_layer_and_what_a_later_module_puts_out(model_type, layers, seed):
    """Of every row by itself; the later module may be the layer's own block, or its MLP's output projection."""
    anatomy = Anatomy(tiny_model(model_type, seed))
    rows = subject_rows(tiny_tokenizer(), EDITS, PREFIXES)
    layer, last = layers
    for module in (anatomy.blocks[last], anatomy.projection(last)):
        found, out = keys_and_output_at(anatomy, rows, layer, module)
        assert found.shape == (12, anatomy.shape(layer)[1]) and found.dtype == out.dtype == torch.float32
        for i, (edit, prefix) in enumerate((edit, prefix) for edit in EDITS for prefix in ("", *PREFIXES)):
            close(found[i], seen_at_subject(anatomy, anatomy.projection(layer), edit, prefix)[0])
            close(out[i], seen_at_subject(anatomy, module, edit, prefix)[1])


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "qwen3"])
def test_a_key_is_half_the_bare_prompts_and_half_the_mean_behind_prefixes(model_type, seed):
    anatomy = Anatomy(tiny_model(model_type, seed))
    found = keys_at(anatomy, subject_rows(tiny_tokenizer(), EDITS, PREFIXES), 1)
    for e, edit in enumerate(EDITS):
        bare, *others = (
            seen_at_subject(anatomy, anatomy.projection(1), edit, prefix)[0] for prefix in ("", *PREFIXES)
        )
        close(found[e], 0.5 * bare + 0.5 * torch.stack(others).mean(0))


def test_without_a_bare_share_all_rows_weigh_alike(seed):
    anatomy = Anatomy(tiny_model("llama", seed))
    found = keys_at(anatomy, subject_rows(tiny_tokenizer(), EDITS, PREFIXES, bare_share=None), 1)
    for e, edit in enumerate(EDITS):
        rows = [seen_at_subject(anatomy, anatomy.projection(1), edit, p)[0] for p in ("", *PREFIXES)]
        close(found[e], torch.stack(rows).mean(0))


@pytest.mark.parametrize("bare_share", [0.5, 0.2, None])
@pytest.mark.parametrize("prefixes", [(), PREFIXES])
def test_the_weights_of_an_edits_rows_add_up_to_one(bare_share, prefixes):
    rows = subject_rows(tiny_tokenizer(), EDITS, prefixes, bare_share=bare_share)
    assert rows.shares.shape == (1 + len(prefixes),) and len(rows.ids) == 3 * (1 + len(prefixes))
    assert (rows.shares > 0).all() and float(rows.shares.sum()) == pytest.approx(1)


def test_rows_end_at_the_subjects_last_token():
    tokenizer = tiny_tokenizer()
    rows = subject_rows(tokenizer, EDITS[:1], PREFIXES[:1])
    texts = [tokenizer.decode(list(ids), skip_special_tokens=True) for ids in rows.ids]
    assert texts == [f"{p}The mother tongue of Danielle Darrieux" for p in ("", PREFIXES[0])]


def test_many_rows_go_in_several_passes_with_the_same_result(monkeypatch, seed):
    anatomy = Anatomy(tiny_model("gpt2", seed))
    rows = subject_rows(tiny_tokenizer(), EDITS, PREFIXES)
    whole = keys_at(anatomy, rows, 1)
    monkeypatch.setattr(keys, "most_tokens", lambda *_: 50)
    close(keys_at(anatomy, rows, 1), whole)


def test_a_pass_that_does_not_fit_into_memory_is_halved(seed):
    anatomy = Anatomy(tiny_model("gpt2", seed))
    rows = subject_rows(tiny_tokenizer(), EDITS, PREFIXES)
    whole, sizes = keys_at(anatomy, rows, 1), []

    def out_of_memory(_module, arguments):
        sizes.append(len(arguments[0]))
        if sizes[-1] > 4:
            raise torch.OutOfMemoryError("no room")

    anatomy.blocks[0].register_forward_pre_hook(out_of_memory)
    close(keys_at(anatomy, rows, 1), whole)
    assert sizes[0] > 4 and sizes[-1] <= 4


def test_equal_rows_run_once_and_the_pass_ends_at_the_module(seed):
    anatomy = Anatomy(tiny_model("gpt2", seed))
    sizes, beyond = [], []
    anatomy.blocks[0].register_forward_pre_hook(lambda _m, args: sizes.append(args[0].shape[0]))
    anatomy.blocks[2].register_forward_pre_hook(lambda _m, _args: beyond.append(1))
    again = Edit(prompt="The mother tongue of {} was", subject="Danielle Darrieux", target_new="Latin")
    found = keys_at(anatomy, subject_rows(tiny_tokenizer(), [EDITS[0], again, EDITS[1]]), 1)
    assert sizes == [2] and not beyond
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keys_of_a_half_precision_model_are_averaged_in_float32(dtype, seed):
    anatomy = Anatomy(tiny_model("llama", seed, dtype))
    found = keys_at(anatomy, subject_rows(tiny_tokenizer(), EDITS[:1], PREFIXES[:2]), 1)
    assert found.dtype == torch.float32
    assert not torch.equal(found, found.to(dtype).float()), "the mean of rounded values has more digits"
