"""What data do to a model: it is edited with each, and asked what it still knows of all else.

After the first half of the D4S paper's investigation (arXiv 2410.23843, section 3).
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from d4s.edits import Edit
from d4s.edits.questions import AnswerPool, question_forms
from d4s.errors import ConfigError
from d4s.figures.plots import plot_lines
from d4s.figures.tables import frame_lines
from d4s.files import finite_or_none, write_table
from d4s.locate.covariance import Covariance
from d4s.measure.statistics import RESAMPLES, correlation, mcnemar
from d4s.models.causal_lm import CausalLM
from d4s.models.scoring import score
from d4s.sequence.compare import Configs, compare
from d4s.sequence.comparison import Comparison, file_name
from d4s.study.retained import Retained, hold_out, is_askable

if TYPE_CHECKING:
    from pandas import DataFrame

FORMS = ("true_false", "multiple_choice", "directly_generated")


def target_surprise(
    model: CausalLM, tokenizer: Any, edits: Sequence[Edit], seed: int = 0
) -> dict[str, float]:
    """How surprising the edits' targets are to the model as it is.

    perplexity: exp of the mean over edits of the target's mean token NLL, with its bootstrap interval
    (perplexity.low, .high); perplexity_mean: the mean of the edits' own perplexities, which the few most
    surprising targets decide.
    """
    found = score(model, tokenizer, [(edit.text, (edit.target(edit.target_new),)) for edit in edits])
    nll = numpy.array([scores[0].nll for scores in found])
    draws = numpy.random.default_rng(seed).integers(len(nll), size=(RESAMPLES, len(nll)))
    low, high = numpy.percentile(nll[draws].mean(1), [2.5, 97.5])
    return {
        "perplexity": float(numpy.exp(nll.mean())),
        "perplexity.low": float(numpy.exp(low)),
        "perplexity.high": float(numpy.exp(high)),
        "perplexity_mean": float(numpy.exp(nll).mean()),
    }


def forms_of(edits: Sequence[Edit], forms: Sequence[str] = FORMS, seed: int = 0) -> dict[str, list[Edit]]:
    """The same facts in each form of question (`d4s.question_forms`), wrong choices drawn from all of them."""
    for form in forms:
        if form not in FORMS:
            raise ConfigError(f"unknown form {form!r}; known: {', '.join(FORMS)}")
    pool = AnswerPool(edits)
    asked = [question_forms(edit, pool=pool, seed=seed) for edit in edits]
    return {form: [getattr(one, form) for one in asked] for form in forms}


@dataclass(frozen=True)
class DataView:
    """The same model edited with different data.

    groups: a row a group of edits: edits, perplexity of their targets before editing (low, high, mean)
    comparisons: group → what each method did with it
    """

    groups: DataFrame
    comparisons: dict[str, Comparison]

    def history(self) -> DataFrame:
        """Long form: group, method, step, retained, text_perplexity, efficacy, l1_growth."""
        import pandas

        names = ["step", "retained", "text_perplexity", "efficacy", "l1_growth"]
        parts = []
        for group, comparison in self.comparisons.items():
            for method, frame in comparison.histories().items():
                part = frame[[n for n in names if n in frame]].copy()
                part.insert(0, "method", method)
                part.insert(0, "group", group)
                parts.append(part)
        return pandas.concat(parts, ignore_index=True)

    def relation(self) -> DataFrame:
        """A row a method and group: the targets' perplexity beside what editing did.

        retained_drop: share of facts that were not edited and are no longer answered right, at the last point
        known: facts right before editing; lost, regained: those right before and not at the last point, and the
            reverse; mcnemar_p: `mcnemar` of them
        perplexity_rise: log of the text's perplexity, last over first
        """
        import pandas

        perplexities = self.groups.set_index("group")["perplexity"]
        rows = []
        for group, comparison in self.comparisons.items():
            for method, frame in comparison.histories().items():
                first, last = frame.iloc[0], frame.iloc[-1]
                lost, regained = _right_in_one(first, last)
                rows.append(
                    {
                        "method": method,
                        "group": group,
                        "edits": int(last["step"]),
                        "perplexity": float(perplexities[group]),
                        "retained_drop": first["retained"] - last["retained"],
                        "known": int(sum(first.filter(like="right.") > 0.5)),
                        "lost": lost,
                        "regained": regained,
                        "mcnemar_p": mcnemar(lost, regained),
                        "perplexity_rise": math.log(last["text_perplexity"])
                        - math.log(first["text_perplexity"]),
                        "efficacy": last["efficacy"],
                        "l1_growth": last["l1_growth"],
                        "collapsed": comparison.collapsed.get(method, ""),
                    }
                )
        return pandas.DataFrame(rows)

    def differences(self) -> DataFrame:
        """A row a method and pair of groups, at the last point that both reached.

        first_only, second_only: facts right after the edits of the one group and not of the other; mcnemar_p of
        them, times the number of rows (Bonferroni)
        """
        import pandas

        histories = {g: comparison.histories() for g, comparison in self.comparisons.items()}
        rows = []
        for first, second in itertools.combinations(histories, 2):
            for method in (m for m in histories[first] if m in histories[second]):
                one, other = (histories[group][method].set_index("step") for group in (first, second))
                step = max(set(one.index) & set(other.index))
                counts = _right_in_one(one.loc[step], other.loc[step])
                rows.append(
                    {"method": method, "first": first, "second": second, "edits": int(step)}
                    | dict(zip(("first_only", "second_only"), counts, strict=True))
                    | {"mcnemar_p": mcnemar(*counts)}
                )
        table = pandas.DataFrame(rows, columns=None if rows else ["method", "first", "second", "mcnemar_p"])
        return table.assign(mcnemar_p=(table["mcnemar_p"] * len(table)).clip(upper=1.0))

    def correlations(self) -> DataFrame:
        """Of log perplexity of the targets with the two drops over groups, a method each and all together.

        Together the drops are ranked within their method first: methods differ in how much harm they do.
        """
        import pandas

        relation = self.relation()
        rows = []
        for method, part in relation.groupby("method", sort=False):
            for drop in ("retained_drop", "perplexity_rise"):
                rows.append(
                    {"method": method, "drop": drop} | correlation(numpy.log(part["perplexity"]), part[drop])
                )
        if relation["method"].nunique() > 1:
            ranked = relation.groupby("method")[["perplexity", "retained_drop", "perplexity_rise"]].rank()
            for drop in ("retained_drop", "perplexity_rise"):
                found = correlation(ranked["perplexity"], ranked[drop])
                rows.append({"method": "all, ranked within a method", "drop": drop} | found)
        return pandas.DataFrame(rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON values of the tables; figures that are not finite are None."""
        tables = {"groups": self.groups, "relation": self.relation(), "correlations": self.correlations()}
        return {name: finite_or_none(frame.to_dict("records")) for name, frame in tables.items()}

    def summary(self) -> str:
        return "\n".join(
            [
                "Perplexity of the targets before editing:",
                *frame_lines(self.groups),
                "",
                "What editing with them did:",
                *frame_lines(self.relation()),
                "",
                "Correlation of log perplexity with the drop, over groups:",
                *frame_lines(self.correlations()),
            ]
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """groups.csv, relation.csv, correlations.csv; decline.png (Fig. 2) and perplexity.png (Fig. 3) with data."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        relation = self.relation()
        for name, frame in (
            ("groups", self.groups),
            ("relation", relation),
            ("correlations", self.correlations()),
        ):
            write_table(frame, folder / f"{name}.csv")
        plot_decline(self.history(), folder / "decline.png")
        plot_surprise(relation, folder / "perplexity.png")


def _right_in_one(one: Any, other: Any) -> tuple[int, int]:
    """Facts answered right in the one history row only, and in the other only."""
    names = [name for name in one.index if str(name).startswith("right.")]
    first, second = one[names].astype(float) > 0.5, other[names].astype(float) > 0.5
    return int((first & ~second).sum()), int((second & ~first).sum())


def plot_surprise(relation: DataFrame, path: str | os.PathLike[str]) -> None:
    """Unedited facts lost against the perplexity of the edits' targets: a line a method, a point a group (Fig. 3)."""
    data = relation.sort_values("perplexity").rename(columns={"method": "line", "perplexity": "x"})
    data = data.assign(panel="facts that were not edited", y=100 * data["retained_drop"])
    plot_lines(
        data[["panel", "line", "x", "y", "group"]],
        path,
        x_label="perplexity of the targets before editing",
        y_label="no longer answered right (%)",
        y_range=(min(0.0, data["y"].min()), max(10.0, 1.5 * data["y"].max())),  # room for the names
        x_log=True,  # correlated are ranks, and perplexities are decades apart
    )


def plot_decline(history: DataFrame, path: str | os.PathLike[str]) -> None:
    """Facts that were not edited and are answered right, against edits made: a panel a method, a line a group."""
    data = history.rename(columns={"method": "panel", "group": "line", "step": "x"})
    data = data.assign(y=100 * data["retained"])
    plot_lines(
        data[["panel", "line", "x", "y"]],
        path,
        x_label="edits made",
        y_label="unedited facts answered right (%)",
        y_range=(0, 100),
    )


def analyze_data(
    model: CausalLM,
    tokenizer: Any,
    edits: Sequence[Edit] | Mapping[str, Sequence[Edit]],
    methods: Configs = ("rome", "memit"),
    *,
    forms: Sequence[str] = FORMS,
    facts: Sequence[Edit] | None = None,
    texts: Sequence[str] | None = None,
    covariance: Covariance | None = None,
    batch_size: int = 1,
    evaluate_every: int | Collection[int] | None = None,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> DataView:
    """Edits the model with the same facts in each form of question, and relates how surprising the form's targets
    are with what is lost elsewhere (arXiv 2410.23843, Fig. 2 and 3). The weights are put back.

    edits: facts, put in the `forms`; or name → edits, different data sets to be compared as they are
    facts: that are not edited but asked (`Retained`), with target_true; None: the last 30 % of the edits, or of
        the first group that knows the old answers, which are then not made, nor any other about their subjects
    texts: for the perplexity of text; None: the facts as sentences
    out: folder in which the sequences of each group are kept in one of its own (`compare`), and go on after an
        interruption; None: nowhere
    """
    import pandas

    if isinstance(edits, Mapping):
        groups = {name: list(group) for name, group in edits.items()}
        if facts is None:
            source = next((n for n, g in groups.items() if any(map(is_askable, g))), next(iter(groups)))
            groups[source], facts = hold_out(groups[source])
            asked = {fact.subject for fact in facts}
            groups = {name: [e for e in group if e.subject not in asked] for name, group in groups.items()}
        # As many edits of each: otherwise the longest data set would look the most harmful.
        shortest = min(map(len, groups.values()))
        groups = {name: group[:shortest] for name, group in groups.items()}
    else:
        made = list(edits)
        if facts is None:
            made, facts = hold_out(made)
        groups = forms_of(made, forms, seed)
    retained = Retained(model, tokenizer, facts, texts, seed=seed)
    rows = []
    for name, group in groups.items():
        rows.append({"group": name, "edits": len(group)} | target_surprise(model, tokenizer, group, seed))
    comparisons = {
        name: compare(
            model,
            tokenizer,
            group,
            methods,
            covariance=covariance,
            batch_size=batch_size,
            evaluate_every=evaluate_every,
            seeds=seed,
            neighborhood_limit=0,
            original=False,
            measure=retained.by_fact,
            out=None if out is None else Path(out) / file_name(name),
            progress=progress,
        )
        for name, group in groups.items()
    }
    return DataView(pandas.DataFrame(rows), comparisons)
