"""The D4S paper's tables and figures (arXiv 2410.23843) on any model: one function, one protocol a name.

Each gives a table, a figure with its data, and a paragraph that says by a stated criterion whether the paper's
claim holds on this model. The paper's sizes are the defaults; the embedded model has small ones of its own.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from d4s.edits import Edit
from d4s.edits.spacing import continuation
from d4s.errors import ConfigError, unknown_name
from d4s.figures.plots import plot_forgetting, plot_lines, plot_metrics, plot_norms, plot_target_probability
from d4s.files import write_table, write_text
from d4s.locate.covariance import Covariance
from d4s.measure.downstream import TaskScores
from d4s.measure.metrics import finite_or_none, is_share, spelled
from d4s.methods.published import model_key
from d4s.models.architectures import Anatomy
from d4s.sequence.compare import compare
from d4s.sequence.comparison import Comparison, few_layers
from d4s.study.analysis import (
    DataView,
    ModelView,
    Retained,
    analyze_data,
    analyze_model,
    frame_lines,
    mcnemar,
    plot_change,
    plot_decline,
    plot_original_and_current,
    plot_surprise,
    untouched,
)

if TYPE_CHECKING:
    from pandas import DataFrame

THREE = ("efficacy", "paraphrase", "specificity", "average", "harmonic")
TASKS = ("arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2", "winogrande", "gsm8k")
MOST_FACTS = 200  # asked for what a model retains
LEVEL = 0.05  # of tests
_TEST = "exact McNemar test of the same facts, 5 %"


@dataclass(frozen=True)
class Verdict:
    """Whether a claim of the paper holds here. holds: None where there is nothing to judge by."""

    claim: str
    criterion: str
    measured: str
    holds: bool | None

    def __str__(self) -> str:
        if self.holds is None:
            end = "there is no judging it here"
        else:
            end = f"the claim {'holds' if self.holds else 'does not hold'} here"
        return f"The paper: {self.claim}. Criterion: {self.criterion}. Measured: {self.measured}; {end}."


@dataclass(frozen=True)
class Reproduction:
    """One table or figure of the paper.

    table: its figures; verdict: of the paper's claim; setting: model, data and sizes in words
    """

    name: str
    table: DataFrame
    verdict: Verdict
    setting: str

    @property
    def statement(self) -> str:
        return f"{self.verdict} {self.setting}"

    def summary(self) -> str:
        return "\n".join([*frame_lines(self.table), "", self.statement])

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        rows = finite_or_none(self.table.to_dict("records"))
        return {"name": self.name, "rows": rows, "holds": self.verdict.holds, "statement": self.statement}


@dataclass(frozen=True)
class Setting:
    """What a protocol runs on. data: name → edits, as many as the largest count or more; `facts` are not edited."""

    name: str
    model: Any
    tokenizer: Any
    data: dict[str, list[Edit]]
    facts: list[Edit]
    counts: tuple[int, ...]
    methods: tuple[str, ...]
    covariance: Covariance | None
    tasks: tuple[str, ...]
    task_folder: str | os.PathLike[str] | None
    task_limit: int | None
    trust_task_code: bool
    seed: int
    progress: bool
    out: Path

    @property
    def most(self) -> int:
        return self.counts[-1]

    def file(self, suffix: str = "") -> Path:
        return self.out / f"{self.name}{suffix}.png"

    def compare(self, edits: Sequence[Edit], **options: Any) -> Comparison:
        """One edit a step, scored at the counts; the details are saved beside the figure."""
        details = self.out / f"{self.name}-details"
        found = compare(
            self.model,
            self.tokenizer,
            edits[: self.most],
            # The paper's own rule of the residual; d4s measures it again by itself.
            {name: {"residual": "once"} if name == "d4s" else {} for name in self.methods},
            covariance=self.covariance,
            evaluate_every=self.counts,
            seeds=self.seed,
            progress=self.progress,
            out=details,
            **options,
        )
        found.save(details)
        return found

    def downstream(self) -> Callable[[], dict[str, float]]:
        """Scores of the model as it is: of the harness's tasks where they are named, else of facts not edited."""
        if not self.tasks:
            return Retained(self.model, self.tokenizer, self.facts, seed=self.seed).facts
        return TaskScores(
            self.model,
            self.tokenizer,
            self.tasks,
            limit=self.task_limit,
            include_path=self.task_folder,
            seed=self.seed,
            **({"trust_task_code": True} if self.trust_task_code else {}),
        )


