"""Why editing makes a model decline: by the data it is edited with, and by what changes inside it.

After the two halves of the D4S paper's investigation (arXiv 2410.23843, sections 3 and 4).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from d4s.edits import Edit
from d4s.edits.questions import AnswerPool, question_forms
from d4s.edits.spacing import Target, continuation
from d4s.errors import ConfigError
from d4s.figures.plots import plot_lines
from d4s.files import write_table, write_text
from d4s.locate.covariance import Covariance
from d4s.measure.metrics import RESAMPLES, finite_or_none
from d4s.models.scoring import perplexity, score
from d4s.sequence.compare import Configs, compare
from d4s.sequence.comparison import Comparison, aligned, few_layers
from d4s.sequence.curves import plot_forgetting, plot_metrics, plot_norms, plot_target_probability
from d4s.sequence.record import Record
from d4s.study.decline import estimate_remaining

if TYPE_CHECKING:
    from pandas import DataFrame

FORMS = ("true_false", "multiple_choice", "directly_generated")


def _askable(fact: Edit) -> bool:
    return fact.target_true is not None and fact.kind != "statement"


class Retained:
    """What the model must still know: facts that are not edited, as multiple choice, and plain text.

    facts: edits that are NOT made, with their target_true. Each is asked with up to three wrong answers of its
        relation; the likeliest by mean token NLL counts.
    texts: for the perplexity; None: the facts as sentences
    Calling it gives `retained`, the share of facts answered right, and `text_perplexity`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        facts: Sequence[Edit],
        texts: Sequence[str] | None = None,
        *,
        seed: int = 0,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        known = [fact for fact in facts if _askable(fact)]
        if not known:
            raise ConfigError(
                "no fact that could be asked for what the model retains: give edits with a target_true that are "
                "not to be made (facts=…), or a larger set of edits"
            )
        pool = AnswerPool(known)
        self.questions: list[tuple[str, tuple[Target, ...]]] = []
        for fact in known:
            wrong = pool.draw(fact, 3, random.Random(f"{seed}/{fact.id}"))
            right = fact.target_true or ""
            options = dict.fromkeys([right, fact.target_new, *wrong])
            self.questions.append((fact.text, tuple(map(fact.target, options))))
        self.texts = (
            list(texts)
            if texts is not None
            else [f"{text}{continuation(text, options[0])}." for text, options in self.questions]
        )

    @property
    def settings(self) -> dict[str, str]:
        """What tells one from another."""
        asked = json.dumps([self.questions, self.texts])
        return {"facts": hashlib.blake2b(asked.encode(), digest_size=16).hexdigest()}

    def __call__(self) -> dict[str, float]:
        return self.facts() | self._perplexity()

    def facts(self) -> dict[str, float]:
        """`retained` alone."""
        return _share_of(self._right())

    def by_fact(self) -> dict[str, float]:
        """What calling it gives, and `right.<number>`, 1 or 0, of each of the `questions`."""
        right = self._right()
        each = {f"right.{i}": float(one) for i, one in enumerate(right)}
        return _share_of(right) | self._perplexity() | each

    def _perplexity(self) -> dict[str, float]:
        return {"text_perplexity": perplexity(self.model, self.tokenizer, self.texts)}

    def _right(self) -> list[bool]:
        scores = score(self.model, self.tokenizer, self.questions)
        return [all(options[0].nll < other.nll for other in options[1:]) for options in scores]


def _share_of(right: Sequence[bool]) -> dict[str, float]:
    return {"retained": sum(right) / len(right)}


def hold_out(edits: Sequence[Edit], share: float = 0.3) -> tuple[list[Edit], list[Edit]]:
    """(edits to make, facts to leave alone): of the last `share` of the edits, those that no other one touches."""
    made = len(edits) - max(1, round(share * len(edits)))
    if made < 1:
        raise ConfigError(f"{len(edits)} edits are too few to leave some of them unedited; give two or more")
    return list(edits[:made]), untouched(edits[made:], edits[:made])


