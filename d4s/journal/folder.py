"""The files of a journal (docs/formats/journal.md): where they are, how they are written, and what of them is sound."""

from __future__ import annotations

import errno
import getpass
import hashlib
import json
import logging
import os
import re
import stat
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from d4s.errors import ConfigError, DataError, shown
from d4s.files import (
    WrongType,
    as_count,
    as_json,
    as_list,
    as_object,
    as_text,
    checking,
    make_folder,
    read_json,
    write_json,
)
from d4s.journal.log import Log
from d4s.tensor_files import TensorFile, load_tensors, save_tensors

logger = logging.getLogger(__name__)

FORMAT = "d4s-journal-1"
TENSORS = "d4s-journal-tensors-1"
WRITER = "d4s.edit_sequence(journal=…)"
HEAD = (
    "created", "by", "versions", "model", "tokenizer", "statistics", "edits", "method", "config", "chosen", "schedule",
    "count", "dtype", "layers", "weights", "transposed", "keeps_vectors", "snapshot_every", "segment_every", "source",
)  # fmt: skip
HEAD_LATER = ("architecture",)  # only where one was given
# What a sequence must have in common with a journal that it goes on in.
SAME = ("model", "tokenizer", "statistics", "edits", "method", "config", "schedule", "dtype")
POINT = "d4s-journal-point-1"
POINT_FIELDS = ("row", "evaluation", "fewer", "measured")
SNAPSHOTS_KEPT = 2
# Kinds of events that no sequence makes.
CHANGED_AFTER = ("undone", "redone", "revised", "consolidated", "merged")
FOLDERS = ("segments", "snapshots", "targets", "points")
_LEFT_OVER = re.compile(
    r".+\.[0-9]+\.part(\.[a-z]+)?"
)  # as `files.whole` names what it writes beside its place


