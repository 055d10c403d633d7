"""Task files for lm-evaluation-harness over data on disk, so that downstream tasks run without a network.

A local task is the harness's own task of that name (its prompts, examples and metrics come from the installed
harness by `include`) with its data replaced by local files, rewritten into the fields the task reads.
"""

from __future__ import annotations

import bz2
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from d4s.edits import Edit
from d4s.edits.formats import load_edits
from d4s.edits.formats.fields import FieldError, fetch, text, texts
from d4s.edits.formats.files import read_records
from d4s.errors import ConfigError, DataError
from d4s.files import read_bytes, write_text
from d4s.measure.downstream import require_harness

Row = dict[str, Any]

GSM8K_EXAMPLES = 5  # in the harness's prompt


def write_local_tasks(
    data_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    questions: int | None = None,
    seed: int = 0,
) -> tuple[str, ...]:
    """Writes a task for each of the files there are, and returns the names, for `run_tasks(include_path=out_dir)`.

    data_dir, each file optional:
        arc_challenge.jsonl  query ("Question: …"), choices, gold (number of the right choice)
        hellaswag_val.txt.bz2
                             six lines a question: "activity: context", number of the right ending, four endings
        winogrande.jsonl     context_options (two texts that differ in their last words), continuation, gold
        gsm8k.jsonl          question, answer ("… #### 18")
        truthfulqa.csv       Question, Best Answer, Correct Answers, Incorrect Answers (separated by ';')
        mmlu/test/<subject>_test.csv, mmlu/dev/<subject>_dev.csv
                             question, choice0 … choice3, answer (number of the right choice)
    out_dir: holds task files, rewritten data and what the harness caches of them; it names the installed
        harness by its place, so make it anew in another environment
    questions: of each task, drawn by `seed`; of mmlu over all its subjects, each in proportion to its size, and
        subjects that this leaves without any are left out. None: all
    seed: of what is drawn; the first of what is drawn, which `run_tasks(limit=…)` takes, are a sample too

    gsm8k has no training file here: its five examples are other test questions (of those that were not drawn, where
    they are five or more), so its figure is not quite the published one's. truthfulqa.csv makes truthfulqa_mc1 and
    truthfulqa_mc2; the subjects make the group mmlu.
    Raises ConfigError for a number of questions below 1; DataError naming file, record and field of what cannot be
    read, or if no file is there.
    """
    require_harness()
    if questions is not None and questions < 1:
        raise ConfigError(f"questions={questions}: must be a whole number from 1 on")
    source, out = Path(data_dir), Path(out_dir)
    made: list[str] = []

    def drawn(name: str, rows: Sequence[Row]) -> list[Row]:
        return _drawn(rows, questions, f"{seed}/{name}")[0]

    def add(task: str, base: str, splits: Mapping[str, Iterable[Row]], **changes: Any) -> None:
        _write_task(out, task, splits, {"include": _harness_file(base), "task": task, **changes})
        made.append(task)

    if (file := source / "arc_challenge.jsonl").exists():
        rows = _converted(file, _arc)
        add(
            "arc_challenge",
            "arc/arc_challenge.yaml",
            {"test": drawn("arc_challenge", rows)},
            training_split=None,
            validation_split=None,
        )
    if (file := source / "hellaswag_val.txt.bz2").exists():
        rows = drawn("hellaswag", _hellaswag(file))
        add("hellaswag", "hellaswag/hellaswag.yaml", {"validation": rows}, training_split=None)
    if (file := source / "winogrande.jsonl").exists():
        rows = drawn("winogrande", _converted(file, _winogrande))
        add("winogrande", "winogrande/default.yaml", {"validation": rows}, training_split=None)
    if (file := source / "gsm8k.jsonl").exists():
        rows, others = _drawn(_converted(file, _gsm8k), questions, f"{seed}/gsm8k")
        examples = {"examples": others} if len(others) >= GSM8K_EXAMPLES else {}
        add(
            "gsm8k",
            "gsm8k/gsm8k.yaml",
            {"test": rows} | examples,
            training_split=None,
            fewshot_split="examples" if examples else "test",
        )
    if (file := source / "truthfulqa.csv").exists():
        rows = drawn("truthfulqa", _converted(file, _truthfulqa))
        for task in ("truthfulqa_mc1", "truthfulqa_mc2"):
            add(task, f"truthfulqa/{task}.yaml", {"validation": rows})
    subjects = sorted(f.name.removesuffix("_test.csv") for f in (source / "mmlu" / "test").glob("*_test.csv"))
    asked = {s: _converted(source / "mmlu" / "test" / f"{s}_test.csv", _mmlu) for s in subjects}
    if questions is not None and subjects:
        start = random.Random(f"{seed}/mmlu").random()
        shares = _in_proportion([len(rows) for rows in asked.values()], questions, start)
        counts = dict(zip(subjects, shares, strict=True))
        subjects = [subject for subject in subjects if counts[subject]]
        asked = {s: _drawn(asked[s], counts[s], f"{seed}/mmlu/{s}")[0] for s in subjects}
    for subject in subjects:
        dev = _converted(source / "mmlu" / "dev" / f"{subject}_dev.csv", _mmlu)
        splits = {"test": asked[subject], "dev": dev}
        add(f"mmlu_{subject}", f"mmlu/default/mmlu_{subject}.yaml", splits, tag=[])
    if subjects:
        group = {
            "group": "mmlu",
            "task": [f"mmlu_{subject}" for subject in subjects],
            "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        }
        write_text(json.dumps(group, indent=1), out / "mmlu.yaml")
        made.append("mmlu")
    if not made:
        raise DataError(
            f"{source}: none of arc_challenge.jsonl, hellaswag_val.txt.bz2, winogrande.jsonl, gsm8k.jsonl, "
            "truthfulqa.csv, mmlu/test is there; name a folder with one of them"
        )
    return tuple(made)


def facts_task(
    edits: Sequence[Edit],
    out_dir: str | os.PathLike[str],
    *,
    name: str = "own_facts",
    choices: int = 10,
    seed: int = 0,
) -> str:
    """Writes a multiple-choice task of facts that a model should still know, and returns its name.

    Each edit with a `target_true` asks its prompt; right is target_true among answers that other edits of the
    same relation (or of the same prompt, without one) have. To see what editing leaves of a model's knowledge,
    give facts that are not edited.
    choices: answers at most, drawn by seed and the edit's id
    Raises ConfigError if no edit has both a target_true and another answer of its relation.
    """
    require_harness()
    if choices < 2:
        raise ConfigError(f"choices={choices}: must be 2 or more")
    answers: dict[str, dict[str, None]] = {}
    for edit in edits:
        if edit.target_true is not None:
            answers.setdefault(edit.relation or edit.prompt, {})[edit.target_true] = None
    rows = []
    for edit in edits:
        wrong = sorted(a for a in answers.get(edit.relation or edit.prompt, ()) if a != edit.target_true)
        if edit.target_true is not None and wrong:
            draw = random.Random(f"{seed}/{edit.id}")
            drawn = [edit.target_true, *draw.sample(wrong, min(len(wrong), choices - 1))]
            draw.shuffle(drawn)
            rows.append({"prompt": edit.text, "choices": drawn, "gold": drawn.index(edit.target_true)})
    if not rows:
        raise ConfigError(
            "facts_task needs edits with a target_true, two different ones at least in a relation"
        )
    task = {
        "task": name,
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [
            {"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1.0},
    }
    _write_task(Path(out_dir), name, {"test": rows}, task)
    return name


def make_tasks(
    data: Sequence[str | os.PathLike[str]],
    out_dir: str | os.PathLike[str],
    *,
    questions: int | None = None,
    seed: int = 0,
) -> list[str]:
    """Writes the tasks of all the data, and returns their names: `write_local_tasks` of folders, `facts_task` of files
    of edits, which are named after their files.

    questions: of each task of a folder; None: all

    Raises ConfigError if two would have one name.
    """
    made: list[str] = []
    for item in map(Path, data):
        if item.is_dir():
            made += write_local_tasks(item, out_dir, questions=questions, seed=seed)
        elif item.stem in made:
            raise ConfigError(f"{item}: a task {item.stem!r} is there already; rename the file")
        else:
            made.append(facts_task(load_edits(item), out_dir, name=item.stem, seed=seed))
    return made


def _drawn(rows: Sequence[Row], count: int | None, seed: str) -> tuple[list[Row], list[Row]]:
    """(so many of them by chance, in the order drawn, the others); all of them, as they stand, where count is None."""
    if count is None:
        return list(rows), []
    places = random.Random(seed).sample(range(len(rows)), len(rows))
    return [rows[i] for i in places[:count]], [rows[i] for i in places[count:]]


def _in_proportion(sizes: Sequence[int], count: int, start: float) -> list[int]:
    """`count` divided among groups of these sizes so that each member of any of them has the same chance.

    Members stand in a row, group after group, and are taken at equal distances: a group's share is its part of the row,
    rounded up or down.
    start: where the first one is taken, from 0 to below 1, as a share of the distance
    """
    total = sum(sizes)
    count = min(count, total)
    first = int(
        start * total
    )  # taken are the places (first + i · total) / count: whole numbers, so nothing is rounded
    shares, end, taken = [], 0, 0
    for size in sizes:
        end += size
        before, taken = taken, -((first - end * count) // total)
        shares.append(taken - before)
    return shares


def _hellaswag(path: Path) -> list[Row]:
    """The fields out of which the harness makes its prompt. ctx_b is the sentence that the endings finish, where it
    begins with a small letter: the harness makes that a capital."""
    try:
        whole = bz2.decompress(read_bytes(path, "the questions")).decode("utf-8")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: is no whole file of bzip2 with UTF-8 text in it ({error}); get it again"
        ) from None
    lines = whole.removesuffix("\n").split("\n")  # not at what Unicode calls an end of a line too
    if len(lines) % 6:
        raise DataError(f"{path}: has {len(lines)} lines, must be six a question")
    rows = []
    for number, begin in enumerate(range(0, len(lines), 6), start=1):
        query, label, *endings = lines[begin : begin + 6]
        activity, colon, context = query.partition(": ")
        if not colon:
            raise DataError(f"{path}, question {number}: its first line must have ': ' behind the activity")
        if label not in ("0", "1", "2", "3"):
            raise DataError(f"{path}, question {number}: its second line is {label!r}, must be from 0 to 3")
        unfinished = re.search(r"(?<=[.!?] )[a-z][^.!?]*$", context)
        end = unfinished.start() if unfinished else len(context)
        rows.append(
            {"activity_label": activity, "ctx_a": context[:end].strip(), "ctx_b": context[end:]}
            | {"endings": endings, "label": label}
        )
    return rows


def _arc(record: Row) -> Row:
    choices, gold = texts(record, "choices"), _choice(record, "gold", len(texts(record, "choices")))
    labels = [chr(ord("A") + i) for i in range(len(choices))]
    return {
        "question": text(record, "query").removeprefix("Question: "),
        "choices": {"text": list(choices), "label": labels},
        "answerKey": labels[gold],
    }


def _winogrande(record: Row) -> Row:
    options = texts(record, "context_options")
    if len(options) != 2:
        raise FieldError(f"field 'context_options' must hold two texts, not {len(options)}")
    first, second = (option.split(" ") for option in options)
    # The blank stands before the first word in which the two differ.
    place = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    if place is None:
        raise FieldError("field 'context_options': the two texts do not differ in a word")
    before = " ".join([*first[:place], ""])
    if "_" in before:
        raise FieldError("field 'context_options' contains '_', which marks the blank")
    return {
        "sentence": f"{before}_ {text(record, 'continuation').strip()}",
        "option1": " ".join(first[place:]),
        "option2": " ".join(second[place:]),
        "answer": str(_choice(record, "gold", 2) + 1),
    }


def _gsm8k(record: Row) -> Row:
    if "####" not in text(record, "answer"):
        raise FieldError("field 'answer' has no '####' before its number")
    return {"question": text(record, "question"), "answer": text(record, "answer")}


def _truthfulqa(record: Row) -> Row:
    best = _sentence(text(record, "Best Answer"))
    right = _separated(text(record, "Correct Answers"))
    wrong = _separated(text(record, "Incorrect Answers"))
    return {
        "question": text(record, "Question").strip(),
        "mc1_targets": {"choices": [best, *wrong], "labels": [1] + [0] * len(wrong)},
        "mc2_targets": {"choices": [*right, *wrong], "labels": [1] * len(right) + [0] * len(wrong)},
    }


def _separated(answers: str) -> list[str]:
    return list(dict.fromkeys(_sentence(answer) for answer in answers.split(";") if answer.strip()))


def _sentence(answer: str) -> str:
    """With a full stop, as the harness's copy of TruthfulQA has it and the table of its authors has not."""
    answer = answer.strip()
    return answer if answer.endswith(".") else f"{answer}."


def _mmlu(record: Row) -> Row:
    choices = [str(fetch(record, f"choice{i}")) for i in range(4)]
    return {"question": text(record, "question"), "choices": choices, "answer": _choice(record, "answer", 4)}


def _choice(record: Row, name: str, count: int) -> int:
    value = fetch(record, name)
    if not str(value).isdecimal() or int(value) >= count:
        raise FieldError(f"field {name!r} is {value!r}, must be a number from 0 to {count - 1}")
    return int(value)


def _converted(path: Path, convert: Callable[[Row], Row]) -> list[Row]:
    rows = []
    for record in read_records(path):
        try:
            if record.problem is not None:
                raise FieldError(record.problem)
            rows.append(convert(record.value))
        except FieldError as error:
            raise DataError(f"{path}, {record.place}: {error}") from None
    return rows


def _harness_file(name: str) -> str:
    """The place of one of the installed harness's task files."""
    import lm_eval.tasks

    path = Path(lm_eval.tasks.__file__).parent / name
    if not path.exists():
        raise ConfigError(
            f"the installed lm_eval has no task file {name}; local tasks are known to work with 0.4.13"
        )
    return str(path)


def _write_task(out: Path, task: str, splits: Mapping[str, Iterable[Row]], config: Mapping[str, Any]) -> None:
    """The task's data as JSONL, and its file (JSON, which is YAML too)."""
    files = {}
    for split, rows in splits.items():
        path = (out / "data" / f"{task}.{split}.jsonl").resolve()
        write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), path)
        files[split] = str(path)
    data = {"data_files": files, "cache_dir": str((out / "cache").resolve())}
    local = {**config, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": data}
    write_text(json.dumps(local, indent=1, ensure_ascii=False), out / f"{task}.yaml")
