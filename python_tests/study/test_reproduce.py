"""The paper's tables and figures: protocols, what is written, and that each statement follows from its table."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pandas
import pytest
from support.sequences import failing, ready, same, state
from support.tiny import tiny_tokenizer
from support.views import view_of

from d4s import cli, save_edits
from d4s.cli.reproduce import PAPER
from d4s.edits import Edit
from d4s.errors import ConfigError
from d4s.measure.metrics import Evaluation
from d4s.methods import locate_then_edit, rome
from d4s.methods.d4s import D4SEditor
from d4s.methods.memit import MEMITEditor
from d4s.sequence.comparison import Comparison
from d4s.sequence.record import Record
from d4s.study.analysis import analyze_model, mcnemar
from d4s.study.reproduce import (
    PROTOCOLS,
    Verdict,
    _data_matter,
    _forgetting,
    _highest_average,
    _surprise_harms,
    reproduce,
    statements_of,
)

# Twelve facts about different subjects.
FACTS = tuple(
    Edit(
        prompt=("{} worked for", "The mother tongue of {} is")[i % 2],
        subject=f"{name} {i}",
        target_new=("Paris", "English")[i % 2],
        target_true=("Apple", "French")[i % 2],
        paraphrases=(f"You and I; {name} {i} is",),
        neighborhood=("Steve Jobs worked for", "The religion of Edwin is"),
        relation=("P1", "P2")[i % 2],
        id=f"f{i}",
    )
    for i, name in enumerate(("Lyon", "Edwin", "Manila", "Danielle") * 3)
)
QUESTIONS = tuple(dataclasses.replace(edit, kind="question") for edit in FACTS)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Two steps an edit, strong enough to do harm."""

    def fast(plain):
        def preset(anatomy):
            fields = plain(anatomy)
            target = dataclasses.replace(
                fields["target"], steps=2, learning_rate=2.0, clamp=20.0, weight_decay=0.0
            )
            return (
                fields
                | dict(target=target, contexts=0)
                | ({} if plain is rome_preset else dict(prior_weight=0.1))
            )

        return preset

    rome_preset = rome.rome_preset
    monkeypatch.setattr(locate_then_edit, "spread_preset", fast(locate_then_edit.spread_preset))
    monkeypatch.setattr(rome, "rome_preset", fast(rome_preset))


def run(name, tmp_path, seed, edits=None, **options):
    model, covariance = ready(seed)
    before = state(model)
    options = {"methods": ("memit", "d4s"), "counts": (1, 2, 4), "progress": False, "seed": seed} | options
    data = {"facts": FACTS} if edits is None else edits
    found = reproduce(name, model, tiny_tokenizer(), data, out=tmp_path, covariance=covariance, **options)
    assert same(state(model), before)
    assert (tmp_path / f"{name}.md").read_text().rstrip().endswith(found.statement)
    assert len(pandas.read_csv(tmp_path / f"{name}-table.csv")) == len(found.table)
    return found


def figures(tmp_path, *names):
    return all((tmp_path / f"{name}.{kind}").stat().st_size for name in names for kind in ("png", "csv"))


def test_table2_has_a_row_a_method_and_count_and_its_statement_follows(tmp_path, seed):
    found = run("table2", tmp_path, seed, {"questions": QUESTIONS})
    table = found.table
    assert [(m, n) for m, n in zip(table["method"], table["edits"], strict=True)] == [
        (m, n) for m in ("memit", "d4s") for n in (1, 2, 4)
    ]
    average = table.set_index(["method", "edits"])["average"]
    assert average["d4s", 4] == pytest.approx(
        table.iloc[-1][["efficacy", "paraphrase", "specificity"]].mean()
    )
    assert found.verdict.holds == all(average["d4s", n] >= average["memit", n] for n in (1, 2, 4))
    assert figures(tmp_path, "table2") and (tmp_path / "table2-details" / "history.csv").exists()
    assert "4 edits of questions, one a step, scored after 1, 2, 4" in found.statement


