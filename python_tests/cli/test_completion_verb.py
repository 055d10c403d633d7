"""`d4s completion`: what a shell that has the script offers behind the words that were typed."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from support.command import done, failed, run

from d4s.cli.completion import SHELLS
from d4s.cli.parser import VERBS
from d4s.methods import METHODS

# The words of each line are completed as bash does it: at the last one, which may be empty.
OFFERS = """
source "$1"
function_of_d4s=$(complete -p d4s | sed 's/.*-F \\([^ ]*\\) d4s/\\1/')
while IFS= read -r line; do
  IFS=' ' read -ra COMP_WORDS <<< "$line"
  [[ "$line" == *' ' ]] && COMP_WORDS+=("")
  COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 )) COMP_LINE=$line COMP_POINT=${#line}
  "$function_of_d4s"
  echo "${COMPREPLY[@]}"
done
"""


@pytest.fixture(scope="module")
def offered(tmp_path_factory):
    """A line as it was typed → what bash offers for its last word, in a folder with files."""
    from d4s.cli import parser
    from d4s.cli.completion import script

    place = tmp_path_factory.mktemp("completion")
    (place / "script").write_text(script(parser.command_line(), "bash"))
    folder = place / "here"
    (folder / "facts").mkdir(parents=True)
    (folder / "facts.json").touch()

    def offers(line: str) -> set[str]:
        ended = run("bash", "-c", OFFERS, "bash", str(place / "script"), input=f"{line}\n", cwd=folder)
        assert ended.returncode == 0 and ended.stderr == ""
        return set(ended.stdout.split())

    return offers


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("d4s ver", {"verify"}),
        ("d4s re", {"redo", "report", "reproduce", "revise"}),
        ("d4s edit m facts.json --batch", {"--batch-size"}),
        ("d4s edit m facts.json --method ultra", {"ultraedit"}),
        ("d4s edit m facts.json --method memit", {"memit", "memit-seq"}),
        ("d4s demo --against rom", {"rome"}),
        ("d4s methods alp", {"alphaedit"}),
        ("d4s edit m facts.json --dtype b", {"bfloat16"}),
        ("d4s edit m facts.json --keep-vectors ", {"yes", "no"}),
        ("d4s edit m fac", {"facts", "facts.json"}),
        ("d4s edit fac", {"facts", "facts.json"}),
        ("d4s edit m facts.json --covariance fac", {"facts", "facts.json"}),
        ("d4s log fac", {"facts", "facts.json"}),
        ("d4s edit m facts.json --seed fac", set()),
        ("d4s completion ", set(SHELLS)),
        ("d4s evaluate --verb", {"--verbose"}),
    ],
)
def test_bash_offers_what_may_stand_there(line, words, offered):
    assert offered(line) == words


def test_bash_offers_all_verbs_and_all_methods(offered):
    assert offered("d4s ") == set(VERBS)
    assert offered("d4s targets m e --out t --preset x --device cpu --limit 1 --zsre-target ") == {
        "alt",
        "answer",
    }
    assert offered("d4s edit m e --method ") == set(METHODS)


def test_the_verb_prints_the_script(capsys):
    text = done(capsys, "completion", "bash")
    assert "complete -o" in text.rstrip().splitlines()[-1] and text.rstrip().endswith(" d4s")
    for shell in SHELLS:
        told = json.loads(done(capsys, "completion", shell, "--json"))
        assert told["shell"] == shell and all(name in told["script"] for name in ("covariance", "alphaedit"))


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_another_shell_can_read_its_script(shell, capsys, tmp_path):
    """zsh's own check of the syntax, and fish's."""
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    (tmp_path / "script").write_text(done(capsys, "completion", shell))
    subprocess.run([shell, "-n", tmp_path / "script"], check=True)


def test_without_shtab_a_line_says_how_to_get_it(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "shtab" else find(name))
    said = failed(capsys, "completion", "bash")
    assert said == "d4s: completion needs shtab, which is not installed: pip install shtab"
    assert "completion = [" in (Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8")


def test_a_shell_that_an_old_shtab_lacks_is_named(capsys, monkeypatch):
    monkeypatch.setattr("shtab.SUPPORTED_SHELLS", ["bash"])
    assert "knows no fish, a newer one does" in failed(capsys, "completion", "fish")
