"""Several methods side by side: the same start, what a failure leaves, means over seeds, and what is written."""

from __future__ import annotations

import gc
import itertools
import json
import math
import random
import shutil
import statistics
import weakref
from dataclasses import replace
from pathlib import Path

import pandas
import pytest
import torch
from support.sequences import EDITS, FAST, broken_off, failing, ready, same, state, without_times
from support.tiny import tiny_model, tiny_tokenizer

from d4s import Edit, cli, save_edits
from d4s.change.weights import EditedWeights
from d4s.errors import ConfigError, DataError, EditingFailed, ModelError
from d4s.measure.columns import Column
from d4s.measure.metrics import evaluation_of
from d4s.methods.d4s import D4SEditor
from d4s.methods.locate_then_edit import LocateEditor
from d4s.methods.memit import MEMITEditor
from d4s.sequence import under_way
from d4s.sequence.compare import _orders, compare, weights_digest
from d4s.sequence.comparison import Comparison, record_place
from d4s.sequence.journaling import Journaling
from d4s.sequence.record import Record
from d4s.sequence.run import edit_sequence
from d4s.sequence.target_search import search_targets
from d4s.study.front import front

BOTH = {"d4s": FAST, "memit": FAST}


def compared(model, covariance, methods=BOTH, edits=EDITS, **options):
    return compare(model, tiny_tokenizer(), edits, methods, covariance=covariance, progress=False, **options)


def test_each_method_does_what_it_does_alone_and_the_weights_come_back_bit_for_bit(seed):
    model, covariance = ready(seed)
    before = state(model)
    found = compared(model, covariance, evaluate_every=3, seeds=seed)
    assert same(state(model), before)
    for label in BOTH:
        alone = edit_sequence(
            tiny_model("gpt2", seed),
            tiny_tokenizer(),
            EDITS,
            method=label,
            config=FAST,
            covariance=covariance,
            evaluate_every=3,
            seed=seed,
            progress=False,
        )
        record = found.results[label][seed]
        assert without_times(record.history) == without_times(alone.history)
        assert record.edits_table == alone.edits_table and record.failure is None
    first, second = (found.results[label][seed].history for label in BOTH)
    assert without_times(first[:1]) == without_times(second[:1])
    assert first[-1]["l1_growth"] != second[-1]["l1_growth"]  # two methods


def test_one_baseline_serves_all_methods(monkeypatch, seed):
    taken = []
    from d4s.sequence import compare as module

    plain = module.take_baseline
    monkeypatch.setattr(module, "take_baseline", lambda *a, **k: taken.append(1) or plain(*a, **k))
    monkeypatch.setattr("d4s.sequence.run.take_baseline", lambda *a, **k: pytest.fail("taken again"))
    model, covariance = ready(seed)
    compared(model, covariance, edits=EDITS[:2], seeds=(0, 1))
    assert len(taken) == 1


def test_the_unedited_model_is_scored_once_for_all_methods_and_an_order(monkeypatch, tmp_path, seed):
    model, covariance = ready(seed)
    scored, measured, plain = [], [], under_way.evaluate

    def evaluate(model_, tokenizer, edits, **options):
        if same(state(model_), before):
            scored.append([edit.id for edit in edits])
        return plain(model_, tokenizer, edits, **options)

    def measure():
        measured.append(sum(float(p.detach().double().abs().sum()) for p in model.parameters()))
        return {"of weights": measured[-1]}

    before = state(model)
    monkeypatch.setattr(under_way, "evaluate", evaluate)
    options = dict(seeds=(0, 1), shuffle=True, measure=measure, neighborhood_limit=1, out=tmp_path / "out")
    alone = compared(model, covariance, {"d4s": FAST}, **options | {"out": None})
    scored.clear(), measured.clear()

    first = compared(model, covariance, {"d4s": FAST}, **options)
    assert (
        len(scored) == 4 and len(measured) == 4
    )  # with all and with one prompt, of two orders; begin and end
    both = compared(model, covariance, {"d4s": FAST, "memit": FAST}, **options)
    assert len(scored) == 6 and len(measured) == 6  # with one prompt, which is kept nowhere; two ends
    other = compared(
        model, covariance, {"ft-m": {"steps": 1}}, **options
    )  # the folder has it of methods not asked for
    assert len(scored) == 8 and len(measured) == 8
    for one in (0, 1):
        first_rows = (
            found.results[label][one].history[:1] for found, label in ((other, "ft-m"), (both, "memit"))
        )
        mine, theirs = (without_times(rows) for rows in first_rows)
        assert (
            mine[0]["efficacy"] == theirs[0]["efficacy"] and mine[0]["of weights"] == theirs[0]["of weights"]
        )
    assert scored[0] != scored[2] and sorted(scored[0]) == sorted(scored[2])
    for one in (0, 1):
        rows = [without_times(found.results["d4s"][one].history) for found in (alone, first, both)]
        assert rows[0] == rows[1] == rows[2]
        assert without_times(both.results["memit"][one].history)[0] == rows[0][0]
        assert (
            both.results["memit"][one].history[0]["of weights"]
            == alone.results["d4s"][one].history[0]["of weights"]
        )


