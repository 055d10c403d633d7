"""A pass that is recorded and run again gives what the pass itself gives."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from support.tiny import REPRESENTATIVE, tiny_model, tiny_tokenizer

from d4s.edits import Edit
from d4s.locate import targets
from d4s.locate.targets import TargetConfig, optimise_targets
from d4s.models import recorded as module
from d4s.models.architectures import Anatomy
from d4s.models.recorded import Recorded

EDITS = [
    Edit(prompt="The mother tongue of {} is", subject="Danielle Darrieux", target_new="English"),
    Edit(prompt="{} worked for", subject="Steve Jobs", target_new="Manila Lyon"),
    Edit(prompt="{}", subject="Lyon", target_new="Paris"),
]
PREFIXES = ("The capital. ", "You play the piano because. ")


class Played(Recorded):
    """Stands for a recording where there is no GPU: what goes in and comes out lies in the same places each time."""

    made = 0

    def __init__(self, function, inputs):
        type(self).made += 1
        self.function = function
        self.inputs = [one.detach().clone() for one in inputs]
        self.outputs = [one.detach().clone() for one in self.play()]

    def play(self):
        return self.function(*self.inputs)

    def __call__(self, *inputs):
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given.detach())
        for own, found in zip(self.outputs, self.play(), strict=True):
            own.copy_(found)
        return self.outputs


class Wrong(Played):
    def __call__(self, *inputs):
        return [one + 1 if one.is_floating_point() else one for one in super().__call__(*inputs)]


class Waiting(Played):
    def __init__(self, function, inputs):
        type(self).made += 1
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(module, "_REFUSED", type(module._REFUSED)())
    for kind in (Played, Wrong, Waiting):
        monkeypatch.setattr(kind, "made", 0)


def _search(model, config, places=("block",), edits=EDITS):
    anatomy = Anatomy(model)
    return optimise_targets(anatomy, tiny_tokenizer(), edits, PREFIXES, 1, config, places=places)


def _same(found, right, **bounds):
    for name in ("start", "delta", "first_probability", "last_probability"):
        torch.testing.assert_close(getattr(found, name), getattr(right, name), **bounds)


CONFIGS = {
    "adam": TargetConfig(steps=12),
    "adam that stops": TargetConfig(steps=12, stop_loss=3.0),
    "polyak": TargetConfig(steps=8, optimizer="polyak", bare_looks=5),
    "pmet": TargetConfig(steps=8, settled_nll_factor=0.1, settled_kl=0.01),
}


@pytest.mark.parametrize("places", [("block",), ("mlp", "attention")], ids=["memit", "pmet"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_search_with_recorded_looks_is_the_search(config, places, seed, monkeypatch):
    model = tiny_model("llama")
    right = _search(model, config, places)
    monkeypatch.setattr(targets, "_is_worth_recording", lambda rows, looks: looks >= 2)
    monkeypatch.setattr(module, "Recorded", Played)
    _same(_search(model, config, places), right, rtol=0, atol=0)
    assert Played.made


@pytest.mark.parametrize("kind", [Wrong, Waiting])
def test_a_model_that_cannot_be_recorded_is_run_as_it_is(kind, seed, monkeypatch, caplog):
    model = tiny_model("llama")
    right = _search(model, CONFIGS["adam"])
    monkeypatch.setattr(targets, "_is_worth_recording", lambda rows, looks: looks > 1)
    monkeypatch.setattr(module, "Recorded", kind)
    with caplog.at_level(logging.INFO, "d4s.models.recorded"):
        for _ in range(2):
            _same(_search(model, CONFIGS["adam"]), right, rtol=0, atol=0)
    assert kind.made == 1
    assert len(caplog.messages) == 1


def test_no_looks_are_recorded_without_a_gpu(seed, monkeypatch):
    monkeypatch.setattr(module, "Recorded", Played)
    _search(tiny_model("llama"), CONFIGS["adam"])
    assert not Played.made


@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_recorded_looks_on_a_gpu(model_type, device, seed, monkeypatch):
    """Of every architecture, recorded and not; elsewhere nothing is recorded."""
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    model = tiny_model(model_type).to(device)
    monkeypatch.setattr(targets, "RECORDED_LOOKS", 10**6)
    right = _search(model, CONFIGS["adam"])
    monkeypatch.setattr(targets, "RECORDED_LOOKS", 2)
    for _ in range(2):
        _same(_search(model, CONFIGS["adam"]), right, rtol=1e-3, atol=1e-4)
    if not Anatomy(model).has_experts and module.is_refused(model):
        pytest.skip(f"{model_type} was not recorded")


def test_a_function_is_recorded_and_run_again(device):
    """On cuda; a second recording takes the first one's memory."""
    if torch.device(device).type != "cuda":
        pytest.skip("a recording is of a GPU")
    matrix = torch.randn(64, 64, device=device)

    def square(x):
        y = x.detach().requires_grad_()
        value = (y @ matrix).square().sum()
        return value.detach(), torch.autograd.grad(value, y)[0]

    reserved = []
    for _ in range(5):
        x = torch.randn(8, 64, device=device)
        square(x)
        found = Recorded(square, [x])
        for _ in range(3):
            x = torch.randn(8, 64, device=device)
            for one, right in zip(found(x), square(x), strict=True):
                torch.testing.assert_close(one, right)
        del found, one
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[1:] == reserved[1:2] * 4


WAITING = """
import torch
from d4s.models.recorded import Recorded, recorded
model, x = torch.nn.Linear(4, 4).cuda(), torch.randn(2, 4, device="cuda")
assert recorded(model, lambda one: [one * float(one.sum().item())], [x]) is None
assert recorded(model, lambda one: [one * 2], [x]) is None
assert torch.randn(3, device="cuda").isfinite().all()
assert Recorded(lambda one: [one * 2], [x])(x)[0].equal(2 * x)
assert recorded(torch.nn.Linear(4, 4).cuda(), lambda one: [one * 2], [x])(x)[0].equal(2 * x)
large = torch.zeros(2**26, device="cuda")
held = torch.cuda.memory_reserved()
del large
torch.cuda.empty_cache()
assert torch.cuda.memory_reserved() < held
"""


def test_a_waiting_function_is_refused_on_a_gpu(device):
    """On cuda: and everything goes on as before. In a process of its own, which nothing else has to share."""
    if torch.device(device).type != "cuda":
        pytest.skip("a recording is of a GPU")
    done = subprocess.run([sys.executable, "-c", WAITING], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
