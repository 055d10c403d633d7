"""Figures 2 and 3: what is lost elsewhere, by the data that the model is edited with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from d4s.edits import Edit
from d4s.measure.statistics import mcnemar
from d4s.study.data_view import DataView, analyze_data, plot_decline, plot_surprise
from d4s.study.paper.setting import Judged, Setting, Verdict, broken_off, points

if TYPE_CHECKING:
    from pandas import DataFrame

LEVEL = 0.05  # of tests
_TEST = "exact McNemar test of the same facts, 5 %"


def figure2(setting: Setting) -> Judged:
    """Decline by data set: unedited facts still answered right against edits made, a panel a method."""
    view = _analyzed(setting, {name: edits[: setting.most] for name, edits in setting.data.items()})
    plot_decline(view.history(), setting.file())
    return view.relation(), data_matter(view)


def figure3(setting: Setting) -> Judged:
    """Decline by form of question: unedited facts lost against the surprise of the form's targets."""
    view = _analyzed(setting, next(iter(setting.data.values()))[: setting.most])
    relation = view.relation()
    plot_surprise(relation, setting.file())
    return relation, surprise_harms(view)


def _analyzed(setting: Setting, edits: Sequence[Edit] | Mapping[str, Sequence[Edit]]) -> DataView:
    view = analyze_data(
        setting.model,
        setting.tokenizer,
        edits,
        setting.methods,
        facts=setting.facts,
        texts=setting.texts,
        covariance=setting.covariance,
        evaluate_every=setting.counts,
        seed=setting.seed,
        out=setting.details,
        progress=setting.progress,
    )
    view.save(setting.details)
    return view


def surprise_harms(view: DataView) -> Verdict:
    relation, groups = view.relation(), view.groups.set_index("group")["perplexity"]
    ordered = bool(groups["true_false"] < groups["multiple_choice"] < groups["directly_generated"])
    pooled = view.correlations().query("drop == 'retained_drop'").iloc[-1]
    largest = relation.loc[relation["retained_drop"].idxmax()]
    perplexities = ", ".join(f"{name} {value:.3g}" for name, value in groups.items())
    said = [
        f"perplexities {perplexities}",
        f"correlation {pooled['spearman']:.2f} over {int(pooled['n'])} runs",
        f"largest drop {_lost(largest)}",
        *_broken_groups(view),
    ]
    return Verdict(
        "the more surprising the form's target (true/false < multiple choice < directly generated), the more "
        "editing with it harms the model",
        "perplexities in that order, and Spearman's correlation of perplexity and drop, ranked within each method, "
        f"above 0.5; no judging where no run loses more facts than it regains ({_TEST})",
        "; ".join(said),
        ordered and bool(pooled["spearman"] > 0.5) if _fell(relation).any() else None,
    )


def data_matter(view: DataView) -> Verdict:
    relation, apart = view.relation(), view.differences()
    said = [
        f"{method}, lost: " + ", ".join(f"{row['group']} {_lost(row)}" for _, row in part.iterrows())
        for method, part in relation.groupby("method", sort=False)
    ]
    said += [
        f"{row.method}: {row.first_only} facts right with {row.first} only, {row.second_only} with {row.second} "
        f"only (p {row.mcnemar_p:.2g})"
        for row in apart.itertuples()
    ]
    known = int(relation["known"].max())
    judged = len(view.comparisons) > 1 and mcnemar(known, 0) <= LEVEL
    return Verdict(
        "editing lowers the downstream score, by how much depends on the data",
        "most of the runs lose more unedited facts than they regain, and with some method the data sets leave "
        f"different facts ({_TEST}, the latter by Bonferroni over methods and pairs); no judging by one data set, or "
        "by so few known facts that the loss of all would be no more than chance",
        "; ".join([*said, *_broken_groups(view)]),
        bool(_fell(relation).mean() > 0.5 and (apart["mcnemar_p"] <= LEVEL).any()) if judged else None,
    )


def _fell(relation: DataFrame) -> Any:
    return (relation["lost"] > relation["regained"]) & (relation["mcnemar_p"] <= LEVEL)


def _lost(row: Any) -> str:
    counts = f"{row['lost']} lost, {row['regained']} regained, p {row['mcnemar_p']:.2g}"
    return f"{points(row['retained_drop'])} ({counts})"


def _broken_groups(view: DataView) -> list[str]:
    return [
        f"{group}: {said}"
        for group, comparison in view.comparisons.items()
        for said in broken_off(comparison)[1]
    ]
