"""CounterFact's true facts as training sentences for the embedded model.

A record holds one fact to be edited and twenty prompts about other subjects of which its old or new
object is true. Every fact is asked in all templates that its relation has anywhere in the records, so
that a paraphrase is a sentence the model has seen with other subjects, not a sentence it learnt by heart.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LONGEST_PREFIX = 60  # characters


@dataclass(frozen=True)
class Sentence:
    """`text` = prefix + template filled with the subject; the model is to continue with ' ' + object."""

    text: str
    object: str
    subject_start: int  # character offsets of the subject in text; both 0 where the subject is not known
    subject_end: int


@dataclass(frozen=True)
class Facts:
    sentences: tuple[Sentence, ...]  # without prefix, one a (template, subject, object)
    paraphrases: tuple[Sentence, ...]  # CounterFact's own paraphrases, with their prefixes
    prefixes: tuple[str, ...]  # unrelated sentences that CounterFact puts before its paraphrases
    templates: tuple[str, ...]
    objects: tuple[str, ...]
    dropped: int  # prompts that contradict an earlier one


def read_records(path: Path) -> list[dict[str, Any]]:
    """CounterFact records, original schema."""
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def _matcher(template: str) -> re.Pattern[str]:
    before, after = template.split("{}")
    return re.compile(re.escape(before) + r"(?P<subject>.+)" + re.escape(after) + r"\Z")


def _sentence(template: str, subject: str, obj: str) -> Sentence:
    start = template.index("{}")
    return Sentence(template.replace("{}", subject), obj, start, start + len(subject))


def facts_of(records: list[dict[str, Any]]) -> Facts:
    """records: CounterFact, original schema. Rewrites win over neighbours where two prompts disagree."""
    templates: dict[str, dict[str, re.Pattern[str]]] = defaultdict(dict)
    for record in records:
        rewrite = record["requested_rewrite"]
        templates[rewrite["relation_id"]].setdefault(rewrite["prompt"], _matcher(rewrite["prompt"]))

    known: dict[tuple[str, str], str] = {}  # (relation, subject) -> object
    answers: dict[str, str] = {}  # filled prompt -> object
    verbatim: dict[str, str] = {}
    dropped = 0

    def learn(relation: str, subject: str, obj: str) -> bool:
        return known.setdefault((relation, subject), obj) == obj

    for record in records:
        rewrite = record["requested_rewrite"]
        if not learn(rewrite["relation_id"], rewrite["subject"], rewrite["target_true"]["str"]):
            dropped += 1
    for record in records:
        rewrite = record["requested_rewrite"]
        relation = rewrite["relation_id"]
        for prompts, obj in (
            (record["neighborhood_prompts"], rewrite["target_true"]["str"]),
            (record["attribute_prompts"], rewrite["target_new"]["str"]),
        ):
            for prompt in prompts:
                # The longest template wins: "{}, in" also matches what "{}, located in" says better.
                matches = [(t, m) for t, p in templates[relation].items() if (m := p.match(prompt))]
                if not matches:  # a template no rewrite has: learnt word for word
                    verbatim.setdefault(prompt, obj)
                    continue
                _, match = max(matches, key=lambda pair: len(pair[0]))
                dropped += not learn(relation, match["subject"], obj)

    sentences: list[Sentence] = []
    for (relation, subject), obj in known.items():
        for template in templates[relation]:
            sentence = _sentence(template, subject, obj)
            if answers.setdefault(sentence.text, obj) == obj:
                sentences.append(sentence)
    for prompt, obj in verbatim.items():
        if answers.setdefault(prompt, obj) == obj:
            sentences.append(Sentence(prompt, obj, 0, 0))

    paraphrases: list[Sentence] = []
    prefixes: dict[str, None] = {}
    for record in records:
        rewrite = record["requested_rewrite"]
        subject, obj = rewrite["subject"], rewrite["target_true"]["str"]
        if known[rewrite["relation_id"], subject] != obj:
            continue
        for prompt in record["paraphrase_prompts"]:
            at = prompt.rfind(subject)
            if at < 0:
                continue
            paraphrases.append(Sentence(prompt, obj, at, at + len(subject)))
            head = prompt[:at].rpartition(". ")[0]
            if 0 < len(head) <= LONGEST_PREFIX:
                prefixes[head.strip() + ". "] = None

    return Facts(
        sentences=tuple(sentences),
        paraphrases=tuple(paraphrases),
        prefixes=tuple(prefixes),
        templates=tuple(t for group in templates.values() for t in group),
        objects=tuple(dict.fromkeys(known.values())),
        dropped=dropped,
    )
