"""Edits one after another, with everything that is measured on the way."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from d4s import files
from d4s.architectures import Architecture
from d4s.covariance import Covariance
from d4s.edits import Edit, check_batch, check_sequence
from d4s.errors import ConfigError, D4SError, shown
from d4s.files import write_json
from d4s.forward import evaluating
from d4s.interrupts import deferred
from d4s.kept_targets import KeptTargets
from d4s.methods import Editor, Method, Workbench, method_for
from d4s.methods.locate import TargetMethod
from d4s.metrics import THREE, Baseline, Evaluation, Metric, evaluate, finite_or_none, take_baseline
from d4s.progress import progress_bar, stage
from d4s.prompts import subject_row
from d4s.readiness import check_ready

if TYPE_CHECKING:
    from pandas import DataFrame

# What a history row carries of an evaluation, where the edits have it.
HEADLINES = ("efficacy", "paraphrase", "specificity", "average", "harmonic")
FORMAT = "d4s-result-1"
NAMED = 10  # edits that a summary names at most


@dataclass
class Record:
    """What was measured in a sequence: all of it but the model.

    method, config: its name and configuration
    history: one row an evaluation point; row 0 is the unedited model.
        step: edits made so far
        efficacy, paraphrase, specificity, average, harmonic (and the _argmax, _generated figures): of ALL edits
            made so far ("current" evaluation)
        efficacy.unedited, …: the unedited model's, of the same edits and prompts
        original_efficacy, original_paraphrase: of the same edits, each tested right after its own step
        l1_norm.<layer>: mean |w| of an edited layer; l1_growth: its mean relative growth over the layers
        delta_norm.<layer>: ‖W − W0‖_F
        seconds: wall-clock time since the start, evaluation included; edit_seconds: without it
        and what `measure` gave
    edits_table: one row an edit: id, step, first_probability and last_probability of its target's optimisation, and
        written_probability: p(target) on the edit prompt right after the step
    evaluations: the full evaluation behind each history row
    chosen: fields of the configuration that were left open (None), as they were decided by the edits
    failure: why the sequence ended before its last edit; None: it did not
    """

    method: str
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    edits_table: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    failure: str | None = None
    chosen: dict[str, float] = field(default_factory=dict)

    @property
    def measured(self) -> list[str]:
        """Names of what `measure` gave: in a row they stand behind the clocks."""
        names = list(self.history[0]) if self.history else []
        return names[names.index("edit_seconds") + 1 :] if "edit_seconds" in names else []

    def to_frame(self) -> DataFrame:
        """The history as a DataFrame."""
        import pandas

        return pandas.DataFrame(self.history)

    def summary(self) -> str:
        """The history as a short text table; mean |w| growth in percent."""
        names = [n for n in HEADLINES if any(n in row for row in self.history)] + self.measured
        widths = {n: max(11, len(n)) for n in names}
        lines = [f"{'edits':>6}  " + "  ".join(f"{n:>{widths[n]}}" for n in names) + "  mean |w|    s/edit"]
        for row in self.history:
            cells = "  ".join(
                f"{row[n]:{widths[n]}.3f}" if row.get(n) is not None else " " * widths[n] for n in names
            )
            pace = row["edit_seconds"] / row["step"] if row["step"] else 0.0
            lines.append(f"{row['step']:6d}  {cells}  {100 * row['l1_growth']:+7.2f} %  {pace:8.3f}")
        lines += [f"{name}={value:g}, chosen by the first edits" for name, value in self.chosen.items()]
        if missing := self.not_arrived():
            named = ", ".join(missing[:NAMED]) + (" …" if len(missing) > NAMED else "")
            lines.append(
                f"{len(missing)} of {len(self.edits_table)} edits: the target was found, but half of its probability "
                f"or more was lost on the way into the weights: {named}"
            )
        return "\n".join(lines)

    def not_arrived(self) -> list[str]:
        """Ids of edits whose optimised target did not arrive: p(target) was ½ or more at the end of its optimisation,
        and right after the step, on the edit prompt, less than half of that."""
        return [
            row["id"]
            for row in self.edits_table
            if row.get("written_probability") is not None
            and row.get("last_probability") is not None
            and row["last_probability"] >= 0.5
            and row["written_probability"] < 0.5 * row["last_probability"]
        ]

    def forgetting(self, metric: str = "efficacy") -> DataFrame:
        """How edits made in one stretch fare later: rows: made up to step i, columns: tested at step t.

        Each cell is the mean of `metric` over the edits made between the evaluation point before i and i.
        """
        import pandas

        points = [row["step"] for row in self.history if row["step"]]
        matrix = pandas.DataFrame(index=points, columns=points, dtype=float)
        matrix.index.name, matrix.columns.name = "made up to", "tested at"
        done = [e for e, row in zip(self.evaluations, self.history, strict=True) if row["step"]]
        begin = 0
        for made in points:
            ids = {row["id"] for row in self.edits_table[begin:made]}
            for tested, evaluation in zip(points, done, strict=True):
                if tested >= made:
                    values = [
                        r[metric] for r in evaluation.rows if r["id"] in ids and r.get(metric) is not None
                    ]
                    matrix.loc[made, tested] = sum(values) / len(values) if values else math.nan
            begin = made
        return matrix

    def to_dict(self) -> dict[str, Any]:
        """JSON values; figures that are not finite are None."""
        return {
            "format": FORMAT,
            "method": self.method,
            "config": self.config,
            "edits": len(self.edits_table),
            "failure": self.failure,
            "chosen": self.chosen,
            "history": finite_or_none(self.history),
            "edits_table": finite_or_none(self.edits_table),
            "evaluations": [e.to_dict() for e in self.evaluations],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """JSON of all but the model, with a digest of its content; written beside its place, then renamed."""
        write_json(self.to_dict(), path, indent=1)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Record:
        """What `save` wrote. Raises DataError for a file of another format, and one that has changed since."""
        names = ("method", "config", "edits", "failure", "history", "edits_table", "evaluations")
        stored = files.read_json(path, writer="Result.save", format=FORMAT, fields=names, later=("chosen",))
        with files.checking(path, "Result.save"):
            record = Record(
                files.as_text(stored["method"], "method"),
                files.as_json(files.as_object(stored["config"], "config"), "config"),
                _rows(stored["history"], "history", needed=("step", "l1_growth", "edit_seconds")),
                _rows(stored["edits_table"], "edits_table", needed=("id", "step")),
                [
                    _evaluation(one, f"evaluations[{i}]")
                    for i, one in enumerate(files.as_list(stored["evaluations"], "evaluations"))
                ],
                None if stored["failure"] is None else files.as_text(stored["failure"], "failure"),
                {
                    name: math.nan
                    if (found := files.as_number(value, f"chosen, {shown(name)}")) is None
                    else found
                    for name, value in files.as_object(stored.get("chosen", {}), "chosen").items()
                },
            )
            if len(record.evaluations) != len(record.history):
                raise files.WrongType("history and evaluations are not equally long")
            return record


def _rows(
    value: Any,
    place: str,
    *,
    needed: Collection[str],
    evaluated: bool = False,
) -> list[dict[str, Any]]:
    """Stored rows of figures. Null is a figure that was not finite: NaN in a history, and left null in an evaluation.

    needed: columns that every row must have; of these id is a text, step and count are whole numbers
    evaluated: rows of an evaluation, where a cell may be a list of figures
    """
    rows = []
    for i, row in enumerate(files.as_list(value, place)):
        cells: dict[str, Any] = {}
        for name in needed:
            if name not in files.as_object(row, f"{place}[{i}]"):
                raise files.WrongType(f"{place}[{i}] has no {name!r}")
        for name, cell in files.as_object(row, f"{place}[{i}]").items():
            at = f"{place}[{i}], {shown(name)}"
            if (name == "id" and name in needed) or (name == "kind" and evaluated):
                cells[name] = files.as_text(cell, at)
            elif name in ("step", "count") and name in needed:
                cells[name] = files.as_count(cell, at)
            elif evaluated and isinstance(cell, list):
                cells[name] = [files.as_number(one, at) for one in cell]
            else:
                cells[name] = math.nan if cell is None and not evaluated else files.as_number(cell, at)
        rows.append(cells)
    return rows


def _evaluation(value: Any, place: str) -> Evaluation:
    stored = files.as_object(value, place)
    metrics = {}
    for name, metric in files.as_object(stored.get("metrics"), f"{place}.metrics").items():
        at = f"{place}.metrics, {shown(name)}"
        (figures,) = _rows([metric], at, needed=("mean", "low", "high", "count"))
        if len(figures) > 4:
            raise files.WrongType(f"{at} has more than mean, low, high and count")
        metrics[name] = Metric(**figures)
    notes = files.as_list(stored.get("notes"), f"{place}.notes")
    return Evaluation(
        _rows(stored.get("rows"), f"{place}.rows", needed=("id",), evaluated=True),
        metrics,
        tuple(files.as_text(note, f"{place}.notes") for note in notes),
    )


@dataclass(kw_only=True)
class Result(Record):
    """What a sequence did, with the model as it is now.

    model: the edited model, the object that went in
    edits: all that were to be made
    editor: goes on from here, or restores the original weights
    baseline: the unedited model's answers
    """

    model: Any
    edits: tuple[Edit, ...]
    editor: Editor
    baseline: Baseline

    def restore(self) -> None:
        """The original weights back, bit for bit."""
        self.editor.restore()

    def consolidate(self) -> None:
        """Solves anew for all the edits made, as one batch from the original weights; only D4S can.

        Keys at upper layers, which later edits below them had made stale, are fresh afterwards. The history is of
        the model before it: `evaluate` scores the new one. A failure leaves weights and sums as they were.
        Raises ConfigError for an editor of another method, and if no edit has been made.
        """
        made = {row["id"] for row in self.edits_table}
        again = getattr(self.editor, "consolidate", None)
        if again is None:
            raise ConfigError(f"{self.method} keeps nothing to consolidate; d4s does")
        if not made:
            raise ConfigError("no edit has been made, so there is nothing to consolidate")
        with evaluating(self.model):
            again([edit for edit in self.edits if edit.id in made])

    def record(self) -> Record:
        """The measurements alone, which hold no weight."""
        return Record(
            self.method,
            self.config,
            self.history,
            self.edits_table,
            self.evaluations,
            self.failure,
            self.chosen,
        )


def consolidate(result: Result) -> None:
    """`Result.consolidate`, as a function."""
    result.consolidate()


def edit_sequence(
    model: Any,
    tokenizer: Any,
    edits: Sequence[Edit],
    *,
    method: str | Method = "d4s",
    config: Mapping[str, Any] | Method | None = None,
    covariance: Covariance | str | os.PathLike[str] | None = None,
    targets: KeptTargets | str | os.PathLike[str] | None = None,
    batch_size: int = 1,
    evaluate_every: int | Collection[int] | None = None,
    neighborhood_limit: int | None = None,
    original: bool = True,
    generate: bool = False,
    measure: Callable[[], Mapping[str, float]] | None = None,
    stop_at_failure: bool = False,
    baseline: Baseline | None = None,
    architecture: Architecture | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Result:
    """Makes the edits in order, `batch_size` a step, in place, and measures as it goes.

    model: a transformers causal language model, float32 | float16 | bfloat16, CPU or CUDA
    edits: in the order they are to be made; a later edit may change a fact that an earlier one has changed
    method: a name from `d4s.methods()`, or a configured method
    config: fields that differ from the preset, as {"prior_weight": 2e4, "steps": 30}; or a whole configuration
    covariance: key statistics of the unedited model, or their file; None: estimated on text that the model
        samples, and cached
    targets: of the unedited model, found before (d4s targets), or their file; those of edits that are not among them
        are searched, and added to a `KeptTargets`. For methods that search on the unedited model: d4s, anchor="base"
    evaluate_every: edits between evaluations, or the numbers of edits after which to evaluate, as {100, 500};
        each scores ALL edits made so far. None: only at the end
    neighborhood_limit: neighbourhood prompts an edit that are scored at the points between the first and the
        last; None: all
    original: also test each edit right after its own step
    generate: also score free generation
    measure: called at each evaluation point while the model holds the edits; its figures join the history row.
        Those named "<task> acc" or as another accuracy (`metrics.is_share`) are shown in percent, others as they are
    stop_at_failure: a step that fails, also for want of device memory, ends the sequence instead of raising;
        `Result.failure` says why
    baseline: the unedited model's answers to these edits, where they have been taken before
    seed: of contexts, samples and intervals; same seed, same machine: same result

    Raises a D4SError before anything is changed if an edit, the model, the statistics or an argument is not
    right. A step that fails leaves the weights as the step before it left them; whatever is raised after the
    first edit carries the Result so far as its attribute `result`, whose `restore()` is the way back.
    """
    edits = tuple(edits)
    if not edits:
        raise ConfigError("no edits were given")
    points = evaluate_every if isinstance(evaluate_every, Collection) else ()
    every = None if isinstance(evaluate_every, Collection) else evaluate_every
    for name, value in (
        ("batch_size", batch_size),
        ("evaluate_every", every),
        *(("evaluate_every", p) for p in points),
    ):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name}={value!r}, must be a whole number from 1 on")
    check_sequence(edits)
    batches = [edits[i : i + batch_size] for i in range(0, len(edits), batch_size)]
    for batch in batches:
        check_batch(batch)
    if isinstance(covariance, (str, os.PathLike)):
        covariance = Covariance.load(covariance)
    if isinstance(targets, (str, os.PathLike)):
        targets = KeptTargets.load(targets)
    bench = Workbench(
        model,
        tokenizer,
        covariance=covariance,
        targets=targets,
        architecture=architecture,
        seed=seed,
        progress=progress,
    )
    configured = method_for(method, bench.anatomy, config)
    if targets is not None and not configured.searches_ahead:
        raise ConfigError(
            f"targets: {configured.name} searches its targets on the weights as they are, so none of the unedited "
            "model can be given; d4s with anchor='base' takes them"
        )
    check_ready(model, tokenizer, edits)
    if isinstance(configured, TargetMethod):
        for edit in edits:
            subject_row(tokenizer, edit.prompt, edit.subject)
    with evaluating(model):
        settled = configured.settled(bench, edits)
        editor = settled.editor(bench)
        if baseline is None:
            stage(f"baseline: the unedited model is asked about {len(edits)} edits", shown=progress)
            baseline = take_baseline(model, tokenizer, edits, progress=progress)
        fields, decided = asdict(configured), asdict(settled)
        result = Result(
            configured.name,
            fields,
            chosen={name: value for name, value in decided.items() if value != fields[name]},
            model=model,
            edits=edits,
            editor=editor,
            baseline=baseline,
        )
        run = _Run(result, neighborhood_limit, generate, measure, seed, progress)
        stage(f"{configured.name}: the unedited model is scored on {len(edits)} edits", shown=progress)
        run.point(0, last=False)
        stage(f"{configured.name}: {len(edits)} edits, {batch_size} a step", shown=progress)
        editor.announce(edits)
        made = 0
        try:
            with progress_bar(len(edits), "edit", configured.name, shown=progress) as bar:
                for batch in batches:
                    try:
                        run.step(batch, original)
                    except (D4SError, torch.OutOfMemoryError) as error:
                        made = len(result.edits_table)  # the step itself may have been made
                        result.failure = f"edit {made + 1}: {error}"
                        if not stop_at_failure:
                            raise
                        if made and result.history[-1]["step"] != made:
                            run.point(made, last=True)
                        break
                    before, made = made, made + len(batch)
                    bar.update(len(batch))
                    due = every is not None and made // every > before // every
                    due |= any(before < point <= made for point in points)
                    if due or made == len(edits):
                        run.point(made, last=made == len(edits))
                        shown = {k: f"{v:.3f}" for k, v in result.history[-1].items() if k == "average"}
                        bar.set_postfix(
                            shown, refresh=False
                        )  # at its next turn: a log has a line every so often
        except BaseException as error:
            why = str(error) or type(error).__name__
            result.failure = result.failure or f"after edit {len(result.edits_table)}: {why}"
            error.result = result  # type: ignore[attr-defined]
            raise
    return result


class _Run:
    """A sequence under way: clocks, and the tests right after each step."""

    def __init__(
        self,
        result: Result,
        neighborhood_limit: int | None,
        generate: bool,
        measure: Callable[[], Mapping[str, float]] | None,
        seed: int,
        progress: bool,
    ) -> None:
        self.result, self.limit, self.generate, self.seed = result, neighborhood_limit, generate, seed
        self.measure, self.progress = measure, progress
        self.began = time.perf_counter()
        self.edit_seconds = 0.0
        self.right_after: dict[str, list[float]] = {"efficacy": [], "paraphrase": []}
        self.rows_before: dict[int | None, list[dict[str, Any]]] = {}  # by the limit on neighbourhood prompts
        self.unedited = result.editor.weights.mean_absolute()

    def step(self, batch: Sequence[Edit], original: bool) -> None:
        with deferred():  # an interruption finds the weights and the rows of the same edits
            self._make(batch)
        if original:
            now = self._evaluate(batch, limit=0, only_edited=True)
            for table_row, found in zip(self.result.edits_table[-len(batch) :], now.rows, strict=True):
                table_row["written_probability"] = found["target_probability"]
            for name, values in self.right_after.items():
                values += [row[name] for row in now.rows if row.get(name) is not None]

    def _make(self, batch: Sequence[Edit]) -> None:
        """The step and its rows: both, or neither."""
        result, began = self.result, time.perf_counter()
        before, step = len(result.edits_table), None
        try:
            with result.editor.weights.all_or_nothing():
                step = result.editor.edit(batch)
                if result.editor.anatomy.device.type == "cuda":
                    torch.cuda.synchronize()
                made = before + len(batch)
                rows: list[dict[str, Any]] = [{"id": edit.id, "step": made} for edit in batch]
                if step.first_probability:
                    for i, row in enumerate(rows):
                        row["first_probability"] = step.first_probability[i]
                        row["last_probability"] = step.last_probability[i]
                result.edits_table += rows
        except BaseException:
            del result.edits_table[before:]
            if step is not None:  # it was made, and its weights are taken back
                result.editor.tear()
            raise
        self.edit_seconds += time.perf_counter() - began

    def _evaluate(self, edits: Sequence[Edit], limit: int | None, only_edited: bool = False) -> Evaluation:
        return evaluate(
            self.result.model,
            self.result.editor.tokenizer,
            edits,
            baseline=self.result.baseline,
            generate=self.generate and not only_edited,
            neighborhood_limit=limit,
            portability=not only_edited,
            seed=self.seed,
            check=False,
            progress=self.progress and not only_edited,
        )

    def _unedited(self, made: int, limit: int | None) -> dict[str, float]:
        """Shares of the unedited model on the edits made so far, whose own level may differ from that of all."""
        rows, found = self.rows_before[limit][:made], {}
        for name in (*THREE, *(f"{name}_argmax" for name in THREE)):
            values = [row[name] for row in rows if row.get(name) is not None]
            if values:
                found[f"{name}.unedited"] = sum(values) / len(values)
        if all(f"{name}.unedited" in found for name in THREE):
            found["average.unedited"] = sum(found[f"{name}.unedited"] for name in THREE) / len(THREE)
        return found

    def point(self, made: int, *, last: bool) -> None:
        """One history row: all edits made so far; before the first, all that are to be made."""
        result, weights = self.result, self.result.editor.weights
        scored = result.edits[:made] if made else result.edits
        limit = None if last or not made else self.limit
        evaluation = self._evaluate(scored, limit)
        row: dict[str, Any] = {"step": made}
        for name, metric in evaluation.metrics.items():
            row[name] = metric.mean
            row |= {f"{name}.low": metric.low, f"{name}.high": metric.high}
        for name, values in self.right_after.items():
            if values:
                row[f"original_{name}"] = sum(values) / len(values)
        if made:
            row |= self._unedited(made, limit)
        else:
            self.rows_before[None] = evaluation.rows
            if self.limit is not None:  # fewer prompts have a level of their own
                self.rows_before[self.limit] = self._evaluate(scored, self.limit, only_edited=True).rows
        norms, changes = weights.mean_absolute(), weights.delta_norm()
        row["l1_growth"] = sum(norms[i] / self.unedited[i] - 1 for i in norms) / len(norms)
        row |= {f"l1_norm.{i}": norm for i, norm in norms.items()}
        row |= {f"delta_norm.{i}": norm for i, norm in changes.items()}
        row["seconds"] = time.perf_counter() - self.began
        row["edit_seconds"] = self.edit_seconds
        row |= self.measure() if self.measure is not None else {}
        result.history.append(row)
        result.evaluations.append(evaluation)