def test_table3_puts_data_sets_side_by_side(tmp_path, seed):
    found = run("table3", tmp_path, seed, {"one": FACTS, "two": QUESTIONS}, counts=(2,))
    assert list(found.table["data"]) == ["one", "one", "two", "two"]
    assert figures(tmp_path, "table3")
    assert {"one", "two"} == set(pandas.read_csv(tmp_path / "table3.csv")["panel"])


def test_table4_is_before_and_after(tmp_path, seed):
    found = run("table4", tmp_path, seed, counts=(4,), tasks=())
    table = found.table.set_index("method")
    assert set(table["task"]) == {"retained"} and set(table["edits"]) == {4}
    assert table["before"].nunique() == 1
    assert list(table["change"]) == pytest.approx(list(table["after"] - table["before"]))
    assert found.verdict.holds == (table.loc["d4s", "change"] >= -0.02)
    assert "8 facts are asked that no edit touches" in found.statement
    assert figures(tmp_path, "table4")


def test_table4_asks_the_harness_for_the_tasks_that_are_named(monkeypatch, tmp_path, seed):
    from d4s.measure.downstream import TaskMetric

    asked = []

    def run_tasks(model, tokenizer, tasks, *, limit, include_path, seed):
        asked.append((tuple(tasks), limit, include_path))
        found = {"acc": TaskMetric(0.5, None, 10), "acc_norm": TaskMetric(1 / len(asked), None, 10)}
        return {"arc_challenge": found}

    monkeypatch.setattr("d4s.measure.downstream.run_tasks", run_tasks)
    options = dict(counts=(2,), tasks=["arc_challenge"], task_limit=7, task_folder="folder")
    found = run("table4", tmp_path, seed, {"facts": FACTS[:2]}, **options)
    assert set(asked) == {(("arc_challenge",), 7, "folder")} and len(asked) == 4  # before and after, twice
    assert list(found.table["task"]) == ["arc_challenge acc_norm"] * 2
    assert list(found.table["before"]) == [1, pytest.approx(1 / 3)]
    assert list(found.table["after"]) == [1 / 2, 1 / 4]


def test_table4_judges_by_shares_alone(monkeypatch, tmp_path, seed):
    from d4s.measure.downstream import TaskMetric

    told = iter([0.5, 0.5, 0.5, 0.25])

    def run_tasks(*_, **__):
        return {
            "arc": {"acc": TaskMetric(next(told), None, 4)},
            "wiki": {"word_perplexity": TaskMetric(31, None, 4)},
        }

    monkeypatch.setattr("d4s.measure.downstream.run_tasks", run_tasks)
    found = run(
        "table4", tmp_path, seed, {"facts": FACTS[:2]}, counts=(2,), tasks=["arc", "wiki"], task_limit=4
    )
    assert "largest fall: memit 0.0 points, d4s 25.0 points" in found.verdict.measured
    drawn = pandas.read_csv(tmp_path / "table4.csv")
    assert set(drawn[drawn["panel"] == "wiki word_perplexity"]["y"]) == {31}
    assert set(drawn[drawn["panel"] == "arc acc"]["y"]) == {0.5, 0.25}  # one axis with the perplexity


def test_fig2_compares_data_sets(tmp_path, seed):
    data = {"completions": FACTS, "statements": statements_of(FACTS)}
    found = run("fig2", tmp_path, seed, data, methods=("d4s",))
    assert list(found.table["group"]) == list(data) and set(found.table["edits"]) == {4}
    curves = pandas.read_csv(tmp_path / "fig2.csv")
    assert list(curves[curves["line"] == "statements"]["x"]) == [0, 1, 2, 4]
    assert figures(tmp_path, "fig2")
    known, lost, regained = (found.table[name] for name in ("known", "lost", "regained"))
    assert known.nunique() == 1 and list((lost - regained) / 8) == pytest.approx(
        list(found.table["retained_drop"])
    )
    assert (found.verdict.holds is None) == (mcnemar(int(known[0]), 0) > 0.05)


