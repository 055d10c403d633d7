"""The batched target optimiser against one request at a time through the whole model."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from support.tiny import REPRESENTATIVE, tiny_model, tiny_tokenizer

from d4s.edits import Edit
from d4s.errors import ConfigError, ModelError
from d4s.locate import targets
from d4s.locate.request_rows import RequestRows, request_of, spares
from d4s.locate.targets import (
    TargetConfig,
    _optimise,
    frozen,
    loss_terms,
    optimise_targets,
    refining,
)
from d4s.models.architectures import Anatomy
from d4s.models.forward import Calling
from d4s.models.prompts import subject_row

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
    for look in range(config.steps):
        nll = torch.zeros(())
        for row in rows:
            wanted = torch.tensor(row.ids[row.target_start :])
            log_p = run(row)[row.target_start - 1 : -1]
            nll = nll - log_p.gather(1, wanted[:, None]).mean() / len(rows)
        extra_log_p = run(extra)[extra.subject_last]
        if before is None:
            before, first = extra_log_p.detach(), float(torch.exp(-nll.detach()))
        loss = nll + config.kl_factor * (extra_log_p.exp() * (extra_log_p - before)).sum()
        for place, delta in zip(places, deltas, strict=True):
            loss = loss + config.weight_decay * delta.norm() / start[place].norm() ** 2
        if loss < config.stop_loss or look == config.steps - 1:
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


def _loss_in_float64(anatomy, edit, layer, places, config, deltas):
    """The loss of one edit at given δ, from its definition alone: whole rows of a float64 model, one after another."""
    model, tokenizer = anatomy.model, tiny_tokenizer()

    def log_p(row, moved):
        handles = []
        for place, delta in zip(places, moved, strict=True):

            def hook(_module, _args, output, place=place, delta=delta):
                first = output[0] if isinstance(output, tuple) else output
                added = torch.zeros(len(row.ids), len(delta), dtype=torch.float64)
                added = added.index_add(0, torch.tensor([row.subject_last]), delta.unsqueeze(0))
                seen[place] = first.reshape(len(row.ids), -1)[row.subject_last].detach()
                changed = first + added.view(first.shape)
                return (changed, *output[1:]) if isinstance(output, tuple) else changed

            handles.append(_module(anatomy, place, layer).register_forward_hook(hook))
        try:
            return model(torch.tensor([row.ids]), use_cache=False).logits[0].double().log_softmax(-1)
        finally:
            for handle in handles:
                handle.remove()

    rows = [subject_row(tokenizer, edit.prompt, edit.subject, edit.target_new, p) for p in ("", *PREFIXES)]
    extra = subject_row(tokenizer, "{} is a", edit.subject)
    seen: dict[str, torch.Tensor] = {}
    nothing = [torch.zeros_like(d) for d in deltas]
    log_p(rows[0], nothing)
    start = [seen[place] for place in places]
    before = log_p(extra, nothing)[extra.subject_last].detach()
    loss = torch.zeros((), dtype=torch.float64)
    for row in rows:
        tokens = row.ids[row.target_start :]
        found = log_p(row, deltas)
        for i, token in enumerate(tokens):
            loss = loss - found[row.target_start - 1 + i, token] / len(tokens) / len(rows)
    now = log_p(extra, deltas)[extra.subject_last]
    loss = loss + config.kl_factor * torch.nn.functional.kl_div(before, now, log_target=True, reduction="sum")
    for delta, v0 in zip(deltas, start, strict=True):
        loss = loss + config.weight_decay * delta.norm() / v0.norm() ** 2
    return loss


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
@pytest.mark.parametrize("places", [("block",), ("mlp", "attention")], ids=["memit", "pmet"])
def test_the_gradient_is_that_of_the_written_loss_in_float64(model_type, places, seed):
    """At a δ that is not 0, where KL(p_δ ‖ p_before) and its reverse differ."""
    anatomy = Anatomy(tiny_model(model_type, seed))
    exact = Anatomy(tiny_model(model_type, seed).double())
    config = TargetConfig(kl_factor=2.0, weight_decay=0.7)
    requests = [request_of(tiny_tokenizer(), edit, PREFIXES) for edit in EDITS]
    with frozen(anatomy.model), frozen(exact.model):
        rows = RequestRows(anatomy, 1, requests, 1, places)
        zeros = [torch.zeros_like(s) for s in rows.start]
        before = rows.log_probabilities(zeros)[rows.extra]
        deltas = [(0.5 * torch.randn_like(s)).requires_grad_(True) for s in rows.start]
        square = [s.square().sum(1) for s in rows.start]
        log_p = rows.log_probabilities(deltas)
        loss = sum(loss_terms(rows, log_p, deltas, before, square, config))
        found = torch.autograd.grad(loss.sum(), deltas)
        for i, edit in enumerate(EDITS):
            own = [d[i].detach().double().requires_grad_(True) for d in deltas]
            right = _loss_in_float64(exact, edit, 1, places, config, own)
            assert loss[i].item() == pytest.approx(right.item(), rel=1e-4)
            for gradient, expected in zip(found, torch.autograd.grad(right, own), strict=True):
                assert (gradient[i] - expected).norm() <= 1e-3 * expected.norm()


class _Scripted:
    """Rows of one request whose target has a given probability, and whose extra row a given one, at each look."""

    def __init__(self, script):
        self.script, self.looks, self.count, self.device = script, 0, 1, torch.device("cpu")
        self.is_on_one_gpu = False
        self.model = torch.nn.Linear(1, 1)  # float32, which nothing overflows
        self.start = [torch.tensor([[3.0, 4.0]])]
        self.owner = torch.tensor([0, 0])
        self.row, self.wanted = torch.tensor([0, 1]), torch.tensor([0, 0])
        self.weight = self.own_weight = torch.tensor([1.0, 0.0])
        self.is_extra = torch.tensor([False, True])
        self.extra = torch.tensor([1])

    def log_probabilities(self, deltas):
        target, extra = self.script[self.looks]
        self.looks += 1
        p = torch.tensor([[target, 1 - target], [extra, 1 - extra]])
        return p.log() + 0.0 * deltas[0].sum()


def _looks(script, **config):
    rows = _Scripted(script)
    _optimise(rows, TargetConfig(steps=len(script), weight_decay=0.0, learning_rate=0.01, **config))
    return rows.looks


def test_the_loss_is_looked_at_as_often_as_asked_and_moved_once_less(seed):
    """The releases' 25 steps are 24 updates: with one look δ stays 0, with two Adam has moved it by lr once."""
    anatomy = Anatomy(tiny_model("gpt2", seed))
    for steps, moved in ((1, 0.0), (2, 1.0)):
        config = TargetConfig(steps=steps, learning_rate=1e-3, weight_decay=0.0, clamp=1e6)
        delta = optimise_targets(anatomy, tiny_tokenizer(), EDITS[:1], (), 1, config).delta
        torch.testing.assert_close(delta.abs(), torch.full_like(delta, 1e-3 * moved), rtol=1e-2, atol=0)


