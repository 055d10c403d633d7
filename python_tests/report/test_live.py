"""The view of a sequence under way: what it says, when it warns, and what it leaves behind; and TensorBoard."""

from __future__ import annotations

import importlib.util
import io
import sys
from types import SimpleNamespace

import pytest
from support.command import RECORDS, failed
from support.sequences import EDITS, FAST, ready, sequence

from d4s.errors import ConfigError
from d4s.report.live import STRETCH, Live, Watch, is_there
from d4s.report.tensorboard import TensorBoard
from d4s.sequence.observers import Observer

needs_rich = pytest.mark.skipif(importlib.util.find_spec("rich") is None, reason="rich is not installed")
needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)


def grown(growths):
    watch = Watch()
    for made, growth in growths:
        watch.grew(made, growth)
    return watch


def test_norms_that_double_from_half_of_the_edits_on_are_a_warning():
    """A look every edit: growing with the edits, by a root of them, and by 7 % an edit on top of the last one."""
    assert (
        grown((n, 0.02 * n) for n in range(1, 3000)).warning() is None
    )  # 1 + g: less than twice that of half
    assert grown((n, 0.1 * n**0.5) for n in range(1, 3000)).warning() is None
    assert grown((n, 1.07**n - 1) for n in range(1, 20)).warning() is None  # 1.07^10 is 1.97
    said = grown((n, 1.07**n - 1) for n in range(1, 23)).warning()  # 1.07^11 is 2.1
    assert said is not None and said.endswith("mean |w| is 2.1 times what it was after 11 edits")
    # Few looks: none at half as many edits or later, but the last, says nothing.
    assert grown([(100, 50.0)]).warning() is None
    assert grown([(60, 0.5), (100, 50.0)]).warning() is not None
    assert grown([(4, 0.5), (8, 50.0)]).warning() is None, "too few edits"
    for number in (float("inf"), float("nan")):
        assert "no longer finite after 3 edits" in (grown([(3, number)]).warning() or "")


