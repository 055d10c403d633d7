"""What a figure is: its unit, which way is better, whether it has an interval. Every column's name stands here, once.

Whoever shows, compares or draws figures asks `column(name)` and takes no name apart. A `measure` of one's own
declares its columns the same way: a mapping name → Column as its attribute `columns`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, get_args

from d4s import files
from d4s.errors import ConfigError, unknown_name

Unit = Literal[
    "share",  # of questions, edits, tokens: 0 to 1, and told in percent
    "probability",  # 0 to 1
    "cosine",  # -1 to 1
    "ratio",  # growth, 0: none
    "count",
    "seconds",
    "nats",
    "bits",
    "perplexity",
    "norm",
    "text",
    "unknown",  # of a measure that says nothing about its columns
]
Better = Literal["up", "down", "neither"]
# Where it shows: in every summary and by itself in figures; in summaries of methods; in tables; in the row alone.
Shown = Literal["headline", "summary", "table", "row"]
Origin = Literal["evaluation", "sequence", "table", "measure"]
Bound = Literal["", "low", "high", "unedited"]

_STORED_TEXTS = ("unit", "better", "meaning", "shown")


@dataclass(frozen=True)
class Column:
    """A column of history rows, evaluations and tables.

    name: as it stands in a row; <words> in it stand for any text, <layer> for a number: "l1_norm.<layer>"
    unit, better: of its figures, and the way they are to go
    meaning: in a few words
    interval: beside <name> there may be <name>.low and <name>.high, over edits or over seeds. Not of clocks, which
        are the machine's
    unedited: beside <name> there may be <name>.unedited, the unedited model's on the same edits and prompts
    origin: who gives it: an evaluation, the sequence, a table of sequences, or a `measure`
    bound: of a column that belongs to another one, what it is of `stem`: "low", "high" or "unedited"
    family, member: of a column that is one of many, as it was declared and what is its own: "l1_norm.<layer>", "3"

    Raises ConfigError for a unit, a direction or a place that does not exist.
    """

    name: str
    unit: Unit
    better: Better = "neither"
    meaning: str = ""
    shown: Shown = "table"
    interval: bool = True
    unedited: bool = False
    origin: Origin = "measure"
    bound: Bound = ""
    stem: str = ""
    family: str = ""
    member: str = ""

    def __post_init__(self) -> None:
        for name, known in (("unit", Unit), ("better", Better), ("shown", Shown)):
            if getattr(self, name) not in get_args(known):
                said = unknown_name(f"{name} of a column", str(getattr(self, name)), get_args(known))
                raise ConfigError(f"{self.name}: {said}")
        if not self.stem:
            object.__setattr__(self, "stem", self.name)

    @property
    def is_share(self) -> bool:
        return self.unit == "share"

    @property
    def is_clock(self) -> bool:
        """Whether it is the machine's time, which no seed changes."""
        return self.unit == "seconds"

    @property
    def in_tables(self) -> bool:
        """Whether tables of results show it: no figure of a single layer, of one kind of question, or a clock."""
        return self.shown != "row"

    @property
    def layer(self) -> int | None:
        """The edited layer whose figure it is."""
        return int(self.member) if self.family.endswith("<layer>") else None

    @property
    def factor(self) -> int:
        """What its figures are multiplied by before they are told or drawn: shares are in percent."""
        return 100 if self.is_share else 1

    @property
    def symbol(self) -> str:
        """Its unit as it stands behind a figure; empty: nothing does."""
        return {"share": "%", "bits": "bits"}.get(self.unit, "")

    @property
    def title(self) -> str:
        """Its name in a table's head."""
        return self.name.replace("_", " ")

    @property
    def axis(self) -> str:
        """Its name beside an axis or a colour bar."""
        return f"{self.name} (%)" if self.is_share else self.name

    def to_dict(self) -> dict[str, Any]:
        """JSON values of what was declared of it."""
        return {name: getattr(self, name) for name in (*_STORED_TEXTS, "interval", "unedited")}

    @staticmethod
    def from_dict(name: str, value: Any, place: str) -> Column:
        """The inverse of `to_dict`. Raises WrongType, naming the place, for what it did not make."""
        stored = dict(files.as_object(value, place))
        texts = [files.as_text(stored.pop(field, None), f"{place}, {field}") for field in _STORED_TEXTS]
        flags = [stored.pop(field, None) for field in ("interval", "unedited")]
        if stored or not all(isinstance(flag, bool) for flag in flags):
            raise files.WrongType(f"{place} is no column")
        unit, better, meaning, shown = texts
        for text, known in ((unit, Unit), (better, Better), (shown, Shown)):
            if text not in get_args(known):
                raise files.WrongType(f"{place} has {text!r}, which is none of {', '.join(get_args(known))}")
        interval, unedited = flags
        return Column(name, unit, better, meaning, shown, interval, unedited)  # type: ignore[arg-type]

    def spelled(self, value: float, digits: int = 1) -> str:
        """A figure as text: a share in percent with these decimals, any other one as it is."""
        return f"{100 * value:.{digits}f} %" if self.is_share else f"{value:.4g}"


