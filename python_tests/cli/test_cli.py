"""The command line as a whole: help, wrong arguments, exit statuses, and one clear line for every failure."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from support.command import ROOT, done, failed, run

import d4s
from d4s import progress
from d4s.cli import main
from d4s.cli.parser import command_line
from d4s.cli.reproduce import labels
from d4s.errors import ConfigError
from d4s.progress import progress_bar

VERBS = (
    "demo",
    "plan",
    "edit",
    "alone",
    "patch",
    "targets",
    "log",
    "undo",
    "redo",
    "revise",
    "merge",
    "verify",
    "evaluate",
    "covariance",
    "compare",
    "analyze",
    "reproduce",
    "report",
    "tasks",
    "tune",
    "try",
    "import-config",
    "models",
    "methods",
    "completion",
)


def test_each_verb_has_its_help(capsys):
    for verb in VERBS:
        with pytest.raises(SystemExit) as ended:
            main([verb, "--help"])
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert text.startswith(f"usage: d4s {verb}") and "--json" in text
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert set(VERBS) <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "edits",
        "edit m edits.json",
        "edit m --out x",
        "edit m edits.json --out x --batch-size many",
        "edit m edits.json --out x --batch-size 0",
        "edit m edits.json --out x --evaluate-every 0",
        "edit m edits.json --out x --limit 0",
        "covariance m corpus.txt --out c --tokens 0",
        "edit m edits.json --out x --seed -1",
        "edit m edits.json --out x --seed 99999999999999999999",
        "compare m edits.json --out x --neighborhood-limit -1",
        "compare m edits.json --out x --seeds 0,-1",
        "analyze model result.json --out x --efficacy-bound 90",
        "edit m edits.json --out x --dtype int8",
        "evaluate m",
        "evaluate m edits.json --limit x",
        "evaluate m edits.json --no-such-option",
        "covariance m corpus.txt",
        "covariance m corpus.txt --out c --layers 1,x",
        "models too many",
        "edit m edits.json --out x --preset fresh --preset hold",
        "edit m edits.json --out x --method d4s --method memit",
        "compare m edits.json --out x --methods memit --methods d4s",
    ],
)
def test_wrong_arguments_end_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("d4s") and err.endswith(" --help lists what it takes\n")
    assert err.count("\n") == 1


def test_an_option_that_is_none_is_told_with_the_nearest_one(capsys):
    for arguments, said in (
        ("edit m edits.json --out x --preser fresh", "arguments: --preser fresh; did you mean --preset?"),
        ("edit m edits.json --out x --batchsize=3", "did you mean --batch-size?"),
        ("edti m", "d4s: unknown verb 'edti'. Did you mean 'edit'? Known: alone, analyze, "),
        ("--json methods", "--json stands before the verb; options go behind it"),
        ("--seed 5 edit m", "--seed stands before the verb"),
        (
            "patch export m e p --rnk 3",
            "d4s patch export: unrecognized arguments: --rnk 3; did you mean --rank?",
        ),
        ("log run --qqq", "unrecognized arguments: --qqq; d4s log --help"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments.split())
        assert ended.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    ["covariance m --out .", "edit m edits.json --method nonsense", "edit m edits.json --set steps"],
)
def test_arguments_that_fit_nothing_end_with_2(arguments, tmp_path, capsys):
    out = () if "--out" in arguments else ("--out", str(tmp_path / "x"))
    assert main([*arguments.split(), *out]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("d4s: ")


def test_options_that_mean_nothing_end_with_2(tmp_path, capsys):
    for arguments, option in (
        ("analyze data m edits.json --neighborhood-limit 2", "--neighborhood-limit"),
        ("analyze model run/result.json --methods d4s", "--methods"),
        ("reproduce fig8 m --tasks mmlu", "--tasks"),
        ("reproduce fig8 m --facts 5", "--facts"),
        ("reproduce table4 m --tasks mmlu --text text.txt", "--text"),
        ("reproduce table4 m --facts 5 --task-limit 2", "--task-limit"),
        ("reproduce fig8 m --trust-task-code", "--trust-task-code"),
        ("reproduce fig3 m --neighborhood-limit 2", "--neighborhood-limit"),
        ("tasks list mmlu --questions 5", "--questions"),
        ("analyze model run/result.json --device-map auto", "--device-map"),
        ("analyze model run/result.json --skip-bad", "--skip-bad"),
        ("reproduce fig6 m --task-limit 3", "--task-limit"),
        ("reproduce fig8 m --skip-bad", "--skip-bad"),
    ):
        out = [] if arguments.startswith("tasks") else ["--out", str(tmp_path / "out")]
        assert main([*arguments.split(), *out]) == 2
        assert f"{option} means nothing with" in capsys.readouterr().err  # or without


@pytest.mark.parametrize("option", ["--task-limit 5", "--task-folder none", "--trust-task-code"])
@pytest.mark.parametrize("verb", ["evaluate", "compare"])
def test_options_of_tasks_are_refused_where_no_task_is_named(verb, option, tmp_path, capsys):
    out = ("--out", str(tmp_path / "out"), "--methods", "ft-m") if verb == "compare" else ()
    line = failed(capsys, verb, "m", "edits.json", "--limit", "1", *out, *option.split())
    assert f"{option.split()[0]} means nothing without --tasks" in line


def test_data_sets_of_one_name_are_told_apart_by_their_folders():
    found = labels([Path("20q/edit_set.json"), Path("pep3k/edit_set.json"), Path("zsre.json")])
    assert list(found) == ["20q-edit_set", "pep3k-edit_set", "zsre"]
    with pytest.raises(ConfigError, match="'20q-edit_set'"):
        labels([Path("a/20q/edit_set.json"), Path("b/20q/edit_set.json")])


def test_a_log_gets_plain_lines(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_SECONDS", 0)
    with progress_bar(3, "edit", "d4s") as bar:
        for _ in range(3):
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert (
        lines[0].startswith("d4s:   0%") and lines[-1].startswith("d4s: 100%") and "\r" not in "".join(lines)
    )
    with progress_bar(3, "edit", "d4s", shown=False) as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""


def test_an_interruption_is_a_failure_in_one_line(monkeypatch, capsys):
    def interrupted(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("d4s.edits.formats.load_edits", interrupted)
    assert main(["evaluate", "m", "edits.json"]) == 130
    assert capsys.readouterr().err == "d4s: stopped; what had been written is whole\n"


def test_the_module_runs_as_a_program_and_hands_on_its_status(place):
    ended = run(sys.executable, "-m", "d4s", "evaluate", "m", "none.json", cwd=place)
    assert ended.returncode == 1 and ended.stdout == ""
    assert ended.stderr.splitlines()[-1].startswith("d4s: none.json")


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"d4s {d4s.__version__}\n"


def test_who_reads_only_the_first_lines_is_left_in_peace():
    line = f"{sys.executable} -m d4s methods --json; echo $? >&2"
    ended = run("bash", "-c", f"({line}) | head -n 1 > /dev/null")
    assert ended.stderr.split() in (["141"], ["0"])  # 0: all of it was written before head ended
    # A reader that has gone before the first line:
    ended = run("bash", "-c", f"({line}) | true", env={"PYTHONUNBUFFERED": ""})
    assert "roken" not in ended.stderr and "Traceback" not in ended.stderr


def test_a_checkout_without_its_extension_says_so_in_one_line(tmp_path):
    shutil.copytree(
        ROOT / "d4s", tmp_path / "d4s", ignore=shutil.ignore_patterns("*.so", "demo", "__pycache__")
    )
    path = {"PYTHONPATH": str(tmp_path)}
    ended = run(sys.executable, "-m", "d4s", "methods", cwd=tmp_path, env=path)
    assert ended.returncode == 1 and ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith(
        "d4s: the compiled extension d4s.ops._C does not load (it is not built); run 'pip install .'"
    )
    ended = run(sys.executable, "-c", "import d4s", cwd=tmp_path, env=path)
    assert ended.stderr.splitlines()[-1].startswith("d4s.errors.ExtensionError: the compiled extension")


def test_a_log_says_from_the_start_what_is_done(tmp_path, capsys, monkeypatch):
    done(capsys, "compare", "m", "edits.json", "--methods", "ft-m", "--out", str(tmp_path / "c"))
    assert main(["compare", "m", "edits.json", "--methods", "ft-m,grace", "--out", str(tmp_path / "d")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line] == [
        "baseline: the unedited model is asked about 3 edits",
        "sequence 1 of 2: ft-m, seed 0",
        "ft-m: the unedited model is scored on 3 edits",
        "ft-m: 3 edits, 1 a step",
        "sequence 2 of 2: grace, seed 0",
        "grace: 3 edits, 1 a step",
    ]
    monkeypatch.setattr(progress, "_SECONDS", 0)  # work that takes long
    done(capsys, "edit", "m", "edits.json", "--method", "ft-m", "--out", str(tmp_path / "e"))
    assert main(["edit", "m", "edits.json", "--method", "ft-m", "--out", str(tmp_path / "f")]) == 0
    before_the_edits = capsys.readouterr().err.split("ft-m: 3 edits")[0]
    assert before_the_edits.count("scoring: 100%") >= 1 and "\r" not in before_the_edits


def test_the_public_face_has_what_the_verbs_do():
    script = (
        "import sys, d4s\n"
        "assert 'matplotlib' not in sys.modules and 'lm_eval' not in sys.modules\n"
        "import d4s.sequence.compare\n"
        "names = ('compare', 'analyze_data', 'analyze_model', 'run_tasks', 'consolidate')\n"
        "assert all(callable(getattr(d4s, name)) and name in dir(d4s) for name in names)\n"
        "from d4s import *\n"
        "assert compare is d4s.sequence.compare.compare and not hasattr(d4s, 'no_such_name')\n"
    )
    ended = run(sys.executable, "-c", script)
    assert ended.returncode == 0, ended.stderr


def test_every_verb_is_tested():
    (verbs,) = [
        action.choices for action in command_line()._actions if hasattr(action, "choices") and action.choices
    ]
    assert set(VERBS) == set(verbs)
    assert {verb.replace("-", "_") for verb in VERBS} <= {
        path.stem.rstrip("_") for path in (ROOT / "d4s" / "cli").glob("*.py")
    }, "one file a verb"


def test_the_command_line_loads_nothing_slow_before_a_verb_runs():
    script = (
        "import sys, d4s\n"
        "before = set(sys.modules)\n"
        "import d4s.cli\n"
        "loaded = {name for name in set(sys.modules) - before if not name.startswith('d4s.cli')}\n"
        "assert not loaded & {'matplotlib', 'pandas', 'lm_eval', 'transformers'}, loaded\n"
        "names = {'d4s.study', 'd4s.study.paper', 'd4s.study.paper.protocols'}  # of tables and figures, as data\n"
        "assert not [name for name in loaded - names if name.startswith('d4s')], loaded\n"
    )
    ended = run(sys.executable, "-c", script)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("command", "read"),
    [
        (("covariance", "m", "corpus.txt", "--out", "corpus.txt"), "corpus"),
        (("covariance", "--merge", "c.safetensors", "more", "--out", "./c.safetensors"), "merge"),
        (("targets", "m", "edits.json", "--out", "edits.json"), "edits"),
        (("tune", "m", "edits.json", "--out", "edits.json"), "edits"),
        (("alone", "m", "edits.json", "--out", "edits.json"), "edits"),
        (("evaluate", "m", "edits.json", "--rows", "edits.json"), "edits"),
        (("report", "run", "--edits", "edits.json", "--out", "edits.json"), "edits"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else value,
)
def test_what_is_read_is_not_written_over(command, read, place, capsys):
    files = {path: path.read_bytes() for path in map(Path, ("edits.json", "corpus.txt", "c.safetensors"))}
    said = failed(capsys, *command)
    assert f"{command[-2]} {command[-1].removeprefix('./')}: is the file that is read ({read})" in said
    assert all(path.read_bytes() == before for path, before in files.items())


def test_a_file_that_is_called_as_a_verb_is_written(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second time it is there
        done(capsys, "covariance", str(place / "m"), str(place / "corpus.txt"), "--out", "covariance")
