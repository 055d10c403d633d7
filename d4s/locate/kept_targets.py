"""Targets of the unedited model, kept for the next time: their search is nearly all of what an edit costs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from d4s.edits import Edit
from d4s.errors import DataError
from d4s.locate.covariance import fingerprint_of
from d4s.locate.request_rows import Place
from d4s.locate.targets import TargetConfig, Targets
from d4s.models.architectures import Anatomy
from d4s.models.prompts import tokenizer_fingerprint
from d4s.tensor_files import load_tensors, save_tensors

FORMAT = "d4s-targets-1"
Fact = tuple[str | None, ...]
# Fields of the configuration that came later: as they are by default, targets are what they were before them.
_LATER = ("target_eos", "target_stop", "optimizer", "stop_nll", "bare_looks", "search_precision")
_PARTS = ("start", "delta", "first_probability", "last_probability")


def target_identity(
    anatomy: Anatomy,
    tokenizer: Any,
    prefixes: Sequence[str],
    layer: int,
    places: tuple[Place, ...],
    config: TargetConfig,
) -> dict[str, str]:
    """All that decides an edit's target but the edit, by name; to be asked for while the model is unedited."""
    return {
        "model": fingerprint_of(anatomy.model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "contexts": json.dumps(list(prefixes)),
        "layer": str(layer),
        "places": ", ".join(places),
        "target configuration": json.dumps(deciding(asdict(config)), sort_keys=True),
    }


def deciding(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What of a target configuration's fields targets are told apart by: all of them, but those that came later only
    where they are set. So what was kept before there were these fields stays good."""
    plain = asdict(TargetConfig())
    return {name: value for name, value in fields.items() if name not in _LATER or value != plain[name]}


class KeptTargets:
    """Targets by edit, all under one identity. It grows: what is not in it is searched and added.

    len(): how many there are
    """

    def __init__(self, identity: dict[str, str] | None = None) -> None:
        self.identity = identity
        self._rows: dict[Fact, tuple[int, int]] = {}  # (part, row in it)
        self._parts: list[Targets] = []

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, edit: Edit) -> bool:
        return _fact(edit) in self._rows

    def check(self, identity: dict[str, str]) -> None:
        """DataError, naming what differs, unless these are targets of this identity. The first one asked is taken."""
        if self.identity is None:
            self.identity = identity
        differ = [name for name, value in identity.items() if self.identity.get(name) != value]
        if differ:
            short = [name for name in differ if name in ("layer", "places", "target configuration")]
            details = "; ".join(
                f"{name} {self.identity.get(name)} there, {identity[name]} here" for name in short
            )
            raise DataError(
                f"the kept targets were found for another {' and another '.join(differ)}"
                f"{f' ({details})' if details else ''}; search them again (d4s targets)"
            )

    def add(self, edits: Sequence[Edit], targets: Targets) -> None:
        """Those of facts that are not yet held; of several edits of one fact the first counts."""
        new: dict[Fact, int] = {}
        for i, edit in enumerate(edits):
            if edit not in self:
                new.setdefault(_fact(edit), i)
        for row, fact in enumerate(new):
            self._rows[fact] = (len(self._parts), row)
        if new:
            self._parts.append(targets[list(new.values())].to(torch.device("cpu")))

    def take_in(self, other: KeptTargets) -> None:
        """All that another one of the same identity holds."""
        self.check(other.identity or {})
        for rows, targets in other._by_part():
            new = [row for row, fact in enumerate(rows) if fact not in self._rows]
            for place, row in enumerate(new):
                self._rows[rows[row]] = (len(self._parts), place)
            if new:
                self._parts.append(targets[new])

    def copy(self) -> KeptTargets:
        """As many, by themselves."""
        other = KeptTargets(self.identity)
        other._rows, other._parts = dict(self._rows), list(self._parts)
        return other

    def since(self, part: int) -> Iterator[KeptTargets]:
        """What was added at each time from the `part`-th on, each by itself."""
        for rows, targets in list(self._by_part())[part:]:
            one = KeptTargets(self.identity)
            one._rows = {fact: (0, row) for row, fact in enumerate(rows)}
            one._parts = [targets]
            yield one

    @property
    def times(self) -> int:
        """How often something was added."""
        return len(self._parts)

    def _by_part(self) -> Iterator[tuple[list[Fact], Targets]]:
        facts: list[list[Fact]] = [[] for _ in self._parts]
        for fact, (part, _) in sorted(self._rows.items(), key=lambda item: item[1]):
            facts[part].append(fact)
        yield from zip(facts, self._parts, strict=True)

    def lacking(self, edits: Sequence[Edit]) -> list[Edit]:
        """One edit of each fact that is not held."""
        return list({_fact(edit): edit for edit in edits if edit not in self}.values())

    def take(self, edits: Sequence[Edit], device: torch.device) -> Targets:
        """Targets of edits that are all held, in their order."""
        places = [self._rows[_fact(edit)] for edit in edits]
        return Targets.concatenate([self._parts[part][row : row + 1] for part, row in places]).to(device)

    def save(self, path: str | os.PathLike[str]) -> None:
        """One safetensors file, written beside its place and then renamed."""
        if not self._parts or self.identity is None:
            raise DataError(f"{os.fspath(path)}: there are no targets to be saved; search some first")
        whole = Targets.concatenate(self._parts)
        facts = {
            "format": FORMAT,
            "identity": json.dumps(self.identity),
            "edits": json.dumps(list(self._rows)),
        }
        save_tensors(path, {name: getattr(whole, name) for name in _PARTS}, facts)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> KeptTargets:
        """Raises DataError for a file that is not one that `save` wrote, or damaged."""
        file = load_tensors(path, FORMAT, "d4s targets", DataError)
        file.check_intact(DataError)
        try:
            identity = json.loads(file.facts["identity"])
            if not isinstance(identity, dict) or not all(isinstance(v, str) for v in identity.values()):
                raise ValueError("the identity is no object of texts")
            kept = KeptTargets(identity)
            facts = json.loads(file.facts["edits"])
            kept._rows = {(prompt, *rest): (0, i) for i, (prompt, *rest) in enumerate(facts)}
            parts = [file.tensors[name] for name in _PARTS]
            for name, tensor in zip(_PARTS, parts, strict=True):
                if tensor.dtype != torch.float32 or tensor.ndim != 1 + (name in ("start", "delta")):
                    raise ValueError(f"{name} is {list(tensor.shape)} {tensor.dtype}")
            if parts[0].shape != parts[1].shape:
                raise ValueError(f"start is {list(parts[0].shape)} and delta {list(parts[1].shape)}")
            kept._parts = [Targets(*parts)]
            lengths = {len(tensor) for tensor in parts}
        except (KeyError, RecursionError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}: not what KeptTargets.save wrote ({error!r}); search them again (d4s targets)"
            ) from None
        if lengths != {len(kept._rows)}:
            raise DataError(
                f"{path}: {len(kept._rows)} edits, and targets of {sorted(lengths)}; search them again (d4s targets)"
            )
        return kept


def _fact(edit: Edit) -> Fact:
    """What of an edit decides its target."""
    fact = (edit.prompt, edit.subject, edit.target_new, edit.target_prefix)
    return fact if edit.chat is None else (*fact, edit.chat)  # contexts stand behind it
