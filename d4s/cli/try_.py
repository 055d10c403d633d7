"""`d4s try`: a model is asked, edited and asked again, line by line, on a terminal or from a script."""

from __future__ import annotations

import difflib
import json
import re
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d4s.cli.arguments import (
    add_chat,
    add_covariance,
    add_fields,
    add_model,
    add_preset,
    add_sums,
    configured,
    count,
    loaded_covariance,
    loaded_model,
    refuse,
)
from d4s.cli.edit import by_rule
from d4s.cli.printing import words
from d4s.errors import D4SError, EditError, shown
from d4s.interrupts import Terminated

if TYPE_CHECKING:
    from d4s.edits import Edit

HELP = "ask a model, edit a fact, ask again, take it back: line by line, from a terminal or a script on standard input"
COMMANDS = """\
  TEXT                           the model goes on from it; with --chat it answers it
  ask: TEXT                      the same, also for a text that looks like a command
  edit: PROMPT => TARGET         write a fact; in PROMPT the subject stands in brackets:
                                 edit: The mother tongue of [Danielle Darrieux] is => English
                                 ([[ ]] where the prompt has brackets of its own)
  edits                          what was edited, by number
  undo | undo N                  take the last edit back, or edit N
  watch: TEXT                    ask it now, and tell after each edit whether its answer has changed
  watch | unwatch N              what is watched, by number; watch text N no longer
  save PATH                      a new folder with the edited model, or a patch: PATH.safetensors
  help | quit                    this; the end (Ctrl-D too). Ctrl-C stops what is being done"""
_NAMES = ("ask", "edit", "edits", "undo", "watch", "unwatch", "save", "help", "quit", "exit")
_WITH_TEXT = ("ask", "edit", "watch", "save")
_ALONE = re.compile(r"(ask|edit|edits|watch|help|quit|exit)|(undo|unwatch|save)(?:\s+(\S+))?", re.IGNORECASE)
_NAMED = re.compile(r"(\w+)\s*:\s*(.*)", re.DOTALL)
_ONE_WORD = re.compile(r"[:/]?(\w+)(?:\s+\d+|\(\))?")  # :q, undoo 2, exit()
LIKE_A_COMMAND = 0.75  # difflib's ratio from which a word with a colon is taken for a mistyped one


def add(verb: ArgumentParser) -> None:
    add_model(verb)
    add_chat(verb)
    add_covariance(verb)
    verb.add_argument(
        "--corpus",
        type=Path,
        metavar="FILE",
        help="text for key statistics; default: the embedded model's own, or sampled from the model and cached",
    )
    verb.add_argument("--tokens", type=count, help="that an answer has at most; default: 16, with --chat 64")
    add_sums(verb)
    add_fields(verb)
    add_preset(verb)


def run(options: Namespace) -> None:
    from d4s.journal.session import Session
    from d4s.locate.covariance import estimate_covariance
    from d4s.methods import method_for
    from d4s.models.architectures import Anatomy
    from d4s.models.chat import ChatForm

    if options.covariance is not None:
        refuse(options, ("corpus",), "--covariance")
    _, config = configured(options, "d4s")
    model, tokenizer = loaded_model(options)
    form = ChatForm.of(tokenizer) if options.chat else None
    if options.corpus is None:
        covariance = loaded_covariance(options, model, tokenizer)
    else:
        layers = method_for("d4s", Anatomy(model), config).value("layers")
        covariance = estimate_covariance(model, tokenizer, options.corpus, layers=layers, seed=options.seed)
    session = Session(
        model,
        tokenizer,
        config,
        covariance,
        sums_on=options.sums_on,
        seed=options.seed,
        tokens=options.tokens or (64 if options.chat else 16),
        lines=options.chat,
        progress=True,
    )
    Talk(session, form, options).hold()


