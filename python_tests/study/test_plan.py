"""The plan of a sequence: its bytes are those of a tiny run, and what does not fit is refused with what would."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from support.sequences import EDITS, FAST, ready, sequence
from support.tiny import tiny_model
from support.workbench import STRONG, SUBJECT_LAST, bench_of, editor_of

from d4s.errors import ConfigError
from d4s.methods import METHODS, method_for, sums_place
from d4s.methods.base import LayerSize
from d4s.models.architectures import Anatomy
from d4s.progress import duration
from d4s.sequence.schedule import Schedule
from d4s.study.plan import plan
from d4s.study.planned import DISK, VECTORS, Plan

# What an editor has from elsewhere: the model, W0 (told as copies), what is counted with the statistics on the host.
ELSEWHERE = {"bench", "anatomy", "tokenizer", "weights", "model", "module", "embeddings", "ahead", "method"}
SLACK = 4096  # bytes: counts, generators, scalars


def tensors(value: Any, seen: set[int] | None = None) -> Iterator[torch.Tensor]:
    """Every tensor that can be reached from an object, each once."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
        if value.grad is not None:
            yield value.grad
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item, seen)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item, seen)
    elif hasattr(value, "__dict__") and type(value).__module__.startswith("d4s"):
        for name, item in vars(value).items():
            if name not in ELSEWHERE:
                yield from tensors(item, seen)


def held(editor: Any) -> int:
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(editor) if not t.is_meta
    }
    storages.pop(0, None)
    return sum(storages.values())


@pytest.mark.parametrize("name", METHODS)
def test_what_an_editor_holds_is_what_was_told(name, seed):
    bench = bench_of("llama", seed)
    editor = editor_of(name, bench)
    for edit in SUBJECT_LAST:  # twice: the second updates an inverse
        editor.edit([edit])
    method = method_for(name, bench.anatomy, STRONG[name])
    told = 0
    for layer in editor.weights.layers:
        parts = method.holding(LayerSize.of(bench.anatomy, layer), len(SUBJECT_LAST)).parts
        told += sum(size for part, size in parts.items() if "Adam" not in part)  # gone after a step
    found = held(editor)
    # Beside what is told: an identity that all layers share, and U of W0.
    for other in ("_identities", "projections"):
        found -= sum(t.nbytes for t in tensors(vars(editor).get(other, {})))
    # At most what is told; as much, but for directions that C does not protect and entries that edits share.
    assert found <= told * 1.02 + SLACK
    assert found >= told * 0.6 - SLACK


@pytest.mark.parametrize("name", ["d4s", "memit-seq", "memit"])
def test_experts_are_within_what_was_told(name, seed):
    bench = bench_of("mixtral", seed)
    editor = editor_of(name, bench)
    for edit in SUBJECT_LAST:
        editor.edit([edit])
    method = method_for(name, bench.anatomy, STRONG[name])
    sizes = [LayerSize.of(bench.anatomy, layer) for layer in editor.weights.layers]
    assert all(size.experts == 4 and size.routed == 2 for size in sizes)
    told = sum(sum(method.holding(size, len(SUBJECT_LAST)).parts.values()) for size in sizes)
    # The moments are float64 here; told are those of float32, as they are estimated.
    more = sum(size.experts * 4 * size.d_in**2 for size in sizes)
    assert 0.2 * told <= held(editor) <= told + more + SLACK