def test_a_method_that_keeps_its_edits_is_found_out(monkeypatch, seed):
    model, covariance = ready(seed)
    monkeypatch.setattr(EditedWeights, "restore_", lambda self: None)
    with pytest.raises(ModelError, match="d4s did not give back"):
        compared(model, covariance, edits=EDITS[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_digest_sees_every_bit(dtype, seed):
    model = tiny_model("llama", seed, dtype)
    digest = weights_digest(model)
    assert digest == weights_digest(tiny_model("llama", seed, dtype))
    parameter = list(model.parameters())[int(torch.randint(len(list(model.parameters())), ()))]
    flat = parameter.data.view(-1)
    at = int(torch.randint(flat.numel(), ()))
    flat[at] = torch.nextafter(flat[at].clone(), torch.full((), math.inf, dtype=dtype))
    assert weights_digest(model) != digest
    a, b = list(model.parameters())[:2]
    assert weights_digest(model) == weights_digest(model) and a is not b


def test_no_copy_of_the_weights_outlives_its_method(monkeypatch, seed):
    made, alive = [], []
    plain = EditedWeights.__init__

    def init(self, *arguments):
        gc.collect()
        alive.append(sum(one() is not None for one in made))
        made.append(weakref.ref(self))
        plain(self, *arguments)

    monkeypatch.setattr(EditedWeights, "__init__", init)
    model, covariance = ready(seed)
    found = compared(model, covariance, edits=EDITS[:2])
    gc.collect()
    assert alive == [0, 0] and all(one() is None for one in made)
    assert set(found.results) == set(BOTH)


def test_a_method_that_breaks_off_is_recorded_and_the_others_go_on(monkeypatch, seed):
    model, covariance = ready(seed)
    before = state(model)
    failing(monkeypatch, MEMITEditor, 4)
    found = compared(model, covariance, {"memit": FAST, "d4s": FAST}, evaluate_every=2)
    assert same(state(model), before)
    assert [row["step"] for row in found.results["memit"][0].history] == [0, 2, 3]
    assert found.collapsed == {"memit": "edit 4: no room"}
    table = found.table().set_index("method")
    assert list(table["edits"]) == [3, len(EDITS)]
    assert table.loc["memit", "collapsed"] == "edit 4: no room" and table.loc["d4s", "collapsed"] == ""
    assert table.loc["memit", "efficacy"] == found.results["memit"][0].history[-1]["efficacy"]
    assert "memit broke off: edit 4: no room" in found.summary()


def test_a_method_that_cannot_begin_is_recorded_but_not_if_none_can(monkeypatch, seed):
    model, covariance = ready(seed)
    with_a_hole = {"d4s": FAST, "memit": FAST | {"layers": [7]}}
    found = compared(model, covariance, with_a_hole, edits=EDITS[:2])
    assert found.collapsed["memit"].startswith("before the first edit: ")
    assert found.table().set_index("method").loc["memit", "edits"] == 0
    assert found.results["d4s"][0].history[-1]["step"] == 2
    with pytest.raises(ConfigError, match="7"):
        compared(model, covariance, {"memit": FAST | {"layers": [7]}}, edits=EDITS[:2])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"methods": ["d4s", "mennit"]}, "memit"),
        ({"methods": {"d4s": {"stepz": 1}}}, "steps"),
        ({"methods": []}, "no methods"),
        ({"seeds": ()}, "seeds"),
        ({"count": 9}, "count=9"),
        ({"count": 0}, "count=0"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_done(options, text, monkeypatch, seed):
    monkeypatch.setattr("d4s.sequence.compare.take_baseline", lambda *a, **k: pytest.fail("too late"))
    with pytest.raises(ConfigError, match=text):
        compared(tiny_model("gpt2", seed), None, **options)


def test_a_label_may_name_another_configuration_of_a_method(seed):
    model, covariance = ready(seed)
    found = compared(
        model,
        covariance,
        {"d4s": FAST, "again": FAST | {"method": "d4s", "anchor": "current"}},
        edits=EDITS[:3],
    )
    plain, again = found.results["d4s"][0], found.results["again"][0]
    assert (again.method, again.config["anchor"], plain.config["anchor"]) == ("d4s", "current", "base")
    assert plain.history[-1]["delta_norm.1"] != again.history[-1]["delta_norm.1"]


def test_seeds_give_means_with_students_intervals(seed):
    model, covariance = ready(seed)
    config = {"d4s": FAST | {"contexts": 1, "context_lengths": [7]}}
    found = compared(model, covariance, config, edits=EDITS[:3], seeds=(0, 1, 2), evaluate_every=1)
    rows = [found.results["d4s"][s].history[-1] for s in (0, 1, 2)]
    growths = [row["l1_growth"] for row in rows]
    assert len(set(growths)) == 3  # contexts differ
    table = found.table().iloc[0]
    half = 4.302653 * statistics.stdev(growths) / math.sqrt(3)  # t of 2 degrees of freedom
    assert table["l1_growth"] == pytest.approx(statistics.mean(growths))
    assert table["l1_growth.low"] == pytest.approx(statistics.mean(growths) - half, rel=1e-3)
    assert table["l1_growth.high"] == pytest.approx(statistics.mean(growths) + half, rel=1e-3)
    assert table["interval"] == "over 3 seeds, Student's t"
    history = found.histories()["d4s"]
    assert list(history["step"]) == [0, 1, 2, 3]
    assert history["l1_growth"].iloc[-1] == pytest.approx(statistics.mean(growths))
    single = compared(model, covariance, edits=EDITS[:1])
    assert single.interval == single.table()["interval"][0] == "over edits, bootstrap"
    metric = single.results["d4s"][0].evaluations[-1].metrics["efficacy"]
    assert (single.table()["efficacy.low"][0], single.table()["efficacy.high"][0]) == (
        metric.low,
        metric.high,
    )


def test_a_seed_that_broke_off_does_not_leave_the_mean_to_the_others():
    def record(steps, failure=None):
        rows = [{"step": s, "efficacy": 1 - s / 100, "edit_seconds": 1.0, "l1_growth": 0.0} for s in steps]
        return Record("memit", history=rows, failure=failure)

    broken = record([0, 10], "edit 11: no room")
    found = Comparison({"memit": {0: record([0, 10, 20]), 1: broken, 2: Record("memit", failure="no")}})
    assert list(found.histories()["memit"]["step"]) == [0, 10]
    table = found.table()
    assert list(table["edits"]) == [10] and table["efficacy"][0] == pytest.approx(0.9)
    assert "seed 1, edit 11: no room" in table["collapsed"][0]


def test_seeds_that_lost_different_edits_are_compared_at_the_end_of_each_pass():
    def record(again, failure=None):
        made = [{"id": str(i)} for i in range(10)]
        made += [{"id": f"{i}~{number}", "again": str(i)} for number, n in again.items() for i in range(n)]
        steps = dict.fromkeys(
            [
                0,
                5,
                10,
                *(
                    i + 1
                    for i in range(len(made))
                    if i + 1 == len(made) or (i >= 10 and made[i]["id"][-2:] != made[i + 1]["id"][-2:])
                ),
            ]
        )
        rows = [{"step": s, "efficacy": s / 100, "edit_seconds": 1.0, "l1_growth": 0.0} for s in steps]
        return Record("d4s", history=rows, edits_table=made, failure=failure)

    three = {0: record({2: 4, 3: 1}), 1: record({2: 2}), 2: record({})}
    assert [one.pass_ends() for one in three.values()] == [[10, 14, 15], [10, 12], [10]]
    found = Comparison({"d4s": three})
    history = found.histories()["d4s"]
    # A sequence that had lost nothing more stands where it ended: (14 + 12 + 10) / 3 and (15 + 12 + 10) / 3.
    assert list(history["step"]) == [0, 5, 10, 12] and history["efficacy"].iloc[-1] == pytest.approx(0.37 / 3)
    assert list(found.table()["edits"]) == [12]
    assert found.table((10,))["efficacy"][0] == pytest.approx(0.1)
    under_way = Comparison({"d4s": {0: record({2: 4}), 1: record({}, "edit 11: no room")}})
    assert list(under_way.histories()["d4s"]["step"]) == [0, 5, 10]


def test_a_method_that_broke_off_keeps_its_row_at_points_it_did_not_reach():
    def record(steps, failure=None):
        rows = [{"step": s, "efficacy": 1 - s / 100, "edit_seconds": 1.0, "l1_growth": 0.0} for s in steps]
        return Record("memit", history=rows, failure=failure)

    found = Comparison({"d4s": {0: record([0, 10, 20])}, "memit": {0: record([0, 10], "edit 11: no room")}})
    table = found.table((10, 20)).set_index(["method", "edits"])
    assert list(table.index) == [("d4s", 10), ("d4s", 20), ("memit", 10), ("memit", 20)]
    assert table["efficacy"]["memit", 10] == pytest.approx(0.9) and math.isnan(table["efficacy"]["memit", 20])
    assert table["collapsed"]["memit", 20] == "edit 11: no room" and table["collapsed"]["d4s", 20] == ""
    assert "memit" in found.summary((20,)) and not len(found.table((30,)).query("method == 'd4s'"))
    assert not len(Comparison({"d4s": {0: record([0, 10])}}).table((30,)))


def scored(steps, again=(), gain=0.0):
    """A record whose edit i has efficacy (i mod 3) / 4 + gain at every step."""
    made = [str(i) for i in range(steps[-1])]
    evaluations = [
        evaluation_of(
            [{"id": i, "kind": "completion", "efficacy": int(i) % 3 / 4 + gain} for i in made[:step]],
            [Edit(prompt="{} is", subject=i, target_new="x", id=i) for i in made[:step]],
            0,
        )
        for step in steps
    ]
    history = [
        {
            "step": step,
            "efficacy": one.metrics["efficacy"].mean if step else 0.0,
            "edit_seconds": 1.0,
            "l1_growth": 0.0,
        }
        for step, one in zip(steps, evaluations, strict=True)
    ]
    if again:
        evaluations, history = (
            [*evaluations, evaluations[-1]],
            [*history, history[-1] | {"step": steps[-1] + len(again)}],
        )
    table = [{"id": i, "step": n} for n, i in enumerate(made)]
    table += [{"id": f"{i}~2", "again": i, "step": 99} for i in again]
    return Record("memit", history=history, evaluations=evaluations, edits_table=table)


def test_methods_are_told_apart_edit_by_edit_where_both_had_made_the_same_edits():
    found = Comparison(
        {
            "d4s": {0: scored([0, 6, 12], again=("1", "4"))},
            "memit": {0: scored([0, 6, 12], gain=0.125)},
            "rome": {0: scored([0, 6], gain=-0.25)},
            "none": {0: Record("none", failure="no room")},
        }
    )
    table = found.differences().set_index("method")
    assert list(table.index) == ["memit", "rome"] and set(table["against"]) == {"d4s"}
    # The ends, although d4s has made two edits more, in its second pass; and the last point that rome came to.
    assert list(table["edits"]) == [12, 6]
    # Edits differ among each other and not between the methods, so that nothing is left to chance.
    for name in ("efficacy", "efficacy.low", "efficacy.high"):
        assert list(table[name]) == pytest.approx([0.125, -0.25])
    other = found.differences("memit", points=(6, 12)).set_index(["method", "edits"])["efficacy"]
    assert other.to_dict() == pytest.approx({("d4s", 6): -0.125, ("d4s", 12): -0.125, ("rome", 6): -0.375})
    lines = found.summary().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("Difference from d4s, edit by edit"))
    assert lines[at + 2].split()[:3] == ["memit", "12", "+12.5"] and lines[at + 3].split()[2] == "-25.0"
    with pytest.raises(ConfigError, match="unknown label 'ROME'"):
        found.differences("ROME")
    alone = Comparison({"d4s": found.results["d4s"]})
    assert not len(alone.differences()) and "edit by edit" not in alone.summary()


