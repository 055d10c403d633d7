"""A journal as its user sees it: what was done, taken back, done again, checked, and the weights that it comes to."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from d4s.change.closed_form import Rows
from d4s.change.expert_form import JointForm
from d4s.edits import Edit
from d4s.edits.edit import AGAIN, pass_of
from d4s.errors import ConfigError, D4SError, DataError, EditError, ModelError
from d4s.files import whole
from d4s.interrupts import deferred
from d4s.journal.changes import Change, changes_within, same_bits
from d4s.journal.edits_card import write_edits_card
from d4s.journal.folder import Folder, now
from d4s.journal.lora import Adapter, export_gguf_lora, export_lora
from d4s.journal.patch import export_patch
from d4s.journal.sums import Standing, Sums, edits_of, packed
from d4s.locate.covariance import Covariance, fingerprint_of
from d4s.locate.kept_targets import KeptTargets
from d4s.methods import METHODS, Editor, Step, Workbench
from d4s.methods.base import SumsOn
from d4s.methods.d4s import D4SEditor
from d4s.models.architectures import Architecture
from d4s.models.causal_lm import CausalLM, parameters_by_name
from d4s.models.forward import evaluating
from d4s.models.loading import load_model

if TYPE_CHECKING:
    from pandas import DataFrame

# The parameter of all experts' matrices, and as which weights saved models may have it, expert by expert.
_TOGETHER = "mlp.experts.down_proj"
_APART = (("mlp.experts", "down_proj.weight"), ("block_sparse_moe.experts", "w2.weight"))
WORTH_WITHIN = 1e-6  # relative: what two ways of rebuilding Δ may differ by


@dataclass(frozen=True)
class Verification:
    """What `Journal.verify` found.

    checked: what was looked at, in words; problems: what is wrong, in words
    difference: of Δ rebuilt from vectors alone and by snapshots, relative; None: there are no vectors
    """

    checked: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    difference: float | None = None

    @property
    def sound(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        return "\n".join([*self.checked, *(f"WRONG: {text}" for text in self.problems)])


class _NoWeightsError(DataError):
    """Of a method that changes none."""


@dataclass
class Journal:
    """The journal in a folder, as `edit_sequence(journal=…)` and `d4s edit --out` write it.

    What changes it is durable when it returns, and refused while another process writes.
    Raises DataError for a folder that is no journal, or whose head or log is damaged.
    """

    path: Path
    folder: Folder = field(init=False, repr=False)
    _sums: Sums | None = field(default=None, init=False, repr=False)

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path, self._sums = Path(path), None
        self.folder = Folder.open(self.path)

    @property
    def head(self) -> Mapping[str, Any]:
        """What the sequence is (docs/formats/journal.md)."""
        return self.folder.head

    @property
    def sums(self) -> Sums:
        """Rebuilt when first asked for. DataError where the method keeps none, or a file is missing or damaged."""
        if self._sums is None:
            self._sums = Sums(self.folder)
        return self._sums

    @property
    def edits(self) -> list[Edit]:
        """The edits that stand, in the order in which they were made."""
        return self._standing().edits

    def _standing(self) -> Standing:
        """Which edits stand, by the log alone."""
        if self._sums is not None:
            return self._sums.standing
        return standing_of(self.folder)

    # What was done

    def log(self) -> list[dict[str, Any]]:
        """A row an edit, in the order made: id, prompt, subject, target_new, at, by, step, stands.

        Where its step told them: first_probability and last_probability, before and after a target's search. Where it
        was tested right after its step: written_probability, efficacy, paraphrase.
        """
        standing = self._standing()
        rows: list[dict[str, Any]] = []
        for event in self.folder.events:
            if event["kind"] in ("step", "revised"):
                for i, edit in enumerate(edits_of(event, self.folder)):
                    row = {
                        "id": edit.id,
                        "prompt": edit.prompt,
                        "subject": edit.subject,
                        "target_new": edit.target_new,
                        "target_true": edit.target_true,
                        # Of a merged journal when it was made there.
                        "at": event.get("made_at", event.get("at")),
                        "by": event.get("by"),
                        "step": event["step"],
                        "stands": edit.id not in standing.undone,
                        "revises": event.get("id"),
                    }
                    for name in ("first_probability", "last_probability"):
                        if event.get(name) is not None:
                            row[name] = event[name][i]
                    rows.append(row)
            elif event["kind"] == "tested":
                tested = rows[-len(event["written_probability"]) :]
                for i, row in enumerate(tested):
                    for name in ("written_probability", "efficacy", "paraphrase"):
                        row[name] = event[name][i]
        return rows

    def to_frame(self) -> DataFrame:
        """`log` as a DataFrame."""
        import pandas

        return pandas.DataFrame(self.log())

    # What is changed

    def undo(self, ids: str | Iterable[str]) -> None:
        """The edits no longer stand: sums and weights are what the other edits put into them. One that a later pass has
        made again is taken back with what that made; its "<id>~2" alone may be named too.

        O(d²) an edit, whatever the number of edits; with experts O(n³) for n edits. What is exact is said in
        `d4s.journal.sums`.
        Raises EditError for an edit that was not made or was undone already; nothing is changed then.
        """
        self._change(ids, stand=False)

    def redo(self, ids: str | Iterable[str]) -> None:
        """Edits that were undone stand again. Raises EditError for one that stands; nothing is changed then."""
        self._change(ids, stand=True)

    def _change(self, ids: str | Iterable[str], *, stand: bool) -> None:
        named = [ids] if isinstance(ids, str) else list(dict.fromkeys(ids))
        if not named:
            raise EditError("no edit was named; the journal's log has their ids (d4s log)")
        with self._writing():
            again, standing = self._again(named, stand=not stand), self._standing()
            for_it = {standing.made[one].edit.tags[AGAIN] for one in again}
            # Of one that was left out in favour of what a later pass has made, that alone is meant.
            named = [one for one in named if one not in standing.dropped or one not in for_it]
            named = list(dict.fromkeys([*named, *again]))
            self.sums.change(named, stand=stand)
            self.sums.settle_()  # fails, if it does, before anything is written
            self.folder.append_with_snapshot("redone" if stand else "undone", self.sums.snapshot(), ids=named)

    def _again(self, ids: Collection[str], *, stand: bool) -> list[str]:
        """Edits by which a later pass has made these again, of those that stand, or do not."""
        standing, first = self._standing(), set(ids)
        return [
            made
            for made, one in standing.made.items()
            if one.edit.tags.get(AGAIN) in first and (made not in standing.undone) == stand
        ]

    def revise(
        self,
        edit_id: str,
        target_new: str,
        *,
        model: CausalLM | None = None,
        tokenizer: Any = None,
        covariance: Covariance | str | os.PathLike[str] | None = None,
        sums_on: SumsOn = "auto",
    ) -> Edit:
        """The edit no longer stands, and one with another target is made in its place; returns that.

        model, tokenizer: the unedited ones, on which its target is searched; None: loaded from where the journal's came
            from. The model holds all edits that stand afterwards
        covariance: key statistics, where the method has any; None: those of the cache
        sums_on: as of `edit_sequence`

        A failure leaves the journal as it was, and a given model unedited.
        """
        with self._writing():
            new = self._revised(edit_id, target_new)
            self.sums.change([edit_id], stand=False)
            self.sums.settle_()
            with self._editing(model, tokenizer, covariance, sums_on) as editor:
                self.sums.give(editor.closed_form)
                editor.hold(self.sums.standing.edits)
                editor.write()
                made = editor.edit([new])
                self._keep_revised(edit_id, new, made, editor)
        return new

    def _revised(self, edit_id: str, target_new: str) -> Edit:
        """The edit with another target, under an id of its own. EditError for one that a later pass has made again."""
        standing = self._standing()
        old = standing.get(edit_id).edit
        if again := self._again([edit_id], stand=True):
            raise EditError(
                f"edit {edit_id!r} was made again as {again[-1]!r}; revise that, or undo it first (d4s undo)"
            )
        tags = {name: value for name, value in old.tags.items() if name != AGAIN}
        record = {k: v for k, v in old.to_dict().items() if k not in ("id", "tags")}
        record |= {"target_new": target_new, "tags": tags}
        new = Edit.from_dict(record)
        return (
            Edit.from_dict(record | {"id": f"{new.id}-{len(standing.made)}"})
            if new.id in standing.made
            else new
        )

    def _keep_revised(self, edit_id: str, new: Edit, made: Step, editor: D4SEditor) -> None:
        with deferred():
            put, state = self._taken_in(editor)
            number = self._segment(put)
            self.folder.append_with_snapshot(
                "revised",
                state,
                id=edit_id,
                edits=[new.to_dict()],
                step=number,
                first_probability=list(made.first_probability),
                last_probability=list(made.last_probability),
            )
            self._sums = None

    def consolidate(
        self,
        *,
        model: CausalLM | None = None,
        tokenizer: Any = None,
        covariance: Covariance | str | os.PathLike[str] | None = None,
        sums_on: SumsOn = "auto",
    ) -> None:
        """Keys and residuals of all edits that stand are taken anew and solved for as one batch: what undoing and later
        edits below them had made stale is fresh. Of several edits of one prompt the last counts.

        Arguments and what a failure leaves as of `revise`.
        """
        with self._writing():
            batch = list({edit.place: edit for edit in self.edits}.values())
            if not batch:
                raise EditError(
                    "no edit stands, so there is nothing to consolidate; make one, or bring one back (d4s redo)"
                )
            _ = self.sums  # the journal must have them
            with self._editing(model, tokenizer, covariance, sums_on) as editor:
                editor.announce(batch)
                editor.edit(batch)
                with deferred():
                    put, state = self._taken_in(editor)
                    number = self._segment(put)
                    self.folder.append_with_snapshot(
                        "consolidated", state, ids=[edit.id for edit in batch], step=number
                    )
                    self._sums = None

    @contextmanager
    def _editing(
        self, model: CausalLM | None, tokenizer: Any, covariance: Any, sums_on: SumsOn
    ) -> Iterator[D4SEditor]:
        """The sequence's editor on the unedited model, which a failure leaves unedited."""
        model, tokenizer = self._unedited(model, tokenizer)
        with evaluating(model):
            editor = self._summing_editor(model, tokenizer, covariance, sums_on)
            try:
                yield editor
            except BaseException:
                editor.restore()
                raise

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """This process alone; a failure leaves the journal as the log says, and its sums are built anew."""
        self.folder.lock()
        try:
            known = self.folder.events
            self.folder.reread()
            if self.folder.events != known:
                self._sums = None
            yield
        except BaseException:
            self._sums = None
            raise
        finally:
            self.folder.unlock()

    def _segment(self, put: Sequence[Rows]) -> int:
        """Vectors of a step of their own; its number."""
        used = [
            int(e["step"])
            for e in self.folder.events
            if e["kind"] in ("step", "segment", "revised", "consolidated")
        ]
        number = max(used, default=0) + 1
        self.folder.add_segment(number, number, packed({number: put}))
        return number

    def _taken_in(self, editor: D4SEditor) -> tuple[Sequence[Rows], dict[str, Tensor]]:
        """(what the editor has put in, as segments hold it, and the snapshot with it).

        The editor's own sums, not those rows put in anew: in another order they round to another last bit, and the
        journal's weights would not be those that the model holds.
        """
        if not isinstance(editor.closed_form, JointForm):
            return editor.put, editor.closed_form.snapshot()
        return self.sums.with_rows_of(editor.closed_form, editor.put, editor.weights.current())

    def _unedited(self, model: CausalLM | None, tokenizer: Any) -> tuple[CausalLM, Any]:
        if model is None:
            source = self.head["source"]
            if not source:
                raise ConfigError(
                    f"{self.path} does not say what its model was loaded from; give model and tokenizer"
                )
            model, tokenizer = load_model(source, dtype=self.head["dtype"])
        if (mine := fingerprint_of(model)) != self.head["model"]:
            raise ModelError(
                f"the model is not the unedited one of {self.path} (weights {self.head['model'][:12]}, this one "
                f"{mine[:12]}), or not in its type, {self.head['dtype']}; load that one"
            )
        return model, tokenizer

    def _summing_editor(self, model: CausalLM, tokenizer: Any, covariance: Any, sums_on: SumsOn) -> D4SEditor:
        editor = self._editor(model, tokenizer, covariance, sums_on)
        if not isinstance(editor, D4SEditor):
            raise DataError(f"{self.path}: {self.head['method']} keeps no sums, which this needs")
        return editor

    def _editor(self, model: CausalLM, tokenizer: Any, covariance: Any, sums_on: SumsOn) -> Editor:
        """As the sequence's, on the unedited model."""
        cls = METHODS[self.head["method"]]
        fields = {**self.head["config"], **self.head["chosen"]}
        seed = int(self.head["schedule"]["seed"])
        given = self.head.get("architecture")  # earlier versions did not keep it
        try:
            architecture = None if given is None else Architecture.from_dict(given)
        except (TypeError, ValueError) as error:
            raise DataError(f"{self.path / 'journal.json'}: architecture: {error}") from None
        bench = Workbench(
            model, tokenizer, covariance=covariance, architecture=architecture, sums_on=sums_on, seed=seed
        )
        target = fields.pop("target", None)
        method = cls.preset(bench.anatomy).changed(fields | ({} if target is None else {"target": target}))
        if method.searches_ahead and any(pass_of(edit) > 1 for edit in self.edits):
            bench.targets = KeptTargets()  # what is made again is not searched again, as in the sequence
        editor = method.editor(bench)
        if bench.statistics_digest(editor.weights.layers) != self.head["statistics"]:
            raise ConfigError(
                f"the key statistics are not those of {self.path}; give the file that its sequence was made with "
                "(covariance)"
            )
        return editor

    # What it comes to

    def weights(self) -> dict[str, Tensor]:
        """W of every edited weight, by its name in the model, as the model stores it."""
        summed = self.folder.place("priors").exists()
        found = self.sums.weights() if summed else self._of_snapshot()
        return {self.head["weights"][str(layer)]: weight for layer, weight in found.items()}

    def _of_snapshot(self) -> dict[int, Tensor]:
        """Of a method without sums: the weights of its last snapshot, which its end has left."""
        for number, event in reversed(self.folder.sound("snapshots")):
            state = self.folder.load("snapshots", number, event["digest"]).tensors
            base = self.folder.load("base").tensors
            found = {}
            for layer in self.head["layers"]:
                if (stored := state.get(f"weight.{layer}")) is not None:
                    found[layer] = stored
                elif (delta := state.get(f"delta.{layer}")) is not None:
                    change = delta.T if self.head["transposed"][str(layer)] else delta
                    found[layer] = (base[f"{layer}"].float() + change).to(base[f"{layer}"].dtype)
                else:
                    raise _NoWeightsError(
                        f"{self.path}: {self.head['method']} changes no weight that could be given; "
                        "a method that does is needed"
                    )
            return found
        raise DataError(f"{self.path}: has no snapshot yet; go on with its sequence to its end")

    def changes(self) -> list[Change]:
        """What the edits that stand have changed, a weight each, with exact factors where the method keeps sums; of a
        layer of experts those that differ. Raises ModelError where none has changed."""
        head, base, weights = self.head, self.folder.load("base").tensors, self.weights()
        summed = self.folder.place("priors").exists() and head["keeps_vectors"]
        factors = self.sums.factors() if summed else {}
        of_experts = self.sums.factors_of_experts() if summed else {}
        found = []
        for layer in head["layers"]:
            name = head["weights"][str(layer)]
            transposed = bool(head["transposed"][str(layer)])
            if base[f"{layer}"].ndim == 3:
                for change in changes_within(name, base[f"{layer}"], weights[name], transposed):
                    left, right = of_experts.get((layer, change.expert or 0), (None, None))
                    found.append(replace(change, left=left, right=right))
                continue
            left, right = factors.get(layer, (None, None))
            if left is not None and not left.shape[1]:
                left = right = None  # no edit stands
            if not same_bits(base[f"{layer}"], weights[name]):
                found.append(Change(name, base[f"{layer}"], weights[name], transposed, left, right))
        if not found:
            raise ModelError(
                f"{self.path}: no weight differs from the unedited model's, since no edit stands that changed one; "
                "redo one first"
            )
        return found

    def export_patch(self, path: str | os.PathLike[str]) -> dict[str, int]:
        """The change as a file that `d4s.apply_patch` takes (docs/formats/patch.md); bytes a weight."""
        return export_patch(self.changes(), path, fingerprint=self.head["model"], edits=self.edits)

    def export_lora(
        self, folder: str | os.PathLike[str], *, rank: int | None = None, model: CausalLM | None = None
    ) -> Adapter:
        """The change as an adapter folder of PEFT; arguments as of `d4s.export_lora` and `revise`."""
        return export_lora(self.changes(), folder, rank=rank, model=self._unedited(model, None)[0])

    def export_gguf_lora(
        self, path: str | os.PathLike[str], *, rank: int | None = None, model: CausalLM | None = None
    ) -> Adapter:
        """The change as an adapter of llama.cpp; arguments as of `d4s.export_gguf_lora` and `revise`."""
        return export_gguf_lora(self.changes(), path, rank=rank, model=self._unedited(model, None)[0])

    def write_card(self, folder: str | os.PathLike[str]) -> None:
        """d4s_edits.json into a model's folder: the edits that stand."""
        head = self.head
        write_edits_card(
            folder,
            self.edits,
            base_fingerprint=head["model"],
            base_name=head["source"],
            method=head["method"],
            when=now()["at"],
        )

    def write_to(self, model: CausalLM) -> None:
        """The unedited model becomes the edited one, in place. ModelError for another model."""
        self._unedited(model, None)
        own = parameters_by_name(model)
        weights = self.weights()
        with torch.no_grad():
            for name, weight in weights.items():
                own[name].copy_(weight)

    def write_to_folder(self, folder: str | os.PathLike[str]) -> None:
        """The edited weights into a saved model's safetensors files, each of which is there whole or as it was.

        Raises ModelError for a folder that has not all of them.
        """
        files = sorted(Path(folder).glob("*.safetensors"))
        left = _as_saved(self.weights(), files)
        shapes = {name: weight.shape for name, weight in left.items()}
        holding: dict[Path, list[str]] = {}
        for path in files:
            with safe_open(path, "pt") as file:
                names = [name for name in file.keys() if name in shapes]  # noqa: SIM118
                for name in names:
                    if tuple(file.get_slice(name).get_shape()) != tuple(shapes[name]):
                        raise ModelError(
                            f"{path}: {name} has another shape than the journal's; give the model that it was made with"
                        )
            if names:
                holding[path] = names
        lacking = sorted(set(left) - {name for names in holding.values() for name in names})
        if lacking:
            raise ModelError(f"{folder}: holds no {lacking[0]}; it is not the model of {self.path}")
        from safetensors.torch import load_file, save_file

        for path, names in holding.items():
            with safe_open(path, "pt") as file:
                facts = file.metadata()
            tensors = load_file(path)
            tensors |= {name: left[name].contiguous() for name in names}
            with whole(path) as beside:
                save_file(tensors, beside, metadata=facts)
        self.write_card(folder)

    def model_follows(self) -> bool:
        """Whether the model that is saved beside the journal has the weights that it comes to, or none is there."""
        return not self.folder.model.is_dir() or not self._beside(self.weights())

    def verify(
        self,
        *,
        model: CausalLM | None = None,
        tokenizer: Any = None,
        covariance: Covariance | str | os.PathLike[str] | None = None,
        sums_on: SumsOn = "auto",
    ) -> Verification:
        """Every file against the digest that the log names, and the weights against what they must be.

        Δ rebuilt from vectors alone against that by snapshots; the weights, bit for bit, against the model that is
        saved beside the journal (`model/`), where there is one.
        model, tokenizer: the unedited ones, on which all edits are then made again from the log alone (and taken back);
            on the machine that made them, in float32 on the CPU, that gives the same bits. None: they are not
        covariance: key statistics, where the method has any
        sums_on: as of `edit_sequence`

        Raises ConfigError for key statistics that are not the sequence's.
        """
        checked, problems = [f"log: {len(self.folder.events)} events, each bound to those before it"], []
        if self.folder.log.torn:
            problems.append(
                f"log: its last line is torn ({self.folder.log.torn} bytes), its event was not done"
            )
        for kind in ("segments", "snapshots"):
            named = self.folder.sound(kind)
            if kind == "snapshots":
                named = [one for one in named if self.folder.place(kind, one[0]).exists()]
            for number, event in named:
                try:
                    self.folder.load(kind, number, event["digest"])
                except D4SError as error:
                    problems.append(str(error))
            checked.append(f"{kind}: {len(named)}")
        points = [event for event in self.folder.events if event["kind"] == "point"]
        for event in points:
            try:
                self.folder.point(event)
            except D4SError as error:
                problems.append(str(error))
        checked.append(f"points: {len(points)}")
        problems += _consolidated_though_undone(self.folder)
        difference = None
        try:
            weights = self.weights()
            if self.folder.place("priors").exists() and self.head["keeps_vectors"]:
                difference = self._difference()
                if not difference <= WORTH_WITHIN:
                    problems.append(
                        f"Δ from vectors alone differs from that by snapshots by {difference:.2g}, relative"
                    )
                checked.append(
                    f"Δ from vectors alone: within {difference:.1g} of that by snapshots, relative"
                )
            if self.folder.model.is_dir():
                problems += self._beside(weights)
                checked.append("the model beside it: every edited weight")
            if model is not None and self.folder.is_changed_after:
                checked.append(
                    "not made again: only what a sequence alone has made can be; this journal was changed afterwards"
                )
            elif model is not None:
                others = self._made_again(model, tokenizer, covariance, sums_on, weights)
                problems += others
                if not others:
                    checked.append("every edit made again from the log alone: the same weights, bit for bit")
        except _NoWeightsError:
            checked.append(
                f"weights: {self.head['method']} changes none, so that there are none to be compared"
            )
        except ConfigError:
            raise  # an argument that does not fit says nothing of the journal
        except D4SError as error:
            problems.append(str(error))
        return Verification(tuple(checked), tuple(problems), difference)

    def _made_again(
        self,
        model: CausalLM,
        tokenizer: Any,
        covariance: Any,
        sums_on: SumsOn,
        weights: Mapping[str, Tensor],
    ) -> list[str]:
        """What differs after all steps of the log on the unedited model, which is unedited again afterwards."""
        self._unedited(model, None)
        steps = [edits_of(event, self.folder) for event in self.folder.events if event["kind"] == "step"]
        with evaluating(model):
            editor = self._editor(model, tokenizer, covariance, sums_on)
            try:
                editor.announce([edit for batch in steps for edit in batch if AGAIN not in edit.tags])
                for batch in steps:
                    editor.edit(batch)
                own = parameters_by_name(model)
                return [
                    f"made again: {name} differs by {float((own[name].detach().cpu() - w.cpu()).abs().max()):.2g}"
                    for name, w in weights.items()
                    if not same_bits(own[name].detach(), w)
                ]
            finally:
                editor.restore()

    def _difference(self) -> float:
        if self.sums.kept:
            return self.sums.apart()
        alone = Sums(self.folder, snapshots=False).closed_form
        largest = 0.0
        for layer, delta in self.sums.closed_form.deltas().items():
            size = float(delta.norm())
            largest = max(largest, float((alone.delta(layer) - delta).norm()) / size if size else 0.0)
        return largest

    def _beside(self, weights: Mapping[str, Tensor]) -> list[str]:
        files = sorted(self.folder.model.glob("*.safetensors"))
        weights = _as_saved(weights, files)
        left, problems = set(weights), []
        for path in files:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if name in weights:
                        left.discard(name)
                        if not same_bits(file.get_tensor(name), weights[name]):
                            problems.append(f"{path}: {name} is not what the journal comes to")
        return [*problems, *(f"{self.folder.model}: holds no {name}" for name in sorted(left))]