@pytest.mark.parametrize(
    ("name", "vectors"), [("d4s", True), ("d4s", False), ("ft-m", True), ("grace", True)]
)
def test_the_journal_stays_within_what_was_told(name, vectors, seed, tmp_path):
    model, covariance = ready(seed)
    fields = FAST if name == "d4s" else dict(layers=[1], steps=2)
    method = method_for(name, Anatomy(model), fields)
    found = plan(model, method, len(EDITS), keep_vectors=vectors)
    sequence(
        model,
        covariance,
        method=name,
        config=fields,
        journal=tmp_path / "j",
        keep_vectors=vectors,
        original=False,
    )
    model.save_pretrained(tmp_path / "model")
    parts = {part.name: part.bytes for part in found.parts if part.place == DISK}
    weights = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert parts["edited model"] <= weights <= parts["edited model"] * 1.1 + 20_000
    files = [p for p in (tmp_path / "j").rglob("*") if p.is_file()]
    counted = sum(p.stat().st_size for p in files if p.parent.name not in ("points", "targets"))
    assert counted <= parts["journal"] + parts.get(VECTORS, 0) + 40_000
    if name == "d4s":
        shapes = [Anatomy(model).shape(layer) for layer in (0, 1)]
        assert parts.get(VECTORS, 0) == vectors * len(EDITS) * sum(4 * i + 8 * o for o, i in shapes)
        priors = [p for p in files if p.parent.name == "priors" or p.stem == "priors"]
        assert sum(p.stat().st_size for p in priors) >= sum(4 * i * i for _, i in shapes)


def test_copies_and_model_are_bytes_of_their_tensors(seed):
    bench = bench_of("gpt2", seed)
    editor = editor_of("d4s", bench)
    found = plan(bench.model, editor.method, 3)
    parts = {part.name: part.bytes for part in found.parts if part.place == "cpu"}
    assert parts["copies of edited weights"] == 2 * sum(w.nbytes for w in editor.weights.base.values())
    own = {t.data_ptr(): t.nbytes for t in (*bench.model.parameters(), *bench.model.buffers())}
    assert parts["model"] == sum(own.values())
    key_sums = sum(editor.closed_form.state_dict()[f"{i}.key_sum"].nbytes for i in editor.weights.layers)
    residual_sums = sum(
        editor.closed_form.state_dict()[f"{i}.residual_sum"].nbytes for i in editor.weights.layers
    )
    assert parts["sums"] == key_sums + residual_sums


def test_activations_are_within_a_factor_of_those_kept(seed):
    """Against the tensors that a search's backward pass keeps, on the model itself."""
    from d4s.models.trace import Trace
    from d4s.study.plan import _kept_a_token

    model = tiny_model("llama", seed, num_hidden_layers=4)
    anatomy = Anatomy(model)
    told = [_kept_a_token(anatomy, layer) for layer in (0, 1, 2)]
    kept: dict[int, torch.Tensor] = {}
    own = {id(p) for p in model.parameters()}

    def keep(tensor):
        if id(tensor) not in own and id(tensor._base) not in own:
            kept[id(tensor)] = tensor
        return tensor

    for p in model.parameters():
        p.requires_grad_(False)
    delta = torch.zeros(1, 1, anatomy.width, requires_grad=True)
    ids = torch.randint(300, (4, 20))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        Trace(anatomy.blocks[1], edit=lambda output: output + delta),
    ):
        model.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    real = sum(t.nbytes for t in kept.values()) / ids.numel()
    assert real / 2 <= told[1] <= 3 * real
    assert told[0] > told[1] > told[2] > 0


@pytest.mark.parametrize("context_keys, share", [("each", (3 + 2) / 2 / 3), ("mean", (2 + 2) / 2 / 3)])
def test_the_passes_of_a_step_begin_at_the_layer_before(context_keys, share, seed):
    anatomy = Anatomy(tiny_model("llama", seed))
    assert len(anatomy) == 3
    method = method_for("d4s", anatomy, {"layers": [1, 2], "contexts": 1, "context_keys": context_keys})
    by_name = {one.name: one for one in plan(anatomy.model, method, 10).passes}
    assert by_name["keys"].share == pytest.approx(share)
    if context_keys == "mean":  # up to the last layer, from the embedding and from block 1 on
        assert by_name["residuals"].share == pytest.approx((3 + 2) / 2 / 3)


@pytest.mark.parametrize("name", METHODS)
def test_more_edits_never_take_less(name, seed):
    model = tiny_model("llama", seed)
    method = method_for(name, Anatomy(model))
    sizes = [1, 7, 64, 1000]
    plans = [plan(model, method, n, schedule=Schedule(evaluate_every=10)) for n in sizes]
    for fewer, more in pairwise(plans):
        for place in fewer.places:
            assert more.bytes(place) >= fewer.bytes(place)
        for one, other in zip(fewer.passes, more.passes, strict=True):
            assert one.name == other.name and other.tokens >= one.tokens
    if name == "d4s":  # what the sums take does not grow at all
        sums = {p.bytes for one in plans for p in one.parts if p.name == "sums"}
        assert len(sums) == 1