def test_data_matter_by_a_test_of_the_same_facts():
    """Of 100 facts 50 are known; two independent shares would have to differ by more than eight."""
    before, lost = "10" * 50, "00" * 8 + "10" * 42
    view = view_of({"one": {"rome": [before, lost]}, "two": {"rome": [before, "0" * 24 + before[24:]]}})
    found = _data_matter(view)
    assert found.holds is False and "one 8.0 points (8 lost, 0 regained, p 0.0078)" in found.measured
    assert "rome: 4 facts right with one only, 0 with two only (p 0.12)" in found.measured
    kept = {"rome": [before, before]}
    view = view_of({"one": {"rome": [before, lost]}, "two": kept})
    assert _data_matter(view).holds is False  # one of two runs lost some
    more = {"rome": [before, "0" * 40 + before[40:]]}
    assert _data_matter(view_of({"one": {"rome": [before, lost]}, "two": more})).holds is True
    assert _data_matter(view_of({"two": more})).holds is None
    few = {"rome": ["11111" + "0" * 95, "0" * 100]}
    assert _data_matter(view_of({"one": few, "two": few})).holds is None


def test_surprise_is_judged_where_a_run_lost_facts():
    before = "1" * 20
    forms = ("true_false", "multiple_choice", "directly_generated")

    def found(*lost, **failures):
        points = {form: {"rome": [before, "0" * n + before[n:]]} for form, n in zip(forms, lost, strict=True)}
        return _surprise_harms(view_of(points, [2.0, 3.0, 5.0], **failures))

    assert found(0, 1, 6).holds is True and found(6, 1, 0).holds is False
    assert found(0, 1, 5).holds is None
    said = found(0, 1, 6, rome="edit 2: no room").measured
    assert "largest drop 30.0 points (6 lost, 0 regained, p 0.031)" in said
    assert "multiple_choice: rome broke off (edit 2: no room)" in said


def test_fig3_compares_forms(tmp_path, seed):
    found = run("fig3", tmp_path, seed, methods=("d4s",), counts=(2,))
    assert list(found.table["group"]) == ["true_false", "multiple_choice", "directly_generated"]
    assert found.table["perplexity"].nunique() == 3
    assert figures(tmp_path, "fig3") and "perplexities true_false" in found.statement


def test_fig5_shows_the_bottleneck_and_the_norms(tmp_path, seed):
    found = run("fig5", tmp_path, seed, methods=("rome", "memit"), counts=(1, 10))
    assert figures(tmp_path, "fig5a", "fig5b")
    table = pandas.read_csv(tmp_path / "fig5-details" / "bottleneck.csv")
    first, last = (
        table[table["of the edits"] == f"{part} fifth"].set_index("method") for part in ("first", "last")
    )
    noise = 1.96 * (first["standard_error"] ** 2 + last["standard_error"] ** 2) ** 0.5
    fell = first["last_probability"] - last["last_probability"] > noise
    growth = found.table.groupby("method")["l1_growth"].last()
    assert found.verdict.holds == all(fell[m] and growth[m] > 0 for m in ("rome", "memit"))


def test_fig6_relates_norms_to_scores(tmp_path, seed):
    found = run("fig6", tmp_path, seed)
    assert figures(tmp_path, "fig6a", "fig6b", "fig6c")
    assert sorted(set(found.table["edits"])) == [0, 1, 2, 4]
    last = found.table[found.table["edits"] == 4].set_index("method")
    less = last.loc["d4s", "l1_growth"] < last.loc["memit", "l1_growth"]
    assert found.verdict.holds == (less and last.loc["d4s", "retained"] >= last.loc["memit", "retained"])


def test_fig7_compares_then_and_now(tmp_path, seed):
    found = run("fig7", tmp_path, seed)
    assert figures(tmp_path, "fig7", "fig7-memit", "fig7-d4s")
    lost = found.table[found.table["metric"] == "efficacy"].set_index("method")["forgotten"]
    assert found.verdict.holds == (lost["d4s"] <= 0.05 and lost["memit"] > lost["d4s"])


