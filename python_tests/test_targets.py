"""The batched target optimiser against one request at a time through the whole model."""

from __future__ import annotations

import pytest
import torch
from tiny import REPRESENTATIVE, tiny_model, tiny_tokenizer

from d4s.architectures import Anatomy
from d4s.edits import Edit
from d4s.errors import ConfigError, ModelError
from d4s.prompts import subject_row
from d4s.targets import TargetConfig, optimise_targets

EDITS = [
    Edit(prompt="The mother tongue of {} is", subject="Danielle Darrieux", target_new="English"),
    Edit(prompt="{} worked for", subject="Steve Jobs", target_new="Manila Lyon"),
    Edit(prompt="{}", subject="Lyon", target_new="Paris"),
    Edit(prompt="What is the twin city of {}? It is", subject="Lyon", target_new="Paris"),
]
PREFIXES = ("The capital. ", "You play the piano because. ")
PLACES = {"block": 1, "mlp": 0}


def _module(anatomy, place, layer):
    if place == "mlp":
        return anatomy.projection(layer)
    return anatomy.attention_output(layer) if place == "attention" else anatomy.blocks[layer]


def one_at_a_time(anatomy, edit, layer, config, places, prefixes=PREFIXES):
    """The same mathematics written plainly: whole model, every position, torch's Adam. (v0, δ, p_first, p_last)"""
    tokenizer, model = tiny_tokenizer(), anatomy.model
    rows = [
        subject_row(tokenizer, edit.prompt, edit.subject, edit.target_new, prefix)
        for prefix in ("", *prefixes)
    ]
    extra = subject_row(tokenizer, "{} is a", edit.subject)
    deltas = [torch.zeros(anatomy.shape(layer)[0], requires_grad=True) for _ in places]
    seen: dict[str, torch.Tensor] = {}

    def run(row):
        handles = []
        for place, delta in zip(places, deltas, strict=True):

            def hook(_module, _args, output, place=place, delta=delta):
                first = output[0] if isinstance(output, tuple) else output
                flat = first.reshape(len(row.ids), -1)
                seen[place] = flat[row.subject_last].detach().clone()
                at = torch.nn.functional.one_hot(torch.tensor(row.subject_last), len(row.ids))
                changed = (flat + at.unsqueeze(1) * delta).view(first.shape)
                return (changed, *output[1:]) if isinstance(output, tuple) else changed

            handles.append(_module(anatomy, place, layer).register_forward_hook(hook))
        try:
            return model(torch.tensor([row.ids]), use_cache=False).logits[0].float().log_softmax(-1)
        finally:
            for handle in handles:
                handle.remove()

    with torch.no_grad():
        run(rows[0])
    start = dict(seen)
    optimiser = torch.optim.Adam(deltas, lr=config.learning_rate)
    before, first = None, None
    for step in range(config.steps + 1):
        nll = torch.zeros(())
        for row in rows:
            wanted = torch.tensor(row.ids[row.target_start :])
            log_p = run(row)[row.target_start - 1 : -1]
            nll = nll - log_p.gather(1, wanted[:, None]).mean() / len(rows)
        extra_log_p = run(extra)[extra.subject_last]
        if before is None:
            before, first = extra_log_p.detach(), float(torch.exp(-nll.detach()))
        loss = nll + config.kl_factor * (before.exp() * (before - extra_log_p)).sum()
        for place, delta in zip(places, deltas, strict=True):
            loss = loss + config.weight_decay * delta.norm() / start[place].norm() ** 2
        if loss < config.stop_loss or step == config.steps:
            break
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            for place, delta in zip(places, deltas, strict=True):
                bound = config.clamp * start[place].norm()
                if delta.norm() > bound:
                    delta.mul_(bound / delta.norm())
    return start[places[0]], deltas[0].detach(), first, float(torch.exp(-nll.detach()))


