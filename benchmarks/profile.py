"""Where the time of one D4S sequence goes, ours and the originals' way: `python -m benchmarks.profile`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import originals
from benchmarks.bench_whole_sequence import both_ways
from benchmarks.measure import device_name, seconds, wait
from d4s.change.closed_form import ClosedForm
from d4s.change.weights import EditedWeights
from d4s.methods import locate_then_edit

OURS = {
    "targets": [(locate_then_edit, "optimise_targets")],
    "keys": [(locate_then_edit, "keys_at")],
    "closed form": [(ClosedForm, "add_"), (ClosedForm, "delta")],
    "weights and norms": [(EditedWeights, "write_")],
}
THEIRS = {
    "targets": [(originals, "target")],
    "keys": [(originals, "key"), (originals, "state")],
    "closed form": [(torch.linalg, "solve")],
}


@contextmanager
def timed(
    parts: dict[str, list[tuple[Any, str]]], spent: dict[str, float], device: torch.device
) -> Iterator[None]:
    """Seconds inside the functions of each part are added to `spent`."""

    def clocked(part: str, own: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            wait(device)
            began = time.perf_counter()
            try:
                return own(*arguments, **options)
            finally:
                wait(device)
                spent[part] += time.perf_counter() - began

        return run

    with ExitStack() as stack:
        for part, functions in parts.items():
            for owner, name in functions:
                stack.enter_context(patch.object(owner, name, clocked(part, getattr(owner, name))))
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--edits", type=int, default=128, help="of our sequence; of the originals' a tenth")
    options = parser.parse_args()
    device = torch.device(options.device)
    edits, ours, theirs = both_ways(device, options.edits)
    print(f"milliseconds an edit; {device_name(device)}")
    for title, way, parts, count in (
        ("the originals' way", theirs, THEIRS, max(2, options.edits // 10)),
        ("d4s", ours, OURS, options.edits),
    ):
        way(edits[:2])
        spent = dict.fromkeys(parts, 0.0)
        with timed(parts, spent, device):
            whole = seconds(lambda way=way, count=count: way(edits[:count]), device)
        spent["the rest"] = whole - sum(spent.values())
        cells = ", ".join(f"{part} {1e3 * s / count:.1f} ({s / whole:.0%})" for part, s in spent.items())
        print(f"{title}: {1e3 * whole / count:.1f}: {cells}")


if __name__ == "__main__":
    main()