def untouched(facts: Iterable[Edit], made: Iterable[Edit]) -> list[Edit]:
    """Facts about subjects that no edit is about, each text once."""
    subjects = {edit.subject for edit in made}
    return list({fact.text: fact for fact in facts if fact.subject not in subjects}.values())


def target_surprise(model: Any, tokenizer: Any, edits: Sequence[Edit], seed: int = 0) -> dict[str, float]:
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
    model: Any,
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
    progress: bool = True,
) -> DataView:
    """Edits the model with the same facts in each form of question, and relates how surprising the form's targets
    are with what is lost elsewhere (arXiv 2410.23843, Fig. 2 and 3). The weights are put back.

    edits: facts, put in the `forms`; or name → edits, different data sets to be compared as they are
    facts: that are not edited but asked (`Retained`), with target_true; None: the last 30 % of the edits, or of
        the first group that knows the old answers, which are then not made, nor any other about their subjects
    texts: for the perplexity of text; None: the facts as sentences
    """
    import pandas

    if isinstance(edits, Mapping):
        groups = {name: list(group) for name, group in edits.items()}
        if facts is None:
            source = next((n for n, g in groups.items() if any(map(_askable, g))), next(iter(groups)))
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
            progress=progress,
        )
        for name, group in groups.items()
    }
    return DataView(pandas.DataFrame(rows), comparisons)