def test_over_seeds_differences_are_of_the_same_seed():
    gains = (0.0, 0.125, 0.25)
    found = Comparison(
        {
            "d4s": {seed: scored([0, 6], gain=gain) for seed, gain in enumerate(gains)},
            "memit": {seed: scored([0, 6], gain=gain + 0.25) for seed, gain in enumerate(gains)},
            "rome": {seed: scored([0, 6], gain=2 * gain) for seed, gain in enumerate(gains)},
        }
    )
    table = found.differences().set_index("method")
    assert table.loc["memit", ["efficacy.low", "efficacy", "efficacy.high"]].to_list() == pytest.approx(
        [0.25] * 3
    )
    half = 4.302653 * statistics.stdev(gains) / math.sqrt(3)  # Student's t of two degrees of freedom
    assert table["efficacy"]["rome"] == pytest.approx(0.125)
    assert table["efficacy.high"]["rome"] == pytest.approx(0.125 + half, rel=1e-6)


def test_an_evaluation_that_fails_costs_neither_the_weights_nor_the_other_methods(tmp_path, seed):
    model, covariance = ready(seed)
    before, calls = state(model), []

    def measure():
        calls.append(1)
        if len(calls) == 2:
            raise DataError("the network is gone")
        return {"extra": 1.0}

    run = dict(edits=EDITS[:2], evaluate_every=1, measure=measure, out=tmp_path / "out")
    found = compared(model, covariance, {"d4s": FAST, "grace": None}, **run)
    assert same(before, state(model)) and "save_pretrained" not in vars(model)
    broken = found.results["d4s"][0]
    assert broken.failure == "after edit 1: the network is gone" and len(broken.edits_table) == 1
    assert found.results["grace"][0].failure is None
    again = compared(model, covariance, {"d4s": FAST, "grace": None}, **run)
    assert not again.collapsed, "what failed is tried again, what went through is not"
    # The unedited model and the point that failed, grace's two points, and the two of what was tried again.
    assert len(calls) == 2 + 2 + 2


