"""Presets: what of a method's configuration was found to serve a model, in a file or under a name.

A file is made by `d4s tune`: the fields that it searched, the model they are for, what was measured, and the probe
edits that chose them; or by `d4s import-config`, from another program's hyperparameters. A name is a row of the
method's own table `presets`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d4s import files
from d4s.edits import Edit
from d4s.errors import ConfigError, shown, unknown_name
from d4s.locate.covariance import fingerprint_of
from d4s.models.architectures import Anatomy, text_config

if TYPE_CHECKING:
    from d4s.methods.base import Method

FORMAT = "d4s-preset-1"
NAMED = 5  # probes that a note names at most
_MODEL_TEXTS, _MODEL_COUNTS = ("type", "fingerprint"), ("blocks", "width", "vocabulary")
# In place of these of an imported preset, which is for every model of one kind: where W is, `{}` for the layer.
PROJECTION = "projection"
_PARTS = ("method", "fields", "model", "measured", "versions", "probes")


def model_facts(anatomy: Anatomy) -> dict[str, str | int]:
    """What tells a model from another: type, blocks, width, vocabulary, and its weights' fingerprint, which float32 and
    bfloat16 share."""
    config = text_config(anatomy.model)
    return {
        "type": str(getattr(config, "model_type", type(anatomy.model).__name__)),
        "blocks": len(anatomy),
        "width": int(config.hidden_size),
        "vocabulary": int(config.vocab_size),
        "fingerprint": fingerprint_of(anatomy.model, exact=False),
    }


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Fields of a method's configuration, for one model; `config=` of `edit_sequence` and `compare` takes it.

    method: its name
    fields: name → JSON value of those that were searched, whether or not they differ from the method's own preset
    model: `model_facts` of the model; of an imported one the projection that is W, as "transformer.h.{}.mlp.c_proj", or
        nothing
    measured: what was found, JSON values
    versions: of what measured
    probes: (id, text) of the edits that chose the fields
    path: of the file; overrides: fields that go before those of the preset
    """

    method: str
    fields: Mapping[str, Any]
    model: Mapping[str, str | int]
    measured: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    probes: tuple[tuple[str, str], ...] = ()
    path: str = "the preset"
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def changed(self, overrides: Mapping[str, Any]) -> Preset:
        """A copy in which these fields go before its own."""
        return replace(self, overrides={**self.overrides, **overrides})

    def check(self, anatomy: Anatomy) -> None:
        """Raises ConfigError, naming what differs, unless it was found on this model, or imported for such ones."""
        if not self.model.keys() - {PROJECTION}:
            at = anatomy.architecture
            here_is = f"{at.blocks}.{{}}.{at.mlp_output}"
            if self.model.get(PROJECTION, here_is) != here_is:
                raise ConfigError(
                    f"{self.path}: is for models whose W is {self.model[PROJECTION]}, and here it is {here_is}; import "
                    "the settings of a model of this type"
                )
            return
        here = model_facts(anatomy)
        if differ := [name for name, value in here.items() if self.model.get(name) != value]:
            said = "; ".join(
                f"{name} {_cut(self.model.get(name))} there, {_cut(here[name])} here" for name in differ
            )
            raise ConfigError(
                f"{self.path}: was found on another model ({said}); d4s tune makes one for this model, and --set "
                "takes single fields"
            )

    def applied(self, method: Method) -> Method:
        """A configuration of its method with its fields in it. Raises ConfigError, naming the file, for a value of the
        wrong type or out of range."""
        if method.name != self.method:
            raise ConfigError(
                f"{self.path}: is a preset of {self.method}, not of {method.name}; take that method"
            )
        try:
            found = method.changed(self.fields)
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from None
        return found.changed(self.overrides) if self.overrides else found

    def probed(self, edits: Iterable[Edit]) -> list[Edit]:
        """Those of the edits that are its probes: of the same prompt and subject, whatever they are called."""
        texts = {text for _, text in self.probes}
        return [edit for edit in edits if edit.text in texts]

    def notes_on(self, edits: Iterable[Edit]) -> tuple[str, ...]:
        """What has to be said of figures of these edits."""
        found = self.probed(edits)
        if not found:
            return ()
        return (
            f"{len(found)} of these edits are probes of {self.path} ({_ids(found)}): its settings were chosen by them, "
            "so figures that hold them are not of edits unseen",
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """JSON with a digest of its content, whole or not at all."""
        record = {name: getattr(self, name) for name in _PARTS} | {
            "probes": [list(one) for one in self.probes]
        }
        files.write_json({"format": FORMAT, **files.finite_or_none(record)}, path, indent=1)


def load_preset(path: str | os.PathLike[str]) -> Preset:
    """What `d4s tune` or `d4s import-config` wrote: `edit_sequence(config=load_preset("preset.json"))`.

    Raises DataError, naming the file and the field, for one that is something else, damaged, or of no known method.
    """
    from d4s.methods import METHODS

    writer = "d4s tune"
    stored = files.read_json(path, writer=writer, format=FORMAT, fields=_PARTS)
    with files.checking(path, writer):
        method = files.as_text(stored["method"], "method")
        if method not in METHODS:
            raise files.WrongType(unknown_name("method", method, METHODS))
        facts = files.as_object(stored["model"], "model")
        known = (PROJECTION,) if not facts.keys() - {PROJECTION} else _MODEL_TEXTS
        model: dict[str, str | int] = {
            name: files.as_text(facts.get(name), f"model, {name}") for name in known if facts
        }
        if known == _MODEL_TEXTS:
            model |= {name: files.as_count(facts.get(name), f"model, {name}") for name in _MODEL_COUNTS}
        if len(facts) != len(model):
            raise files.WrongType(f"model has other fields than {', '.join(model)}")
        probes = []
        for i, row in enumerate(files.as_list(stored["probes"], "probes")):
            pair = [files.as_text(text, f"probes[{i}]") for text in files.as_list(row, f"probes[{i}]")]
            if len(pair) != 2:
                raise files.WrongType(f"probes[{i}] has {len(pair)} parts, must be id and text")
            probes.append((pair[0], pair[1]))
        return Preset(
            method=method,
            fields=files.as_json(files.as_object(stored["fields"], "fields"), "fields"),
            model=model,
            measured=files.as_json(files.as_object(stored["measured"], "measured"), "measured"),
            versions={
                name: files.as_text(value, f"versions, {shown(name)}")
                for name, value in files.as_object(stored["versions"], "versions").items()
            },
            probes=tuple(probes),
            path=os.fspath(path),
        )


def by_name(asked: str) -> tuple[str, Mapping[str, Any]]:
    """(method, what its named preset sets) of "METHOD" or "METHOD:PRESET", as "d4s:fresh".

    Raises ConfigError, with the names there are, for another one.
    """
    from d4s.methods import METHODS

    method, colon, name = asked.partition(":")
    if method not in METHODS:
        raise ConfigError(unknown_name("method", method, METHODS))
    if not colon:
        return method, {}
    known = METHODS[method].presets
    if name in known:
        return method, known[name]
    if not known:
        having = [f"{other}:{name}" for other, cls in METHODS.items() if name in cls.presets]
        raise ConfigError(
            f"{method} has no named presets, so no {shown(name)}"
            f"{f' ({having[0]} is there)' if having else ''}; d4s tune makes a file of one"
        )
    raise ConfigError(f"{unknown_name(f'preset of {method}', name, known)} Or name a file made by d4s tune")


def with_preset(
    method: str | Method | None, preset: str | os.PathLike[str], config: Any
) -> tuple[str, Mapping[str, Any] | Preset]:
    """(method, config) as `method_for` takes them, of a preset beside both.

    method: its name; None: that of the preset's file, or d4s
    preset: one of the method's named ones, or a file that `d4s tune` wrote
    config: fields that go before those of the preset, or None
    Raises ConfigError for a preset that there is not, or of another method, and beside another whole configuration.
    """
    if not (isinstance(method, str | None) and isinstance(config, Mapping | None)):
        raise ConfigError(
            f"preset {os.fspath(preset)}: method or config is a whole configuration already; give one of the two, or "
            "single fields as config"
        )
    if not is_place(os.fspath(preset)):
        asked = method or "d4s"
        if ":" in asked:
            raise ConfigError(
                f"preset {preset}: method {asked} names one of its own; leave one of the two out"
            )
        name, named = by_name(f"{asked}:{preset}")
        return name, {**named, **(config or {})}
    found = load_preset(preset)
    if method not in (None, found.method):
        raise ConfigError(
            f"preset {preset}: is of {found.method}, and {method} was asked for; take that method, or another preset"
        )
    return found.method, found.changed(config) if config else found


def is_place(text: str) -> bool:
    """Whether a preset is asked for by its file: one that is there, or what only a file is called."""
    from d4s.methods import METHODS

    if any(text in method.presets for method in METHODS.values()):
        return False
    return Path(text).suffix != "" or os.sep in text or Path(text).exists()


def without_probes(edits: Sequence[Edit], presets: Iterable[Preset]) -> tuple[list[Edit], tuple[str, ...]]:
    """(the edits that are probes of none of the presets, what has to be said of that).

    Raises ConfigError if none is left.
    """
    left, notes = list(edits), []
    for preset in presets:
        if found := preset.probed(left):
            gone = {edit.text for edit in found}
            left = [edit for edit in left if edit.text not in gone]
            notes.append(f"{len(found)} edits are left out, the probes of {preset.path} ({_ids(found)})")
    if edits and not left:
        raise ConfigError(f"every edit is a probe of {notes[-1].partition('probes of ')[2]}; give others")
    return left, tuple(notes)


def _ids(edits: Sequence[Edit]) -> str:
    return ", ".join(edit.id for edit in edits[:NAMED]) + (" …" if len(edits) > NAMED else "")


def _cut(value: Any) -> str:
    return str(value)[:12]
