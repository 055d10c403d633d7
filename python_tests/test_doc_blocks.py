"""What the documents show runs: blocks of Python are executed, command lines are read by the parser they are meant for.

Every page with Python is one program in a folder of its own: its blocks run one after another, in one namespace. In the
place of what takes long or cannot be had here stands something small, and nothing else is changed:

- `d4s.load_model` gives the embedded model, whatever it is asked for; `edit_sequence` takes key statistics of a few
  sentences where it is given none; `tune` takes seconds in place of minutes (`small`);
- files that pages name hold three edits and a few sentences (`FILES`), and the folder `run` a journal of them;
- `model`, `tokenizer`, `edits`, `covariance` and `d4s` are there from the beginning.

Of blocks of the shell each `d4s …` line has to be one that the command line takes, with the options it names;
`python -m` has to name a module that is there, and `pip install` extras that are. The lines of `RUN_WHOLE`, and those
of verbs that only list, are run as well, `smollm2` and `MODEL` being the embedded model.

A block below `<!-- not run: … -->` says why it is not run; it is compiled or parsed all the same.
"""

from __future__ import annotations

import copy
import re
import shlex
import shutil
from collections.abc import Iterator
from importlib import util
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import d4s
from d4s.cli import main
from d4s.cli.parser import command_line
from d4s.edits.formats import save_edits
from d4s.embedded import load_demo_edits

ROOT = Path(__file__).resolve().parents[1]
# The Python of CONTRIBUTING is a file of the package, which python_tests/methods/test_contributing.py tries.
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
LANGUAGES = {"python", "sh", "json", "jsonl", "yaml", "text", "bibtex", "{toctree}", "{eval-rst}"}
RUN_WHOLE = {"docs/guide/quickstart.md"}
LISTING = {"methods", "models"}
FILES = ("counterfact.json", "edits.json", "more.jsonl")
SENTENCES = "The capital of France is Paris. Danielle Darrieux spoke French.\n" * 60
# What a block imports → the package that it needs, which the extra "test" brings.
OPTIONAL = {"from peft": "peft", "d4s.report.live": "rich", "d4s.report.tensorboard": "tensorboard"}


class Block(NamedTuple):
    """line: of its first fence; why_not: what its comment says"""

    page: str
    line: int
    language: str
    text: str
    why_not: str | None

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    name = page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name
    found: list[Block] = []
    lines = page.read_text("utf-8").splitlines()
    at = 0
    while at < len(lines):
        fence = re.fullmatch(r"( *)(```+)\s*(\S*).*", lines[at])
        if fence is None:
            at += 1
            continue
        end = next(i for i in range(at + 1, len(lines)) if lines[i].strip() == fence[2])
        text = "\n".join(line.removeprefix(fence[1]) for line in lines[at + 1 : end]) + "\n"
        above = lines[at - 1] if at else ""
        note = re.fullmatch(r" *<!-- not run: (.+?) -->", above)
        found.append(Block(name, at + 1, fence[3], text, note[1] if note else None))
        at = end + 1
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PYTHON = sorted({block.page for block in BLOCKS if block.language == "python"})
SHELL = [block for block in BLOCKS if block.language == "sh"]


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a block of the shell, word by word, without comments, and without what they read and where they
    write."""
    text = re.sub(r"(?ms)<<'(\w+)'$.*?^\1$", "", text)  # lines that are given to a command
    for line in text.replace("\\\n", " ").splitlines():
        reader = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
        reader.whitespace_split, reader.commenters = True, "#"
        command: list[str] = []
        words = iter((*reader, ";"))
        for word in words:
            if set(word) <= set("<>"):
                next(words)
            elif not set(word) <= set(";&|"):
                command.append(word)
            elif command:
                yield command
                command = []


def arguments_of(command: list[str]) -> list[str] | None:
    """What a command gives to d4s; None where it is another program's."""
    if command[:1] == ["d4s"]:
        return command[1:]
    for i in range(len(command) - 1):
        if command[i : i + 2] == ["-m", "d4s"]:
            return command[i + 2 :]
    return None


def test_blocks_and_commands_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```sh\npip install '.[gguf]' && d4s demo --out a  # words\nd4s methods; d4s models\n"
        "d4s try M < lines > said\nd4s try M <<'END'\nundo\nEND\n```\n\n"
        "<!-- not run: it is far away -->\n```python\nx = 1\n```\n"
    )
    shell, python = blocks_of(page)
    assert (shell.language, shell.line, shell.why_not) == ("sh", 1, None)
    assert (python.text, python.why_not) == ("x = 1\n", "it is far away")
    assert list(commands(shell.text)) == [
        ["pip", "install", ".[gguf]"],
        ["d4s", "demo", "--out", "a"],
        ["d4s", "methods"],
        ["d4s", "models"],
        ["d4s", "try", "M"],
        ["d4s", "try", "M"],
    ]
    assert arguments_of(["torchrun", "-m", "d4s", "edit", "M"]) == ["edit", "M"]
    assert arguments_of(["vllm", "serve"]) is None


