"""A table or figure of the D4S paper (arXiv 2410.23843) on any model.

Each gives a table, a figure with its data, and a paragraph that says by a stated criterion whether the paper's
claim holds on this model.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from d4s.edits import Edit
from d4s.edits.spacing import continuation
from d4s.errors import ConfigError, unknown_name
from d4s.figures.tables import frame_lines
from d4s.files import write_table, write_text
from d4s.locate.covariance import Covariance
from d4s.methods.published import model_key
from d4s.models.architectures import Anatomy
from d4s.models.causal_lm import CausalLM
from d4s.study.paper.data_figures import figure2, figure3
from d4s.study.paper.model_figures import figure5, figure6, figure7, figure8
from d4s.study.paper.protocols import PROTOCOLS
from d4s.study.paper.setting import Judged, Reproduction, Setting
from d4s.study.paper.tables import table2_or_3, table4
from d4s.study.retained import is_askable, untouched

MOST_FACTS = 200  # asked for what a model retains, where no number is given

# Name → what runs it; the names are those of `PROTOCOLS`.
RUNS: dict[str, Callable[[Setting], Judged]] = {
    "table2": table2_or_3,
    "table3": table2_or_3,
    "table4": table4,
    "fig2": figure2,
    "fig3": figure3,
    "fig5": figure5,
    "fig6": figure6,
    "fig7": figure7,
    "fig8": figure8,
}


def reproduce(
    name: str,
    model: CausalLM,
    tokenizer: Any,
    edits: Mapping[str, Sequence[Edit]] | None = None,
    *,
    out: str | os.PathLike[str],
    counts: Sequence[int] | None = None,
    methods: Sequence[str] | None = None,
    facts: int = MOST_FACTS,
    texts: Sequence[str] | None = None,
    neighborhood_limit: int | None = None,
    covariance: Covariance | None = None,
    tasks: Sequence[str] | None = None,
    task_folder: str | os.PathLike[str] | None = None,
    task_limit: int | None = None,
    trust_task_code: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Reproduction:
    """A table or figure of the paper: table2, table3, table4, fig2, fig3, fig5, fig6, fig7, fig8.

    edits: name of the data set → its edits, in the order they are made; None: those of the embedded model, in
        the form that the protocol asks for
    out: folder for <name>.png and .csv (figure and data), <name>-table.csv, <name>.md (table and statement) and
        <name>-details
    counts: numbers of edits at which is scored, one edit a step; the last one is how many are made
    facts: asked unedited at most, of those behind the edits that are made (table4, fig2, fig3, fig6)
    texts: whose perplexity is taken as well (`study.retained.paragraphs` of a file); None: fig2 and fig3 take the facts
        as sentences, table4 and fig6 none
    neighborhood_limit: neighbourhood prompts an edit that are scored on the way; None: as the protocol has it, all for
        table2 and table3, 2 for others; fig2 and fig3 score none
    tasks: downstream tasks as lm-evaluation-harness spells them (table4, fig6); (): facts that are not edited, as
        multiple choice. None: the paper's for table4, but the facts for the embedded model and for fig6
    task_folder, task_limit, trust_task_code: `include_path`, `limit` and `trust_task_code` of `run_tasks`

    The same call with the same `out` goes on after an interruption, within a sequence too.
    Raises ConfigError for an unknown name, data that are too few for the counts, or where a model other than
    the embedded one comes without edits.
    """
    if name not in PROTOCOLS:
        raise ConfigError(unknown_name("table or figure", name, PROTOCOLS))
    protocol = PROTOCOLS[name]
    embedded = model_key(Anatomy(model)) == "embedded"
    if edits is None and not embedded:
        raise ConfigError(f"{name} needs edits: {protocol.data} (the embedded model has its own)")
    sizes = tuple(sorted(set(counts))) if counts else protocol.small if embedded else protocol.counts
    if sizes[0] < 1:
        raise ConfigError(f"counts={list(sizes)}: must be numbers of edits from 1 on")
    note = ""
    if edits is None:
        data, note = _embedded_data(name, seed)
    else:
        data = {label: list(group) for label, group in edits.items()}
    if tasks is None:
        tasks = () if embedded else protocol.tasks
    for label, group in data.items():
        if len(group) < sizes[-1]:
            raise ConfigError(
                f"{label} has {len(group)} edits, the counts go up to {sizes[-1]}; give smaller counts"
            )
    asks_facts = protocol.retained and not (tasks and name in ("table4", "fig6"))
    asked = _facts(data, sizes[-1], facts, seed) if asks_facts else []
    if covariance is None and embedded:
        from d4s.embedded.statistics import demo_covariance

        covariance = demo_covariance(
            model, tokenizer, layers=tuple(range(len(Anatomy(model)))), progress=progress
        )
    setting = Setting(
        name=name,
        model=model,
        tokenizer=tokenizer,
        data=data,
        facts=asked,
        texts=texts,
        neighborhood_limit=neighborhood_limit,
        counts=sizes,
        methods=tuple(methods or protocol.methods),
        covariance=covariance,
        tasks=tuple(tasks),
        task_folder=task_folder,
        task_limit=task_limit,
        trust_task_code=trust_task_code,
        seed=seed,
        progress=progress,
        out=Path(out),
    )
    setting.out.mkdir(parents=True, exist_ok=True)
    table, verdict = RUNS[name](setting)
    found = Reproduction(name, table, verdict, _in_words(setting, note))
    write_table(table, setting.out / f"{name}-table.csv")
    text = f"# {name}: {protocol.about}\n\n" + "\n".join(f"    {line}" for line in frame_lines(table))
    write_text(f"{text}\n\n{found.statement}\n", setting.out / f"{name}.md")
    return found


def _embedded_data(name: str, seed: int) -> tuple[dict[str, list[Edit]], str]:
    """The embedded model's edits in the form of the protocol's data, and what is not the paper's about them."""
    from d4s.embedded import load_demo_edits

    edits = load_demo_edits()
    Random(seed).shuffle(edits)
    if name == "table2":
        note = "In place of zsRE: CounterFact's sentences scored as questions, by target tokens; specificity is the "
        note += "share of neighbours' answer tokens that stay the unedited model's."
        return {"questions": [dataclasses.replace(edit, kind="question") for edit in edits]}, note
    if name == "fig2":
        note = "In place of the paper's data sets: the same facts as sentences to complete, and as statements that "
        note += "are to be judged the other way round, as 20Q asks."
        return {"completions": edits, "statements": statements_of(edits)}, note
    note = ""
    if name == "table3":
        note = "MQuAKE is left out: the embedded model knows none of its second hops."
    return {"CounterFact": edits}, note


