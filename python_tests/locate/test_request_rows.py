"""Rows with kept prefixes, skipped blocks and spared MLPs, against each row alone and whole, for every type."""

from __future__ import annotations

import pytest
import torch
from support.tiny import CONFIGS, tiny_model, tiny_tokenizer

from d4s.edits import Edit
from d4s.locate.request_rows import RequestRows, request_of, spares
from d4s.locate.targets import frozen
from d4s.models.architectures import Anatomy
from d4s.models.prompts import pad_id

EDITS = [
    Edit(prompt="The mother tongue of {} is", subject="Danielle Darrieux", target_new="English"),
    Edit(prompt="{} worked for", subject="Steve Jobs", target_new="Manila Lyon"),
    Edit(prompt="{}", subject="Lyon", target_new="Paris"),
]
PREFIXES = ("The capital. ", "You play the piano because. ")


@torch.no_grad()
def read_alone(model, request, module, delta):
    """log p at all that is read of a request, each row by itself and unpadded, δ added by a hook."""
    found = []
    for before, after, read in zip(request.before, request.after, request.read, strict=True):
        subject_last = len(before)

        def plus(_module, _args, output, at=subject_last):
            changed = (output[0] if isinstance(output, tuple) else output).clone()
            changed.view(-1, *changed.shape[-2:])[0, at] += delta
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handle = module.register_forward_hook(plus)
        logits = model(input_ids=torch.tensor([[*before, *after]]), use_cache=False).logits[0]
        handle.remove()
        found.append(logits[[subject_last + position for position in read]].log_softmax(-1))
    return torch.cat(found)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_rows_read_as_each_one_alone_whatever_the_type_and_the_layer(model_type, seed):
    """At the last layer too, where most is skipped, and after a request has left."""
    anatomy = Anatomy(tiny_model(model_type, seed))
    tokenizer = tiny_tokenizer()
    requests = [request_of(tokenizer, edit, PREFIXES) for edit in EDITS]
    place = "mlp" if anatomy.architecture.normed_mlp_output else "block"
    with frozen(anatomy.model):
        for layer in range(len(anatomy)):
            module = anatomy.projection(layer) if place == "mlp" else anatomy.blocks[layer]
            deltas = 3 * torch.randn(len(EDITS), anatomy.shape(layer)[0])
            alone = [
                read_alone(anatomy.model, request, module, delta)
                for request, delta in zip(requests, deltas, strict=True)
            ]
            assert spares(anatomy, layer, (place,))
            whole = RequestRows(anatomy, pad_id(tokenizer), requests, layer, (place,), whole=True)
            torch.testing.assert_close(whole.log_probabilities([deltas]), torch.cat(alone), rtol=0, atol=2e-4)
            rows = RequestRows(anatomy, pad_id(tokenizer), requests, layer, (place,))
            with torch.no_grad():
                for _ in range(2):
                    torch.testing.assert_close(
                        rows.log_probabilities([deltas]), torch.cat(alone), rtol=0, atol=2e-4
                    )
                left = torch.tensor([0, 2])
                rows.keep_requests(left)
                found = rows.log_probabilities([deltas[left]])
            torch.testing.assert_close(found, torch.cat([alone[0], alone[2]]), rtol=0, atol=2e-4)
