"""What editing did: did the facts take, do they carry over, is the rest as before.

Every figure is averaged per edit first, then over edits, with a 95 % bootstrap interval over edits. Teacher
forcing shows a model the answer's length and beginning; free generation does not (arXiv 2502.11177). Both are
reported, under different names, and never one for the other.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy
from numpy.typing import NDArray

from d4s import files
from d4s.edits import Edit, Question
from d4s.edits.spacing import Target
from d4s.errors import ConfigError, unknown_name
from d4s.files import write_json
from d4s.models import generation
from d4s.models.generation import TermWeights, Written, says
from d4s.models.readiness import check_askable, check_ready
from d4s.models.scoring import Score, score

if TYPE_CHECKING:
    from pandas import DataFrame

RESAMPLES = 2_000
GENERATED_TOKENS = 32
FLUENCY_TOKENS = 100
BASELINE_FORMAT = "d4s-baseline-1"

# Name → what a row's figure is. All are shares, from 0 to 1, but for those in UNITS.
METRICS: dict[str, str] = {
    "efficacy": "NLL(new) < NLL(true); questions: target tokens right, teacher-forced",
    "paraphrase": "the same on the paraphrases",
    "specificity": "neighbours: NLL(true) < NLL(new); questions: tokens as the unedited model's",
    "average": "mean of the three",
    "harmonic": "harmonic mean of the three",
    "efficacy_argmax": "greedy argmax is the whole target",
    "paraphrase_argmax": "the same on the paraphrases",
    "specificity_argmax": "neighbours: argmax answer as the unedited model's",
    "specificity_gold": "what must not change: right by the data, teacher-forced",
    "efficacy_generated": "questions: free greedy generation, exact match",
    "paraphrase_generated": "the same on the paraphrases",
    "portability": "consequences: tokens of the first answer right, teacher-forced",
    "portability_generated": "consequences: free greedy generation, exact match",
    "multi_hop": "any of the multi-hop questions wholly right, teacher-forced",
    "multi_hop_generated": "any of them right in free greedy generation, exact match",
    "locality": "completions: locality tokens as the unedited model's",
    "target_probability": "exp(−NLL(new)) on the edit prompt",
    "fluency": "bi- and trigram entropy of 100 generated tokens",
    "consistency": "TF-IDF cosine of generated and reference texts",
}
UNITS = {"fluency": "bits", "target_probability": "", "consistency": ""}
THREE = ("efficacy", "paraphrase", "specificity")
# Scores of lm-evaluation-harness that are shares. Others may be perplexities, bits, or in percent already.
TASK_SHARES = frozenset({"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "acc_all", "exact_match", "em"})

_TRUTH = {"True": "False", "False": "True"}


def is_share(name: str) -> bool:
    """Whether the figure of this name is known to lie between 0 and 1: d4s's own metrics, and a task's accuracy.

    A task's score is called "<task> <metric>", as by `TaskScores`. Any other name, as of a `measure`, may be of
    anything.
    """
    plain = name.removeprefix("original_").partition(".")[0]
    if plain == "retained" or (plain in METRICS and plain not in UNITS):
        return True
    metric = name.partition(" ")[2].partition(" (")[0]  # a filter's name may follow
    for end in (".low", ".high", ".unedited"):
        metric = metric.removesuffix(end)
    return metric in TASK_SHARES


def spelled(name: str, value: float, digits: int = 1) -> str:
    """A figure as text: a share in percent with these decimals, any other one as it is."""
    return f"{100 * value:.{digits}f} %" if is_share(name) else f"{value:.4g}"


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

    rows: one dict an edit, in the order given: id, kind, its figures (METRICS; absent where the edit has
        none), and the NLLs behind them (nats; `nll_new`, `paraphrase_nll_new`, `neighborhood_nll_true`, …)
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
            unit = "%" if is_share(name) else UNITS.get(name, "")
            factor, digits = (100, 2) if unit == "%" else (1, 3)
            mean, low, high = (f"{factor * v:.{digits}f}" for v in (metric.mean, metric.low, metric.high))
            lines.append(
                f"{name:{width}}  {mean:>7}  {low:>6} – {high:>6}  {metric.count:6d}  {unit:4}  "
                f"{METRICS.get(name, '')}".rstrip()
            )
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def take_baseline(
    model: Any,
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
    needed = _Recorder()
    for edit in edits:
        _Row(edit, now=_Recorder(), before=needed).figures()
    return Baseline(needed.scores(model, tokenizer, batch_tokens, progress))


def evaluate(
    model: Any,
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
    """Scores edits on a model as it is now; `METRICS` says what each figure is.

    baseline: the unedited model's answers; without it there is no comparison with them
    generate: also let the model answer questions freely (the `_generated` figures)
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
    asked, sought = _Recorder(), dict[str, None]()

    def rows(now: Ask, text: Callable[[str], Written | None] | None) -> list[dict[str, Any]]:
        notes.clear()
        return [
            _Row(edit, now, baseline, text, neighborhood_limit, seed, portability, notes).figures()
            for edit in edits
        ]

    def seek(prompt: str) -> None:
        sought[prompt] = None

    notes: dict[str, int] = {}
    rows(asked, seek if generate else None)  # only to learn what has to be asked
    scores = asked.scores(model, tokenizer, batch_tokens, progress)
    options: dict[str, Any] = {"batch_tokens": batch_tokens, "progress": progress}
    texts = _written(model, tokenizer, list(sought), max_new_tokens=GENERATED_TOKENS, **options)
    done = rows(lambda prompt, target: scores[prompt, target], texts.get if generate else None)
    if fluency:
        openings = list(dict.fromkeys(text for edit in edits for text in edit.generation))
        freely = {"top_k": 5, "seed": seed, "stop_at_line": False, "stop_at_end": False}
        texts = _written(model, tokenizer, openings, max_new_tokens=FLUENCY_TOKENS, **freely, **options)
        _add_fluency(done, edits, texts)
    remarks = tuple(f"{text} ({n} times)" for text, n in notes.items())
    return Evaluation(done, _summarise(done, [(edit.text, edit.target_new) for edit in edits], seed), remarks)