def statements_of(edits: Sequence[Edit]) -> list[Edit]:
    """Facts as statements: in turn the old answer's sentence, to become False, and the new one's, to become True."""
    made = []
    for i, edit in enumerate(edit for edit in edits if edit.target_true is not None):
        new, old = ("False", "True") if i % 2 == 0 else ("True", "False")
        claimed = (edit.target_true or "") if i % 2 == 0 else edit.target_new
        made.append(
            Edit(
                prompt=f"{edit.prompt}{continuation(edit.prompt, edit.target(claimed))}.",
                subject=edit.subject,
                target_new=new,
                target_true=old,
                id=f"{edit.id}/statement",
                paraphrases=tuple(
                    f"{text}{continuation(text, edit.target(claimed))}." for text in edit.paraphrases
                ),
                relation=edit.relation,
                kind="statement",
                tags={**edit.tags, "of": edit.id},
            )
        )
    return made


def _facts(data: Mapping[str, list[Edit]], most: int, count: int, seed: int) -> list[Edit]:
    """Up to `count` facts whose old answer is known and which no edit touches: what stands behind the last one that is
    made."""
    made = [edit for group in data.values() for edit in group[:most]]
    spare = [edit for group in data.values() for edit in group[most:]]
    known = [edit for edit in spare if is_askable(edit)]
    facts = untouched(known, made)
    if count < 2:
        raise ConfigError(f"facts={count}: two or more must be asked, to draw wrong answers from")
    if len(facts) < 2:
        raise ConfigError(
            f"behind the first {most} edits there are {len(facts)} facts with a target_true to be asked unedited; "
            "give more edits, smaller counts, or downstream tasks"
        )
    return Random(seed).sample(facts, min(count, len(facts)))


def _in_words(setting: Setting, note: str) -> str:
    parameters = sum(p.numel() for p in setting.model.parameters())
    model = getattr(setting.model.config, "_name_or_path", "") or setting.model.config.model_type
    if model_key(Anatomy(setting.model)) == "embedded":
        model = "the embedded model"
    asked = f" {len(setting.facts)} facts are asked that no edit touches." if setting.facts else ""
    words = (
        f"Setting: {Path(str(model)).name}, {parameters / 1e6:.1f} M parameters; {setting.most} edits of "
        f"{' and '.join(setting.data)}, one a step, scored after {', '.join(map(str, setting.counts))}; seed "
        f"{setting.seed}.{asked}"
    )
    return f"{words} {note}".strip()