class Talk:
    """The lines of a session, one after another.

    form: the chat template that texts are put into; None: they are plain
    """

    def __init__(self, session: Any, form: Any, options: Namespace) -> None:
        self.session, self.form, self.json = session, form, options.json
        self.say: Callable[[str], None] = words(options)
        self.watched: dict[str, str] = {}  # text → the answer that was last shown
        self.refused = 0
        self.warned = False  # whether the last line was a quit with something unsaved
        self.on_terminal = sys.stdin.isatty()

    def hold(self) -> None:
        """Until the end of the input, or `quit`. Raises D4SError at the end of a script of which lines were refused."""
        if self.on_terminal:
            with suppress(ImportError):
                import readline  # noqa: F401  (input() then edits lines and remembers them)
            self.say("Ask the model, or edit a fact; help lists what there is.")
        if self.form is None and getattr(self.session.tokenizer, "chat_template", None):
            self.say("This model has a chat template; --chat asks in it.")
        lines = 0
        while True:
            try:
                line = self._line()
            except EOFError:
                break
            except KeyboardInterrupt as stopped:
                if isinstance(stopped, Terminated):
                    raise
                self.say("")
                continue
            lines += 1
            if not self._done(line):
                return self._end(lines)
        if self.on_terminal:
            self.say("")
        if unsaved := self.session.unsaved:
            print(f"d4s: {_changes(unsaved)} not saved, and gone", file=sys.stderr)
        return self._end(lines)

    def _end(self, lines: int) -> None:
        if self.refused and not self.on_terminal:
            raise D4SError(f"{self.refused} of {lines} lines could not be done; what was wrong stands above")

    def _line(self) -> str:
        if self.on_terminal:
            return input("> ")
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        line = line.rstrip("\r\n")
        if line.strip():
            self.say(f"> {line}")
        return line

    def _done(self, line: str) -> bool:
        """What the line asks for; whether another one may follow."""
        import torch

        warned, self.warned = self.warned, False
        before = self._state()
        try:
            command, text = read(line)
            if command in ("quit", "exit"):
                if self.session.unsaved and not warned:
                    self.warned = True
                    self.say(
                        f"{_changes(self.session.unsaved)} not saved: save PATH keeps the model; quit again ends"
                    )
                    return True
                return False
            if command:
                getattr(self, f"_{command}")(text)
        except KeyboardInterrupt as stopped:
            if isinstance(stopped, Terminated):
                raise
            self.refused += 1
            changed = self._state() != before
            self.say(f"stopped; {'what this line changed stands' if changed else 'nothing was changed'}")
        except (D4SError, OSError, torch.OutOfMemoryError) as error:
            self.refused += 1
            said = str(error)
            if isinstance(error, OSError):
                said = f"{error.filename or ''} {error.strerror or error}".strip()
            sys.stdout.flush()  # what was said before stands before it, also in one file
            print(f"d4s: {said}", file=sys.stderr, flush=True)
        return True

    def _state(self) -> tuple[int, int, int]:
        """What differs once a line has changed something."""
        standing = self.session.standing
        return len(standing.made), len(standing.undone), len(self.watched)

    def _tell(self, **record: Any) -> None:
        """For machines, a line of JSON for each thing that was done."""
        if self.json:
            print(json.dumps(record, ensure_ascii=False), flush=True)

    def _text(self, text: str) -> str:
        """As the model is asked it."""
        return text if self.form is None else self.form.asked(text)

    # The commands

    def _ask(self, text: str) -> None:
        if not text:
            raise EditError("ask: nothing to ask; write it behind, as ask: The capital of France is")
        said = self.session.ask(self._text(text))
        self.say(_indented(said))
        self._tell(asked=text, said=said)

    def _edit(self, text: str) -> None:
        plain = fact(text)
        edit = plain if self.form is None else self.form.edit(plain)
        session = self.session
        before = (session.ask(edit.text), session.probability(edit))
        is_first, begun = session.editor is None, time.perf_counter()
        if is_first and not session.made and (rule := by_rule(session.model, "d4s")):
            self.say(f"  {rule}; --set says otherwise")
        step = session.edit(edit)
        seconds = time.perf_counter() - begun
        after = (session.ask(edit.text), session.probability(edit))
        for name, value in session.chosen.items() if is_first else ():
            self.say(f"  {name}={value:g}, chosen by this edit for all that follow")
        new = edit.target_new
        for when, (said, p) in (("before", before), ("after", after)):
            self.say(_answer(when, said, new, p))
        number = len(session.made)
        self.say(f"  edit {number}, {seconds:.1f} s")
        (reached,) = step.last_probability
        if reached >= 0.5 and session.mean_probability(edit) < 0.5 * reached:
            self.say(
                f"  its target was found (p = {reached:.2f}), and did not arrive; a smaller prior_weight writes more"
            )
        changed = self._look_again()
        self._tell(
            edit=number,
            prompt=plain.text,
            target=new,
            before=before[0],
            after=after[0],
            probability_before=before[1],
            probability_after=after[1],
            seconds=round(seconds, 3),
            changed=changed,
        )

    def _edits(self, _text: str) -> None:
        session, made = self.session, self.session.made
        if not made:
            self.say("  none was made")
        for number, edit in enumerate(made, start=1):
            taken = "" if session.stands(edit) else "    (taken back)"
            self.say(f"  {number}  {self._shown(edit)} => {edit.target_new}{taken}")
        self._tell(
            edits=[
                {"prompt": self._shown(edit), "target": edit.target_new, "stands": session.stands(edit)}
                for edit in made
            ]
        )

    def _shown(self, edit: Edit) -> str:
        """Its prompt, the subject in brackets, without the chat template."""
        prompt = edit.prompt
        if self.form is not None:
            prompt = prompt.removeprefix(self.form.head).removesuffix(self.form.tail)
        return prompt.replace("{}", f"[{edit.subject}]")

    def _undo(self, text: str) -> None:
        session = self.session
        edit = session.undo(number_of(text, "undo") if text else None)
        number = session.made.index(edit) + 1
        said = session.ask(edit.text)
        self.say(f"  edit {number} is taken back")
        self.say(_answer("now", said, edit.target_new, session.probability(edit)))
        self._tell(undone=number, said=said, changed=self._look_again())

    def _watch(self, text: str) -> None:
        if text:
            self.watched[text] = said = self.session.ask(self._text(text))
            self.say(_indented(said))
            self._tell(watched=text, said=said)
            return
        if not self.watched:
            self.say("  nothing is watched; watch: TEXT does")
        for number, (one, said) in enumerate(self.watched.items(), start=1):
            self.say(f"  {number}  {one}\n       {_one_line(said)}")
        self._tell(watching=self.watched)

    def _unwatch(self, text: str) -> None:
        number = number_of(text, "unwatch")
        if not 1 <= number <= len(self.watched):
            raise EditError(f"unwatch {number}: there is no such text; watch lists them")
        gone = list(self.watched)[number - 1]
        del self.watched[gone]
        self.say(f"  no longer watched: {gone}")
        self._tell(unwatched=gone)

    def _look_again(self) -> dict[str, tuple[str, str]]:
        """Watched text → (answer before, answer now) of those whose answer has changed, which are told."""
        changed = {}
        for text, before in self.watched.items():
            if (said := self.session.ask(self._text(text))) != before:
                changed[text] = (before, said)
        self.watched |= {text: said for text, (_, said) in changed.items()}
        if self.watched:
            self.say(f"  {len(changed)} of {len(self.watched)} watched answers changed")
        for text, (before, said) in changed.items():
            self.say(f"    {text}\n      before: {_one_line(before)}\n      after:  {_one_line(said)}")
        return changed

    def _save(self, text: str) -> None:
        if not text:
            raise EditError(
                "save: no place is named; save FOLDER keeps the whole model, save FILE.safetensors a patch"
            )
        place = self.session.save(Path(text).expanduser())
        what = "patch" if place.suffix == ".safetensors" else "edited model"
        self.say(f"  {what} of {len(self.session.edits)} edits: {place}")
        self._tell(saved=str(place), edits=len(self.session.edits))

    def _help(self, _text: str) -> None:
        self.say(COMMANDS)


