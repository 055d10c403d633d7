"""Disks that give way at every single point of what a journal writes: nothing is lost, and nothing is made up."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.faults import Kept, counted, no_space, nothing_half, told
from support.sequences import EDITS, ready, same, state

import d4s
from d4s.errors import D4SError, EditingFailed, EditingStopped
from d4s.files import make_folder, whole
from d4s.interrupts import ending_signals_raise
from d4s.journal.folder import Folder
from d4s.methods.d4s import D4SEditor
from d4s.sequence import journaling


@pytest.fixture
def kept(monkeypatch, seed) -> Kept:
    """Three edits, and within them ends of segments, snapshots, one of which is given up, and a window of targets."""
    monkeypatch.setattr("d4s.methods.locate_then_edit.EDITS_AHEAD", 2)
    monkeypatch.setattr(journaling, "SEGMENT_EVERY", 2)
    monkeypatch.setattr(journaling, "SNAPSHOT_EVERY", 1)
    return Kept(*ready(seed), EDITS[:3], original=False)


@pytest.mark.parametrize(
    ("how", "every"), [({"torn": True}, 1), ({}, 4), ({"torn": True, "lasting": True}, 4)], ids=str
)
def test_whatever_fails_to_be_written_the_same_call_goes_on(
    kept: Kept, tmp_path: Path, seed: int, how: dict, every: int
) -> None:
    """every: points of which one is taken; another one with a fresh seed"""
    with counted().watched() as points:
        kept.run(tmp_path / "counted").restore()
    kinds = points.kinds
    assert {k.split()[0] for k in kinds} == {"write", "fsync", "rename", "truncate", "unlink", "mkdir"}
    tolerated = 0
    for number, kind in list(enumerate(kinds, start=1))[seed % every :: every]:
        journal = tmp_path / str(number)
        try:
            with no_space(number, **how).watched():
                result = kept.run(journal)
            tolerated += 1
            assert kind == "unlink", f"{kind} {number} fails, and nobody hears of it"
            assert same(state(kept.model), kept.right)
            result.restore()
        except (D4SError, OSError) as error:
            assert len(str(error)) > 20 and str(tmp_path) in str(error), (number, kind, str(error))
            if isinstance(error, EditingFailed):
                error.result.restore()
        assert kept.at_the_start(), f"{kind} {number}: the weights are not what they were"
        nothing_half(journal)
        kept.goes_on(journal)
    assert every > 1 or tolerated == kinds.count("unlink")


def test_a_step_that_fails_half_way_is_in_no_snapshot(kept: Kept, monkeypatch, tmp_path: Path) -> None:
    """Its rows are in the sums already, and the log does not know them."""
    plain, calls = D4SEditor._put, []

    def put(self, rows):
        plain(self, rows)
        calls.append(rows)
        if len(calls) == 6:  # of the third edit, in the upper layer
            raise RuntimeError("no room")

    monkeypatch.setattr(journaling, "SNAPSHOT_EVERY", 50)
    with monkeypatch.context() as patch:
        patch.setattr(D4SEditor, "_put", put)
        with pytest.raises(EditingFailed, match="no room") as caught:
            kept.run(tmp_path / "j")
    caught.value.result.restore()
    kept.goes_on(tmp_path / "j")


def crashes_behind(step: int, kept: Kept, monkeypatch, journal: Path) -> None:
    class Crash(d4s.Observer):
        def step(self, result, batch):
            if len(result.edits_table) == step:
                raise RuntimeError("crash")

    with monkeypatch.context() as patch:
        patch.setattr(journaling.Journaling, "ended", lambda self, *_: self.folder.unlock())  # as if killed
        with pytest.raises(EditingFailed) as caught:
            kept.run(journal, observers=[Crash()])
    caught.value.result.restore()


def test_vectors_before_a_snapshot_are_there_after_a_crash_behind_it(
    kept: Kept, monkeypatch, tmp_path: Path
) -> None:
    """Steps before it are not made again, so what they put into the sums must be in a segment by then."""
    monkeypatch.setattr(journaling, "SEGMENT_EVERY", 50)
    monkeypatch.setattr(journaling, "SNAPSHOT_EVERY", 2)
    crashes_behind(3, kept, monkeypatch, tmp_path / "j")
    kept.goes_on(tmp_path / "j")


@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("long", ["SEGMENT_SECONDS", "SNAPSHOT_SECONDS", "VECTOR_SECONDS"])
def test_of_few_long_steps_none_that_is_done_is_made_again(
    kept: Kept, monkeypatch, tmp_path: Path, vectors: bool, long: str
) -> None:
    """Steps of a hundred edits take minutes each: none would come to be a 64th or a thousandth."""
    monkeypatch.setattr(journaling, "SEGMENT_EVERY", 50)
    monkeypatch.setattr(journaling, "SNAPSHOT_EVERY", 50)
    monkeypatch.setattr(journaling, "SNAPSHOT_TIMES", 0)
    monkeypatch.setattr(journaling, long, 0.0)
    monkeypatch.setitem(kept.options, "keep_vectors", vectors)
    journal = tmp_path / "j"
    crashes_behind(2, kept, monkeypatch, journal)
    kinds = [event["kind"] for event in Folder.open(journal).events]
    of_use = vectors == (long != "SNAPSHOT_SECONDS")  # others do not look at it
    snapshots = 2 if of_use and long != "SEGMENT_SECONDS" else 0
    assert kinds.count("snapshot") == snapshots
    assert kinds.count("segment") == (2 if vectors and of_use else 0)
    plain, made = D4SEditor.apply, []
    with monkeypatch.context() as patch:
        patch.setattr(D4SEditor, "apply", lambda self, batch: made.extend(batch) or plain(self, batch))
        result = kept.run(journal)
    assert same(state(kept.model), kept.right) and told(result) == kept.said
    result.restore()
    assert len(made) == (1 if of_use else 3)


def test_a_snapshot_that_takes_long_is_taken_seldom(kept: Kept, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(journaling, "SNAPSHOT_EVERY", 50)
    monkeypatch.setattr(journaling, "VECTOR_SECONDS", 0.0)
    monkeypatch.setattr(journaling, "SNAPSHOT_TIMES", 1e9)
    kept.run(tmp_path / "j").restore()
    kinds = [event["kind"] for event in Folder.open(tmp_path / "j").events]
    assert kinds.count("snapshot") == 2  # behind the first step, and at the end


def test_what_took_long_to_make_again_is_in_a_snapshot_before_the_next_step(
    kept: Kept, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(journaling, "SNAPSHOT_EVERY", 50)
    monkeypatch.setattr(journaling, "SEGMENT_EVERY", 50)
    journal = tmp_path / "j"
    crashes_behind(2, kept, monkeypatch, journal)
    monkeypatch.setattr(journaling, "SNAPSHOT_SECONDS", 0.0)
    kept.goes_on(journal)
    kinds = [event["kind"] for event in Folder.open(journal).events if event["kind"] in ("step", "snapshot")]
    assert kinds == ["step", "step", "snapshot", "step", "snapshot"]


def test_a_segment_that_was_lost_in_the_middle_is_written_again_and_read(
    kept: Kept, monkeypatch, tmp_path: Path
) -> None:
    """The steps that are made again are no neighbours, and the older, damaged segment is still named by the log."""
    monkeypatch.setattr(journaling, "SEGMENT_EVERY", 1)
    monkeypatch.setattr(journaling, "SNAPSHOT_EVERY", 50)
    journal = tmp_path / "j"
    kept.run(journal).restore()
    for lost in ("000001", "000003"):
        path = journal / "segments" / f"{lost}.safetensors"
        path.write_bytes(path.read_bytes()[:-5])
    for snapshot in (journal / "snapshots").iterdir():
        snapshot.unlink()
    kept.goes_on(journal)
    (journal / "segments/000002.safetensors").unlink()
    for snapshot in (journal / "snapshots").iterdir():
        snapshot.unlink()
    kept.goes_on(journal)


def test_a_snapshot_that_does_not_fit_is_not_taken_in_by_half(
    kept: Kept, monkeypatch, tmp_path: Path
) -> None:
    plain = D4SEditor.take_held
    journal = tmp_path / "j"
    kept.run(journal).restore()
    for error in (KeyError, ValueError, RuntimeError):

        def take(self, stored, error=error):
            raise error("another version wrote it")

        with monkeypatch.context() as patch:
            patch.setattr(D4SEditor, "take_held", take)
            result = kept.run(journal)
            assert same(state(kept.model), kept.right) and told(result) == kept.said
            result.restore()
    assert D4SEditor.take_held is plain


def test_two_that_begin_at_once_do_not_write_over_each_other(kept: Kept, tmp_path: Path) -> None:
    first, second = (journaling.Journaling(tmp_path / "j") for _ in range(2))
    head = {"created": "first"}
    first.folder = Folder.create(first.path, head)
    with pytest.raises(d4s.ConfigError, match="another process"):
        Folder.create(second.path, {"created": "second"})
    first.close()
    with pytest.raises(d4s.ConfigError, match="in the meantime"):
        Folder.create(second.path, {"created": "second"})
    assert '"first"' in (tmp_path / "j" / "journal.json").read_text()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=os.strerror)
def test_a_file_system_without_locks_is_told_and_leaves_no_journal_locked(
    monkeypatch, tmp_path: Path, number: int
) -> None:
    """Not that another process writes, which would be waited for in vain; nor is a lock left that no process holds."""
    before = Folder.create(tmp_path / "before", {"created": "before"})
    before.unlock()

    def no_locks(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", no_locks)
        for _ in range(2):
            for locked in (before.lock, lambda: Folder.create(tmp_path / "new", {"created": "new"})):
                with pytest.raises(d4s.ConfigError, match="this file system has no locks") as told:
                    locked()
                assert os.strerror(number) in str(told.value) and str(tmp_path) in str(told.value)
    before.lock()
    Folder.create(tmp_path / "new", {"created": "new"})


def test_a_journal_is_read_while_another_process_writes_it(kept: Kept, monkeypatch, tmp_path: Path) -> None:
    """A file beside its place gets its name, and an old snapshot goes, between a folder's list and a look at them."""
    kept.run(tmp_path / "j").restore()
    passing = [tmp_path / "j" / "points" / "000009.part.json", tmp_path / "j" / "snapshots" / "old"]
    passing[0].write_text("{}")
    passing[1].mkdir()
    plain, gone = os.scandir, []

    def scandir(path):
        found = list(plain(path))
        for one in passing:
            if one.parent == Path(path):
                gone.append(one)
                one.rmdir() if one.is_dir() else one.unlink()
        return iter(found)

    monkeypatch.setattr(os, "scandir", scandir)
    assert Folder.open(tmp_path / "j").steps_made == len(kept.edits)
    assert sorted(gone) == sorted(passing)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_during_a_step_stops_behind_it_and_the_same_call_goes_on(
    kept: Kept, monkeypatch, tmp_path: Path, name: str
) -> None:
    plain, calls = D4SEditor.apply, []

    def apply(self, batch):
        calls.append(batch)
        if len(calls) == 2:
            os.kill(os.getpid(), getattr(signal, name))
        return plain(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(D4SEditor, "apply", apply)
        with ending_signals_raise(), pytest.raises(EditingStopped) as caught:
            kept.run(tmp_path / "j")
    assert len(caught.value.result.edits_table) == 2
    caught.value.result.restore()
    events = Folder.open(tmp_path / "j").events
    assert sum(event["kind"] == "step" for event in events) == 2 and events[-1]["kind"] == "ended"
    kept.goes_on(tmp_path / "j")


def test_an_interruption_at_any_line_of_an_append_leaves_a_log_that_goes_on(tmp_path: Path) -> None:
    """A second Ctrl-C does not wait for the end of a step."""
    from d4s.journal import log

    lines = 0
    for stop in range(1, 100):
        here = log.Log(tmp_path / f"{stop}.jsonl", "0" * 64)
        here.append("a")
        left = stop

        def trace(frame, event, _argument):
            nonlocal left
            if frame.f_code.co_name != "append" or frame.f_code.co_filename != log.__file__:
                return None
            if event == "line":
                left -= 1
                if not left:
                    raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            here.append("b", value=1)
        except KeyboardInterrupt:
            lines += 1
        finally:
            sys.settrace(before)
        here.append("c", value=22)
        again = log.Log.read(here.path, "0" * 64)
        assert again.events == here.events and not again.torn
        assert [event["n"] for event in again.events] == list(range(len(again.events)))
        if left > 0:
            break
    assert lines > 10


def test_new_folders_are_synced_from_above(tmp_path: Path, monkeypatch) -> None:
    """A file is not there after a loss of power if the folder that it lies in is not."""
    synced = []
    monkeypatch.setattr("d4s.files.sync_folder", lambda path: synced.append(Path(path)))
    with whole(tmp_path / "a" / "b" / "c.json") as beside:
        beside.touch()
    assert set(synced) == {tmp_path, tmp_path / "a", tmp_path / "a" / "b"}
    synced.clear()
    make_folder(tmp_path / "a")
    assert synced == []


def test_files_follow_the_umask_and_none_is_executable(kept: Kept, tmp_path: Path) -> None:
    for mask, wanted in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(mask)
        try:
            journal = tmp_path / f"{mask:o}"
            kept.run(journal).restore()
        finally:
            os.umask(before)
        found = {path.name: path.stat().st_mode & 0o777 for path in journal.rglob("*") if path.is_file()}
        assert len(found) > 10 and {"lock", "log.jsonl", "journal.json"} <= set(found)
        assert {name: mode for name, mode in found.items() if mode != wanted} == {}


def test_no_connection_is_opened(kept: Kept, monkeypatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a network connection")

    for name in ("connect", "connect_ex", "bind", "sendto"):
        monkeypatch.setattr(f"socket.socket.{name}", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    kept.goes_on(tmp_path / "j")
    kept.goes_on(tmp_path / "j")


def test_what_safetensors_cannot_write_is_an_error_in_words(tmp_path: Path) -> None:
    """With a real limit on the size of files, which tells of what its own code does then."""
    code = (
        "import resource, torch\n"
        "from d4s.tensor_files import save_tensors\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        f"    save_tensors({str(tmp_path / 'a.safetensors')!r}, {{'a': torch.ones(9999)}}, {{'format': 'x'}})\n"
        "except OSError as error:\n"
        "    print('told:', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "told:" in done.stdout and "a.safetensors" in done.stdout, done
    assert list(tmp_path.iterdir()) == []
