"""The folder of a comparison: its sequences that have ended, journals of those under way, and targets they share."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from d4s import files
from d4s.errors import ConfigError, D4SError
from d4s.files import write_text
from d4s.locate.kept_targets import KeptTargets, deciding
from d4s.methods import Method
from d4s.ranks import here
from d4s.sequence.comparison import record_place
from d4s.sequence.journaling import Journaling
from d4s.sequence.record import Record
from d4s.sequence.together import FirstsJournal, journaling
from d4s.sequence.under_way import Unedited


class ComparisonFolder:
    """The sequences of a comparison in a folder, and what they have in common."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        here().on_first(lambda: self._check(settings))

    def _check(self, settings: Mapping[str, Any]) -> None:
        folder, path = self.folder, self.folder / "settings.json"
        wanted = json.loads(json.dumps(settings))
        if not path.exists():
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise ConfigError(f"{folder}: already holds something else; name a new or empty folder")
            write_text(json.dumps(wanted, indent=1), path)
            return
        data = files.read_bytes(path, "the settings of a comparison")
        stored = files.parse_json(data.decode("utf-8", "replace"), f"{path}: not what a comparison wrote")
        with files.checking(path, "a comparison"):
            files.as_json(files.as_object(stored, "it"), "it")
        one_pass = {"passes": 1}  # is not told
        stored, wanted = one_pass | stored, one_pass | wanted
        for name in dict.fromkeys([*wanted, *stored]):
            if stored.get(name) != wanted.get(name):
                there, here = _short(stored.get(name)), _short(wanted.get(name))
                raise ConfigError(
                    f"{folder} holds a comparison with other {name} ({there} there, {here} here); "
                    "name a new folder, or ask for the same"
                )

    @contextmanager
    def targets(self, method: Method, seed: int) -> Iterator[KeptTargets]:
        """Those that the folder has for the method; what is found is kept, also by a sequence that breaks off."""
        place = _targets_place(self.folder, method, seed)
        found = here().from_first(lambda: KeptTargets.load(place) if place.exists() else KeptTargets())
        known = len(found)
        try:
            yield found
        finally:
            if len(found) > known and here().is_first:
                found.save(place)

    def journal(self, label: str, seed: int) -> Journaling | FirstsJournal:
        """Of a sequence that is under way, which goes on in it. ConfigError if another process makes this one."""
        return journaling(self._journal_place(label, seed), keep_vectors=False)

    def keep(self, label: str, seed: int, record: Record) -> None:
        """The record of a sequence that has ended, which says what is asked of it: its journal goes."""

        def write() -> None:
            record.save(record_place(self.folder, label, seed))
            shutil.rmtree(self._journal_place(label, seed), ignore_errors=True)

        here().on_first(write)

    def _journal_place(self, label: str, seed: int) -> Path:
        return self.folder / "journals" / record_place(self.folder, label, seed).stem

    def take_unedited(self, unedited: Unedited, seed: int) -> None:
        """From a sequence of this order that has ended, also of one that is not asked for now, if there is any."""
        own = re.compile(rf".*[^-]-{seed}\.json")
        found = here().from_first(lambda: self._first_of(own))
        if found is not None:
            unedited.take_from(found)

    def _first_of(self, names: re.Pattern[str]) -> Record | None:
        folder = self.folder / "results"
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if names.fullmatch(path.name):
                with suppress(D4SError):  # damaged: said where it is asked for
                    return Record.load(path)
        return None

    def record(self, label: str, seed: int, method: Method) -> Record | None:
        """The sequence of this label and seed, if it has ended. ConfigError if its configuration was another."""
        return here().from_first(lambda: self._record(label, seed, method))

    def _record(self, label: str, seed: int, method: Method) -> Record | None:
        path = record_place(self.folder, label, seed)
        if not path.exists():
            return None
        record = Record.load(path)
        wanted = json.loads(json.dumps(method.as_known_to(record.config)))
        if record.method != method.name or record.config != wanted:
            raise ConfigError(
                f"{path}: a sequence of {record.method} with another configuration; name a new folder, or another label"
            )
        return record


def _short(value: Any, most: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}…"


def decides_targets(method: Method) -> str:
    """All of a configuration that targets hang on."""
    fields = asdict(method)
    return json.dumps(
        [deciding(fields["target"]), fields["contexts"], fields["context_lengths"], fields["layers"][-1]]
    )


def _targets_place(folder: Path, method: Method, seed: int) -> Path:
    """One file for all configurations that ask for the same targets."""
    name = hashlib.sha256(f"{decides_targets(method)} {seed}".encode()).hexdigest()[:12]
    return folder / "targets" / f"{name}.safetensors"
