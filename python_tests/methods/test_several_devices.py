"""A model over several devices is edited to the bits of the whole one, and everything of a layer is where its W is."""

from __future__ import annotations

import pytest
import torch
from support.second_device import FIRST, SECOND, Elsewhere, TwoDevices, plain_ops, spread
from support.tiny import TEXTS, tiny_model, tiny_tokenizer
from support.workbench import STRONG, SUBJECT_LAST

from d4s.errors import ConfigError, ModelError
from d4s.locate.covariance import estimate_covariance
from d4s.measure.metrics import evaluate
from d4s.methods import Workbench, method_for
from d4s.models.architectures import Anatomy, check_on_devices
from d4s.models.loading import load_model

pytest.importorskip("accelerate")
LAYERS = {"layers": (0, 1, 2)}  # the first on one device, the others on the second
CONFIGS = {
    "d4s": LAYERS | {"contexts": 1, "context_lengths": (3,), "steps": 3},
    "alphaedit": LAYERS | {"steps": 3},
    "lyaplock": LAYERS | {"steps": 3},
    "rome": {"layers": (1,), "steps": 3},
    "ft-m": {"layers": (0, 2), "steps": 3},
    "ultraedit": {"layers": (1, 2), "modules": ("mlp.down_proj", "mlp.up_proj")},
    "grace": {"layers": (1,), "steps": 3},
    "kn": {"layers": (0, 1)},
}


def edited(name: str, seed: int, model) -> dict[str, torch.Tensor]:
    """The weights after two steps, and what the unedited model's statistics and the edited one's answers were."""
    tokenizer = tiny_tokenizer()
    covariance = estimate_covariance(
        model, tokenizer, TEXTS * 4, tokens=300, dtype=torch.float64, progress=False
    )
    bench = Workbench(model, tokenizer, covariance=covariance, seed=seed)
    method = method_for(name, bench.anatomy, STRONG[name] | CONFIGS[name])
    editor = method.settled(bench, SUBJECT_LAST).editor(bench)
    editor.announce(SUBJECT_LAST)
    for edit in SUBJECT_LAST:
        editor.edit([edit])
    found = {f"C{layer}": plain(moment) for layer, moment in covariance.moments.items()}
    found |= {f"state.{key}": plain(value) for key, value in editor.snapshot().items() if key != "held"}
    found |= {n: plain(p.detach()).clone() for n, p in model.named_parameters()}
    rows = evaluate(model, tokenizer, SUBJECT_LAST, check=False).rows
    found["nll"] = torch.tensor([row["nll_new"] for row in rows], dtype=torch.float64)
    editor.restore()
    return found


def plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.held if isinstance(tensor, Elsewhere) else tensor


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_over_two_devices_is_edited_to_the_same_bits(name, seed, monkeypatch):
    plain_ops(monkeypatch)
    whole = edited(name, seed, tiny_model("llama", seed, attn_implementation="eager"))
    model = tiny_model("llama", seed, attn_implementation="eager")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    spread(model, [*model.model.layers[1:], model.model.norm], monkeypatch)
    with TwoDevices():
        assert Anatomy(model).device_of(0) == FIRST and Anatomy(model).device_of(1) == SECOND
        found = edited(name, seed, model)
    assert found.keys() == whole.keys()
    wrong = [key for key in whole if not torch.equal(found[key], whole[key])]
    assert not wrong
    assert name == "grace" or any(not torch.equal(whole[key], before[key]) for key in before)
    assert all(torch.equal(plain(p.detach()), before[n]) for n, p in model.named_parameters()), "restored"


def test_a_mixture_of_devices_is_an_error_of_the_second_device():
    with TwoDevices():
        here, there = torch.ones(2), torch.ones(2).to(SECOND)
        assert there.device == SECOND and torch.equal((there + there).to(FIRST), here + here)
        with pytest.raises(RuntimeError, match="on the same device"):
            here + there


def test_a_model_that_nothing_connects_is_refused(seed, monkeypatch):
    model = tiny_model("llama", seed)
    spread(model, [model.model.layers[2]], monkeypatch)
    check_on_devices(model)
    del model._hf_hook
    with pytest.raises(ModelError, match=r"lies on cpu, cpu:0, and nothing moves .* device_map='auto'"):
        check_on_devices(model)


def test_offloaded_weights_are_refused(seed):
    from accelerate import cpu_offload

    model = cpu_offload(tiny_model("llama", seed), execution_device=torch.device("cpu"))
    with pytest.raises(ModelError, match=r"lies on meta, .* offloaded .* load the model whole"):
        check_on_devices(model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    tiny_model("llama", 3).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_a_device_map_loads_the_same_weights(device_map, folder):
    mapped, plain_one = load_model(folder, device_map=device_map)[0], load_model(folder, device="cpu")[0]
    assert mapped.d4s_source == plain_one.d4s_source and not mapped.training
    for one, other in zip(mapped.parameters(), plain_one.parameters(), strict=True):
        assert torch.equal(one.cpu(), other)
    check_on_devices(mapped)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(device_map="atuo"), "unknown device_map 'atuo'. Did you mean 'auto'"),
        (dict(device_map="auto", device="cpu"), "device_map and device were both given"),
        (dict(device_map={"model": "cpu", "lm_head": "disk"}), "'disk' for lm_head: .*--dtype bfloat16"),
    ],
)
def test_device_maps_that_cannot_be_are_refused(options, message, folder):
    with pytest.raises(ConfigError, match=message):
        load_model(folder, **options)


def test_a_model_that_accelerate_could_only_place_in_part_is_refused(seed):
    from d4s.models.loading import _check_whole

    model = tiny_model("llama", seed)
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu"}
    with pytest.raises(
        ModelError, match=r"model.layers.1 would lie on cpu, for want of room: .* --device cpu"
    ):
        _check_whole("m", model)
    model.hf_device_map = {"model": 0, "lm_head": 1}
    _check_whole("m", model)
