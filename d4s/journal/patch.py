"""A patch: what editing changed in a model, as a small file to apply and to take off again (docs/formats/patch.md)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from d4s.edits import Edit
from d4s.errors import D4SError, DataError, ModelError, shown
from d4s.files import as_json, as_list, as_object, as_text, checking, digest, parse_json
from d4s.interrupts import deferred
from d4s.journal.changes import Change, changes_between, changes_of, matrix_label
from d4s.journal.stored_bits import Step, bits, dense, factored, part_types, taken
from d4s.locate.covariance import fingerprint_of
from d4s.models.architectures import check_bare, check_on_devices
from d4s.models.causal_lm import CausalLM, parameters_by_name
from d4s.tensor_files import Outline, load_tensors, save_tensors

__all__ = [
    "Change",
    "Patch",
    "PatchedWeight",
    "apply_patch",
    "changes_between",
    "changes_of",
    "export_patch",
    "read_patch",
    "remove_patch",
]

FORMAT = "d4s-patch-1"
WRITER = "d4s patch export"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_STORED = {torch.uint8: "U8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64"}
_FACTS = ("format", "fingerprint", "weights", "edits")
_FIELDS = ("name", "dtype", "shape", "transposed", "base", "edited", "exponent")
_OF_EXPERT = "expert"  # a further field, which only a matrix within a parameter of experts has


@dataclass(frozen=True)
class PatchedWeight:
    """What a patch says of one weight.

    base, edited: digests of its bits; exponent: as in `stored_bits.Step`; expert: as in `Change`
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, int]
    transposed: bool
    base: str
    edited: str
    exponent: int | None
    expert: int | None = None

    @property
    def label(self) -> str:
        """`matrix_label` of it, under which its parts stand in the file."""
        return matrix_label(self.name, self.expert)

    def held(self, own: Mapping[str, Tensor]) -> Tensor:
        """The weight itself, among a model's parameters; a view of its memory."""
        parameter = own[self.name].data
        return parameter if self.expert is None else parameter[self.expert]


@dataclass(frozen=True)
class Patch:
    """A patch as read.

    fingerprint: of the unedited model; edits: the facts in it, as far as whoever made it said; steps: by `label`
    """

    path: str
    fingerprint: str
    weights: tuple[PatchedWeight, ...]
    edits: tuple[Edit, ...]
    steps: dict[str, Step]


def export_patch(
    changes: Sequence[Change],
    path: str | os.PathLike[str],
    *,
    fingerprint: str,
    edits: Sequence[Edit] = (),
) -> dict[str, int]:
    """Writes the changes as one file, whole or not at all; returns the bytes of each weight's part, by its `label`.

    fingerprint: of the unedited model (`d4s.locate.covariance.fingerprint_of`), which alone the patch can be applied to
    edits: the facts that the changes write, for whoever reads the file

    A weight is stored as the exclusive or of its bits, or as whole-number factors with their corrections, whichever is
    smaller: both give base and edited weight bit for bit.
    Raises ModelError for changes that are none, or not of one weight each.
    """
    if not changes:
        raise ModelError("nothing was changed, so there is nothing to put into a patch; make an edit first")
    tensors: dict[str, Tensor] = {}
    weights: list[dict[str, Any]] = []
    sizes: dict[str, int] = {}
    for change in sorted(changes, key=lambda change: (change.name, change.expert or 0)):
        if change.label in sizes:
            raise ModelError(f"{change.label} is changed twice; put both changes into one")
        change.check()
        step = _smallest(change)
        tensors |= {f"{change.label}:{part}": tensor for part, tensor in step.parts.items()}
        sizes[change.label] = step.bytes
        weights.append(
            {
                "name": change.name,
                "dtype": str(change.base.dtype).removeprefix("torch."),
                "shape": list(change.base.shape),
                "transposed": change.transposed,
                "base": _digest(change.base),
                "edited": _digest(change.edited),
                "exponent": step.exponent,
                **({} if change.expert is None else {_OF_EXPERT: change.expert}),
            }
        )
    facts = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "weights": json.dumps(weights),
        "edits": json.dumps([edit.to_dict() for edit in edits]),
    }
    save_tensors(path, tensors, facts)
    return sizes


def apply_patch(model: CausalLM, path: str | os.PathLike[str]) -> Patch:
    """Makes the unedited model, in place, the edited one, bit for bit.

    Raises ModelError if it is another model than the one that was edited, or has the patch already, naming what
    differs; DataError if the file is no patch, or damaged. The model is then left as it was.
    """
    own = _own(model)
    patch = read_patch(path, own)
    held = {weight.label: _digest(weight.held(own)) for weight in patch.weights}
    if all(held[weight.label] == weight.edited for weight in patch.weights):
        raise ModelError(f"{path}: is applied to this model already; remove_patch takes it off")
    for weight in patch.weights:
        if held[weight.label] != weight.base:
            has = (
                "has this patch already"
                if held[weight.label] == weight.edited
                else "is not the unedited model's"
            )
            raise ModelError(
                f"{path}: belongs to another model: {weight.label} {has}; apply it to the unedited model, in the dtype "
                "in which it was edited"
            )
    if (mine := fingerprint_of(model)) != patch.fingerprint:
        raise ModelError(
            f"{path}: belongs to another model (weights {shown(patch.fingerprint[:12])}, this one {mine[:12]!r}): the "
            f"{len(held)} weights that it changes are as they should be, and others are not; "
            "name the one it was made of"
        )
    _write(own, patch, back=False)
    return patch


