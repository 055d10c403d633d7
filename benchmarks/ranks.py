"""Two processes of one thread each, against one of two threads, on two cores: `python -m benchmarks.ranks`.

Key statistics, targets, edits and their evaluation by the command line, each in a folder of its own; the seconds are a
command's whole, loading included, and the best of the rounds. Only of a machine that has nothing else to do is the
ratio worth anything: the load before each round is printed beside it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

TARGET = 1.5  # times as fast


def commands(options: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """Name → arguments of d4s, in the order in which they need one another."""
    edits = [options.edits, "--limit", str(options.count)]
    statistics = str(folder / "c.safetensors")
    found = {
        "covariance": ["covariance", options.model, *options.corpus, "--out", statistics],
        "targets": ["targets", options.model, *edits, "--out", str(folder / "t.safetensors")],
        "edit": ["edit", options.model, *edits, "--out", str(folder / "run"), "--covariance", statistics],
        "evaluate": ["evaluate", options.model, *edits],
    }
    return {name: [*arguments, "--device", "cpu"] for name, arguments in found.items()}


def seconds(start: list[str], threads: int, options: argparse.Namespace) -> dict[str, float]:
    """Of each command, started so."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with TemporaryDirectory() as folder:
        found = {}
        for name, arguments in commands(options, Path(folder)).items():
            began = time.perf_counter()
            subprocess.run(
                [*start, "-m", "d4s", *arguments], env=environment, check=True, capture_output=True
            )
            found[name] = time.perf_counter() - began
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--edits", default="embedded")
    parser.add_argument("--corpus", nargs="*", default=[], help="text file; default: sampled by one process")
    parser.add_argument("--count", type=int, default=64, help="edits")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ways = {"one process": ([sys.executable], 2), "two processes": ([sys.executable, *launcher], 1)}
    best: dict[str, dict[str, float]] = {way: {} for way in ways}
    for number in range(options.rounds):
        load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
        print(f"round {number + 1} of {options.rounds}, load before it {load}", flush=True)
        for way, (start, threads) in ways.items():
            for name, spent in seconds(start, threads, options).items():
                best[way][name] = min(spent, best[way].get(name, spent))
    one, two = best.values()
    for name in one:
        print(
            f"{name}: {one[name]:.1f} s in one process, {two[name]:.1f} s in two: {one[name] / two[name]:.2f} times"
        )
    whole = sum(one.values()) / sum(two.values())
    print(f"together: {whole:.2f} times, target {TARGET} ({'met' if whole >= TARGET else 'not met'})")


if __name__ == "__main__":
    main()
