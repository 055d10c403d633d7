"""The sums of a journal without its model: what every edit has put into them, and what they are without some of them.

A row belongs to one edit of a step. Added rows (sign +1) are in the sums while their edit stands. Rows taken out (−1)
are an earlier edit's of the same prompt, in whose place the later one came: they are taken out while the later edit
and one of the earlier ones stand. So for any set of edits that stand the rows are known, and undoing is putting in and
taking out the difference, in O(d²) an edit.

Exact is that the sums are those rows'. They are also those of a sequence that never made the edit, to rounding, where
one layer is edited without contexts by the paper's rule of the residual, or no other edit has the prompt. With several
layers the keys above the lowest, and residuals that were measured on weights which held the edit, are those of the
sequence that was; `Journal.consolidate` takes all of them anew.

A layer of experts has no sums. Its rows stay in the state of its snapshot, whose factor holds the product of any two of
them (`d4s.change.expert_form.JointRows`): a row is there known by its number, and what stands is solved for from the
numbers of the rows that do, in O(n³) for n rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from d4s import ops
from d4s.change.closed_form import ClosedForm, Prior, Rows
from d4s.change.expert_form import Delta, ExpertLayer, JointForm, JointRows
from d4s.change.projection import Projection
from d4s.edits import Edit
from d4s.errors import D4SError, DataError, EditError, unknown_name
from d4s.journal.folder import Folder
from d4s.methods import METHODS

DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float16, torch.bfloat16)}


@dataclass(frozen=True)
class Made:
    """One edit of the log, with the rows that it put into the sums.

    Those of a prompt that stands in a step twice are its last edit's.
    follows: id of the earlier edit of its prompt in whose place it came, whose rows it took out
    """

    edit: Edit
    step: int
    rows: tuple[Rows, ...] = ()
    follows: str | None = None


@dataclass
class Standing:
    """Which edits were made, in order, and which of them stand.

    replaces: whether a later edit of a prompt takes the place of an earlier one (d4s), or both stay (as published, the
        others)
    by_place: edits of one prompt, in the order in which they were made
    dropped: of the undone ones those whose rows were left out when the journal was consolidated, a later edit of their
        prompt having taken their place
    """

    replaces: bool = True
    made: dict[str, Made] = field(default_factory=dict)
    undone: set[str] = field(default_factory=set)
    dropped: set[str] = field(default_factory=set)
    by_place: dict[tuple[str, int], list[str]] = field(default_factory=dict)

    @classmethod
    def at_first(cls, folder: Folder) -> Standing:
        """Before any event of the folder's log. DataError for one of a method that there is not."""
        if (name := folder.head["method"]) not in METHODS:
            raise DataError(f"{folder.root}: {unknown_name('method', name, METHODS)}")
        return cls(METHODS[name].replaces)

    def add(self, made: Made) -> None:
        earlier = self.by_place.setdefault(made.edit.place, [])
        standing = [edit_id for edit_id in earlier if edit_id not in self.undone]
        self.made[made.edit.id] = replace(made, follows=standing[-1] if standing else None)
        earlier.append(made.edit.id)

    def get(self, edit_id: str) -> Made:
        if edit_id not in self.made:
            raise EditError(unknown_name("edit", edit_id, self.made))
        return self.made[edit_id]

    @property
    def edits(self) -> list[Edit]:
        """Those that stand, in the order in which they were made."""
        return [made.edit for edit_id, made in self.made.items() if edit_id not in self.undone]

    def rows(self, place: tuple[str, int], undone: Iterable[str]) -> dict[tuple[str, int, str | None], Rows]:
        """Every row that one prompt's edits have in the sums while `undone` do not stand.

        By edit, number of the row, and, of a row that takes out an earlier edit's, that edit.
        """
        out, found = set(undone), dict[tuple[str, int, str | None], Rows]()
        earlier: Made | None = None
        for edit_id in self.by_place.get(place, ()):
            if edit_id in out:
                continue
            made = self.made[edit_id]
            for number, rows in enumerate(made.rows):
                if rows.sign > 0:
                    found[edit_id, number, None] = rows
            if earlier is not None and self.replaces:
                for number, rows in enumerate(_taken_out(made, earlier)):
                    found[edit_id, number, earlier.edit.id] = rows
            earlier = made
        return found

    def follow(
        self, event: Mapping[str, Any], folder: Folder, rows_of: Callable[[int], list[Rows]]
    ) -> tuple[list[Rows], list[Rows], bool]:
        """Takes an event of the log; (rows that it put into the sums, took out, whether the sums began anew).

        rows_of: step → what it put into the sums
        """
        kind = event["kind"]
        if kind in ("undone", "redone"):
            return *self.change(event["ids"], stand=kind == "redone"), False
        if kind not in ("step", "revised", "consolidated"):
            return [], [], False
        step, taken = int(event["step"]), list[Rows]()
        put, again = rows_of(step), list[Rows]()
        if kind == "consolidated":
            batch = [self.get(edit_id).edit for edit_id in event["ids"]]
            # The undone ones keep their rows, and may be redone; earlier edits of a prompt are in no sum any more.
            self.dropped |= {edit.id for edit in self.edits} - set(event["ids"])
            self.undone = self.undone | self.dropped
            for made in by_edit(batch, put, step):
                self.made[made.edit.id] = made
            return put, [], True
        if kind == "revised":
            again, taken = self.change([event["id"]], stand=False)
        for made in by_edit(edits_of(event, folder), put, step):
            self.add(made)
        return [*again, *put], taken, False

    def change(self, ids: Sequence[str], stand: bool) -> tuple[list[Rows], list[Rows]]:
        """(rows to be put in, rows to be taken out) such that the edits stand, or stand no longer."""
        after = self.undone - set(ids) if stand else self.undone | set(ids)
        put: list[Rows] = []
        taken: list[Rows] = []
        for place in dict.fromkeys(self.made[edit_id].edit.place for edit_id in ids):
            old, new = self.rows(place, self.undone), self.rows(place, after)
            put += [rows for key, rows in new.items() if key not in old]
            taken += [rows for key, rows in old.items() if key not in new]
        self.undone = after
        return put, taken


