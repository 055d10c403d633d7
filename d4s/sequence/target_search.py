"""The targets of many edits on the unedited model, searched once and kept in a file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from d4s.edits import Edit, check_sequence
from d4s.errors import ConfigError
from d4s.locate.kept_targets import KeptTargets
from d4s.methods import Method, Preset, Step, Workbench, method_for
from d4s.methods.locate_then_edit import EDITS_AHEAD, Ahead, LocateEditor, TargetMethod, step_of
from d4s.models.architectures import Architecture
from d4s.models.causal_lm import CausalLM
from d4s.models.forward import evaluating
from d4s.models.readiness import check_ready
from d4s.progress import progress_bar
from d4s.ranks import here


class _Search(LocateEditor):
    """An editor that finds targets and writes nothing."""

    def apply(self, batch: Sequence[Edit]) -> Step:
        return step_of(self.targets(batch))


def check_targets(bench: Workbench, method: TargetMethod) -> None:
    """Raises DataError, naming what differs, unless the workbench's targets are of its unedited model, for the method
    and its contexts."""
    Ahead(_Search(method, bench))


def search_targets(
    model: CausalLM,
    tokenizer: Any,
    edits: Iterable[Edit],
    *,
    method: str | Method = "d4s",
    config: Mapping[str, Any] | Method | Preset | None = None,
    out: str | os.PathLike[str] | None = None,
    architecture: Architecture | None = None,
    seed: int = 0,
    progress: bool = True,
) -> KeptTargets:
    """Targets for `edit_sequence(targets=…)`: the same as that would search, for the same configuration and seed.

    config: as of `edit_sequence`; what of it decides a target is the last layer, the target optimiser and the contexts
    out: file that they are kept in as they are found; where it is there already, it is gone on with

    Raises DataError if the file is there and of something else, naming what differs.
    """
    edits = tuple(edits)
    check_sequence(edits)
    check_ready(model, tokenizer, edits)
    place = None if out is None else Path(out)
    ranks = here()
    kept = ranks.from_first(
        lambda: KeptTargets.load(place) if place is not None and place.exists() else KeptTargets()
    )
    bench = Workbench(model, tokenizer, targets=kept, architecture=architecture, seed=seed, progress=progress)
    configured = method_for(method, bench.anatomy, config)
    if not isinstance(configured, TargetMethod) or not configured.searches_ahead:
        raise ConfigError(
            f"{configured.name} has no targets of the unedited model; d4s with anchor='base' has"
        )
    with evaluating(model), progress_bar(len(edits), "edit", "targets", shown=progress) as bar:
        ahead = Ahead(_Search(configured, bench))
        saved = len(kept)
        try:
            for at in range(0, len(edits), EDITS_AHEAD):
                window = edits[at : at + EDITS_AHEAD]
                ahead.targets(window)
                # Each time as much again: what is written stays within a few times the file.
                if place is not None and len(kept) >= saved + max(64, saved // 4):
                    ranks.on_first(partial(kept.save, place))
                    saved = len(kept)
                bar.update(len(window))
        finally:  # what was found before an interruption, too; alone, since other processes may be gone
            if place is not None and len(kept) > saved and ranks.is_first:
                kept.save(place)
    return kept