def test_the_stop_rules_on_hand_worked_looks():
    """(p(target), p of the extra row's first word) at each look; done requests leave at every fourth."""
    easy, hard = (0.99, 0.5), (0.3, 0.5)
    # −ln .99 = .01 < .05: done at the first look; the batch is left at the fourth.
    assert _looks([easy] * 9) == 4
    assert _looks([hard] * 9) == 9
    # ENCORE, two more: .6 is the argmax but not under the stop loss. Looks 1, 3 and 5 count; 2 and 4 do not, and do
    # not begin the count anew: done at look 5, gone at look 8.
    sure = (0.6, 0.5)
    assert _looks([sure, hard, sure, hard, sure, hard, hard, hard, hard], stop_after_argmax=2) == 8
    # PMET: the weighted KL counts. KL(.5 of now ‖ .4 of before) = .0204, weighted by .0625 under .01, by 1 not.
    pmet = dict(settled_nll_factor=0.1, settled_kl=0.01)
    later = [(0.6, 0.4)] + [(0.6, 0.5)] * 8
    assert _looks([(0.3, 0.4), *later[1:]], kl_factor=0.0625, **pmet) == 4
    assert _looks([(0.3, 0.4), *later[1:]], kl_factor=1.0, **pmet) == 9
    # The tenth weighs from the next look on: −ln .65 = .43, a tenth of it is under .05, but not at the look at which
    # the target first is the argmax. With a KL bound of nothing the loss alone ends the search: at look 5, gone at 8.
    never = dict(settled_nll_factor=0.1, settled_kl=-1.0, kl_factor=0.0)
    assert _looks([hard, hard, hard, (0.65, 0.5), (0.65, 0.5), *[hard] * 4], **never) == 8
    assert _looks([hard, hard, hard, (0.65, 0.5), *[hard] * 5], **never) == 9


