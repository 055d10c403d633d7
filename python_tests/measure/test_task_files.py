"""Folders of task files: what they would run is refused by name, and nothing of it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.tiny import tiny_model, tiny_tokenizer

from d4s.cli import main
from d4s.errors import ConfigError, DataError
from d4s.measure.downstream import known_tasks, run_tasks
from d4s.measure.downstream_tasks import make_tasks
from d4s.measure.task_files import check_task_files

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("lm_eval.tasks")

RECORDS = [
    {
        "prompt": "{} worked for",
        "subject": subject,
        "target_new": "Lyon",
        "target_true": true,
        "relation": "P1",
    }
    for subject, true in (("Steve Jobs", "Apple"), ("Edwin", "Manila"))
]
PYTHON = "open('ran', 'w').close()\ndef score(*_):\n    return {}\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """tasks/facts.yaml: a local task."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "facts.json").write_text(json.dumps(RECORDS))
    make_tasks(["facts.json"], "tasks")
    return tmp_path / "tasks"


def run(**options):
    return run_tasks(tiny_model("llama", 1), tiny_tokenizer(), ["facts"], include_path="tasks", **options)


def test_a_local_task_runs_as_it_is(folder):
    assert run()["facts"]["acc"].count == 2


def test_a_function_is_refused_with_its_file_and_name_and_runs_only_where_it_is_trusted(folder, capsys):
    (folder / "code.py").write_text(PYTHON)
    task = folder / "facts.yaml"
    text = task.read_text().rstrip()
    task.write_text(text[:-1].rstrip() + ',\n "process_results": !function "code.score"\n}')
    with pytest.raises(ConfigError) as refused:
        run()
    line = len(text.splitlines())
    assert f"facts.yaml, line {line}: would run score() of {folder / 'code.py'}" in str(refused.value)
    assert "--trust-task-code" in str(refused.value) and not Path("ran").exists()
    tiny_model("llama", 1).save_pretrained("m")
    tiny_tokenizer().save_pretrained("m")
    arguments = ["evaluate", "m", "facts.json", "--tasks", "facts", "--task-folder", "tasks"]
    assert main(arguments) == 2 and not Path("ran").exists()
    err = capsys.readouterr().err
    assert f"score() of {folder / 'code.py'}" in err and "Traceback" not in err
    (folder / "code.py").write_text(PYTHON.replace("{}", "{'acc': 1.0, 'acc_norm': 1.0}"))
    assert main([*arguments, "--trust-task-code"]) == 0 and Path("ran").exists()
    assert "facts acc_norm: 100.00 %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "task: x\nprocess_docs: !function os.system",
            r"line 2: would run system\(\) of the Python module 'os'",
        ),
        ("task: x\na: [{b: !function utils.f}]", r"line 2: would run f\(\)"),
        ("task: x\nsize: !!python/object/apply:os.system ['touch ran']", "!!python/object/apply:os.system"),
        ("task: x\nsize: !other 3", "has the tag !other"),
        ("class: utils.Task", "written in Python"),
        ("task: x\ndataset_kwargs: {trust_remote_code: true}", "trust_remote_code"),
        ("task: x\ndataset_path: ./loader.py", r"would run \./loader\.py"),
        ("task: x\nmetric_list: [{metric: ./own}]", "'./own' with the library evaluate"),
        ("task: x\ninclude: hidden.txt", r"hidden\.txt, line 1: would run"),
        ("task: x\ninclude: [hidden.txt]", r"hidden\.txt, line 1: would run"),
        ("group: x\ntask: [../outside.yml]", r"outside\.yml, line 1: would run"),
    ],
)
def test_each_way_to_run_code_is_refused(text, reason, folder):
    for hidden in (folder / "hidden.txt", folder.parent / "outside.yml"):
        hidden.write_text("doc_to_text: !function utils.text\n")
    (folder / "more").mkdir()
    (folder / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=reason):
        check_task_files(folder)
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("task: [", r"x\.yaml: a task file that cannot be read as YAML.*line 1"),
        ("- task", "must hold fields"),
        ("", "must hold fields"),
        ("[" * 5_000, "cannot be read as YAML"),
        ("a: &a [*a]\ntask: \xff", "cannot be read as YAML"),
    ],
)
def test_a_file_that_is_no_task_file_is_named(text, reason, folder):
    (folder / "x.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=reason):
        check_task_files(folder)


def test_a_template_cannot_reach_python_unless_it_is_trusted(folder):
    task = folder / "facts.yaml"
    escape = "{{ prompt.__class__.__mro__[1].__subclasses__() | length }}{{ prompt }}"
    task.write_text(task.read_text().replace("{{prompt}}", escape))
    with pytest.raises(DataError, match="template"):
        run()
    assert run(trust_task_code=True)["facts"]["acc"].count == 2


def test_what_the_harness_cannot_make_sense_of_is_one_error(folder):
    task = folder / "facts.yaml"
    task.write_text(task.read_text().replace('"multiple_choice"', "3"))
    with pytest.raises(DataError, match="tasks: the harness cannot make sense of"):
        run()


def test_tasks_are_listed_by_a_part_of_their_name(capsys, monkeypatch):
    class Few(lm_eval.tasks.TaskManager):  # the harness's own are thousands, and slow to list
        def __init__(self):
            super().__init__(include_path="tasks", include_defaults=False)

    make_tasks(["facts.json"], "tasks")
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Few)
    assert known_tasks() == known_tasks("FACT") == ["facts"]
    assert main(["tasks", "list", "act"]) == 0
    assert capsys.readouterr().out.splitlines() == ["facts"]
    assert main(["tasks", "list", "no such task"]) == 2
    assert "no task with 'no such task' in its name" in capsys.readouterr().err


def test_local_tasks_are_made_from_folders_and_edits(folder, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    question = {"query": "Question: Which is a city?", "choices": ["Lyon", "piano"], "gold": 0}
    (data / "arc_challenge.jsonl").write_text(json.dumps(question))
    assert main(["tasks", "make", "own", "data", "facts.json", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made == {"folder": "own", "tasks": ["arc_challenge", "facts"]}
    check_task_files("own")  # what it includes of the harness is the harness's own
    found = run_tasks(
        tiny_model("llama", 1), tiny_tokenizer(), ["facts", "arc_challenge"], include_path="own", limit=1
    )
    assert set(found) == {"facts", "arc_challenge"}
    assert main(["tasks", "make", "own"]) == 2 and "FOLDER and DATA" in capsys.readouterr().err
    assert main(["tasks", "make", "own", "nowhere"]) == 1 and "nowhere" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="'facts' is there already"):
        make_tasks(["facts.json", "facts.json"], "own")
