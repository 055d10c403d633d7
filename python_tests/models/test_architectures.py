"""Every supported model type, on a tiny random model built from its configuration."""

from __future__ import annotations

import pytest
import torch
from support.tiny import CONFIGS, DENSE, tiny_model, tiny_tokenizer
from support.workbench import EDITS, bench_of, editor_of
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from d4s.edits import Edit
from d4s.errors import ConfigError, ModelError
from d4s.locate.keys import keys_at, output_at, subject_rows
from d4s.models.architectures import ARCHITECTURES, Anatomy, Architecture, architecture_of
from d4s.models.trace import Trace

EDIT = Edit(prompt="The mother tongue of {} is", subject="Danielle Darrieux", target_new="English")


def test_every_row_of_the_table_is_tested():
    assert set(CONFIGS) == set(ARCHITECTURES)


@pytest.mark.parametrize("model_type", DENSE)
def test_the_weight_times_the_key_is_the_projections_output(model_type):
    anatomy = Anatomy(tiny_model(model_type))
    rows = subject_rows(tiny_tokenizer(), [EDIT])
    key = keys_at(anatomy, rows, 1)[0]
    assert key.shape == (anatomy.shape(1)[1],) and anatomy.shape(1)[0] == 32
    weight = anatomy.weight(1).detach()
    weight = weight.T if anatomy.transposed(1) else weight
    bias = anatomy.projection(1).bias
    expected = weight @ key + (0 if bias is None else bias.detach())
    torch.testing.assert_close(
        output_at(anatomy, rows, anatomy.projection(1))[0], expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("model_type", CONFIGS)
def test_the_weight_name_finds_the_weight_in_the_state_dict(model_type):
    model = tiny_model(model_type)
    anatomy = Anatomy(model)
    assert model.state_dict()[anatomy.weight_name(2)].data_ptr() == anatomy.weight(2).data_ptr()


def _what_arrives(anatomy: Anatomy) -> tuple[torch.Tensor, torch.Tensor]:
    """What block 1 puts out more at the subject when W's output is doubled there, and W's output; both [d_model]."""
    rows = subject_rows(tiny_tokenizer(), [EDIT])
    ids = torch.tensor([rows.ids[0]])
    seen = []
    for factor in (1.0, 2.0):
        with (
            Trace(anatomy.projection(1), edit=lambda output, factor=factor: output * factor),
            Trace(anatomy.blocks[1], copied=True) as block,
            torch.no_grad(),
        ):
            anatomy.model(input_ids=ids, use_cache=False)
        seen.append(block.output.reshape(-1, *ids.shape, 32)[0, 0, -1])
    return seen[1] - seen[0], output_at(anatomy, rows, anatomy.projection(1))[0]


@pytest.mark.parametrize("model_type", DENSE)
def test_the_table_says_whether_the_mlps_output_arrives_in_the_blocks_as_it_is(model_type):
    anatomy = Anatomy(tiny_model(model_type))
    added, output = _what_arrives(anatomy)
    if anatomy.architecture.normed_mlp_output:
        assert (added - output).norm() > 0.1 * output.norm()
    else:
        torch.testing.assert_close(added, output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("opt", dict(do_layer_norm_before=True)),
        ("granite", dict(residual_multiplier=1.0)),
        ("hyperclovax", dict(residual_multiplier=1.0, use_post_norm=False)),
    ],
)
def test_where_a_model_chooses_to_have_nothing_there_its_targets_are_the_blocks(model_type, changes):
    anatomy = Anatomy(tiny_model(model_type, **changes))
    assert ARCHITECTURES[model_type].normed_mlp_output and not anatomy.architecture.normed_mlp_output
    torch.testing.assert_close(*_what_arrives(anatomy), rtol=1e-4, atol=1e-5)
    one, *_ = changes  # a single one of two is not enough
    if len(changes) > 1:
        assert Anatomy(tiny_model(model_type, **{one: changes[one]})).architecture.normed_mlp_output


def test_blocks_whose_keys_later_ones_take_are_not_to_be_skipped():
    """gemma4's last block takes the keys that block 1 has left; without any that do so all can be skipped."""
    assert Anatomy(tiny_model("gemma4_text")).skippable == 1
    alone = dict(num_kv_shared_layers=0)
    assert Anatomy(tiny_model("gemma4_text", **alone)).skippable == 3
    assert Anatomy(tiny_model("llama")).skippable == 3
    full, sliding = "full_attention", "sliding_attention"
    kinds = [full, sliding, sliding, full, sliding, full]  # the last two take from blocks 2 and 3
    longer = dict(num_hidden_layers=6, num_kv_shared_layers=2, layer_types=kinds)
    assert Anatomy(tiny_model("gemma4_text", **longer)).skippable == 2


def test_an_opt_with_norms_behind_its_sums_is_told_from_the_others(seed):
    """As facebook/opt-350m: an edit that the prior does not hold back gives the MLP the output that was asked for."""
    bench = bench_of("opt", seed, do_layer_norm_before=False)
    assert bench.anatomy.architecture.normed_mlp_output
    assert not bench_of("opt", seed).anatomy.architecture.normed_mlp_output
    editor = editor_of("d4s", bench, layers=[1], prior_weight=1e-6, ridge=1e-2)
    target = editor.targets(EDITS[:1]).target.double()
    editor.edit(EDITS[:1])
    reached = editor.state(editor.rows(EDITS[:1]))
    assert (reached - target).norm() <= 1e-2 * target.norm()


def test_a_model_on_no_device_is_refused():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **CONFIGS["llama"]))
    with pytest.raises(ModelError, match=r"lies on meta, .* load the model whole"):
        Anatomy(model).check_placement()


def test_quantised_weights_are_refused_by_their_type():
    anatomy = Anatomy(tiny_model("llama"))
    anatomy.weight(1).data = anatomy.weight(1).data.to(torch.float8_e4m3fn)
    with pytest.raises(ModelError, match=r"down_proj\.weight is torch\.float8_e4m3fn.*without quantisation"):
        anatomy.check_finite((1,))


def test_an_unknown_type_names_the_nearest_and_the_way_out():
    model = tiny_model("llama")
    model.config.model_type = "lama"
    with pytest.raises(ModelError, match=r"'lama'.*mean 'llama'.*architecture=d4s\.Architecture"):
        architecture_of(model)
    assert Anatomy(model, ARCHITECTURES["llama"]).shape(0) == (32, 48)


def test_a_wrong_path_is_named():
    wrong = Architecture("model.layers", "mlp.nothing", "mlp.gate_proj", "self_attn.o_proj")
    with pytest.raises(ModelError, match=r"model\.layers\.0 has no 'mlp\.nothing'"):
        architecture_of(tiny_model("llama"), wrong)
    with pytest.raises(ModelError, match="Linear"):
        architecture_of(nn.Linear(2, 2))


def test_layers_outside_the_model_are_refused():
    anatomy = Anatomy(tiny_model("gpt2"))
    for layers in ((), (3,), (1, 1), (2, 1), (-1,)):
        with pytest.raises(ConfigError, match="within 0…2"):
            anatomy.check_layers(layers)


def test_nan_weights_are_refused():
    anatomy = Anatomy(tiny_model("gpt2"))
    anatomy.weight(1).data[3, 4] = float("nan")
    anatomy.check_finite((0, 2))
    with pytest.raises(ModelError, match=r"transformer\.h\.1\.mlp\.c_proj\.weight holds 1 value"):
        anatomy.check_finite((0, 1))
