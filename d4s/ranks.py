"""Several processes at one work, by torch.distributed: who this one is, what falls to it, and what all then have.

Every process goes the same way with the same values; only long work over many things is divided (`share`), and what
stays is written by the first (`from_first`). A process that no launcher has started is one alone, and nothing of
torch.distributed is touched.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from d4s.errors import ConfigError, D4SError, EditingInterrupted, RankEnded

T = TypeVar("T")

_MEETING = timedelta(minutes=5)  # until all processes are there
_WAITING = timedelta(
    days=7
)  # for one another: whoever ends says so, and whoever is killed closes its connections
_LOOK = 0.5  # seconds between two looks at whether another has failed, while this one waits
_HEARD = 10.0  # seconds in which the first should hear that another has failed
_SAVING = 1800.0  # seconds that the first, which has heard it, may take to save what was made
_FAILED, _KNOWN, _LEFT = "d4s/failed", "d4s/known", "d4s/left"  # keys of the store that all can read
_WRONG = "d4s/wrong/"  # and the number of the next meeting: one process will bring an error to it
_KINDS = {"value": 0, "error": 1, "left off": 2}


class _LeftOff(Exception):
    """Another process brings an error to the next meeting, so that this one need not finish its part."""


def split(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Numbers of things, dealt out so that each part costs about the same; the same way in every process.

    The dearest first, each to the part that has least so far (of equal ones the first), which is at most 4/3 of the
    best there is. Numbers of a part ascend; parts may be empty.
    """
    load, found = [0.0] * parts, [list[int]() for _ in range(parts)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        part = min(range(parts), key=lambda p: load[p])
        found[part].append(i)
        load[part] += costs[i]
    return [sorted(part) for part in found]


class Ranks:
    """This process among those of a run. One alone does everything itself, and waits for nobody.

    rank: its number, from 0; count: how many there are
    """

    rank, count = 0, 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, what: str, work: Callable[[], T]) -> list[T]:
        """What `work` gives in each process, by rank. An error of one is raised in all (of several the first's).

        what: a word that tells this place from others: processes that meet at different ones have come apart
        Values and errors go as pickles between the processes of a run, and never through a file.
        """
        return [work()]

    def look(self) -> None:
        """To be called now and then in long work: ends it where another process has failed, and this one's is vain."""

    def agree(self, what: str, work: Callable[[], T]) -> T:
        """What `work` gives here, where it does not fail anywhere; an error is raised in all, as by `gather`."""
        made: list[T] = []
        self.gather(what, lambda: made.append(work()))
        return made[0]

    def all_know(self, error: BaseException | None) -> bool:
        """Whether it is, or came of, an error that is raised in all processes."""
        return True

    def share(
        self, what: str, costs: Sequence[float], work: Callable[[Sequence[int]], Sequence[T]]
    ) -> list[T]:
        """What `work` gives for each of several things, in their order; each process does those that fall to it.

        costs: of each thing, in any unit
        work: numbers of things, ascending → a value each; not called where there are none
        """
        return list(work(range(len(costs)))) if costs else []

    def sum_(self, tensor: Tensor) -> Tensor:
        """The tensor, in place, becomes the sum of all processes' own: in the order of their ranks, the same bits in
        each. float64, so that it hangs on their number by rounding at 1e-16 alone."""
        return tensor

    def from_first(self, work: Callable[[], T]) -> T:
        """What `work` gives in the first process, which alone does it, as if it were one alone; its error, too."""
        return work()

    def on_first(self, work: Callable[[], Any]) -> None:
        """`from_first` of what leaves something behind and gives nothing."""
        work()


