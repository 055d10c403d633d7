"""A whole D4S sequence, one edit a step, against the originals' way: single targets and a dense solve a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks import originals
from benchmarks.measure import relative_error, seconds
from benchmarks.subjects import subject_of_measurement
from d4s.change.closed_form import Prior
from d4s.edits import Edit
from d4s.locate.covariance import estimate_covariance
from d4s.locate.targets import TargetConfig
from d4s.methods import Workbench
from d4s.methods.d4s import D4S

Way = Callable[[Sequence[Edit]], Tensor]  # edits -> Δ of the edited layer, [d_out, d_in] float64


def both_ways(device: torch.device, count: int) -> tuple[Sequence[Edit], Way, Way]:
    """(edits, ours, the originals'), with the same contexts, prior and target configuration."""
    anatomy, tokenizer, edits, prefixes, layer = subject_of_measurement(device, count=count)
    texts = [edit.text for edit in edits]
    covariance = estimate_covariance(
        anatomy.model, tokenizer, texts, layers=(layer,), tokens=2_000, progress=False
    )
    config = TargetConfig(steps=10, learning_rate=0.1, stop_loss=0.0)
    method = D4S(layers=(layer,), prior_weight=100.0, ridge=0.1, target=config)
    bench = Workbench(anatomy.model, tokenizer, covariance=covariance)
    bench._contexts[(method.contexts, method.context_lengths[0])] = tuple(prefixes)  # the same on both sides
    prior = Prior(covariance.mean(layer).to(device), method.prior_weight, method.ridge).matrix

    def ours(chosen: Sequence[Edit]) -> Tensor:
        editor = method.editor(bench)
        editor.announce(chosen)
        for edit in chosen:
            editor.edit([edit])
        change = editor.closed_form.delta(layer).clone()
        editor.restore()
        return change

    def theirs(chosen: Sequence[Edit]) -> Tensor:
        return originals.d4s_sequence(anatomy, tokenizer, chosen, prefixes, layer, config, prior)

    return edits, ours, theirs


def test_whole_sequence(benchmark, claim, device):
    count, few = 400, 8
    edits, ours, theirs_way = both_ways(device, count)
    few_edits = edits[:few]
    assert relative_error(ours(few_edits), theirs_way(few_edits)) < (1e-2 if device.type == "cpu" else 0.3)
    theirs = seconds(lambda: theirs_way(few_edits), device) / few
    mine = seconds(lambda: ours(edits), device) / count
    claim(
        f"D4S sequence of {count} single edits: speed of the originals' way",
        theirs / mine,
        10.0 if device.type == "cpu" else 20.0,
        seconds_an_edit=mine,
    )
    benchmark.pedantic(lambda: ours(few_edits), rounds=1)