def test_ranks_share_searches_and_not_memory(seed):
    model = tiny_model("llama", seed)
    method = method_for("d4s", Anatomy(model))
    one, four = (plan(model, method, 100, ranks=ranks) for ranks in (1, 4))
    by_name = [{p.name: p.tokens for p in found.passes} for found in (one, four)]
    assert by_name[1]["targets"] * 4 == by_name[0]["targets"]
    assert one.bytes("cpu") == four.bytes("cpu")


def test_a_model_without_weights_has_the_same_plan(seed):
    model = tiny_model("gpt2", seed)
    method = method_for("d4s", Anatomy(model))
    there = plan(model, method, 20)
    model = model.to("meta")
    model.tie_weights()
    bare = plan(model, method, 20, device="cpu")
    assert there.parts == bare.parts and there.passes == bare.passes
    with pytest.raises(ConfigError, match="without weights"):
        plan(model, method, 20, measure=True)


def test_a_measurement_gives_every_pass_its_seconds(seed, monkeypatch):
    monkeypatch.setattr("d4s.study.plan.MEASURING", 0.05)
    model = tiny_model("gpt2", seed)
    found = plan(model, method_for("d4s", Anatomy(model)), 20, measure=True)
    assert all(one.seconds > 0 for one in found.passes) and found.solving > 0
    assert found.seconds == pytest.approx(sum(p.seconds for p in found.passes) + found.solving)
    assert not any(p.requires_grad is False for p in model.parameters())
    assert "together about" in found.summary()


def test_later_passes_ask_every_edit_and_tell_what_one_made_again_takes(seed, monkeypatch):
    monkeypatch.setattr("d4s.study.plan.MEASURING", 0.05)
    model = tiny_model("gpt2", seed)
    method = method_for("d4s", Anatomy(model))
    one = plan(model, method, 20, measure=True)
    three = plan(model, method, 20, schedule=Schedule(passes=3), measure=True)
    asked = {p.name: p.rows for p in three.passes}
    assert asked.pop("questions before later passes") == 2 * 20
    assert asked == {p.name: p.rows for p in one.passes}
    own = sum(
        p.seconds for p in three.passes if p.name in ("text before the subject's end", "targets", "keys")
    )
    own += sum(p.seconds for p in three.passes if p.name == "residuals")
    assert three.seconds_again == pytest.approx((own + three.solving) / 20)
    assert f"about {duration(100 * three.seconds_again)} a hundred" in three.summary()
    assert "later pass" not in one.summary()
    unmeasured = plan(model, method, 20, schedule=Schedule(passes=3))
    assert unmeasured.seconds_again is None and "made again: as much as an edit" in unmeasured.summary()


def test_what_does_not_fit_is_refused_with_what_would(seed):
    model = tiny_model("llama", seed)
    method = method_for("d4s", Anatomy(model), {"layers": [0, 1, 2]})
    found = plan(model, method, 1000)
    needed = found.bytes("cpu", certain=True, unloaded=True)
    found.check({"cpu": needed}, loaded=True)
    with pytest.raises(
        ConfigError, match=r"cpu has .* free, and 1000 edits with d4s need .*--set layers=\[1, 2\]"
    ):
        found.check({"cpu": int(0.7 * needed)}, loaded=True)
    with pytest.raises(ConfigError, match="neither --dtype bfloat16 nor a single layer"):
        found.check({"cpu": 10}, loaded=True)
    disk = found.bytes(DISK, certain=True)
    vectors = sum(p.bytes for p in found.parts if p.name == VECTORS)
    with pytest.raises(ConfigError, match="--keep-vectors no"):
        found.check({DISK: disk - vectors})
    with pytest.raises(ConfigError, match="larger disk"):
        found.check({DISK: 10})


