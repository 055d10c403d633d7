"""Files with a digest, and what a reader says about those that are not what it expects."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

import pytest

from d4s import files
from d4s.errors import DataError
from d4s.files import digest, parse_json, read_bytes, read_json, write_json
from d4s.measure.metrics import Baseline, Evaluation, Metric
from d4s.models.scoring import Score
from d4s.sequence.record import Record

READ = {"writer": "Thing.save", "format": "thing-1", "fields": ("text", "rows")}
THING = {"format": "thing-1", "text": "naïve sha256:", "rows": [1.5, None, {"a": []}]}


def write(folder: Path, indent: int | None = None) -> Path:
    write_json(THING, folder / "thing.json", indent)
    return folder / "thing.json"


def record() -> Record:
    row = {"step": 1, "average": 0.25, "l1_growth": 0.5, "edit_seconds": 2.0}
    evaluation = Evaluation(
        [{"id": "a", "kind": "question", "nll": [0.5, None]}], {"efficacy": Metric(1, 1, 1, 1)}
    )
    return Record(
        "d4s", {"layers": [4, 5], "target": {"steps": 4}}, [row], [{"id": "a", "step": 1}], [evaluation]
    )


def baseline() -> Baseline:
    return Baseline({("a", "b"): Score(0.5, (1, 2), (1, 3)), ("a", ("b", "")): Score(1.5, (1,), (1,))})


@pytest.mark.parametrize("indent", [None, 1])
def test_a_written_object_comes_back_and_is_plain_json(tmp_path: Path, indent: int | None) -> None:
    path = write(tmp_path, indent)
    assert read_json(path, **READ) == THING
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert next(iter(stored)) == "digest" and stored == {"digest": stored["digest"], **THING}


def test_a_folder_is_on_the_disk_and_as_the_umask_has_it_before_it_has_its_name(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")) or fsync(handle)
    )
    with files.whole(tmp_path / "model") as beside:
        (beside / "deep").mkdir(parents=True)
        for name in ("x.safetensors", "deep/y.json"):
            (beside / name).write_bytes(b"x")
        (beside / "x.safetensors").chmod(0o600)
        inside = [str(beside / name) for name in ("x.safetensors", "deep/y.json", "deep")] + [str(beside)]
    assert set(inside) <= set(synced) and synced.index(str(beside)) > synced.index(inside[1])
    (tmp_path / "plain").touch()
    assert (tmp_path / "model/x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert sorted(path.name for path in (tmp_path / "model").rglob("*")) == [
        "deep",
        "x.safetensors",
        "y.json",
    ]


def test_the_digest_is_that_of_the_bytes_with_zeros_for_itself(tmp_path: Path) -> None:
    data = write(tmp_path).read_bytes()
    given = json.loads(data)["digest"].removeprefix("sha256:")
    zeroed = data.replace(given.encode(), b"0" * 64)
    assert given == hashlib.sha256(len(zeroed).to_bytes(8, "little") + zeroed).hexdigest()


def test_a_digest_knows_bits_order_and_borders() -> None:
    parts = [b"weight", memoryview(bytes(range(16))).cast("d"), b""]
    assert digest(parts) == digest([bytes(memoryview(part)) for part in parts])
    others = [[b"weighu", *parts[1:]], parts[::-1], [b"weigh", b"t", *parts[1:]], parts[:2]]
    assert len({digest(parts), *map(digest, others)}) == 5


@pytest.mark.parametrize("indent", [None, 1])
def test_every_changed_bit_is_noticed(tmp_path: Path, indent: int | None) -> None:
    path = write(tmp_path, indent)
    data = path.read_bytes()
    for position in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            path.write_bytes(changed)
            with pytest.raises(DataError, match=r"thing\.json: "):
                read_json(path, **READ)


@pytest.mark.parametrize("whole", [record(), baseline()], ids=["result", "baseline"])
def test_a_file_of_an_earlier_version_is_read_with_a_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, whole: Record | Baseline
) -> None:
    path = tmp_path / "f.json"
    whole.save(path)
    with caplog.at_level(logging.INFO, logger="d4s.files"):
        assert type(whole).load(path) == whole
    assert not caplog.records
    stored = json.loads(path.read_text())
    del stored["digest"]
    path.write_text(json.dumps(stored))
    with caplog.at_level(logging.INFO, logger="d4s.files"):
        assert type(whole).load(path) == whole
    assert "f.json: has no digest" in caplog.text


@pytest.mark.parametrize("whole", [record(), baseline()], ids=["result", "baseline"])
def test_a_changed_file_says_what_to_do(tmp_path: Path, whole: Record | Baseline) -> None:
    path = tmp_path / "f.json"
    whole.save(path)
    path.write_text(path.read_text().replace("0.5", "0.6"))
    with pytest.raises(
        DataError, match=r'f\.json: has changed since .* wrote it.*take its field "digest" out'
    ):
        type(whole).load(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: r.update(method=3), "method must be text, not 3"),
        (lambda r: r.update(config=[]), "config must be an object"),
        (lambda r: r["config"].update(a=_nested(500)), "config is nested too deeply"),
        (lambda r: r.update(failure=True), "failure must be text, not True"),
        (lambda r: r.update(history={}), "history must be a list"),
        (lambda r: r.update(history=[3]), r"history\[0\] must be an object"),
        (lambda r: r["history"][0].update(step="1"), r"history\[0\], 'step' must be a whole number"),
        (lambda r: r["history"][0].update(step=-1), "whole number from 0 on, not -1"),
        (
            lambda r: r["history"][0].update(average="high"),
            r"history\[0\], 'average' must be a number, not 'high'",
        ),
        (lambda r: r["history"][0].update(average=10**400), "'average' must be a number"),
        (lambda r: r["history"][0].pop("l1_growth"), r"history\[0\] has no 'l1_growth'"),
        (lambda r: r["edits_table"][0].update(id=7), r"edits_table\[0\], 'id' must be text"),
        (lambda r: r["evaluations"][0].update(rows=None), r"evaluations\[0\].rows must be a list"),
        (lambda r: r["evaluations"][0]["rows"][0].update(nll=["x"]), "'nll' must be a number"),
        (lambda r: r["evaluations"][0]["metrics"].update(efficacy=1), "'efficacy'.* must be an object"),
        (
            lambda r: r["evaluations"][0]["metrics"]["efficacy"].update(count=1.5),
            "'count' must be a whole number",
        ),
        (lambda r: r["evaluations"][0].update(notes="all well"), "notes must be a list"),
        (lambda r: r["evaluations"].clear(), "history and evaluations are not equally long"),
        (lambda r: r.pop("config"), "it has no field 'config'"),
        (lambda r: r.update(more=1), "it has the field 'more'"),
        (lambda r: r.update(format=["d4s-result-1"]), "its format is a value of type list"),
    ],
)
def test_a_value_of_another_type_in_a_result_is_named(tmp_path: Path, change, says: str) -> None:
    stored = record().to_dict()
    change(stored)
    (tmp_path / "r.json").write_text(json.dumps(stored))
    with pytest.raises(DataError, match=rf"r\.json: not what Result\.save wrote \(.*{says}"):
        Record.load(tmp_path / "r.json")


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ({}, "answers must be a list"),
        ([3], r"answers\[0\] must be a list, not 3"),
        ([["a", "b", 1.0, [1]]], "has 4 parts"),
        ([[1, "b", 1.0, [1], [1]]], "prompt must be text"),
        ([["a", 1, 1.0, [1], [1]]], "target must be text"),
        ([["a", ["b"], 1.0, [1], [1]]], "target: a list must be"),
        ([["a", "b", "low", [1], [1]]], "NLL must be a number"),
        ([["a", "b", 10**400, [1], [1]]], "NLL must be a number"),
        ([["a", "b", 1.0, [1.5], [1]]], "tokens must be a whole number"),
        ([["a", "b", 1.0, [1, 2], [1]]], "2 tokens said and 1 asked for"),
    ],
)
def test_a_value_of_another_type_in_a_baseline_is_named(tmp_path: Path, answers, says: str) -> None:
    (tmp_path / "b.json").write_text(json.dumps({"format": "d4s-baseline-1", "answers": answers}))
    with pytest.raises(DataError, match=rf"b\.json: not what Baseline\.save wrote \(.*{says}"):
        Baseline.load(tmp_path / "b.json")


def _nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5_000, "thousands of digits"),
        ('{"a":\n}', "not valid JSON: Expecting value at line 2, column 1"),
        ("", "not valid JSON"),
    ],
)
def test_what_no_parser_takes_is_one_line(text: str, says: str) -> None:
    with pytest.raises(DataError, match=f"^here: .*{says}") as caught:
        parse_json(text, "here")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [Record.load, Baseline.load], ids=["result", "baseline"])
@pytest.mark.parametrize("text", [b"[" * 100_000, b"9" * 5_000, b"\xff\xfe", b"3", b'{"format": NaN}'])
def test_a_stored_file_that_cannot_be_parsed_is_one_line(tmp_path: Path, load, text: bytes) -> None:
    (tmp_path / "f.json").write_bytes(text)
    with pytest.raises(DataError, match=r"f\.json: not what .*\.save wrote \(") as caught:
        load(tmp_path / "f.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [Record.load, Baseline.load, lambda p: read_bytes(p, "it")])
def test_pipes_devices_folders_and_nothing_are_refused_at_once(tmp_path: Path, load) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, says in [
        (tmp_path / "pipe", "is a pipe or a device"),
        ("/dev/zero", "is a pipe or a device"),
        (tmp_path, "is a folder"),
        (tmp_path / "none", "there is no such file"),
    ]:
        with pytest.raises(DataError, match=says):
            load(path)


def test_a_file_larger_than_memory_is_not_begun(tmp_path: Path) -> None:
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(5 << 30)  # a hole: it takes no room
    with pytest.raises(DataError, match="more than 4 GiB, too much for it"):
        read_bytes(tmp_path / "huge", "it")