def test_fig8_shows_metrics_against_edits(tmp_path, seed):
    found = run("fig8", tmp_path, seed)
    assert figures(tmp_path, "fig8")
    average = found.table.set_index(["method", "edits"])["average"]
    fall = {m: average[m, 1] - average[m, 4] for m in ("memit", "d4s")}
    assert found.verdict.holds == (fall["memit"] > 0 and fall["d4s"] < fall["memit"])


def averages(d4s, memit, collapsed=""):
    return pandas.DataFrame(
        {
            "data": "zsRE",
            "edits": [100, 500, 100, 500],
            "method": ["d4s", "d4s", "memit", "memit"],
            "average": [*d4s, *memit],
            "average.low": [v - 0.02 for v in (*d4s, *memit)],
            "average.high": [v + 0.02 for v in (*d4s, *memit)],
            "collapsed": ["", "", collapsed, collapsed],
        }
    )


def test_a_method_that_breaks_off_is_worse_not_gone(monkeypatch, tmp_path, seed):
    failing(monkeypatch, MEMITEditor, 3)
    found = run("fig8", tmp_path, seed, methods=("memit", "d4s"), counts=(1, 4))
    assert list(found.table["method"]) == ["memit", "memit", "d4s", "d4s"]
    assert found.table["collapsed"].iloc[1] == "edit 3: no room" and found.verdict.holds is True
    assert "memit broke off (edit 3: no room)" in found.verdict.measured


@pytest.mark.parametrize("name", ["table2", "table4", "fig5", "fig6", "fig8"])
def test_d4s_that_breaks_off_does_not_hold_and_rows_without_figures_stay(name, monkeypatch, tmp_path, seed):
    failing(monkeypatch, MEMITEditor, 3)
    failing(monkeypatch, D4SEditor, 3)
    data = {"facts": QUESTIONS if name == "table2" else FACTS}
    found = run(name, tmp_path, seed, data, counts=(4,), **({"tasks": ()} if name == "table4" else {}))
    assert set(found.table["method"]) == {"memit", "d4s"}
    assert set(found.table["collapsed"]) == {"edit 3: no room"}
    assert found.verdict.holds is (None if name == "fig5" else False)  # Fig. 5 claims nothing of D4S
    assert "d4s broke off (edit 3: no room)" in found.statement and "memit broke off" in found.statement
    if "l1_growth" in found.table:
        assert found.table[found.table["edits"] == 4]["l1_growth"].isna().all()


def test_without_d4s_a_method_that_breaks_off_says_nothing_about_it(monkeypatch, tmp_path, seed):
    failing(monkeypatch, MEMITEditor, 3)
    found = run("fig8", tmp_path, seed, methods=("memit", "ft-m"), counts=(1, 4))
    assert found.verdict.holds is None and "memit broke off" in found.verdict.measured


@pytest.mark.parametrize(("now", "holds"), [(0.94, False), (0.96, True)])
def test_what_d4s_forgets_counts_although_no_other_method_got_there(now, holds, tmp_path):
    def record(steps, failure=None):
        rows = [{"step": s, "original_efficacy": 1.0, "efficacy": now} for s in steps]
        return Record("d4s", history=rows, evaluations=[Evaluation([], {})] * len(rows), failure=failure)

    found = Comparison({"d4s": {0: record([0, 4])}, "memit": {0: record([0, 2], "edit 3: no room")}})
    setting = SimpleNamespace(file=lambda suffix="": tmp_path / f"fig7{suffix}.png")
    _, verdict = _forgetting(setting, found, analyze_model(found))
    assert verdict.holds is holds and "memit broke off (edit 3: no room)" in verdict.measured


def test_fig5_with_one_target_a_fifth_is_not_judged(tmp_path, seed):
    found = run("fig5", tmp_path, seed, edits={"facts": FACTS[:4]}, methods=("memit",), counts=(2, 4))
    assert found.verdict.holds is None and "nan" in found.verdict.measured