def _taken_out(made: Made, earlier: Made) -> list[Rows]:
    """What leaves the sums for `made` in the place of `earlier`: as it was, or, where it had come in another's place
    or in none, `earlier`'s own rows in the lowest layer, above which keys are not those that went in."""
    if made.follows == earlier.edit.id:
        return [rows for rows in made.rows if rows.sign < 0]
    lowest = min((rows.layer for rows in (*made.rows, *earlier.rows)), default=0)
    return [rows.negated() for rows in earlier.rows if rows.sign > 0 and rows.layer == lowest]


def of_one(rows: Rows, place: int) -> Rows | None:
    """The rows of one edit of a step. place: of the edit within it"""
    own = rows.of((place,))
    return replace(own, edits=(0,) * len(own.edits)) if own.edits else None


def by_edit(batch: Sequence[Edit], put: Sequence[Rows], step: int) -> list[Made]:
    """A step's edits with their rows."""
    return [
        Made(edit, step, tuple(one for rows in put if (one := of_one(rows, i)) is not None))
        for i, edit in enumerate(batch)
    ]


class Sums:
    """A journal's closed form, rebuilt from its files, and the weights that follow from it.

    Raises DataError where the journal keeps no sums (its method has none), or a file of it is missing or damaged.
    """

    def __init__(self, folder: Folder, *, snapshots: bool = True) -> None:
        """snapshots: False: from vectors alone, where all layers are dense"""
        self.folder = folder
        head = folder.head
        base = folder.load("base").tensors
        if not folder.place("priors").exists():
            if any(w.ndim == 3 for w in base.values()):
                raise DataError(
                    f"{folder.root}: of its edits of a mixture of experts the weights alone are kept ({head['method']}"
                    f"{'' if head['keeps_vectors'] else ', no vectors'}), so single edits cannot be taken back; d4s "
                    "and memit-seq keep their rows, with --keep-vectors yes"
                )
            raise DataError(
                f"{folder.root}: {head['method']} keeps no sums, so single edits cannot be taken back; d4s, memit-seq, "
                "alphaedit, nas, sphere and encore do"
            )
        self.layers: list[int] = head["layers"]
        self.transposed = {layer: bool(head["transposed"][str(layer)]) for layer in self.layers}
        priors = folder.load("priors").tensors
        try:
            self.base = {layer: base[f"{layer}"] for layer in self.layers}
            for layer, w in self.base.items():
                if w.ndim not in (2, 3):
                    raise D4SError(
                        f"the weight of layer {layer} is {list(w.shape)}; it must be [d_out, d_in], or of experts "
                        "[E, d_out, d_in]"
                    )
            shapes = {
                layer: tuple(w.shape[:-3:-1] if self.transposed[layer] else w.shape[-2:])
                for layer, w in self.base.items()
            }
            self.shapes = {layer: (d_out, d_in) for layer, (d_out, d_in) in shapes.items()}
            if len({d_out for d_out, _ in self.shapes.values()}) != 1:
                raise D4SError(f"its layers' weights are of several heights: {list(self.shapes.values())}")
            # Of the layers that have experts all rows that were ever put in.
            self.kept = {
                layer: JointRows(
                    len(w), self.shapes[layer][1], self.shapes[layer][0], f"layer {layer}", w.device
                )
                for layer, w in self.base.items()
                if w.ndim == 3
            }
            self.priors = {
                layer: _prior(priors[f"{layer}"], self.shapes[layer][1])
                for layer in self.layers
                if layer not in self.kept
            }
        except (KeyError, IndexError, D4SError) as error:
            raise DataError(
                f"{folder.root}: base or priors are not those of its layers ({error}); "
                "put the right files in their place"
            ) from None
        self._projections: dict[int, Projection] = {}
        self._stored: dict[str, Tensor] = {}  # of a journal of experts the weights of what stands, once known
        self.closed_form = self._empty()
        self.standing = Standing.at_first(folder)
        self._replay(snapshots)

    def _empty(self) -> ClosedForm:
        (d_out,) = {shape[0] for shape in self.shapes.values()}
        return ClosedForm(
            self.priors,
            d_out,
            transposed=any(self.transposed.values()),
            seed=int(self.folder.head["schedule"]["seed"]),
        )

    def _replay(self, snapshots: bool) -> None:
        """Everything in the log: from the newest sound snapshot on into the sums, from the start on into `standing`."""
        begin = 0
        for number, event in reversed(self.folder.sound("snapshots") if snapshots else []):
            try:
                self._resume(self.folder.load("snapshots", number, event["digest"]).tensors)
            except D4SError:
                self.closed_form = self._empty()
                continue
            begin = number + 1
            break
        if self.kept and not begin:
            raise DataError(
                f"{self.folder.root}: has no sound snapshot, which has the rows of its experts; {self._cure()}"
            )
        segments = Segments(self.folder)
        for event in self.folder.events:
            put, taken, anew = self.standing.follow(event, self.folder, segments.rows)
            for rows in put:
                self._check_kept(rows)
            if event["n"] < begin:
                continue
            if anew:
                self.closed_form = self._empty()
            self._put(put, taken)
            if taken:
                self.closed_form.settle_()
            elif put:
                self.closed_form.deltas()

    def _resume(self, state: Mapping[str, Tensor]) -> None:
        """From a snapshot. D4SError where it is none of these layers."""
        parts: dict[int, dict[str, Tensor]] = {layer: {} for layer in self.kept}
        dense: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}
        for name, tensor in state.items():
            layer, _, part = name.partition(".")
            if layer.isdecimal() and int(layer) in parts:
                parts[int(layer)][part] = tensor
            elif layer == "weight":
                weights[name] = tensor
            elif name != "held":
                dense[name] = tensor
        for number, rows in self.kept.items():
            rows.check(parts[number])
        self.closed_form.resume_(dense)
        for number, rows in self.kept.items():
            rows.take(parts[number])
        self._stored = weights if self.kept else {}

    def _check_kept(self, rows: Rows) -> None:
        """DataError for a row of experts that the snapshot does not have."""
        if rows.layer in self.kept and (
            rows.keys.is_floating_point()
            or not len(rows.keys)
            or int(rows.keys.max()) >= len(self.kept[rows.layer].signs)
        ):
            raise DataError(
                f"{self.folder.root}: its last sound snapshot has not all rows of layer {rows.layer}; {self._cure()}"
            )

    def _cure(self) -> str:
        """What gives the rows of experts back that only a snapshot has."""
        if self.folder.is_changed_after:
            return "put the newest files of its snapshots/ back from a copy"
        return "go on with its sequence to its end (the same command again)"

    def _put(self, put: Sequence[Rows], taken: Sequence[Rows]) -> None:
        # What goes in comes first: of two edits of a prompt that are both taken back, the later has taken the
        # earlier's key out already, and with both out before that is back the sums would be no sums of anything.
        for rows in sorted((*put, *map(Rows.negated, taken)), key=lambda rows: -rows.sign):
            if rows.layer not in self.kept:
                self.closed_form.put_(rows)
        if put or taken:
            self._stored = {}

    def _chosen(self, layer: int) -> JointRows:
        """Of a layer of experts the rows that stand. NotPositiveDefiniteError as `JointRows.selected`."""
        net: dict[int, float] = {}
        for place in self.standing.by_place:
            for rows in self.standing.rows(place, self.standing.undone).values():
                if rows.layer == layer:
                    for number in rows.keys[:, 0].tolist():
                        net[number] = net.get(number, 0.0) + rows.sign
        # What is taken out comes behind all that is in.
        ordered = sorted(net, key=lambda number: (net[number] < 0, number))
        return self.kept[layer].selected(
            [
                (number, math.copysign(1.0, net[number]))
                for number in ordered
                for _ in range(int(abs(net[number])))
            ]
        )

    def apart(self) -> float:
        """Of layers of experts how far Δ, as it grew row by row, is from that of all rows at once, relative."""
        largest = 0.0
        for rows in self.kept.values():
            order = sorted(enumerate(rows.signs.tolist()), key=lambda row: (row[1] < 0, row[0]))
            alone = rows.selected(order).delta
            size = sum(float(delta.square().sum()) for delta in rows.delta.values())
            off = sum(float((alone[j] - delta).square().sum()) for j, delta in rows.delta.items())
            largest = max(largest, math.sqrt(off / size) if size else 0.0)
        return largest

    def deltas(self) -> dict[int, Delta]:
        """Δ of every layer, of what stands."""
        found: dict[int, Delta] = dict(self.closed_form.deltas())
        return found | {layer: self._chosen(layer).delta for layer in self.kept}

    def change(self, ids: Sequence[str], *, stand: bool) -> None:
        """The edits stand again, or no longer: into the sums, in O(d²) an edit.

        Raises EditError for an edit that was not made, or that stands, or does not, already; the sums are as before.
        """
        for edit_id in ids:
            self.standing.get(edit_id)
            if stand and edit_id in self.standing.dropped:
                raise EditError(
                    f"edit {edit_id!r} had been replaced when the journal was consolidated, and is in it no more; make "
                    "it anew (d4s revise)"
                )
            if (edit_id in self.standing.undone) != stand:
                raise EditError(
                    f"edit {edit_id!r} {'stands' if stand else 'was undone'} already; name another, or none"
                )
        self._put(*self.standing.change(ids, stand=stand))

    def settle_(self) -> None:
        """What stands is solved for, as well as it can be. NotPositiveDefiniteError where that cannot be."""
        self.closed_form.settle_()
        if self.kept:
            self.weights()

    def weights(self) -> dict[int, Tensor]:
        """W = round(W0 + Δ) of every edited layer, as the model stores it."""
        if not self._stored and not self.kept and not self.standing.edits:
            return {layer: base.clone() for layer, base in self.base.items()}  # −0 + 0 is 0
        if not self._stored:
            found = {}
            for layer, delta in self.deltas().items():
                found[layer] = weight = self.base[layer].clone()
                parts = (
                    {0: (weight, self.base[layer], self.projected(layer, delta))}
                    if isinstance(delta, Tensor)
                    else {j: (weight[j], self.base[layer][j], d) for j, d in delta.items()}
                )
                for part, before, change in parts.values():
                    ops.write_back_(part, before, change, transposed=self.transposed[layer])
            if not self.kept:
                return found
            self._stored = {f"weight.{layer}": weight for layer, weight in found.items()}
        return {layer: self._stored[f"weight.{layer}"] for layer in self.layers}

    def snapshot(self) -> dict[str, Tensor]:
        """What a journal's snapshot holds: the sums of what stands; of experts all rows, and the weights as well."""
        found = self.closed_form.snapshot() | _states(self.kept)
        if self.kept:
            self.weights()
        return found | self._stored

    def give(self, form: ClosedForm | JointForm) -> None:
        """What stands into an editor's own closed form, in place of what it holds."""
        chosen = {layer: self._chosen(layer) for layer in self.kept}
        form.resume_(self.closed_form.snapshot() | _states(chosen))

    def with_rows_of(
        self, form: JointForm, put: Sequence[Rows], weights: Mapping[int, Tensor]
    ) -> tuple[list[Rows], dict[str, Tensor]]:
        """(rows that an editor of experts has put in, known by their numbers, the snapshot with them).

        form: of the editor, with what stands; weights: what it has written
        """
        state = form.dense.snapshot()
        ends = {}
        for layer, kept in self.kept.items():
            grown = ExpertLayer(form.of_experts[layer].prior, kept.d_out, kept.name)
            grown.take(kept.state())
            for rows in put:
                if rows.layer == layer:
                    grown.add_(rows.residuals, rows.keys, rows.sign)
            state |= _states({layer: grown})
            ends[layer] = len(grown.signs)
        return _numbered(put, ends), state | {f"weight.{layer}": w for layer, w in weights.items()}

    def projected(self, layer: int, change: Tensor) -> Tensor:
        """What of a change was written, by the configuration of the sequence. change: [any, d_in]"""
        if (told := self.folder.head["config"].get("delta_projection")) is None:
            return change
        if layer not in self._projections:
            base = self.base[layer]
            try:
                strength, share = map(float, told)
            except (TypeError, ValueError):
                raise DataError(
                    f"{self.folder.root}: delta_projection is {told!r}; must be α and β, or none"
                ) from None
            weight = base.T if self.transposed[layer] else base
            self._projections[layer] = Projection(weight, strength, share)
        return self._projections[layer](change)

    def factors_of_experts(self) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
        """`factors` of every expert that is changed, by layer and expert."""
        return {
            (layer, expert): pair
            for layer in self.kept
            for expert, pair in self._chosen(layer).factors().items()
        }

    def factors(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Δ = left · right of every dense layer, left [d_out, rows], right [rows, d_in], float64: a row an edit.

        Δ = A P with A = Σ ± r kᵀ = Rᵀ S K and P = (λC + B)⁻¹, so left = Rᵀ S and right = K P, projected where W is.
        """
        found = {}
        for layer in self.priors:
            rows = [
                one
                for place in self.standing.by_place
                for one in self.standing.rows(place, self.standing.undone).values()
                if one.layer == layer
            ]
            d_out, d_in = self.shapes[layer]
            if not rows:
                none = self.priors[layer].matrix.double().new_zeros
                found[layer] = (none(d_out, 0), none(0, d_in))
                continue
            residuals = torch.cat([one.sign * one.residuals.double() for one in rows])
            keys = torch.cat([one.keys.double() for one in rows])
            signs = torch.cat(
                [one.keys.new_full((len(one.keys), 1), one.sign, dtype=torch.float64) for one in rows]
            )
            matrix = self.priors[layer].matrix.double() + (signs * keys).T @ keys
            found[layer] = (residuals.T, self.projected(layer, torch.linalg.solve(matrix, keys.T).T))
        return found


def _states(layers: Mapping[int, JointRows]) -> dict[str, Tensor]:
    return {
        f"{layer}.{name}": tensor for layer, rows in layers.items() for name, tensor in rows.state().items()
    }


def numbered(put: Sequence[Rows], form: JointForm) -> list[Rows]:
    """What a step has put into layers of experts, known by its numbers there: keys are then these, [n, 1] int64, and
    residuals [n, 0]. Rows of dense layers are as they were. form: after the step"""
    return _numbered(put, {layer: len(rows.signs) for layer, rows in form.of_experts.items()})


def _numbered(put: Sequence[Rows], ends: Mapping[int, int]) -> list[Rows]:
    left = {layer: end - sum(len(r.edits) for r in put if r.layer == layer) for layer, end in ends.items()}
    found = []
    for rows in put:
        if rows.layer in left:
            begin, count = left[rows.layer], len(rows.edits)
            numbers = torch.arange(begin, begin + count, device="cpu").unsqueeze(1)
            left[rows.layer] += count
            rows = replace(
                rows, residuals=torch.zeros(count, 0, dtype=torch.float64, device="cpu"), keys=numbers
            )
        found.append(rows)
    return found


def edits_of(event: Mapping[str, Any], folder: Folder) -> list[Edit]:
    try:
        return [Edit.from_dict(record) for record in event["edits"]]
    except (D4SError, AttributeError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder.root}, event {event.get('n')}: holds no edits ({error}); the log is damaged, or was changed"
        ) from None


def _prior(stored: Tensor, d_in: int) -> Prior:
    if stored.ndim == 0:
        return Prior.identity(d_in, float(stored))
    return Prior(stored, dtype=stored.dtype)


class Segments:
    """The vectors of a journal's steps, read from its segments as they are asked for."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._named = folder.sound("segments")
        self._open: tuple[int, dict[int, list[Rows]]] | None = None

    def rows(self, step: int) -> list[Rows]:
        """What the step put into the sums, in order. DataError where its segment is missing or damaged.

        Of several segments that hold it the newest sound one: it was written since an older one was found damaged.
        """
        if self._open is None or step not in self._open[1]:
            self._open = self._sound(step)
        return self._open[1][step]

    def _sound(self, step: int) -> tuple[int, dict[int, list[Rows]]]:
        why: DataError | None = None
        for number, event in reversed(self._named):
            if not int(event["first"]) <= step <= number:
                continue
            try:
                file = self.folder.load("segments", number, event["digest"])
                found = unpacked(file.tensors, file.path)
                if step in found:
                    return number, found
                raise DataError(
                    f"{file.path}: has no vectors of step {step}; put the right file in its place"
                )
            except DataError as error:
                why = why or error
        raise why or DataError(
            f"{self.folder.root}: no vectors are kept of step {step}"
            + (
                "; go on with the sequence (the same command again), which makes them"
                if self.folder.head["keeps_vectors"]
                else " (--keep-vectors no), so no single edit can be taken back; --keep-vectors yes keeps them"
            )
        )


def packed(steps: Mapping[int, Sequence[Rows]]) -> dict[str, Tensor]:
    """A segment: step → what it put into the sums, as tensors by name (docs/formats/journal.md)."""
    tensors: dict[str, Tensor] = {}
    for step, put in steps.items():
        for layer in dict.fromkeys(rows.layer for rows in put):
            own = [rows for rows in put if rows.layer == layer]
            name, keys = f"{step}.{layer}", torch.cat([rows.keys for rows in own])
            if keys.is_floating_point():
                tensors[f"{name}.keys"] = _narrow(keys)
                tensors[f"{name}.residuals"] = _narrow(torch.cat([rows.residuals for rows in own]))
            else:
                tensors[f"{name}.rows"] = keys.flatten()
            tensors[f"{name}.signs"] = torch.tensor(
                [rows.sign for rows in own for _ in rows.edits], dtype=torch.int8, device="cpu"
            )
            tensors[f"{name}.edits"] = torch.tensor(
                [e for rows in own for e in rows.edits], dtype=torch.int32, device="cpu"
            )
    return tensors


def _narrow(rows: Tensor) -> Tensor:
    """float32 where that holds every value exactly."""
    small = rows.float()
    return small if torch.equal(small.to(rows.dtype), rows) else rows


def unpacked(tensors: Mapping[str, Tensor], path: str) -> dict[int, list[Rows]]:
    """Step → rows, in the order in which they were put. DataError for tensors that are no segment."""
    found: dict[int, list[Rows]] = {}
    try:
        names = dict.fromkeys(tuple(map(int, name.split(".")[:2])) for name in tensors)
        for step, layer in sorted(names):
            signs, edits = (tensors[f"{step}.{layer}.{part}"] for part in ("signs", "edits"))
            if (numbers := tensors.get(f"{step}.{layer}.rows")) is not None:
                keys, residuals = numbers.long().unsqueeze(1), numbers.double().unsqueeze(1)[:, :0]
                if len(keys) and int(keys.min()) < 0:
                    raise ValueError(f"step {step}, layer {layer}: a row has a number below 0")
            else:
                keys, residuals = (
                    tensors[f"{step}.{layer}.{part}"].double() for part in ("keys", "residuals")
                )
            if (
                keys.ndim != 2
                or residuals.ndim != 2
                or not len(keys) == len(residuals) == len(signs) == len(edits)
            ):
                raise ValueError(f"step {step}, layer {layer}: rows of different number")
            put = found.setdefault(step, [])
            for begin, end, sign in _runs(signs.tolist()):
                here = slice(begin, end)
                put.append(
                    Rows(
                        layer,
                        float(sign),
                        tuple(edits[here].tolist()),
                        residuals[here],
                        keys[here],
                    )
                )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: is no segment of a journal ({error}); put the right file in its place"
        ) from None
    return found


def _runs(signs: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(begin, end, sign) of neighbours of one sign; a step puts one group of each sign into a layer."""
    begin = 0
    for at in range(1, len(signs) + 1):
        if at == len(signs) or signs[at] != signs[begin]:
            if signs[begin] not in (1, -1):
                raise ValueError(f"a sign is {signs[begin]}")
            yield begin, at, signs[begin]
            begin = at
