"""Mixtures of experts: one joint linear map, written out densely in float64 on every type of the table."""

from __future__ import annotations

import pytest
import torch
from support.sequences import EDITS as SEVEN
from support.sequences import FAST, ready, sequence
from support.tiny import EXPERTS, TEXTS, tiny_model, tiny_tokenizer
from support.workbench import EDITS, SUBJECT_LAST, bench_of, editor_of, relative_error, same_bits, state_of
from torch.nn.functional import silu

from d4s.errors import ConfigError, CovarianceError, ModelError
from d4s.journal.journal import Journal
from d4s.locate.covariance import Covariance, estimate_covariance
from d4s.locate.keys import keys_at, subject_rows
from d4s.methods import METHODS, Workbench, method_for
from d4s.models.architectures import Anatomy, Architecture
from d4s.models.trace import Trace, stopping

EDITING = ("d4s", "memit", "memit-seq")
ONE = {
    "mixtral": dict(num_local_experts=1, num_experts_per_tok=1),
    "qwen3_moe": dict(num_experts=1, num_experts_per_tok=1, moe_intermediate_size=48),
}


@torch.no_grad()
def called(anatomy: Anatomy, layer: int, ids: torch.Tensor):
    """(x, experts, gates, output) of a layer's experts at every token, float64."""
    module = anatomy.experts(layer).module
    with Trace(module, stop=True) as trace, stopping():
        anatomy.model(input_ids=ids, use_cache=False)
    x, index, gates = trace.arguments
    return x.double(), index, gates.double(), trace.output.reshape(len(x), -1).double()


def written_out(model_type: str, module, expert: int, x: torch.Tensor) -> torch.Tensor:
    """k_j of one token x, by the model type's own formula."""
    inner = module.gate_up_proj[expert].detach().double()
    if model_type != "gpt_oss":
        gate, up = (inner @ x).chunk(2)
        return silu(gate) * up
    both = x @ inner + module.gate_up_proj_bias[expert].detach().double()
    gate, up = both[::2].clamp(max=module.limit), both[1::2].clamp(-module.limit, module.limit)
    return (up + 1) * gate * torch.sigmoid(module.alpha * gate)


def matrices(anatomy: Anatomy, layer: int) -> torch.Tensor:
    """W = [W_1 … W_E], [d_out, E · d_in] float64."""
    weight = anatomy.weight(layer).detach().double()
    upright = weight.mT if anatomy.transposed(layer) else weight
    return torch.cat(list(upright), 1)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("model_type", EXPERTS)
def test_the_joint_map_of_the_joint_key_is_what_the_experts_put_out(model_type, implementation, seed):
    anatomy = Anatomy(tiny_model(model_type, seed))
    try:
        anatomy.model.set_experts_implementation(implementation)
    except (AttributeError, KeyError, ValueError) as error:
        pytest.skip(f"this transformers has no {implementation} experts ({error})")
    rows = subject_rows(tiny_tokenizer(), EDITS[:3])
    keys = keys_at(anatomy, rows, 1).double()
    experts = anatomy.experts(1)
    assert keys.shape == (3, experts.count * anatomy.shape(1)[1]) and anatomy.shape(1)[0] == 32
    for ids, key in zip(rows.ids, keys, strict=True):
        x, index, gates, output = called(anatomy, 1, torch.tensor([ids]))
        expected = torch.zeros(experts.count, anatomy.shape(1)[1], dtype=torch.float64)
        for expert, gate in zip(index[-1].tolist(), gates[-1], strict=True):
            expected[expert] = gate * written_out(model_type, experts.module, expert, x[-1])
        assert relative_error(key, expected.flatten()) < 1e-5
        found = matrices(anatomy, 1) @ key
        if (bias := getattr(experts.module, "down_proj_bias", None)) is not None:
            found += gates[-1] @ bias.detach().double()[index[-1]]
        assert relative_error(output[-1], found) < 1e-5


