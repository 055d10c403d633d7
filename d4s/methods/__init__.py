"""The methods by the names that users type; one file each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d4s.architectures import Anatomy
from d4s.errors import ConfigError, unknown_name
from d4s.methods.base import Editor, Method, Step, Workbench
from d4s.methods.d4s import D4S
from d4s.methods.memit import MEMIT

METHODS: dict[str, type[Method]] = {
    "d4s": D4S,
    "memit": MEMIT,
}


def method_for(
    method: str | Method, anatomy: Anatomy, config: Mapping[str, Any] | Method | None = None
) -> Method:
    """A method by name with its preset for this model, single fields replaced by `config`.

    config: a mapping of fields, or a whole configuration, or None
    Raises ConfigError for a name or field that does not exist.
    """
    if isinstance(config, Method):
        if isinstance(method, str) and config.name != method:
            raise ConfigError(f"method={method!r}, but config is one of {config.name!r}")
        return config
    if isinstance(method, str):
        if method not in METHODS:
            raise ConfigError(unknown_name("method", method, METHODS))
        method = METHODS[method].preset(anatomy)
    return method.changed(config) if config else method


__all__ = ["METHODS", "Editor", "Method", "Step", "Workbench", "method_for"]
