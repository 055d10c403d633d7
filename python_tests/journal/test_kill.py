"""Processes that are killed at any moment: the next one goes on to the same weights and the same history, bit for bit.

D4S_TEST_KILLS=50 also kills a sequence of 60 edits so many times; some minutes.
"""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.faults import Kept, counted, forked, killed, nothing_half, was_killed
from support.sequences import EDITS, ready

from d4s.edits import Edit
from d4s.sequence import journaling

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture
def draw(seed: int) -> random.Random:
    return random.Random(seed)


@pytest.fixture
def small_parts(monkeypatch) -> None:
    """Windows of targets, segments and snapshots end within a few edits, at different ones."""
    monkeypatch.setattr("d4s.methods.locate_then_edit.EDITS_AHEAD", 4)
    monkeypatch.setattr(journaling, "SEGMENT_EVERY", 3)
    monkeypatch.setattr(journaling, "SNAPSHOT_EVERY", 2)


def many(count: int) -> list[Edit]:
    """Every fifth one changes a fact that an earlier one has changed."""
    found: list[Edit] = []
    for i in range(count):
        if i % 5 == 4:
            found.append(replace(found[i - i // 5 % 4 - 1], target_new="Bordeaux", id=f"again {i}"))
        else:
            edit = EDITS[i % len(EDITS)]
            subject = f"{edit.subject} {chr(65 + i // len(EDITS))}"
            found.append(replace(edit, subject=subject, paraphrases=(), id=f"{i}"))
    return found


def test_a_kill_at_any_write_is_survived(small_parts, draw: random.Random, seed: int, tmp_path: Path) -> None:
    """At each fourth point, of which it is another one in every run with a fresh seed; at all with D4S_TEST_KILLS."""
    kept = Kept(*ready(seed), EDITS[:3], original=False)
    with counted().watched() as points:
        kept.run(tmp_path / "counted").restore()
    assert len(points.kinds) > 50
    every = 1 if "D4S_TEST_KILLS" in os.environ else 4
    for number in range(1 + draw.randrange(every), len(points.kinds) + 1, every):
        journal, how = tmp_path / str(number), draw.choice(("before", "half", "after"))

        def work(journal: Path = journal, number: int = number, how: str = how) -> None:
            with killed(number, how).watched():
                kept.run(journal)

        assert was_killed(forked(work))
        nothing_half(journal)
        kept.goes_on(journal)


@pytest.mark.parametrize("method", ["d4s", "memit", "grace"])
def test_a_sequence_is_killed_again_and_again(
    small_parts, draw: random.Random, seed: int, tmp_path: Path, method: str
) -> None:
    """Each life ends at some write after its start, the first of them while it still goes on from the last one."""
    config = {} if method == "d4s" else {"method": method}
    if method == "grace":
        config["config"] = dict(layers=[1], steps=2)
    kept = Kept(*ready(seed), many(10), **config)
    lives = 0
    while True:
        # The first five are short: lives as long as these may be would now and then reach the end before.
        most = 7 if lives < 5 else 100
        number = 1 + min(int(draw.expovariate(1 / 12)), most)
        how = draw.choice(("before", "half", "after"))

        def work(number: int = number, how: str = how) -> None:
            with killed(number, how).watched():
                kept.run(tmp_path / "j")

        if not was_killed(forked(work)):
            break
        lives += 1
        nothing_half(tmp_path / "j")
    print(f"{lives} kills")
    assert lives >= 5
    kept.goes_on(tmp_path / "j")


def at_times(kept: Kept, journal: Path, draw: random.Random, kills: int, longest: float) -> set[int]:
    """Kills at random moments; the lengths of the log that they left."""
    lengths = set()
    for _ in range(kills):
        child = forked(lambda: kept.run(journal))
        time.sleep(draw.uniform(0.0, longest))
        os.kill(child, signal.SIGKILL)
        was_killed(child)
        log = journal / "log.jsonl"
        lengths.add(log.stat().st_size if log.exists() else 0)
    return lengths


def test_a_sequence_is_killed_at_random_moments(
    small_parts, draw: random.Random, seed: int, tmp_path: Path
) -> None:
    kept = Kept(*ready(seed), many(12))
    began = time.perf_counter()
    kept.run(None).restore()
    at_times(kept, tmp_path / "j", draw, kills=10, longest=(time.perf_counter() - began) / 2)
    kept.goes_on(tmp_path / "j")


@pytest.mark.skipif("D4S_TEST_KILLS" not in os.environ, reason="minutes: D4S_TEST_KILLS=50")
def test_sixty_edits_are_killed_as_often_as_asked(
    monkeypatch, draw: random.Random, seed: int, tmp_path: Path
) -> None:
    monkeypatch.setattr("d4s.methods.locate_then_edit.EDITS_AHEAD", 16)
    monkeypatch.setattr(journaling, "SEGMENT_EVERY", 7)
    monkeypatch.setattr(journaling, "SNAPSHOT_EVERY", 17)
    kills = int(os.environ["D4S_TEST_KILLS"])
    kept = Kept(*ready(seed), many(60), evaluate_every=20)
    began = time.perf_counter()
    kept.run(None).restore()
    lasts = time.perf_counter() - began
    lengths = at_times(kept, tmp_path / "j", draw, kills, longest=max(1.0, 4 * lasts / kills))
    print(f"{kills} kills of what takes {lasts:.1f} s, at {len(lengths)} different lengths of the log")
    assert len(lengths) > kills // 3
    kept.goes_on(tmp_path / "j")
