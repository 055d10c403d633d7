"""One fact to be written into a model, with the prompts that show whether it took and what it disturbed."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, Literal, get_args

from d4s.edits.spacing import Target, opened, target_of
from d4s.errors import EditError, shown, unknown_name

Kind = Literal["completion", "question", "statement"]


@dataclass(frozen=True)
class Question:
    """A prompt with the answers that count as right.

    prompt:  full text, no place-holder
    answers: different texts, any of them right; the first is the one to show. Empty: none is known, so only
             a comparison with the unedited model's own answer makes sense (unaffected statements).
    kind:    what the question probes, in the dataset's terms ("multi_hop", "relation_specificity", …)
    target_prefix: what stands between prompt and answer, as in `Edit`
    Raises EditError if a field has the wrong type or is blank.
    """

    prompt: str
    answers: tuple[str, ...] = ()
    kind: str = ""
    target_prefix: str | None = None

    def __post_init__(self) -> None:
        where = f"question {shown(self.prompt)}"
        object.__setattr__(self, "target_prefix", _prefix(self.target_prefix, where))
        prompt = _text(self.prompt, "prompt", where)
        object.__setattr__(self, "prompt", opened(prompt, self.target_prefix))
        answers = (
            _text(answer, f"answers[{i}]", where).strip()
            for i, answer in enumerate(_items(self.answers, "answers", where))
        )
        object.__setattr__(self, "answers", tuple(dict.fromkeys(answers)))
        if self.kind != "":
            _text(self.kind, "kind", where)

    def target(self, text: str) -> Target:
        """An answer as it is scored after this prompt."""
        return target_of(text, self.target_prefix)

    def to_dict(self) -> dict[str, Any]:
        record: dict[str, Any] = {"prompt": self.prompt, "answers": list(self.answers), "kind": self.kind}
        return record if self.target_prefix is None else record | {"target_prefix": self.target_prefix}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Question:
        """The inverse of `to_dict`; raises EditError on a missing or unknown field."""
        return cls(**_known_fields(cls, record, "question"))


@dataclass(frozen=True)
class Edit:
    """A fact to write: after `prompt` filled with `subject` the model should say `target_new`.

    prompt:          template with exactly one '{}' where the subject stands
    subject:         as it stands in the text; the edit's key is read at its last token
    target_new:      the answer wanted, without blanks around it
    target_true:     the answer before, where the data knows it
    id:              default: a hash of prompt, subject and target_new, the same in every run
    paraphrases:     full texts whose right answer is target_new
    neighborhood:    full texts about other subjects whose right answer is target_true
    attribute:       full texts about other subjects whose right answer is target_new
    generation:      openings from which the model writes freely, for fluency and consistency
    locality:        questions whose answers must not change
    portability:     questions whose answers follow from the edit
    reference_texts: texts about target_new, compared with what the model writes
    relation:        the relation's name in the data, such as Wikidata's P103
    kind:            how the edit is scored. "completion": NLL(target_new) against NLL(target_true), the
                     CounterFact way; "question": token accuracy of target_new, the zsRE way, also for
                     open sentences without a known old answer; "statement": the prompt is a whole sentence
                     and the target 'True' or 'False'
    tags:            where the edit comes from: 'source' names the format, 'case' the record it stands in
    target_prefix:   what stands between every prompt and its target, as "" in 'costs ${}', "\\n" or "    "; None:
                     one space, but none where the prompt ends in a line break, a tab, an opening bracket or a
                     currency sign, none before % or closing punctuation, and none between scripts that are
                     written without (`d4s.edits.spacing.joint`). Questions carry their own.
    chat:            what of a chat template stands in `prompt` before the user's text, where the edit is asked in one
                     (`d4s.in_chat`): contexts are put behind it. None: the prompt is plain text

    Lists become tuples. Texts are kept in Unicode's composed form (NFC), so that two spellings of one name are one.
    Spaces at the end of prompts that the target's own would double are cut; line breaks and tabs stay.
    Raises EditError if a field is missing, blank, of the wrong type, or contradicts another.
    """

    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None
    id: str = ""
    paraphrases: tuple[str, ...] = ()
    neighborhood: tuple[str, ...] = ()
    attribute: tuple[str, ...] = ()
    generation: tuple[str, ...] = ()
    locality: tuple[Question, ...] = ()
    portability: tuple[Question, ...] = ()
    reference_texts: tuple[str, ...] = ()
    relation: str | None = None
    kind: Kind = "completion"
    tags: Mapping[str, str] = field(default_factory=dict, hash=False)
    target_prefix: str | None = None
    chat: str | None = None

    def __post_init__(self) -> None:
        where = f"edit of {shown(self.subject)}"

        def keep(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        keep("target_prefix", _prefix(self.target_prefix, where))
        keep("subject", _text(self.subject, "subject", where).strip())
        if "{}" in self.subject:
            raise EditError(
                f"{where}: 'subject' contains '{{}}', which only 'prompt' may; write the subject's name"
            )
        keep("prompt", _template(self.prompt, where, self.target_prefix))
        keep("target_new", _text(self.target_new, "target_new", where).strip())
        if self.target_true is not None:
            keep("target_true", _text(self.target_true, "target_true", where).strip())
        if self.relation is not None:
            _text(self.relation, "relation", where)
        for name in ("paraphrases", "neighborhood", "attribute", "generation"):
            keep(name, _full_texts(getattr(self, name), name, where, self.target_prefix))
        references = _items(self.reference_texts, "reference_texts", where)
        keep(
            "reference_texts",
            tuple(_text(t, f"reference_texts[{i}]", where) for i, t in enumerate(references)),
        )
        for name in ("locality", "portability"):
            questions = _items(getattr(self, name), name, where)
            for i, question in enumerate(questions):
                if not isinstance(question, Question):
                    raise EditError(
                        f"{where}: {name}[{i}] must be a Question(prompt, answers), "
                        f"not {type(question).__name__}"
                    )
            keep(name, questions)
        if not isinstance(self.kind, str):
            raise EditError(f"{where}: 'kind' must be text, not {type(self.kind).__name__}")
        if self.kind not in get_args(Kind):
            raise EditError(f"{where}: {unknown_name('kind', self.kind, get_args(Kind))}")
        if self.kind != "question" and self.target_new == self.target_true:
            raise EditError(
                f"{where}: 'target_new' and 'target_true' are both {shown(self.target_new)}; "
                f"a {self.kind} edit is scored by comparing them, so they must differ"
            )
        if self.chat is not None:
            if not isinstance(self.chat, str):
                raise EditError(f"{where}: 'chat' must be text or None, not {type(self.chat).__name__}")
            keep("chat", unicodedata.normalize("NFC", _encodable(self.chat, "chat", where)))
            if not self.prompt.partition("{}")[0].startswith(self.chat):
                raise EditError(
                    f"{where}: 'prompt' does not begin with 'chat', {shown(self.chat)}, before its '{{}}'; "
                    "d4s.in_chat makes both"
                )
        keep("tags", _tags(self.tags, where))
        if not isinstance(self.id, str):
            raise EditError(f"{where}: 'id' must be text, not {type(self.id).__name__}")
        _encodable(self.id, "id", where)
        own = () if self.target_prefix is None else (self.target_prefix,)
        keep("id", self.id.strip() or _content_hash(self.prompt, self.subject, self.target_new, *own))

    @property
    def text(self) -> str:
        """The prompt with the subject in its place."""
        return self.prompt.replace("{}", self.subject)

    @property
    def place(self) -> tuple[str, int]:
        """What decides the edit's key: its text, and where in it the subject ends."""
        return self.text, self.prompt.find("{}") + len(self.subject)

    def target(self, text: str) -> Target:
        """A target as it is scored after one of this edit's prompts."""
        return target_of(text, self.target_prefix)

    def to_dict(self) -> dict[str, Any]:
        """A dict of JSON values that `from_dict` turns back into an equal edit; empty fields are left out."""
        record: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if value is None or value == () or value == {}:
                continue
            if isinstance(value, tuple):
                value = [v.to_dict() if isinstance(v, Question) else v for v in value]
            record[item.name] = dict(value) if item.name == "tags" else value
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Edit:
        """The inverse of `to_dict`. A field that is null counts as left out; a whole number as id is text.

        Raises EditError on a missing or unknown field, and whatever the constructor refuses.
        """
        values = {k: v for k, v in _known_fields(cls, record, "edit").items() if v is not None}
        if isinstance(values.get("id"), int) and not isinstance(values["id"], bool):
            values["id"] = str(values["id"])
        for name in ("locality", "portability"):
            if isinstance(values.get(name), (list, tuple)):
                values[name] = tuple(
                    Question.from_dict(v) if isinstance(v, Mapping) else v for v in values[name]
                )
        return cls(**values)