@dataclass(frozen=True)
class ModelView:
    """What changed inside the model, from what was measured; label → the sequence.

    bounds: metric → share whose crossing is estimated; None: 90 % of the first level
    """

    records: dict[str, Record]
    bounds: Mapping[str, float | None]
    seed: int = 0

    def bottleneck(self) -> DataFrame:
        """Label, first and last fifth of the edits: mean p(target) before and after its optimisation (Fig. 5a), and
        the standard error of the latter."""
        import pandas

        rows = []
        for label, record in self.records.items():
            table = pandas.DataFrame(record.edits_table)
            if "last_probability" not in table or table["last_probability"].isna().all():
                continue
            fifth = max(1, len(table) // 5)
            parts = {"first fifth": table.iloc[:fifth], "last fifth": table.iloc[-fifth:]}
            for part, edits in parts.items():
                means = edits[["first_probability", "last_probability"]].mean().to_dict()
                means["standard_error"] = float(edits["last_probability"].sem())  # NaN for a single edit
                rows.append({"method": label, "of the edits": part, "count": fifth} | means)
        return pandas.DataFrame(rows)

    def norms(self) -> DataFrame:
        """Long form: label, step, layer, mean |w|, its growth, ‖W − W0‖_F (Fig. 5b, c and 6a, b)."""
        import pandas

        rows = []
        for label, record in self.records.items():
            first = record.history[0]
            for row in record.history:
                for name in (n for n in row if n.startswith("l1_norm.")):
                    layer = name.removeprefix("l1_norm.")
                    rows.append(
                        {
                            "method": label,
                            "step": row["step"],
                            "layer": int(layer),
                            "mean_absolute": row[name],
                            "growth": None if row[name] is None else row[name] / first[name] - 1,
                            "delta_norm": row[f"delta_norm.{layer}"],
                        }
                    )
        return pandas.DataFrame(rows)

    def forgetting(self) -> DataFrame:
        """A row a label and metric at the last point: tested right after its step (original), now (current), and
        the difference (Fig. 7). The matrices are `Record.forgetting()`."""
        import pandas

        rows = []
        for label, record in self.records.items():
            last = record.history[-1]
            for metric in ("efficacy", "paraphrase"):
                original, current = last.get(f"original_{metric}"), last.get(metric)
                if original is not None and current is not None:
                    rows.append(
                        {
                            "method": label,
                            "edits": last["step"],
                            "metric": metric,
                            "original": original,
                            "current": current,
                            "forgotten": original - current,
                        }
                    )
        return pandas.DataFrame(rows)

    def correlations(self) -> DataFrame:
        """Of the norm's growth with each metric over evaluation points; negative: the larger, the lower.

        Both go with the number of edits, so that nearly everything correlates; `pearson_changes` is of their
        changes from point to point, where that is taken out.
        """
        import pandas

        rows = []
        for label, record in self.records.items():
            frame = record.to_frame()
            frame = frame[frame["step"] > 0]
            for metric in ("efficacy", "paraphrase", "specificity", "average", "retained"):
                if metric in frame:
                    pair = frame[["l1_growth", metric]].astype(float).dropna()
                    found = correlation(pair["l1_growth"], pair[metric])
                    changes = pair.diff().dropna()
                    found["pearson_changes"] = correlation(changes["l1_growth"], changes[metric])["pearson"]
                    rows.append({"method": label, "metric": metric} | found)
        return pandas.DataFrame(rows)

    def estimates(self) -> DataFrame:
        """`estimate_remaining` of every label and bounded metric that has enough points."""
        import pandas

        rows = []
        for label, record in self.records.items():
            for metric, bound in self.bounds.items():
                try:
                    found = estimate_remaining(record, metric, bound, seed=self.seed)
                except ConfigError:
                    continue
                rows.append({"method": label} | found)
        return pandas.DataFrame(rows)

    def tables(self) -> dict[str, DataFrame]:
        return {
            "bottleneck": self.bottleneck(),
            "remembered": self.forgetting(),
            "correlations": self.correlations(),
            "estimates": self.estimates(),
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON values of the tables; figures that are not finite are None."""
        return {name: finite_or_none(frame.to_dict("records")) for name, frame in self.tables().items()}

    def summary(self) -> str:
        titles = {
            "bottleneck": "p(target) before and after its optimisation:",
            "remembered": "Forgetting, right after the step and now:",
            "correlations": "Correlation of the growth of mean |w| with:",
            "estimates": "Edits until the bound (by the whole run; then by its first half, and how wrong):",
        }
        lines: list[str] = []
        for name, frame in self.tables().items():
            lines += [titles[name], *(frame_lines(frame) if len(frame) else ["  too few points"]), ""]
        return "\n".join(lines[:-1])

    def save(self, folder: str | os.PathLike[str]) -> None:
        """A CSV each of the tables, analysis.json, and the figures with their data:
        target_probability, norms, change, metrics, forgetting and forgetting-<method>, estimate."""
        import pandas

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tables = self.tables()
        for name, frame in tables.items():
            write_table(frame, folder / f"{name}.csv")
        write_text(json.dumps(self.to_dict(), indent=1), folder / "analysis.json")
        histories = {label: record.to_frame() for label, record in self.records.items()}
        plot_metrics(histories, folder / "metrics.png")
        plot_norms(few_layers(histories), folder / "norms.png")
        plot_change(histories, folder / "change.png")
        searched = {
            label: pandas.DataFrame(record.edits_table)
            for label, record in self.records.items()
            if any(row.get("last_probability") is not None for row in record.edits_table)
        }
        if searched:
            plot_target_probability(searched, folder / "target_probability.png")
        if len(tables["remembered"]):
            plot_original_and_current(histories, folder / "forgetting.png")
        for label, record in self.records.items():
            if any(row["step"] for row in record.history):
                plot_forgetting(record.forgetting(), folder / f"forgetting-{label.replace(os.sep, '-')}.png")


def plot_change(histories: Mapping[str, DataFrame], path: str | os.PathLike[str]) -> None:
    """‖W − W0‖_F over all edited layers against edits made."""
    import pandas

    parts = []
    for label, frame in histories.items():
        columns = [c for c in frame if str(c).startswith("delta_norm.") and str(c).count(".") == 1]
        size = (frame[columns].astype(float) ** 2).sum(axis=1, skipna=False) ** 0.5
        parts.append(
            pandas.DataFrame({"panel": "edited layers", "line": label, "x": frame["step"], "y": size})
        )
    plot_lines(pandas.concat(parts), path, x_label="edits made", y_label="‖W − W0‖ (Frobenius)")


def plot_original_and_current(histories: Mapping[str, DataFrame], path: str | os.PathLike[str]) -> None:
    """Efficacy tested right after each step and now, against edits made: a panel a method (Fig. 7)."""
    import pandas

    parts = []
    for label, frame in histories.items():
        frame = frame[frame["step"] > 0]
        for line, column in (("right after its step", "original_efficacy"), ("now", "efficacy")):
            if column in frame:
                values = {
                    "panel": label,
                    "line": line,
                    "x": frame["step"],
                    "y": 100 * frame[column].astype(float),
                }
                parts.append(pandas.DataFrame(values))
    plot_lines(pandas.concat(parts), path, x_label="edits made", y_label="efficacy (%)", y_range=(0, 100))


def analyze_model(
    results: Record | Comparison | Mapping[str, Record],
    *,
    bounds: Mapping[str, float | None] | None = None,
    seed: int = 0,
) -> ModelView:
    """The inside of a sequence, from what `edit_sequence` measured: no second run is needed.

    results: one sequence, several by name, or a comparison (its first seed)
    bounds: metric → the share under which it must not fall; None: efficacy and specificity, 90 % of the first level
    """
    if isinstance(results, Comparison):
        records = {label: next(iter(by_seed.values())) for label, by_seed in results.results.items()}
    elif isinstance(results, Record):
        records = {results.method: results}
    else:
        records = dict(results)
    records = {label: record for label, record in records.items() if len(record.history) > 1}
    if not records:
        raise ConfigError("no sequence with an evaluation after its first edit: there is nothing to analyze")
    return ModelView(records, {"efficacy": None, "specificity": None} | dict(bounds or {}), seed)


def correlation(x: Any, y: Any) -> dict[str, Any]:
    """Pearson's and Spearman's coefficients and n; NaN where one of the two does not vary or n < 3."""
    import pandas

    pair = pandas.DataFrame({"x": numpy.asarray(x, dtype=float), "y": numpy.asarray(y, dtype=float)})
    pair = pair[numpy.isfinite(pair).all(axis=1)]
    found: dict[str, Any] = {"pearson": math.nan, "spearman": math.nan, "n": len(pair)}
    if len(pair) > 2 and pair["x"].nunique() > 1 and pair["y"].nunique() > 1:
        found["pearson"] = float(pair["x"].corr(pair["y"]))
        # Spearman's is Pearson's of the ranks.
        ranks = pair.rank()
        found["spearman"] = float(ranks["x"].corr(ranks["y"]))
    return found


def mcnemar(lost: int, regained: int) -> float:
    """Exact two-sided p of McNemar's test: the chance of as uneven a split, were it heads or tails for each of the
    facts that changed sides. 1 where none did."""
    changed = lost + regained
    tail = sum(math.comb(changed, k) for k in range(max(lost, regained), changed + 1))
    return min(1.0, 2 * tail / 2**changed)


def _right_in_one(one: Any, other: Any) -> tuple[int, int]:
    """Facts answered right in the one history row only, and in the other only."""
    names = [name for name in one.index if str(name).startswith("right.")]
    first, second = one[names].astype(float) > 0.5, other[names].astype(float) > 0.5
    return int((first & ~second).sum()), int((second & ~first).sum())


def frame_lines(frame: DataFrame) -> list[str]:
    """A DataFrame as lines of text, without its empty columns; bounds of an interval behind their value."""
    columns = []
    for name in frame.columns:
        if str(name).endswith((".low", ".high")):
            continue
        cells = []
        for _, row in frame.iterrows():
            low, high = row.get(f"{name}.low"), row.get(f"{name}.high")
            text = spelled(row[name])
            cells.append(text if low is None or not text else f"{text} [{spelled(low)}, {spelled(high)}]")
        if any(cells):
            columns.append((str(name).replace("_", " "), cells))
    return aligned(columns)


def spelled(value: Any) -> str:
    """A cell: four significant digits, "never" for an infinite number of edits, nothing for what is missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, (float, numpy.floating)):
        return ("never" if value > 0 else "-inf") if math.isinf(value) else f"{value:.4g}"
    return str(value)
