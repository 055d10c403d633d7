"""A codebook: the rules of its radii, what it answers, and a file of it beside a model that needs no method."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from support.tiny import tiny_model, tiny_tokenizer

import d4s
from d4s.errors import ConfigError, ModelError
from d4s.models.architectures import Anatomy
from d4s.models.codebook import CODEBOOK_FILE, MARGIN, Codebook, WrappedLayer, Wrapping, load_codebook

A, B, C = (1,), (2, 2), (3,)


def small_codebook():
    return Codebook(2, 3, 1.0, torch.device("cpu"))


def point(x, y=0.0):
    return torch.tensor([x, y])


def test_radii_of_five_keys_worked_by_hand():
    book = small_codebook()
    value = torch.zeros(3)
    assert book.place(point(0.0), A, value) == 0  # the first: a new entry, ε = 1
    assert book.place(point(3.0), B, value) == 1  # 3 > 1 + 1: new, ε = 1
    assert book.place(point(1.2), A, value) == 0  # 1.2 ≤ 2, same label, outside: the radius grows
    torch.testing.assert_close(book.radii, torch.tensor([1.2, 1.0]))
    assert book.place(point(0.8), C, value) == 2  # .8 ≤ 2.2, another label: they share the way between
    torch.testing.assert_close(book.radii, torch.tensor([0.4 - 1e-5, 1.0, 0.4]))
    assert book.place(point(3.0, 0.5), B, value) == 1  # inside, same label: nothing changes
    torch.testing.assert_close(book.radii, torch.tensor([0.4 - 1e-5, 1.0, 0.4]))
    assert book.labels == [A, B, C]
    torch.testing.assert_close(book.keys, torch.stack([point(0.0), point(3.0), point(0.8)]))


def test_another_answer_to_the_same_question_replaces_the_first():
    book = small_codebook()
    book.place(point(2.0), A, torch.zeros(3))
    assert book.place(point(2.0, MARGIN), B, torch.ones(3)) == 0
    assert book.labels == [B]
    assert float(book.radii) == 1.0
    assert torch.equal(book.values, torch.ones(1, 3))


def test_an_input_gets_the_value_of_the_nearest_key_whose_radius_holds_it():
    book = small_codebook()
    inputs = torch.stack([point(0.2), point(0.5), point(-0.9), point(2.5), point(9.0)]).view(1, 5, 2)
    outputs = torch.randn(1, 5, 3)
    assert torch.equal(book.answer(inputs, outputs), outputs)
    for x, label in ((0.0, A), (3.0, B), (0.8, C)):
        book.place(point(x), label, torch.full((3,), x))
    found = book.answer(inputs, outputs)
    expected = outputs.clone()
    # −.9 is nearest to 0, whose radius is .4 by now.
    expected[0, 0], expected[0, 1], expected[0, 3] = 0.0, 0.8, 3.0
    torch.testing.assert_close(found, expected)


def test_small_distances_between_large_keys_are_seen():
    book = Codebook(64, 1, 0.01, torch.device("cpu"))
    key = torch.randn(64) * 1e3
    book.place(key, A, torch.zeros(1))
    distance, _ = book.nearest((key + torch.full((64,), 1e-3))[None])
    assert float(distance) == pytest.approx(8e-3, rel=0.1)
    assert float(book.nearest(key[None])[0]) == 0.0


WRAPPING = Wrapping(layers=(1,), module="mlp_output", epsilon=1e6)
TEXT = "The capital of France is"


@torch.no_grad()
def logits(model):
    return model(tiny_tokenizer()(TEXT, return_tensors="pt")["input_ids"]).logits


def wrapped_with_one_entry(model, **config):
    """An entry so wide that it answers at every position."""
    stored = dict(layers=WRAPPING.layers, module=WRAPPING.module, epsilon=WRAPPING.epsilon)
    wrapped = WrappedLayer(Anatomy(model), WRAPPING, stored | config)
    wrapped.codebook.place(torch.zeros(48), A, torch.linspace(-1, 1, 32))
    wrapped.attach()
    return wrapped


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_a_wrapped_layer_puts_out_the_value_until_it_is_detached(model_type, seed):
    model = tiny_model(model_type, seed)
    unedited, twin = logits(model), tiny_model(model_type, seed)
    projection = Anatomy(twin).projection(1)
    with torch.no_grad():  # the same constant from weights of zeros and a bias
        projection.weight.zero_()
        projection.bias = torch.nn.Parameter(torch.linspace(-1, 1, 32))
    wrapped = wrapped_with_one_entry(model)
    torch.testing.assert_close(logits(model), logits(twin))
    wrapped.detach()
    assert torch.equal(logits(model), unedited)
    wrapped.attach()
    torch.testing.assert_close(logits(model), logits(twin))


def test_a_loaded_model_has_the_codebook_that_lies_beside_it(seed, tmp_path):
    model = tiny_model("llama", seed)
    wrapped_with_one_entry(model, learning_rate=1.0, steps=100, stop_loss=0.01)
    model.save_pretrained(tmp_path / "once")
    tiny_tokenizer().save_pretrained(tmp_path / "once")
    once, _ = d4s.load_model(tmp_path / "once", device="cpu")
    torch.testing.assert_close(logits(once), logits(model))
    once.save_pretrained(tmp_path / "twice")  # and it stays with the model
    facts = []
    for folder in ("once", "twice"):
        with safe_open(tmp_path / folder / CODEBOOK_FILE, framework="pt") as file:
            facts.append(json.loads(file.metadata()["config"]))
    assert facts[0] == facts[1]
    assert facts[0] == {
        **dict(layers=[1], module="mlp_output", epsilon=1e6),
        **dict(learning_rate=1.0, steps=100, stop_loss=0.01),
    }


def test_a_model_has_one_codebook(seed, tmp_path):
    model = tiny_model("llama", seed)
    wrapped = wrapped_with_one_entry(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="another GRACE codebook is attached"):
        load_codebook(model, tmp_path)
    wrapped.detach()
    load_codebook(model, tmp_path)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        (dict(layers=(0, 1)), "must be one layer"),
        (dict(epsilon=0.0), "epsilon"),
        (dict(module="mlp"), "module"),
    ],
)
def test_a_place_that_makes_no_sense_is_refused(field, text):
    with pytest.raises(ConfigError, match=text):
        Wrapping(**{**dict(layers=(1,), module="mlp_input", epsilon=1.0), **field})
