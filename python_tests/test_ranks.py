"""Several processes at one work: what each has is what one alone would have, and none waits for one that has gone."""

from __future__ import annotations

import math
import os
import shutil
import signal
import time

import pytest
import torch
from support.sequences import EDITS, FAST, ready, sequence, state, without_times
from support.several import in_each
from support.tiny import TEXTS, tiny_tokenizer

from d4s.change.closed_form import ClosedForm
from d4s.errors import ConfigError, ModelError
from d4s.locate import targets
from d4s.locate.covariance import estimate_covariance
from d4s.measure.metrics import evaluate
from d4s.methods.d4s import D4SEditor
from d4s.methods.memit import MEMITEditor
from d4s.models.scoring import perplexity
from d4s.ranks import Ranks, alone, here, joined, split
from d4s.sequence.compare import compare


def test_parts_cost_alike_and_are_the_same_everywhere(draw):
    for _ in range(50):
        costs = [draw.randint(1, 30) for _ in range(draw.randint(0, 12))]
        count = draw.randint(1, 5)
        parts = split(costs, count)
        assert sorted(i for part in parts for i in part) == list(range(len(costs)))
        assert all(part == sorted(part) for part in parts) and len(parts) == count
        loads = [sum(costs[i] for i in part) for part in parts]
        # The part that got the last thing had no more than the mean before it.
        assert max(loads) <= sum(costs) / count + max(costs, default=0)
    assert split([5, 4, 3, 3, 3], 2) == [[0, 3], [1, 2, 4]] or sum([5, 3]) <= 10


def test_one_process_alone_shares_with_nobody():
    ranks = here()
    assert type(ranks) is Ranks and (ranks.rank, ranks.count, ranks.is_first) == (0, 1, True)
    assert ranks.share("x", [1, 2], lambda own: [10 * i for i in own]) == [0, 10]
    assert ranks.gather("x", lambda: "a") == ["a"] and ranks.from_first(lambda: 3) == 3
    tensor = torch.ones(2)
    assert ranks.sum_(tensor) is tensor