def remove_patch(model: CausalLM, path: str | os.PathLike[str]) -> Patch:
    """Takes an applied patch off, in place: its weights are the unedited model's again, bit for bit.

    What else was changed since stays as it is.
    Raises ModelError if a weight of the patch is not as the patch left it, naming it; DataError if the file is no
    patch, or damaged. The model is then left as it was.
    """
    own = _own(model)
    patch = read_patch(path, own)
    for weight in patch.weights:
        if (held := _digest(weight.held(own))) != weight.edited:
            has = (
                "is the unedited model's"
                if held == weight.base
                else "was changed since, or is another model's"
            )
            raise ModelError(
                f"{path}: is not applied to this model: {weight.label} {has}; name the one that it is applied to"
            )
    _write(own, patch, back=True)
    return patch


def read_patch(path: str | os.PathLike[str], own: Mapping[str, Tensor] | None = None) -> Patch:
    """A patch from its file, whole and as it was written. Nothing in it is executed, and no name in it is a path.

    own: the parameters of a model: the patch's weights must be among them, of the same shape and type, before anything
        but the file's head is read
    Raises DataError if it is no patch or damaged, ModelError if it does not fit `own`.
    """
    found: list[tuple[PatchedWeight, ...]] = []

    def check(facts: dict[str, str], outlines: dict[str, Outline]) -> None:
        with _reading(path):
            weights = _weights(facts, os.fspath(path))
            for weight in weights:
                if own is not None:
                    _check_fits(weight, own, path)
            _check_outlines(weights, outlines, path)
            found.append(weights)

    file = load_tensors(path, FORMAT, WRITER, DataError, before=check)
    file.check_intact(DataError)
    (weights,) = found
    with _reading(path):
        edits = as_list(parse_json(file.facts["edits"], f"{path}: 'edits'"), "edits")
        made = tuple(Edit.from_dict(as_object(as_json(edit, "an edit"), "an edit")) for edit in edits)
    steps = {}
    for weight in weights:
        prefix = f"{weight.label}:"
        parts = {n.removeprefix(prefix): t for n, t in file.tensors.items() if n.startswith(prefix)}
        steps[weight.label] = Step(parts, weight.exponent)
    return Patch(os.fspath(path), file.facts["fingerprint"], weights, made, steps)


def _smallest(change: Change) -> Step:
    whole = dense(change.base, change.edited)
    factors = change.factors
    d_out, d_in = change.shape
    # An element of a factor takes what one of the weight does, or more: beyond this rank they are larger in any case.
    if factors.rank * (d_out + d_in) >= d_out * d_in:
        return whole
    few = factored(change.base, change.edited, *factors.halves(factors.rank), change.transposed)
    return few if few.bytes < whole.bytes else whole


def _digest(weight: Tensor) -> str:
    return digest([bits(weight).flatten().view(torch.uint8).numpy().data])


def _own(model: CausalLM) -> Mapping[str, Tensor]:
    """The parameters by name of a model that may be written to."""
    check_bare(model)
    check_on_devices(model)
    return parameters_by_name(model)


def _write(own: Mapping[str, Tensor], patch: Patch, *, back: bool) -> None:
    """All weights of the patch, or none: each is made and checked before the first is written."""
    new = {}
    for weight in patch.weights:
        try:
            made = taken(patch.steps[weight.label], weight.held(own), weight.transposed, back=back)
        except ValueError as error:
            raise DataError(
                f"{patch.path}: not what {WRITER} wrote ({weight.label}: {error}); get the patch again"
            ) from None
        if _digest(made) != (weight.base if back else weight.edited):
            raise DataError(
                f"{patch.path}: does not lead to the weight that it names ({weight.label}); nothing was written"
            )
        new[weight.label] = made
    written: list[PatchedWeight] = []
    with deferred():
        try:
            for weight in patch.weights:
                weight.held(own).copy_(new[weight.label])
                written.append(weight)
        except BaseException:
            for weight in written:
                step = patch.steps[weight.label]
                weight.held(own).copy_(taken(step, new[weight.label], weight.transposed, back=not back))
            raise


@contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """What is wrong with the content becomes a DataError that names the file; a ModelError stays one."""
    try:
        with checking(path, WRITER):
            yield
    except (ModelError, DataError):
        raise
    except D4SError as error:  # of an edit
        raise DataError(f"{path}: not what {WRITER} wrote ({error}); get the patch again") from None