Ask = Callable[[str, Target], Score]
_UNKNOWN = Score(0.0, (0,), (0,))


class _Recorder:
    """Stands in for a model's answers to find out which ones are needed."""

    def __init__(self) -> None:
        self.targets: dict[str, dict[Target, None]] = {}

    def __call__(self, prompt: str, target: Target) -> Score:
        self.targets.setdefault(prompt, {})[target] = None
        return _UNKNOWN

    def scores(
        self, model: Any, tokenizer: Any, batch_tokens: int | None, progress: bool
    ) -> dict[tuple[str, Target], Score]:
        questions = [(prompt, tuple(targets)) for prompt, targets in self.targets.items()]
        found = score(model, tokenizer, questions, batch_tokens=batch_tokens, progress=progress)
        return {
            (prompt, target): one
            for (prompt, targets), scores in zip(questions, found, strict=True)
            for target, one in zip(targets, scores, strict=True)
        }


@dataclass
class _Row:
    """The figures of one edit, from answers that are asked for one by one.

    now: the model's score of (prompt, target); before: the unedited model's, or None
    text: what the model writes freely after a prompt; None: that is not measured
    """

    edit: Edit
    now: Ask
    before: Ask | None = None
    text: Callable[[str], Written | None] | None = None
    limit: int | None = None
    seed: int = 0
    portability: bool = True
    notes: dict[str, int] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        edit = self.edit
        self.kind = "question" if edit.kind == "completion" and edit.target_true is None else edit.kind
        self.row: dict[str, Any] = {"id": edit.id, "kind": self.kind}
        self.rival = self._rival()
        self._edited("", (edit.text,), "efficacy")
        self.row["target_probability"] = math.exp(-self.row["nll_new"])
        if edit.paraphrases:
            self._edited("paraphrase_", edit.paraphrases, "paraphrase")
        if self.limit != 0:
            self._unchanged()
        if self.portability and edit.portability:
            self._consequences()
        return self.row

    def _rival(self) -> str | None:
        """The answer that the new one is compared with by NLL."""
        edit = self.edit
        if self.kind == "completion":
            return edit.target_true
        if self.kind == "statement":
            if edit.target_new not in _TRUTH:
                raise ConfigError(
                    f"edit {edit.id!r}, a statement: target_new is {edit.target_new!r}, not 'True' or 'False'"
                )
            return _TRUTH[edit.target_new]
        return None

    def _edited(self, prefix: str, prompts: Sequence[str], name: str) -> None:
        """Prompts whose right answer is target_new."""
        row, edit = self.row, self.edit
        new = [self.now(prompt, edit.target(edit.target_new)) for prompt in prompts]
        right = [s.right for s in new]
        row[f"{prefix}nll_new"] = [s.nll for s in new]
        if self.rival is not None:
            old = [self.now(prompt, edit.target(self.rival)) for prompt in prompts]
            row[f"{prefix}nll_true"] = [s.nll for s in old]
            right = [float(n.nll < o.nll) for n, o in zip(new, old, strict=True)]
        row[name] = _mean(right)
        row[f"{name}_argmax"] = _mean([s.exact for s in new])
        if self.text is not None and self.kind == "question":
            row[f"{name}_generated"] = _mean([self._says(prompt, (edit.target_new,)) for prompt in prompts])
        if not prefix:  # one prompt: a number, not a list
            row |= {key: row[key][0] for key in ("nll_new", "nll_true") if key in row}

    def _unchanged(self) -> None:
        """What must be as before: neighbours, whose right answer is target_true, and locality questions."""
        edit, row = self.edit, self.row
        questions = list(edit.locality)
        if edit.target_true is not None and self.kind != "statement":
            gold = (edit.target_true,)
            questions += [
                Question(prompt, gold, "neighborhood", edit.target_prefix) for prompt in edit.neighborhood
            ]
        elif edit.neighborhood:
            self._note("neighbourhood prompts were left out: there is no target_true to score them by")
        if self.limit is not None and self.limit < len(questions):
            # Drawn by the edit's own name: the same sample in every evaluation of a sequence.
            questions = random.Random(f"{self.seed}/{edit.id}").sample(questions, self.limit)
        if self.kind == "completion":
            self._neighbours([q for q in questions if q.kind == "neighborhood" and q.answers])
            questions = [q for q in questions if q.kind != "neighborhood"]
        if not questions:
            return
        as_before: list[tuple[str, float]] = []
        by_data: list[float] = []
        for question in questions:
            kept, right = self._as_before(question)
            if kept is not None:
                as_before.append((question.kind, kept))
            if right is not None:
                by_data.append(right)
        name = "specificity" if self.kind != "completion" else "locality"
        if as_before:
            row[name] = _mean([kept for _, kept in as_before])
            self._by_kind("locality", as_before)
        elif self.before is None:
            self._note(f"{name} compares with the unedited model: pass baseline=take_baseline(…)")
        if by_data:
            row["specificity_gold"] = _mean(by_data)

    def _neighbours(self, questions: Sequence[Question]) -> None:
        """The CounterFact way: the prompt's own answer must stay likelier than target_new."""
        row, new = self.row, self.edit.target_new
        if not questions:
            return
        pairs = [
            (self.now(q.prompt, q.target(q.answers[0])), self.now(q.prompt, q.target(new))) for q in questions
        ]
        row["neighborhood_nll_true"] = [true.nll for true, _ in pairs]
        row["neighborhood_nll_new"] = [other.nll for _, other in pairs]
        row["specificity"] = _mean([true.nll < other.nll for true, other in pairs])
        if self.before is not None:
            row["specificity_argmax"] = _mean(
                [
                    true.predicted == self.before(q.prompt, q.target(q.answers[0])).predicted
                    for (true, _), q in zip(pairs, questions, strict=True)
                ]
            )

    def _as_before(self, question: Question) -> tuple[float | None, float | None]:
        """(share equal to the unedited model's, share right by the data), each None where unknown."""
        prompt = question.prompt
        if self.kind == "statement":
            judged = self._judges_true(self.now, question)
            kept = None
            if self.before is not None:
                kept = float(judged == self._judges_true(self.before, question) and judged is not None)
            return kept, float(judged == (question.answers[0] == "True")) if question.answers else None
        if not question.answers:
            self._note("locality questions without an answer were left out: there are no tokens to force")
            return None, None
        gold = question.target(question.answers[0])
        now = self.now(prompt, gold)
        if self.before is None:
            return None, now.right
        before = self.before(prompt, gold)
        if now is not _UNKNOWN and before.target != now.target:
            raise ConfigError(f"the baseline was taken with another tokenizer (prompt {prompt!r})")
        same = [a == b for a, b in zip(now.predicted, before.predicted, strict=False)]
        return _mean(same), now.right

    def _consequences(self) -> None:
        edit, row = self.edit, self.row
        shares: list[tuple[str, float]] = []
        hops: list[bool] = []
        for question in edit.portability:
            if not question.answers:
                self._note("portability questions without an answer were left out")
            elif self.kind == "statement":
                right = self._judges_true(self.now, question) == (question.answers[0] == "True")
                shares.append((question.kind, float(right)))
            else:
                scores = [self.now(question.prompt, question.target(a)) for a in question.answers]
                shares.append((question.kind, scores[0].right))  # the best of many names would grow with them
                if question.kind == "multi_hop":
                    hops.append(any(s.exact for s in scores))
        if shares:
            row["portability"] = _mean([share for _, share in shares])
            self._by_kind("portability", shares)
        if hops:
            row["multi_hop"] = float(any(hops))
        if self.text is not None and self.kind != "statement" and shares:
            said = [(q.kind, self._says(q.prompt, q.answers)) for q in edit.portability if q.answers]
            row["portability_generated"] = _mean([right for _, right in said])
            if hops:
                row["multi_hop_generated"] = float(any(right for kind, right in said if kind == "multi_hop"))

    def _judges_true(self, ask: Ask, statement: Question) -> bool | None:
        """None: neither, as of a model that is broken."""
        true, false = (ask(statement.prompt, statement.target(word)).nll for word in ("True", "False"))
        return None if true == false else true < false

    def _says(self, prompt: str, answers: Iterable[str]) -> bool:
        written = self.text(prompt) if self.text is not None else None
        return written is not None and says(written, answers)

    def _by_kind(self, name: str, shares: Sequence[tuple[str, float]]) -> None:
        for kind in dict.fromkeys(kind for kind, _ in shares if kind):
            self.row[f"{name}.{kind}"] = _mean([share for k, share in shares if k == kind])

    def _note(self, text: str) -> None:
        self.notes[text] = self.notes.get(text, 0) + 1


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _written(model: Any, tokenizer: Any, prompts: Sequence[str], **options: Any) -> dict[str, Written]:
    return (
        dict(zip(prompts, generation.generate(model, tokenizer, prompts, **options), strict=True))
        if prompts
        else {}
    )


