"""A file layer that counts what a journal writes, and gives way at one point of it; processes that are killed there."""

from __future__ import annotations

import builtins
import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from support.sequences import sequence, state, without_times
from tqdm import tqdm

from d4s import tensor_files
from d4s.journal.folder import Folder
from d4s.journal.sums import Sums
from d4s.tensor_files import load_tensors

SMALL = dict(layers=[0, 1], steps=1, learning_rate=1.0, contexts=0, prior_weight=1e-2, ridge=0.1)


class Points:
    """What is written, point by point: names in their order, and what happens at each.

    at(number, kind, whole, half): called in place of each; `whole()` does it, `half()` leaves the half of it
    """

    def __init__(self, at: Callable[[int, str, Callable[[], Any], Callable[[], Any]], Any]) -> None:
        self.at = at
        self.kinds: list[str] = []
        self.path: Path | None = None  # of the last one, where it is called by name

    def reach(
        self,
        kind: str,
        whole: Callable[[], Any],
        half: Callable[[], Any] = lambda: None,
        path: Path | None = None,
    ) -> Any:
        self.kinds.append(kind)
        self.path = path
        return self.at(len(self.kinds), kind, whole, half)

    @contextmanager
    def watched(self) -> Iterator[Points]:
        """Inside, every write, sync, rename, truncation, removal and new folder of a journal passes here."""
        fsync, replace, unlink, mkdir = os.fsync, Path.replace, Path.unlink, Path.mkdir
        write_text, save_file = Path.write_text, tensor_files.save_file

        def text(path: Path, data: str, **options: Any) -> Any:
            return self.reach(
                f"write {path.suffix}",
                lambda: write_text(path, data, **options),
                lambda: write_text(path, data[: len(data) // 2], **options),
            )

        def tensors(found: Any, path: Path, metadata: Any) -> None:
            def half() -> None:
                save_file(found, path, metadata)
                os.truncate(path, os.path.getsize(path) // 2)

            try:
                self.reach("write tensors", lambda: save_file(found, path, metadata), half)
            except OSError as error:  # as safetensors tells of it
                raise SafetensorError(f"I/O error: {error}") from None

        def removed(path: Path, missing_ok: bool = False) -> None:
            if path.exists():
                self.reach("unlink", lambda: unlink(path), path=path)
            elif not missing_ok:
                unlink(path)

        def made(path: Path, *arguments: Any, **options: Any) -> None:
            if not path.exists():
                self.reach("mkdir", lambda: mkdir(path, *arguments, **options), path=path)

        def opened(path: Path, mode: str) -> _LogFile:
            return _LogFile(self, path, mode)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", lambda handle: self.reach("fsync", lambda: fsync(handle)))
            patch.setattr(Path, "replace", lambda a, b: self.reach("rename", lambda: replace(a, b), path=a))
            patch.setattr(Path, "unlink", removed)
            patch.setattr(Path, "mkdir", made)
            patch.setattr(Path, "write_text", text)
            patch.setattr(tensor_files, "save_file", tensors)
            patch.setattr("d4s.journal.log.open", opened, raising=False)
            yield self


class _LogFile:
    """The log as `Log.append` opens it, unbuffered, so that a write is there when it returns."""

    def __init__(self, points: Points, path: Path, mode: str) -> None:
        self.points, self.file = points, builtins.open(path, mode, buffering=0)  # noqa: SIM115

    def write(self, data: bytes) -> None:
        self.points.reach(
            "write line", lambda: self.file.write(data), lambda: self.file.write(data[: len(data) // 2])
        )

    def truncate(self, size: int) -> None:
        self.points.reach("truncate", lambda: self.file.truncate(size))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> _LogFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def no_space(number: int, *, torn: bool = False, lasting: bool = False) -> Points:
    """The number-th point fails; torn: after half of it; lasting: and all behind it fail too."""

    def at(here: int, kind: str, whole: Callable[[], Any], half: Callable[[], Any]) -> Any:
        if here == number or (lasting and here > number):
            if torn:
                half()
            code = errno.ENOSPC if kind.startswith("write") or kind == "mkdir" else errno.EIO
            # The system names the file where it was called by name, and does not where by a handle.
            names = () if points.path is None else (str(points.path),)
            raise OSError(code, os.strerror(code), *names)
        return whole()

    points = Points(at)
    return points


def counted() -> Points:
    return Points(lambda _number, _kind, whole, _half: whole())


def killed(number: int, how: str) -> Points:
    """The process is killed at the number-th point. how: "before" | "half" | "after" it"""

    def at(here: int, _kind: str, whole: Callable[[], Any], half: Callable[[], Any]) -> Any:
        if here == number:
            {"before": lambda: None, "half": half, "after": whole}[how]()
            os.kill(os.getpid(), signal.SIGKILL)
        return whole()

    return Points(at)


def forked(work: Callable[[], object]) -> int:
    """The id of a process that does the work and ends with 0, or 1 if it raised."""
    child = os.fork()
    if child:
        return child
    # tqdm's own lock is one of all processes: a child that is killed with it would hold it for ever.
    tqdm.set_lock(RLock())
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def was_killed(child: int) -> bool:
    """Waits for it. Fails if it ended by an error of its own."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the process failed; what it said is above"
    return False


def told(result: Any) -> Any:
    """All that a sequence says, but for its clocks."""
    return (
        without_times(result.history),
        [
            {name: row.get(name) for name in ("id", "step", "last_probability", "written_probability")}
            for row in result.edits_table
        ],
        [evaluation.to_dict() for evaluation in result.evaluations],
    )


class Kept:
    """A sequence on a model, its right end, and whether what a journal has goes on to that."""

    def __init__(self, model: Any, covariance: Any, edits: Any, **options: Any) -> None:
        self.model, self.covariance, self.edits = model, covariance, edits
        self.options = {"config": SMALL, "evaluate_every": 2} | options
        self.unedited = state(model)
        result = self.run(None)
        self.right, self.said = state(model), told(result)
        result.restore()

    def run(self, journal: Path | None, **more: Any) -> Any:
        return sequence(self.model, self.covariance, self.edits, journal=journal, **self.options | more)

    def at_the_start(self) -> bool:
        now = state(self.model)
        return all(torch.equal(now[name], tensor) for name, tensor in self.unedited.items())

    def goes_on(self, journal: Path) -> None:
        """To the right end, from which its weights follow without the model too; then the model is unedited."""
        result = self.run(journal)
        now = state(self.model)
        assert all(torch.equal(now[name], tensor) for name, tensor in self.right.items()), "other weights"
        assert told(result) == self.said
        assert result.failure is None
        folder = Folder.open(journal)
        assert not folder.log.torn
        if folder.place("priors").exists():
            sums = Sums(folder).weights()
            for layer, name in folder.head["weights"].items():
                assert torch.equal(sums[int(layer)], now[name]), "other weights without the model"
        assert not list(journal.rglob("*.part*"))
        result.restore()
        assert self.at_the_start()


def nothing_half(journal: Path) -> None:
    """Every file under its own name is whole."""
    if not Folder.exists(journal):
        return
    folder = Folder.open(journal)
    for path in journal.rglob("*.safetensors"):
        if ".part" not in path.name:
            kind = "d4s-targets-1" if path.parent.name == "targets" else "d4s-journal-tensors-1"
            assert load_tensors(path, kind, "a journal", ValueError).intact, path  # type: ignore[arg-type]
    for kind in ("segments", "snapshots"):
        for number, event in folder.sound(kind)[-2:]:
            folder.load(kind, number, event["digest"])