@pytest.mark.parametrize("model_type", EXPERTS)
def test_statistics_are_those_of_the_tokens_routed_to_each_expert(model_type, seed, tmp_path):
    anatomy, tokenizer = Anatomy(tiny_model(model_type, seed)), tiny_tokenizer()
    found = estimate_covariance(
        anatomy.model, tokenizer, TEXTS, layers=[1], tokens=100, dtype=torch.float64, progress=False
    )
    module, d_in = anatomy.experts(1).module, anatomy.shape(1)[1]
    moments = torch.zeros(anatomy.experts(1).count, d_in, d_in, dtype=torch.float64)
    routed = torch.zeros(len(moments), dtype=torch.long)
    left = 100
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"][:left]
        left -= len(ids)
        if not ids:
            break
        x, index, gates, _ = called(anatomy, 1, torch.tensor([ids]))
        for token in range(len(ids)):
            for expert, gate in zip(index[token].tolist(), gates[token], strict=True):
                key = gate * written_out(model_type, module, expert, x[token])
                moments[expert] += key.outer(key)
                routed[expert] += 1
    assert torch.equal(found.routed[1], routed) and found.count == 100
    assert relative_error(found.of_experts(1)[0], moments) < 1e-5
    found.save(tmp_path / "c.safetensors")
    again = Covariance.load(tmp_path / "c.safetensors")
    again.check(anatomy, [1])
    assert again.digest([1]) == found.digest([1]) and torch.equal(again.routed[1], routed)
    both = found.merge(again)
    assert torch.equal(both.routed[1], 2 * routed) and both.digest([1]) != found.digest([1])
    with pytest.raises(CovarianceError, match=r"those of .* experts"):
        found.mean(1)


@pytest.mark.parametrize(
    ("model_type", "name"), [*((t, "d4s") for t in EXPERTS), ("mixtral", "memit"), ("olmoe", "memit-seq")]
)
def test_what_is_written_is_the_joint_least_squares_step(model_type, name, seed):
    """One layer, a batch of two: Δ = Rᵀ K (λC + KᵀK)⁻¹ over all experts at once; the rest keeps its bits."""
    bench = bench_of(model_type, seed)
    before = state_of(bench)
    editor = editor_of(name, bench, layers=[1])
    anatomy, d_in = bench.anatomy, bench.anatomy.shape(1)[1]
    targets = editor.targets(SUBJECT_LAST)
    keys = editor.keys(editor.rows(SUBJECT_LAST), 1)
    old = matrices(anatomy, 1)
    blocks = []
    moments, routed = bench.covariance([1]).of_experts(1)
    for moment, count in zip(moments, routed.tolist(), strict=True):
        # Few tokens: the ridge of the configuration is that of thin experts.
        c = moment / max(count, 1)
        scale = c.diagonal().mean() if count else None
        blocks.append(None if scale is None else c + 0.1 * scale * torch.eye(d_in, dtype=torch.float64))
    seen = [float((m / n).diagonal().mean()) for m, n in zip(moments, routed.tolist(), strict=True) if n]
    unseen = sum(seen) / len(seen) * torch.eye(d_in, dtype=torch.float64)
    prior = 1e-2 * torch.block_diag(*(unseen if block is None else block for block in blocks))
    residuals = targets.delta.double()
    truth = torch.linalg.solve(prior + keys.T @ keys, keys.T @ residuals).T
    editor.edit(SUBJECT_LAST)
    assert relative_error(matrices(anatomy, 1) - old, truth) < 1e-3  # z and h in float32, of a long target
    hit = keys.view(len(keys), -1, d_in).any(2).any(0)
    weight, unedited = anatomy.weight(1), before[anatomy.weight_name(1)]
    for expert, touched in enumerate(hit.tolist()):
        assert torch.equal(weight[expert], unedited[expert]) != touched
    changed = [n for n, tensor in bench.model.state_dict().items() if not torch.equal(tensor, before[n])]
    assert changed == [anatomy.weight_name(1)]
    means = editor.weights.mean_absolute_of_experts(1)
    assert means == pytest.approx([float(w.double().abs().mean()) for w in weight.detach()])
    assert editor.weights.mean_absolute()[1] == pytest.approx(sum(means) / len(means))
    assert editor.weights.delta_norm()[1] == pytest.approx(float((matrices(anatomy, 1) - old).norm()))
    editor.restore()
    assert same_bits(state_of(bench), before)


