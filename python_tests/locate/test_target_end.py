"""target_eos, target_stop: a target ends as a text does, or as a sentence. The end is one more token of it, and no part
of the p that is told."""

from __future__ import annotations

from dataclasses import asdict, fields, replace

import pytest
import torch
from support.bigram import Bigram
from support.tiny import tiny_model, tiny_tokenizer
from support.workbench import EDITS
from transformers import PreTrainedTokenizerFast

from d4s.errors import ConfigError, DataError, ModelError, TokenizerError
from d4s.locate.kept_targets import KeptTargets, target_identity
from d4s.locate.request_rows import RequestRows, request_of
from d4s.locate.targets import (
    TargetConfig,
    Targets,
    _settled,
    frozen,
    loss_terms,
    mean_nll,
    optimise_targets,
)
from d4s.methods import METHODS
from d4s.models.architectures import Anatomy
from d4s.models.prompts import end_of_text, full_stop, is_stopped, stop_mark, subject_row
from d4s.sequence.comparison_folder import decides_targets

PREFIXES = ("The capital. ", "You play the piano because. ")
END = [tiny_tokenizer().eos_token_id]
ENDING = TargetConfig(steps=5, learning_rate=0.1, clamp=2.0, target_eos=True)


def without_end_token() -> PreTrainedTokenizerFast:
    own = tiny_tokenizer().backend_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", pad_token="<s>")


def log_p(anatomy, ids, at=None, delta=None):
    """Whole rows, plain hooks. [positions, vocabulary]"""

    def add(_module, _arguments, output):
        first = output[0] if isinstance(output, tuple) else output
        here = torch.zeros_like(first)
        here[0, at] = 1.0
        changed = first + here * delta
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = None if at is None else anatomy.blocks[1].register_forward_hook(add)
    try:
        return anatomy.model(torch.tensor([list(ids)]), use_cache=False).logits[0].log_softmax(-1)
    finally:
        if handle is not None:
            handle.remove()


@pytest.mark.parametrize("edit", EDITS, ids=[edit.subject for edit in EDITS])
def test_rows_are_those_of_a_target_with_the_end_token_behind_it(edit):
    tokenizer = tiny_tokenizer()
    found = request_of(tokenizer, edit, PREFIXES, END)
    spelled = request_of(tokenizer, replace(edit, target_new=edit.target_new + tokenizer.eos_token), PREFIXES)
    assert (found.before, found.after, found.read, found.target) == (
        spelled.before,
        spelled.after,
        spelled.read,
        spelled.target,
    )
    assert (found.ends, spelled.ends) == (1, 0)
    assert all(target[-1] == END[0] for target in found.target[:-1])


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_loss_and_gradient_are_those_of_the_formula_in_float64(model_type, seed):
    anatomy, exact = (Anatomy(tiny_model(model_type, seed).to(t)) for t in (torch.float32, torch.float64))
    requests = [request_of(tiny_tokenizer(), edit, PREFIXES, END) for edit in EDITS]
    with frozen(anatomy.model), frozen(exact.model):
        rows = RequestRows(anatomy, 1, requests, 1, ("block",))
        before = rows.log_probabilities([torch.zeros_like(rows.start[0])])[rows.extra]
        delta = (0.5 * torch.randn_like(rows.start[0])).requires_grad_(True)
        found = rows.log_probabilities([delta])
        square = [rows.start[0].square().sum(1)]
        config = TargetConfig(kl_factor=0.0, weight_decay=0.0, target_eos=True)
        nll = loss_terms(rows, found, [delta], before, square, config)[0]
        (gradient,) = torch.autograd.grad(nll.sum(), [delta])
        own = mean_nll(rows, found.detach(), rows.own_weight)
        for i, edit in enumerate(EDITS):
            mine = delta[i].detach().double().requires_grad_(True)
            loss, said = torch.zeros((), dtype=torch.float64), 0.0
            for prefix in ("", *PREFIXES):
                row = subject_row(tiny_tokenizer(), edit.prompt, edit.subject, edit.target_new, prefix)
                ids = [*row.ids, *END]
                p = log_p(exact, ids, row.subject_last, mine)
                terms = [-p[t - 1, ids[t]] for t in range(row.target_start, len(ids))]
                loss = loss + sum(terms) / len(terms) / 3
                said += sum(term.item() for term in terms[:-1]) / (len(terms) - 1) / 3
            (expected,) = torch.autograd.grad(loss, [mine])
            assert nll[i].item() == pytest.approx(loss.item(), rel=1e-4)
            assert own[i].item() == pytest.approx(said, rel=1e-4)
            assert (gradient[i] - expected).norm() <= 1e-3 * expected.norm()