def test_orders_differ_by_seed_and_are_the_same_for_all_methods(seed):
    model, covariance = ready(seed)
    found = compared(model, covariance, seeds=(1, 2, 3), shuffle=True, count=4)
    orders = {
        label: [[r["id"] for r in rec.edits_table] for rec in found.results[label].values()] for label in BOTH
    }
    assert orders["d4s"] == orders["memit"] and all(len(order) == 4 for order in orders["d4s"])
    assert len({tuple(order) for order in orders["d4s"]}) > 1
    plain = compared(model, covariance, count=4)
    assert [r["id"] for r in plain.results["d4s"][0].edits_table] == [edit.id for edit in EDITS[:4]]


def test_a_table_may_be_of_the_points_on_the_way(seed):
    model, covariance = ready(seed)
    found = compared(model, covariance, evaluate_every={2, 5}, measure=lambda: {"extra": 0.25})
    table = found.table((2, 5))
    assert list(table["method"]) == ["d4s", "d4s", "memit", "memit"] and list(table["edits"]) == [2, 5, 2, 5]
    history = found.results["d4s"][0].history
    assert list(table["efficacy"][:2]) == [history[1]["efficacy"], history[2]["efficacy"]]
    assert table["seconds_an_edit"][1] == history[2]["edit_seconds"] / 5
    assert set(table["extra"]) == {0.25} and "l1_norm.0" not in table


