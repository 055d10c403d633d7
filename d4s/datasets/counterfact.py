"""CounterFact (arXiv 2202.05262): false facts, scored by the old answer's likelihood against the new one's.

The original schema carries two paraphrases and ten neighbours a record; the flat one, used by later
benchmarks, one of each and prompts with the subject filled in.
"""

from __future__ import annotations

from collections.abc import Mapping

from d4s.datasets.fields import Fields, fetch, optional_text, split_subject, text, texts
from d4s.edits import Edit, Question

LOOKS_FOR = "'requested_rewrite' (an object with 'prompt', 'subject', 'target_new', 'target_true')"
FLAT_LOOKS_FOR = "'prompt', 'subject', 'target_new', 'ground_truth' (texts, the subject filled in)"


def recognises(record: Fields) -> bool:
    return isinstance(record.get("requested_rewrite"), Mapping)


def is_flat(record: Fields) -> bool:
    return all(
        isinstance(record.get(name), str) for name in ("prompt", "subject", "target_new", "ground_truth")
    )


def edits_of(record: Fields) -> list[Edit]:
    """One edit. The 'portability' question and 'alternative_subject', which some copies add, become
    portability questions of the kinds "reasoning" and "subject_aliasing"."""
    rewrite = fetch(record, "requested_rewrite")
    prompt = text(record, "requested_rewrite.prompt")
    target_new = text(record, "requested_rewrite.target_new.str")
    portability = []
    if record.get("portability"):
        portability.append(
            Question(
                text(record, "portability.New Question"),
                (text(record, "portability.New Answer"),),
                "reasoning",
            )
        )
    alias = optional_text(record, "alternative_subject")
    if alias is not None:
        portability.append(Question(prompt.replace("{}", alias), (target_new,), "subject_aliasing"))
    case = str(fetch(record, "case_id"))
    return [
        Edit(
            prompt=prompt,
            subject=text(record, "requested_rewrite.subject"),
            target_new=target_new,
            target_true=text(record, "requested_rewrite.target_true.str"),
            id=f"counterfact-{case}",
            paraphrases=texts(record, "paraphrase_prompts"),
            neighborhood=texts(record, "neighborhood_prompts"),
            attribute=texts(record, "attribute_prompts"),
            generation=texts(record, "generation_prompts"),
            portability=tuple(portability),
            relation=optional_text(rewrite, "relation_id"),
            tags={"case": case},
        )
    ]


def edits_of_flat(record: Fields) -> list[Edit]:
    """One edit. The locality prompt is a neighbour if its answer is the edit's old one, else a question."""
    prompt, subject = split_subject(text(record, "prompt"), text(record, "subject"), "prompt")
    target_true = text(record, "ground_truth")
    paraphrase = optional_text(record, "rephrase_prompt")
    neighbour = optional_text(record, "locality_prompt")
    neighbour_answer = optional_text(record, "locality_ground_truth") or target_true
    is_neighbour = neighbour is not None and neighbour_answer.strip() == target_true.strip()
    case = record.get("case_id")
    return [
        Edit(
            prompt=prompt,
            subject=subject,
            target_new=text(record, "target_new"),
            target_true=target_true,
            id="" if case is None else f"counterfact-{case}",
            paraphrases=() if paraphrase is None else (paraphrase,),
            neighborhood=(neighbour,) if neighbour is not None and is_neighbour else (),
            locality=()
            if neighbour is None or is_neighbour
            else (Question(neighbour, (neighbour_answer,), "neighborhood"),),
            tags={} if case is None else {"case": str(case)},
        )
    ]
