"""Forward passes of one step, whose layers are written from below."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from d4s.models.architectures import Anatomy
from d4s.models.trace import Trace, first_tensor, replaced_forward

Ids = tuple[tuple[int, ...], ...]  # of the rows of a batch

KEPT_BYTES = 2**28  # of what blocks have put out, in one step; batches beyond that run whole


class Ascent:
    """Passes of the same rows at one layer after another, each of which begins where the one before it stood.

    Below the layer that a step writes next nothing changes any more. What the last block there puts out is kept, a
    batch of rows at a time, and the blocks up to it do not run again: the same numbers come out, to the last bit. Of n
    layers up to block L that is n passes through what lies above each instead of n passes from the embedding on.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self._layer = 0
        self._kept: dict[Ids, tuple[int, Any]] = {}  # how many blocks, and what the last of them returned

    def through(self, layers: Iterable[int]) -> Iterator[int]:
        """The layers, ascending: as one is given, all blocks below it stay as they are until the step ends."""
        for layer in layers:
            self._layer = layer
            yield layer

    @contextmanager
    def passing(self, rows: Ids) -> Iterator[None]:
        """Around a forward pass of a batch, which goes up to the reached layer or further."""
        blocks = self.anatomy.blocks
        begin, returned = self._kept.get(rows, (0, None))
        settled = min(self._layer, self.anatomy.skippable)
        with ExitStack() as stack:
            if begin:
                known = {blocks[i]: (lambda *_args, **_kwargs: returned) for i in range(begin)}
                stack.enter_context(replaced_forward(known))
            last = stack.enter_context(Trace(blocks[settled - 1])) if settled > begin else None
            yield
        if last is not None and self._others(rows) + first_tensor(last.returned).nbytes <= KEPT_BYTES:
            self._kept[rows] = (settled, last.returned)

    def _others(self, rows: Ids) -> int:
        """Bytes kept of other batches."""
        return sum(first_tensor(kept).nbytes for ids, (_, kept) in self._kept.items() if ids != rows)