def test_edits_that_take_less_and_less_are_a_warning():
    watch = Watch()
    watch.efficacy = [1.0] * STRETCH + [0.0] * (STRETCH // 4)
    assert watch.warning() is None, "the last hundred overlap the first"
    watch.efficacy = [1.0] * STRETCH + [1.0, 0.75, 0.75, 0.5] * (STRETCH // 4)
    assert watch.takes() == 0.75 and watch.warning() is None
    watch.efficacy[-1] = 0.0
    assert (watch.warning() or "").startswith("collapse is near: of the last 100 edits 74 % took")
    watch.efficacy = [0.5] * STRETCH + [0.5] * STRETCH
    assert watch.warning() is None, "a level is the method's own"


class Clock:
    """A second each time it is asked."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


class Told(Observer):
    """What the view says after each test and point, and what standard error is meanwhile."""

    def __init__(self, live) -> None:
        self.live, self.words, self.errors = live, [], []

    def tested(self, result, batch, figures):
        self.words.append(self.live.words())
        self.errors.append(sys.stderr)

    point = lambda self, result: self.words.append(self.live.words())  # noqa: E731


@needs_rich
def test_the_view_tells_pace_time_left_efficacy_and_norms(seed):
    from rich.console import Console

    drawn = io.StringIO()
    live = Live(Console(file=drawn, force_terminal=True, width=160), clock=Clock())
    told = Told(live)
    model, covariance = ready(seed)
    before = sys.stderr
    result = sequence(model, covariance, observers=[live, told], evaluate_every=4, batch_size=2)
    assert sys.stderr is before and all(one is not before for one in told.errors)
    text = drawn.getvalue()
    assert "d4s" in text and "7/7 edits" in text
    # A step takes the clock's one second; the point between asks it once, and is not counted.
    first, last = told.words[0], told.words[-1]
    assert first[:3] == ["2/7 edits", "2.00 edits/s", "0:02 left"]
    assert last[:3] == ["7/7 edits", "1.75 edits/s", "0:00 left"]
    takes = result.history[-1]["original_efficacy"]
    assert f"right after: {100 * takes:.1f} %" in last
    assert f"mean |w| {100 * result.history[-1]['l1_growth']:+.2f} %" in last
    assert f"average {100 * result.history[-1]['average']:.1f} %" in last


class Counted(Observer):
    """How many edits the view says there are, after each step."""

    def __init__(self, live) -> None:
        self.live, self.said = live, []

    def step(self, result, batch):
        self.said.append(self.live.words()[0])


@needs_rich
def test_the_view_counts_what_a_later_pass_makes_again(seed):
    from rich.console import Console

    live = Live(Console(file=io.StringIO(), force_terminal=True, width=160), clock=Clock())
    told = Counted(live)
    weak = FAST | {"clamp": 0.05}  # few of a random model's edits take
    result = sequence(*ready(seed), config=weak, observers=[live, told], passes=2)
    made = len(result.edits_table)
    assert made > 7 and told.said == [f"{i}/{7 if i <= 7 else made} edits" for i in range(1, made + 1)]


@needs_rich
def test_the_view_is_drawn_on_standard_error_as_it_was(seed, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    assert is_there()
    live, meanwhile = Live(), []
    result = SimpleNamespace(
        edits=EDITS, edits_table=[], method="d4s", history=[{"step": 0, "l1_norm.0": 1.0}]
    )
    live.began(result)
    try:
        live.view.refresh()
        meanwhile.append(terminal.getvalue())
        print("a line", file=sys.stderr)
        live.beneath = "scoring:  50%"
        live.view.refresh()
    finally:
        live.ended(result, None)
    assert "0/7 edits" in meanwhile[0] and sys.stderr is terminal
    assert "a line" in terminal.getvalue() and "scoring:  50%" in terminal.getvalue()


@needs_rich
def test_a_bar_beside_the_view_stands_beneath_it_and_lines_above(seed):
    from rich.console import Console

    from d4s.progress import progress_bar

    drawn = io.StringIO()
    live = Live(Console(file=drawn, force_terminal=True, width=120), clock=Clock())
    result = SimpleNamespace(
        edits=EDITS, edits_table=[], method="d4s", history=[{"step": 0, "l1_norm.0": 1.0}]
    )
    live.began(result)
    live.said = io.StringIO()
    live.said.isatty = lambda: True
    try:
        bar = progress_bar(10, "edit", "scoring")
        bar.update(5)
        bar.refresh()
        assert live.beneath.startswith("scoring:  50%")
        print("a line [of its own]", file=sys.stderr)
        bar.close()
        assert live.beneath == "" and live.said.getvalue() == ""
    finally:
        live.said = sys.__stderr__
        live.ended(result, None)
    assert "a line [of its own]" in drawn.getvalue()


@needs_rich
def test_a_warning_stays_above_the_view(seed):
    from rich.console import Console

    drawn = io.StringIO()
    live = Live(Console(file=drawn, force_terminal=True, width=160), clock=Clock())
    result = SimpleNamespace(
        edits=[None] * 40, edits_table=[], method="rome", history=[{"step": 0, "l1_norm.0": 1.0}]
    )
    norms = {0: 1.0}
    result.editor = SimpleNamespace(weights=SimpleNamespace(mean_absolute=lambda: dict(norms)))
    live.began(result)
    for _ in range(40):
        norms[0] *= 1.1
        result.edits_table.append({})
        live.step(result, [None])
    live.ended(result, None)
    lines = [line for line in drawn.getvalue().splitlines() if "rome, after " in line]
    assert len(lines) == 1 and "rome, after 16 edits: collapse is near" in lines[0]  # 1.1^8 is 2.14


def test_beside_a_view_there_is_no_bar_and_without_one_there_is(seed, capsys):
    class Drawing(Observer):
        draws = True

    model, covariance = ready(seed)
    for observers in ([], [Drawing()]):
        bars = []

        class Saw(Observer):
            def began(self, result, bars=bars):
                import tqdm

                bars += [bar for bar in tqdm.tqdm._instances if bar.desc.startswith("d4s")]

        result = sequence(model, covariance, EDITS[:1], observers=[*observers, Saw()], progress=True)
        result.restore()
        assert len(bars) == (0 if observers else 1)


def test_a_log_has_no_view(capsys):
    assert not is_there()


@pytest.mark.parametrize(
    "missing, make, cure",
    [
        ("rich", Live, r"pip install rich$"),
        ("tensorboard", lambda: TensorBoard("tb"), r"--tensorboard tb: .* pip install tensorboard$"),
    ],
)
def test_what_is_not_installed_is_said_with_its_cure(missing, make, cure, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else found(name))
    with pytest.raises(ConfigError, match=cure):
        make()


def test_the_verb_says_so_before_it_loads_a_model(capsys, monkeypatch, tmp_path):
    import json

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "e.json").write_text(json.dumps(RECORDS))
    for verb in ("edit", "compare"):
        out = str(tmp_path / verb)
        line = failed(capsys, verb, "no-model", str(tmp_path / "e.json"), "--out", out, "--tensorboard", "tb")
        assert "pip install tensorboard" in line


@needs_tensorboard
def test_a_folder_for_scalars_is_made_with_the_first(seed, tmp_path):
    """In the folder of a comparison it would be something that is not the comparison's."""
    model, covariance = ready(seed)
    board = TensorBoard(tmp_path / "out" / "tb")
    assert not (tmp_path / "out").exists()
    sequence(model, covariance, EDITS[:1], observers=[board]).restore()
    assert (tmp_path / "out" / "tb" / "d4s").is_dir()


@needs_tensorboard
def test_scalars_are_those_of_the_result(seed, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model, covariance = ready(seed)
    board = TensorBoard(tmp_path / "tb")
    for _ in range(2):
        result = sequence(model, covariance, observers=[board], evaluate_every=4)
        result.restore()
    assert sorted(path.name for path in (tmp_path / "tb").iterdir()) == ["d4s", "d4s-2"]
    events = EventAccumulator(str(tmp_path / "tb" / "d4s-2"))
    events.Reload()

    def read(name):
        return [(one.step, one.value) for one in events.Scalars(name)]

    for name in ("average", "l1_growth", "l1_norm.1", "efficacy.unedited"):
        expected = [(row["step"], row[name]) for row in result.history if name in row]
        assert read(f"point/{name}") == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]
    probabilities = [row["written_probability"] for row in result.edits_table]
    assert read("tested/target_probability") == [
        (i + 1, pytest.approx(value, rel=1e-6)) for i, value in enumerate(probabilities)
    ]
    assert len(read("step/last_probability")) == len(EDITS)
    assert not [
        name for name in events.Tags()["scalars"] if name.endswith((".low", ".high")) or "point/step" in name
    ]
