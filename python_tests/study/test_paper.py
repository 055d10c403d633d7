"""The paper's tables and figures: protocols, what is written, and that each statement follows from its table."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pandas
import pytest
from support.sequences import failing, ready, same, state
from support.tiny import tiny_tokenizer

from d4s import cli, save_edits
from d4s.edits import Edit
from d4s.errors import ConfigError, EditingStopped
from d4s.methods import Editor, locate_then_edit
from d4s.methods.d4s import D4SEditor
from d4s.methods.memit import MEMITEditor
from d4s.methods.rome import ROME
from d4s.study.paper.protocols import PROTOCOLS
from d4s.study.paper.reproduce import reproduce, statements_of
from d4s.study.paper.setting import points

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

    def quickly(target):
        return dataclasses.replace(target, steps=2, learning_rate=2.0, clamp=20.0, weight_decay=0.0)

    spread, of_rome = locate_then_edit.spread_preset, ROME.preset.__func__

    def quick_spread(anatomy):
        fields = spread(anatomy)
        return fields | dict(target=quickly(fields["target"]), contexts=0, prior_weight=0.1)

    def quick_rome(cls, anatomy):
        plain = of_rome(cls, anatomy)
        return dataclasses.replace(plain, target=quickly(plain.target), contexts=0)

    monkeypatch.setattr(locate_then_edit, "spread_preset", quick_spread)
    monkeypatch.setattr(ROME, "preset", classmethod(quick_rome))


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
    for n in (1, 2, 4):
        said = [f"{name} {100 * average[name, n]:.1f} %" for name in ("d4s", "memit")]
        assert f"questions, {n} edits: {said[0]}, the best other {said[1]}" in found.verdict.measured
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
    for method in ("memit", "d4s"):
        assert f"{method} {points(-table.loc[method, 'change'])}" in found.verdict.measured
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
    assert set(asked) == {(("arc_challenge",), 7, "folder")} and len(asked) == 3  # once before, after each
    assert list(found.table["task"]) == ["arc_challenge acc_norm"] * 2
    assert list(found.table["before"]) == [1, 1]
    assert list(found.table["after"]) == [1 / 2, pytest.approx(1 / 3)]


def test_table4_judges_by_shares_alone(monkeypatch, tmp_path, seed):
    from d4s.measure.downstream import TaskMetric

    told = iter([0.5, 0.5, 0.25])

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
    for group, row in found.table.set_index("group").iterrows():
        assert f"{group} {points(row['retained_drop'])} ({row['lost']} lost" in found.verdict.measured


def test_fig3_compares_forms(tmp_path, seed):
    found = run("fig3", tmp_path, seed, methods=("d4s",), counts=(2,))
    assert list(found.table["group"]) == ["true_false", "multiple_choice", "directly_generated"]
    assert found.table["perplexity"].nunique() == 3
    assert figures(tmp_path, "fig3") and "perplexities true_false" in found.statement


@pytest.mark.parametrize(("name", "groups"), [("fig2", 2), ("fig3", 3), ("fig8", 1)])
def test_a_figure_that_was_interrupted_goes_on_where_it_was(name, groups, monkeypatch, tmp_path, seed):
    data = {"completions": FACTS, "statements": statements_of(FACTS)} if name == "fig2" else None
    whole = run(name, tmp_path / "whole", seed, data, methods=("ft-m",))
    made, plain = [], Editor.edit

    def edit(self, batch):
        made.append(batch)
        if len(made) == 3 + 4 * (groups - 1):  # in the last group's third edit
            raise KeyboardInterrupt
        return plain(self, batch)

    monkeypatch.setattr(Editor, "edit", edit)
    with pytest.raises(EditingStopped):
        run(name, tmp_path / "parts", seed, data, methods=("ft-m",))
    found = run(name, tmp_path / "parts", seed, data, methods=("ft-m",))
    assert len(made) == 4 * groups + 1  # nothing twice but the edit that was broken off
    drop = [column for column in found.table if "seconds" in column]
    pandas.testing.assert_frame_equal(found.table.drop(columns=drop), whole.table.drop(columns=drop))


def test_texts_and_how_many_facts_are_asked_can_be_given(tmp_path, seed):
    found = run("fig2", tmp_path / "all", seed, counts=(2,), methods=("ft-m",))
    text = ["The piano and the song of Lyon. " * 9]
    fewer = run("fig2", tmp_path / "fewer", seed, counts=(2,), methods=("ft-m",), facts=3, texts=text)
    assert "10 facts are asked" in found.statement and "3 facts are asked" in fewer.statement
    assert list(fewer.table["perplexity_rise"]) != list(found.table["perplexity_rise"])
    scores = run(
        "fig6", tmp_path / "fig6", seed, counts=(2,), methods=("ft-m",), texts=text, neighborhood_limit=0
    )
    assert {"retained", "text_perplexity"} <= set(scores.table)
    with pytest.raises(ConfigError, match="facts=1: two"):
        run("fig2", tmp_path / "one", seed, counts=(2,), facts=1)


def test_fig5_shows_the_bottleneck_and_the_norms(tmp_path, seed):
    found = run("fig5", tmp_path, seed, methods=("rome", "memit"), counts=(1, 10))
    assert figures(tmp_path, "fig5a", "fig5b")
    table = pandas.read_csv(tmp_path / "fig5-details" / "bottleneck.csv")
    first, last = (
        table[table["of the edits"] == f"{part} fifth"].set_index("method") for part in ("first", "last")
    )
    growth = found.table.groupby("method")["l1_growth"].last()
    for method in ("rome", "memit"):
        then, now = (part.loc[method, "last_probability"] for part in (first, last))
        assert f"{method}: p(target) {then:.3f}, then {now:.3f}" in found.verdict.measured
        assert f"mean |w| {100 * growth[method]:+.1f} %" in found.verdict.measured


def test_fig6_relates_norms_to_scores(tmp_path, seed):
    found = run("fig6", tmp_path, seed)
    assert figures(tmp_path, "fig6a", "fig6b", "fig6c")
    assert sorted(set(found.table["edits"])) == [0, 1, 2, 4]
    last = found.table[found.table["edits"] == 4].set_index("method")
    for method in ("memit", "d4s"):
        growth, kept = last.loc[method, ["l1_growth", "retained"]]
        said = f"{method}: mean |w| {100 * growth:+.1f} %, retained {100 * kept:.1f} % after 4 edits"
        assert said in found.verdict.measured


def test_fig7_compares_then_and_now(tmp_path, seed):
    found = run("fig7", tmp_path, seed)
    assert figures(tmp_path, "fig7", "fig7-memit", "fig7-d4s")
    lost = found.table[found.table["metric"] == "efficacy"].set_index("method")["forgotten"]
    said = ", ".join(f"{method} {points(lost[method])}" for method in ("memit", "d4s"))
    assert f"forgotten: {said}" in found.verdict.measured


def test_fig8_shows_metrics_against_edits(tmp_path, seed):
    found = run("fig8", tmp_path, seed)
    assert figures(tmp_path, "fig8")
    average = found.table.set_index(["method", "edits"])["average"]
    said = ", ".join(f"{m} {points(average[m, 1] - average[m, 4])}" for m in ("memit", "d4s"))
    assert f"lost on average: {said}" in found.verdict.measured


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


def test_fig5_with_one_target_a_fifth_is_not_judged(tmp_path, seed):
    found = run("fig5", tmp_path, seed, edits={"facts": FACTS[:4]}, methods=("memit",), counts=(2, 4))
    assert found.verdict.holds is None and "nan" in found.verdict.measured


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


def test_every_name_that_the_command_line_offers_is_reproduced(monkeypatch, tmp_path, capsys, seed):
    # How the figures look is another matter, and takes most of the time.
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, file, **_: Path(file).touch())
    with pytest.raises(SystemExit) as stopped:
        cli.main(["reproduce", "fig4", "embedded", "--out", "x"])
    assert stopped.value.code == 2
    refused = capsys.readouterr().err.partition("choose from")[2]
    offered = re.findall(r"(?:table|fig)\d", refused)
    assert {"table2", "fig8"} <= set(offered)
    for name in offered:
        out = tmp_path / name
        found = run(name, out, seed, {"facts": FACTS[:8]}, methods=("ft-m",), counts=(1,), tasks=())
        assert found.name == name and len(found.table) and list(out.glob(f"{name}*.png"))
        assert (out / f"{name}.md").read_text().startswith(f"# {name}: ")
    model, _ = ready(seed)
    with pytest.raises(ConfigError) as error:
        reproduce("table1", model, tiny_tokenizer(), {"facts": FACTS}, out=tmp_path / "none")
    assert re.findall(r"(?:table|fig)\d", str(error.value).partition("Known:")[2]) == sorted(offered)


def test_without_counts_and_methods_a_protocol_has_the_papers(tmp_path, seed):
    """Too few edits are refused with the count that was asked for."""
    model, _ = ready(seed)
    for name, most in (("table2", 1000), ("table3", 1000), ("table4", 10_000), ("fig8", 1000)):
        with pytest.raises(ConfigError, match=f"the counts go up to {most};"):
            reproduce(name, model, tiny_tokenizer(), {"facts": FACTS}, out=tmp_path)
    assert PROTOCOLS["table2"].counts == (100, 500, 1000)
    assert PROTOCOLS["table2"].methods == ("rome", "memit", "pmet", "grace", "d4s")
    assert all(protocol.small[-1] <= 200 for protocol in PROTOCOLS.values())


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
    (tmp_path / "text.txt").write_text("A heading\n" + "The piano and the song of Lyon. " * 9)
    asked = (
        asked.replace("table2", "table4") + f" --facts 5 --text {tmp_path}/text.txt"
    )  # without tasks: the facts
    assert cli.main([*asked.split(), "--methods", "ft-m", "--out", str(tmp_path / "four")]) == 0
    assert "5 facts are asked that no edit touches" in capsys.readouterr().out
    assert set(pandas.read_csv(tmp_path / "four" / "table4-table.csv")["task"]) == {
        "retained",
        "text_perplexity",
    }
