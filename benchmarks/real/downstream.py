"""Downstream scores of a real model before and after: of the unedited model, and of each that a long run has left in
OUT/edited; what is scored already is not scored again.

python -m benchmarks.real.downstream smollm2 comparison/edited --data DOWNSTREAM --out downstream [--gsm8k 20]

DOWNSTREAM is what `write_local_tasks` reads. Of each task --questions are drawn, the same for all models, so that
models are compared question by question: OUT/scores.csv has of each model and task the score with its standard error,
and the change with its own, which is that of the differences; lost and regained are the questions that are right before
alone and after alone, with McNemar's p. Each score is a file in OUT/scores, written whole as it is found.

Cost, reckoned and not measured: SmolLM2-135M reads some 270,000 tokens for five tasks of 200 questions, half an hour a
model on one core. gsm8k writes up to 256 tokens behind a prompt of five worked examples, half a minute a question
there, and a model of this size answers next to none: hence --gsm8k, 20 by default; 0 leaves it out, a GPU bears 200.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas

import d4s
from d4s.errors import ConfigError
from d4s.figures.plots import plot_lines
from d4s.figures.tables import frame_lines
from d4s.files import (
    as_list,
    as_number,
    as_object,
    as_text,
    checking,
    digest,
    read_bytes,
    read_json,
    write_json,
    write_table,
)
from d4s.locate.covariance import fingerprint_of
from d4s.measure.downstream import TaskMetric, headline, run_tasks
from d4s.measure.downstream_tasks import write_local_tasks
from d4s.measure.statistics import mcnemar
from d4s.sequence.saving import load_changes_
from d4s.study.paper.protocols import TASKS

FORMAT = "d4s-score-1"
UNEDITED = "unedited"

# Model → task → (name of the metric, its score)
Scores = Mapping[str, Mapping[str, tuple[str, TaskMetric]]]


def kept(place: Path, of: Mapping[str, Any]) -> tuple[str, TaskMetric] | None:
    """A score that was found before. ConfigError if it is one of something else.

    of: model, weights, questions: what tells one from another
    """
    if not place.exists():
        return None
    stored = read_json(
        place, writer=__name__, format=FORMAT, fields=("of", "metric", "score"), always_digest=True
    )
    with checking(place, __name__):
        if differ := [name for name in of if as_object(stored["of"], "of").get(name) != of[name]]:
            raise ConfigError(
                f"{place}: the score of another {' and '.join(differ)}; name another --out, or remove it"
            )
        score = as_object(stored["score"], "score")
        each = tuple(float(as_number(one, "each") or 0) for one in as_list(score["each"], "each"))
        value, error = (as_number(score[name], name) for name in ("value", "stderr"))
        found = TaskMetric(float(value or 0), error, int(score["count"]), each)
        return as_text(stored["metric"], "metric"), found


def compared(before: TaskMetric, after: TaskMetric) -> dict[str, Any]:
    """The change and its standard error; question by question where both are known so, and of the same ones."""
    row: dict[str, Any] = {"change": after.value - before.value}
    if len(before.each) == len(after.each) > 1:
        differences = [now - then for then, now in zip(before.each, after.each, strict=True)]
        row["change_stderr"] = statistics.stdev(differences) / math.sqrt(len(differences))
        if {*before.each, *after.each} <= {0.0, 1.0}:
            lost, regained = differences.count(-1.0), differences.count(1.0)
            row |= {"lost": lost, "regained": regained, "mcnemar_p": mcnemar(lost, regained)}
    elif before.stderr is not None and after.stderr is not None:
        row["change_stderr"] = math.hypot(before.stderr, after.stderr)
    if "change_stderr" in row:
        row["within_one_stderr"] = abs(row["change"]) <= row["change_stderr"]
    return row


def table(scores: Scores) -> pandas.DataFrame:
    """A row a model and task."""
    rows = []
    for model, by_task in scores.items():
        for task, (metric, score) in by_task.items():
            row = {"model": model, "task": task, "metric": metric, "questions": score.count}
            row |= {"value": score.value, "stderr": score.stderr}
            if model != UNEDITED and task in scores[UNEDITED]:
                row |= compared(scores[UNEDITED][task][1], score)
            rows.append(row)
    return pandas.DataFrame(rows)


def draw(found: pandas.DataFrame, path: Path) -> None:
    """A panel a task: the edited models' scores with a standard error to both sides, the unedited one's dotted."""
    data = pandas.DataFrame(
        {"panel": found["task"], "line": found["model"], "x": 0, "y": 100 * found["value"]}
    )
    error = 100 * found["stderr"].astype(float)
    data = data.assign(low=data["y"] - error, high=data["y"] + error)
    before = data["line"] == UNEDITED
    levels = dict(zip(data["panel"][before], data["y"][before], strict=True))
    plot_lines(
        data[~before] if (~before).any() else data,
        path,
        x_label="",
        y_label="score (%), ± standard error",
        levels=levels,
        level_name=UNEDITED,
    )


def score(
    source: str,
    changes: Mapping[str, Path | None],
    tasks: Mapping[str, int | None],
    folder: Path,
    out: Path,
    **options: Any,
) -> Scores:
    """Each model's, of each task.

    changes: name of a model → what `Keep` has left of it; None: the unedited model
    tasks: name → questions, of those in `folder`; None: all of them
    """
    unedited, found = None, {}
    asked = {
        task: digest(read_bytes(p, "questions") for p in sorted((folder / "data").glob(f"{task}*.jsonl")))
        for task in tasks
    }
    for name, path in changes.items():
        model = None
        found[name] = {}
        weights = None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()
        for task, limit in tasks.items():
            if unedited is None:
                model, tokenizer = d4s.load_model(source)
                unedited = fingerprint_of(model)
            of = {"model": unedited, "weights": weights, "questions": [asked[task], limit]}
            place = out / "scores" / name / f"{task}.json"
            if (before := kept(place, of)) is None:
                if model is None:
                    model, tokenizer = d4s.load_model(source)
                if path is not None:
                    load_changes_(model, tokenizer, path)
                    path = None
                metrics = run_tasks(
                    model, tokenizer, [task], limit=limit, include_path=folder, by_question=True, **options
                )[task]
                before = headline(metrics), metrics[headline(metrics)]
                write_json(
                    {"format": FORMAT, "of": of, "metric": before[0], "score": asdict(before[1])}, place
                )
                print(f"{name}, {task}: {before[0]} {before[1].value:.3f}", flush=True)
            found[name][task] = before
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("edited", type=Path, help="folder of weights, as a long run leaves it in --out")
    parser.add_argument("--data", type=Path, required=True, help="folder of the tasks' questions")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the models: names of files in EDITED")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--questions", type=int, default=200, help="of each task")
    parser.add_argument("--gsm8k", type=int, default=20, help="of gsm8k, which writes: of these; 0: none")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts at once")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the questions drawn, and of examples in prompts"
    )
    options = parser.parse_args(arguments)

    changes: dict[str, Path | None] = {UNEDITED: None}
    changes |= {path.stem: path for path in sorted(options.edited.glob("*.safetensors"))}
    if options.only:
        if missing := [name for name in options.only if name not in changes]:
            parser.error(f"{options.edited} has no {', '.join(missing)}; it has {', '.join(changes)}")
        changes = {name: path for name, path in changes.items() if name in (UNEDITED, *options.only)}
    folder = options.out / "tasks"
    write_local_tasks(options.data, folder, questions=options.questions, seed=options.seed)
    tasks = {task: None for task in options.tasks if task != "gsm8k"}
    tasks |= {"gsm8k": options.gsm8k} if "gsm8k" in options.tasks and options.gsm8k else {}
    scores = score(
        options.model, changes, tasks, folder, options.out, batch_size=options.batch_size, seed=options.seed
    )
    found = table(scores)
    write_table(found, options.out / "scores.csv")
    draw(found, options.out / "downstream.png")
    print("\n".join(frame_lines(found)))


if __name__ == "__main__":
    main()
