"""What a sequence was planned to take, told as tables; whether it fits, and the options with which it would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from d4s.errors import ConfigError
from d4s.figures.tables import aligned
from d4s.methods import sums_place
from d4s.methods.base import LayerSize
from d4s.progress import amount, duration

# Tokens and prompts of an edit as CounterFact has them, where nothing but a number of edits is known.
PROMPT, TARGET = 12, 2
AFTER = 8  # from the subject's last token on, with the target
EDITED, NEIGHBORS = 3, 10  # prompts that are about the edit, its own and its paraphrases; prompts beside it
DISK = "disk"


@dataclass(frozen=True)
class Part:
    """Bytes in one place. certain: by the arithmetic of the code that holds them; else about so many"""

    place: str  # a device, or "disk"
    name: str
    bytes: int
    certain: bool = True
    loaded: bool = False  # whether a model that is there already holds them
    can_move: bool = False  # whether they are a closed form's, and go to the host with --sums-on cpu


@dataclass(frozen=True)
class Pass:
    """Rows that run through the model. share: of a whole forward pass, a backward pass counted like a forward one"""

    name: str
    rows: int
    tokens: int
    share: float
    seconds: float | None = None


@dataclass(frozen=True)
class Rates:
    """What was measured on this machine, on one device.

    forward, search: seconds a token forward through the whole model, and both ways above the last edited layer
    update, solve: of `Speed`, where the sums are
    """

    forward: float
    search: float
    update: float
    solve: float


@dataclass(frozen=True)
class Plan:
    """What a sequence will take. ranks: devices that share the passes, each with a model of its own

    later_passes: over the edits; what they make again is not known before, and not in `passes`
    sums_on_host: layers whose sums live on the CPU while W does not
    crossing: place → bytes of `Method.crossing`, of its widest layer
    """

    method: str
    layers: tuple[int, ...]
    edits: int
    ranks: int
    parts: tuple[Part, ...]
    passes: tuple[Pass, ...]
    sizes: Mapping[int, LayerSize] = field(repr=False)
    rates: Rates | None = None
    solving: float | None = None  # seconds in closed forms
    sums_on_host: tuple[int, ...] = ()
    crossing: Mapping[str, int] = field(default_factory=dict, repr=False)
    later_passes: int = 0

    @property
    def places(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(part.place for part in self.parts))

    def bytes(self, place: str, *, certain: bool = False, unloaded: bool = False) -> int:
        """In one place; certain: without what is told as about; unloaded: without what a loaded model holds."""
        return sum(
            part.bytes
            for part in self.parts
            if part.place == place and (part.certain or not certain) and not (part.loaded and unloaded)
        )

    @property
    def seconds(self) -> float | None:
        """Of all passes and closed forms; None without a measurement."""
        if self.rates is None:
            return None
        return sum(one.seconds or 0.0 for one in self.passes) + (self.solving or 0.0)

    @property
    def seconds_again(self) -> float | None:
        """Of an edit that a later pass makes again; None without a measurement."""
        if self.rates is None:
            return None
        own = sum(one.seconds or 0.0 for one in self.passes if one.name not in _OF_ALL)
        return (own + (self.solving or 0.0)) / self.edits

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "method": self.method,
            "layers": list(self.layers),
            "edits": self.edits,
            "sums_on_host": list(self.sums_on_host),
            "ranks": self.ranks,
            "bytes": {place: self.bytes(place) for place in self.places},
            "parts": [
                {"place": p.place, "name": p.name, "bytes": p.bytes, "certain": p.certain} for p in self.parts
            ],
            "passes": [vars(one) for one in self.passes],
            "rates": None if self.rates is None else vars(self.rates),
            "solving_seconds": self.solving,
            "seconds": self.seconds,
            "later_passes": self.later_passes,
            "seconds_again": self.seconds_again,
        }

    def summary(self) -> str:
        """Two text tables: what is held where, and what runs."""
        each = f", on each of {self.ranks} ranks" if self.ranks > 1 else ""
        lines = [
            f"{self.edits} edits with {self.method}, layers {', '.join(map(str, self.layers))}{each}",
            "",
        ]
        rows = [(p.place, p.name, ("" if p.certain else "about ") + amount(p.bytes)) for p in self.parts]
        rows += [(place, "together", amount(self.bytes(place))) for place in self.places]
        rows.sort(key=lambda row: self.places.index(row[0]))
        lines += _table(("place", "what", "bytes"), rows)
        if self.sums_on_host:
            crossing = ", ".join(
                f"{amount(count)} a layer to {place}" for place, count in self.crossing.items()
            )
            lines.append(
                f"sums of layers {', '.join(map(str, self.sums_on_host))} on the CPU: at each step {crossing}"
            )
        heads = ("pass", "rows", "tokens", "of a forward pass", "seconds")
        told = [
            (
                p.name,
                str(p.rows),
                str(p.tokens),
                f"{p.share:.2f}",
                "" if p.seconds is None else duration(p.seconds),
            )
            for p in self.passes
        ]
        if self.solving is not None:
            told.append(("closed form", "", "", "", duration(self.solving)))
        lines += ["", *_table(heads, told)]
        if self.seconds is not None:
            lines.append(f"together about {duration(self.seconds)}, by rates measured here")
        if self.later_passes:
            again = "as much as an edit before"
            if self.seconds_again is not None:
                again = f"about {duration(100 * self.seconds_again)} a hundred"
            lines.append(f"and in a later pass what is not said by then, made again: {again}")
        lines.append(
            f"for edits of {PROMPT} tokens a prompt, {TARGET} a target, {EDITED - 1} paraphrases and {NEIGHBORS} "
            "neighbours each"
        )
        return "\n".join(lines)

    def check(self, free: Mapping[str, int], *, loaded: bool = False) -> None:
        """Raises ConfigError, naming what would fit, where what is certain to be held is more than is free.

        free: place → bytes; a place that is not in it is not looked at
        loaded: whether the model is there already, and `free` is beside it
        """
        for place in self.places:
            needed = self.bytes(place, certain=True, unloaded=loaded)
            if place in free and needed > free[place]:
                raise ConfigError(
                    f"{place} has {amount(free[place])} free, and {self.edits} edits with {self.method} need "
                    f"{amount(needed)}: {self._largest(place, loaded)}; {self._cure(place, free, loaded)}"
                )

    def _largest(self, place: str, loaded: bool) -> str:
        parts = [p for p in self.parts if p.place == place and p.certain and not (p.loaded and loaded)]
        parts.sort(key=lambda part: -part.bytes)
        return ", ".join(f"{part.name} {amount(part.bytes)}" for part in parts[:4])

    def _cure(self, place: str, rooms: Mapping[str, int], loaded: bool) -> str:
        """The options with which it would fit. rooms: place → bytes that are free"""
        free = rooms[place]
        needed = self.bytes(place, certain=True, unloaded=loaded)
        # What goes with the layers: all but the model itself, and the host's copies of what does not.
        whole = sum(
            p.bytes for p in self.parts if p.place == place and p.name in _WHOLE and not (p.loaded and loaded)
        )
        found = []
        vectors = sum(p.bytes for p in self.parts if p.place == place and p.name == VECTORS)
        if vectors and needed - vectors <= free:
            found.append(f"--keep-vectors no (saves {amount(vectors)})")
        if all(size.itemsize == 4 for size in self.sizes.values()):
            half = sum(
                p.bytes for p in self.parts if p.place == place and p.name in _BY_DTYPE and not p.loaded
            )
            half += sum(p.bytes for p in self.parts if p.place == place and p.loaded)
            if needed - half // 2 <= free:
                found.append("--dtype bfloat16")
        sums = sum(p.bytes for p in self.parts if p.place == place and p.can_move)
        if place not in (DISK, sums_place.HOST) and needed - sums + self.crossing.get(place, 0) <= free:
            host = self.bytes(sums_place.HOST, certain=True, unloaded=loaded) + sums
            if sums and host <= rooms.get(sums_place.HOST, host):
                found.append(f"--sums-on cpu (moves {amount(sums)})")
        count = len(self.layers)
        fits = int(count * (free - whole) / max(1, needed - whole)) if free > whole else 0
        if 1 <= fits < count:
            found.append(f"--set layers={list(self.layers[-fits:])} ({fits} of {count} layers)")
        if found:
            return f"it would fit with {', or with '.join(found)}"
        if place == DISK:
            return "name an --out on a larger disk"
        more = (
            "--device-map auto over several GPUs"
            if place.startswith("cuda")
            else "a machine with more memory"
        )
        return f"neither --dtype bfloat16 nor a single layer makes it fit, so take {more}"


VECTORS = "journal: keys and residuals"
MODEL, SAVED = "model", "edited model"
STATISTICS, EVALUATIONS, TESTS, LATER = (
    "key statistics",
    "evaluations",
    "tests right after a step",
    "questions before later passes",
)
_OF_ALL = (STATISTICS, EVALUATIONS, TESTS, LATER)  # passes that an edit made again does not add to
_WHOLE = (MODEL, SAVED, sums_place.CROSSING)
_BY_DTYPE = (SAVED, sums_place.COPIES)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return aligned([(head, [row[i] for row in rows]) for i, head in enumerate(heads)], numbers=False)
