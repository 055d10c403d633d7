from __future__ import annotations

import bz2
import copy
import json
import math
import random
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from support.tiny import tiny_model, tiny_tokenizer

import d4s.measure.downstream
from d4s.edits import Edit
from d4s.errors import ConfigError, DataError
from d4s.measure.downstream import TaskMetric, _figures, run_tasks
from d4s.measure.downstream_tasks import _in_proportion, facts_task, write_local_tasks
from d4s.models.scoring import score

try:
    import datasets
    import lm_eval.tasks
except ImportError:
    lm_eval = None
needs_harness = pytest.mark.skipif(lm_eval is None, reason="lm_eval is not installed (pip install lm_eval)")

FILES = {
    "arc_challenge.jsonl": [
        {"query": "Question: Which of these is a city?", "choices": ["Lyon", "piano", "France"], "gold": 0},
        {"query": "Question: Which of these is sung?", "choices": ["Manila", "a song"], "gold": 1},
        {"query": "Question: Who plays?", "choices": ["the capital", "Edwin", "tongue", "Apple"], "gold": 1},
    ],
    "winogrande.jsonl": [
        {
            "context_options": [
                "The piano did not fit in the room, for the piano",
                "The piano did not fit in the room, for the room",
            ],
            "continuation": "was too small.",
            "gold": 1,
        },
    ],
    "gsm8k.jsonl": [
        {
            "question": f"You have {n} songs and I have 2. How many are there?",
            "answer": f"{n} + 2.\n#### {n + 2}",
        }
        for n in range(7)
    ],
}
TRUTHFULQA = (
    "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
    "Made up,Songs,Does a piano sing?,No,No; It does not; A piano plays,Yes; It sings;,nowhere\n"
)
HELLASWAG = (
    (
        "Music: Edwin plays the piano. the song",
        ("is French.", "was born.", "worked [for] Apple.", "is I."),
        2,
    ),
    ("Home: How to live in Lyon. Play  a song.", ("Live.", "Play.", "A mother.", "You and I."), 0),
)
MMLU = "question,choice0,choice1,choice2,choice3,answer\nWhat is {}?,one,two,three,four,{}\n"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Made-up records in the layout of the real files."""
    folder = tmp_path / "data"
    for split in ("test", "dev"):
        (folder / "mmlu" / split).mkdir(parents=True)
        for subject, answer in (("anatomy", 0), ("virology", 3)):
            (folder / "mmlu" / split / f"{subject}_{split}.csv").write_text(MMLU.format(subject, answer))
    for name, records in FILES.items():
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "truthfulqa.csv").write_text(TRUTHFULQA)
    lines = [line for query, endings, gold in HELLASWAG for line in (query, str(gold), *endings)]
    (folder / "hellaswag_val.txt.bz2").write_bytes(bz2.compress("\n".join([*lines, ""]).encode()))
    return folder


def files_in(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@needs_harness
def test_local_tasks_run_through_the_harness(data: Path, tmp_path: Path, monkeypatch, seed: int) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    caches = Path(datasets.config.HF_DATASETS_CACHE)
    before, cached = files_in(data), files_in(caches)
    names = write_local_tasks(data, tmp_path / "tasks")
    assert set(names) == {
        *("arc_challenge", "hellaswag", "winogrande", "gsm8k", "truthfulqa_mc1", "truthfulqa_mc2"),
        *("mmlu_anatomy", "mmlu_virology", "mmlu"),
    }
    model = tiny_model("llama", seed=seed, max_position_embeddings=4096).train()
    asked = ["arc_challenge", "hellaswag", "winogrande", "truthfulqa_mc2", "mmlu", "gsm8k"]
    states = random.getstate(), torch.get_rng_state()
    found = run_tasks(model, tiny_tokenizer(), asked, include_path=tmp_path / "tasks", batch_size=2, limit=2)
    assert model.training and states[0] == random.getstate() and torch.equal(states[1], torch.get_rng_state())
    counts = {task: {metric.count for metric in metrics.values()} for task, metrics in found.items()}
    assert counts == {
        "arc_challenge": {2},
        "hellaswag": {2},
        "winogrande": {1},
        "truthfulqa_mc2": {1},
        "mmlu": {2},
        "gsm8k": {2},
    }
    assert set(found["gsm8k"]) == {"exact_match (strict-match)", "exact_match (flexible-extract)"}
    assert all(0 <= metric.value <= 1 for metrics in found.values() for metric in metrics.values())
    # Nothing is written but the tasks and what the harness caches beside them.
    assert files_in(tmp_path) - before == files_in(tmp_path / "tasks")
    assert files_in(caches) == cached


def likelihoods(model, tokenizer, prompt: str, answers: list[str]) -> list[float]:
    """log p of each answer after the prompt."""
    return [-s.nll * len(s.target) for s in score(model, tokenizer, [(prompt, answers)])[0]]


@needs_harness
def test_figures_are_those_of_the_likeliest_choice(data: Path, tmp_path: Path, seed: int) -> None:
    write_local_tasks(data, tmp_path / "tasks")
    model, tokenizer = (
        tiny_model("llama", seed=seed, max_position_embeddings=2048),
        tiny_tokenizer(start=False),
    )
    asked = ["arc_challenge", "hellaswag", "winogrande", "truthfulqa_mc1"]
    found = run_tasks(model, tokenizer, asked, include_path=tmp_path / "tasks", by_question=True)
    for metrics in found.values():
        for metric in metrics.values():
            assert len(metric.each) == metric.count and metric.value == pytest.approx(
                sum(metric.each) / metric.count
            )
    # The harness's own clean-up: a capital after the context's last full stop, no brackets, single spaces.
    said = ("Music: Edwin plays the piano. The song", "Home: How to live in Lyon. Play a song.")
    right = []
    for query, (_, endings, gold) in zip(said, HELLASWAG, strict=True):
        log_p = likelihoods(model, tokenizer, query, [e.replace("[for] ", "") for e in endings])
        right.append(log_p.index(max(log_p)) == gold)
    assert list(found["hellaswag"]["acc"].each) == right
    right = []
    for record in FILES["arc_challenge.jsonl"]:
        log_p = likelihoods(model, tokenizer, f"{record['query']}\nAnswer:", record["choices"])
        right.append(log_p.index(max(log_p)) == record["gold"])
    assert list(found["arc_challenge"]["acc"].each) == right
    (record,) = FILES["winogrande.jsonl"]
    log_p = [
        likelihoods(model, tokenizer, text, [record["continuation"]])[0] for text in record["context_options"]
    ]
    assert found["winogrande"]["acc"].value == float(log_p[1] > log_p[0])


def written(folder: Path, task: str, split: str = "test") -> list[dict]:
    with open(folder / "data" / f"{task}.{split}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@needs_harness
def test_of_each_task_so_many_questions_are_drawn(data: Path, tmp_path: Path, seed: int) -> None:
    for subject, size in (("anatomy", 30), ("virology", 10), ("astronomy", 60)):
        rows = "".join(f"{i},one,two,three,four,0\n" for i in range(size))
        for split in ("test", "dev"):
            place = data / "mmlu" / split / f"{subject}_{split}.csv"
            place.write_text(f"question,choice0,choice1,choice2,choice3,answer\n{rows}")
    names = write_local_tasks(data, tmp_path / "all")
    assert len(written(tmp_path / "all", "gsm8k")) == 7
    assert write_local_tasks(data, tmp_path / "drawn", questions=2, seed=seed)
    drawn = {task: written(tmp_path / "drawn", task) for task in ("arc_challenge", "gsm8k")}
    for task, rows in drawn.items():
        every = written(tmp_path / "all", task)
        assert len(rows) == 2 and rows[0] != rows[1] and all(row in every for row in rows)
    examples = written(tmp_path / "drawn", "gsm8k", "examples")
    assert len(examples) == 5 and not any(row in examples for row in drawn["gsm8k"])
    write_local_tasks(data, tmp_path / "again", questions=2, seed=seed)
    assert drawn == {task: written(tmp_path / "again", task) for task in drawn}

    assert set(write_local_tasks(data, tmp_path / "ten", questions=10, seed=seed)) == set(names)
    assert [len(written(tmp_path / "ten", f"mmlu_{s}")) for s in ("anatomy", "virology", "astronomy")] == [
        3,
        1,
        6,
    ]
    some = [
        name for name in write_local_tasks(data, tmp_path / "two", questions=2, seed=seed) if "mmlu_" in name
    ]
    assert json.loads((tmp_path / "two" / "mmlu.yaml").read_text())["task"] == some
    assert sum(len(written(tmp_path / "two", name)) for name in some) == 2
    with pytest.raises(ConfigError, match="questions=0"):
        write_local_tasks(data, tmp_path / "none", questions=0)


def test_a_share_is_the_groups_part_rounded_up_or_down(seed: int) -> None:
    draw = random.Random(seed)
    sizes = [draw.randrange(1, 40) for _ in range(draw.randrange(1, 12))]
    count = draw.randrange(1, sum(sizes) + 1)
    shares = _in_proportion(sizes, count, draw.random())
    assert sum(shares) == count
    for size, share in zip(sizes, shares, strict=True):
        part = Fraction(size * count, sum(sizes))
        assert math.floor(part) <= share <= math.ceil(part) and share <= size
    assert _in_proportion(sizes, sum(sizes) + 5, draw.random()) == sizes


@needs_harness
@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda data: data[:-7], "bzip2"),
        (lambda data: b"Music: Edwin", "bzip2"),
        (lambda data: bz2.compress(b"Music: Edwin\n0\none\n"), "3 lines.*six"),
        (lambda data: bz2.compress(b"Music\n0\none\ntwo\nthree\nfour\n"), "question 1.*': '"),
        (
            lambda data: bz2.compress(bz2.decompress(data) + b"A: b\n4\none\ntwo\nthree\nfour\n"),
            "question 3.*'4'",
        ),
    ],
)
def test_a_damaged_file_of_endings_is_named(data: Path, tmp_path: Path, damage, problem: str) -> None:
    place = data / "hellaswag_val.txt.bz2"
    place.write_bytes(damage(place.read_bytes()))
    with pytest.raises(DataError, match=rf"hellaswag_val\.txt\.bz2.*{problem}"):
        write_local_tasks(data, tmp_path / "tasks")


@needs_harness
def test_own_facts_are_asked_among_the_answers_of_their_relation(tmp_path: Path, seed: int) -> None:
    cities, tongues = ["Lyon", "Paris", "Manila", "Bordeaux"], ["French", "English"]
    edits = [Edit("{} is in", f"Edwin {i}", "Apple", city, relation="city") for i, city in enumerate(cities)]
    edits += [Edit("{} speaks", "Steve Jobs", "Apple", tongue, id=tongue) for tongue in tongues]
    edits += [Edit("{} plays", "Danielle Darrieux", "the piano", "a song"), Edit("{} is", "France", "I")]
    model, tokenizer = tiny_model("llama", seed=seed), tiny_tokenizer()
    name = facts_task(edits, tmp_path, choices=3, seed=seed)
    rows = written(tmp_path, name)
    assert [row["prompt"] for row in rows] == [edit.text for edit in edits[:6]]
    for row, edit in zip(rows, edits, strict=False):
        assert row["choices"][row["gold"]] == edit.target_true
        assert set(row["choices"]) <= set(cities if edit.relation else tongues)
        assert len(set(row["choices"])) == (3 if edit.relation else 2)
    metric = run_tasks(model, tokenizer, [name], include_path=tmp_path)[name]["acc"]
    best = []
    for row in rows:
        log_p = likelihoods(model, tokenizer, row["prompt"], row["choices"])
        best.append(log_p.index(max(log_p)) == row["gold"])
    assert (metric.value, metric.count) == (pytest.approx(sum(best) / 6), 6)
    with pytest.raises(ConfigError, match="target_true"):
        facts_task(edits[6:], tmp_path)


@needs_harness
def test_the_tokenizer_is_left_as_it_was(data: Path, tmp_path: Path) -> None:
    write_local_tasks(data, tmp_path / "tasks")
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.pad_token = None
    model = tiny_model("llama", max_position_embeddings=2048)
    run_tasks(model, tokenizer, "arc_challenge", include_path=tmp_path / "tasks")
    assert tokenizer.pad_token is None


@needs_harness
def test_an_unknown_task_is_answered_with_the_nearest_names(monkeypatch) -> None:
    class FewTasks:  # the harness takes half a minute to list all of its own
        def __init__(self, **_arguments) -> None:
            self.all_tasks = ["arc_challenge", "gsm8k"]

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", FewTasks)
    with pytest.raises(ConfigError, match=r"'arc_chalenge'\. Did you mean arc_challenge\?"):
        run_tasks(tiny_model("llama"), tiny_tokenizer(), ["arc_chalenge"])


@needs_harness
@pytest.mark.parametrize(
    ("name", "record", "problem"),
    [
        (
            "arc_challenge.jsonl",
            {"query": "Question: Who?", "choices": ["I"], "gold": 1},
            "'gold' is 1.*0 to 0",
        ),
        ("winogrande.jsonl", {"context_options": ["I"], "continuation": "a", "gold": 0}, "two texts"),
        (
            "winogrande.jsonl",
            {"context_options": ["I", "I"], "continuation": "a", "gold": 0},
            "do not differ",
        ),
        ("gsm8k.jsonl", {"question": "How many?", "answer": "18"}, "####"),
    ],
)
def test_a_wrong_record_is_named_by_file_and_place(
    tmp_path: Path, name: str, record: dict, problem: str
) -> None:
    (tmp_path / name).write_text(json.dumps(FILES[name][0]) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(DataError, match=f"{name}, record 2.*{problem}"):
        write_local_tasks(tmp_path, tmp_path / "tasks")


@needs_harness
def test_a_folder_without_any_of_the_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"arc_challenge\.jsonl"):
        write_local_tasks(tmp_path, tmp_path / "tasks")
    with pytest.raises(ConfigError, match="no folder"):
        run_tasks(tiny_model("llama"), tiny_tokenizer(), ["gsm8k"], include_path=tmp_path / "absent")


def test_without_the_harness_the_error_names_the_command(monkeypatch) -> None:
    monkeypatch.setattr(d4s.measure.downstream.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"pip install lm_eval$"):
        run_tasks(tiny_model("llama"), tiny_tokenizer(), ["arc_challenge"])


def test_figures_of_a_group_stand_for_its_members() -> None:
    found = {
        "results": {
            "g": {"alias": "g", "acc,none": 0.5, "acc_stderr,none": "N/A"},
            "a": {"alias": "a", "acc,none": 0.25, "acc_stderr,none": 0.1, "em,strict": 1.0},
            "b": {"alias": "b", "acc,none": 0.75, "acc_stderr,none": 0.1},
        },
        "group_subtasks": {"g": ["a", "b"]},
        "n-samples": {"a": {"original": 9, "effective": 3}, "b": {"original": 9, "effective": 5}},
    }
    plain = _figures(found, ["g"])
    assert plain["g"]["acc"].each == ()
    right = {"a": (1.0, 0.0, 1.0), "b": (0.0,) * 5}
    samples = {task: [{"filter": "none", "acc": value} for value in each] for task, each in right.items()}
    assert _figures(found | {"samples": samples}, ["g"])["g"]["acc"].each == (*right["a"], *right["b"])
    assert _figures(found, ["g"]) == {"g": {"acc": TaskMetric(0.5, None, 8)}}
    assert _figures(found, ["g", "a"])["a"] == {
        "acc": TaskMetric(0.25, 0.1, 3),
        "em (strict)": TaskMetric(1.0, None, 3),
    }
