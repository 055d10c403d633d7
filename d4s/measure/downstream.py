"""Downstream tasks by lm-evaluation-harness, on a model as it is in memory."""

from __future__ import annotations

import copy
import difflib
import importlib
import importlib.util
import logging
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy
import torch

from d4s.errors import ConfigError, DataError
from d4s.measure.task_files import check_task_files, require_folder, templates_in_a_sandbox
from d4s.models.causal_lm import CausalLM
from d4s.models.forward import evaluating


@dataclass(frozen=True)
class TaskMetric:
    """value and its standard error (None where the harness gives none) over `count` questions.

    each: its value question by question, of a group its members' one after another, where that was asked for and the
        harness tells it
    """

    value: float
    stderr: float | None
    count: int
    each: tuple[float, ...] = ()


def run_tasks(
    model: CausalLM,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    include_path: str | os.PathLike[str] | None = None,
    batch_size: int = 16,
    trust_task_code: bool = False,
    by_question: bool = False,
    seed: int = 0,
) -> dict[str, dict[str, TaskMetric]]:
    """Task → metric → TaskMetric, with the harness's own prompts, examples and scoring.

    tasks: as the harness spells them (arc_challenge, hellaswag, mmlu, truthfulqa_mc2, winogrande, gsm8k, …);
        a tag counts as the tasks that it stands for
    limit: questions of each task; None: all
    include_path: a folder of task files, as `write_local_tasks` or `facts_task` makes them; its tasks come
        before the harness's of the same name. If all tasks are there, nothing is fetched from anywhere
    trust_task_code: run the Python that task files in include_path name by `!function`, and let their templates do
        what they like; False: refuse the first, and keep templates in Jinja's sandbox
    by_question: also tell each metric question by question (`TaskMetric.each`)
    seed: of the examples in few-shot prompts

    Metrics of a filtered answer are named after the filter: "exact_match (strict-match)". The model is left in
    the mode it was in, the tokenizer and the global random states as they were.
    Raises ConfigError where lm_eval is missing or does not know a task, or a task file would run code; DataError
    where a task's data are neither here nor to be had, or its file cannot be read.
    """
    require_harness()
    if include_path is not None and not trust_task_code:
        check_task_files(include_path)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    tasks = [tasks] if isinstance(tasks, str) else list(dict.fromkeys(tasks))
    if not tasks:
        raise ConfigError("no downstream task was named; d4s tasks list has all of them")
    manager = _task_manager(tasks, include_path)
    boxed = nullcontext() if trust_task_code else templates_in_a_sandbox()
    with evaluating(model), _quiet_harness(), _global_random_states_kept(), boxed:
        # The harness may give a tokenizer a padding token; it gets one of its own.
        wrapped = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        try:
            found = simple_evaluate(
                wrapped,
                tasks=tasks,
                limit=limit,
                task_manager=manager,
                log_samples=by_question,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except (ConnectionError, FileNotFoundError) as error:
            raise DataError(
                f"the data of {', '.join(tasks)} are neither here nor to be had ({error}); connect to the "
                "network, or make local tasks with d4s.measure.downstream_tasks.write_local_tasks and pass "
                "include_path="
            ) from error
        except (AttributeError, KeyError, TypeError, ValueError, ImportError) as error:
            if include_path is None:
                raise
            raise DataError(
                f"{os.fspath(include_path)}: the harness cannot make sense of a task file there, or of its data "
                f"({error!r}); mend it, or take it out of there"
            ) from error
        except Exception as error:
            if type(error).__module__.partition(".")[0] != "jinja2":
                raise
            raise DataError(
                f"{', '.join(tasks)}: a template of the task fails, or does what only trust_task_code=True allows "
                f"({error}); mend it, or, if you trust it, say so (--trust-task-code)"
            ) from error
    return _figures(found, tasks)


def known_tasks(part: str = "") -> list[str]:
    """Names of the tasks and groups of the installed harness that contain `part`. ConfigError if there is none."""
    require_harness()
    from lm_eval.tasks import TaskManager

    names = sorted(name for name in TaskManager().all_tasks if part.lower() in name.lower())
    if not names:
        raise ConfigError(
            f"the installed lm_eval has no task with {part!r} in its name; d4s tasks list has all of them"
        )
    return names


def headline(metrics: Mapping[str, TaskMetric]) -> str:
    """Of a task's metrics the one that the tables of the field show: acc_norm, or acc, or else the harness's first."""
    return next((name for name in ("acc_norm", "acc") if name in metrics), next(iter(metrics)))


class TaskScores:
    """Scores of downstream tasks on a model as it is when called, one a task: `edit_sequence(measure=TaskScores(…))`.

    Named "<task> acc_norm", or by another `headline`.
    options: as `run_tasks`
    """

    def __init__(self, model: CausalLM, tokenizer: Any, tasks: Sequence[str], **options: Any) -> None:
        self.model, self.tokenizer, self.tasks, self.options = model, tokenizer, tasks, options

    @property
    def settings(self) -> dict[str, Any]:
        """What tells one from another, as JSON."""
        return {"tasks": list(self.tasks)} | {name: str(value) for name, value in self.options.items()}

    def __call__(self) -> dict[str, float]:
        scores = {}
        for task, metrics in run_tasks(self.model, self.tokenizer, self.tasks, **self.options).items():
            name = headline(metrics)
            scores[f"{task} {name}"] = metrics[name].value
        return scores


def require_harness() -> None:
    """Raises ConfigError where lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "downstream tasks need lm-evaluation-harness, which is not installed: pip install lm_eval"
        )


def _task_manager(tasks: Sequence[str], include_path: str | os.PathLike[str] | None) -> Any:
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        require_folder(include_path)
        # The harness's own tasks are many, and slow to list: only where they are needed.
        local = TaskManager(include_path=os.fspath(include_path), include_defaults=False)
        if set(tasks) <= set(local.all_tasks):
            return local
    manager = TaskManager(include_path=None if include_path is None else os.fspath(include_path))
    for task in tasks:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, n=3)
            hint = f"Did you mean {', '.join(near)}? " if near else ""
            raise ConfigError(f"unknown downstream task {task!r}. {hint}All of them: d4s tasks list")
    return manager


def _figures(found: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, dict[str, TaskMetric]]:
    """What was asked for; of a group its own figures, not those of its members."""
    groups: Mapping[str, Sequence[str]] = found.get("group_subtasks", {})
    members = {child for children in groups.values() for child in children}

    def count(task: str) -> int:
        if task in found["n-samples"]:
            return int(found["n-samples"][task]["effective"])
        return sum(count(child) for child in groups.get(task, ()))

    def each(task: str, name: str, kind: str) -> Iterator[float]:
        for sample in found.get("samples", {}).get(task, ()):
            if sample["filter"] == kind and isinstance(sample.get(name), Real):
                yield float(sample[name])
        for child in groups.get(task, ()):
            yield from each(child, name, kind)

    figures: dict[str, dict[str, TaskMetric]] = {}
    for task, results in found["results"].items():
        if task in members and task not in tasks:
            continue
        figures[task] = {}
        for key, value in results.items():
            name, _, kind = key.partition(",")
            if not kind or name.endswith("_stderr"):
                continue
            error = results.get(f"{name}_stderr,{kind}")
            known = isinstance(error, (int, float)) and math.isfinite(error)
            figures[task][name if kind == "none" else f"{name} ({kind})"] = TaskMetric(
                float(value), float(error) if known else None, count(task), tuple(each(task, name, kind))
            )
    return figures


@contextmanager
def _quiet_harness() -> Iterator[None]:
    """Without remarks about a model that is loaded already, and without a bar for each file that is read."""
    datasets = importlib.import_module("datasets")  # comes with the harness
    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


@contextmanager
def _global_random_states_kept() -> Iterator[None]:
    """The harness seeds the global generators; afterwards they go on from where they were."""
    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])
