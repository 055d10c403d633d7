"""Options and fixtures of the benchmarks: the device, and the place where claims leave their rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.measure import Row, device_name


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="cpu or cuda")
    parser.addoption("--large", action="store_true", help="claims that take minutes and 16 GiB on a CPU too")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    torch.manual_seed(0)
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def claim(request: pytest.FixtureRequest, benchmark, device: torch.device) -> Callable[..., None]:
    """claim(name, measured, target, at_least=True, **details): leaves a row for `benchmarks.claims`."""

    def leave(name: str, measured: float, target: float, at_least: bool = True, **details: float) -> None:
        row = Row(name, measured, target, at_least, device_name(device), details)
        benchmark.extra_info.update(claim=name, measured=measured, target=target, holds=row.holds)
        request.config.stash[rows_key](row)

    return leave


# What is done with a row; pytest itself does nothing.
rows_key: pytest.StashKey[Callable[[Row], None]] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    config.stash.setdefault(rows_key, lambda _: None)