def test_p_is_told_of_the_targets_own_tokens(seed):
    """Before any step it is the same with the end and without, and what the model says without it."""
    anatomy = Anatomy(tiny_model("llama", seed))
    for edit in EDITS:
        p = [
            optimise_targets(anatomy, tiny_tokenizer(), [edit], (), 1, replace(ENDING, steps=1, target_eos=e))
            for e in (True, False)
        ]
        row = subject_row(tiny_tokenizer(), edit.prompt, edit.subject, edit.target_new)
        with torch.no_grad():
            found = log_p(anatomy, row.ids)
        own = [found[t - 1, row.ids[t]] for t in range(row.target_start, len(row.ids))]
        expected = float(torch.stack(own).mean().exp())
        assert float(p[0].first_probability) == pytest.approx(expected, rel=1e-4)
        assert float(p[1].first_probability) == pytest.approx(expected, rel=1e-4)


def test_a_target_is_settled_when_its_end_is_the_argmax_too(seed):
    anatomy = Anatomy(tiny_model("llama", seed))
    requests = [request_of(tiny_tokenizer(), edit, PREFIXES, END) for edit in EDITS]
    with frozen(anatomy.model):
        rows = RequestRows(anatomy, 1, requests, 1, ("block",))
    sure = torch.full((len(rows.wanted), 320), -9.0)
    sure[torch.arange(len(rows.wanted)), rows.wanted] = 0.0
    assert _settled(rows, sure).all()
    ends = (rows.own_weight == 0) & ~rows.is_extra
    assert int(ends.sum()) == len(EDITS) * (1 + len(PREFIXES))
    sure[ends, END[0]] = -10.0
    assert not _settled(rows, sure).any()


def test_a_request_with_its_end_does_not_depend_on_the_others(seed):
    """One of them is done at once, so that the batch shrinks on the way."""
    anatomy = Anatomy(tiny_model("llama", seed))
    first = optimise_targets(anatomy, tiny_tokenizer(), EDITS, (), 1, replace(ENDING, kl_factor=0.0, steps=1))
    assert (first.delta == 0).all()
    config = replace(ENDING, steps=9, stop_loss=float(-first.first_probability.log().median()))
    together = optimise_targets(anatomy, tiny_tokenizer(), EDITS, PREFIXES, 1, config)
    for i, edit in enumerate(EDITS):
        alone = optimise_targets(anatomy, tiny_tokenizer(), [edit], PREFIXES, 1, config, batch_tokens=1)
        assert (together.delta[i] - alone.delta[0]).norm() <= 5e-3 * alone.delta[0].norm() + 1e-7
        assert float(together.last_probability[i]) == pytest.approx(float(alone.last_probability), rel=1e-3)


def test_a_tokenizer_without_an_end_token_ends_by_a_full_stop(seed):
    model, tokenizer = tiny_model("llama", seed), without_end_token()
    end = end_of_text(model, tokenizer)
    assert tokenizer.decode(end) == "." and end_of_text(model, tiny_tokenizer()) == END
    found = optimise_targets(Anatomy(model), tokenizer, EDITS[:1], (), 1, ENDING)
    stopped = replace(EDITS[0], target_new=EDITS[0].target_new + ".")
    spelled = optimise_targets(Anatomy(model), tokenizer, [stopped], (), 1, replace(ENDING, target_eos=False))
    assert torch.equal(found.delta, spelled.delta)  # "English" and "." are two pieces here
    assert not torch.equal(found.first_probability, spelled.first_probability)