def _add_fluency(rows: Sequence[dict[str, Any]], edits: Sequence[Edit], texts: Mapping[str, Written]) -> None:
    weights = TermWeights(text for edit in edits for text in edit.reference_texts)
    for row, edit in zip(rows, edits, strict=True):
        if edit.generation:
            row["fluency"] = _mean([generation.fluency(texts[opening].text) for opening in edit.generation])
            if edit.reference_texts:
                made = " ".join(texts[opening].text for opening in edit.generation)
                row["consistency"] = weights.cosine(made, " ".join(edit.reference_texts))


def _summarise(
    rows: Sequence[dict[str, Any]], facts: Sequence[tuple[str, str]], seed: int
) -> dict[str, Metric]:
    """Means over edits with bootstrap intervals; the order of the edits does not matter.

    facts: (prompt, target) of each edit. MQuAKE makes some dozens of times: their rows are no independent samples.
    """
    order = sorted(range(len(rows)), key=lambda i: rows[i]["id"])
    rows = [rows[i] for i in order]
    numbers: dict[tuple[str, str], int] = {}
    groups = numpy.array([numbers.setdefault(facts[i], len(numbers)) for i in order])
    named = {name: None for name in METRICS} | {
        name: None for row in rows for name in sorted(row) if name.startswith(("locality.", "portability."))
    }
    present = [name for name in named if any(name in row for row in rows)]
    if not present:
        return {}
    values = numpy.array([[row.get(name, math.nan) for name in present] for row in rows])
    sampled = _resampled_means(values, groups, seed)
    means = dict(zip(present, numpy.nanmean(values, 0), strict=True))
    draws = dict(zip(present, sampled.T, strict=True))
    counts = dict(zip(present, (~numpy.isnan(values)).sum(0), strict=True))
    if all(name in means for name in THREE):
        for name, combine in (("average", _average), ("harmonic", _harmonic)):
            means[name] = combine(numpy.array([means[n] for n in THREE]))
            draws[name] = combine(numpy.stack([draws[n] for n in THREE]))
            counts[name] = min(counts[n] for n in THREE)
    metrics = {}
    for name in named:
        if name in means:
            low, high = numpy.nanpercentile(draws[name], [2.5, 97.5])
            metrics[name] = Metric(float(means[name]), float(low), float(high), int(counts[name]))
    return metrics


