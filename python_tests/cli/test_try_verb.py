"""`d4s try`: a model is asked and edited line by line; no line ends the session, and none with a traceback."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.chat import chatting
from support.command import FAST, done, failed
from support.sequences import same, state
from support.tiny import tiny_model, tiny_tokenizer

from d4s.cli import main
from d4s.cli.try_ import fact, read
from d4s.errors import EditError
from d4s.journal.patch import apply_patch
from d4s.journal.session import Session
from d4s.models.chat import ChatForm
from d4s.models.generation import generate_greedy

KEPT = ("--covariance", "c.safetensors", *FAST)
ASKED = "The mother tongue of Danielle Darrieux is"
EDIT = "edit: The mother tongue of [Danielle Darrieux] is => English"
OTHER = "edit: [Steve Jobs] worked for => Manila Lyon"


@pytest.fixture
def lines(monkeypatch):
    """Standard input of a script, as many lines as are given."""

    def of(*given: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in given)))

    return of


def told(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def test_a_fact_is_edited_asked_for_and_taken_back(lines, capsys):
    lines(
        "# a script", f"watch: {ASKED}", ASKED, EDIT, f"ask: {ASKED}", OTHER, "undo 1", "undo", ASKED, "edits"
    )
    watched, before, first, between, second, undone, last, after, listed = told(
        done(capsys, "try", "m", *KEPT, "--json")
    )
    model = tiny_model("gpt2", 1)
    (plain,) = generate_greedy(model, tiny_tokenizer(), [ASKED], max_new_tokens=16)
    assert watched["said"] == before["said"] == after["said"] == plain.strip(), "exactly what was said before"
    assert first["edit"] == 1 and first["target"] == "English" and first["before"] == before["said"]
    assert first["after"] == between["said"]
    # The watched text is that of the edit: its answer is told where, and only where, it has become another.
    moved = {} if before["said"] == first["after"] else {ASKED: [before["said"], first["after"]]}
    assert first["changed"] == moved
    assert (second["edit"], undone["undone"], last["undone"]) == (2, 1, 2)
    assert listed["edits"] == [
        {"prompt": "The mother tongue of [Danielle Darrieux] is", "target": "English", "stands": False},
        {"prompt": "[Steve Jobs] worked for", "target": "Manila Lyon", "stands": False},
    ]


def test_what_is_printed_reads_as_a_transcript(lines, capsys):
    lines(f"watch: {ASKED}", EDIT, "watch", "unwatch 1", "watch", "edits", "undo", "help")
    out = done(capsys, "try", "m", *KEPT)
    for text in (
        f"> {EDIT}",
        "  before:  p(English) = ",
        "  after:   p(English) = ",
        "  edit 1, ",
        "of 1 watched answers changed",
        f"  1  {ASKED}",
        f"  no longer watched: {ASKED}",
        "  nothing is watched",
        "  1  The mother tongue of [Danielle Darrieux] is => English",
        "  edit 1 is taken back",
        "  now:     p(English) = ",
        "edit: PROMPT => TARGET",
    ):
        assert text in out, (text, out)
    assert "chat template" not in out


def test_no_line_ends_the_session_and_what_was_wrong_with_each_is_said(lines, capsys):
    wrong = {
        "edti: The capital of [France] is => Lyon": "did you mean 'edit'?",
        "wacth: France": "did you mean 'watch'?",
        "qiut": "'qiut' is no command; did you mean 'quit'? write ask: qiut to ask it",
        "undoo 2": "did you mean 'undo'?",
        "/help": "did you mean 'help'?",
        "exit()": "did you mean 'exit'?",
        ":q": "':q' is no command; write ask: :q to ask it",
        "edit: The capital of France is Lyon": "there is no '=>'",
        "edit: The capital of France is => Lyon": "no subject is marked by brackets",
        "edit: The [capital] of [France] is => Lyon": "several subjects are marked by brackets in 'The [capital]",
        "edit: The capital of [ ] is => Lyon": "the subject in brackets is empty in 'The capital of [ ] is'; put",
        "edit: The capital of [France] is => ": "'target_new' is empty",
        "edit: The {} of [France] is => Lyon": "holds '{}'",
        "edit": "there is no '=>'",
        "ask": "ask: nothing to ask",
        "undo": "no edit stands",
        "undo x": "must be a number",
        "undo 7": "there is no edit 7",
        "unwatch": "must be a number",
        "unwatch 2": "there is no such text",
        "save": "save: no place",
        "save here": "nothing can be saved",
        "word " * 200: "positions",
    }
    lines(*wrong, "", "   ", ASKED)
    assert main(["try", "m", *KEPT]) == 1
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    said = [line for line in err.splitlines() if line.startswith("d4s: ")]
    assert len(said) == len(wrong) + 1
    for line, text in zip(said, wrong.values(), strict=False):
        assert text in line, (text, line)
    assert said[-1].startswith(f"d4s: {len(wrong)} of {len(wrong) + 3} lines could not be done")
    assert out.rstrip().splitlines()[-2] == f"> {ASKED}", "the last line was done"


def test_a_patch_is_saved_and_what_is_not_saved_is_told(lines, capsys, tmp_path):
    place = tmp_path / "a b.safetensors"
    lines(EDIT, "quit", f"save: {place}", OTHER)
    assert main(["try", "m", *KEPT]) == 0
    out, err = capsys.readouterr()
    assert "1 change is not saved: save PATH keeps the model; quit again ends" in out
    assert f"  patch of 1 edits: {place}" in out
    assert err.rstrip().endswith("d4s: 1 change is not saved, and gone")
    model = tiny_model("gpt2", 1)
    before = state(model)
    (edit,) = apply_patch(model, place).edits
    assert edit.text == ASKED and edit.target_new == "English" and not same(state(model), before)
    lines(EDIT, f"save {tmp_path / 'whole'}", "quit", "this is not read")
    out = done(capsys, "try", "m", *KEPT)
    assert "not saved" not in out and "this is not read" not in out
    assert (tmp_path / "whole" / "model.safetensors").exists()
    assert (tmp_path / "whole" / "d4s_edits.json").exists() and (
        tmp_path / "whole" / "tokenizer.json"
    ).exists()


def test_quit_twice_ends_without_saving(lines, capsys):
    lines(EDIT, "quit", "quit", "this is not read")
    assert "this is not read" not in done(capsys, "try", "m", *KEPT)


class Terminal:
    """Standard input that says it is one; input() gives what is scripted, and raises what is an error of it."""

    def __init__(self, *given) -> None:
        self.given = list(given)

    def isatty(self) -> bool:
        return True

    def input(self, shown: str = "") -> str:
        if not self.given:
            raise EOFError
        one = self.given.pop(0)
        if isinstance(one, type):
            raise one
        return one


def test_ctrl_c_stops_what_is_being_done_and_ctrl_d_ends(monkeypatch, capsys):
    terminal = Terminal(KeyboardInterrupt, OTHER, EDIT, "undo", ASKED)
    monkeypatch.setattr(sys, "stdin", terminal)
    monkeypatch.setattr("builtins.input", terminal.input)
    from d4s.journal.session import Session

    make, calls = Session.edit, []

    def stopped_once(self, edit):
        calls.append(edit)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return make(self, edit)

    monkeypatch.setattr(Session, "edit", stopped_once)
    assert main(["try", "m", *KEPT]) == 0, "a mistyped line on a terminal is no failure"
    out, err = capsys.readouterr()
    assert "stopped; nothing was changed" in out and "Traceback" not in err
    assert "edit 1 is taken back" in out and not terminal.given
    assert "> " not in out, "a terminal shows what is typed by itself"


def test_what_a_line_is_taken_for():
    right = {
        "undo": ("undo", ""),
        "UNDO 3": ("undo", "3"),
        "undo the last change of law": ("ask", "undo the last change of law"),
        "save the whales now": ("ask", "save the whales now"),
        "save: a b/c": ("save", "a b/c"),
        "ask: undo": ("ask", "undo"),
        "Question: who wrote it?": ("ask", "Question: who wrote it?"),
        "Watch: x": ("watch", "x"),
        "edit The capital of [France] is => Lyon": ("edit", "The capital of [France] is => Lyon"),
        "edit this": ("ask", "edit this"),
        "# not asked": ("", ""),
        "  ": ("", ""),
        "help me": ("ask", "help me"),
        "Edith": ("ask", "Edith"),
        "edit 2": ("ask", "edit 2"),
        "Editor": ("ask", "Editor"),
        "Exit": ("exit", ""),
    }
    assert {line: read(line) for line in right} == right


def test_a_fact_is_read_with_its_subject_and_target():
    edit = fact("a => b: The capital of [New  York] is => a => b")
    assert (edit.prompt, edit.subject, edit.target_new) == (
        "a => b: The capital of {} is => a",
        "New  York",
        "b",
    )
    edit = fact("In [1] it says that [[Lyon]] is in=>Italy")
    assert (edit.prompt, edit.subject, edit.target_new) == ("In [1] it says that {} is in", "Lyon", "Italy")
    assert fact("[Lyon] is in => the [south]").target_new == "the [south]"
    with pytest.raises(EditError, match=r"put it in \[ \], or in \[\[ \]\] where"):
        fact("[a] and [b] => c")


@pytest.fixture
def chat_model(place) -> str:
    """The folder of a model whose tokenizer has a chat template."""
    if not Path("mc").exists():
        tiny_model("gpt2", 1).save_pretrained("mc")
        chatting("turns with a system's").save_pretrained("mc")
    return "mc"


def test_chat_asks_and_edits_in_the_template(lines, capsys, chat_model, tmp_path):
    lines(ASKED, EDIT, "edits", f"save {tmp_path / 'p.safetensors'}")
    asked, edited, listed, _ = told(done(capsys, "try", chat_model, "--chat", *KEPT, "--json"))
    form = ChatForm.of(chatting("turns with a system's"))
    options = dict(max_new_tokens=64, stop_at_line=False)
    (plain,) = generate_greedy(tiny_model("gpt2", 1), tiny_tokenizer(), [form.asked(ASKED)], **options)
    assert asked["said"] == edited["before"] == plain.strip()
    assert listed["edits"][0]["prompt"] == "The mother tongue of [Danielle Darrieux] is"
    (edit,) = apply_patch(tiny_model("gpt2", 1), tmp_path / "p.safetensors").edits
    assert edit.chat == form.head and edit.text == form.asked(ASKED)
    lines(ASKED)
    assert "This model has a chat template; --chat asks in it." in done(capsys, "try", chat_model, *KEPT)


def test_edit_and_evaluate_say_which_form_was_asked(capsys, chat_model, tmp_path):
    out = done(capsys, "edit", chat_model, "edits.json", "--chat", *KEPT, "--out", str(tmp_path / "r"))
    note = "note: asked in the model's chat template: prompts as they are in the user's turn"
    assert note in out
    stored = json.loads((tmp_path / "r" / "result.json").read_text())
    assert all("chat template" in one["notes"][0] for one in stored["evaluations"])
    assert note in done(capsys, "evaluate", chat_model, "edits.json", "--chat", "--generate")
    assert "chat" not in done(capsys, "evaluate", chat_model, "edits.json")


@pytest.mark.parametrize("verb", ["edit", "evaluate", "compare", "targets", "tune", "try"])
def test_a_tokenizer_without_a_template_is_refused(verb, capsys, tmp_path):
    edits = () if verb == "try" else ("edits.json",)
    suffix = {"tune": "r.json", "targets": "r.safetensors"}.get(verb, "r")
    out = () if verb in ("evaluate", "try") else ("--out", str(tmp_path / suffix))
    assert "has no chat template" in failed(capsys, verb, "m", *edits, "--chat", *out)


def test_covariance_and_corpus_are_alternatives(capsys):
    line = failed(capsys, "try", "m", *KEPT, "--corpus", "corpus.txt")
    assert "--corpus means nothing with --covariance" in line


def test_key_statistics_come_from_a_corpus(lines, capsys):
    lines(EDIT)
    (edited,) = told(done(capsys, "try", "m", "--corpus", "corpus.txt", *FAST, "--json"))
    assert edited["edit"] == 1


@pytest.mark.parametrize("arrived", [True, False])
def test_whether_a_target_arrived_is_told_by_the_mean_over_its_tokens(arrived, lines, capsys, monkeypatch):
    """As its search tells it: the product over a long target's tokens is small where each of them is likely."""
    monkeypatch.setattr(Session, "probability", lambda *_: 0.01)
    monkeypatch.setattr(Session, "mean_probability", lambda *_: 0.9 if arrived else 0.1)
    edit = Session.edit
    monkeypatch.setattr(Session, "edit", lambda *given: replace(edit(*given), last_probability=(0.95,)))
    lines(EDIT)
    out = done(capsys, "try", "m", *KEPT)
    assert ("and did not arrive" in out) != arrived
