"""Fixtures of every test file: the seed of random inputs, and the devices there are."""

from __future__ import annotations

import os
import random
import secrets
import signal
import zlib
from collections.abc import Iterator
from typing import Any

# Before transformers is read: a name that is no folder fails at once, and is not asked for in the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

# The models are tiny: a second thread costs more than it brings, much more where the cores are busy.
torch.set_num_threads(1)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Set for torch, and printed with a failure: each test's own number, the same in every run.

    D4S_TEST_SEED=fresh draws another one for every test of the run; D4S_TEST_SEED=… sets it.
    """
    asked = os.environ.get("D4S_TEST_SEED")
    own = zlib.crc32(request.node.nodeid.encode()) >> 1
    value = own if asked is None else secrets.randbelow(2**31) if asked == "fresh" else int(asked)
    print(f"D4S_TEST_SEED={value}")
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def _seeded(seed: int) -> None:
    """Every test is seeded, whether it asks for the seed or not."""


@pytest.fixture(autouse=True, scope="session")
def _signals_are_heard() -> None:
    """Ctrl-C and a hang-up, which a shell has what it starts in the background pass over."""
    for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture
def draw() -> random.Random:
    """Of damaged inputs: new ones in every run. D4S_FUZZ_SEED=… repeats one."""
    seed = int(os.environ.get("D4S_FUZZ_SEED", secrets.randbelow(2**31)))
    print(f"D4S_FUZZ_SEED={seed}")
    return random.Random(seed)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """cpu, and cuda where there is a GPU and the extension has kernels for it."""
    if request.param == "cuda":
        from d4s import ops

        if not (torch.cuda.is_available() and ops._C.with_cuda):
            pytest.skip("no GPU, or d4s was built without CUDA kernels")
    return torch.device(request.param)


@pytest.fixture(params=["high", "medium"])
def reduced(request: pytest.FixtureRequest) -> Iterator[str]:
    """What the process is set to take products of float32 in, which is as it was at the end."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The matplotlib figures that are saved, to look at what stands in them."""
    from matplotlib.figure import Figure

    figures: list[Any] = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures
