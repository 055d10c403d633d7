"""What a folder of task files would run: lm-evaluation-harness executes Python that a task file names.

A task file is YAML. `!function utils.score` in it imports utils.py, from beside it or from wherever Python finds it.
Files of the installed harness, which local tasks include, are as trustworthy as the harness, and are not looked into.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from d4s.errors import ConfigError, DataError

_PLAIN = "tag:yaml.org,2002:"
_PYTHON = f"{_PLAIN}python/"


def require_folder(folder: str | os.PathLike[str]) -> None:
    """ConfigError where there is none."""
    if not os.path.isdir(folder):
        raise ConfigError(f"there is no folder of task files {os.fspath(folder)!r}; name one that is there")


def check_task_files(folder: str | os.PathLike[str]) -> None:
    """Raises ConfigError, naming file, line and function, if a task file in the folder, or one that it includes, would
    run code; DataError if one is not YAML. Nothing is imported or run."""
    require_folder(folder)
    seen: set[Path] = set()
    for path in sorted(Path(folder).rglob("*.yaml")):
        _check(path, seen)


def _check(path: Path, seen: set[Path]) -> None:
    import yaml  # comes with the harness

    path = path.resolve()
    if path in seen or path.is_relative_to(_harness()):
        return
    seen.add(path)
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, OSError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(f"{path}: a task file that cannot be read as YAML ({reason}); mend it") from None
    if not isinstance(root, yaml.MappingNode):
        raise DataError(f"{path}: a task file must hold fields, as 'task: name', and this one does not")
    for name, node in _nodes(root):
        place = f"{path}, line {node.start_mark.line + 1}"
        value = node.value if isinstance(node, yaml.ScalarNode) else ""
        if node.tag == "!function":
            _refuse(place, f"would run {_function(path, value)}")
        elif node.tag.startswith(_PYTHON) or not node.tag.startswith(_PLAIN):
            _refuse(place, f"has the tag {node.tag.replace(_PYTHON, '!!python/')}, which may run code")
        elif name == "class":
            _refuse(place, f"is a task written in Python ({value})")
        elif name == "trust_remote_code" and value.lower() not in ("", "false", "no", "off"):
            _refuse(place, "would run the code of its data set (trust_remote_code)")
        elif name == "dataset_path" and value.endswith(".py"):
            _refuse(place, f"would run {value} to load its data")
        elif name == "metric" and not _is_known_metric(value):
            _refuse(
                place, f"would load a metric {value!r} with the library evaluate, whose metrics are Python"
            )
        # Whatever its name: a file that is included, or one that a group names as a member.
        if (name == "include" or value.endswith((".yaml", ".yml"))) and (path.parent / value).is_file():
            _check(path.parent / value, seen)


def _refuse(place: str, what: str) -> None:
    raise ConfigError(
        f"{place}: {what}; read it, and if you trust it, say so: --trust-task-code (trust_task_code=True)"
    )


def _function(path: Path, value: str) -> str:
    """Where the harness finds `module.function`: beside the task file, or else among what Python can import."""
    module, _, function = value.rpartition(".")
    beside = path.parent / f"{module.replace('.', '/')}.py"
    return f"{function}() of {beside if beside.exists() else f'the Python module {module!r}'}"


def _nodes(root: Any) -> Iterator[tuple[str, Any]]:
    """(field that it is the value of, node) of all nodes; by anchors one may appear twice, or within itself."""
    import yaml

    left, seen = [("", root)], set[int]()
    while left:
        name, node = left.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield name, node
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                left += [("", key), (str(key.value), value)]
        elif isinstance(node, yaml.SequenceNode):
            left += [(name, item) for item in node.value]


def _harness() -> Path:
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).resolve().parent


def _is_known_metric(name: str) -> bool:
    import lm_eval.api.metrics  # noqa: F401  (fills the registry)
    from lm_eval.api import registry

    known: Any = getattr(registry, "metric_registry", None) or getattr(registry, "METRIC_REGISTRY", {})
    return name in known


@contextmanager
def templates_in_a_sandbox() -> Iterator[None]:
    """Inside, the harness renders prompts in Jinja's sandbox: a template cannot reach Python through attributes."""
    import lm_eval.utils
    from jinja2.sandbox import SandboxedEnvironment

    plain = lm_eval.utils.env
    boxed = SandboxedEnvironment(undefined=plain.undefined, keep_trailing_newline=plain.keep_trailing_newline)
    boxed.filters.update(plain.filters)
    lm_eval.utils.env = boxed
    try:
        yield
    finally:
        lm_eval.utils.env = plain
