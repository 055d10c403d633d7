"""What a sequence did, with the model that it left."""

from __future__ import annotations

from dataclasses import dataclass

from d4s.edits import Edit
from d4s.errors import ConfigError
from d4s.measure.metrics import Baseline
from d4s.methods import Editor
from d4s.models.causal_lm import CausalLM
from d4s.models.forward import evaluating
from d4s.sequence.record import Record


@dataclass(kw_only=True)
class Result(Record):
    """What a sequence did, with the model as it is now.

    model: the edited model, the object that went in
    edits: all that were to be made
    editor: goes on from here, or restores the original weights
    baseline: the unedited model's answers
    """

    model: CausalLM
    edits: tuple[Edit, ...]
    editor: Editor
    baseline: Baseline

    def restore(self) -> None:
        """The original weights back, bit for bit."""
        self.editor.restore()

    def consolidate(self) -> None:
        """Solves anew for all the edits made, as one batch from the original weights; methods that keep sums can (d4s,
        memit-seq, alphaedit, …).

        Keys at upper layers, which later edits below them had made stale, are fresh afterwards. The history is of
        the model before it: `evaluate` scores the new one. A failure leaves weights and sums as they were.
        Raises ConfigError for an editor of another method, and if no edit has been made.
        """
        made = {row["id"] for row in self.edits_table}
        again = getattr(self.editor, "consolidate", None)
        if again is None:
            raise ConfigError(f"{self.method} keeps nothing to consolidate; d4s does")
        if not made:
            raise ConfigError("no edit has been made, so there is nothing to consolidate; make one")
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
            self.columns,
            self.notes,
        )


def consolidate(result: Result) -> None:
    """`Result.consolidate`, as a function."""
    result.consolidate()