def check_sequence(edits: Iterable[Edit]) -> None:
    """Refuse a sequence in which two edits share an id, or that holds no edit at all.

    The same fact edited again later is an update, and fine. Raises EditError naming both edits.
    """
    _distinct(edits, lambda edit: edit.id, _same_id)


AGAIN = "again"  # the tag of an edit that makes another one's fact once more: the id of that


def made_again(edit: Edit, number: int) -> Edit:
    """The same fact as an edit of its own, which a later pass over a sequence makes. number: of the pass, 2 or more"""
    return replace(edit, id=f"{edit.id}~{number}", tags={**edit.tags, AGAIN: edit.id})


def pass_of(edit: Edit) -> int:
    """The pass that makes it: 1, or of what `made_again` gives its number."""
    return pass_told(edit.id, edit.tags.get(AGAIN))


def pass_told(edit_id: str, again: str | None) -> int:
    """By an edit's id and its tag `AGAIN`, where these are all that is left of it."""
    first, _, number = edit_id.rpartition("~")
    return int(number) if again == first and number.isdecimal() else 1


def check_batch(edits: Iterable[Edit]) -> None:
    """Refuse edits that cannot be made in one step: the same id or edit twice, or two answers to one prompt.

    The same edit may stand in a batch twice if its `tags['case']` differ: multi-hop cases of one file share
    facts. Raises EditError naming both edits.
    """
    edits = tuple(edits)
    check_sequence(edits)
    _distinct(edits, lambda edit: (edit.text, edit.target_new, edit.tags.get("case")), _same_edit)
    answers: dict[str, Edit] = {}
    for edit in edits:
        first = answers.setdefault(edit.text, edit)
        if first.target_new != edit.target_new:
            raise EditError(
                f"edits {first.id!r} and {edit.id!r} contradict each other in one batch: {edit.text!r} is to "
                f"become both {first.target_new!r} and {edit.target_new!r}; make them in different steps "
                "(the later one wins), or leave one out (d4s.edits.without_contradictions)"
            )