def test_only_figures_known_to_be_shares_are_shown_in_percent(seed):
    model, covariance = ready(seed)
    measured = {
        "weight": 3.0,
        "loss": 0.0345,
        "text_perplexity": 12.5,
        "arc acc_norm": 0.3,
        "wiki bits_per_byte": 0.9,
    }
    found = compared(model, covariance, edits=EDITS[:2], seeds=(0, 1), measure=lambda: measured)
    head, *rows, said = found.summary().splitlines()[:4]
    assert len(rows) == 2 and "weight, loss, text perplexity, wiki bits per byte: as measured" in said
    for row in rows:
        for name, text in (
            ("weight", "3"),
            ("loss", "0.0345"),
            ("text perplexity", "12.5"),
            ("arc acc norm", "30.0"),
            ("wiki bits per byte", "0.9"),
        ):
            end = head.index(name) + len(name)
            assert row[:end].endswith(f" {text} [{text}, {text}]"), name


def test_figures_are_shown_as_their_measure_declares_them_also_from_a_file(tmp_path, seed):
    def measure():
        return {"kept": 0.5, "fluency": 5.0, "part.a": 0.25}

    measure.columns = {
        "kept": Column("kept", "share", "up"),
        "part.<name>": Column("part.<name>", "share", "up", "of a part"),
    }
    model, covariance = ready(seed)
    run = dict(edits=EDITS[:1], seeds=(0, 1), measure=measure, out=tmp_path / "out")
    found = compared(model, covariance, {"d4s": FAST}, **run)
    measure.columns = {}  # what has been made says it by itself
    again = compared(model, covariance, {"d4s": FAST}, **run)
    for one in (found, again):
        assert one.results["d4s"][0].measured == ["kept", "fluency", "part.a"]
        head, row, said = one.summary().splitlines()
        for name, text in (("kept", "50.0"), ("fluency", "5"), ("part.a", "25.0")):
            assert row[: head.index(name) + len(name)].endswith(f" {text} [{text}, {text}]"), name
        assert "(fluency: as measured)" in said
    for stored, column in again.results["d4s"][0].columns.items():
        there = found.results["d4s"][0].columns[stored]
        assert (column.unit, column.better, column.meaning) == (there.unit, there.better, there.meaning)
    assert set(again.columns) == {"kept", "fluency", "part.a"}


