"""What a table or figure of the paper is made of: the setting it runs on, and what it comes to."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d4s.edits import Edit
from d4s.figures.tables import frame_lines
from d4s.files import finite_or_none
from d4s.locate.covariance import Covariance
from d4s.measure.downstream import TaskScores
from d4s.models.causal_lm import CausalLM
from d4s.sequence.compare import compare
from d4s.sequence.comparison import Comparison
from d4s.study.retained import Retained

if TYPE_CHECKING:
    from pandas import DataFrame


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
    """What a protocol runs on.

    data: name → edits, as many as the largest count or more; `facts` are not edited
    texts: for the perplexity; None: the facts as sentences
    neighborhood_limit: neighbourhood prompts an edit that are scored on the way; None: as the protocol has it
    """

    name: str
    model: CausalLM
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
    texts: Sequence[str] | None = None
    neighborhood_limit: int | None = None

    @property
    def most(self) -> int:
        return self.counts[-1]

    @property
    def details(self) -> Path:
        """Folder of the sequences behind the figure."""
        return self.out / f"{self.name}-details"

    def file(self, suffix: str = "") -> Path:
        return self.out / f"{self.name}{suffix}.png"

    def compare(self, edits: Sequence[Edit], **options: Any) -> Comparison:
        """One edit a step, scored at the counts; the details are saved beside the figure."""
        if self.neighborhood_limit is not None:
            options["neighborhood_limit"] = self.neighborhood_limit
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
            out=self.details,
            **options,
        )
        found.save(self.details)
        return found

    def downstream(self) -> Callable[[], dict[str, float]]:
        """Scores of the model as it is: of the harness's tasks where they are named, else of facts not edited."""
        if not self.tasks:
            retained = Retained(self.model, self.tokenizer, self.facts, self.texts, seed=self.seed)
            return retained.facts if self.texts is None else retained
        return TaskScores(
            self.model,
            self.tokenizer,
            self.tasks,
            limit=self.task_limit,
            include_path=self.task_folder,
            seed=self.seed,
            **({"trust_task_code": True} if self.trust_task_code else {}),
        )


Judged = tuple["DataFrame", Verdict]


def broken_off(comparison: Comparison) -> tuple[list[bool], list[str]]:
    """What methods that broke off mean for D4S: it must not, and is better than those that do.

    Without a run of d4s nothing follows.
    """
    holds, said = [], []
    for method, why in comparison.collapsed.items():
        if "d4s" in comparison.results:
            holds.append(method != "d4s")
        said.append(f"{method} broke off ({why})")
    return holds, said


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def points(share: float) -> str:
    """A difference of shares in percentage points."""
    return f"{round(100 * share, 1) + 0.0:.1f} points"  # no −0.0