@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss", "deepseek_v3"])
def test_single_steps_of_one_layer_are_one_batch_in_any_order(model_type, seed):
    found = []
    for steps in ([SUBJECT_LAST], [SUBJECT_LAST[:1], SUBJECT_LAST[1:]], [SUBJECT_LAST[1:], SUBJECT_LAST[:1]]):
        bench = bench_of(model_type, seed)
        editor = editor_of("d4s", bench, layers=[1], residual="once")
        editor.announce(SUBJECT_LAST)  # searched together, so that targets have the same bits
        for batch in steps:
            editor.edit(batch)
        found.append(matrices(bench.anatomy, 1) - bench_matrices(model_type, seed))
    assert max(relative_error(other, found[0]) for other in found[1:]) < 1e-4  # weights are float32


def bench_matrices(model_type: str, seed: int) -> torch.Tensor:
    return matrices(Anatomy(tiny_model(model_type, seed)), 1)


@pytest.mark.parametrize(
    ("model_type", "name"), [("mixtral", "memit"), ("qwen3_moe", "memit-seq"), ("deepseek_v3", "d4s")]
)
def test_a_sequence_over_several_layers_goes_on_from_its_state_with_the_same_bits(model_type, name, seed):
    """Edited layers with experts, and in deepseek_v3 a dense one below them."""
    bench, other = bench_of(model_type, seed), bench_of(model_type, seed)
    editor = editor_of(name, bench, layers=[0, 1, 2])
    before = state_of(bench)
    editor.edit(EDITS[:2])
    state = editor.snapshot()
    editor.edit(EDITS[2:])
    again = editor_of(name, other, layers=[0, 1, 2])
    again.resume_(state)
    again.edit(EDITS[2:])
    assert same_bits(state_of(bench), state_of(other)) and not same_bits(state_of(bench), before)
    assert torch.equal(again.weights.norms(), editor.weights.norms())
    editor.restore()
    assert same_bits(state_of(bench), before)


def test_a_prompt_that_is_edited_again_takes_the_earlier_ones_place(seed):
    """One layer: as if the first answer had never been asked for."""
    first = SUBJECT_LAST[0]
    second = type(first)(first.prompt, first.subject, "Paris", id="other")
    found = []
    for steps in ([first, second], [second]):
        bench = bench_of("qwen3_moe", seed)
        editor = editor_of("d4s", bench, layers=[1], residual="once")
        for edit in steps:
            editor.edit([edit])
        found.append(matrices(bench.anatomy, 1) - bench_matrices("qwen3_moe", seed))
    assert relative_error(found[0], found[1]) < 1e-4


class FusedMLP(torch.nn.Module):
    """A dense MLP that multiplies as an expert does: gate and up in one product."""

    def __init__(self, inner: torch.Tensor, outer: torch.Tensor) -> None:
        super().__init__()
        self.gate_up_proj = torch.nn.Linear(inner.shape[1], inner.shape[0], bias=False)
        self.down_proj = torch.nn.Linear(outer.shape[1], outer.shape[0], bias=False)
        self.gate_up_proj.weight.data, self.down_proj.weight.data = inner, outer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(silu(gate) * up)


DENSE_TWIN = Architecture("model.layers", "mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj")


@pytest.mark.parametrize(
    ("model_type", "name"), [("mixtral", "d4s"), ("qwen3_moe", "memit"), ("qwen3_moe", "memit-seq")]
)
def test_one_expert_with_gate_1_is_the_dense_model_bit_for_bit(model_type, name, seed):
    """In float32: statistics, targets, keys of several contexts and edits over two layers, in two steps."""
    model, twin = (tiny_model(model_type, seed, **ONE[model_type]) for _ in range(2))
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    for block in twin.model.layers:
        experts = block.mlp.experts
        block.mlp = FusedMLP(experts.gate_up_proj.detach()[0], experts.down_proj.detach()[0])
    found = []
    for one, architecture in ((model, None), (twin, DENSE_TWIN)):
        covariance = estimate_covariance(
            one, tiny_tokenizer(), TEXTS, tokens=90, architecture=architecture, progress=False
        )
        bench = Workbench(one, tiny_tokenizer(), covariance=covariance, architecture=architecture, seed=seed)
        editor = editor_of(name, bench, layers=[0, 1], contexts=1, steps=6)
        editor.edit(EDITS[:2])
        editor.edit(EDITS[2:])
        found.append([bench.anatomy.weight(i).detach().view(32, 48) for i in (0, 1)])
        editor.edit(EDITS[:1])
        found[-1] += [torch.tensor(list(editor.weights.mean_absolute().values()))]
    assert all(torch.equal(mine, dense) for mine, dense in zip(*found, strict=True))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in EDITING])
