"""Interruptions: whatever the moment, the weights hold the edits of the table, no more and no less."""

from __future__ import annotations

import os
import signal
import sys
import threading

import pytest
import torch
from support.sequences import EDITS as RECORDED
from support.sequences import FAST, ready, same, sequence, state
from support.tiny import tiny_model, tiny_tokenizer

from d4s.edits import Edit
from d4s.errors import EditError
from d4s.interrupts import Heard, Terminated, deferred, ending_signals_raise, hear
from d4s.locate import targets
from d4s.methods import base
from d4s.models.architectures import Anatomy
from d4s.sequence import under_way
from d4s.sequence.run import edit_sequence

EDITS = [
    Edit("{} worked for", "Steve Jobs", "Manila", id="a"),
    Edit("The twin city of {} is", "Lyon", "Paris", id="b"),
]
OPTIONS = dict(method="ft-m", config={"steps": 1, "learning_rate": 0.1}, original=False, progress=False)
WATCHED = {under_way.__file__, base.__file__}


def weight_of(model) -> torch.Tensor:
    anatomy = Anatomy(model)
    return torch.cat([anatomy.weight(layer).detach().flatten() for layer in range(len(anatomy))]).clone()


def weights_after_each_edit() -> list[torch.Tensor]:
    found = []
    model = tiny_model("gpt2", 1)

    def measure():
        found.append(weight_of(model))
        return {}

    edit_sequence(model, tiny_tokenizer(), EDITS, evaluate_every=1, measure=measure, **OPTIONS)
    return found


class Injector:
    """Traces the lines of the sequence's own code and acts once, at the line of the given number."""

    def __init__(self, line: int | None, act) -> None:
        self.left, self.act, self.seen = line, act, 0

    def __call__(self, frame, event, _argument):
        if frame.f_code.co_filename not in WATCHED:
            return None
        if event == "line" and frame.f_code.co_name in ("step", "_make", "edit", "all_or_nothing"):
            self.seen += 1
            if self.seen == self.left:
                self.act()
        return self


def run_under(injector: Injector):
    model = tiny_model("gpt2", 1)
    before = sys.gettrace()
    sys.settrace(injector)
    try:
        edit_sequence(model, tiny_tokenizer(), EDITS, **OPTIONS)
    except KeyboardInterrupt as error:
        return model, error
    finally:
        sys.settrace(before)
    return model, None


def raise_interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("how", ["signal", "exception"])
def test_an_interruption_at_any_line_of_a_step_finds_weights_and_rows_of_the_same_edits(how):
    truth = weights_after_each_edit()
    count = Injector(None, lambda: None)
    run_under(count)
    assert count.seen > 30  # two steps
    act = raise_interrupt if how == "exception" else lambda: os.kill(os.getpid(), signal.SIGINT)
    made = set()
    for line in range(1, count.seen + 1):
        model, error = run_under(Injector(line, act))
        assert error is not None, line
        result = error.result
        made.add(len(result.edits_table))
        assert torch.equal(weight_of(model), truth[len(result.edits_table)]), line
        assert f"after edit {len(result.edits_table)}" in result.failure
    assert made == {0, 1, 2}


def test_a_step_that_was_taken_back_is_not_built_upon():
    """The editor's sums may hold the edit that the weights no longer have."""
    model = tiny_model("gpt2", 1)
    first = weight_of(model)
    seen = Injector(None, lambda: None)

    def tail(frame, event, argument):
        code = frame.f_code
        if event == "line" and code.co_name == "_make" and frame.f_locals.get("step") is not None:
            seen.seen += 1
            if seen.seen == 1:
                raise KeyboardInterrupt
        return tail if code.co_filename in WATCHED else None

    before = sys.gettrace()
    sys.settrace(tail)
    try:
        with pytest.raises(KeyboardInterrupt) as raised:
            edit_sequence(model, tiny_tokenizer(), EDITS, **OPTIONS)
    finally:
        sys.settrace(before)
    result = raised.value.result
    assert torch.equal(weight_of(model), first) and result.edits_table == []
    with pytest.raises(EditError, match="failed half-way"):
        result.editor.edit(EDITS[:1])
    result.restore()
    result.editor.edit(EDITS[:1])


