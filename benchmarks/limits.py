"""What a device can do at most, measured, and what share of it each op of d4s reaches.

python -m benchmarks.limits --device cuda --out limits.json

The limits are a copy's bandwidth and the library's own matrix products by type. A row an op: the bytes that it has to
move or the operations that it has to make, its seconds, and the share of the limit that follows. Cost: seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import compare, device_name
from d4s import ops
from d4s.change.closed_form import DELAYED_ROWS, ClosedForm, Prior
from d4s.files import write_json


def seconds_of(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    return compare(work, lambda: None, device, rounds=rounds)[0]


def limits(device: torch.device, size: int, rounds: int) -> dict[str, float]:
    """Bytes a second of a copy, read and written; operations a second of products, by type."""
    source = torch.randn(size * size * 4, device=device)
    target = torch.empty_like(source)
    found = {"bytes": 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device, rounds)}
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        a = torch.randn(size, size, device=device, dtype=torch.float32).to(dtype)
        taken = seconds_of(lambda a=a: a @ a, device, rounds)  # type: ignore[misc]
        found[str(dtype).removeprefix("torch.")] = 2 * size**3 / taken
    return found


def shares(device: torch.device, size: int, rounds: int, most: dict[str, float]) -> list[dict[str, Any]]:
    """A row an op."""
    rows: list[dict[str, Any]] = []

    def row(name: str, limit: str, amount: float, work: Callable[[], object], calls: int = 1) -> None:
        taken = seconds_of(work, device, rounds) / calls
        share = amount / taken / most[limit]
        rows.append({"op": name, "limit": limit, "amount": amount, "seconds": taken, "share": share})

    d_out, d_in = size // 2, size
    for dtype in (torch.float32, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        keys = torch.randn(4 * size, d_in, device=device).to(dtype)
        moment = torch.zeros(d_in, d_in, device=device)
        # Half of the products: the sum is symmetric.
        row(
            f"key covariance, {kind} keys",
            kind,
            len(keys) * d_in**2,
            lambda k=keys, m=moment: ops.accumulate_key_covariance_(m, k),  # type: ignore[misc]
        )
        base = torch.randn(d_out, d_in, device=device).to(dtype)
        weight, delta = base.clone(), torch.zeros(d_out, d_in, device=device, dtype=torch.float64)
        row(
            f"write-back and norms, {kind}",
            "bytes",
            2 * base.nbytes + delta.nbytes,
            lambda w=weight, b=base, d=delta: ops.write_back_(w, b, d),  # type: ignore[misc]
        )
        row(f"L1 norm, {kind}", "bytes", base.nbytes, lambda b=base: ops.l1_norms([b]))  # type: ignore[misc]
    like: dict[str, Any] = {"dtype": torch.float64, "device": device}
    closed = ClosedForm({0: Prior.identity(d_in, float(d_in), device=device)}, d_out)
    residuals, keys = torch.randn(DELAYED_ROWS, d_out, **like), torch.randn(DELAYED_ROWS, d_in, **like)

    def edits() -> None:
        for i in range(DELAYED_ROWS):
            closed.add_(residuals[i : i + 1], keys[i : i + 1], 0)
            closed.delta(0)

    # P is read once, Δ read twice and written once.
    row("closed form, one edit", "bytes", 8 * (d_in**2 + 3 * d_out * d_in), edits, DELAYED_ROWS)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=4096, help="of the matrices")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    most = limits(device, options.size, options.rounds)
    rows = shares(device, options.size, options.rounds, most)
    write_json(
        {"format": "d4s-limits-1", "device": device_name(device), "limits": most, "ops": rows}, options.out
    )
    for one in rows:
        print(f"{one['op']}: {one['share']:.2f} of the limit ({one['limit']}), {1e3 * one['seconds']:.3g} ms")


if __name__ == "__main__":
    main()