@pytest.mark.parametrize("name", ["kept", "nothing"])
def test_a_model_that_cannot_be_cut_at_the_subject_is_run_whole(name, seed, monkeypatch, caplog):
    """A forward that calls its cache by an unknown name, or whose cache forgets: the same targets, and one line."""
    model = tiny_model("llama", seed)
    config = TargetConfig(steps=4, learning_rate=0.1, clamp=2.0)
    expected = optimise_targets(Anatomy(model), tiny_tokenizer(), EDITS, PREFIXES, 1, config)
    other = tiny_model("llama", seed)
    forward, calling = other.forward, Calling.of(other)
    if name == "kept":

        def renamed(input_ids, attention_mask=None, position_ids=None, kept=None, use_cache=None):
            return forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)

        other.forward = renamed
    else:

        def forgetful(input_ids, attention_mask=None, position_ids=None, cache=None, use_cache=None):
            width = input_ids.shape[1]
            return forward(
                input_ids=input_ids,
                attention_mask=attention_mask[:, -width:],
                position_ids=position_ids,
                **calling.without_cache(),
            )

        other.forward = forgetful
    with caplog.at_level("WARNING", logger="d4s"):
        found = optimise_targets(Anatomy(other), tiny_tokenizer(), EDITS, PREFIXES, 1, config)
        optimise_targets(Anatomy(other), tiny_tokenizer(), EDITS, PREFIXES, 1, config)
    assert not spares(Anatomy(other), 1, ("block",)) and spares(Anatomy(model), 1, ("block",))
    assert [record.getMessage().count("on whole rows") for record in caplog.records] == [1]
    torch.testing.assert_close(found.delta, expected.delta, rtol=5e-3, atol=1e-5)
    torch.testing.assert_close(found.start, expected.start, rtol=1e-4, atol=1e-5)


FAST = dict(optimizer="polyak", steps=5, stop_nll=0.04, clamp=2.0)


def _found(anatomy, config, prefixes=PREFIXES, **named):
    return optimise_targets(anatomy, tiny_tokenizer(), EDITS, prefixes, 1, TargetConfig(**config), **named)


def test_polyaks_search_keeps_the_best_of_its_looks(seed):
    """Whatever a step does to a model that is no straight line, the loss does not end above where it began."""
    anatomy = Anatomy(tiny_model("llama", seed))
    config = FAST | dict(weight_decay=0.0, kl_factor=0.0)
    looks = [_found(anatomy, config | dict(steps=steps)) for steps in (1, 2, 4, 8)]
    for fewer, more in pairwise(looks):
        assert (more.last_probability >= fewer.last_probability * (1 - 1e-5)).all()
    assert (looks[0].delta == 0).all() and (looks[-1].delta != 0).any()
    torch.testing.assert_close(looks[0].first_probability, looks[0].last_probability)


def test_polyaks_requests_do_not_depend_on_their_batch(seed):
    anatomy = Anatomy(tiny_model("gpt2", seed))
    config = FAST | dict(steps=3, bare_looks=2)
    whole, parts = _found(anatomy, config), _found(anatomy, config, batch_tokens=1)
    for name in ("start", "delta", "first_probability", "last_probability"):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name), rtol=5e-3, atol=1e-4)


