"""The order of the rooms: what imports what, and what a plain `import d4s` brings along."""

from __future__ import annotations

import ast
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "d4s"

# The path of an edit, from the ground up: a room imports only rooms that stand before it. A new room is put where it
# belongs.
GROUND = ("version", "errors", "files", "tensor_files", "interrupts", "ranks", "progress", "configuration")
ROOMS = (
    *GROUND,
    *("ops", "figures", "edits", "models", "locate", "change", "measure", "methods"),
    *("embedded", "journal", "sequence", "study", "report", "cli"),
)
FACE, DOOR = "__init__.py", "__main__.py"  # of d4s itself: what it offers, and what `python -m d4s` runs

# What a plain import leaves where it is: each is loaded by the work that needs it.
LATER = ("matplotlib", "pandas", "lm_eval", "scipy.stats", "plotly", "transformers")
TRIES = 8  # at most
# Measured: 1.1 times `import torch`; with transformers alone 1.5, with one of its models 2.9.
MOST = 1.4


class Import(NamedTuple):
    """One name that a file imports, wherever in it. module: spelled out, `d4s.ops._C` for `from d4s.ops import _C`"""

    place: str
    module: str

    @property
    def room(self) -> str | None:
        """The room of d4s it leads to; "" for d4s itself, None for what is not of d4s."""
        package, _, inside = f"{self.module}.".partition(".")
        if package != "d4s":
            return None
        room = inside.partition(".")[0]
        return room if (PACKAGE / room).is_dir() or (PACKAGE / f"{room}.py").exists() else ""


def imports(source: str, place: str) -> Iterator[Import]:
    """Every import of a file of d4s: of the module, of its functions, and those for the type checker alone."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(place, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = Path(place).parts[: -node.level] if node.level else ()
            module = ".".join((*start, *filter(None, [node.module])))
            yield from (Import(place, f"{module}.{name.name}") for name in node.names)


def room_of(place: str) -> str:
    """The room a file is in: "d4s/edits/edit.py" → "edits"."""
    return Path(place).parts[1].removesuffix(".py")


FILES = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
ARROWS = [arrow for place, source in FILES.items() for arrow in imports(source, place)]


def fails_with(wrong: list[str]) -> None:
    """One line each; a file that imports ten names of a room is one."""
    assert not wrong, "\n" + "\n".join(dict.fromkeys(wrong))


def test_every_import_is_seen_wherever_it_stands():
    source = (
        "import d4s.models.trace as t, argparse\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from d4s import study\n"
        "def late():\n    def later():\n        from ..cli import main\n"
        "class Also:\n    from . import formats\n    from d4s import __version__\n"
    )
    found = {arrow.module: arrow.room for arrow in imports(source, "d4s/edits/edit.py")}
    assert found == {
        "d4s.models.trace": "models",
        "argparse": None,
        "typing.TYPE_CHECKING": None,
        "d4s.study": "study",
        "d4s.cli.main": "cli",
        "d4s.edits.formats": "edits",
        "d4s.__version__": "",
    }


def test_the_list_of_rooms_is_that_of_the_folder():
    """Every file of d4s has a place in the order, and every place is a file or folder."""
    assert sorted({room_of(place) for place in FILES} - {"__init__", "__main__"}) == sorted(ROOMS)


def test_the_tree_that_is_told_is_the_order():
    told = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    tree = told[told.index("\nd4s/\n") : told.index("\npython_tests/ ")]
    assert tuple(re.findall(r"^  (\w+)", tree, re.MULTILINE)) == ROOMS


def test_a_room_imports_only_rooms_that_stand_before_it():
    wrong = []
    for arrow in ARROWS:
        here, there = room_of(arrow.place), arrow.room
        if there is None or here == there or here in ("__init__", "__main__"):
            continue
        if there == "":
            if here != "cli":
                wrong.append(
                    f"{arrow.place} → d4s itself: a room names the rooms it needs; only cli asks the face"
                )
        elif ROOMS.index(there) > ROOMS.index(here):
            stand = "stand" if here.endswith("s") else "stands"
            wrong.append(f"{arrow.place} → d4s.{there}: {here} {stand} below {there}")
    fails_with(wrong)


def test_the_public_face_does_without_the_command_line():
    fails_with(
        [f"{a.place} → {a.module}: the face" for a in ARROWS if a.place == f"d4s/{FACE}" and a.room == "cli"]
    )


def test_figures_know_nothing_of_editing():
    fails_with(
        [
            f"{arrow.place} → d4s.{arrow.room}: figures import the ground alone"
            for arrow in ARROWS
            if room_of(arrow.place) == "figures" and arrow.room not in (None, "figures", *GROUND)
        ]
    )


def test_only_ops_knows_the_compiled_extension():
    wrong = [
        f"{a.place} → {a.module}" for a in ARROWS if "_C" in a.module.split(".") and room_of(a.place) != "ops"
    ]
    for place, source in FILES.items():
        reached = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Attribute) and n.attr == "_C"]
        if reached and room_of(place) != "ops":
            wrong.append(f"{place} → ops._C, line {reached[0].lineno}")
    fails_with(wrong)


def test_only_the_command_line_and_scripts_know_argparse():
    """A script is run by its own name (`python -m d4s.embedded.train`), and nothing imports it."""
    imported = {arrow.module for arrow in ARROWS}
    wrong = []
    for arrow in ARROWS:
        if arrow.module.split(".")[0] != "argparse" or room_of(arrow.place) == "cli":
            continue
        own = arrow.place.removesuffix(".py").replace("/", ".")
        if 'if __name__ == "__main__":' not in FILES[arrow.place]:
            wrong.append(f"{arrow.place} → argparse: it is neither in cli nor a script")
        if any(module == own or module.startswith(f"{own}.") for module in imported):
            wrong.append(f"{arrow.place} → argparse: a script, and yet d4s imports it")
    fails_with(wrong)


def fresh(code: str) -> str:
    """What code prints in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_plain_import_leaves_figures_tables_and_models_where_they_are():
    loaded = fresh("import d4s, sys; print(*sys.modules, sep='\\n')").split()
    heavy = [name for name in loaded if any(name == late or name.startswith(f"{late}.") for late in LATER)]
    assert "d4s.methods" in loaded and not heavy, heavy


def test_a_plain_import_costs_little_more_than_torch():
    """Seconds of the processor, which a busy machine stretches less than the clock's; the best of some tries each, in
    turns, so that a busy while meets both."""

    def seconds(module: str) -> float:
        return float(fresh(f"import time, {module}; print(time.process_time())"))

    torch = ours = math.inf
    for _ in range(TRIES):
        torch, ours = min(torch, seconds("torch")), min(ours, seconds("d4s"))
        if ours <= MOST * torch:
            break
    assert ours <= MOST * torch, f"import d4s takes {ours:.2f} s, import torch {torch:.2f} s"
