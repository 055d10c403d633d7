"""Figures 5 to 8: what changes inside the model, all from what one comparison measured, now or before."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d4s.measure.columns import is_share, spelled
from d4s.sequence.comparison import Comparison
from d4s.sequence.curves import few_layers, plot_forgetting, plot_metrics, plot_norms, plot_target_probability
from d4s.study.model_view import ModelView, analyze_model, plot_change, plot_original_and_current
from d4s.study.paper.setting import Judged, Setting, Verdict, broken_off, points
from d4s.study.paper.tables import SCORES, chosen_columns, plot_scores, score_names

if TYPE_CHECKING:
    from pandas import DataFrame


File = Callable[[str], Path]  # what a figure's name ends in, before .png → the picture's place


def figure5(setting: Setting) -> Judged:
    comparison, view = _analyzed(setting)
    return bottleneck_and_norms(comparison, view, setting.counts, setting.file)


def figure6(setting: Setting) -> Judged:
    comparison, view = _analyzed(setting, measure=setting.downstream())
    return norms_and_scores(comparison, view, setting.counts, setting.file)


def figure7(setting: Setting) -> Judged:
    comparison, view = _analyzed(setting, original=True)
    return forgetting(comparison, view, setting.counts, setting.file)


def figure8(setting: Setting) -> Judged:
    comparison, view = _analyzed(setting)
    return metrics_against_edits(comparison, view, setting.counts, setting.file)


def _analyzed(
    setting: Setting, *, measure: Any = None, original: bool = False
) -> tuple[Comparison, ModelView]:
    edits = next(iter(setting.data.values()))
    comparison = setting.compare(edits, measure=measure, original=original, neighborhood_limit=2)
    view = analyze_model(comparison, seed=setting.seed)
    view.save(setting.details)
    return comparison, view


def bottleneck_and_norms(
    comparison: Comparison, view: ModelView, counts: Sequence[int], file: File
) -> Judged:
    """The bottleneck, p(target) before and after its optimisation (a), and the norms of edited layers (b)."""
    if probabilities := comparison.target_probabilities():
        plot_target_probability(probabilities, file("a"))
    plot_norms(few_layers(comparison.histories()), file("b"))
    scored = [name for name in SCORES if name in comparison.table()]
    columns = ["method", "edits", "l1_growth", *scored, "collapsed"]
    return comparison.table(counts).reindex(columns=columns), targets_get_harder(comparison, view)


def norms_and_scores(comparison: Comparison, _view: ModelView, counts: Sequence[int], file: File) -> Judged:
    """Norms (a) and size of the change (b) of edited layers, and the downstream scores (c), where there are any."""
    histories, names = comparison.histories(), score_names(comparison)
    plot_norms(few_layers(histories), file("a"))
    plot_change(histories, file("b"))
    if names:
        plot_scores(histories, names, file("c"))
    columns = ["method", "edits", "l1_growth", *names, "collapsed"]
    return comparison.table((0, *counts)).reindex(columns=columns), norms_are_held(comparison, names)


def forgetting(comparison: Comparison, view: ModelView, _counts: Sequence[int], file: File) -> Judged:
    """Efficacy right after an edit's own step and now; per method, by when the edit was made."""
    plot_original_and_current(comparison.histories(), file(""))
    for method, record in view.records.items():
        plot_forgetting(record.forgetting(), file(f"-{method}"))
    table = view.forgetting()
    return table, edits_are_remembered(comparison, table)


def metrics_against_edits(
    comparison: Comparison, _view: ModelView, counts: Sequence[int], file: File
) -> Judged:
    """Efficacy, paraphrase and specificity against edits made."""
    plot_metrics(comparison.histories(), file(""))
    return chosen_columns(comparison.table(counts), ("method", "edits")), metrics_fall_least(comparison)


