"""What a folder holds of sequences: of `d4s edit --out`, `d4s compare --out`, `d4s reproduce --out`, or a journal."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from d4s import files
from d4s.edits import Edit
from d4s.errors import ConfigError, DataError
from d4s.journal.folder import Folder
from d4s.journal.journal import Journal
from d4s.sequence.journaling import record_of
from d4s.sequence.record import Record

_WRITTEN = "a comparison"


@dataclass(frozen=True)
class Fact:
    """An edit in words. old: the answer that the data call true; None: they name none. stands: it was not undone"""

    sentence: str
    new: str
    old: str | None
    stands: bool = True


@dataclass(frozen=True)
class ToldRun:
    """A sequence as a folder tells of it.

    label: short, and no other run's of the page
    record: what was measured
    setting: what was edited, and how: name → words, as far as it is stored
    facts: of its edits, by id; empty where only their ids are stored
    """

    label: str
    record: Record
    setting: Mapping[str, str]
    facts: Mapping[str, Fact]


def runs_in(folders: Sequence[str | os.PathLike[str]], edits: Iterable[Edit] = ()) -> list[ToldRun]:
    """Every sequence of the folders, in the order of the folders and, within one, of names.

    edits: told in words where a folder holds nothing but ids, as a comparison's does
    Raises ConfigError for no folder, DataError for one without a sequence or with a damaged file.
    """
    if not folders:
        raise ConfigError("name one folder or more: what d4s edit, compare or reproduce has as --out")
    given = {edit.id: _fact(edit) for edit in edits}
    found: list[ToldRun] = []
    for folder in map(Path, folders):
        own = _runs_of(folder)
        prefix = f"{folder.resolve().name}: " if len(folders) > 1 else ""
        found += [replace(run, label=f"{prefix}{run.label}") for run in own]
    # A comparison's finished sequences have ids alone, and one that is under way has the same edits in its journal.
    known = {one: fact for run in reversed(found) for one, fact in run.facts.items()} | given
    told, seen = [], dict[str, int]()
    for run in found:
        words = {row["id"]: known[row["id"]] for row in run.record.edits_table if row["id"] in known}
        seen[run.label] = seen.get(run.label, 0) + 1
        label = run.label if seen[run.label] == 1 else f"{run.label} ({seen[run.label]})"
        told.append(replace(run, label=label, facts={**words, **run.facts}))
    return told


def statements_in(folders: Sequence[str | os.PathLike[str]]) -> dict[str, str]:
    """What `d4s reproduce` says beside its details: name → text of <name>.md."""
    found = {}
    for folder in map(Path, folders):
        for details in sorted(folder.glob("*-details")):
            place = details.with_name(f"{details.name.removesuffix('-details')}.md")
            if place.is_file():
                text = files.read_bytes(place, "what d4s reproduce says").decode("utf-8", "replace")
                found[place.stem] = text.strip()
    return found


def _runs_of(folder: Path) -> list[ToldRun]:
    if not folder.is_dir():
        raise DataError(
            f"{folder}: there is no such folder; name the --out of d4s edit, compare or reproduce"
        )
    if Folder.exists(folder) or Folder.exists(folder / "journal"):
        return [_of_journal(folder)]
    if (folder / "result.json").exists():
        record = Record.load(folder / "result.json")
        return [ToldRun(record.method, record, _setting_of(record), {})]
    found = _of_comparison(folder, "")
    for settings in sorted(folder.glob("*-details/**/settings.json")):
        place = settings.parent
        found += _of_comparison(place, f"{place.relative_to(folder).as_posix().replace('-details', '')}: ")
    if not found:
        raise DataError(
            f"{folder}: holds no sequence; must have a journal (journal/journal.json), or result.json as d4s edit "
            "leaves it, or results/*.json or journals/ as d4s compare does, or NAME-details/ as d4s reproduce does"
        )
    return found


def _of_journal(folder: Path) -> ToldRun:
    """A journal, and beside it what `d4s edit` has saved of a sequence that ended."""
    journal = Journal(folder)
    result = journal.folder.root.parent / "result.json"
    beside = journal.folder.root.name == "journal" and result.exists()
    record = Record.load(result) if beside else record_of(journal.folder.root)
    if beside and journal.folder.steps_made > len(record.edits_table):  # gone on with since
        record = record_of(journal.folder.root)
    facts = {
        row["id"]: Fact(
            row["prompt"].replace("{}", row["subject"]), row["target_new"], row["target_true"], row["stands"]
        )
        for row in journal.log()
    }
    return ToldRun(record.method, record, _setting_of_journal(journal.head, record), facts)


def _of_comparison(folder: Path, prefix: str) -> list[ToldRun]:
    """Sequences that have ended, then those under way: none has both."""
    shared = _shared(folder)
    found: list[tuple[str, str, Record, dict[str, str], dict[str, Fact]]] = []
    ended = sorted(folder.glob("results/*.json"))
    for place in ended:
        label, seed = _label_of(place.stem)
        record = Record.load(place)
        setting = {**_setting_of(record), "seed": seed, **shared}
        found.append((label, seed, record, setting, {}))
    for head in sorted(folder.glob("journals/*/journal.json")):
        name = head.parent.name
        if any(place.stem == name for place in ended):
            continue
        label, seed = _label_of(name)
        run = _of_journal(head.parent)
        setting = {**run.setting, "seed": seed, **shared}
        found.append((label, seed, run.record, setting, dict(run.facts)))
    several = len({seed for _, seed, *_ in found}) > 1
    return [
        ToldRun(f"{prefix}{label}" + (f", seed {seed}" if several else ""), record, setting, facts)
        for label, seed, record, setting, facts in found
    ]


def _label_of(stem: str) -> tuple[str, str]:
    """(label, seed) of a file that `compare` has named for them."""
    label, dash, seed = stem.rpartition("-")
    return (unquote(label), seed) if dash and seed.isdecimal() else (unquote(stem), "")


def _shared(folder: Path) -> dict[str, str]:
    """What the sequences of a comparison have in common."""
    place = folder / "settings.json"
    if not place.exists():
        return {}
    data = files.read_bytes(place, "the settings of a comparison")
    stored = files.parse_json(data.decode("utf-8", "replace"), f"{place}: not what {_WRITTEN} wrote")
    with files.checking(place, _WRITTEN):
        files.as_json(files.as_object(stored, "it"), "it")
    told = {"weights": _short(stored.get("weights")), "data": f"edits {_short(stored.get('edits'))}"}
    if isinstance(statistics := stored.get("key statistics"), list) and len(statistics) == 2:
        told["key statistics"] = f"corpus {_short(statistics[0])}, {statistics[1]} tokens"
    for name in ("batch_size", "shuffle", "neighborhood_limit", "generate", "stop_on_collapse"):
        if stored.get(name) is not None:
            told[name.replace("_", " ")] = _words(stored[name])
    return {name: words for name, words in told.items() if words}


def _setting_of(record: Record) -> dict[str, str]:
    told = {"method": record.method, "edits made": str(len(record.edits_table))}
    told |= {f"config: {name}": words for name, words in _flat(record.config)}
    told |= {f"chosen: {name}": f"{value:g}" for name, value in record.chosen.items()}
    return told


def _setting_of_journal(head: Mapping[str, Any], record: Record) -> dict[str, str]:
    schedule = head["schedule"]
    told = {
        "model": _named(head["source"]),
        "weights": _short(head["model"]),
        "tokenizer": _short(head["tokenizer"]),
        "data type": _words(head["dtype"]),
        "edited": ", ".join(str(name) for name in head["weights"].values()),
        "data": f"{head['count']} edits {_short(head['edits'])}",
        "key statistics": _short(head["statistics"]),
        "versions": ", ".join(f"{name} {number}" for name, number in head["versions"].items()),
        "begun": str(head["created"])[:19].replace("T", " "),
    }
    told |= {
        name.replace("_", " "): _words(value)
        for name, value in schedule.items()
        if value is not None and value is not False
    }
    told |= _setting_of(record)
    return {name: words for name, words in told.items() if words}


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Fields of a configuration, those within others with a point."""
    for name, one in value.items():
        if isinstance(one, Mapping):
            yield from _flat(one, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _words(one)


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_words, value))
    if value is None:
        return "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _named(source: Any) -> str:
    """A model's name. Of a folder its own: where it lies is not the reader's business."""
    if not source:
        return "a model without a name"
    return Path(source).name if Path(str(source)).is_absolute() else str(source)


def _short(digest: Any) -> str:
    """Enough of a digest to tell two apart."""
    return str(digest)[:12] if digest else ""


def _fact(edit: Edit) -> Fact:
    return Fact(edit.text, edit.target_new, edit.target_true)