class _Several(Ranks):
    """One of several. store: what all can write to and read, None: nothing; device: its own GPU, for sums there."""

    def __init__(self, group: Any, store: Any, device: torch.device | None) -> None:
        import torch.distributed as dist

        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self._dist, self._group, self._store, self._device = dist, group, store, device
        self._met = 0  # how often the processes have met
        self._looked = time.monotonic()
        self._told: BaseException | None = None  # the last error that all have been told

    def gather(self, what: str, work: Callable[[], T]) -> list[T]:
        try:
            value: Any = work()
            kind = "value"
        except Exception as error:
            if self.all_know(error):
                raise
            value, kind = error, "left off" if isinstance(error, _LeftOff) else "error"
            self._set(f"{_WRONG}{self._met + 1}")
        return self._meet(what, kind, value)

    def share(
        self, what: str, costs: Sequence[float], work: Callable[[Sequence[int]], Sequence[T]]
    ) -> list[T]:
        parts = split(costs, self.count)
        own = parts[self.rank]
        found = self.gather(what, lambda: list(work(own)) if own else [])
        place = {
            i: value
            for part, values in zip(parts, found, strict=True)
            for i, value in zip(part, values, strict=True)
        }
        return [place[i] for i in range(len(costs))]

    def sum_(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float64:
            raise TypeError(f"sums of several processes are float64, not {tensor.dtype}")
        self.gather(f"sum {list(tensor.shape)}", lambda: None)
        here = tensor if tensor.device in (torch.device("cpu"), self._device) else tensor.cpu()
        group = None if here.device == self._device else self._group
        total, part = torch.zeros_like(here), torch.empty_like(here)
        for rank in range(self.count):
            if rank == self.rank:
                part.copy_(here)
            self._wait(self._dist.broadcast(part, rank, group=group, async_op=True))
            total += part
        return tensor.copy_(total)

    def from_first(self, work: Callable[[], T]) -> T:
        def done() -> T | None:
            if not self.is_first:
                return None
            with alone():
                return work()

        return self.gather("first", done)[0]  # type: ignore[return-value]

    def on_first(self, work: Callable[[], Any]) -> None:
        def done() -> None:
            work()

        self.from_first(done)

    # How the processes meet.

    def _meet(self, what: str, kind: str, value: Any) -> list[Any]:
        data = pickle.dumps(value if kind == "value" else _plain(value))
        self._met += 1
        head = torch.tensor([self._met, zlib.crc32(what.encode()), _KINDS[kind], len(data)])
        heads = [torch.empty_like(head) for _ in range(self.count)]
        self._wait(self._dist.all_gather(heads, head, group=self._group, async_op=True))
        rows = [row.tolist() for row in heads]
        wrong = [rank for rank, row in enumerate(rows) if row[2] == _KINDS["error"]]
        found = []
        for rank, (_, _, _, size) in enumerate(rows):
            if wrong and rank != wrong[0]:
                continue
            buffer = (
                torch.frombuffer(bytearray(data), dtype=torch.uint8)
                if rank == self.rank
                else torch.empty(size, dtype=torch.uint8)
            )
            self._wait(self._dist.broadcast(buffer, rank, group=self._group, async_op=True))
            found.append(value if rank == self.rank else pickle.loads(buffer.numpy().data))
        if wrong:
            self._told = found[0]
            self._set(_KNOWN)
            raise found[0]
        apart = [rank for rank, row in enumerate(rows) if row[:2] != rows[0][:2]]
        if apart:
            raise RankEnded(
                f"the processes of this run have come apart: rank {apart[0]} is not where rank 0 is (at its step "
                f"{self._met}, {what!r}); all must be given the same model, data and arguments"
            )
        return found

    def all_know(self, error: BaseException | None) -> bool:
        while error is not None:
            if error is self._told:
                return True
            error = error.__cause__ or error.__context__
        return False

    def _wait(self, work: Any) -> None:
        """Until the work is done. Asleep in between, so that signals are heard; RankEnded if another has failed."""
        pause = 1e-5
        while not work.is_completed():
            time.sleep(pause)
            pause = min(2 * pause, 2e-3)
            if time.monotonic() - self._looked > _LOOK:
                self._look()
        try:
            work.wait()
        except RuntimeError as error:
            until = time.monotonic() + 2  # who fails says so before it closes its connections
            while time.monotonic() < until:
                self._look()
                time.sleep(0.05)
            raise RankEnded(
                f"another process of this run was ended ({str(error).splitlines()[0]}); start all of them again"
            ) from None

    def look(self) -> None:
        if time.monotonic() - self._looked > _LOOK:
            self._look()
            if self._has(f"{_WRONG}{self._met + 1}"):
                raise _LeftOff("another process of this run has failed")

    def _look(self) -> None:
        self._looked = time.monotonic()
        if self._has(_FAILED):
            said = self._store.get(_FAILED).decode()
            self._set(_KNOWN)
            raise RankEnded(said)

    def _has(self, key: str) -> bool:
        try:
            return self._store is not None and bool(self._store.check([key]))
        except (RuntimeError, ConnectionError):  # its keeper, the first process, has gone
            self._store = None
            return False

    def _set(self, key: str, text: str = "") -> None:
        if self._store is None or (key == _KNOWN and not self.is_first) or self._has(key):
            return
        with suppress(RuntimeError, ConnectionError):
            self._store.set(key, text)

    def leave(self, error: BaseException) -> None:
        """Says that this process ends by the error. Another than the first stays while that saves what was made: a
        launcher ends all as soon as one has gone."""
        if not self.all_know(error) and not isinstance(error, RankEnded):
            said = str(error) or type(error).__name__
            self._set(_FAILED, f"rank {self.rank} of {self.count} has failed: {said}")
        if self.is_first:
            self._set(_LEFT)
            return
        began = time.monotonic()
        while not self._has(_LEFT) and self._store is not None:
            if time.monotonic() - began > (_SAVING if self._has(_KNOWN) else _HEARD):
                return
            time.sleep(0.05)


def _plain(error: BaseException) -> BaseException:
    """An error that can go to another process: of the same type where that takes a text, without what it holds."""
    text = str(error) or type(error).__name__
    if not isinstance(error, EditingInterrupted):
        try:
            same = type(error)(text)
            pickle.loads(pickle.dumps(same))
            return same
        except Exception:  # of any kind: a type may want other arguments, or be known here alone
            pass
    return D4SError(text) if isinstance(error, D4SError) else RuntimeError(f"{type(error).__name__}: {text}")


_ALONE = Ranks()
_HERE: ContextVar[Ranks] = ContextVar("ranks", default=_ALONE)


def here() -> Ranks:
    """This process among those that work together now; one alone outside `joined`."""
    return _HERE.get()


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process works as one alone."""
    token = _HERE.set(_ALONE)
    try:
        yield
    finally:
        _HERE.reset(token)


@contextmanager
def joined() -> Iterator[Ranks]:
    """Inside, the processes that torchrun (or another launcher by RANK, WORLD_SIZE, MASTER_ADDR) has started work
    together: gloo for what is on the CPU, NCCL for sums on GPUs, of which each takes its own (LOCAL_RANK).

    Where nothing was launched, or a single process, it is one alone. A group that is there already is used, and left.
    Raises ConfigError where this torch has no torch.distributed.
    """
    if here().count > 1 or not _is_launched():
        yield here()
        return
    if not torch.distributed.is_available():
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}, and this torch was built without torch.distributed; start one "
            "process, without torchrun"
        )
    import torch.distributed as dist

    device, store = _own_gpu(), None
    own = not dist.is_initialized()
    if own:
        store, rank, count = next(iter(dist.rendezvous("env://", timeout=_MEETING)))
        store = dist.PrefixStore("d4s", store)
        backend = "gloo" if device is None else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=_MEETING)
    several = _Several(dist.new_group(backend="gloo", timeout=_WAITING), store, device if own else None)
    token = _HERE.set(several)
    try:
        yield several
    except BaseException as error:
        several.leave(error)
        raise
    else:
        if own:
            dist.destroy_process_group()
    finally:
        _HERE.reset(token)


def _is_launched() -> bool:
    """Whether a launcher says that there are others."""
    if any(name not in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")):
        return False
    return os.environ["WORLD_SIZE"].isdecimal() and int(os.environ["WORLD_SIZE"]) > 1


def _own_gpu() -> torch.device | None:
    """The GPU of this process, which "cuda" means from now on; None where processes outnumber GPUs on a machine."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.device_count()
    own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % found)
    torch.cuda.set_device(own)
    # A launcher that does not say may have put all on one GPU.
    on_machine = os.environ.get("LOCAL_WORLD_SIZE")
    enough = on_machine is not None and int(on_machine) <= found and torch.distributed.is_nccl_available()
    return own if enough else None


def exit_with(status: int) -> NoReturn:
    """Ends the process. One of several that fails ends at once: torch would wait for the others' connections."""
    if status and _is_launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