def without_contradictions(edits: Iterable[Edit]) -> tuple[list[Edit], list[Edit]]:
    """Split edits into those that can share one batch and those that contradict an earlier one."""
    kept: list[Edit] = []
    left_out: list[Edit] = []
    answers: dict[str, str] = {}
    for edit in edits:
        agrees = answers.setdefault(edit.text, edit.target_new) == edit.target_new
        (kept if agrees else left_out).append(edit)
    return kept, left_out


def _distinct(
    edits: Iterable[Edit], key: Callable[[Edit], object], message: Callable[[Edit, int, int], str]
) -> None:
    seen: dict[object, int] = {}
    count = 0
    for count, edit in enumerate(edits, start=1):
        if not isinstance(edit, Edit):
            raise EditError(f"edit number {count} is a {type(edit).__name__}; make it with d4s.Edit(...)")
        first = seen.setdefault(key(edit), count)
        if first != count:
            raise EditError(message(edit, first, count))
    if not count:
        raise EditError("there are no edits; at least one is needed")


def _same_id(edit: Edit, first: int, second: int) -> str:
    return (
        f"edits number {first} and {second} both have the id {edit.id!r} "
        f"({edit.text!r} -> {edit.target_new!r}); an id names one edit only"
    )


def _same_edit(edit: Edit, first: int, second: int) -> str:
    return (
        f"edits number {first} and {second} of one batch are the same: {edit.text!r} -> {edit.target_new!r} "
        f"(the second has the id {edit.id!r}); leave one out"
    )


def _content_hash(*texts: str) -> str:
    return hashlib.sha256("\x1f".join(texts).encode()).hexdigest()[:12]


def _text(value: object, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise EditError(f"{where}: {name!r} must be text, not {type(value).__name__}")
    if not value or value.isspace():
        raise EditError(f"{where}: {name!r} is empty; write its text")
    return unicodedata.normalize("NFC", _encodable(value, name, where))


def _encodable(value: str, name: str, where: str) -> str:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise EditError(
                f"{where}: {name!r} holds half of a surrogate pair at character {error.start}; must be text"
            ) from None
    return value


def _prefix(value: object, where: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise EditError(f"{where}: 'target_prefix' must be text or None, not {type(value).__name__}")
    return unicodedata.normalize("NFC", _encodable(value, "target_prefix", where))


def _items(value: object, name: str, where: str) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise EditError(f"{where}: {name!r} must be a list, not {type(value).__name__}")
    return tuple(value)


def _full_texts(value: object, name: str, where: str, target_prefix: str | None) -> tuple[str, ...]:
    texts = tuple(
        opened(_text(t, f"{name}[{i}]", where), target_prefix)
        for i, t in enumerate(_items(value, name, where))
    )
    for i, text in enumerate(texts):
        if "{}" in text:
            raise EditError(f"{where}: {name}[{i}] is {shown(text)}; write the full text, without '{{}}'")
    return texts


def _template(value: object, where: str, target_prefix: str | None) -> str:
    prompt = opened(_text(value, "prompt", where), target_prefix)
    count = prompt.count("{}")
    if count == 0:
        raise EditError(
            f"{where}: 'prompt' has no '{{}}' for the subject: {shown(prompt)}; "
            "write '{}' where the subject stands, as in 'The mother tongue of {} is'"
        )
    if count > 1:
        raise EditError(f"{where}: 'prompt' must have one '{{}}', not {count}: {shown(prompt)}")
    return prompt


def _tags(value: object, where: str) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise EditError(f"{where}: 'tags' must map names to texts, not be a {type(value).__name__}")
    for name, text in value.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise EditError(f"{where}: tags[{shown(name)}] must be text, not {type(text).__name__}")
        _encodable(name, "tags", where)
        _encodable(text, f"tags[{shown(name)}]", where)
    return dict(value)


def _known_fields(cls: type, record: Mapping[str, Any], what: str) -> dict[str, Any]:
    known = {item.name: item for item in fields(cls)}
    for name in record:
        if name not in known:
            raise EditError(
                unknown_name(
                    f"field of an {what}" if what == "edit" else f"field of a {what}", str(name), known
                )
            )
    for name, item in known.items():
        required = item.default is MISSING and item.default_factory is MISSING
        if required and record.get(name) is None:
            raise EditError(f"the {what} has no field {name!r}, which it needs")
    return dict(record)
