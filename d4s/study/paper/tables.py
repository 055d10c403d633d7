"""Tables 2, 3 and 4: methods by efficacy, paraphrase and specificity, and what is left of downstream scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from d4s.figures.plots import plot_lines
from d4s.measure.columns import is_share
from d4s.sequence.comparison import Comparison
from d4s.sequence.curves import plot_metrics
from d4s.study.paper.setting import Judged, Setting, Verdict, broken_off, percent, points

if TYPE_CHECKING:
    from pandas import DataFrame

SCORES = ("efficacy", "paraphrase", "specificity", "average", "harmonic")


def table2_or_3(setting: Setting) -> Judged:
    """Tables 2 and 3: efficacy, paraphrase and specificity of each method after the counts, per data set."""
    import pandas

    tables, curves = [], []
    for label, edits in setting.data.items():
        one = (
            dataclasses.replace(setting, name=f"{setting.name}-{label}") if len(setting.data) > 1 else setting
        )
        # Questions are also answered freely: teacher forcing stops a model that would have gone on.
        questions = any(edit.kind == "question" for edit in edits)
        comparison = one.compare(edits, original=False, neighborhood_limit=None, generate=questions)
        table = comparison.table(setting.counts)
        table.insert(0, "data", label)
        tables.append(table)
        if len(setting.data) == 1:
            plot_metrics(comparison.histories(), setting.file())
        for method, history in comparison.histories().items():
            edited = history[history["step"] > 0]
            if "average" in edited:
                points = {"panel": label, "line": method, "x": edited["step"], "y": 100 * edited["average"]}
                curves.append(pandas.DataFrame(points))
    if len(setting.data) > 1 and curves:
        plot_lines(
            pandas.concat(curves),
            setting.file(),
            x_label="edits made",
            y_label="average (%)",
            y_range=(0, 100),
        )
    table = pandas.concat(tables, ignore_index=True)
    return chosen_columns(table, ("data", "method", "edits")), highest_average(table)


def chosen_columns(table: DataFrame, first: Sequence[str]) -> DataFrame:
    """The columns of the paper, and what the data also have."""
    also = ("multi_hop", "portability", "efficacy_argmax", "efficacy_generated", "paraphrase_generated")
    wanted = [n for n in (*SCORES, *also) if n in table]
    bounded = [c for n in wanted for c in (n, f"{n}.low", f"{n}.high") if c in table]
    # A table of methods that all broke off before the counts has no figures.
    return table.reindex(columns=[*first, *bounded, "l1_growth", "seconds_an_edit", "collapsed"])


def highest_average(table: DataFrame) -> Verdict:
    claim = "D4S has the highest average of efficacy, paraphrase and specificity"
    criterion = (
        "at every number of edits and on every data set that has all three no other method's average is higher; a "
        "method that broke off before is lower"
    )
    said, holds = [], []
    for (data, edits), part in table.groupby(["data", "edits"], sort=False):
        scored = part.set_index("method")["average"].dropna() if "average" in part else part.iloc[:0]
        others = scored.drop("d4s", errors="ignore")
        rows = part.set_index("method")
        ended = rows["collapsed"] != ""
        if "d4s" in rows.index and "d4s" not in scored and ended["d4s"]:
            holds.append(False)
            continue
        if "d4s" in scored and not len(others) and ended.drop("d4s").any():
            holds.append(True)
            said.append(f"{data}, {edits} edits: d4s {percent(scored['d4s'])}, no other got there")
        if "d4s" not in scored or not len(others):
            continue
        best = others.idxmax()
        holds.append(bool(scored["d4s"] >= others[best]))
        apart = rows["average.low"]["d4s"] > rows["average.high"][best]
        apart |= rows["average.high"]["d4s"] < rows["average.low"][best]
        said.append(
            f"{data}, {edits} edits: d4s {percent(scored['d4s'])}, the best other {best} {percent(others[best])}"
            + ("" if apart else " (intervals overlap)")
        )
    broken = table[table["collapsed"] != ""].drop_duplicates(["data", "method"])
    for row in broken.itertuples():
        said.append(f"{row.data}: {row.method} broke off ({row.collapsed})")
    return Verdict(
        claim, criterion, "; ".join(said) or "no average of d4s and another", all(holds) if holds else None
    )


def table4(setting: Setting) -> Judged:
    """Table 4: downstream scores before and after the last count."""
    import pandas

    edits = next(iter(setting.data.values()))
    measure = setting.downstream()
    comparison = setting.compare(edits, original=False, measure=measure, neighborhood_limit=2)
    rows, names = [], score_names(comparison)
    for method, history in comparison.histories().items():
        first, last = history.iloc[0], history.iloc[-1]
        for name in names:
            rows.append(
                {
                    "method": method,
                    "task": name,
                    "edits": int(last["step"]),
                    "before": first[name],
                    "after": last[name],
                    "change": last[name] - first[name],
                    "collapsed": comparison.collapsed.get(method, ""),
                }
            )
    plot_scores(comparison.histories(), names, setting.file())
    table = pandas.DataFrame(rows)
    return table, scores_stay(table, comparison)


def scores_stay(table: DataFrame, comparison: Comparison) -> Verdict:
    allowed = 0.02
    # A perplexity falls for the better, and has no points.
    judged = table[[is_share(task) for task in table["task"]]]
    own = judged[judged["method"] == "d4s"]
    worst = {m: part["change"].min() for m, part in judged.groupby("method", sort=False)}
    return Verdict(
        "with D4S the downstream scores after thousands of edits stay near the unedited model's",
        f"no share falls by more than {points(allowed)} with d4s, which does not break off",
        "largest fall: "
        + ", ".join([*(f"{m} {points(-change)}" for m, change in worst.items()), *broken_off(comparison)[1]]),
        bool((own["change"] >= -allowed - 1e-9).all() and "d4s" not in comparison.collapsed)
        if "d4s" in comparison.results and len(judged)
        else None,
    )


def score_names(comparison: Comparison) -> list[str]:
    """Names of what `Setting.downstream` measured."""
    records = [record for by_seed in comparison.results.values() for record in by_seed.values()]
    return next(record.measured for record in records if record.history)


def plot_scores(histories: Mapping[str, DataFrame], names: Sequence[str], path: Path) -> None:
    """In percent where all are shares; their panels have one axis."""
    import pandas

    shares = all(map(is_share, names))
    unit = 100 if shares else 1
    parts = [
        pandas.DataFrame({"panel": name, "line": method, "x": frame["step"], "y": unit * frame[name]})
        for name in names
        for method, frame in histories.items()
    ]
    plot_lines(
        pandas.concat(parts),
        path,
        x_label="edits made",
        y_label="score (%)" if shares else "score",
        y_range=(0, 100) if shares else None,
    )