Outcome = tuple["DataFrame", Verdict]


def _metrics_tables(setting: Setting) -> Outcome:
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
    return _chosen(table, ("data", "method", "edits")), _highest_average(table)


def _chosen(table: DataFrame, first: Sequence[str]) -> DataFrame:
    """The columns of the paper, and what the data also have."""
    also = ("multi_hop", "portability", "efficacy_argmax", "efficacy_generated", "paraphrase_generated")
    wanted = [n for n in (*THREE, *also) if n in table]
    bounded = [c for n in wanted for c in (n, f"{n}.low", f"{n}.high") if c in table]
    # A table of methods that all broke off before the counts has no figures.
    return table.reindex(columns=[*first, *bounded, "l1_growth", "seconds_an_edit", "collapsed"])


def _highest_average(table: DataFrame) -> Verdict:
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
            said.append(f"{data}, {edits} edits: d4s {_percent(scored['d4s'])}, no other got there")
        if "d4s" not in scored or not len(others):
            continue
        best = others.idxmax()
        holds.append(bool(scored["d4s"] >= others[best]))
        apart = rows["average.low"]["d4s"] > rows["average.high"][best]
        apart |= rows["average.high"]["d4s"] < rows["average.low"][best]
        said.append(
            f"{data}, {edits} edits: d4s {_percent(scored['d4s'])}, the best other {best} {_percent(others[best])}"
            + ("" if apart else " (intervals overlap)")
        )
    broken = table[table["collapsed"] != ""].drop_duplicates(["data", "method"])
    for row in broken.itertuples():
        said.append(f"{row.data}: {row.method} broke off ({row.collapsed})")
    return Verdict(
        claim, criterion, "; ".join(said) or "no average of d4s and another", all(holds) if holds else None
    )


def _downstream_table(setting: Setting) -> Outcome:
    """Table 4: downstream scores before and after the last count."""
    import pandas

    edits = next(iter(setting.data.values()))
    measure = setting.downstream()
    comparison = setting.compare(edits, original=False, measure=measure, neighborhood_limit=2)
    rows, names = [], _scores(comparison)
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
    _plot_scores(comparison.histories(), names, setting.file())
    table = pandas.DataFrame(rows)
    allowed = 0.02
    # A perplexity falls for the better, and has no points.
    judged = table[[is_share(task) for task in table["task"]]]
    own = judged[judged["method"] == "d4s"]
    worst = {m: part["change"].min() for m, part in judged.groupby("method", sort=False)}
    verdict = Verdict(
        "with D4S the downstream scores after thousands of edits stay near the unedited model's",
        f"no share falls by more than {_points(allowed)} with d4s, which does not break off",
        "largest fall: "
        + ", ".join([*(f"{m} {_points(-change)}" for m, change in worst.items()), *_broken(comparison)[1]]),
        bool((own["change"] >= -allowed - 1e-9).all() and "d4s" not in comparison.collapsed)
        if "d4s" in comparison.results and len(judged)
        else None,
    )
    return table, verdict


def _data_figures(setting: Setting) -> Outcome:
    """Fig. 2 and 3: what is lost elsewhere, by the data that the model is edited with."""
    forms = setting.name == "fig3"
    data: Any = {name: edits[: setting.most] for name, edits in setting.data.items()}
    view = analyze_data(
        setting.model,
        setting.tokenizer,
        next(iter(data.values())) if forms else data,
        setting.methods,
        facts=setting.facts,
        covariance=setting.covariance,
        evaluate_every=setting.counts,
        seed=setting.seed,
        progress=setting.progress,
    )
    view.save(setting.out / f"{setting.name}-details")
    relation = view.relation()
    if forms:
        plot_surprise(relation, setting.file())
        return relation, _surprise_harms(view)
    plot_decline(view.history(), setting.file())
    return relation, _data_matter(view)


