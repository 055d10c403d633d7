"""What an edit does to the other facts of its own subject, on a real model.

python -m benchmarks.real.relations smollm2 counterfact.json --covariance c.safetensors --out relations
    [--count 100] [--skip 1000] [--batch 1] [--methods d4s-long memit-seq]

CounterFact's neighbours are other subjects, and its paraphrases the same relation, so that neither tells whether an
edit of where someone was born also changes what he is said to have worked as. Here each edited subject is asked three
prompts of other relations of its kind (a person, a place, a work or a company). `other_relations_said` is the share of
them to which the model's first word is the edit's target; `other_relations_kept`, that at which it is the unedited
model's. Cost, SmolLM2-135M: 10 seconds a point and 100 edits, beside those of `benchmarks.real.comparison`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import torch

import d4s
from benchmarks.real.setting import SEQUENCES, split
from d4s.edits import Edit
from d4s.measure.columns import Column
from d4s.models.prompts import prompt_and_target_ids, text_ids

PERSON = {
    "P103": "The mother tongue of {} is",
    "P19": "{} was born in the city of",
    "P20": "{} died in the city of",
    "P27": "{} is a citizen of",
    "P101": "The field of work of {} is",
    "P106": "The profession of {} is",
    "P108": "{} is employed by",
    "P140": "The religion of {} is",
}
PLACE = {
    "P17": "{} is located in the country of",
    "P30": "{} belongs to the continent of",
    "P36": "The capital of {} is",
    "P37": "In {}, the official language is",
    "P138": "{} was named after",
}
WORK = {
    "P127": "{} is owned by",
    "P159": "The headquarters of {} are in",
    "P178": "{} was developed by",
    "P364": "The original language of {} is",
    "P449": "{} premiered on",
    "P495": "{} was created in the country of",
    "P740": "{} was founded in",
}
# Relations of CounterFact that are asked of a person and of a place; all others are of a work or a company.
OF_PERSONS = {*PERSON, "P39", "P136", "P413", "P463", "P641", "P937", "P1303", "P1412"}
OF_PLACES = {*PLACE, "P131", "P190", "P276"}
ASKED = 3  # prompts a subject


def other_prompts(edit: Edit, seed: int = 0) -> list[str]:
    """Prompts about the edit's subject that ask for another of its relations."""
    kind = PERSON if edit.relation in OF_PERSONS else PLACE if edit.relation in OF_PLACES else WORK
    others = [prompt for relation, prompt in kind.items() if relation != edit.relation]
    chosen = Random(f"{seed}/{edit.id}").sample(others, ASKED)
    return [prompt.replace("{}", edit.subject) for prompt in chosen]


class OtherRelations:
    """What is said of the edited subjects where another relation is asked: a `measure` of a comparison.

    It is made while the model is unedited. The edits that it asks about are all those that are to be made, so that
    before the last point some of them have not been made yet.
    """

    columns: ClassVar[Mapping[str, Column]] = {
        "other_relations_said": Column(
            "other_relations_said", "share", "down", "an edit's target, asked for another"
        ),
        "other_relations_kept": Column(
            "other_relations_kept", "share", "up", "answers of other relations as they were"
        ),
    }

    def __init__(self, model: Any, tokenizer: Any, edits: Sequence[Edit], seed: int = 0) -> None:
        self.model = model
        self.prompts: list[Sequence[int]] = []
        self.targets: list[int] = []
        for edit in edits:
            first = prompt_and_target_ids(tokenizer, edit.text, edit.target(edit.target_new))[1][0]
            asked = text_ids(tokenizer, other_prompts(edit, seed))
            self.prompts += asked
            self.targets += [first] * len(asked)
        self.before = self._answers()

    def __call__(self) -> dict[str, float]:
        now = self._answers()
        pairs = {"said": self.targets, "kept": self.before}
        return {
            f"other_relations_{name}": sum(a == b for a, b in zip(now, wanted, strict=True)) / len(now)
            for name, wanted in pairs.items()
        }

    @torch.no_grad()
    def _answers(self) -> list[int]:
        device = self.model.get_input_embeddings().weight.device
        ids = [torch.tensor([list(prompt)], device=device) for prompt in self.prompts]
        return [int(self.model(input_ids=one).logits[0, -1].argmax()) for one in ids]


def measured(
    model: Any,
    tokenizer: Any,
    made: Sequence[Edit],
    methods: Mapping[str, Mapping[str, Any]],
    seed: int = 0,
    **named: Any,
) -> d4s.Comparison:
    """`d4s.compare`, with what else is said of the subjects. named: its other arguments"""
    return d4s.compare(
        model,
        tokenizer,
        made,
        methods,
        measure=OtherRelations(model, tokenizer, made, seed),
        seeds=seed,
        **named,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("edits", type=Path, help="CounterFact, original or flat")
    parser.add_argument("--covariance", type=Path, required=True)
    parser.add_argument("--targets", type=Path, help="of an earlier run on the same edits and model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument(
        "--skip", type=int, default=1000, help="edits of the order that others are measured on"
    )
    parser.add_argument("--neighbors", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1, help="edits a step")
    parser.add_argument("--methods", nargs="+", default=["d4s", "d4s-long"], choices=SEQUENCES)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    model, tokenizer = d4s.load_model(options.model)
    edits = d4s.load_edits(options.edits)
    made, _ = split(edits, options.count, options.neighbors, options.seed, skip=options.skip)
    found = measured(
        model,
        tokenizer,
        made,
        {label: SEQUENCES[label] for label in options.methods},
        options.seed,
        covariance=options.covariance,
        targets=options.targets,
        batch_size=options.batch,
        out=options.out,
    )
    found.save(options.out)
    print(found.summary())


if __name__ == "__main__":
    main()
