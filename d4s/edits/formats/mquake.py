"""MQuAKE (arXiv 2305.14795): cases of one or more edits whose joint consequence is asked for.

The multi-hop questions hold only when all edits of the case are made, so they stand on its last edit; all
its edits share `tags['case']`. A case that `limit` cuts off therefore asks no multi-hop question.
"""

from __future__ import annotations

from d4s.edits import Edit, Question
from d4s.edits.formats.fields import (
    FieldError,
    Fields,
    identifier,
    objects,
    optional_text,
    target,
    text,
    texts,
)

LOOKS_FOR = "'requested_rewrite' (a list of objects), 'questions', 'new_answer'"


def recognises(record: Fields) -> bool:
    return isinstance(record.get("requested_rewrite"), list) and "questions" in record


def edits_of(record: Fields) -> list[Edit]:
    """The case's edits in its order; each edit's own question is its paraphrase, and the passage in which AKEW
    (arXiv 2402.18909) tells it a reference text.

    On the last: "multi_hop" questions, and one "single_hop" question for every step of the changed chain.
    """
    case = identifier(record, "case_id")
    rewrites = objects(record, "requested_rewrite")
    if not rewrites:
        raise FieldError("field 'requested_rewrite' is empty")
    answers = (target(record, "new_answer"), *texts(record, "new_answer_alias"))
    consequences = [Question(prompt, answers, "multi_hop") for prompt in texts(record, "questions")]
    if record.get("new_single_hops") is not None:
        for hop in objects(record, "new_single_hops"):
            answers = (target(hop, "answer"), *texts(hop, "answer_alias"))
            consequences.append(Question(text(hop, "question"), answers, "single_hop"))
    edits = []
    for number, rewrite in enumerate(rewrites, start=1):
        question = optional_text(rewrite, "question")
        passage = optional_text(rewrite, "fact_new_uns")
        edits.append(
            Edit(
                prompt=text(rewrite, "prompt"),
                subject=text(rewrite, "subject"),
                target_new=target(rewrite, "target_new"),
                target_true=target(rewrite, "target_true"),
                id=f"mquake-{case}-{number}",
                paraphrases=() if question is None else (question,),
                portability=tuple(consequences) if number == len(rewrites) else (),
                reference_texts=() if passage is None else (passage,),
                relation=optional_text(rewrite, "relation_id"),
                tags={"case": case},
            )
        )
    return edits