def now() -> dict[str, str]:
    """When and by whom, as each event says it."""
    try:
        by = getpass.getuser()
    except (KeyError, OSError):  # a user without a name
        by = str(os.getuid()) if hasattr(os, "getuid") else ""
    return {"at": datetime.now(timezone.utc).isoformat(timespec="milliseconds"), "by": by}


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Folder:
    """A journal's folder: its head, its log, and its tensor files by number."""

    def __init__(self, root: Path, head: dict[str, Any], log: Log) -> None:
        self.root, self.head, self.log = root, head, log
        self._lock: FileLock | None = None

    @staticmethod
    def exists(path: str | os.PathLike[str]) -> bool:
        return (Path(path) / "journal.json").exists()

    @staticmethod
    def open(path: str | os.PathLike[str]) -> Folder:
        """Raises DataError for a folder that is no journal or holds links, or whose head or log is damaged.

        path: the journal, or a folder that holds it as journal/, as `d4s edit --out` leaves it
        """
        root = Path(path)
        if not Folder.exists(root) and Folder.exists(root / "journal"):
            root = root / "journal"
        check_own(root)
        if not Folder.exists(root):
            raise DataError(
                f"{root}: is no journal (it has no journal.json); name one, or the --out of d4s edit"
            )
        place = root / "journal.json"
        head = read_json(
            place, writer=WRITER, format=FORMAT, fields=HEAD, later=HEAD_LATER, always_digest=True
        )
        with checking(place, WRITER):
            _check_head(head)
        return Folder(root, head, Log.read(root / "log.jsonl", digest_of(head)))

    @staticmethod
    def is_free(path: str | os.PathLike[str]) -> bool:
        """Whether a journal may begin here: there is nothing, or what a process left that ended before it had begun."""
        root = Path(path)
        if not root.is_dir():
            return not os.path.lexists(root)
        return all(
            entry.name == "lock" or (entry.name.startswith("journal.") and _LEFT_OVER.fullmatch(entry.name))
            for entry in os.scandir(root)
        )

    @staticmethod
    def create(path: str | os.PathLike[str], head: Mapping[str, Any]) -> Folder:
        """A new journal, locked. ConfigError where another process writes one, or something else is there."""
        root = Path(path)
        make_folder(root)
        full = {"format": FORMAT, **json.loads(json.dumps(head))}
        folder = Folder(root, full, Log(root / "log.jsonl", digest_of(full)))
        check_own(root)
        folder.lock()  # before the head: two processes that begin at once would write one over the other's
        try:
            if not Folder.is_free(root):
                raise ConfigError(
                    f"{root}: another process has begun something here in the meantime; name another folder"
                )
            write_json(full, root / "journal.json", indent=1)
        except BaseException:
            folder.unlock()
            raise
        return folder

    def lock(self) -> None:
        """This process alone writes, until it ends or `unlock`. ConfigError where another one does, or nothing can be
        locked."""
        if self._lock is None:
            place = self.root / "lock"
            place.touch()
            _check_locks(place)
            lock = FileLock(place, timeout=0, mode=stat.S_IMODE(place.stat().st_mode))  # as the umask has it
            try:
                lock.acquire()
            except Timeout:
                raise ConfigError(
                    f"{self.root}: another process is writing to this journal; wait for its end, or name another folder"
                ) from None
            self._lock = lock
            self._remove_left_over()

    def _remove_left_over(self) -> None:
        """What a process that ended while it wrote has left beside its place."""
        for folder in (self.root, *(self.root / name for name in FOLDERS)):
            for entry in os.scandir(folder) if folder.is_dir() else ():
                if _LEFT_OVER.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    _removed(Path(entry.path))

    def reread(self) -> None:
        """The log as it is now: it may have grown before this process had the lock."""
        check_own(self.root)
        self.log = Log.read(self.log.path, self.log.begin)

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def append(self, kind: str, **fields: Any) -> dict[str, Any]:
        return self.log.append(kind, **now(), **fields)

    def is_complete(self, passes: int = 1) -> bool:
        """Whether its sequence has come to its end, and has made so many passes."""
        at_first = self.head["schedule"].get("passes", 1)
        return any(
            event["kind"] == "ended" and event["failure"] is None and event.get("passes", at_first) >= passes
            for event in self.events
        )

    @property
    def model(self) -> Path:
        """Where the edited model is saved beside it, if it is."""
        return (self.root.parent if self.root.name == "journal" else self.root) / "model"

    @property
    def events(self) -> list[dict[str, Any]]:
        return self.log.events

    @property
    def steps_made(self) -> int:
        """Edits that the sequence's own steps have made, those made again among them."""
        return sum(len(event["edits"]) for event in self.events if event["kind"] == "step")

    @property
    def is_changed_after(self) -> bool:
        """Whether it is no longer what its sequence alone has made."""
        return any(event["kind"] in CHANGED_AFTER for event in self.events)

    # Tensor files: "base", "priors", or a number in "segments", "snapshots" or "targets".

    def place(self, kind: str, number: int | None = None) -> Path:
        return self.root / (f"{kind}.safetensors" if number is None else f"{kind}/{number:06d}.safetensors")

    def save(self, kind: str, number: int | None, tensors: Mapping[str, Tensor]) -> str:
        """The digest of the file, durable when this returns."""
        facts = {"format": TENSORS, "journal": self.log.begin, "kind": kind}
        return save_tensors(self.place(kind, number), tensors, facts)

    def add_segment(self, first: int, last: int, tensors: Mapping[str, Tensor]) -> None:
        """Vectors of the steps from `first` to `last` (`d4s.journal.sums.packed`), and the line that names them."""
        self.append("segment", first=first, step=last, digest=self.save("segments", last, tensors))

    def add_snapshot(self, state: Mapping[str, Tensor]) -> None:
        """The state after the last event, and the line that names it; the oldest snapshot goes."""
        event = len(self.events) - 1
        self.append("snapshot", event=event, digest=self.save("snapshots", event, state))
        self._drop_old_snapshots()

    def append_with_snapshot(self, kind: str, state: Mapping[str, Tensor], **fields: Any) -> None:
        """An event, and the state after it. The state is durable first: of experts it alone holds the event's rows. A
        failure leaves the log as it was."""
        digest = self.save("snapshots", len(self.events), state)
        self.append(kind, **fields, snapshot=digest)
        self._drop_old_snapshots()

    def add_point(self, made: int, values: Mapping[str, Any]) -> None:
        """The JSON values of a point, by POINT_FIELDS, and the line that names them."""
        stored = {"format": POINT, **values}
        write_json(stored, self._point_place(made))
        self.append("point", made=made, digest=digest_of(stored))

    def point(self, event: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
        """(place, values) of the point that a line of the log names. DataError for another file, or a damaged one."""
        place = self._point_place(int(event["made"]))
        stored = read_json(place, writer="a journal", format=POINT, fields=POINT_FIELDS, always_digest=True)
        if digest_of(stored) != event["digest"]:
            raise DataError(
                f"{place}: is not the file that the log names (its digest differs); put the right one in its place"
            )
        return place, stored

    def _point_place(self, made: int) -> Path:
        return self.root / f"points/{made:06d}.json"

    def load(self, kind: str, number: int | None = None, digest: str | None = None) -> TensorFile:
        """Raises DataError for a file that is missing, damaged, another journal's, or not the one that was logged."""
        place = self.place(kind, number)
        file = load_tensors(place, TENSORS, WRITER, DataError)
        file.check_intact(DataError)
        if file.facts.get("journal") != self.log.begin or file.facts.get("kind") != kind:
            raise DataError(
                f"{place}: belongs to another journal, or stands in another file's place; put the right one there"
            )
        if digest is not None and file.digest != digest:
            raise DataError(
                f"{place}: is not the file that the log names (its digest differs); put the right one in its place"
            )
        return file

    def sound(self, kind: str) -> list[tuple[int, dict[str, Any]]]:
        """(number, event) of the files of a kind that the log names, oldest first.

        Whether they are sound shows when they are loaded.
        kind: "segments" | "snapshots"
        """
        if kind == "segments":
            return [(e["step"], e) for e in self.events if e["kind"] == "segment"]
        return [
            (e["event"], e) if e["kind"] == "snapshot" else (e["n"], e | {"digest": e["snapshot"]})
            for e in self.events
            if e["kind"] == "snapshot" or "snapshot" in e
        ]

    def _drop_old_snapshots(self) -> None:
        for number, _ in self.sound("snapshots")[:-SNAPSHOTS_KEPT]:
            _removed(self.place("snapshots", number))


def _removed(path: Path) -> None:
    """One that cannot be removed only takes up room, and is tried again by the next one who removes."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s: is not needed any more, and cannot be removed (%s)", path, error.strerror)


def _check_locks(place: Path) -> None:
    """ConfigError where the file system locks no files: Lustre without `-o flock`, some of FUSE, NFS without lockd.

    Some versions of filelock take the existence of the file for a lock there, which outlives a process that is killed;
    others tell of another process where there is none.
    """
    if sys.platform == "win32":
        return  # which has other locks
    import fcntl

    with open(place, "r+b") as file:
        try:
            # Shared: two that ask at once do not refuse each other.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):  # those say that another process has it
                raise ConfigError(
                    f"{place.parent}: this file system has no locks ({error.strerror}), so a second process could not "
                    "be kept from writing; name a folder on another one"
                ) from None


def check_own(root: Path) -> None:
    """DataError if something in a journal is no file or folder of its own.

    A symbolic link could have what is elsewhere read as the journal's, or written over; a pipe never ends. The journal
    itself may be reached through a link.
    """
    waiting = [root] if root.is_dir() else []
    while waiting:
        folder = waiting.pop()
        for entry in _entries(folder):
            if entry.is_symlink():
                raise DataError(
                    f"{entry.path}: is a symbolic link; a journal holds all its files itself; put in its place what it "
                    "leads to, if that is the journal's, or remove it"
                )
            try:
                mode = entry.stat(follow_symlinks=False).st_mode
            except FileNotFoundError:
                continue
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise DataError(
                    f"{entry.path}: is a pipe, socket or device; a journal holds files only; remove it"
                )
            if folder == root and stat.S_ISDIR(mode) != (entry.name in FOLDERS) and _is_ours(entry.name):
                kind = "folder" if stat.S_ISDIR(mode) else "file"
                raise DataError(f"{entry.path}: is a {kind}; that is not what a journal has there")
            if stat.S_ISDIR(mode) and (folder != root or entry.name in FOLDERS):
                waiting.append(Path(entry.path))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in it; of a folder that is gone nothing: another process may be writing."""
    try:
        return list(os.scandir(folder))
    except FileNotFoundError:
        return []


def _is_ours(name: str) -> bool:
    files = ("journal.json", "log.jsonl", "lock", "base.safetensors", "priors.safetensors", "baseline.json")
    return name in FOLDERS or name in files


def _check_head(head: Mapping[str, Any]) -> None:
    """Raises WrongType for a head that holds other values than a journal's."""
    for name in ("created", "by", "model", "tokenizer", "edits", "method", "dtype", "source"):
        as_text(head[name], name)
    if head["statistics"] is not None:
        as_text(head["statistics"], "statistics")
    for name in ("versions", "config", "chosen", "schedule", "weights", "transposed"):
        as_json(as_object(head[name], name), name)
    if "architecture" in head:
        as_json(as_object(head["architecture"], "architecture"), "architecture")
    for name in ("count", "snapshot_every", "segment_every"):
        if as_count(head[name], name) < 1:
            raise WrongType(f"{name} must be 1 or more, not 0")
    layers = [as_count(layer, "layers") for layer in as_list(head["layers"], "layers")]
    for name in ("weights", "transposed"):
        if set(head[name]) != {str(layer) for layer in layers}:
            raise WrongType(f"{name} must have an entry for each of the layers {layers}")
    as_count(head["schedule"].get("seed"), "schedule, seed")
    if not isinstance(head["keeps_vectors"], bool):
        raise WrongType(f"keeps_vectors must be true or false, not {shown(head['keeps_vectors'])}")


def differing(head: Mapping[str, Any], wanted: Mapping[str, Any], names: Iterable[str] = SAME) -> list[str]:
    """What a journal's head and a sequence that wants to go on in it do not agree in, each with both values."""
    return [
        told
        for name in names
        if head.get(name) != wanted[name]
        for told in _apart(name, head.get(name), wanted[name])
    ]


def _apart(name: str, there: Any, here: Any) -> list[str]:
    """Of objects their fields, each by itself."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        fields = [
            field
            for field in (*there, *(f for f in here if f not in there))
            if there.get(field) != here.get(field)
        ]
        return [
            told for field in fields for told in _apart(f"{name}.{field}", there.get(field), here.get(field))
        ]
    return [f"{name} ({_short(there)} there, {_short(here)} here)"]


def _short(value: Any, most: int = 120) -> str:
    text = json.dumps(value)
    return text if len(text) <= most else f"{text[:most]}…"
