"""Models that cannot be asked or edited: found before anything runs, and said in one line."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from support.tiny import tiny_model, tiny_tokenizer
from torch import nn

from d4s.edits import Edit, Question
from d4s.errors import ConfigError, ModelError
from d4s.locate.targets import TargetConfig
from d4s.measure import row
from d4s.measure.metrics import evaluate, take_baseline
from d4s.models.architectures import Anatomy, Architecture, architecture_of
from d4s.models.readiness import check_ready
from d4s.sequence.run import edit_sequence

EDITS = [Edit("{} worked for", "Steve Jobs", "Manila"), Edit("The twin city of {} is", "Lyon", "Paris")]
FAST = dict(method="ft-m", config={"steps": 1}, progress=False)


@pytest.mark.parametrize(
    "field", ["prompt", "target_new", "paraphrases", "neighborhood", "locality", "portability"]
)
def test_a_text_that_is_too_long_is_named_before_anything_is_asked(field, monkeypatch, seed):
    model, tokenizer = tiny_model("gpt2", seed), tiny_tokenizer()
    long = "Manila " * 140 + "Lyon"
    fields = {
        "prompt": f"{long} {{}} is",
        "target_new": long,
        "locality": (Question(long, ("Lyon",)),),
        "portability": (Question("Lyon is", ("Paris", long)),),
    }
    edit = Edit("{} is", "Lyon", "Paris", target_true="Manila", id="long")
    edit = replace(edit, **{field: fields.get(field, ("short", long))})
    name = "prompt" if field == "target_new" else field
    with monkeypatch.context() as patch:
        patch.setattr(row, "score", lambda *_, **__: pytest.fail("it was asked"))
        for ask in (evaluate, take_baseline, lambda *given: edit_sequence(*given, **FAST)):
            with pytest.raises(ModelError, match=rf"edit long, {name}: .* tokens .* 128 positions; shorten"):
                ask(model, tokenizer, [EDITS[0], edit])
    evaluate(tiny_model("gpt2", seed, n_positions=1_024), tokenizer, [EDITS[0], edit])


class Quantised(torch.Tensor):
    """A tensor that calls itself floating point and can be neither read nor written, as torchao's."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), keywords=None):
        allowed = {
            "is_floating_point",
            "__get__",
            "detach",
            "element_size",
            "requires_grad_",
            "__set__",
            "data",
        }
        if getattr(function, "__name__", "") not in allowed:
            raise NotImplementedError(f"{function} of quantised weights")
        return super().__torch_function__(function, types, arguments, keywords or {})


def overflowing():
    """Finite in float32 and bfloat16, beyond float16 between its blocks: as Gemma-3."""
    model = tiny_model("llama", 1)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(200.0)
        model.model.layers[0].mlp.down_proj.weight.fill_(6e4)
        model.model.layers[0].mlp.up_proj.weight.fill_(30.0)
        model.model.layers[0].mlp.gate_proj.weight.fill_(30.0)
    return model


def test_a_model_that_says_nan_in_float16_is_told_the_type_that_works_before_anything_runs(monkeypatch):
    model = overflowing()
    assert all(torch.isfinite(p.half()).all() for p in model.parameters())
    check_ready(copy.deepcopy(model).to(torch.bfloat16), tiny_tokenizer(), EDITS)
    half = copy.deepcopy(model).half()
    monkeypatch.setattr(row, "score", lambda *a, **k: pytest.fail("asked"))
    for call in (
        lambda: edit_sequence(half, tiny_tokenizer(), EDITS, **FAST),
        lambda: take_baseline(half, tiny_tokenizer(), EDITS),
    ):
        with pytest.raises(ModelError, match=r"float16, which ends at 65504.*--dtype bfloat16"):
            call()


def test_a_model_that_says_nan_in_any_type_is_told_to_be_loaded_again():
    model = tiny_model("llama", 1)
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
    with pytest.raises(ModelError, match=r"NaN or infinite in float32.*intact files"):
        check_ready(model, tiny_tokenizer(), EDITS)


def test_wrapped_models_are_told_what_to_give():
    model = tiny_model("llama", 1)

    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_model, self.peft_config = model, {}
            self.config = model.config

    for wrapped, text in (
        (nn.DataParallel(model), r"wrapped in DataParallel.*model\.module"),
        (Adapted(), "adapter of PEFT.*merge_and_unload"),
        ("gpt2", "model is a str"),
        (None, "model is a NoneType"),
    ):
        for call in (edit_sequence, evaluate):
            with pytest.raises(ModelError, match=text):
                call(wrapped, tiny_tokenizer(), EDITS)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.")  # asked for by peft