def _evaluation(
    name: str, unit: Unit, meaning: str, shown: Shown = "table", unedited: bool = False
) -> Column:
    return Column(name, unit, "up", meaning, shown, unedited=unedited, origin="evaluation")


# In the order in which evaluations tell them.
_EVALUATION = (
    _evaluation(
        "efficacy",
        "share",
        "NLL(new) < NLL(true); questions: target tokens right, teacher-forced",
        "headline",
        True,
    ),
    _evaluation("paraphrase", "share", "the same on the paraphrases", "headline", True),
    _evaluation(
        "specificity",
        "share",
        "neighbours: NLL(true) < NLL(new); questions: tokens as the unedited model's",
        "headline",
        True,
    ),
    _evaluation("average", "share", "mean of the three", "headline", True),
    _evaluation("harmonic", "share", "harmonic mean of the three", "headline"),
    _evaluation("efficacy_argmax", "share", "greedy argmax is the whole target", "summary", True),
    _evaluation("paraphrase_argmax", "share", "the same on the paraphrases", "summary", True),
    _evaluation(
        "specificity_argmax", "share", "neighbours: argmax answer as the unedited model's", "summary", True
    ),
    _evaluation("specificity_gold", "share", "what must not change: right by the data, teacher-forced"),
    _evaluation("efficacy_generated", "share", "questions: free greedy generation, exact match"),
    _evaluation("paraphrase_generated", "share", "the same on the paraphrases"),
    _evaluation(
        "efficacy_exact",
        "share",
        "free greedy text, up to its end, full stop, line or 32 tokens, is the target; normalised",
        "summary",
    ),
    _evaluation("paraphrase_exact", "share", "the same on the paraphrases", "summary"),
    _evaluation("efficacy_exact_strict", "share", "the same without normalisation, but for outer blanks"),
    _evaluation("paraphrase_exact_strict", "share", "the same on the paraphrases"),
    Column(
        "target_misspelt",
        "share",
        "down",
        "free greedy text: nearly the target's spelling, and not the target; of names from four letters on",
        origin="evaluation",
    ),
    _evaluation("portability", "share", "consequences: tokens of the first answer right, teacher-forced"),
    _evaluation("portability_generated", "share", "consequences: free greedy generation, exact match"),
    _evaluation("multi_hop", "share", "any of the multi-hop questions wholly right, teacher-forced"),
    _evaluation("multi_hop_generated", "share", "any of them right in free greedy generation, exact match"),
    _evaluation("locality", "share", "completions: locality tokens as the unedited model's"),
    _evaluation("target_probability", "probability", "exp(−NLL(new)) on the edit prompt"),
    _evaluation("fluency", "bits", "bi- and trigram entropy of 100 generated tokens"),
    _evaluation("consistency", "cosine", "TF-IDF cosine of generated and reference texts"),
)
_KINDS = (
    _evaluation("locality.<kind>", "share", "locality or specificity of questions of one kind", "row"),
    _evaluation("portability.<kind>", "share", "portability of questions of one kind", "row"),
)


def _nll(name: str, meaning: str, better: Better = "neither") -> Column:
    return Column(name, "nats", better, meaning, "row", interval=False, origin="evaluation")


def _share(name: str, meaning: str) -> Column:
    return Column(name, "share", "up", meaning, "row", interval=False, origin="evaluation")


def _label(name: str, meaning: str, origin: Origin, shown: Shown = "row") -> Column:
    return Column(name, "text", meaning=meaning, shown=shown, interval=False, origin=origin)