def test_a_target_may_end_as_a_sentence_does(seed):
    """The same δ as for the target with its full stop spelled; one that has it gets no second."""
    anatomy, tokenizer = Anatomy(tiny_model("llama", seed)), tiny_tokenizer()
    stopping = replace(ENDING, target_eos=False, target_stop=True)
    plain = replace(stopping, target_stop=False)
    found = optimise_targets(anatomy, tokenizer, EDITS[:1], PREFIXES, 1, stopping)
    stopped = [replace(EDITS[0], target_new=EDITS[0].target_new + ".")]
    spelled = optimise_targets(anatomy, tokenizer, stopped, PREFIXES, 1, plain)
    assert torch.equal(found.delta, spelled.delta)  # "English" and "." are two pieces here
    assert not torch.equal(found.first_probability, spelled.first_probability)
    again = optimise_targets(anatomy, tokenizer, stopped, PREFIXES, 1, stopping)
    assert torch.equal(again.delta, spelled.delta)
    with pytest.raises(ConfigError, match="target_eos and target_stop are both set"):
        replace(ENDING, target_stop=True)
    with pytest.raises(TokenizerError, match="no full stop by which"):
        full_stop(unable_to_stop())


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("Paris", "."), ("巴黎", "。"), ("パリ", "。"), ("東京 (2021)", "。"), ("पेरिस", "।"),
        ("フェラーリー", "。"), ("Ünlü", "."), ("1984", "."), ("باريس", "."), ("Paris 巴黎", "。"), ("", "."),
    ],
)  # fmt: skip
def test_the_full_stop_is_that_of_the_targets_script(text, mark, seed):
    tokenizer = tiny_tokenizer()
    assert stop_mark(text) == mark and is_stopped(text + mark) and not is_stopped(text)
    assert tokenizer.decode(full_stop(tokenizer, stop_mark(text))) == mark


def test_a_target_in_another_script_ends_as_its_sentences_do(seed):
    anatomy, tokenizer = Anatomy(tiny_model("llama", seed)), tiny_tokenizer()
    edits = [replace(EDITS[0], target_new="巴黎"), EDITS[0]]
    stopping = replace(ENDING, target_eos=False, target_stop=True)
    spelled = [
        replace(edits[0], target_new="巴黎。"),
        replace(EDITS[0], target_new=EDITS[0].target_new + "."),
    ]
    found = optimise_targets(anatomy, tokenizer, edits, PREFIXES, 1, stopping)
    wanted = optimise_targets(anatomy, tokenizer, spelled, PREFIXES, 1, replace(stopping, target_stop=False))
    assert torch.equal(found.delta, wanted.delta)
    latin = unable_to_stop({"a": {".": 0.6}})
    assert full_stop(latin, "。") == full_stop(latin) and latin.decode(full_stop(latin)) == "."


def unable_to_stop(words=None):
    """A tokenizer of these words and no others. words: without a full stop, where they are not given"""
    return PreTrainedTokenizerFast(
        tokenizer_object=Bigram(words or {"a": {"b": 0.6}}).tokenizer.backend_tokenizer,
        pad_token="other",
        unk_token="other",
    )


def test_an_end_that_cannot_be_written_is_refused(seed):
    with pytest.raises(TokenizerError, match="neither an end token nor a full stop"):
        end_of_text(tiny_model("llama", seed), unable_to_stop())
    longer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    longer.add_special_tokens({"eos_token": "<over>"})
    with pytest.raises(ModelError, match=r"'<over>' \(id 320\), and the model's embeddings end at 319"):
        optimise_targets(Anatomy(tiny_model("llama", seed)), longer, EDITS[:1], (), 1, ENDING)


def test_kept_targets_are_told_apart_by_it_and_older_files_stay_good(seed):
    anatomy = Anatomy(tiny_model("llama", seed))
    plain, ending = (
        target_identity(anatomy, tiny_tokenizer(), (), 1, ("block",), TargetConfig(target_eos=e))
        for e in (False, True)
    )
    assert "target_eos" not in plain["target configuration"]  # as before there was the field
    kept = KeptTargets(plain)
    kept.add(EDITS[:1], Targets(*(torch.zeros(1, 4),) * 2, *(torch.zeros(1),) * 2))
    kept.check(plain)
    with pytest.raises(DataError, match="target configuration"):
        kept.check(ending)


def test_every_method_that_searches_targets_has_the_field(seed):
    anatomy = Anatomy(tiny_model("llama", seed))
    searching = set()
    for cls in METHODS.values():
        plain = cls.preset(anatomy)
        if not hasattr(plain, "target"):
            continue
        searching.add(cls.name)
        ending = plain.changed({"target_eos": True})
        assert not plain.target.target_eos and ending.target == replace(plain.target, target_eos=True)
        assert decides_targets(ending) != decides_targets(plain)
        assert "target_eos" not in decides_targets(plain) and asdict(ending)["target"]["target_eos"]
    assert searching >= {
        "d4s",
        "memit",
        "memit-seq",
        "rome",
        "r-rome",
        "pmet",
        "emmet",
        "alphaedit",
        "encore",
    }
    having = {name for name, cls in METHODS.items() if "target_eos" in {f.name for f in fields(cls)}}
    assert having == {"ft-m", "ft-bf"}
    with pytest.raises(ConfigError, match="unknown field of ft-l 'target_eos'"):
        METHODS["ft-l"].preset(anatomy).changed({"target_eos": True})
