"""Edits tried one by one on a model in memory: made, taken back, saved."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from d4s.change.closed_form import Rows
from d4s.edits import Edit
from d4s.errors import ConfigError, EditError
from d4s.files import whole
from d4s.interrupts import deferred
from d4s.journal.changes import changes_of
from d4s.journal.edits_card import write_edits_card
from d4s.journal.folder import now
from d4s.journal.patch import export_patch
from d4s.journal.sums import Standing, by_edit
from d4s.locate.covariance import Covariance, fingerprint_of
from d4s.locate.kept_targets import KeptTargets
from d4s.methods import Method, Preset, Step, Workbench, method_for
from d4s.methods.base import SumsOn
from d4s.methods.d4s import D4SEditor
from d4s.models.causal_lm import CausalLM
from d4s.models.forward import evaluating
from d4s.models.generation import generate_greedy
from d4s.models.loading import source_of
from d4s.models.scoring import Score, score


@dataclass
class Session:
    """A model that is edited with D4S one edit at a time, each of which can be taken back by itself.

    model: unedited at the start, and changed in place
    config, covariance, sums_on: as of `edit_sequence`
    tokens: that it writes at most when it is asked
    lines: whether what it writes may have several lines

    What each edit has put into the sums is kept, and taking one back puts in the others' anew (`d4s.journal.sums` says
    what exactly these are). After the last edit was taken back, the weights have the bits that they had before it, and
    without any edit those of the unedited model.
    Raises ConfigError for a method other than d4s, ModelError for a model that cannot be edited.
    """

    model: CausalLM
    tokenizer: Any
    config: Mapping[str, Any] | Method | Preset | None = None
    covariance: Covariance | None = None
    seed: int = 0
    tokens: int = 32
    lines: bool = False
    progress: bool = False
    sums_on: SumsOn = "auto"
    standing: Standing = field(init=False, default_factory=Standing)
    editor: D4SEditor | None = field(init=False, default=None)
    chosen: dict[str, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.bench = Workbench(
            self.model,
            self.tokenizer,
            covariance=self.covariance,
            sums_on=self.sums_on,
            seed=self.seed,
            progress=self.progress,
        )
        self.method = method_for("d4s", self.bench.anatomy, self.config)
        layers = self.method.value("layers")
        self.bench.anatomy.check_layers(layers)
        if self.method.searches_ahead:
            self.bench.targets = KeptTargets()  # a fact that is edited again is not searched again
        self._fingerprint = fingerprint_of(self.model)
        self._saved: list[str] = []

    # What it says

    def ask(self, prompt: str) -> str:
        """What the model writes greedily behind the prompt."""
        (said,) = generate_greedy(
            self.model, self.tokenizer, [prompt], max_new_tokens=self.tokens, stop_at_line=not self.lines
        )
        return said.strip()

    def probability(self, edit: Edit) -> float:
        """p(the whole new target) on the edit's prompt."""
        found = self._scored(edit)
        return math.exp(-found.nll * len(found.target))

    def mean_probability(self, edit: Edit) -> float:
        """exp(−mean NLL of the new target's tokens) on the edit's prompt, as a search tells it."""
        return math.exp(-self._scored(edit).nll)

    def _scored(self, edit: Edit) -> Score:
        ((found,),) = score(self.model, self.tokenizer, [(edit.text, (edit.target(edit.target_new),))])
        return found

    # What is done

    @property
    def made(self) -> list[Edit]:
        """All edits, in the order made, those taken back among them; the n-th is number n."""
        return [made.edit for made in self.standing.made.values()]

    @property
    def edits(self) -> list[Edit]:
        """Those that stand."""
        return self.standing.edits

    def stands(self, edit: Edit) -> bool:
        return edit.id not in self.standing.undone

    def edit(self, edit: Edit) -> Step:
        """Makes the edit. The first one decides what the configuration leaves open (`chosen`).

        Whatever breaks it off, Ctrl-C too, leaves the model and the sums as they were.
        Raises EditError, ModelError as `Editor.edit`.
        """
        number = len(self.standing.made) + 1
        if edit.id in self.standing.made:
            edit = replace(edit, id=f"{edit.id}-{number}")
        editor = self._begun(edit)
        try:
            with evaluating(self.model):
                step = editor.edit([edit])
            (made,) = by_edit([edit], editor.put, number)
            self.standing.add(made)
        except BaseException:
            self._put_again()
            raise
        return step

    def _begun(self, edit: Edit) -> D4SEditor:
        """The editor, made on the unedited model when the first edit is."""
        if self.editor is None:
            with evaluating(self.model):
                settled = self.method.settled(self.bench, [edit])
                editor = settled.editor(self.bench)
            assert isinstance(editor, D4SEditor)
            self.chosen = self.method.decided(settled)
            self.editor = editor
        return self.editor

    def undo(self, number: int | None = None) -> Edit:
        """Takes an edit back: the one of this number, or the last that stands. Returns it.

        Raises EditError where there is none.
        """
        made = self.made
        if number is None:
            if not (standing := self.edits):
                raise EditError("no edit stands, so none can be taken back; make one first")
            edit = standing[-1]
        elif not 1 <= number <= len(made):
            raise EditError(
                f"there is no edit {number}; " + (f"they are 1 to {len(made)}" if made else "none was made")
            )
        else:
            edit = made[number - 1]
        if not self.stands(edit):
            raise EditError(f"edit {number} was taken back already; name one that stands")
        before = self.standing.undone
        self.standing.change([edit.id], stand=False)
        try:
            self._put_again()
        except BaseException:
            self.standing.undone = before
            self._put_again()
            raise
        return edit

    def _put_again(self) -> None:
        """Sums and weights of the edits that stand, from what each has put in; from W0 on, so whatever was there."""
        editor = self.editor
        if editor is None:
            return
        with deferred(), evaluating(self.model):
            editor.restore()
            put: dict[str, list[Rows]] = {edit.id: [] for edit in self.edits}
            for place in self.standing.by_place:
                for (edit_id, _, _), rows in self.standing.rows(place, self.standing.undone).items():
                    put[edit_id].append(rows)
            for edit in self.edits:
                editor.make_again([edit], put[edit.id])
            if put:
                editor.write()

    # What is kept

    @property
    def unsaved(self) -> int:
        """Edits made or taken back since the model was last saved, or since the start."""
        return len({edit.id for edit in self.edits} ^ set(self._saved))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """As a patch, where the path ends in .safetensors, else as a new folder with the whole model.

        Raises EditError where no edit stands, ConfigError for a folder that holds something, OSError where it cannot
        be written.
        """
        place, edits = Path(path), self.edits
        if self.editor is None or not edits:
            raise EditError("no edit stands, so nothing can be saved; make one first")
        if place.suffix == ".safetensors":
            export_patch(changes_of(self), place, fingerprint=self._fingerprint, edits=edits)
        else:
            if place.exists() and (not place.is_dir() or any(place.iterdir())):
                raise ConfigError(
                    f"{place}: holds something already; name a new folder, or a file.safetensors for a patch"
                )
            if place.exists():
                place.rmdir()  # empty; what is written takes its place whole
            with whole(place) as beside:
                model: Any = self.model
                model.save_pretrained(beside)
                self.tokenizer.save_pretrained(beside)
                write_edits_card(
                    beside,
                    edits,
                    base_fingerprint=self._fingerprint,
                    base_name=source_of(model),
                    method=self.method.name,
                    when=now()["at"],
                )
        self._saved = [edit.id for edit in edits]
        return place