def _agree(anatomy, layer, config, places):
    found = optimise_targets(anatomy, tiny_tokenizer(), EDITS, PREFIXES, layer, config, places=places)
    for i, edit in enumerate(EDITS):
        start, delta, first, last = one_at_a_time(anatomy, edit, layer, config, places)
        assert (found.start[i] - start).norm() <= 1e-5 * start.norm()
        # Most seeds agree to 1e-6. Adam divides by the gradient's own size, which now and then makes rounding of a
        # gradient near zero visible; a wrong position, mask or weight would be off by far more than this.
        assert (found.delta[i] - delta).norm() <= 5e-3 * delta.norm() + 1e-7
        assert float(found.first_probability[i]) == pytest.approx(first, rel=1e-4)
        assert float(found.last_probability[i]) == pytest.approx(last, rel=1e-3)


@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_a_batch_gives_what_one_at_a_time_gives(model_type, seed):
    anatomy = Anatomy(tiny_model(model_type, seed))
    config = TargetConfig(steps=5, learning_rate=0.1, clamp=2.0)
    place = "mlp" if anatomy.architecture.normed_mlp_output else "block"
    _agree(anatomy, PLACES[place], config, (place,))


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gptj", "falcon"])
def test_two_places_are_optimised_together(model_type, seed):
    config = TargetConfig(steps=5, learning_rate=0.1, clamp=1.0, kl_factor=1.0)
    _agree(Anatomy(tiny_model(model_type, seed)), 1, config, ("mlp", "attention"))


def test_requests_that_are_done_leave_without_a_trace_in_the_others(seed):
    """A bound between the requests' first losses: some are done at once, and the batch shrinks on the way."""
    anatomy = Anatomy(tiny_model("llama", seed))
    begin = TargetConfig(steps=1, learning_rate=1e-9)
    first = optimise_targets(anatomy, tiny_tokenizer(), EDITS, PREFIXES, 1, begin).first_probability
    losses = (-first.log()).sort().values
    config = TargetConfig(steps=12, learning_rate=0.1, clamp=2.0, stop_loss=float(losses[1:3].mean()))
    found = optimise_targets(anatomy, tiny_tokenizer(), EDITS, PREFIXES, 1, config)
    still = (found.delta == 0).all(1)
    assert 0 < still.sum() < len(EDITS)
    _agree(anatomy, 1, config, ("block",))


def test_a_target_raises_the_probability_and_stays_within_the_clamp(seed):
    anatomy = Anatomy(tiny_model("gpt2", seed))
    config = TargetConfig(steps=20, learning_rate=0.3, clamp=3.0)
    found = optimise_targets(anatomy, tiny_tokenizer(), EDITS, PREFIXES, 1, config)
    assert (found.last_probability > found.first_probability).all()
    assert (found.delta.norm(dim=1) <= 3.0 * found.start.norm(dim=1) * (1 + 1e-5)).all()
    assert torch.equal(found.target, found.start + found.delta)


def test_the_model_is_left_as_it_was(seed):
    model = tiny_model("llama", seed).train()
    model.lm_head.weight.requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    optimise_targets(Anatomy(model), tiny_tokenizer(), EDITS, PREFIXES, 1, TargetConfig(steps=2))
    assert model.training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert not any(block._forward_hooks or "forward" in block.__dict__ for block in model.model.layers)


def test_small_batches_give_what_one_large_batch_gives(seed):
    anatomy = Anatomy(tiny_model("gpt2", seed))
    config = TargetConfig(steps=5, learning_rate=0.1, clamp=2.0)
    whole = optimise_targets(anatomy, tiny_tokenizer(), EDITS, PREFIXES, 1, config)
    parts = optimise_targets(anatomy, tiny_tokenizer(), EDITS, PREFIXES, 1, config, batch_tokens=1)
    torch.testing.assert_close(whole.delta, parts.delta, rtol=5e-3, atol=1e-4)


def test_a_configuration_that_cannot_move_is_refused():
    with pytest.raises(ConfigError, match="steps"):
        TargetConfig(steps=0)


def test_a_row_that_only_a_context_makes_too_long_is_refused_and_named(seed):
    anatomy = Anatomy(tiny_model("gpt2", seed))
    config = TargetConfig(steps=1)
    context = "of the " * 60
    optimise_targets(anatomy, tiny_tokenizer(), EDITS[:1], (), 1, config)
    with pytest.raises(ModelError, match=f"edit {EDITS[0].id}: .* 128 positions"):
        optimise_targets(anatomy, tiny_tokenizer(), EDITS[:1], (context,), 1, config)