def test_other_methods_refuse_experts_in_one_line(name, seed):
    model = tiny_model("qwen3_moe", seed)
    covariance = estimate_covariance(model, tiny_tokenizer(), TEXTS, tokens=60, progress=False)
    bench = Workbench(model, tiny_tokenizer(), covariance=covariance)
    with pytest.raises((ConfigError, ModelError), match=f"experts, which {name} does not edit; d4s, memit"):
        method_for(name, bench.anatomy).editor(bench)


def test_experts_that_are_kept_otherwise_are_refused(seed):
    model = tiny_model("mixtral", seed)
    model.model.layers[1].mlp.experts = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts \(ModuleList\).*cannot be edited"):
        Anatomy(model).weight(1)


def test_statistics_of_other_experts_are_refused(seed):
    bench = bench_of("mixtral", seed)
    held = bench.covariance([1])
    moments, routed = held.of_experts(1)
    for fewer in (
        Covariance({1: moments[:2]}, held.count, routed={1: routed[:2]}),
        Covariance({1: moments[0]}, held.count),
    ):
        with pytest.raises(CovarianceError, match=r"layer 1: .* the model has 4 experts there"):
            fewer.check(bench.anatomy, [1])
    with pytest.raises(CovarianceError, match=r"must be .*experts"):
        Covariance({1: moments}, held.count, routed={1: routed[:2]})
    with pytest.raises(CovarianceError, match=r"layer 1, expert 2: .*NaN"):
        spoiled = moments.clone()
        spoiled[2, 0, 0] = float("nan")
        Covariance({1: spoiled}, held.count, routed={1: routed})


@pytest.mark.parametrize("name", ["d4s", "memit"])
def test_a_sequence_is_journalled_and_tells_how_routing_moves(name, seed, tmp_path):
    model, covariance = ready(seed, "mixtral")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    config = FAST | dict(layers=[0, 1])
    options = dict(method=name, config=config, journal=tmp_path / "j", evaluate_every=2)
    result = sequence(model, covariance, SEVEN[:4], **options)
    assert [row["step"] for row in result.history] == [0, 2, 4]
    assert result.history[0]["routing_change"] == 0 <= result.history[-1]["routing_change"] <= 1
    journal = Journal(tmp_path / "j")
    weights = journal.weights()
    assert all(torch.equal(weights[n], model.state_dict()[n]) for n in weights) and len(weights) == 2
    edited = {n: t.clone() for n, t in model.state_dict().items()}
    result.restore()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    again = sequence(model, covariance, SEVEN[:4], **options)  # goes on at its end
    assert all(torch.equal(t, edited[n]) for n, t in model.state_dict().items())
    assert again.history[-1]["routing_change"] == result.history[-1]["routing_change"]


def test_routing_that_moves_is_counted(seed):
    """Against the routers' own choices, one prompt at a time."""
    model, covariance = ready(seed, "qwen3_moe")
    result = sequence(model, covariance, SEVEN[:2], config=FAST | dict(layers=[0]), original=False)
    anatomy, weights = result.editor.anatomy, result.editor.weights

    def chosen():
        found = []
        for prompt in dict.fromkeys(p for edit in SEVEN[:2] for p in edit.neighborhood):
            ids = torch.tensor([tiny_tokenizer()(prompt)["input_ids"]])
            for layer in (1, 2):
                found += [set(row) for row in called(anatomy, layer, ids)[1].tolist()]
        return found

    now = chosen()
    with weights.at_base():
        before = chosen()
    moved = sum(one != other for one, other in zip(now, before, strict=True)) / len(now)
    assert result.history[-1]["routing_change"] == pytest.approx(moved)
    assert "routing_change" not in sequence(*ready(seed, "llama"), SEVEN[:1], original=False).history[-1]
