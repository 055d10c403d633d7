"""The scripts and the notebook of examples/ do what they say, in a process of their own, with few edits."""

from __future__ import annotations

import getpass
import html
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pandas
import pytest
import torch
from nbclient import NotebookClient
from safetensors.torch import load_file

import d4s
from d4s.embedded import folder, load_demo_edits

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "first_edits.ipynb"


def run(name: str, out: Path, *arguments: str) -> str:
    """What an example prints. It sees the checkout, and no network."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *arguments, "--out", out],
        cwd=out.parent,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run_here():
    tested = {"edit_and_save", "compare_methods", "explore_prior"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested
    assert {path.name for path in EXAMPLES.glob("*.ipynb")} == {NOTEBOOK.name}


def test_a_model_is_edited_and_saved(tmp_path):
    said = run("edit_and_save", tmp_path / "edited", "--edits", "2")
    edits = load_demo_edits(limit=2)
    assert all(f"asked for: {edit.target_new}" in said for edit in edits)
    model, tokenizer = d4s.load_model(tmp_path / "edited" / "model", dtype="float32")
    assert d4s.evaluate(model, tokenizer, edits)["efficacy"] == 1.0
    now, before = (
        load_file(place / "model.safetensors") for place in (tmp_path / "edited/model", folder() / "model")
    )
    changed = [name for name in before if not torch.equal(now[name].float(), before[name].float())]
    assert changed == ["model.layers.0.mlp.down_proj.weight"]


def test_two_methods_are_compared_and_drawn(tmp_path):
    said = run("compare_methods", tmp_path / "compared", "--edits", "2", "--methods", "d4s,ft-m")
    history = pandas.read_csv(tmp_path / "compared" / "history.csv")
    assert list(history["method"].unique()) == ["d4s", "ft-m"] and history["step"].max() == 2
    for name in ("metrics", "norms"):
        assert (tmp_path / "compared" / f"{name}.png").stat().st_size > 1_000 and f"{name}.png" in said
        assert (tmp_path / "compared" / f"{name}.csv").exists()


def test_targets_are_searched_once_for_every_weight_of_the_prior(tmp_path):
    said = run("explore_prior", tmp_path / "explored", "--edits", "3", "--weights", "60,60000")
    assert len(d4s.KeptTargets.load(tmp_path / "explored" / "targets.safetensors")) == 3
    light, heavy = (line.split() for line in said.splitlines() if line.split()[0] in ("60", "60000"))
    growth = [float(line[-1].rstrip("%")) for line in (light, heavy)]
    assert growth[0] > growth[1] >= 0 and float(light[1]) > float(heavy[1])


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_an_example_says_how_it_is_run(name):
    source = (EXAMPLES / f"{name}.py").read_text("utf-8")
    assert f"    python examples/{name}.py " in source.split('"""')[1]


# The notebook.


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def table_of(output: Any) -> list[list[str]]:
    """The cells of a table that an output holds, headings first; none where it holds no table."""
    rows = re.findall(r"<tr.*?</tr>", output.get("data", {}).get("text/html", ""), re.DOTALL)
    return [[html.unescape(one) for one in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]


def kinds(cell: Any) -> list[Any]:
    """What a cell put out, without its digits: streams by name, data by type, tables by rows and headings."""
    found: list[Any] = []
    for output in cell.outputs:
        table = table_of(output)
        found.append((output.output_type, output.get("name", ""), sorted(output.get("data", {}))))
        found.append((len(table), table[:1]))
    return found


def texts(notebook: Any) -> Iterator[str]:
    """What a reader sees of it, and what is kept beside that; pictures left out."""
    yield str(notebook.metadata)
    for cell in notebook.cells:
        yield from (str(cell.source), str(cell.metadata))
        for output in cell.get("outputs", []):
            yield output.get("text", "")
            yield from (
                str(data) for kind, data in output.get("data", {}).items() if kind.startswith("text/")
            )


def test_the_notebook_keeps_what_a_run_of_it_gave():
    stored = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(stored)
    cells = code_cells(stored)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), (
        "run it from top to bottom"
    )
    said = {output.output_type for cell in cells for output in cell.outputs}
    assert said == {"stream", "execute_result"}, "no cell may fail"
    assert {o.name for cell in cells for o in cell.outputs if o.output_type == "stream"} == {"stdout"}
    assert any("image/png" in o.get("data", {}) for cell in cells for o in cell.outputs)
    assert NOTEBOOK.stat().st_size < 300_000


def test_the_notebook_tells_nothing_of_the_machine_it_was_run_on():
    told = "\n".join(texts(nbformat.read(NOTEBOOK, as_version=4)))
    assert not re.search(r"(?<![\w<./])/(?:home|root|tmp|work|usr|opt|var|Users|mnt)\b", told)
    assert platform.node() not in told
    assert not re.search(rf"\b{re.escape(getpass.getuser())}\b", told)


def test_the_notebook_runs_and_gives_what_it_keeps(tmp_path, monkeypatch):
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    for name, value in (("PYTHONPATH", path), ("OMP_NUM_THREADS", "1"), ("HF_HUB_OFFLINE", "1")):
        monkeypatch.setenv(name, value)
    for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    stored, made = (nbformat.read(NOTEBOOK, as_version=4) for _ in range(2))
    for cell in code_cells(made):
        cell.outputs = []
    # Raises CellExecutionError, with the traceback, where a cell fails.
    NotebookClient(made, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for was, now in zip(code_cells(stored), code_cells(made), strict=True):
        assert kinds(now) == kinds(was), now.source
    tables = [table for cell in code_cells(made) for o in cell.outputs if (table := table_of(o))]
    before, after, undone = ({name: column for name, *column in zip(*t, strict=True)} for t in tables[:3])
    arrived = [said.startswith(new) for said, new in zip(after["edited"], after["asked for"], strict=True)]
    assert sum(arrived) > len(arrived) / 2 and arrived[0]
    assert before["unedited"] == after["unedited"] != after["edited"]
    assert undone["edited"] == after["edited"]
    assert not undone["first one undone"][0].startswith(undone["asked for"][0])
