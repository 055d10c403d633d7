"""A target's search with its looks recorded as one CUDA graph, against launching them kernel by kernel."""

from __future__ import annotations

from unittest.mock import patch

import pytest

from benchmarks.measure import compare, relative_error
from benchmarks.subjects import of_smollm2s_shape
from d4s.embedded import load_demo_edits
from d4s.locate import targets
from d4s.locate.targets import TargetConfig, optimise_targets
from d4s.models.architectures import Anatomy
from d4s.models.loading import load_model
from d4s.models.prompts import generate_contexts

LAYER = 8


@pytest.mark.parametrize(("count", "target"), [(1, 3.0), (64, 1.5)])
def test_recorded_looks(benchmark, claim, device, count, target):
    if device.type != "cuda":
        pytest.skip("a CPU has nothing to launch")
    embedded, tokenizer = load_model("embedded")
    prefixes = generate_contexts(embedded, tokenizer)
    anatomy = Anatomy(of_smollm2s_shape(device))
    edits, config = load_demo_edits(count), TargetConfig(stop_loss=0.0)  # all 25 looks

    def recorded():
        return optimise_targets(anatomy, tokenizer, edits, prefixes, LAYER, config).delta

    def launched():
        with patch.object(targets, "RECORDED_WORK", 0):
            return optimise_targets(anatomy, tokenizer, edits, prefixes, LAYER, config).delta

    assert relative_error(recorded(), launched()) < 1e-3
    mine, theirs = compare(recorded, launched, device, rounds=3)
    claim(
        f"search of {count} edits, 135 M: recorded looks, times launched one by one",
        theirs / mine,
        target,
        seconds=mine,
    )
    benchmark.pedantic(recorded, rounds=1)
