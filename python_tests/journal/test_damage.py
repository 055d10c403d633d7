"""Journals that were damaged or changed: the sequence goes on to its right end, or a D4SError says why it does not.

The seed of the mutations is printed; D4S_FUZZ_SEED=… repeats it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support.faults import Kept, told
from support.hanging import ends_within
from support.sequences import EDITS, ready, same, state

from d4s import tensor_files
from d4s.errors import D4SError, EditingFailed
from d4s.files import write_json
from d4s.journal.folder import Folder
from d4s.journal.log import CHECK_DIGITS
from d4s.journal.sums import Sums
from d4s.sequence import journaling

MUTATED = 240
SECONDS = 30  # for all of them, on a machine however busy: what is not reached then is left out
LONGEST = 5.0  # seconds of the processor for one
HANGS = 240


@pytest.fixture(autouse=True)
def _not_for_ever() -> Iterator[None]:
    with ends_within(HANGS, "a journal"):
        yield


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Kept, Path]]:
    """A journal that ends behind five of six edits, two of them in no segment, with two snapshots."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("d4s.methods.locate_then_edit.EDITS_AHEAD", 4)
        patch.setattr(journaling, "SEGMENT_EVERY", 2)
        patch.setattr(journaling, "SNAPSHOT_EVERY", 2)
        torch.manual_seed(5)
        kept = Kept(*ready(5), EDITS[:6], original=False)
        path = tmp_path_factory.mktemp("journal") / "whole"
        kept.run(path).restore()
        log = (path / "log.jsonl").read_bytes().splitlines(keepends=True)
        steps = [i for i, line in enumerate(log) if b'"kind": "step"' in line]
        (path / "log.jsonl").write_bytes(
            b"".join(log[: steps[4] + 1])
        )  # and files behind it that it does not name
        yield kept, path


def goes_on_or_is_refused(kept: Kept, path: Path) -> bool:
    """Whether it went on, and then to the right end; and the sums alone, if they are read, give a D4SError at most."""
    began = time.process_time()
    try:
        Sums(Folder.open(path)).weights()
    except D4SError as error:
        assert 0 < len(str(error)) < 3_000
    try:
        result = kept.run(path)
    except (D4SError, OSError) as error:
        assert not isinstance(error, OSError) or path.name in str(error), repr(error)
        assert 0 < len(str(error)) < 3_000
        if hasattr(error, "result"):
            error.result.restore()
        went_on = False
    else:
        assert same(state(kept.model), kept.right), "other weights"
        assert told(result) == kept.said, "another history"
        result.restore()
        went_on = True
    assert kept.at_the_start()
    assert time.process_time() - began < LONGEST
    return went_on


# Mutations: each changes the journal at `path`.


def file_of(path: Path, draw: random.Random) -> Path:
    """Any file but the lock; each kind as often as any other."""
    kinds: dict[str, list[Path]] = {}
    for found in sorted(path.rglob("*")):
        if found.is_file() and found.name != "lock":
            kinds.setdefault(found.name if found.parent == path else found.parent.name, []).append(found)
    return draw.choice(kinds[draw.choice(sorted(kinds))])