def _as_saved(weights: Mapping[str, Tensor], files: Sequence[Path]) -> dict[str, Tensor]:
    """The weights by the names that a saved model has for them: where transformers has put the experts of a block apart
    as it saved them, one each."""
    there: set[str] = set()
    for path in files:
        with safe_open(path, "pt") as file:
            there |= set(file.keys())
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        apart = [
            names
            for block, expert in _APART
            if name.endswith(_TOGETHER)
            and there.issuperset(
                names := [name.replace(_TOGETHER, f"{block}.{j}.{expert}") for j in range(len(weight))]
            )
        ]
        if name in there or not apart:
            found[name] = weight
        else:
            found |= dict(zip(apart[0], weight, strict=True))
    return found


def _consolidated_though_undone(folder: Folder) -> list[str]:
    """What is wrong where a log has consolidated edits that did not stand, so that the sums hold them."""
    standing, problems = Standing.at_first(folder), []
    for event in folder.events:
        if event["kind"] == "consolidated" and (gone := standing.undone & set(event["ids"])):
            problems.append(
                f"log: step {event['step']} has consolidated {', '.join(sorted(gone))}, which did not stand"
            )
        standing.follow(event, folder, lambda _step: [])
    return problems


def standing_of(folder: Folder) -> Standing:
    """Which edits of a log stand, without their vectors."""
    standing = Standing.at_first(folder)
    for event in folder.events:
        standing.follow(event, folder, lambda _step: [])
    return standing