def _weights(facts: Mapping[str, str], path: str) -> tuple[PatchedWeight, ...]:
    def wrong(reason: str) -> DataError:
        return DataError(f"{path}: not what {WRITER} wrote ({reason}); get the patch again")

    if facts.keys() != set(_FACTS):
        raise wrong(f"its facts must be {', '.join(_FACTS)}")
    records = as_list(parse_json(facts["weights"], f"{path}: 'weights'"), "weights")
    weights: dict[str, PatchedWeight] = {}
    for record in records:
        if as_object(record, "a weight").keys() - {_OF_EXPERT} != set(_FIELDS):
            raise wrong(
                f"the fields of a weight must be {', '.join(_FIELDS)}, and of an expert's {_OF_EXPERT}"
            )
        name, dtype = as_text(record["name"], "a weight's name"), as_text(record["dtype"], "dtype")
        shape, exponent = as_list(record["shape"], "shape"), record["exponent"]
        if dtype not in _DTYPES:
            raise wrong(f"{shown(name)} is of {shown(dtype)}; must be {', '.join(_DTYPES)}")
        if len(shape) != 2 or not all(type(length) is int and 0 < length < 2**31 for length in shape):
            raise wrong(f"the shape of {shown(name)} must be two whole numbers")
        if type(record["transposed"]) is not bool or not (exponent is None or type(exponent) is int):
            raise wrong(f"'transposed' or 'exponent' of {shown(name)} is of a wrong type")
        expert = record.get(_OF_EXPERT)
        if _OF_EXPERT in record and not (type(expert) is int and 0 <= expert < 2**31):
            raise wrong(f"{_OF_EXPERT!r} of {shown(name)} must be a whole number")
        label = matrix_label(name, expert)
        if label in weights:
            raise wrong(f"it has {shown(label)} twice")
        base, edited = as_text(record["base"], "base"), as_text(record["edited"], "edited")
        weights[label] = PatchedWeight(
            name, _DTYPES[dtype], (shape[0], shape[1]), record["transposed"], base, edited, exponent, expert
        )
    if not weights:
        raise wrong("it has no weight")
    return tuple(weights.values())


def _check_fits(weight: PatchedWeight, own: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    if weight.name not in own:
        raise ModelError(
            f"{path}: belongs to another model: this one has no parameter {shown(weight.name)}; "
            "name the one it was made of"
        )
    parameter = own[weight.name]
    # Of experts the number is not in the patch: it names those that changed, of more or fewer others.
    of_experts = weight.expert is not None
    if parameter.ndim != 2 + of_experts or tuple(parameter.shape[-2:]) != weight.shape:
        there = ["experts", *weight.shape] if of_experts else list(weight.shape)
        raise ModelError(
            f"{path}: belongs to another model: {weight.name} is [{', '.join(map(str, there))}] there and "
            f"{list(parameter.shape)} here; name the one it was made of"
        )
    if weight.expert is not None and weight.expert >= len(parameter):
        raise ModelError(
            f"{path}: belongs to another model: it changes expert {weight.expert} of {weight.name}, which has "
            f"{len(parameter)} here; name the one it was made of"
        )
    if parameter.dtype != weight.dtype:
        raise ModelError(
            f"{path}: {weight.name} is {weight.dtype} there and {parameter.dtype} here; load the model with "
            f"dtype={str(weight.dtype).removeprefix('torch.')!r}, in which it was edited"
        )


def _check_outlines(
    weights: Sequence[PatchedWeight], outlines: dict[str, Outline], path: str | os.PathLike[str]
) -> None:
    """DataError unless there is exactly what each weight needs, no part of it larger than the weight itself."""

    def wrong(reason: str) -> DataError:
        return DataError(f"{path}: not what {WRITER} wrote ({reason}); get the patch again")

    left_over = set(outlines)
    for weight in weights:
        rows, columns = weight.shape
        d_out, d_in = (columns, rows) if weight.transposed else (rows, columns)
        shapes: dict[str, tuple[int, ...]] = {}
        for part, wanted in part_types(weight.exponent, weight.dtype).items():
            name = f"{weight.label}:{part}"
            dtype, shape = outlines.get(name, ("nothing", ()))
            if dtype != _STORED[wanted]:
                raise wrong(f"{shown(name)} is {shown(dtype)}")
            shapes[part] = shape
            left_over.discard(name)
        if weight.exponent is None:
            fits = shapes["xor"] == weight.shape
        else:
            rank = shapes["left"][-1] if shapes["left"] else 0
            fits = (
                0 < rank <= min(d_out, d_in)
                and shapes["left"] == (d_out, rank)
                and shapes["right"] == (rank, d_in)
                and all(len(shape) == 1 for part, shape in shapes.items() if "." in part)
                # Each gap of 255 leaves out as many places.
                and all(
                    shapes[f"{to}.xor"][0] <= shapes[f"{to}.gaps"][0] <= 2 * d_out * d_in
                    for to in ("forth", "back")
                )
            )
        if not fits:
            raise wrong(f"the parts of {shown(weight.label)} are not of its shape")
    if left_over:
        raise wrong(f"it holds {shown(min(left_over))}, which no weight of it needs")