def test_the_named_layers_do_fit(seed):
    model = tiny_model("llama", seed)
    anatomy = Anatomy(model)
    found = plan(model, method_for("d4s", anatomy, {"layers": [0, 1, 2]}), 50)
    free = int(0.7 * found.bytes("cpu", certain=True, unloaded=True))
    fewer = plan(model, method_for("d4s", anatomy, {"layers": [1, 2]}), 50)
    fewer.check({"cpu": free}, loaded=True)


@pytest.fixture
def gpu(seed, monkeypatch):
    """A plan of a model without weights on a GPU, where so much is free."""
    model = tiny_model("llama", seed).to("meta")
    model.tie_weights()

    def planned(free: int | None = None, name: str = "d4s", **options: Any) -> Plan:
        monkeypatch.setattr(sums_place, "free_on", lambda device: free)
        method = method_for(name, Anatomy(model), {"layers": [0, 1, 2]} if name == "d4s" else None)
        return plan(model, method, 100, device="cuda:0", **options)

    return planned


def by_name(found: Plan, place: str) -> dict[str, int]:
    return {part.name: part.bytes for part in found.parts if part.place == place and part.certain}


@pytest.mark.parametrize("name", ["d4s", "memit", "lyaplock", "alphaedit", "rome"])
def test_sums_on_the_cpu_are_counted_there_and_what_crosses_on_the_device(name, gpu):
    there, away = gpu(name=name), gpu(name=name, sums_on="cpu")
    moved = {"statistics", "sums", "change", "inverse", "rows"} & set(by_name(there, "cuda:0"))
    assert moved and not moved & set(by_name(away, "cuda:0"))
    for part in moved:
        assert by_name(away, "cpu")[part] == by_name(there, "cuda:0")[part]
    size = next(iter(there.sizes.values()))
    crosses = 8 * size.d_in if name == "rome" else 8 * size.d_in * size.d_out
    assert by_name(away, "cuda:0")[sums_place.CROSSING] == crosses
    assert away.bytes("disk") == there.bytes("disk") and away.passes == there.passes
    assert away.sums_on_host == away.layers and there.sums_on_host == ()
    assert "on the CPU: at each step" in away.summary() and "on the CPU" not in there.summary()
    assert away.to_dict()["sums_on_host"] == list(away.layers)


@pytest.mark.parametrize("name", ["kn", "ft-m", "ultraedit", "grace"])
def test_methods_without_sums_plan_the_same_wherever_they_are_to_be(name, gpu):
    assert gpu(name=name, sums_on="cpu") == gpu(name=name) == gpu(0, name=name)


def test_a_plan_says_where_auto_would_put_the_sums(gpu):
    there = gpu()
    needed = there.bytes("cuda:0", certain=True)  # the model, which is not there yet, among it
    assert gpu(needed) == there == gpu(0, sums_on="device")
    assert gpu(needed - 1) == gpu(sums_on="cpu")


def test_what_does_not_fit_a_device_is_told_where_its_sums_would(gpu):
    there, away = gpu(sums_on="device"), gpu(sums_on="cpu")
    least, host = away.bytes("cuda:0", certain=True), away.bytes("cpu", certain=True)
    away.check({"cuda:0": least, "cpu": host})
    for free in ({"cuda:0": least, "cpu": host}, {"cuda:0": least}):
        with pytest.raises(ConfigError, match=r"cuda:0 has .* it would fit with .*--sums-on cpu \(moves "):
            there.check(free)
    for free in ({"cuda:0": least - 1, "cpu": host}, {"cuda:0": least, "cpu": host - 1}):
        with pytest.raises(ConfigError) as refused:
            there.check(free)
        assert "--sums-on" not in str(refused.value)


@pytest.mark.parametrize(("edits", "ranks"), [(0, 1), (1, 0)])
def test_numbers_below_one_are_refused(edits, ranks, seed):
    model = tiny_model("gpt2", seed)
    with pytest.raises(ConfigError, match="must be 1 or more"):
        plan(model, method_for("d4s", Anatomy(model)), edits, ranks=ranks)
