"""The figures of one edit, from a model's answers; and which answers that takes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from d4s.edits import Edit, Question
from d4s.edits.spacing import Target, continuation
from d4s.errors import ConfigError
from d4s.models.causal_lm import CausalLM
from d4s.models.generation import Written, can_be_misspelt, is_exactly, misspelt, says
from d4s.models.scoring import Score, score

_TRUTH = {"True": "False", "False": "True"}

Ask = Callable[[str, Target], Score]
# (prompt, what it is to be exactly; None: all of it is wanted) → what the model writes behind the prompt
Text = Callable[[str, str | None], Written | None]
_UNKNOWN = Score(0.0, (0,), (0,))


class Recorder:
    """Stands in for a model's answers to find out which ones are needed."""

    def __init__(self) -> None:
        self.targets: dict[str, dict[Target, None]] = {}

    def __call__(self, prompt: str, target: Target) -> Score:
        self.targets.setdefault(prompt, {})[target] = None
        return _UNKNOWN

    def scores(
        self, model: CausalLM, tokenizer: Any, batch_tokens: int | None, progress: bool
    ) -> dict[tuple[str, Target], Score]:
        questions = [(prompt, tuple(targets)) for prompt, targets in self.targets.items()]
        found = score(model, tokenizer, questions, batch_tokens=batch_tokens, progress=progress)
        return {
            (prompt, target): one
            for (prompt, targets), scores in zip(questions, found, strict=True)
            for target, one in zip(targets, scores, strict=True)
        }


@dataclass
class Row:
    """The figures of one edit, from answers that are asked for one by one.

    now: the model's score of (prompt, target); before: the unedited model's, or None
    text: what the model writes freely after a prompt; None: that is not measured
    """

    edit: Edit
    now: Ask
    before: Ask | None = None
    text: Text | None = None
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
                    f"edit {edit.id!r}, a statement: target_new is {edit.target_new!r}, must be 'True' or 'False'"
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
        row[name] = mean(right)
        row[f"{name}_argmax"] = mean([s.exact for s in new])
        if self.text is not None and self.kind == "question":
            row[f"{name}_generated"] = mean([self._says(prompt, (edit.target_new,)) for prompt in prompts])
        if self.text is not None:
            target = edit.target(edit.target_new)
            row[f"{name}_exact"] = mean([self._is(prompt, target) for prompt in prompts])
            row[f"{name}_exact_strict"] = mean([self._is(prompt, target, strict=True) for prompt in prompts])
            if not prefix and can_be_misspelt(edit.target_new):
                self._misspelt(prompts[0])
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
            row[name] = mean([kept for _, kept in as_before])
            self._by_kind("locality", as_before)
        elif self.before is None:
            self._note(
                f"{name} compares with the unedited model: pass baseline=take_baseline(…) (--baseline FILE)"
            )
        if by_data:
            row["specificity_gold"] = mean(by_data)

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
        row["specificity"] = mean([true.nll < other.nll for true, other in pairs])
        if self.before is not None:
            row["specificity_argmax"] = mean(
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
            raise ConfigError(
                f"the baseline was taken with another tokenizer (prompt {prompt!r}); take it with this one"
            )
        same = [a == b for a, b in zip(now.predicted, before.predicted, strict=False)]
        return mean(same), now.right

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
            row["portability"] = mean([share for _, share in shares])
            self._by_kind("portability", shares)
        if hops:
            row["multi_hop"] = float(any(hops))
        if self.text is not None and self.kind != "statement" and shares:
            said = [(q.kind, self._says(q.prompt, q.answers)) for q in edit.portability if q.answers]
            row["portability_generated"] = mean([right for _, right in said])
            if hops:
                row["multi_hop_generated"] = float(any(right for kind, right in said if kind == "multi_hop"))

    def _judges_true(self, ask: Ask, statement: Question) -> bool | None:
        """None: neither, as of a model that is broken."""
        true, false = (ask(statement.prompt, statement.target(word)).nll for word in ("True", "False"))
        return None if true == false else true < false

    def _says(self, prompt: str, answers: Iterable[str]) -> bool:
        written = self.text(prompt, None) if self.text is not None else None
        return written is not None and says(written, answers)

    def _is(self, prompt: str, target: Target, *, strict: bool = False) -> bool:
        answer = continuation(prompt, target)
        written = self.text(prompt, answer) if self.text is not None else None
        return written is not None and is_exactly(written, (answer,), strict=strict)

    def _misspelt(self, prompt: str) -> None:
        row, edit = self.row, self.edit
        answer = continuation(prompt, edit.target(edit.target_new))
        written = self.text(prompt, answer) if self.text is not None else None
        found = None
        if written is not None and not is_exactly(written, (answer,)):
            found = misspelt(written, answer, () if edit.target_true is None else (edit.target_true,))
        row["target_misspelt"] = float(found is not None)
        if found is not None:
            row["misspelt_as"] = found

    def _by_kind(self, name: str, shares: Sequence[tuple[str, float]]) -> None:
        for kind in dict.fromkeys(kind for kind, _ in shares if kind):
            self.row[f"{name}.{kind}"] = mean([share for k, share in shares if k == kind])

    def _note(self, text: str) -> None:
        self.notes[text] = self.notes.get(text, 0) + 1


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