def test_table_histories_figures_and_sequences_are_written(monkeypatch, tmp_path, seed):
    failing(monkeypatch, D4SEditor, 6)
    model, covariance = ready(seed)
    found = compared(model, covariance, evaluate_every=2)
    found.save(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    figures = {
        f"{name}.{kind}" for name in ("metrics", "norms", "target_probability") for kind in ("png", "csv")
    }
    assert names == figures | {"table.csv", "table.json", "differences.csv", "history.csv", "results"}
    stored = json.loads((tmp_path / "table.json").read_text())
    (apart,) = stored["differences"]
    assert (apart["method"], apart["against"], apart["edits"]) == ("memit", "d4s", 4)  # where both still were
    assert apart["efficacy"] == found.differences()["efficacy"][0]
    assert [row["method"] for row in stored["rows"]] == list(BOTH) and stored["collapsed"] == found.collapsed
    assert stored["rows"][1]["efficacy"] == found.table()["efficacy"][1]
    history = pandas.read_csv(tmp_path / "history.csv")
    assert list(history[history["method"] == "d4s"]["step"]) == [0, 2, 4, 5]
    loaded = Record.load(tmp_path / "results" / "memit-0.json")
    assert loaded.history == found.results["memit"][0].history


def test_fewer_methods_leave_the_tables_of_those_that_are_there(tmp_path, seed):
    model, covariance = ready(seed)
    run = dict(edits=EDITS[:2], seeds=(0, 1), out=tmp_path)
    compared(model, covariance, {"ft-m": {"steps": 1}, "grace": {"steps": 1}}, **run).save(tmp_path)
    whole = pandas.read_csv(tmp_path / "table.csv")
    few = compared(model, covariance, {"grace": {"steps": 1}}, **run | dict(seeds=0))
    assert list(few.results) == ["grace"]
    few.save(tmp_path)
    table = pandas.read_csv(tmp_path / "table.csv").set_index("method").loc[whole["method"]].reset_index()
    pandas.testing.assert_frame_equal(table, whole)
    assert len(pandas.read_csv(tmp_path / "history.csv").groupby(["method", "seed"])) == 4
    (tmp_path / "results" / "ft-m-1.json").write_text("{}")
    with pytest.raises(DataError, match=r"ft-m-1\.json"):
        few.save(tmp_path)


def test_an_interrupted_comparison_goes_on(monkeypatch, tmp_path, seed):
    model, covariance = ready(seed)
    run = dict(edits=EDITS[:2], out=tmp_path / "out")
    whole = compared(model, covariance, {"d4s": FAST, "memit": FAST}, edits=EDITS[:2])
    apply = MEMITEditor.apply
    monkeypatch.setattr(MEMITEditor, "apply", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        compared(model, covariance, {"d4s": FAST, "memit": FAST}, **run)
    monkeypatch.setattr(MEMITEditor, "apply", apply)
    monkeypatch.setattr(D4SEditor, "apply", lambda *_: pytest.fail("it was done already"))
    found = compared(model, covariance, {"d4s": FAST, "memit": FAST}, **run)
    for label in ("d4s", "memit"):
        ours, theirs = (without_times(c.results[label][0].history) for c in (found, whole))
        assert ours == theirs
    with pytest.raises(ConfigError, match="another configuration"):
        compared(model, covariance, {"d4s": FAST | {"steps": 1}}, **run)
    with pytest.raises(ConfigError, match="other edits"):
        compared(model, covariance, {"d4s": FAST}, edits=EDITS[1:3], out=tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    with pytest.raises(ConfigError, match="mine: already holds something else"):
        compared(model, covariance, {"d4s": FAST}, edits=EDITS[:2], out=tmp_path / "mine")


def test_a_comparison_goes_on_over_figures_that_are_not_finite(tmp_path, seed):
    """A collapsed model's perplexity is infinite, and so is a mean over it."""
    model, covariance = ready(seed)
    for name, values in {"infinite": [math.inf] * 4, "large": [1.0, 1e200, 1.0, 3e200]}.items():
        run = dict(edits=EDITS[:1], seeds=(0, 1), out=tmp_path / name)
        told = iter(values)
        found = compared(
            model, covariance, {"d4s": FAST}, **run, measure=lambda told=told: {"text_perplexity": next(told)}
        )
        assert "d4s" in found.summary()
        found.save(tmp_path / name)
        again = compared(model, covariance, {"d4s": FAST}, **run, measure=lambda: pytest.fail("done already"))
        assert "d4s" in again.summary()
        mean = again.table()["text_perplexity"][0]
        assert math.isnan(mean) if name == "infinite" else mean == pytest.approx(2e200)


def test_the_weights_come_back_also_after_an_error_that_nobody_expected(monkeypatch, seed):
    model, covariance = ready(seed)
    before, apply, calls = state(model), D4SEditor.apply, []

    def fails_at_the_second(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise ZeroDivisionError
        return apply(*arguments)

    monkeypatch.setattr(D4SEditor, "apply", fails_at_the_second)
    with pytest.raises(EditingFailed) as caught:
        compared(model, covariance, {"d4s": FAST}, edits=EDITS[:3])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert len(calls) == 2 and same(before, state(model))


def test_the_verb_compares_and_writes(monkeypatch, tmp_path, capsys, seed):
    model, _ = ready(seed)
    monkeypatch.setattr("d4s.cli.compare.loaded_model", lambda options: (model, tiny_tokenizer()))
    save_edits(EDITS, tmp_path / "edits.jsonl")
    asked = f"compare m {tmp_path}/edits.jsonl --methods ft-m,grace --seeds 0,1 --count 2 --shuffle --evaluate-every 1"
    assert cli.main([*asked.split(), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "over 2 seeds, Student's t" in said and "grace" in said
    history = pandas.read_csv(tmp_path / "out" / "history.csv")
    assert list(history["step"]) == [0, 1, 2] * 4 and set(history["seed"]) == {0, 1}
    assert cli.main([*asked.split(), "--batch-size", "2", "--out", str(tmp_path / "out")]) == 2
    assert "other batch_size (1 there, 2 here)" in capsys.readouterr().err
    assert cli.main([*asked.split(), "--json", "--out", str(tmp_path / "again")]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["method"], row["edits"]) for row in rows] == [("ft-m", 2), ("grace", 2)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--seeds 1 --seed 5", "--seed means nothing with --seeds"),
        ("--targets t.safetensors", "none of the methods compared (ft-m, ultraedit) searches"),
    ],
)
def test_the_verb_refuses_what_it_would_pass_over(options, said, monkeypatch, tmp_path, capsys, seed):
    model, _ = ready(seed)
    monkeypatch.setattr("d4s.cli.compare.loaded_model", lambda options: (model, tiny_tokenizer()))
    monkeypatch.chdir(tmp_path)
    save_edits(EDITS, "edits.jsonl")
    search_targets(model, tiny_tokenizer(), EDITS[:1], config=FAST, out="t.safetensors", progress=False)
    asked = f"compare m edits.jsonl --methods ft-m,ultraedit --count 1 --out out {options}"
    assert cli.main(asked.split()) == 2
    assert said in capsys.readouterr().err


class Measure:
    """Measures 1 under the name of its task, but for one call."""

    def __init__(self, task="t", fails=0):
        self.settings, self.fails, self.calls = {"tasks": [task]}, fails, 0

    def __call__(self):
        self.calls += 1
        if self.calls == self.fails:
            raise DataError("the task's data are gone")
        return {self.settings["tasks"][0]: 1.0}


def test_a_sequence_that_could_not_be_measured_is_tried_again(tmp_path, seed):
    model, covariance = ready(seed)
    found = compared(model, covariance, out=tmp_path / "c", evaluate_every=2, measure=Measure(fails=3))
    assert found.unfinished == {("d4s", 0)} and found.collapsed == {
        "d4s": "after edit 4: the task's data are gone"
    }
    found.save(tmp_path / "c")
    assert [path.name for path in (tmp_path / "c" / "results").iterdir()] == ["memit-0.json"]
    again = Measure()
    found = compared(model, covariance, out=tmp_path / "c", evaluate_every=2, measure=again)
    assert not found.unfinished and not found.collapsed
    assert again.calls == 3 and len(found.results["d4s"][0].history) == 5  # it went on where it was
    with pytest.raises(ConfigError, match=r"with other measure .*'t'.*'another'"):
        compared(model, covariance, out=tmp_path / "c", evaluate_every=2, measure=Measure("another"))


def test_weights_come_back_when_a_sequence_cannot_be_kept(tmp_path, seed):
    model, covariance = ready(seed)
    before = state(model)
    with pytest.raises(EditingFailed, match="JSON"):
        compared(model, covariance, out=tmp_path / "c", measure=lambda: {"m": object()})
    assert same(state(model), before)


def test_sequences_of_other_passes_are_refused(tmp_path, seed):
    model, covariance = ready(seed)
    options = dict(edits=EDITS[:2], out=tmp_path)
    compared(model, covariance, ["d4s"], passes=2, **options)
    with pytest.raises(ConfigError, match=r"with other passes \(2 there, 1 here\)"):
        compared(model, covariance, **options)
    with pytest.raises(ConfigError, match=r"with other passes \(2 there, 3 here\)"):
        compared(model, covariance, passes=3, **options)


def test_no_two_labels_share_a_file():
    labels = ("a/b", "a-b", "a%2Fb", "ft-l", "re-anchored", "..", "a b", "λ")
    places = [record_place(Path("c"), label, 0) for label in labels]
    assert len(set(places)) == len(labels) and {place.parent for place in places} == {Path("c/results")}
    assert places[3].name == "ft-l-0.json"


def test_a_shuffle_keeps_the_edits_of_a_case_together():
    cases = [str(i // 3) for i in range(30)]
    edits = [replace(EDITS[0], id=f"{i}", tags={"case": case}) for i, case in enumerate(cases)]
    orders = _orders(edits, (0, 1), True, 25)
    assert len(orders[0]) == 25 and orders[0] != orders[1] != edits[:25]
    for order in orders.values():
        runs = [[int(e.id) for e in group] for _, group in itertools.groupby(order, lambda e: e.tags["case"])]
        assert len(runs) == 9 and all(run == list(range(run[0], run[0] + len(run))) for run in runs)
    alone = [replace(edit, tags={}) for edit in edits]
    assert _orders(alone, (5,), True, None) == {5: random.Random(5).sample(alone, 30)}


@pytest.mark.parametrize("method", ["d4s", "memit"])
def test_a_comparison_goes_on_within_a_sequence(method, monkeypatch, tmp_path, seed):
    model, covariance = ready(seed)
    options = dict(seeds=seed, evaluate_every=3, out=tmp_path / "whole")
    whole = compared(model, covariance, {method: FAST}, **options)
    options["out"] = tmp_path / "out"
    with monkeypatch.context() as patch:
        broken_off(patch, 5, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            compared(model, covariance, {method: FAST}, **options)
    (journal,) = (tmp_path / "out" / "journals").iterdir()
    with pytest.raises(ConfigError, match="is the journal of another sequence: config"):
        compared(model, covariance, {method: FAST | {"prior_weight": 2.0}}, **options)
    evaluated = []
    evaluate = under_way.evaluate
    monkeypatch.setattr(
        under_way, "evaluate", lambda *a, **k: evaluated.append(len(a[2])) or evaluate(*a, **k)
    )
    again = compared(model, covariance, {method: FAST}, **options)
    assert evaluated == [1, 1, 6, 1, 7]  # edits 5 and 6 and their point, edit 7 and the last point
    one, other = (found.results[method][seed] for found in (whole, again))
    assert without_times(one.history) == without_times(other.history)
    assert one.edits_table == other.edits_table and not journal.exists()


def test_targets_found_before_an_interruption_serve_later_sequences_too(monkeypatch, tmp_path, seed):
    model, covariance = ready(seed)
    both = {"d4s": FAST, "other": FAST | {"method": "d4s", "prior_weight": 2.0}}
    searched, search = [], LocateEditor.search

    def counted(self, edits, *arguments):
        searched.extend(edit.id for edit in edits)
        return search(self, edits, *arguments)

    monkeypatch.setattr(
        "d4s.methods.locate_then_edit.EDITS_AHEAD", 2
    )  # the journal has the first of several parts
    monkeypatch.setattr(LocateEditor, "search", counted)
    with monkeypatch.context() as patch:
        broken_off(patch, 5, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            compared(model, covariance, both, seeds=seed, out=tmp_path)
    shutil.rmtree(tmp_path / "targets")  # as a process that was killed leaves it
    compared(model, covariance, both, seeds=seed, out=tmp_path)
    assert sorted(searched) == sorted(edit.id for edit in EDITS)  # each once


@pytest.mark.parametrize("way", [compare, front])
def test_one_name_is_not_a_list_of_letters(way, seed):
    model, covariance = ready(seed)
    with pytest.raises(ConfigError, match=r"methods is the text 'd4s', must be a list, as \['d4s'\]"):
        way(model, tiny_tokenizer(), EDITS, "d4s", covariance=covariance)


def test_a_sequence_that_could_not_go_on_leaves_its_journal_to_others(monkeypatch, tmp_path, seed):
    model, covariance = ready(seed)
    with monkeypatch.context() as patch:
        broken_off(patch, 5, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            compared(model, covariance, {"d4s": FAST}, seeds=seed, out=tmp_path)
    (kept,) = (tmp_path / "targets").iterdir()
    kept.write_bytes(b"damaged")
    with pytest.raises(DataError) as raised:
        compared(model, covariance, {"d4s": FAST}, seeds=seed, out=tmp_path)
    (place,) = (tmp_path / "journals").iterdir()
    assert raised.tb is not None, "which holds all that the failed call had"
    Journaling(place).close()