def _surprise_harms(view: DataView) -> Verdict:
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


def _data_matter(view: DataView) -> Verdict:
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
    return f"{_points(row['retained_drop'])} ({counts})"


def _broken_groups(view: DataView) -> list[str]:
    return [
        f"{group}: {said}"
        for group, comparison in view.comparisons.items()
        for said in _broken(comparison)[1]
    ]


def _model_figures(setting: Setting) -> Outcome:
    """Fig. 5 to 8, all from what one comparison measured."""
    edits = next(iter(setting.data.values()))
    measure = setting.downstream() if setting.name == "fig6" else None
    comparison = setting.compare(
        edits, measure=measure, original=setting.name == "fig7", neighborhood_limit=2
    )
    view = analyze_model(comparison, seed=setting.seed)
    view.save(setting.out / f"{setting.name}-details")
    return {"fig5": _inside, "fig6": _norms, "fig7": _forgetting, "fig8": _curves}[setting.name](
        setting, comparison, view
    )


def _inside(setting: Setting, comparison: Comparison, view: ModelView) -> Outcome:
    if probabilities := comparison.target_probabilities():
        plot_target_probability(probabilities, setting.file("a"))
    plot_norms(few_layers(comparison.histories()), setting.file("b"))
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
    said += _broken(comparison)[1]
    verdict = Verdict(
        "as edits add up, target optimisation gets less far (the bottleneck) and the norms of edited layers grow",
        "for every method that searches a target, mean p(target) after its optimisation is lower in the last fifth "
        "of the edits than in the first, beyond 1.96 standard errors, and mean |w| has grown",
        "; ".join(said) or "no method searches a target",
        all(holds) if holds else None,
    )
    columns = ["method", "edits", "l1_growth", *_present(comparison, THREE), "collapsed"]
    return comparison.table(setting.counts).reindex(columns=columns), verdict


def _norms(setting: Setting, comparison: Comparison, view: ModelView) -> Outcome:
    histories = comparison.histories()
    plot_norms(few_layers(histories), setting.file("a"))
    plot_change(histories, setting.file("b"))
    names = _scores(comparison)
    _plot_scores(histories, names, setting.file("c"))
    columns = ["method", "edits", "l1_growth", *names, "collapsed"]
    table = comparison.table((0, *setting.counts)).reindex(columns=columns)
    last = _last_common(histories, comparison)
    holds, said = _broken(comparison)
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
    verdict = Verdict(
        "D4S holds the norms of the edited layers down and with them the downstream score",
        "at the last point mean |w| has grown less with d4s than with any other method, and no share is lower",
        "; ".join(said) or "no run of d4s",
        all(holds) if holds else None,
    )
    return table, verdict


def _last_common(histories: Mapping[str, DataFrame], comparison: Comparison) -> dict[str, Any]:
    """Method → its row at the last number of edits that all methods reached which did not break off."""
    whole = [set(f["step"]) for method, f in histories.items() if method not in comparison.collapsed]
    common = set.intersection(*whole) if whole else set()
    rows = {}
    for method, frame in histories.items():
        if method not in comparison.collapsed and common:
            rows[method] = frame[frame["step"] == max(common)].iloc[0]
    return rows


def _broken(comparison: Comparison) -> tuple[list[bool], list[str]]:
    """What methods that broke off mean for D4S: it must not, and is better than those that do.

    Without a run of d4s nothing follows.
    """
    holds, said = [], []
    for method, why in comparison.collapsed.items():
        if "d4s" in comparison.results:
            holds.append(method != "d4s")
        said.append(f"{method} broke off ({why})")
    return holds, said


def _scores(comparison: Comparison) -> list[str]:
    """Names of what `Setting.downstream` measured."""
    records = [record for by_seed in comparison.results.values() for record in by_seed.values()]
    return next(record.measured for record in records if record.history)