def test_the_highest_average_must_be_so_at_every_count():
    assert _highest_average(averages((0.9, 0.8), (0.9, 0.3))).holds is True
    assert _highest_average(averages((0.9, 0.8), (0.91, 0.3))).holds is False
    assert _highest_average(averages((0.9, 0.8), (0.1, 0.3)).query("method == 'memit'")).holds is None
    said = _highest_average(averages((0.9, 0.8), (0.89, 0.3), "edit 7: no room")).measured
    assert (
        said.count("intervals overlap") == 1
        and "500 edits: d4s 80.0 %" in said
        and "zsRE: memit broke off (edit 7: no room)" in said
    )


def test_at_a_count_that_a_method_did_not_reach_it_is_lower():
    late = averages((0.9, 0.1), (0.8, math.nan), "edit 107: no room")
    found = _highest_average(late)
    assert found.holds is True and "500 edits: d4s 10.0 %, no other got there" in found.measured
    names = {"d4s": "memit", "memit": "d4s"}
    assert _highest_average(late.assign(method=late["method"].map(names))).holds is False
    assert (
        _highest_average(averages((math.nan,) * 2, (math.nan,) * 2)).holds is None
    )  # no data have all three


@pytest.mark.parametrize(
    ("holds", "end"), [(True, "holds here."), (False, "does not hold here."), (None, "no judging it here.")]
)
def test_a_verdict_says_what_it_is(holds, end):
    assert str(Verdict("A", "B", "C", holds)).endswith(end)


def test_statements_are_true_and_false_in_turn():
    first, second = statements_of(FACTS[:2])
    assert (first.text, first.target_new, first.target_true) == ("Lyon 0 worked for Apple.", "False", "True")
    assert (second.text, second.target_new) == ("The mother tongue of Edwin 1 is English.", "True")
    assert first.kind == "statement" and first.tags["of"] == "f0"


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("fig4", {}, "fig3"),
        ("table2", {"edits": None}, "needs edits: zsRE"),
        ("table2", {"counts": (13,)}, "facts has 12 edits"),
        ("table2", {"counts": (0, 2)}, "from 1 on"),
        ("fig6", {"counts": (11,)}, "there are 1 facts"),
    ],
)
def test_wrong_arguments_are_refused(name, options, text, tmp_path, seed):
    model, _ = ready(seed)
    options = {"edits": {"facts": FACTS}, "counts": (2,)} | options
    with pytest.raises(ConfigError, match=text):
        reproduce(name, model, tiny_tokenizer(), options.pop("edits"), out=tmp_path, **options)
    assert not any(tmp_path.iterdir())


def test_the_papers_sizes_are_the_defaults_and_all_names_are_verbs():
    assert tuple(PROTOCOLS) == PAPER
    assert PROTOCOLS["table2"].counts == (100, 500, 1000) and PROTOCOLS["table4"].counts == (10_000,)
    assert PROTOCOLS["table2"].methods == ("rome", "memit", "pmet", "grace", "d4s")
    assert all(protocol.small[-1] <= 200 for protocol in PROTOCOLS.values())
    with pytest.raises(SystemExit) as stopped:
        cli.main(["reproduce", "fig4", "embedded", "--out", "x"])
    assert stopped.value.code == 2


def test_the_verb_reproduces_on_any_model_and_data(monkeypatch, tmp_path, capsys, seed):
    model, covariance = ready(seed)
    monkeypatch.setattr("d4s.cli.reproduce.loaded_model", lambda options: (model, tiny_tokenizer()))
    save_edits(FACTS, tmp_path / "facts.jsonl")
    covariance.save(tmp_path / "c.safetensors")
    asked = f"reproduce table2 m --edits {tmp_path}/facts.jsonl --covariance {tmp_path}/c.safetensors --counts 1,2"
    assert cli.main([*asked.split(), "--methods", "d4s,ft-m", "--out", str(tmp_path / "out")]) == 0
    assert "The paper: D4S has the highest average" in capsys.readouterr().out
    table = pandas.read_csv(tmp_path / "out" / "table2-table.csv")
    assert list(table["edits"]) == [1, 2, 1, 2] and set(table["data"]) == {"facts"}
