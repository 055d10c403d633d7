"""Ctrl-C and the signals that end a program: what has begun to change something comes to its end before they are heard,
and what was made is saved."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

_NAMES = ("SIGTERM", "SIGHUP", "SIGINT")  # SIGINT last: it is put back last, and raises where it is heard
_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))  # Windows has no SIGHUP


class Terminated(KeyboardInterrupt):
    """A signal that asks the program to end; `status` is what a shell then expects of it, 128 + its number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.status = 128 + number


class Heard(KeyboardInterrupt):
    """Raised by `hear`; what came is raised in its place at the end of `deferred`."""


@dataclass
class _Waiting:
    """What a `deferred` that is entered knows. came: signals; before: their handlers outside"""

    came: list[int] = field(default_factory=list)
    before: dict[int, Any] = field(default_factory=dict)
    has_changed: bool = False

    @property
    def ends(self) -> bool:
        """Whether what came ends the program, or raises: a handler of the caller's own may go on."""
        handler = self.before.get(self.came[0]) if self.came else None
        return handler in (signal.SIG_DFL, signal.default_int_handler) or getattr(handler, "raises", False)


_waiting: list[_Waiting] = []


def hear() -> None:
    """To be called now and then in long work: what waits inside `deferred` ends it, unless something has `changed`."""
    if _waiting and not _waiting[-1].has_changed and _waiting[-1].ends and _in_main_thread():
        raise Heard


def changed() -> None:
    """From here on `hear` hears nothing until the end of `deferred`."""
    if _waiting:
        _waiting[-1].has_changed = True


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def ending_signals_raise() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise `Terminated`, as Ctrl-C does KeyboardInterrupt; one that is ignored stays so."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise Terminated(number)

    end.raises = True  # type: ignore[attr-defined]
    before: dict[int, Any] = {}
    try:
        if _in_main_thread():
            for number in _SIGNALS:
                if number != signal.SIGINT and signal.getsignal(number) is signal.SIG_DFL:
                    before[number] = signal.signal(number, end)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, Ctrl-C and ending signals wait until the end, or for `hear`; a second Ctrl-C does not wait.

    Outside the main thread, which alone hears signals, nothing is done.
    """
    if not _in_main_thread():
        yield
        return
    own = _Waiting()
    came, before = own.came, own.before

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in came:
            heard = before[number]
            if callable(heard):
                heard(number, frame)
            raise KeyboardInterrupt
        if not came:
            # Not print: a signal may come while standard error is being written to.
            os.write(2, b"stopping as soon as nothing is half done; Ctrl-C again stops at once\n")
        came.append(number)

    try:
        _waiting.append(own)
        for number in _SIGNALS:
            # None: a handler that is not Python's. One that is ignored (nohup) stays so.
            if signal.getsignal(number) not in (None, signal.SIG_IGN):
                before[number] = signal.getsignal(number)
                signal.signal(number, note)
        yield
    finally:
        _waiting[:] = [one for one in _waiting if one is not own]
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:  # also where the step itself has failed
            signal.raise_signal(came[0])