def _plot_scores(histories: Mapping[str, DataFrame], names: Sequence[str], path: Path) -> None:
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


def _forgetting(setting: Setting, comparison: Comparison, view: ModelView) -> Outcome:
    plot_original_and_current(comparison.histories(), setting.file())
    for method, record in view.records.items():
        plot_forgetting(record.forgetting(), setting.file(f"-{method}"))
    table = view.forgetting()
    lost = table[table["metric"] == "efficacy"].set_index("method")["forgotten"]
    others = lost.drop([m for m in ("d4s", *comparison.collapsed) if m in lost])
    holds, said = _broken(comparison)
    if "d4s" in lost and len(comparison.results) > 1:
        holds.append(bool(lost["d4s"] <= 0.05 and (others > lost["d4s"]).all()))
    verdict = Verdict(
        "with D4S edits are remembered: tested after all edits they fare as right after their own step, while with "
        "others they are forgotten",
        "efficacy right after the step minus efficacy now is at most 5 points with d4s, and larger with each other "
        "method",
        "forgotten: " + ", ".join([*(f"{method} {_points(value)}" for method, value in lost.items()), *said]),
        all(holds) if holds else None,
    )
    return table, verdict


def _curves(setting: Setting, comparison: Comparison, view: ModelView) -> Outcome:
    histories = comparison.histories()
    plot_metrics(histories, setting.file())
    table = comparison.table(setting.counts)
    table.insert(0, "data", next(iter(setting.data)))
    fall = {}
    last = _last_common(histories, comparison)
    for method, row in last.items():
        edited = histories[method].query("0 < step")
        if "average" in edited and row["step"] > edited["step"].iloc[0]:
            fall[method] = float(edited["average"].iloc[0] - row["average"])
    holds, said = _broken(comparison)
    said = [f"{method} {_points(value)}" for method, value in fall.items()] + said
    if "d4s" in fall:
        holds += [value > 0 and fall["d4s"] < value for method, value in fall.items() if method != "d4s"]
    verdict = Verdict(
        "efficacy, paraphrase and specificity fall with the number of edits, and least with D4S",
        "from the first point to the last the average falls with every other method, and less with d4s",
        "lost on average: " + (", ".join(said) or "nothing to compare"),
        all(holds) if holds else None,
    )
    return _chosen(table, ("method", "edits")), verdict


def _present(comparison: Comparison, names: Sequence[str]) -> list[str]:
    columns = set(comparison.table().columns)
    return [name for name in names if name in columns]


@dataclass(frozen=True)
class Protocol:
    """How the paper made a table or figure.

    data: what EDITS should hold; methods: the paper's; counts: edits at which is scored, the paper's where its
    text says them, up to 1,000 otherwise; small: the same for the embedded model
    """

    about: str
    data: str
    run: Callable[[Setting], Outcome]
    methods: tuple[str, ...]
    counts: tuple[int, ...]
    small: tuple[int, ...]
    retained: bool = False  # needs facts that are not edited
    tasks: tuple[str, ...] = ()


_TENTHS = tuple(range(100, 1001, 100))


def _of_the_inside(
    about: str,
    methods: tuple[str, ...] = ("memit", "d4s"),
    small: Iterable[int] = range(25, 151, 25),
    retained: bool = False,
) -> Protocol:
    return Protocol(about, "zsRE or CounterFact", _model_figures, methods, _TENTHS, tuple(small), retained)


