"""What a device can do at most, measured, and what share of it each op of d4s reaches.

python -m benchmarks.limits --device cuda --out limits.json

The limits are a copy's bandwidth and the library's own matrix products by type, on a GPU TF32 among them. A row an op:
the bytes that it has to move or the operations that it has to make, its seconds, and the share of the limit that
follows. Cost: seconds.
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
from d4s.locate.precision import products_in

# That an op of bandwidth passes over on a GPU: more than a cache holds, and than a launch takes.
BYTES = 2**29


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
    if device.type == "cuda":
        a = torch.randn(size, size, device=device)
        with products_in("reduced", device):
            found["tf32"] = 2 * size**3 / seconds_of(lambda: a @ a, device, rounds)
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
        # Half of the products, since the sum is symmetric; on a GPU a float32 key is two TF32 numbers, four products.
        as_tf32 = device.type == "cuda" and dtype == torch.float32
        row(
            f"key covariance, {kind} keys",
            "tf32" if as_tf32 else kind,
            (4 if as_tf32 else 1) * len(keys) * d_in**2,
            lambda k=keys, m=moment: ops.accumulate_key_covariance_(m, k),  # type: ignore[misc]
        )
        many = max(1, BYTES // (d_out * d_in * dtype.itemsize)) if device.type == "cuda" else 1
        bases = [torch.randn(d_out, d_in, device=device).to(dtype) for _ in range(many)]
        weights = [base.clone() for base in bases]
        deltas = [torch.zeros(d_out, d_in, device=device, dtype=torch.float64) for _ in bases]

        def write(weights=weights, bases=bases, deltas=deltas) -> None:  # type: ignore[no-untyped-def]
            for weight, base, delta in zip(weights, bases, deltas, strict=True):
                ops.write_back_(weight, base, delta)

        row(
            f"write-back and norms, {kind}",
            "bytes",
            2 * bases[0].nbytes + deltas[0].nbytes,
            write,
            many,
        )
        row(
            f"L1 norm, {kind}",
            "bytes",
            bases[0].nbytes,
            lambda b=bases: ops.l1_norms(b),  # type: ignore[misc]
            many,
        )
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