def test_every_block_says_what_it_is():
    assert not [block.place for block in BLOCKS if block.language not in LANGUAGES]


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.place)
def test_a_command_is_one_that_can_be_given(block, capsys):
    extras = re.search(
        r"(?s)\[project.optional-dependencies\]\n(.*?)\n\[", (ROOT / "pyproject.toml").read_text()
    )
    assert extras is not None
    for command in commands(block.text):
        arguments = arguments_of(command)
        if arguments is not None:
            try:
                command_line().parse_args(arguments)
            except SystemExit as ended:
                assert not ended.code, f"{block.place}: {' '.join(command)}\n{capsys.readouterr().err}"
        elif command[:2] == ["python", "-m"] and command[2].startswith(("benchmarks", "d4s")):
            assert util.find_spec(command[2]) is not None, f"{block.place}: {command[2]}"
        for name in re.findall(r"(?:\.|d4s)\[([\w,]+)\]", " ".join(command)):
            for extra in name.split(","):
                assert f"\n{extra} = [" in f"\n{extras[1]}", f"{block.place}: no extra {extra}"


@pytest.mark.parametrize("name", sorted(LISTING))
def test_a_verb_that_lists_runs_as_it_is_shown(name, capsys):
    for block in SHELL:
        for command in commands(block.text):
            arguments = arguments_of(command)
            if arguments and arguments[0] == name:
                assert main(arguments) == 0, f"{block.place}: {' '.join(command)}"


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, Any, Any]:
    """(model, tokenizer, key statistics) of the embedded model, one for all pages.

    Statistics of a few sentences: taking the model's own apart costs more than all the rest.
    """
    model, tokenizer = d4s.load_model("embedded", dtype="float32")
    return model, tokenizer, d4s.estimate_covariance(model, tokenizer, SENTENCES.splitlines(), progress=False)


@pytest.fixture
def small(embedded, tmp_path, monkeypatch) -> dict[str, Any]:
    """Makes a page small: what it is to find in its folder and in its namespace, which is returned."""
    unedited, tokenizer, covariance = embedded
    model = copy.deepcopy(unedited)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("D4S_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    edits = load_demo_edits(limit=3)
    edits[1] = d4s.Edit(**{**vars(edits[1]), "id": "counterfact-17"})
    for name in FILES:
        save_edits(edits, tmp_path / name)
    (tmp_path / "corpus.txt").write_text(SENTENCES)
    monkeypatch.setattr("d4s.embedded.statistics.demo_covariance", lambda *_, **__: covariance)
    monkeypatch.setattr(d4s, "load_model", lambda *_, **__: (model, tokenizer))
    edit_sequence, tune = d4s.edit_sequence, d4s.tune

    def with_statistics(*arguments: Any, **options: Any) -> d4s.Result:
        return edit_sequence(*arguments, **{"covariance": covariance, "progress": False} | options)

    def soon(*arguments: Any, **options: Any) -> d4s.Tuning:
        looks = count()  # a clock by which each look at it takes a second, on a machine however busy
        few = {"minutes": 0.5, "probes": 2, "covariance": covariance, "clock": lambda: float(next(looks))}
        return tune(*arguments, **options | few)

    monkeypatch.setattr(d4s, "edit_sequence", with_statistics)
    monkeypatch.setattr(d4s, "tune", soon, raising=False)
    return {"d4s": d4s, "model": model, "tokenizer": tokenizer, "edits": edits, "covariance": covariance}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # asked for by peft
@pytest.mark.parametrize("page", PYTHON)
def test_the_python_of_a_page_runs(page, small, tmp_path):
    blocks = [block for block in BLOCKS if block.page == page and block.language == "python"]
    write_files(page, tmp_path)
    compiled = [(block, compile(block.text, block.place, "exec")) for block in blocks]
    if any('Journal("run")' in block.text for block in blocks):
        d4s.edit_sequence(small["model"], small["tokenizer"], small["edits"], journal="run/journal").restore()
    for block, code in compiled:
        if block.why_not is not None:
            continue
        for words, package in OPTIONAL.items():
            if words in block.text:
                pytest.importorskip(package)
        exec(code, small)


@pytest.mark.parametrize("page", sorted(RUN_WHOLE))
def test_the_commands_of_a_page_run(page, small, tmp_path, capsys):
    """In order, in one folder: what one writes the next one reads. Files that the page shows are there."""
    write_files(page, tmp_path)
    for block in (block for block in BLOCKS if block.page == page):
        if block.language != "sh" or block.why_not is not None:
            continue
        for command in commands(block.text):
            arguments = arguments_of(command)
            if arguments is not None:
                given = ["embedded" if word in ("MODEL", "smollm2") else word for word in arguments]
                assert main(given) == 0, f"{block.place}: {' '.join(command)}\n{capsys.readouterr().err}"
            elif command[0] == "rm":
                shutil.rmtree(tmp_path / command[-1])
            else:
                pytest.fail(f"{block.place}: {' '.join(command)} is not run here; say why above the block")


def write_files(page: str, folder: Path) -> None:
    """Those that a page shows, by the last name that stands before each."""
    lines = (ROOT / page).read_text("utf-8").splitlines()
    for block in BLOCKS:
        if block.page == page and block.language in ("json", "jsonl", "yaml"):
            named = re.findall(r"`([\w.-]+\.(?:json|jsonl|yaml))`", "\n".join(lines[: block.line - 1]))
            assert named, f"{block.place}: which file is this?"
            (folder / named[-1]).write_text(block.text, "utf-8")