PROTOCOLS: dict[str, Protocol] = {
    "table2": Protocol(
        "methods on zsRE",
        "zsRE",
        _metrics_tables,
        ("rome", "memit", "pmet", "grace", "d4s"),
        (100, 500, 1000),
        (10, 25, 50),
    ),
    "table3": Protocol(
        "methods on CounterFact and MQuAKE",
        "CounterFact and MQuAKE",
        _metrics_tables,
        ("ft-l", "rome", "memit", "grace", "d4s"),
        (1000,),
        (50,),
    ),
    "table4": Protocol(
        "downstream scores before and after",
        "zsRE",
        _downstream_table,
        ("memit", "d4s"),
        (10_000,),
        (100,),
        retained=True,
        tasks=TASKS,
    ),
    "fig2": Protocol(
        "decline by data set",
        "zsRE, ELKEN, 20Q and a commonsense set (PEP3k)",
        _data_figures,
        ("kn", "rome", "memit"),
        _TENTHS,
        (5, 10),
        retained=True,
    ),
    "fig3": Protocol(
        "decline by form of question",
        "facts with known old answers",
        _data_figures,
        ("rome", "memit"),
        _TENTHS,
        (10, 20, 30),
        retained=True,
    ),
    "fig5": _of_the_inside("bottleneck and norms", ("rome", "memit"), range(10, 61, 10)),
    "fig6": _of_the_inside("norms and downstream scores with D4S", retained=True),
    "fig7": _of_the_inside("forgetting"),
    "fig8": _of_the_inside("metrics against edits"),
}


