"""Sequences made apart, on the same unedited model, become one: their sums add up.

A fact in several of them is made once. Where they give it different answers the rule decides: "latest", the one that
was made last by the clocks of the journals, or "fail".
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from d4s.change.closed_form import Rows
from d4s.edits import Edit
from d4s.edits.edit import AGAIN
from d4s.edits.spacing import Target
from d4s.errors import ConfigError, DataError
from d4s.journal.folder import Folder, differing, digest_of, now
from d4s.journal.journal import Journal
from d4s.journal.sums import packed
from d4s.measure.metrics import Baseline
from d4s.models.scoring import Score

SAME = (
    "model", "tokenizer", "statistics", "method", "config", "chosen", "dtype", "layers", "weights", "transposed",
)  # fmt: skip
SEGMENT = 64  # edits


@dataclass(frozen=True)
class Conflict:
    """One prompt with different answers. edits: (journal, edit), of which the last one was taken"""

    prompt: str
    edits: tuple[tuple[str, Edit], ...]

    def __str__(self) -> str:
        said = ", ".join(f"{edit.target_new!r} in {path} ({edit.id})" for path, edit in self.edits)
        return f"{self.prompt!r}: {said}"


@dataclass(frozen=True)
class _Fact:
    """An edit that stands in a journal, with all rows that its prompt has in the sums there."""

    journal: int
    at: str
    edit: Edit
    rows: tuple[Rows, ...]


def merge(
    paths: Sequence[str | os.PathLike[str]],
    into: str | os.PathLike[str],
    *,
    on_conflict: Literal["latest", "fail"] = "latest",
) -> tuple[Journal, list[Conflict]]:
    """(the journal of all edits that stand, facts that had different answers); `into` is a new folder.

    Its sums are the sums of theirs, less what a conflict has left out; its edits can be undone as those of any journal.
    Raises ConfigError for journals of different models, statistics or settings, naming what differs, for two edits of
    one id that are not one fact, and, with on_conflict="fail", for conflicts, naming them; nothing is written then.
    """
    if on_conflict not in ("latest", "fail"):
        raise ConfigError(f"on_conflict={on_conflict!r}, must be 'latest' or 'fail'")
    if len(paths) < 2:
        raise ConfigError("to be merged there must be two journals or more")
    root = Path(into)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ConfigError(f"{root}: already holds something else; name a new or empty folder")
    journals = [Journal(path) for path in paths]
    first = journals[0]
    for other in journals[1:]:
        if differ := differing(first.head, other.head, SAME):
            raise ConfigError(
                f"{other.path} and {first.path} do not add up: {'; '.join(differ)}; they must be the same"
            )
    _check_files(journals)
    facts, conflicts = _decided(journals)
    if conflicts and on_conflict == "fail":
        raise ConfigError(
            f"{len(conflicts)} facts have different answers; on_conflict='latest' (--latest) takes the later: "
            f"{'; '.join(map(str, conflicts[:10]))}"
        )
    head = {name: value for name, value in first.head.items() if name != "format"}
    head |= {
        "created": now()["at"],
        "by": now()["by"],
        "edits": digest_of([fact.edit.to_dict() for fact in facts]),
        "count": max(1, len(facts)),
        "keeps_vectors": True,
    }
    folder = Folder.create(root, head)
    try:
        for kind in ("base", "priors"):
            folder.save(kind, None, first.folder.load(kind).tensors)
        _joined_baseline(journals).save(root / "baseline.json")
        _write(folder, facts, journals, conflicts)
    except BaseException:
        if not any(event["kind"] == "ended" for event in folder.events):
            shutil.rmtree(root, ignore_errors=True)  # no half of a merge is left
        raise
    finally:
        folder.unlock()
    return Journal(root), conflicts


def _joined_baseline(journals: Sequence[Journal]) -> Baseline:
    """The unedited model's answers to the edits of all journals, which are of one model."""
    answers: dict[tuple[str, Target], Score] = {}
    for journal in journals:
        answers |= Baseline.load(journal.folder.root / "baseline.json").answers
    return Baseline(answers)


def _joined(rows: Iterable[Rows]) -> list[Rows]:
    """One prompt's rows, each of one edit and key, as rows that are all put in: those of one key and layer add up."""
    found: list[tuple[int, Tensor, Tensor, float]] = []  # layer, key, Σ ± residual, Σ ±
    for one in rows:
        here = (one.layer, one.keys, one.sign * one.residuals, one.sign)
        for i, (layer, key, residual, count) in enumerate(found):
            if layer == one.layer and torch.equal(key, one.keys):
                found[i] = (layer, key, residual + here[2], count + one.sign)
                break
        else:
            found.append(here)
    # An edit, what it took out, and itself: once. Of two edits of one key that both stay the key is there twice.
    return [
        Rows(
            layer, 1.0, (0,) * int(count), (residual / count).repeat(int(count), 1), key.repeat(int(count), 1)
        )
        for layer, key, residual, count in found
        if count > 0
    ]


