"""The methods by the names that users type; one file each.

`d4s.methods()` names them, and `d4s.methods` is this package: `import d4s.methods.alphaedit` works beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from d4s.errors import ConfigError, shown
from d4s.methods.alphaedit import AlphaEdit
from d4s.methods.base import Editor, Method, Step, Workbench
from d4s.methods.d4s import D4S
from d4s.methods.emmet import EMMET
from d4s.methods.encore import ENCORE
from d4s.methods.ft import FTL, FTLW0, FTM
from d4s.methods.ft_bf import FTBF
from d4s.methods.grace import GRACE
from d4s.methods.kn import KN
from d4s.methods.lyaplock import LyapLock
from d4s.methods.memit import MEMIT
from d4s.methods.memit_seq import MEMITSeq
from d4s.methods.nas import NAS
from d4s.methods.pmet import PMET
from d4s.methods.preset import Preset, by_name
from d4s.methods.rome import ROME, RROME
from d4s.methods.sphere import SPHERE
from d4s.methods.ultraedit import UltraEdit
from d4s.models.architectures import Anatomy

METHODS: dict[str, type[Method]] = {
    "d4s": D4S,
    "memit": MEMIT,
    "memit-seq": MEMITSeq,
    "rome": ROME,
    "r-rome": RROME,
    "pmet": PMET,
    "emmet": EMMET,
    "alphaedit": AlphaEdit,
    "nas": NAS,
    "sphere": SPHERE,
    "encore": ENCORE,
    "lyaplock": LyapLock,
    "ultraedit": UltraEdit,
    "ft-l": FTL,
    "ft-l-w0": FTLW0,
    "ft-m": FTM,
    "ft-bf": FTBF,
    "grace": GRACE,
    "kn": KN,
}


def method_for(
    method: str | Method, anatomy: Anatomy, config: Mapping[str, Any] | Method | Preset | None = None
) -> Method:
    """A method by name with its preset for this model, single fields replaced by `config`.

    method: as "d4s", or with one of its named presets, as "d4s:fresh", or a configured method
    config: a mapping of fields, or a whole configuration, or a preset of this model, or None
    Raises ConfigError for a name or field that does not exist, for a preset of another model, and for a named preset
    beside a whole configuration or a preset's file.
    """
    if not isinstance(method, str | Method):
        raise ConfigError(
            f"method is {shown(method)}, must be a name, as 'd4s', or a configured method; d4s.methods() lists names"
        )
    if isinstance(method, str) and ":" in method and isinstance(config, Method | Preset):
        raise ConfigError(
            f"method={method!r} names a preset, and config is another whole one; give one of the two"
        )
    if isinstance(config, Method):
        name = method if isinstance(method, str) else method.name
        if config.name != name:
            raise ConfigError(
                f"method={name!r}, but config is one of {config.name!r}; give them for one method"
            )
        return config
    if isinstance(method, str):
        name, named = by_name(method)
        method = METHODS[name].preset(anatomy).changed(named)
    if isinstance(config, Preset):
        config.check(anatomy)
        return config.applied(method)
    return method.changed(config) if config else method


class _Methods(ModuleType):
    """This package, which can be called: a function of its name in `d4s` would hide its modules."""

    def __call__(self) -> tuple[str, ...]:
        """The names that `edit_sequence(method=…)` takes."""
        return tuple(METHODS)


sys.modules[__name__].__class__ = _Methods

__all__ = ["METHODS", "Editor", "Method", "Preset", "Step", "Workbench", "method_for"]