def reproduce(
    name: str,
    model: Any,
    tokenizer: Any,
    edits: Mapping[str, Sequence[Edit]] | None = None,
    *,
    out: str | os.PathLike[str],
    counts: Sequence[int] | None = None,
    methods: Sequence[str] | None = None,
    covariance: Covariance | None = None,
    tasks: Sequence[str] | None = None,
    task_folder: str | os.PathLike[str] | None = None,
    task_limit: int | None = None,
    trust_task_code: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Reproduction:
    """A table or figure of the paper: table2, table3, table4, fig2, fig3, fig5, fig6, fig7, fig8.

    edits: name of the data set → its edits, in the order they are made; None: those of the embedded model, in
        the form that the protocol asks for
    out: folder for <name>.png and .csv (figure and data), <name>-table.csv, <name>.md (table and statement) and
        <name>-details
    counts: numbers of edits at which is scored, one edit a step; the last one is how many are made
    tasks: downstream tasks as lm-evaluation-harness spells them (table4, fig6); (): facts that are not edited, as
        multiple choice. None: the paper's for table4, but the facts for the embedded model and for fig6
    task_folder, task_limit, trust_task_code: `include_path`, `limit` and `trust_task_code` of `run_tasks`

    Raises ConfigError for an unknown name, data that are too few for the counts, or where a model other than
    the embedded one comes without edits.
    """
    if name not in PROTOCOLS:
        raise ConfigError(unknown_name("table or figure", name, PROTOCOLS))
    protocol = PROTOCOLS[name]
    embedded = model_key(Anatomy(model)) == "embedded"
    if edits is None and not embedded:
        raise ConfigError(f"{name} needs edits: {protocol.data} (the embedded model has its own)")
    sizes = tuple(sorted(set(counts))) if counts else protocol.small if embedded else protocol.counts
    if sizes[0] < 1:
        raise ConfigError(f"counts={list(sizes)}: numbers of edits from 1 on")
    note = ""
    if edits is None:
        data, note = _embedded_data(name, seed)
    else:
        data = {label: list(group) for label, group in edits.items()}
    if tasks is None:
        tasks = () if embedded else protocol.tasks
    for label, group in data.items():
        if len(group) < sizes[-1]:
            raise ConfigError(
                f"{label} has {len(group)} edits, the counts go up to {sizes[-1]}; give smaller counts"
            )
    asks_facts = protocol.retained and not (tasks and name in ("table4", "fig6"))
    facts = _facts(data, sizes[-1], seed) if asks_facts else []
    if covariance is None and embedded:
        from d4s.embedded.statistics import demo_covariance

        covariance = demo_covariance(
            model, tokenizer, layers=tuple(range(len(Anatomy(model)))), progress=progress
        )
    setting = Setting(
        name=name,
        model=model,
        tokenizer=tokenizer,
        data=data,
        facts=facts,
        counts=sizes,
        methods=tuple(methods or protocol.methods),
        covariance=covariance,
        tasks=tuple(tasks),
        task_folder=task_folder,
        task_limit=task_limit,
        trust_task_code=trust_task_code,
        seed=seed,
        progress=progress,
        out=Path(out),
    )
    setting.out.mkdir(parents=True, exist_ok=True)
    table, verdict = protocol.run(setting)
    found = Reproduction(name, table, verdict, _in_words(setting, note))
    write_table(table, setting.out / f"{name}-table.csv")
    text = f"# {name}: {protocol.about}\n\n" + "\n".join(f"    {line}" for line in frame_lines(table))
    write_text(f"{text}\n\n{found.statement}\n", setting.out / f"{name}.md")
    return found


def _embedded_data(name: str, seed: int) -> tuple[dict[str, list[Edit]], str]:
    """The embedded model's edits in the form of the protocol's data, and what is not the paper's about them."""
    from d4s.embedded import load_demo_edits

    edits = load_demo_edits()
    Random(seed).shuffle(edits)
    if name == "table2":
        note = "In place of zsRE: CounterFact's sentences scored as questions, by target tokens; specificity is the "
        note += "share of neighbours' answer tokens that stay the unedited model's."
        return {"questions": [dataclasses.replace(edit, kind="question") for edit in edits]}, note
    if name == "fig2":
        note = "In place of the paper's data sets: the same facts as sentences to complete, and as statements that "
        note += "are to be judged the other way round, as 20Q asks."
        return {"completions": edits, "statements": statements_of(edits)}, note
    note = ""
    if name == "table3":
        note = "MQuAKE is left out: the embedded model knows none of its second hops."
    return {"CounterFact": edits}, note


def statements_of(edits: Sequence[Edit]) -> list[Edit]:
    """Facts as statements: in turn the old answer's sentence, to become False, and the new one's, to become True."""
    made = []
    for i, edit in enumerate(edit for edit in edits if edit.target_true is not None):
        new, old = ("False", "True") if i % 2 == 0 else ("True", "False")
        claimed = (edit.target_true or "") if i % 2 == 0 else edit.target_new
        made.append(
            Edit(
                prompt=f"{edit.prompt}{continuation(edit.prompt, edit.target(claimed))}.",
                subject=edit.subject,
                target_new=new,
                target_true=old,
                id=f"{edit.id}/statement",
                paraphrases=tuple(
                    f"{text}{continuation(text, edit.target(claimed))}." for text in edit.paraphrases
                ),
                relation=edit.relation,
                kind="statement",
                tags={**edit.tags, "of": edit.id},
            )
        )
    return made


def _facts(data: Mapping[str, list[Edit]], most: int, seed: int) -> list[Edit]:
    """Facts whose old answer is known and which no edit touches: what stands behind the last one that is made."""
    made = [edit for group in data.values() for edit in group[:most]]
    spare = [edit for group in data.values() for edit in group[most:]]
    known = [edit for edit in spare if edit.target_true is not None and edit.kind != "statement"]
    facts = untouched(known, made)
    if len(facts) < 2:
        raise ConfigError(
            f"behind the first {most} edits there are {len(facts)} facts with a target_true to be asked unedited; "
            "give more edits, smaller counts, or downstream tasks"
        )
    return Random(seed).sample(facts, min(MOST_FACTS, len(facts)))


def _in_words(setting: Setting, note: str) -> str:
    parameters = sum(p.numel() for p in setting.model.parameters())
    model = getattr(setting.model.config, "_name_or_path", "") or setting.model.config.model_type
    if model_key(Anatomy(setting.model)) == "embedded":
        model = "the embedded model"
    asked = f" {len(setting.facts)} facts are asked that no edit touches." if setting.facts else ""
    words = (
        f"Setting: {Path(str(model)).name}, {parameters / 1e6:.1f} M parameters; {setting.most} edits of "
        f"{' and '.join(setting.data)}, one a step, scored after {', '.join(map(str, setting.counts))}; seed "
        f"{setting.seed}.{asked}"
    )
    return f"{words} {note}".strip()


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _points(share: float) -> str:
    """A difference of shares in percentage points."""
    return f"{round(100 * share, 1) + 0.0:.1f} points"  # no −0.0