def test_signals_wait_for_the_end_and_a_second_ctrl_c_does_not(capfd):
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    reached = []
    with pytest.raises(KeyboardInterrupt), deferred():
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("first")
    with pytest.raises(KeyboardInterrupt), deferred():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("second")
    with pytest.raises(Terminated) as ended, ending_signals_raise(), deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append("third")
    assert reached == ["first", "third"] and ended.value.status == 143
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert capfd.readouterr().err.count("stopping as soon as") == 3


@pytest.mark.parametrize(
    ("method", "config"), [("d4s", {"anchor": "current"}), ("memit", {}), ("memit-seq", {}), ("lyaplock", {})]
)
def test_a_signal_is_heard_in_the_search_by_which_a_step_begins(method, config, monkeypatch, tmp_path, seed):
    model, covariance = ready(seed)
    first, look, looks = state(model), targets._look, []

    def signalled(*arguments):
        looks.append(1)
        if len(looks) == count:
            os.kill(os.getpid(), signal.SIGTERM)
        return look(*arguments)

    monkeypatch.setattr(targets, "_look", signalled)
    options = {"config": FAST | {"steps": 4, "stop_loss": 0.0}, "journal": tmp_path / "j", "batch_size": 3}
    options |= {"method": method, "original": False}
    options["config"] |= config
    count = 6  # of the second step, whose four looks are the fifth to the eighth
    with pytest.raises(KeyboardInterrupt) as raised:
        sequence(model, covariance, RECORDED[:6], **options)
    result = raised.value.result
    assert isinstance(raised.value.__cause__, Terminated) or isinstance(raised.value.__context__, Terminated)
    assert len(looks) == count and len(result.edits_table) == 3
    assert not result.editor.torn, "nothing was changed, so that its state could be kept"
    after_three = state(model)
    result.restore()
    assert same(state(model), first) and not same(after_three, first)
    count = -1
    gone_on = sequence(model, covariance, RECORDED[:6], **options)
    assert len(gone_on.edits_table) == 6 and len(looks) == 6 + 4, "the first step is not made again"
    weights = state(model)
    gone_on.restore()
    whole = sequence(model, covariance, RECORDED[:6], **(options | {"journal": None}))
    assert same(weights, state(model)) and whole.failure is None


def test_what_has_begun_to_change_something_does_not_hear():
    reached = []
    with pytest.raises(Terminated), ending_signals_raise(), deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        with deferred():  # in which nothing came
            hear()
        reached.append("within")
        with pytest.raises(Heard):
            hear()
        reached.append("heard")
    hear()
    assert reached == ["within", "heard"]


def test_a_handler_of_the_callers_own_may_go_on(seed):
    model, covariance = ready(seed)
    seen, look, looks = [], targets._look, []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: seen.append(number))

    def signalled(*arguments):
        looks.append(1)
        if len(looks) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return look(*arguments)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(targets, "_look", signalled)
            result = sequence(model, covariance, RECORDED[:2], method="memit", original=False)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM] and len(result.edits_table) == 2 and result.failure is None


def test_a_step_that_has_written_comes_to_its_end(seed):
    """ROME searches and writes edit by edit."""
    model, covariance = ready(seed)
    look, looks = targets._look, []

    def signalled(*arguments):
        looks.append(1)
        if len(looks) == 3:  # in the second edit's search
            os.kill(os.getpid(), signal.SIGTERM)
        return look(*arguments)

    options = {"config": {"steps": 2, "contexts": 0}, "method": "rome", "batch_size": 3, "original": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "_look", signalled)
        with pytest.raises(KeyboardInterrupt) as raised:
            sequence(model, covariance, RECORDED[:6], **options)
    assert len(raised.value.result.edits_table) == 3 and not raised.value.result.editor.torn


def test_a_signal_is_not_lost_in_a_step_that_fails():
    with pytest.raises(Terminated) as ended, ending_signals_raise(), deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        raise EditError("the step failed")
    assert ended.value.status == 143 and isinstance(ended.value.__context__, EditError)


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with ending_signals_raise(), deferred():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_signals_are_left_alone():
    found = []

    def work():
        with ending_signals_raise(), deferred():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]