@pytest.mark.parametrize("set_", [{}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "4"}, {"WORLD_SIZE": "many"}])
def test_what_no_launcher_has_started_is_one_process(set_, monkeypatch):
    """As in a job of a cluster that sets some of the names for others."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in set_.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "init_process_group", None)
    with joined() as ranks:
        assert ranks.count == 1 and ranks is here()


def test_a_torch_that_cannot_says_so_where_it_is_asked_to(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    with joined() as ranks:
        assert ranks.count == 1
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="start one process"), joined():
        pass


def _apart():
    """Two who do not do the same."""
    ranks = here()
    return ranks.gather("left" if ranks.rank else "right", lambda: None)


def test_processes_that_have_come_apart_end():
    for one in in_each(2, _apart, within=30):
        assert one.startswith(
            "RankEnded: the processes of this run have come apart: rank 1 is not where rank 0"
        )


def _other_bits(seed):
    """The second process writes weights that differ in the last place, as another kind of machine may."""
    model, covariance = ready(seed)
    solve = ClosedForm.delta

    def delta(self, layer):
        return solve(self, layer) * (1 + 1e-6 * here().rank)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClosedForm, "delta", delta)
        sequence(model, covariance, EDITS[:3], original=False)
    return state(model)


def test_where_bits_differ_the_firsts_go(seed):
    model, covariance = ready(seed)
    sequence(model, covariance, EDITS[:3], original=False)
    first, second = in_each(2, _other_bits, seed)
    truth = state(model)
    for name in truth:
        assert torch.equal(first[name], second[name])
        assert (first[name] - truth[name]).norm() <= 1e-3 * truth[name].norm()


def _meetings():
    """What every process finds, with a different part of the work in each."""
    ranks, found = here(), {}
    found["gathered"] = ranks.gather("g", lambda: ranks.rank)
    found["shared"] = ranks.share("s", [3, 1, 2, 9], lambda own: [(ranks.rank, i) for i in own])
    found["empty"] = ranks.share("e", [], lambda own: 1 / 0)
    found["few"] = ranks.share("f", [1], lambda own: [i + 7 for i in own])
    found["first"] = ranks.from_first(lambda: (ranks.rank, here().count))
    generator = torch.Generator().manual_seed(ranks.rank)
    found["sum"] = ranks.sum_(torch.randn(3, 3, dtype=torch.float64, generator=generator)).tolist()
    with alone():
        found["alone"] = here().gather("a", lambda: ranks.rank)
    told = []

    def fails():
        if ranks.rank == ranks.count - 1:
            raise ModelError("no room")
        time.sleep(0.1)

    for way in (lambda: ranks.agree("w", fails), lambda: ranks.gather("w", lambda: ranks.agree("w", fails))):
        try:
            way()
        except ModelError as error:
            told.append((str(error), ranks.all_know(error), ranks.all_know(ModelError("other"))))
    try:
        ranks.agree("late", lambda: ranks.share("part", [1] * 4, lambda own: fails() or [0] * len(own)))
    except ModelError as error:
        told.append(str(error))
    found["told"] = told
    found["after"] = ranks.gather("g", lambda: ranks.rank)
    return found


@pytest.mark.parametrize("count", [2, 3])
def test_all_meet_and_have_the_same(count):
    found = in_each(count, _meetings)
    parts = split([3, 1, 2, 9], count)
    truth = torch.zeros(3, 3, dtype=torch.float64)
    for rank in range(count):
        truth += torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    for rank, one in enumerate(found):
        assert one["gathered"] == one["after"] == list(range(count))
        assert one["shared"] == [(next(r for r in range(count) if i in parts[r]), i) for i in range(4)]
        assert one["empty"] == [] and one["few"] == [7]
        assert one["first"] == (0, 1) and one["alone"] == [rank]
        assert one["sum"] == truth.tolist()
        assert one["told"] == [("no room", True, False)] * 2 + ["no room"]


def _sharing(seed, texts, folder):
    """Statistics, a sequence and its figures, as `test_several_do_what_one_does` compares them."""
    tokenizer = tiny_tokenizer()
    model, _ = ready(seed)
    searched = []
    search = targets._search

    def counting(anatomy, tokenizer, requests, *rest):
        searched.append(len(requests))
        return search(anatomy, tokenizer, requests, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "_search", counting)
        found = _shared_work(seed, texts, folder, model, tokenizer)
    return found | {"searched": searched[0]}


def _shared_work(seed, texts, folder, model, tokenizer):
    covariance = estimate_covariance(
        model, tokenizer, texts, tokens=10_000, dtype=torch.float64, batch_tokens=60, progress=False
    )
    text = perplexity(model, tokenizer, TEXTS, window=16)
    seen = []
    result = sequence(
        model,
        covariance,
        config=FAST,
        batch_size=2,
        evaluate_every=4,
        measure=lambda: seen.append(1) or {"own": float(here().count)},
        journal=folder / "j",
    )
    changed = state(model)
    result.restore()
    # Targets on the weights as they are, a batch of fewer edits than processes, and answers that are written.
    memit = sequence(model, covariance, EDITS[:1], method="memit", config=FAST, original=False)
    figures = evaluate(model, tokenizer, EDITS[:3], baseline=result.baseline, generate=True, fluency=True)
    return {
        "moments": covariance.moments,
        "count": covariance.count,
        "corpus": covariance.corpus,
        "perplexity": text,
        "weights": [changed, state(model)],
        "history": without_times(result.history),
        "table": result.edits_table,
        "figures": [without_times(memit.history), figures.rows],
        "measured": len(seen),
        "journal": sorted(path.name for path in (folder / "j").iterdir()),
    }


def alike(one, other, relative=1e-3) -> bool:
    """Whether figures differ by what rounding in other batches may do to them."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float):
        return math.isclose(one, other, rel_tol=relative, abs_tol=1e-3) or (one != one and other != other)
    return one == other


def test_several_do_what_one_does(seed, tmp_path):
    texts = [*TEXTS, "Lyon", "Paris is"] * 2
    one = _sharing(seed, texts, tmp_path / "1")
    for count, given in (
        (2, texts),
        (3, texts[:2]),
    ):  # in batches of 60 tokens two texts leave one with nothing
        truth = one if given is texts else _sharing(seed, given, tmp_path / "few")
        found = in_each(count, _sharing, seed, given, tmp_path / str(count))
        assert all(isinstance(each, dict) for each in found), found
        for each in found:
            assert (each["count"], each["corpus"]) == (truth["count"], truth["corpus"])
            for layer, moment in truth["moments"].items():
                error = (each["moments"][layer] - moment).norm() / moment.norm()
                assert error < 1e-12
                assert torch.equal(each["moments"][layer], found[0]["moments"][layer])
            for own, first, right in zip(each["weights"], found[0]["weights"], truth["weights"], strict=True):
                for name, weight in right.items():
                    assert torch.equal(own[name], first[name]), "other bits in another process"
                    assert (own[name] - weight).norm() <= 1e-3 * weight.norm()
            assert math.isclose(each["perplexity"], truth["perplexity"], rel_tol=1e-5)
            assert alike(each["table"], truth["table"])
            assert each["figures"] == found[0]["figures"] and each["history"] == found[0]["history"]
        assert sum(each["searched"] for each in found) == len(EDITS)
        assert min(each["searched"] for each in found) >= 2
        assert [each["measured"] > 0 for each in found] == [True] + [False] * (count - 1)
        assert found[0]["journal"] == truth["journal"]
        for row, right in zip(found[0]["history"], truth["history"], strict=True):
            assert row.keys() == right.keys() and row["own"] == 1.0
            assert all(alike(row[name], right[name]) for name in row if "nll" in name or "norm" in name)


