"""Every row of the table at work: a random model of the type is edited, scored, saved and restored."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from support.tiny import CONFIGS, REPRESENTATIVE, tiny_model, tiny_tokenizer, why_not_built
from support.workbench import SUBJECT_LAST, bench_of, editor_of, same_bits, state_of
from transformers import AutoModelForCausalLM

from d4s.models.architectures import ARCHITECTURES, Anatomy
from d4s.models.prompts import prompt_and_target_ids
from d4s.models.scoring import score

EDIT = SUBJECT_LAST[0]
QUESTIONS = [
    (EDIT.text, ("English", "French", "the official religion")),
    ("Therefore", ("Lyon in France",)),
    ("The capital of France, where Danielle Darrieux was born, is a twin city of", ("Lyon", "Manila")),
]


def test_every_row_of_the_table_is_tested():
    assert set(CONFIGS) == set(ARCHITECTURES) >= set(REPRESENTATIVE)


@pytest.mark.parametrize("model_type", [t for t in REPRESENTATIVE if t not in ("youtu", "gemma4_text")])
def test_types_that_every_transformers_has_are_not_skipped(model_type):
    assert why_not_built(model_type) is None


@torch.no_grad()
def log_probability(model, prompt: str, target: str) -> float:
    """Mean over the target's tokens, in one unpadded row through the whole model."""
    prompt_ids, target_ids = prompt_and_target_ids(tiny_tokenizer(), prompt, target)
    ids = torch.tensor([prompt_ids + target_ids])
    log_p = model(input_ids=ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1].float().log_softmax(-1)
    return float(log_p.gather(1, torch.tensor(target_ids).unsqueeze(1)).mean())


@pytest.mark.parametrize("model_type", CONFIGS)
def test_what_an_edit_asks_for_arrives_and_restoring_undoes_it_bit_for_bit(model_type, seed):
    bench = bench_of(model_type, seed)
    before, old = state_of(bench), log_probability(bench.model, EDIT.text, EDIT.target_new)
    # Nothing holds W back, so what was asked for must arrive, whatever stands between W and where it is measured.
    editor = editor_of("d4s", bench, layers=[1], prior_weight=1e-6, ridge=1e-2)
    target = editor.targets([EDIT])
    assert math.log(float(target.first_probability)) == pytest.approx(old, abs=1e-3)
    editor.edit([EDIT])
    reached = editor.state(editor.rows([EDIT]))
    assert (reached - target.target).norm() <= 1e-2 * target.delta.norm()
    assert target.last_probability > 1.1 * target.first_probability
    changed = [n for n, tensor in bench.model.state_dict().items() if not torch.equal(tensor, before[n])]
    assert changed == [bench.anatomy.weight_name(1)]
    editor.restore()
    assert same_bits(state_of(bench), before)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_scores_are_those_of_single_whole_rows(model_type, seed):
    model = tiny_model(model_type, seed)
    for (prompt, targets), scores in zip(QUESTIONS, score(model, tiny_tokenizer(), QUESTIONS), strict=True):
        for target, found in zip(targets, scores, strict=True):
            assert found.nll == pytest.approx(-log_probability(model, prompt, target), abs=2e-5)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_an_edited_model_is_the_same_when_it_is_saved_and_loaded(model_type, seed, tmp_path):
    model = tiny_model(model_type, seed)
    ids = torch.tensor([tiny_tokenizer()(EDIT.text)["input_ids"]])
    weight = Anatomy(model).weight(1)
    with torch.no_grad():
        unedited = model(input_ids=ids, use_cache=False).logits
        weight.add_(torch.randn_like(weight))
        edited = model(input_ids=ids, use_cache=False).logits
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        assert torch.equal(again(input_ids=ids, use_cache=False).logits, edited)
    assert not torch.allclose(edited, unedited, atol=1e-2)
    assert torch.equal(Anatomy(again).weight(1), weight)


def test_importing_d4s_loads_no_models_code():
    """Rows name types that the installed transformers may not have."""
    code = (
        "import sys, d4s; loaded = [m for m in sys.modules if '.modeling_' in m and m.startswith("
        "'transformers.models.') and '.auto.' not in m]; sys.exit(str(loaded) if loaded else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
