"""What editing did: did the facts take, do they carry over, is the rest as before.

Every figure is averaged per edit first, then over edits, with a 95 % bootstrap interval over edits. Teacher
forcing shows a model the answer's length and beginning; free generation does not (arXiv 2502.11177). Both are
reported, under different names, and never one for the other.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy
from numpy.typing import NDArray

from d4s import files
from d4s.edits import Edit
from d4s.edits.spacing import Target
from d4s.errors import ConfigError, unknown_name
from d4s.files import finite_or_none, write_json
from d4s.measure.columns import METRICS, THREE, column
from d4s.measure.row import Ask, Recorder, Row, Text, mean
from d4s.measure.statistics import resampled_means
from d4s.models import generation
from d4s.models.causal_lm import CausalLM
from d4s.models.chat import chat_note
from d4s.models.generation import TermWeights, Written, is_decided
from d4s.models.readiness import check_askable, check_ready
from d4s.models.scoring import Score

if TYPE_CHECKING:
    from pandas import DataFrame

GENERATED_TOKENS = 32
FLUENCY_TOKENS = 100
BASELINE_FORMAT = "d4s-baseline-1"


@dataclass(frozen=True)
class Metric:
    """Mean over edits; low, high: its 95 % bootstrap interval; count: edits that have the figure."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Baseline:
    """The unedited model's answers where specificity compares with them.

    answers: (prompt, target) → the argmax tokens at the target's places, and the target's NLL
    """

    answers: Mapping[tuple[str, Target], Score]

    def __call__(self, prompt: str, target: Target) -> Score:
        """Raises ConfigError if the prompt does not belong to the edits that the baseline was taken for."""
        try:
            return self.answers[prompt, target]
        except KeyError:
            raise ConfigError(
                f"the baseline has no answer to {prompt!r} with {target!r}; take it before editing with all "
                "edits that are to be evaluated: take_baseline(model, tokenizer, edits)"
            ) from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """JSON with a digest of its content; written beside its place, then renamed."""
        answers = [
            [prompt, target, finite_or_none(s.nll), s.predicted, s.target]
            for (prompt, target), s in self.answers.items()
        ]
        write_json({"format": BASELINE_FORMAT, "answers": answers}, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Baseline:
        """The inverse of `save`. Raises DataError for a file of another format, and one that has changed since."""
        record = files.read_json(path, writer="Baseline.save", format=BASELINE_FORMAT, fields=("answers",))
        with files.checking(path, "Baseline.save"):
            rows = enumerate(files.as_list(record["answers"], "answers"))
            return cls(dict(_answer(row, f"answers[{i}]") for i, row in rows))


def _answer(value: Any, place: str) -> tuple[tuple[str, Target], Score]:
    """What `Baseline.save` made a row of."""
    row = files.as_list(value, place)
    if len(row) != 5:
        raise files.WrongType(
            f"{place} has {len(row)} parts, must be prompt, target, NLL and two lists of tokens"
        )
    prompt, target, nll, predicted, ids = row
    if isinstance(target, list):
        if len(target) != 2:
            raise files.WrongType(f"{place}, target: a list must be text and what stands before it")
        target = tuple(files.as_text(text, f"{place}, target") for text in target)
    else:
        target = files.as_text(target, f"{place}, target")
    number = files.as_number(nll, f"{place}, NLL")
    tokens = [
        tuple(files.as_count(token, f"{place}, tokens") for token in files.as_list(part, f"{place}, tokens"))
        for part in (predicted, ids)
    ]
    if len(tokens[0]) != len(tokens[1]) or not tokens[0]:
        raise files.WrongType(f"{place} has {len(tokens[0])} tokens said and {len(tokens[1])} asked for")
    score_ = Score(math.inf if number is None else float(number), tokens[0], tokens[1])
    return (files.as_text(prompt, f"{place}, prompt"), target), score_


@dataclass(frozen=True)
class Evaluation:
    """Figures of a list of edits.

    rows: one dict an edit, in the order given: id, kind, `same_as` (the id of an earlier edit of the same fact, if
        there is one), its figures (`columns.METRICS`; absent where the edit has none), and the NLLs behind them (nats;
        `nll_new`, `paraphrase_nll_new`, `neighborhood_nll_true`, …)
    metrics: name → Metric
    notes: what could not be measured, and why
    """

    rows: list[dict[str, Any]]
    metrics: dict[str, Metric]
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> float:
        """The mean. Raises ConfigError for a figure that these edits do not have."""
        if name not in self.metrics:
            raise ConfigError(" ".join([unknown_name("metric", name, self.metrics), *self.notes]))
        return self.metrics[name].mean

    def __contains__(self, name: object) -> bool:
        return name in self.metrics

    def to_frame(self) -> DataFrame:
        """One row an edit."""
        import pandas

        return pandas.DataFrame(self.rows)

    def to_dict(self, *, rows: bool = True) -> dict[str, Any]:
        """JSON values; figures that are not finite are None."""
        record: dict[str, Any] = {
            "metrics": {name: finite_or_none(asdict(metric)) for name, metric in self.metrics.items()},
            "notes": list(self.notes),
        }
        if rows:
            record["rows"] = finite_or_none(self.rows)
        return record

    def summary(self) -> str:
        """A text table: figure, interval, edits, meaning. Shares in percent."""
        width = max(map(len, self.metrics), default=0)
        lines = [f"{'':{width}}  {'mean':>7}  {'95 % interval':^15}  {'edits':>6}"]
        for name, metric in self.metrics.items():
            about = column(name)
            digits = 2 if about.is_share else 3
            middle, low, high = (
                f"{about.factor * v:.{digits}f}" for v in (metric.mean, metric.low, metric.high)
            )
            lines.append(
                f"{name:{width}}  {middle:>7}  {low:>6} – {high:>6}  {metric.count:6d}  {about.symbol:4}  "
                f"{about.meaning}".rstrip()
            )
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def take_baseline(
    model: CausalLM,
    tokenizer: Any,
    edits: Sequence[Edit],
    *,
    batch_tokens: int | None = None,
    progress: bool = False,
) -> Baseline:
    """The unedited model's answers to all that these edits must not change; to be taken before the first.

    Raises ModelError, before anything is asked, if the model says NaN or lacks a token of the edits.
    """
    edits = tuple(edits)
    check_ready(model, tokenizer, edits)
    needed = Recorder()
    for edit in edits:
        Row(edit, now=Recorder(), before=needed).figures()
    return Baseline(needed.scores(model, tokenizer, batch_tokens, progress))


def evaluate(
    model: CausalLM,
    tokenizer: Any,
    edits: Sequence[Edit],
    *,
    baseline: Baseline | None = None,
    generate: bool = False,
    fluency: bool = False,
    portability: bool = True,
    neighborhood_limit: int | None = None,
    seed: int = 0,
    batch_tokens: int | None = None,
    check: bool = True,
    progress: bool = False,
) -> Evaluation:
    """Scores edits on a model as it is now; `columns.METRICS` says what each figure is.

    baseline: the unedited model's answers; without it there is no comparison with them
    generate: also let the model answer freely (the `_exact` figures, of every edit, and of questions the `_generated`)
    fluency: also let it write 100 tokens after each of the edits' `generation` openings, top-k 5
    portability: also score the edits' consequences
    neighborhood_limit: prompts an edit, of those that must not change, that are scored: the same ones
        for the same seed, whatever else is evaluated. None: all
    batch_tokens: tokens that go through the model together; None: by device
    check: raise ModelError, before anything is asked, if the model is wrapped, not on one device, or lacks a
        token of the edits; False: that has been done

    Edits of different kinds may be mixed: each figure is taken over the edits that have it. A completion
    without a `target_true` is scored as a question: there is nothing to compare NLLs with.
    """
    edits = tuple(edits)
    if check:
        check_askable(model, tokenizer, edits)
    asked, sought = Recorder(), dict[str, dict[str | None, None]]()

    def rows(now: Ask, text: Text | None) -> list[dict[str, Any]]:
        notes.clear()
        return [
            Row(edit, now, baseline, text, neighborhood_limit, seed, portability, notes).figures()
            for edit in edits
        ]

    def seek(prompt: str, answer: str | None) -> None:
        sought.setdefault(prompt, {})[answer] = None

    def enough(prompt: str, text: str) -> bool:
        answers = [answer for answer in sought[prompt] if answer is not None]
        return len(answers) == len(sought[prompt]) and is_decided(text, answers)

    notes: dict[str, int] = {}
    rows(asked, seek if generate else None)  # only to learn what has to be asked
    scores = asked.scores(model, tokenizer, batch_tokens, progress)
    options: dict[str, Any] = {"batch_tokens": batch_tokens, "progress": progress}
    briefly = {"max_new_tokens": GENERATED_TOKENS, "enough": enough}
    texts = _written(model, tokenizer, list(sought), **briefly, **options)
    done = rows(
        lambda prompt, target: scores[prompt, target],
        (lambda prompt, _answer: texts[prompt]) if generate else None,
    )
    if fluency:
        openings = list(dict.fromkeys(text for edit in edits for text in edit.generation))
        freely = {"top_k": 5, "seed": seed, "stop_at_line": False, "stop_at_end": False}
        texts = _written(model, tokenizer, openings, max_new_tokens=FLUENCY_TOKENS, **freely, **options)
        _add_fluency(done, edits, texts)
    remarks = tuple(f"{text} ({n} times)" for text, n in notes.items())
    remarks = (*filter(None, (chat_note(edits), _mixture_note(done))), *remarks)
    return evaluation_of(done, edits, seed, remarks)


def _mixture_note(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """What has to be said of efficacy and paraphrase where some rows measure them otherwise than others."""
    questions = sum(row["kind"] == "question" for row in rows)
    if not 0 < questions < len(rows):
        return None
    return (
        f"efficacy and paraphrase are means over two measures: {questions} edits without an old answer, or questions, "
        f"count right tokens, {len(rows) - questions} whether the new answer is more probable than the old one; the "
        "figures with argmax are one for all"
    )


def evaluation_of(
    rows: list[dict[str, Any]], edits: Sequence[Edit], seed: int, notes: tuple[str, ...] = ()
) -> Evaluation:
    """Figures of rows that have been taken, an edit each. A row of a fact that several edits have says of which edit's
    it is (`same_as`)."""
    first: dict[tuple[str, str], str] = {}
    for row, edit in zip(rows, edits, strict=True):
        if (same := first.setdefault((edit.text, edit.target_new), row["id"])) != row["id"]:
            row["same_as"] = same
    return Evaluation(rows, _summarise(rows, seed), notes)


def fact_numbers(rows: Iterable[Mapping[str, Any]]) -> NDArray[Any]:
    """The number of each row's fact, from 0 on: MQuAKE makes some dozens of times, and their rows are no independent
    samples."""
    numbers: dict[str, int] = {}
    return numpy.array([numbers.setdefault(row.get("same_as", row["id"]), len(numbers)) for row in rows])


def _written(model: CausalLM, tokenizer: Any, prompts: Sequence[str], **options: Any) -> dict[str, Written]:
    return (
        dict(zip(prompts, generation.generate(model, tokenizer, prompts, **options), strict=True))
        if prompts
        else {}
    )


def _add_fluency(rows: Sequence[dict[str, Any]], edits: Sequence[Edit], texts: Mapping[str, Written]) -> None:
    weights = TermWeights(text for edit in edits for text in edit.reference_texts)
    for row, edit in zip(rows, edits, strict=True):
        if edit.generation:
            row["fluency"] = mean([generation.fluency(texts[opening].text) for opening in edit.generation])
            if edit.reference_texts:
                made = " ".join(texts[opening].text for opening in edit.generation)
                row["consistency"] = weights.cosine(made, " ".join(edit.reference_texts))


def _summarise(rows: Sequence[dict[str, Any]], seed: int) -> dict[str, Metric]:
    """Means over edits with bootstrap intervals over facts; the order of the edits does not matter."""
    rows = sorted(rows, key=lambda row: row["id"])
    groups = fact_numbers(rows)
    found = dict.fromkeys(name for row in rows for name in sorted(row))
    named = [*METRICS, *(name for name in found if column(name).family)]  # then each kind of question
    present = [name for name in named if any(name in row for row in rows)]
    if not present:
        return {}
    values = numpy.array([[row.get(name, math.nan) for name in present] for row in rows])
    sampled = resampled_means(values, groups, seed)
    means = dict(zip(present, numpy.nanmean(values, 0), strict=True))
    draws = dict(zip(present, sampled.T, strict=True))
    counts = dict(zip(present, (~numpy.isnan(values)).sum(0), strict=True))
    counts |= add_combined(means, draws, counts)
    metrics = {}
    for name in named:
        if name in means:
            low, high = numpy.nanpercentile(draws[name], [2.5, 97.5])
            metrics[name] = Metric(float(means[name]), float(low), float(high), int(counts[name]))
    return metrics


def add_combined(
    means: dict[str, Any], draws: dict[str, NDArray[Any]], counts: Mapping[str, Any]
) -> dict[str, Any]:
    """Beside means and draws of the three figures those of average and harmonic; their numbers of edits."""
    if not all(name in means for name in THREE):
        return {}
    for name, combine in (("average", _average), ("harmonic", _harmonic)):
        means[name] = combine(numpy.array([means[n] for n in THREE]))
        draws[name] = combine(numpy.stack([draws[n] for n in THREE]))
    return dict.fromkeys(("average", "harmonic"), min(counts[n] for n in THREE))


def _average(three: NDArray[Any]) -> NDArray[Any]:
    return three.mean(0)


def _harmonic(three: NDArray[Any]) -> NDArray[Any]:
    with numpy.errstate(divide="ignore"):
        return 3 / (1 / three).sum(0)
