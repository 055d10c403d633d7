"""`torch.set_default_device` is the caller's own: nothing that d4s makes goes there.

"meta" stands for a GPU: what lands there by mistake holds no data, and fails at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.sequences import EDITS, FAST, STRONG, ready, same, sequence, state
from support.tiny import TEXTS, tiny_tokenizer

import d4s


@pytest.fixture
def elsewhere() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("d4s", {**STRONG, "contexts": 1}),
        ("d4s", {**FAST, "anchor": "current", "context_keys": "each", "prompt_weight": 0.25}),
        ("memit", FAST),
        ("rome", None),
        ("ft-m", None),
    ],
)
def test_a_sequence_is_what_it_is_elsewhere(method, config, seed, tmp_path, request):
    model, covariance = ready(seed)
    options = {"method": method, "config": config, "generate": True, "passes": 2, "evaluate_every": 2}
    result = sequence(model, covariance, EDITS[:3], **options)
    right = state(model)
    result.restore()
    request.getfixturevalue("elsewhere")
    result = sequence(model, covariance, EDITS[:3], **options, journal=tmp_path / "j")
    assert same(state(model), right)
    result.restore()
    if method == "d4s":
        d4s.Journal(tmp_path / "j").undo("e1")
        assert d4s.Journal(tmp_path / "j").verify().sound


def test_statistics_and_figures_too(seed, elsewhere):
    with torch.device("cpu"):
        model, covariance = ready(seed)
    found = d4s.estimate_covariance(model, tiny_tokenizer(), TEXTS * 6, dtype=torch.float64, progress=False)
    assert all(torch.equal(found.moments[layer], moment) for layer, moment in covariance.moments.items())
    assert d4s.evaluate(model, tiny_tokenizer(), EDITS[:2], generate=True, progress=False).metrics