def _breaking(seed, folder, method, breaks):
    """A sequence of four steps, in the third of which each process does what `breaks` has for its rank."""
    model, covariance = ready(seed)
    rank, steps = here().rank, []
    plain = MEMITEditor.apply if method == "memit" else D4SEditor.apply

    def apply(self, batch):
        steps.append(batch)
        if len(steps) == 3:
            if breaks.get(rank) == "dies":
                os._exit(9)
            if breaks.get(rank) == "fails":
                raise ModelError("no room")
            if breaks.get(rank) == "is ended":
                os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MEMITEditor if method == "memit" else D4SEditor, "apply", apply)
        result = sequence(model, covariance, method=method, config=FAST, batch_size=2, journal=folder)
    return state(model), result.edits_table, without_times(result.history)


# What ends the processes, and what those that are left say.
ENDS = {
    "one fails": ("d4s", {1: "fails"}, "EditingFailed: edit 5: no room"),
    "one dies": ("d4s", {1: "dies"}, "EditingFailed: after edit 4: another process of this run was ended"),
    "all die": ("memit", {0: "dies", 1: "dies"}, None),
    "all are ended": (
        "d4s",
        {0: "is ended", 1: "is ended"},
        "EditingStopped: after edit 6: ended by SIGTERM",
    ),
    "one is ended": (
        "memit",
        {1: "is ended"},
        "EditingFailed: after edit 6: rank 1 of 2 has failed: after edit 6",
    ),
}


@pytest.mark.parametrize("way", ENDS)
def test_where_one_ends_all_do_and_any_number_goes_on(way, seed, tmp_path):
    method, breaks, says = ENDS[way]
    began = time.monotonic()
    left = in_each(2, _breaking, seed, tmp_path / "two", method, breaks, within=30)
    assert time.monotonic() - began < 30
    for rank, one in enumerate(left):
        if breaks.get(rank) == "dies":
            assert one is None
        elif rank == 0:
            assert one.startswith(says)
    if way == "one fails":
        assert left[0].split("(")[0] == left[1].split("(")[0]
    shutil.copytree(tmp_path / "two", tmp_path / "three")
    truth = _breaking(seed, tmp_path / "one", method, {})
    on_one = _breaking(seed, tmp_path / "two", method, {})
    on_three = in_each(3, _breaking, seed, tmp_path / "three", method, {})
    assert all(isinstance(one, tuple) for one in on_three), on_three
    for weights, table, history in (on_one, *on_three):
        assert [row["id"] for row in table] == [edit.id for edit in EDITS]
        assert len(history) == len(truth[2]) == 2 and alike(table, truth[1])
        for name, weight in truth[0].items():
            assert (weights[name] - weight).norm() <= 1e-3 * weight.norm()
            if weights is not on_one[0]:
                assert torch.equal(weights[name], on_three[0][0][name])


def _comparing(seed, folder, fails):
    """Two methods; the first fails in the last of the processes, in its second step, if it is to."""
    model, covariance = ready(seed)
    before, steps, plain = state(model), [], MEMITEditor.apply

    def apply(self, batch):
        steps.append(batch)
        if fails and here().rank == here().count - 1 and len(steps) == 2:
            raise ModelError("no room")
        return plain(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MEMITEditor, "apply", apply)
        found = compare(
            model,
            tiny_tokenizer(),
            EDITS[:3],
            {"memit": FAST, "d4s": FAST},
            covariance=covariance,
            out=folder,
            original=False,
            progress=False,
        )
    assert all(torch.equal(before[name], weight) for name, weight in state(model).items())
    records = {label: by_seed[0] for label, by_seed in found.results.items()}
    return {
        "failures": {label: record.failure for label, record in records.items()},
        "tables": {label: record.edits_table for label, record in records.items()},
        "steps": len(steps),
    }


def test_a_comparison_goes_on_after_a_method_that_fails_in_one_process(seed, tmp_path):
    truth = _comparing(seed, tmp_path / "one", False)
    for each in in_each(2, _comparing, seed, tmp_path / "two", True):
        assert each["failures"] == {"memit": "edit 2: no room", "d4s": None}
        assert alike(each["tables"]["d4s"], truth["tables"]["d4s"])
        assert alike(each["tables"]["memit"], truth["tables"]["memit"][:1])
    for each in in_each(3, _comparing, seed, tmp_path / "two", False):
        assert each["failures"]["memit"] == "edit 2: no room" and each["steps"] == 0, (
            "kept, and not made again"
        )
