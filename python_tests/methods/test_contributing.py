"""The method that CONTRIBUTING.md shows works as the page says, taken from the page."""

from __future__ import annotations

import re
import sys
from importlib import import_module, invalidate_caches
from pathlib import Path

import pytest
import torch
from support.tiny import tiny_model, tiny_tokenizer
from support.workbench import EDITS, relative_error

import d4s
from d4s.methods.tables import about
from d4s.models.prompts import prompt_and_target_ids

PAGE = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The page's module, registered by the page's line, for as long as the test runs."""
    page = PAGE.read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (code,) = (block for block in blocks if "class Toy(Method)" in block)
    (register,) = re.findall(r"`(d4s\.METHODS\[.*?\] = .*?)`", page)
    (tmp_path / "toy.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    invalidate_caches()
    known = dict(d4s.METHODS)
    try:
        module = import_module("toy")
        exec(register, {"d4s": d4s, **vars(module)})
        yield module
    finally:
        d4s.METHODS.clear()
        d4s.METHODS.update(known)
        sys.modules.pop("toy", None)


def key_and_embedding(model, layer, edit):
    """k and e of one edit on a model that is not edited, through a hook of its own; float64."""
    prompt, target = prompt_and_target_ids(tiny_tokenizer(), edit.text, edit.target_new)
    seen = []
    block = model.transformer.h[layer] if model.config.model_type == "gpt2" else model.model.layers[layer]
    projection = block.mlp.c_proj if model.config.model_type == "gpt2" else block.mlp.down_proj
    hook = projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(input_ids=torch.tensor([prompt]))
    hook.remove()
    return seen[0][0, -1].double(), model.lm_head.weight[target[0]].detach().double()


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_the_method_of_the_page_edits_by_its_equation_and_is_taken_back(toy, model_type, seed):
    model, unedited = tiny_model(model_type, seed), tiny_model(model_type, seed)
    edits = EDITS[:2]
    result = d4s.edit_sequence(
        model, tiny_tokenizer(), edits, method="toy", config=dict(rate=0.5), seed=seed, progress=False
    )
    assert result.failure is None and len(result.history) == 2  # unedited, and with both
    expected = torch.zeros(32, 48, dtype=torch.float64)
    for edit in edits:  # W's own input does not depend on W: both are found on the unedited model
        k, e = key_and_embedding(unedited, 1, edit)
        expected += 0.5 * torch.stack([share * k for share in e]) / sum(k * k)
    name = {"gpt2": "transformer.h.1.mlp.c_proj.weight", "llama": "model.layers.1.mlp.down_proj.weight"}
    before, after = unedited.state_dict(), model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {name[model_type]}
    change = (after[name[model_type]] - before[name[model_type]]).double()
    assert relative_error(change.T if model_type == "gpt2" else change, expected) <= 1e-5
    result.restore()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_it_is_listed_beside_the_others_while_it_is_registered(toy):
    assert d4s.METHODS["toy"] is toy.Toy and "toy" in d4s.methods()
    assert "of e, by which W k moves" in about("toy") and "rate" in about("toy")
    with pytest.raises(d4s.ConfigError, match="field of toy 'rat'"):
        toy.Toy(layers=(0,)).changed({"rat": 1.0})


def test_nothing_of_it_stays_behind():
    assert "toy" not in d4s.METHODS and "toy" not in sys.modules