# Of one edit's row, behind the figures that are averaged.
_BY_EDIT = (
    _label("id", "the edit's", "evaluation"),
    _label("kind", "of the edit", "evaluation"),
    _label("same_as", "an earlier edit of the same fact, if there is one", "evaluation"),
    _share("ended", "of a target that is to end: asked freely, the model says that alone"),
    _label("misspelt_as", "what the free greedy text has for the target, where it is misspelt", "evaluation"),
    _nll("nll_new", "mean over the new target's tokens, on the edit prompt", "down"),
    _nll("nll_true", "mean over the true target's tokens, on the edit prompt"),
    _nll("paraphrase_nll_new", "the new target's, a paraphrase each", "down"),
    _nll("paraphrase_nll_true", "the true target's, a paraphrase each"),
    _nll("neighborhood_nll_true", "the true answer's, a neighbour each"),
    _nll("neighborhood_nll_new", "the new target's, a neighbour each"),
)


def _sequence(name: str, unit: Unit, meaning: str, shown: Shown, **fields: Any) -> Column:
    return Column(name, unit, meaning=meaning, shown=shown, origin="sequence", **fields)


_SEQUENCE = (
    _sequence("step", "count", "edits made so far", "row", interval=False),
    _sequence(
        "original_efficacy", "share", "efficacy of each edit right after its own step", "table", better="up"
    ),
    _sequence(
        "original_paraphrase",
        "share",
        "paraphrase of each edit right after its own step",
        "table",
        better="up",
    ),
    _sequence("l1_growth", "ratio", "mean relative growth of mean |w| over the edited layers", "table"),
    _sequence("l1_norm.<layer>", "norm", "mean |w| of an edited layer", "row"),
    _sequence(
        "routing_change",
        "share",
        "mixtures of experts: neighbours' tokens whose set of experts is not the unedited model's",
        "table",
        better="down",
        interval=False,
    ),
    _sequence("delta_norm.<layer>", "norm", "‖W − W0‖ of an edited layer, Frobenius", "row"),
    _sequence("seconds", "seconds", "since the start", "row", better="down", interval=False),
    _sequence("edit_seconds", "seconds", "without evaluations", "row", better="down", interval=False),
    _sequence("first_probability", "probability", "p(target) as its search begins", "row"),
    _sequence("last_probability", "probability", "p(target) as its search ends", "row", better="up"),
    _sequence("written_probability", "probability", "p(target) right after the step", "row", better="up"),
)
_TABLE = (
    _label("method", "its label", "table", "table"),
    _label("seed", "of contexts, samples and intervals", "table", "table"),
    Column("edits", "count", meaning="made so far", interval=False, origin="table"),
    Column("seconds_an_edit", "seconds", "down", "without evaluations", interval=False, origin="table"),
    _label("interval", "what the bounds are taken over", "table", "table"),
    _label("collapsed", "where and why a sequence broke off", "table", "table"),
)


def _harness(unit: Unit, better: Better, *names: str) -> list[Column]:
    """Scores of lm-evaluation-harness, with a filter's name behind them or without."""
    return [
        Column(f"<task> {name}{more}", unit, better, "lm-evaluation-harness's")
        for name in names
        for more in ("", " (<filter>)")
    ]


# What the measures of d4s itself give. The harness's other scores may be of anything, in percent already too.
_MEASURED = (
    Column("retained", "share", "up", "facts that were not edited and are answered right"),
    Column("text_perplexity", "perplexity", "down", "of text that no edit is about"),
    Column("right.<fact>", "count", "up", "1: this fact is answered right; 0: it is not", "row"),
    *_harness(
        "share", "up", "acc", "acc_norm", "acc_bytes", "acc_mutual_info", "acc_all", "exact_match", "em"
    ),
    *_harness("perplexity", "down", "perplexity", "word_perplexity", "byte_perplexity"),
    *_harness("bits", "down", "bits_per_byte"),
)

COLUMNS: dict[str, Column] = {
    one.name: one for one in (*_EVALUATION, *_KINDS, *_BY_EDIT, *_SEQUENCE, *_TABLE, *_MEASURED)
}
METRICS: dict[str, Column] = {one.name: one for one in _EVALUATION}
HEADLINES: tuple[str, ...] = tuple(one.name for one in _EVALUATION if one.shown == "headline")
THREE = HEADLINES[:3]  # that average and harmonic are means of