def flipped_bit(path: Path, draw: random.Random) -> None:
    place = file_of(path, draw)
    data = bytearray(place.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    place.write_bytes(data)


def lost_bytes(path: Path, draw: random.Random) -> None:
    place = file_of(path, draw)
    data = place.read_bytes()
    begin = draw.randrange(len(data))
    end = len(data) if draw.random() < 0.5 else min(len(data), begin + draw.choice((1, 8, 512)))
    put = draw.choice((b"", b"\0" * (end - begin), draw.randbytes(end - begin)))
    place.write_bytes(data[:begin] + put + data[end:])


def lost_file(path: Path, draw: random.Random) -> None:
    file_of(path, draw).unlink()


def empty_file(path: Path, draw: random.Random) -> None:
    file_of(path, draw).write_bytes(b"")


def swapped_files(path: Path, draw: random.Random) -> None:
    one, other = file_of(path, draw), file_of(path, draw)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def moved_lines(path: Path, draw: random.Random) -> None:
    place = path / "log.jsonl"
    lines = place.read_bytes().splitlines(keepends=True)
    i, j = draw.randrange(len(lines)), draw.randrange(len(lines))
    how = draw.choice(("swap", "double", "remove", "cut"))
    if how == "swap":
        lines[i], lines[j] = lines[j], lines[i]
    elif how == "double":
        lines.insert(j, lines[i])
    elif how == "remove":
        del lines[i]
    else:
        del lines[i:]
    place.write_bytes(b"".join(lines))


ODD: tuple[object, ...] = (
    *(None, True, -1, 0, 10**30, 1.5, 1e308, "", "x", "../../etc/passwd", "/etc/passwd", [], {}, [[]], ["x"]),
    *({"0": "x"}, "é\ud800", "x" * 9_999, [0] * 99),
)


def _changed(value: object, draw: random.Random) -> None:
    """One value somewhere in a JSON object, in place."""
    holder = value
    while True:
        assert isinstance(holder, (dict, list))
        key = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        if not isinstance(holder[key], (dict, list)) or not holder[key] or draw.random() < 0.4:
            break
        holder = holder[key]
    if draw.random() < 0.25:
        del holder[key]
    else:
        holder[key] = json.loads(json.dumps(draw.choice(ODD)))


def resigned(path: Path, head: dict, events: list[dict]) -> None:
    """A log whose checks fit again, as one who means it could write."""
    before = hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()
    lines = b""
    for event in events:
        event.pop("check", None)
        body = json.dumps(event)[:-1].encode()
        before = hashlib.sha256(before.encode() + body).hexdigest()[:CHECK_DIGITS]
        lines += body + f', "check": "{before}"}}\n'.encode()
    (path / "log.jsonl").write_bytes(lines)


def _read(path: Path) -> tuple[dict, list[dict]]:
    head = json.loads((path / "journal.json").read_text())
    head.pop("digest")
    return head, [json.loads(line) for line in (path / "log.jsonl").read_bytes().splitlines()]


def changed_head(path: Path, draw: random.Random) -> None:
    head, _ = _read(path)
    _changed(head, draw)
    how = draw.choice(("digest", "none", "alone"))
    if how == "none":
        (path / "journal.json").write_text(json.dumps(head))
        return
    write_json(head, path / "journal.json", indent=1)
    if how == "alone":  # nothing but it tells of anything
        for left in path.iterdir():
            if left.name != "journal.json":
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def changed_event(path: Path, draw: random.Random) -> None:
    """In one line, whose check does not fit then."""
    _, events = _read(path)
    _changed(draw.choice(events), draw)
    (path / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def changed_json(path: Path, draw: random.Random) -> None:
    place = draw.choice([path / "baseline.json", *(path / "points").iterdir()])
    stored = json.loads(place.read_text())
    digest = stored.pop("digest")
    _changed(stored, draw)
    # With the old digest. One that fits is no damage: of points the log has a digest of its own.
    if place.parent.name == "points" and draw.random() < 0.5:
        write_json(stored, place)
    else:
        place.write_text(json.dumps({"digest": digest, **stored}))


def other_tensors(path: Path, draw: random.Random) -> None:
    """Another shape, type, name or value, with a digest that fits; those that the log names have another one there."""
    place = draw.choice(sorted(path.rglob("*.safetensors")))
    with safe_open(place, "pt") as file:
        facts = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    facts.pop("digest")
    name = draw.choice(sorted(tensors))
    value = tensors[name]
    how = draw.choice(("shape", "type", "name", "no dimension", "more", "gone"))
    if how == "shape":
        tensors[name] = torch.cat([value.flatten(), value.flatten()])
    elif how == "type":
        tensors[name] = value.to(torch.int64)
    elif how == "name":
        tensors[draw.choice(("x", "../x", "7.keys", "1.0.keys.more"))] = tensors.pop(name)
    elif how == "no dimension":
        tensors[name] = value.flatten()[:1].sum()
    elif how == "more":
        tensors["more"] = torch.zeros(2)
    else:
        del tensors[name]
    tensor_files.save_tensors(place, tensors, facts)


def greedy_header(path: Path, draw: random.Random) -> None:
    """Terabytes, a header longer than the file, or one that is no header."""
    place = draw.choice(sorted(path.rglob("*.safetensors")))
    meta = {"format": "d4s-journal-tensors-1", "digest": "0" * 64}
    claims = [
        {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}, "__metadata__": meta},
        {"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 8]}, "__metadata__": meta},
        {"a": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}, "__metadata__": meta},
        {"__metadata__": meta | {"journal": "x" * 99_999}},
    ]
    header = draw.choice(
        [json.dumps(claim).encode() for claim in claims] + [b"[" * 50_000, b'{"a":' * 50_000]
    )
    length = draw.choice((len(header), len(header), 1 << 40, 0, 2**64 - 1))
    place.write_bytes(length.to_bytes(8, "little") + header + b"\0" * 8)


def deep_json(path: Path, draw: random.Random) -> None:
    place = draw.choice([path / "journal.json", path / "baseline.json", path / "log.jsonl"])
    deep = draw.choice(("[", '{"a":')) * draw.choice((600, 3_000, 200_000))
    whole = place.read_text()
    place.write_text(
        draw.choice((deep, deep + whole, whole.replace("{", '{"x": ' + deep, 1), whole + deep + "\n"))
    )


def not_a_file(path: Path, draw: random.Random) -> None:
    """A pipe, folder or link in a file's place. What a link leads to is right, so only that it is one can tell."""
    place = draw.choice([file_of(path, draw), path / "lock", *(p for p in path.iterdir() if p.is_dir())])
    outside = path.parent / "outside"
    shutil.rmtree(outside, ignore_errors=True)
    outside.mkdir()
    shutil.move(place, outside / "it")
    how = draw.choice(("pipe", "folder", "link", "relative link", "link to nothing"))
    if how == "pipe":
        os.mkfifo(place)
    elif how == "folder":
        place.mkdir(exist_ok=True)
    elif how == "link":
        place.symlink_to(outside / "it")
    elif how == "relative link":
        place.symlink_to(Path(os.path.relpath(outside / "it", place.parent)))
    else:
        place.symlink_to(outside / "nothing")


MUTATIONS: dict[Callable[[Path, random.Random], None], int] = {
    flipped_bit: 5,
    lost_bytes: 4,
    lost_file: 1,
    empty_file: 1,
    swapped_files: 1,
    moved_lines: 3,
    changed_head: 4,
    changed_event: 2,
    changed_json: 2,
    other_tensors: 4,
    greedy_header: 2,
    deep_json: 2,
    not_a_file: 3,
}


def test_a_damaged_journal_goes_on_rightly_or_is_refused_in_words(broken_off, draw, tmp_path: Path) -> None:
    kept, whole = broken_off
    shutil.copytree(whole, tmp_path / "sound")
    assert goes_on_or_is_refused(kept, tmp_path / "sound")
    began, went_on, tried = time.perf_counter(), 0, 0
    deck = [mutation for mutation, weight in MUTATIONS.items() for _ in range(weight)]
    while tried < MUTATED and time.perf_counter() - began < SECONDS:
        path, mutation = tmp_path / "j", draw.choice(deck)
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(whole, path)
        mutation(path, draw)
        tried += 1
        try:
            went_on += goes_on_or_is_refused(kept, path)
        except BaseException:
            print(f"mutation {tried}: {mutation.__name__}; the journal is {path}")
            raise
    print(f"{tried} mutations, of which {went_on} went on")
    assert tried > 30 and 0 < went_on < tried


def test_a_log_that_was_written_so_on_purpose_raises_no_other_error(broken_off, draw, tmp_path: Path) -> None:
    """With checks that fit: it may hold what is not so, but no error is another one than a D4SError."""
    kept, whole = broken_off
    began = time.perf_counter()
    for number in range(MUTATED // 2):
        if time.perf_counter() - began > SECONDS / 3:
            break
        path = tmp_path / "j"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(whole, path)
        head, events = _read(path)
        _changed(draw.choice(events), draw)
        resigned(path, head, events)
        try:
            kept.run(path).restore()
        except D4SError as error:
            if isinstance(error, EditingFailed):
                error.result.restore()
        except Exception as error:
            pytest.fail(f"mutation {number}: {type(error).__name__}: {error}; the journal is {path}")
        assert kept.at_the_start()


@pytest.mark.parametrize(
    "name", ["journal.json", "log.jsonl", "lock", "segments", "targets", "points/000000.json"]
)
def test_nothing_outside_is_read_or_written_through_a_link(broken_off, tmp_path: Path, name: str) -> None:
    kept, whole = broken_off
    path, outside = tmp_path / "j", tmp_path / "outside"
    shutil.copytree(whole, path)
    shutil.move(path / name, outside)
    (path / name).symlink_to(outside)
    files = [outside, *outside.rglob("*")]
    before = [(p, p.stat().st_mtime_ns, p.stat().st_size) for p in files]
    with pytest.raises(D4SError, match="symbolic link") as raised:
        kept.run(path)
    assert name.rpartition("/")[2] in str(raised.value)
    assert [(p, p.stat().st_mtime_ns, p.stat().st_size) for p in files] == before
    assert kept.at_the_start()


def test_a_journal_may_be_reached_through_a_link(broken_off, tmp_path: Path) -> None:
    kept, whole = broken_off
    shutil.copytree(whole, tmp_path / "j")
    (tmp_path / "link").symlink_to(tmp_path / "j")
    assert goes_on_or_is_refused(kept, tmp_path / "link")


def test_a_leftover_is_removed_and_what_only_looks_like_one_is_not(broken_off, tmp_path: Path) -> None:
    kept, whole = broken_off
    path = tmp_path / "j"
    shutil.copytree(whole, path)
    left = [path / "journal.17.part.json", path / "segments" / "000003.4711.part.safetensors"]
    other = [path / "my.part.txt", path / "notes" / "a.1.part.json"]
    (path / "notes").mkdir()
    for file in (*left, *other):
        file.touch()
    assert goes_on_or_is_refused(kept, path)
    assert not any(file.exists() for file in left) and all(file.exists() for file in other)


def test_a_start_that_was_killed_before_its_head_can_be_made_again(broken_off, tmp_path: Path) -> None:
    kept, _ = broken_off
    path = tmp_path / "j"
    path.mkdir()
    (path / "lock").touch()
    (path / "journal.4711.part.json").write_text('{"digest"')
    assert goes_on_or_is_refused(kept, path)