def read(line: str) -> tuple[str, str]:
    """(command, its text) of a line; ("", "") of an empty one. What is no command is asked.

    Raises EditError for a word, alone or with a colon, that is nearly a command.
    """
    line = line.strip()
    if not line or line.startswith("#"):
        return "", ""
    if alone := _ALONE.fullmatch(line):
        word, with_one, one = alone.groups()
        return (word or with_one).lower(), one or ""
    if named := _NAMED.fullmatch(line):
        word, text = named[1].lower(), named[2].strip()
        if word in _WITH_TEXT:
            return word, text
        _refuse_nearly(word, f"{named[1]}:", f"{named[1]}: …")
    elif one_word := _ONE_WORD.fullmatch(line):
        word, bare = one_word[1].lower(), line[0].isalpha() and not line.endswith("()")
        # A name, or "edit 2", may well be asked.
        if not bare or (word not in _NAMES and not line[0].isupper()):
            _refuse_nearly(word, line, line)
    if "=>" in line and re.match(r"edit\s", line, re.IGNORECASE):
        return "edit", line[4:].strip()
    return "ask", line


def _refuse_nearly(word: str, told: str, text: str) -> None:
    """EditError for a word that is nearly a command, or stands as one does elsewhere.

    told: as it was typed; text: what would be asked
    """
    near = difflib.get_close_matches(word, _NAMES, n=1, cutoff=LIKE_A_COMMAND)
    if near or told.startswith((":", "/")):
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise EditError(
            f"{shown(told)} is no command; {hint}write ask: {text} to ask it, help lists the commands"
        )