def targets_get_harder(comparison: Comparison, view: ModelView) -> Verdict:
    bottleneck = view.bottleneck()
    said, holds = [], []
    for method, history in comparison.histories().items():
        growth = float(history["l1_growth"].iloc[-1])
        if len(bottleneck) and (bottleneck["method"] == method).any():
            parts = bottleneck[bottleneck["method"] == method]
            first, last = parts["last_probability"]
            noise = 1.96 * math.hypot(*parts["standard_error"])
            if not math.isnan(noise):  # one target in a fifth has no error
                holds.append(bool(first - last > noise and growth > 0))
            said.append(
                f"{method}: p(target) {first:.3f}, then {last:.3f}, sampling error {noise:.3f}; mean |w| "
                f"{100 * growth:+.1f} %"
            )
    said += broken_off(comparison)[1]
    return Verdict(
        "as edits add up, target optimisation gets less far (the bottleneck) and the norms of edited layers grow",
        "for every method that searches a target, mean p(target) after its optimisation is lower in the last fifth "
        "of the edits than in the first, beyond 1.96 standard errors, and mean |w| has grown",
        "; ".join(said) or "no method searches a target",
        all(holds) if holds else None,
    )


def norms_are_held(comparison: Comparison, names: Sequence[str]) -> Verdict:
    """names: of the downstream scores, beside `l1_growth` in the histories."""
    last = _last_common(comparison)
    holds, said = broken_off(comparison)
    if "d4s" in last:
        for method, row in last.items():
            kept = ", ".join(f"{n} {spelled(n, row[n])}" for n in names)
            said.append(
                f"{method}: mean |w| {100 * row['l1_growth']:+.1f} %, {kept} after {int(row['step'])} edits"
            )
            if method != "d4s":
                holds.append(
                    bool(last["d4s"]["l1_growth"] < row["l1_growth"])
                    and all(last["d4s"][n] >= row[n] for n in names if is_share(n))
                )
    return Verdict(
        "D4S holds the norms of the edited layers down and with them the downstream score",
        "at the last point mean |w| has grown less with d4s than with any other method, and no share is lower",
        "; ".join(said) or "no run of d4s",
        all(holds) if holds else None,
    )


def edits_are_remembered(comparison: Comparison, table: DataFrame) -> Verdict:
    """table: `ModelView.forgetting` of the comparison."""
    lost = table[table["metric"] == "efficacy"].set_index("method")["forgotten"]
    others = lost.drop([m for m in ("d4s", *comparison.collapsed) if m in lost])
    holds, said = broken_off(comparison)
    if "d4s" in lost and len(comparison.results) > 1:
        holds.append(bool(lost["d4s"] <= 0.05 and (others > lost["d4s"]).all()))
    return Verdict(
        "with D4S edits are remembered: tested after all edits they fare as right after their own step, while with "
        "others they are forgotten",
        "efficacy right after the step minus efficacy now is at most 5 points with d4s, and larger with each other "
        "method",
        "forgotten: " + ", ".join([*(f"{method} {points(value)}" for method, value in lost.items()), *said]),
        all(holds) if holds else None,
    )


def metrics_fall_least(comparison: Comparison) -> Verdict:
    fall = {}
    histories, last = comparison.histories(), _last_common(comparison)
    for method, row in last.items():
        edited = histories[method].query("0 < step")
        if "average" in edited and row["step"] > edited["step"].iloc[0]:
            fall[method] = float(edited["average"].iloc[0] - row["average"])
    holds, said = broken_off(comparison)
    said = [f"{method} {points(value)}" for method, value in fall.items()] + said
    if "d4s" in fall:
        holds += [value > 0 and fall["d4s"] < value for method, value in fall.items() if method != "d4s"]
    return Verdict(
        "efficacy, paraphrase and specificity fall with the number of edits, and least with D4S",
        "from the first point to the last the average falls with every other method, and less with d4s",
        "lost on average: " + (", ".join(said) or "nothing to compare"),
        all(holds) if holds else None,
    )


def _last_common(comparison: Comparison) -> dict[str, Any]:
    """Method → its row at the last number of edits that all methods reached which did not break off."""
    histories = comparison.histories()
    whole = [set(f["step"]) for method, f in histories.items() if method not in comparison.collapsed]
    common = set.intersection(*whole) if whole else set()
    rows = {}
    for method, frame in histories.items():
        if method not in comparison.collapsed and common:
            rows[method] = frame[frame["step"] == max(common)].iloc[0]
    return rows