def test_a_search_begins_where_the_bare_prompts_ended(seed):
    """One look at all contexts is followed by no step: δ is that of a search without contexts."""
    anatomy = Anatomy(tiny_model("llama", seed))
    config = FAST | dict(steps=1, bare_looks=4)
    found = _found(anatomy, config)
    alone = _found(anatomy, FAST | dict(steps=4), prefixes=())
    torch.testing.assert_close(found.delta, alone.delta, rtol=1e-3, atol=1e-4)
    unmoved = _found(anatomy, FAST | dict(steps=1))
    torch.testing.assert_close(found.first_probability, unmoved.last_probability)
    torch.testing.assert_close(found.start, unmoved.start)
    without = _found(anatomy, FAST | dict(bare_looks=4), prefixes=())
    assert torch.equal(without.delta, _found(anatomy, FAST, prefixes=()).delta)


def test_a_search_goes_on_from_a_target_of_other_weights(seed):
    """It never ends above the loss at which it begins, and what is said already is left as it is."""
    model = tiny_model("llama", seed)
    anatomy = Anatomy(model)
    plain = TargetConfig(weight_decay=0.0, kl_factor=0.0, clamp=2.0)
    z = _found(anatomy, FAST | dict(steps=3)).target
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.5)  # an edit below, of its own
    looks = {
        n: optimise_targets(
            anatomy, tiny_tokenizer(), EDITS, PREFIXES, 1, replace(refining(plain, n), stop_nll=None), begin=z
        )
        for n in (1, 4)
    }
    torch.testing.assert_close(looks[1].target, z, rtol=1e-4, atol=1e-5)  # one look moves nothing
    assert not torch.equal(looks[1].start, z - looks[1].delta)  # v0 is that of the weights as they are
    assert (looks[4].last_probability >= looks[1].last_probability * (1 - 1e-5)).all()
    assert (looks[4].target != z).any(dim=1).all()
    said = replace(refining(plain, 4), stop_nll=1e3)
    left = optimise_targets(anatomy, tiny_tokenizer(), EDITS, PREFIXES, 1, said, begin=z, batch_tokens=1)
    torch.testing.assert_close(left.target, z, rtol=1e-4, atol=1e-5)
    narrow = replace(refining(plain, 1), clamp=1e-3)
    short = optimise_targets(anatomy, tiny_tokenizer(), EDITS, PREFIXES, 1, narrow, begin=z)
    torch.testing.assert_close(short.delta.norm(dim=1), 1e-3 * short.start.norm(dim=1))


def test_reduced_products_move_delta_and_nothing_that_is_kept_beside_it(seed):
    anatomy = Anatomy(tiny_model("llama", seed))
    before = _products()
    reduced, exact = _found(anatomy, FAST | dict(search_precision="reduced")), _found(anatomy, FAST)
    assert torch.equal(reduced.start, exact.start)
    torch.testing.assert_close(reduced.first_probability, exact.first_probability, rtol=1e-5, atol=1e-7)
    for i, edit in enumerate(EDITS):
        request = request_of(tiny_tokenizer(), edit, PREFIXES)
        rows = RequestRows(anatomy, 1, [request], 1, ("block",))
        with torch.no_grad():
            log_p = rows.log_probabilities([reduced.delta[i : i + 1]])
        chosen = log_p.gather(1, rows.wanted.unsqueeze(1)).squeeze(1)
        right = float(torch.exp((chosen * rows.weight).sum()))
        assert float(reduced.last_probability[i]) == pytest.approx(right, rel=1e-4)
    assert _products() == before


def test_a_search_that_breaks_off_leaves_the_precision_as_it_was(seed, monkeypatch):
    anatomy = Anatomy(tiny_model("llama", seed))
    before = _products()
    monkeypatch.setattr(targets, "loss_terms", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _found(anatomy, FAST | dict(search_precision="reduced"))
    assert _products() == before


def _products():
    return getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", None)


def test_a_search_ends_by_the_nll_where_the_loss_would_not():
    """−ln .99 = .01; what KL adds, kl_factor ln 2 with the extra row's 1 → .5, keeps the loss above its bound."""
    script = [(0.3, 0.999)] + [(0.99, 0.5)] * 8
    assert _looks(script, kl_factor=1.0) == 9
    assert _looks(script, kl_factor=1.0, stop_nll=0.02) == 2  # on a CPU each look asks who is done
    assert _looks(script, kl_factor=1.0, stop_nll=0.009) == 9