_BOUNDS: tuple[Bound, ...] = ("low", "high", "unedited")
_NO_COLUMNS: Mapping[str, Column] = {}


def column(name: object, own: Mapping[str, Column] = _NO_COLUMNS) -> Column:
    """What the column of this name is.

    own: columns that a `measure` has declared; they come before those of d4s
    A name that nobody has declared is of unit "unknown", a measure's, and shown as its figures are.
    """
    text = str(name)
    if found := own.get(text) or COLUMNS.get(text) or _member(text, own):
        return found
    stem, _, end = text.rpartition(".")
    for bound in _BOUNDS:
        if stem and end == bound:
            whole = column(stem, own)
            # A level beside a figure, not a result; and so are its own bounds, over seeds.
            level = bound == "unedited"
            return replace(
                whole,
                name=text,
                bound=bound,
                stem=stem,
                better="neither" if level else whole.better,
                shown="row" if level else whole.shown,
                unedited=False,
                interval=level,
            )
    # A point in the name of an undeclared figure marks it as one of many, which tables leave out.
    return Column(text, "unknown", shown="row" if "." in text else "table")


def declared(measure: Callable[[], Mapping[str, float]] | None) -> dict[str, Column]:
    """The columns that a measure declares: its attribute `columns`, or that of the object whose method it is.

    Raises ConfigError where they are no mapping name → Column, or a name is not its column's.
    """
    owner = getattr(measure, "__self__", measure)
    columns = getattr(measure, "columns", None) or getattr(owner, "columns", None) or {}
    if not isinstance(columns, Mapping) or not all(isinstance(one, Column) for one in columns.values()):
        raise ConfigError(
            "the columns of a measure must be a mapping name → Column, as "
            '{"loss": Column("loss", "nats", "down")}'
        )
    for name, one in columns.items():
        if one.name != name:
            raise ConfigError(
                f"the columns of a measure: under {name!r} stands the column {one.name!r}; must be of that name"
            )
    return dict(columns)


def measured_columns(
    names: Iterable[str], measure: Callable[[], Mapping[str, float]] | None
) -> dict[str, Column]:
    """Name → Column of the figures that a measure gave, of those that are not what their names say without it."""
    own = declared(measure)
    given = (replace(column(name, own), origin="measure") for name in names)
    return {one.name: one for one in given if not one.bound and one != column(one.name)}


def is_share(name: object, own: Mapping[str, Column] = _NO_COLUMNS) -> bool:
    """Whether the figure of this name is known to lie between 0 and 1, and is told in percent."""
    return column(name, own).is_share


def spelled(name: object, value: float, digits: int = 1, own: Mapping[str, Column] = _NO_COLUMNS) -> str:
    """A figure as text: a share in percent with these decimals, any other one as it is."""
    return column(name, own).spelled(value, digits)


def layers(names: Iterable[object], family: str = "l1_norm.<layer>") -> dict[int, str]:
    """Layer → the name of its figure, ascending, of the columns that are of this family; bounds are no layers."""
    found = [one for one in map(column, names) if one.family == family and not one.bound]
    return {one.layer: one.name for one in sorted(found, key=lambda c: c.layer or 0) if one.layer is not None}


def _member(name: str, own: Mapping[str, Column]) -> Column | None:
    """The column of the family that the name is one of."""
    # "efficacy.low" is the bound of a figure, not a member: families do not end in bounds.
    if name.rpartition(".")[2] in _BOUNDS:
        return None
    for declared_columns in (own, COLUMNS):
        for family, one in declared_columns.items():
            if "<" in family and (match := _pattern(family).fullmatch(name)):
                return replace(one, name=name, stem=name, family=family, member=match[1])
    return None


@lru_cache
def _pattern(family: str) -> re.Pattern[str]:
    parts = re.split(r"(<[^<>]+>)", family)
    return re.compile(
        "".join(_placeholder(part) if part.startswith("<") else re.escape(part) for part in parts)
    )


def _placeholder(word: str) -> str:
    return {"<layer>": r"(\d+)", "<task>": r"(\S+)"}.get(word, "(.+)")
