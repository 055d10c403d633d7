"""Key statistics of all layers in one pass, against a pass through the whole model for each layer."""

from __future__ import annotations

import torch

from benchmarks import originals
from benchmarks.measure import relative_error, seconds
from benchmarks.subjects import subject_of_measurement
from d4s.locate.covariance import estimate_covariance


def test_covariance_of_all_layers(benchmark, claim, device):
    anatomy, tokenizer, edits, _, _ = subject_of_measurement(device, count=100)
    layers = range(len(anatomy))
    texts = [f"{prompt} {edit.target_true}" for edit in edits for prompt in (edit.text, *edit.neighborhood)]
    encoded = [tokenizer(text)["input_ids"] for text in texts]
    tokens = sum(map(len, encoded))
    batches = []
    for at in range(0, len(encoded), 128):  # in the order of the corpus, as the originals read it
        part = encoded[at : at + 128]
        width = max(map(len, part))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in part], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in part], device=device)
        batches.append((ids, mask))

    def one_pass():
        return estimate_covariance(
            anatomy.model, tokenizer, texts, layers=layers, tokens=tokens, progress=False
        )

    def pass_a_layer():
        return [originals.moment_of_layer(anatomy, batches, layer) for layer in layers]

    found = one_pass()
    expected: list[torch.Tensor] = []
    # Long, so it is timed and checked in one.
    theirs = seconds(lambda: expected.extend(pass_a_layer()), device)
    for layer in layers:
        assert relative_error(found.moments[layer], expected[layer]) < (
            1e-4 if device.type == "cpu" else 2e-2
        )
    del found  # of 8B models either moments are 25 GiB, and a pass makes them again
    expected.clear()
    mine = min(seconds(one_pass, device) for _ in range(2))
    claim(
        f"covariance of {len(layers)} layers: speed of a pass a layer",
        theirs / mine,
        0.8 * len(layers),
        keys_a_second=tokens / mine,
    )
    benchmark.pedantic(one_pass, rounds=1)