def test_a_model_of_peft_is_told_to_be_merged():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["down_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(tiny_model("llama", 1), config)
    for call in (lambda: Anatomy(adapted), lambda: Anatomy(adapted.base_model.model)):
        with pytest.raises(ModelError, match=r"adapter of PEFT.*merge_and_unload"):
            call()
    edit_sequence(adapted.merge_and_unload(), tiny_tokenizer(), EDITS, **FAST)


def test_weights_of_a_tensor_type_of_their_own_are_refused_by_name():
    model = tiny_model("llama", 1)
    projection = model.model.layers[1].mlp.down_proj
    plain = projection.weight.detach()
    projection.weight = nn.Parameter(plain.as_subclass(Quantised), requires_grad=False)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj\.weight is a Quantised.*torchao"):
        Anatomy(model)
    with pytest.raises(ModelError, match="Quantised"):
        evaluate(model, tiny_tokenizer(), EDITS)


def test_a_model_without_numbers_is_refused():
    with pytest.raises(ModelError, match="lies on meta"):
        evaluate(tiny_model("llama", 1).to("meta"), tiny_tokenizer(), EDITS)


def test_experts_are_no_matrix_to_edit():
    model = tiny_model("llama", 1)

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 32, 48))

        def forward(self, inner):
            return inner @ self.weight[0].T

    model.model.layers[1].mlp.down_proj = Experts()
    anatomy = Anatomy(model)
    assert anatomy.shape(0) == (32, 48)
    with pytest.raises(
        ModelError, match=r"layers\.1\.mlp\.down_proj\.weight has the shape \[4, 32, 48\].*experts"
    ):
        anatomy.shape(1)
    with pytest.raises(ModelError, match=r"layers.1.mlp.down_proj"):
        edit_sequence(model, tiny_tokenizer(), EDITS, method="ft-m", config={"layers": [1]}, progress=False)
    del model.model.layers[1].mlp.down_proj
    with pytest.raises(ModelError, match=r"layers\.1 has no 'mlp\.down_proj'"):
        anatomy.projection(1)
    no_weight = Architecture("model.layers", "mlp", "mlp.gate_proj", "self_attn.o_proj")
    with pytest.raises(ModelError, match="weight is not there"):
        Anatomy(model, no_weight).shape(0)


def test_blocks_must_be_a_list_of_blocks():
    model = tiny_model("llama", 1)
    with pytest.raises(ModelError, match=r"'model\.norm' is a LlamaRMSNorm, must be the ModuleList"):
        architecture_of(model, Architecture("model.norm", "a", "b", "c"))


@pytest.mark.parametrize("where", ["subject", "target_new", "neighborhood", "portability"])
def test_a_token_that_was_added_to_the_tokenizer_is_named_with_its_edit(where):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_tokens(["<new>"])
    model = tiny_model("llama", 1)
    check_ready(model, tokenizer, EDITS)  # one that no edit uses does no harm
    fields = {"prompt": "{} worked for", "subject": "Jobs", "target_new": "Manila", "target_true": "Apple"}
    fields["id"] = "x"
    added = {
        "subject": {"subject": "Steve <new>"},
        "target_new": {"target_new": "a <new>"},
        "neighborhood": {"neighborhood": ("The <new> is",)},
        "portability": {"portability": (Question("Where is", ("the <new>",)),)},
    }[where]
    edits = [EDITS[0], Edit(**fields | added)]
    for call in (edit_sequence, evaluate, take_baseline):
        with pytest.raises(ModelError, match=r"edit x: .*'<new>' \(id 320\).*end at 319"):
            call(model, tokenizer, edits)
    model.resize_token_embeddings(len(tokenizer))
    evaluate(model, tokenizer, edits)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"contexts": 10**9}, "contexts is 1000000000, must be at most 1,000"),
        ({"steps": 10**9}, "steps is 1000000000, must be at most 100,000"),
        ({"steps": 10**5000}, "steps is a value too long to be written, must be at most"),
        (
            {"prior_weight": 10**5000},
            "prior_weight is a value too long to be written, must be a finite number",
        ),
        ({"prior_weight": "x" * 999}, r"prior_weight is 'x{99}…, must be"),
    ],
)
def test_numbers_that_no_run_could_end_with_are_refused(fields, text):
    with pytest.raises(ConfigError, match=text):
        edit_sequence(
            tiny_model("llama", 1), tiny_tokenizer(), EDITS, method="memit", config=fields, progress=False
        )


def test_the_most_steps_that_are_allowed_are_allowed():
    assert TargetConfig(steps=100_000).steps == 100_000