def _check_files(journals: Sequence[Journal]) -> None:
    """W0 and priors of the same bits. DataError where a journal keeps no vectors, or is of experts."""
    for journal in journals:
        if any(w.ndim == 3 for w in journal.folder.load("base").tensors.values()):
            raise DataError(
                f"{journal.path}: is of a mixture of experts, whose rows are kept by their products with one another "
                "and add up with no others; make all edits in one sequence"
            )
        if not journal.head["keeps_vectors"]:
            raise DataError(
                f"{journal.path}: keeps no vectors of its edits ({journal.head['method']}, or --keep-vectors no), so "
                "they cannot be added to others'; make the sequence again with --keep-vectors yes"
            )
    for kind in ("base", "priors"):
        mine = journals[0].folder.load(kind).tensors
        for other in journals[1:]:
            theirs = other.folder.load(kind).tensors
            if set(mine) != set(theirs) or not all(torch.equal(mine[name], theirs[name]) for name in mine):
                raise ConfigError(
                    f"{other.path} and {journals[0].path} do not add up: {kind} differ, and must be the same"
                )


def _decided(journals: Sequence[Journal]) -> tuple[list[_Fact], list[Conflict]]:
    """All facts in the order in which they were made, each prompt once, and those that had different answers."""
    places: dict[tuple[str, int], list[_Fact]] = {}
    for number, journal in enumerate(journals):
        standing, at = journal.sums.standing, _times(journal)
        for place, ids in standing.by_place.items():
            left = [edit_id for edit_id in ids if edit_id not in standing.undone]
            if left:
                edit = standing.made[left[-1]].edit
                rows = tuple(_joined(standing.rows(place, standing.undone).values()))
                places.setdefault(place, []).append(_Fact(number, at[edit.id], _under_first_id(edit), rows))
    facts: list[_Fact] = []
    conflicts: list[Conflict] = []
    for found in places.values():
        ordered = sorted(found, key=lambda fact: (fact.at, fact.journal))
        facts.append(ordered[-1])
        if len({fact.edit.target_new for fact in ordered}) > 1:
            told = tuple((str(journals[fact.journal].path), fact.edit) for fact in ordered)
            conflicts.append(Conflict(ordered[-1].edit.text, told))
    facts.sort(key=lambda fact: (fact.at, fact.journal))
    seen: dict[str, _Fact] = {}
    for fact in facts:
        if fact.edit.id in seen:
            raise ConfigError(
                f"two different facts have the id {fact.edit.id!r}: {seen[fact.edit.id].edit.text!r} in "
                f"{journals[seen[fact.edit.id].journal].path}, "
                f"{fact.edit.text!r} in {journals[fact.journal].path}; give one of them another id"
            )
        seen[fact.edit.id] = fact
    return facts, conflicts


def _under_first_id(edit: Edit) -> Edit:
    """As the fact is called, whichever pass has made it last: of each one edit is left."""
    tags = dict(edit.tags)
    first = tags.pop(AGAIN, None)
    return edit if first is None else replace(edit, id=first, tags=tags)


def _times(journal: Journal) -> dict[str, str]:
    """When each edit was made."""
    return {row["id"]: str(row["at"]) for row in journal.log()}


def _write(
    folder: Folder, facts: Sequence[_Fact], journals: Sequence[Journal], conflicts: Sequence[Conflict]
) -> None:
    sources: list[dict[str, Any]] = [
        {"journal": journal.folder.log.begin, "events": len(journal.folder.events)} for journal in journals
    ]
    left_out = [edit.id for conflict in conflicts for _, edit in conflict.edits[:-1]]
    folder.append("merged", sources=sources, left_out=left_out)
    for begin in range(0, len(facts), SEGMENT):
        part = facts[begin : begin + SEGMENT]
        # Every row that its prompt has in the sums belongs to the one edit that is left of it.
        steps = {begin + i + 1: fact.rows for i, fact in enumerate(part)}
        folder.add_segment(begin + 1, begin + len(part), packed(steps))
        for i, fact in enumerate(part):
            folder.append(
                "step", step=begin + i + 1, edits=[fact.edit.to_dict()], seconds=0.0, made_at=fact.at
            )
    folder.append("ended", failure=None)
