"""When a sequence steps, when it is scored, and by what."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from d4s.edits import Edit
from d4s.errors import ConfigError

Measure = Callable[[], Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What `edit_sequence` does with its edits, whatever the method; its arguments of the same names say more.

    batch_size: edits a step
    evaluate_every: edits between evaluations, or the numbers of edits after which to evaluate; None: only at the end
    neighborhood_limit: neighbourhood prompts an edit at the points between the first and the last; None: all
    original: whether each edit is also tested right after its own step
    generate: whether free generation is scored
    measure: called at each point; its figures join the history row
    stop_at_failure: whether a step that fails ends the sequence instead of raising
    passes: over the edits. In each behind the first those are made again whose target is not the greedy answer, or,
        where targets have an end (target_stop, target_eos), whose free answer goes on behind it
    stop_on_collapse: the share of the edits made that must still be the greedy answer; a point with fewer is the last.
        None: the sequence goes on whatever it has become
    seed: of contexts, samples and intervals

    Raises ConfigError for a number that is no whole number from 1 on (a limit from 0 on), or no share.
    """

    batch_size: int = 1
    evaluate_every: int | Collection[int] | None = None
    neighborhood_limit: int | None = None
    original: bool = True
    generate: bool = False
    measure: Measure | None = None
    stop_at_failure: bool = False
    passes: int = 1
    stop_on_collapse: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.evaluate_every, Collection):
            object.__setattr__(self, "evaluate_every", tuple(dict.fromkeys(self.evaluate_every)))
        points = self.evaluate_every if isinstance(self.evaluate_every, tuple) else (self.evaluate_every,)
        for name, value in (
            ("batch_size", self.batch_size),
            ("passes", self.passes),
            *(("evaluate_every", p) for p in points),
        ):
            if value is not None and (not _is_whole(value) or value < 1):
                raise ConfigError(f"{name}={value!r}, must be a whole number from 1 on")
        few = self.neighborhood_limit
        if few is not None and (not _is_whole(few) or few < 0):
            raise ConfigError(
                f"neighborhood_limit={few!r}, must be a whole number from 0 on, or None for all"
            )
        share = self.stop_on_collapse
        if share is not None and not (isinstance(share, (int, float)) and 0 < share <= 1):
            raise ConfigError(f"stop_on_collapse={share!r}, must be a share, above 0 and at most 1")
        if isinstance(self.evaluate_every, tuple):
            object.__setattr__(self, "evaluate_every", tuple(sorted(self.evaluate_every)))

    def batches(self, edits: Sequence[Edit]) -> list[Sequence[Edit]]:
        """The edits of each step, in order."""
        return [edits[i : i + self.batch_size] for i in range(0, len(edits), self.batch_size)]

    def is_due(self, before: int, made: int) -> bool:
        """Whether a point lies within a step: after `before` edits, and at `made` or before. The end is always one."""
        every = self.evaluate_every
        if every is None:
            return False
        if isinstance(every, int):
            return made // every > before // every
        return any(before < point <= made for point in every)

    def limit(self, made: int, count: int) -> int | None:
        """Neighbourhood prompts an edit at the point after `made` of `count` edits."""
        return self.neighborhood_limit if 0 < made < count else None

    def collapse(self, row: Mapping[str, Any]) -> str | None:
        """Why a history row is the last one; None: it is not. Row 0, before any edit, never is."""
        least, kept = self.stop_on_collapse, row.get("efficacy_argmax")
        if not row["step"] or least is None or kept is None or kept >= least:
            return None
        return f"{100 * kept:.1f} % of the edits made are the greedy answer, fewer than stop_on_collapse={least:g}"

    def told_apart(self) -> dict[str, Any]:
        """JSON values by which a kept sequence is known to have been made by this schedule, but for its seed.

        A measure is told by its `settings`; any other callable by being there.
        """
        every = self.evaluate_every
        owner = getattr(self.measure, "__self__", self.measure)
        return {
            "batch_size": self.batch_size,
            "evaluate_every": list(every) if isinstance(every, Collection) else every,
            "neighborhood_limit": self.neighborhood_limit,
            "original": self.original,
            "generate": self.generate,
            "measure": getattr(owner, "settings", self.measure is not None),
            "stop_on_collapse": self.stop_on_collapse,
        } | ({"passes": self.passes} if self.passes > 1 else {})


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