def _average(three: NDArray[Any]) -> NDArray[Any]:
    return three.mean(0)


def _harmonic(three: NDArray[Any]) -> NDArray[Any]:
    with numpy.errstate(divide="ignore"):
        return 3 / (1 / three).sum(0)


def _resampled_means(values: NDArray[Any], groups: NDArray[Any], seed: int) -> NDArray[Any]:
    """Means over edits, of which whole groups are drawn with replacement, [resamples, figures].

    values: [edits, figures], NaN where an edit has no such figure
    groups: [edits], the number of each edit's group, from 0 on
    """
    count = int(groups.max()) + 1
    generator = numpy.random.default_rng(seed)
    here, filled = numpy.zeros((count, values.shape[1])), numpy.zeros((count, values.shape[1]))
    numpy.add.at(here, groups, ~numpy.isnan(values))
    numpy.add.at(filled, groups, numpy.where(numpy.isnan(values), 0.0, values))
    means = []
    part = max(1, min(RESAMPLES, 2_000_000 // count))  # resamples at a time: 16 MB of drawn numbers
    for begin in range(0, RESAMPLES, part):
        size = min(part, RESAMPLES - begin)
        drawn = generator.integers(count, size=(size, count)) + count * numpy.arange(size)[:, None]
        times = numpy.bincount(drawn.ravel(), minlength=size * count).reshape(size, count).astype(float)
        with numpy.errstate(invalid="ignore"):
            means.append((times @ filled) / (times @ here))
    return numpy.concatenate(means)


def finite_or_none(value: Any) -> Any:
    """The same JSON value with None for every number that is not finite, which JSON cannot spell."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite_or_none(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_none(one) for one in value]
    return value