def fact(text: str) -> Edit:
    """The edit of PROMPT => TARGET with the subject in brackets. EditError, with what would be right, for another."""
    from d4s.edits import Edit

    right = "as in edit: The mother tongue of [Danielle Darrieux] is => English"
    prompt, arrow, target = text.rpartition("=>")
    if not arrow:
        raise EditError(f"edit: PROMPT => TARGET, {right}; there is no '=>' in {shown(text)}")
    marked = list(re.finditer(r"\[\[(.+?)\]\]", prompt)) or list(re.finditer(r"\[(.*?)\]", prompt))
    if len(marked) != 1 or not marked[0][1].strip():
        what = (
            "no subject is marked by brackets"
            if not marked
            else "the subject in brackets is empty"
            if len(marked) == 1
            else "several subjects are marked by brackets"
        )
        more = ", or in [[ ]] where the prompt has brackets of its own" if len(marked) > 1 else ""
        raise EditError(f"{what} in {shown(prompt.strip())}; put it in [ ]{more}, {right}")
    (subject,) = marked
    begin, end = prompt[: subject.start()].lstrip(), prompt[subject.end() :].rstrip()
    if "{}" in begin + end:
        raise EditError(
            f"{shown(prompt.strip())} holds '{{}}', which stands for the subject elsewhere; leave it out"
        )
    return Edit(f"{begin}{{}}{end}", subject[1], target)


def number_of(text: str, command: str) -> int:
    if not text.isdecimal():
        raise EditError(f"{command} {shown(text)}: must be a number, as {command} 2")
    return int(text)


def _changes(count: int) -> str:
    return "1 change is" if count == 1 else f"{count} changes are"


def _answer(when: str, said: str, target: str, p: float) -> str:
    """What the model says of an edit's prompt, behind the probability of the whole target."""
    return f"  {when + ':':8} p({target}) = {p:.2f}   {_one_line(said)}"


def _one_line(said: str) -> str:
    return " / ".join(line.strip() for line in said.splitlines() if line.strip()) or "(nothing)"


def _indented(said: str) -> str:
    return "\n".join(f"  {line}" for line in (said or "(nothing)").splitlines())
