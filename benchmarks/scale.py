"""A hundred thousand edits on simulated keys, and what a million would cost on models that no machine here holds.

python -m benchmarks.scale --edits 100000 --d-in 512 --out scale

Simulated: keys of a decaying spectrum through `ClosedForm`, one a step, residuals of length 1. Told at each power of
two steps: processor seconds a step since the last one, bytes of the state, ‖Δ‖, and its bound ‖R‖ / (2 √λ_min(λC)),
which grows like √t. Reckoned: bytes by the code's own arithmetic, seconds by rates. Those of this machine are measured
(a copy, float64 and float32 products); an H100's are half of its data sheet's, and nothing of them has been measured.
OUT gets edits.csv, rates.csv and costs.csv. Cost on two cores: 1 to 2 minutes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.limits import limits
from d4s.change.closed_form import DELAYED_ROWS, ClosedForm, Prior, bytes_of_layer
from d4s.change.expert_form import bytes_of_experts
from d4s.files import write_table
from d4s.sequence.journaling import bytes_of_journal

ROWS, AFTER, LOOKS, CONTEXT = (
    7,
    8,
    25,
    22,
)  # of a target's search: rows, tokens each, looks; tokens of a key's row
H100 = {"bytes": 3.35e12 / 2, "float64": 67e12 / 2, "bfloat16": 989e12 / 2, "memory": 80e9}
MONTH = 30 * 86_400


@dataclass(frozen=True)
class Model:
    """What costs hang on. active: parameters that a token meets; layers: edited ones; last: the highest of them"""

    name: str
    blocks: int
    d_model: int
    d_in: int
    parameters: float
    active: float
    layers: int = 5
    last: int = 8
    experts: int = 1
    routed: int = 1


MODELS = (
    Model("8B dense", 32, 4096, 14_336, 8e9, 8e9),
    Model("70B dense", 80, 8192, 28_672, 70e9, 70e9, last=21),
    Model("30B-A3B", 48, 2048, 768, 30e9, 3e9, last=12, experts=128, routed=8),
)


def simulated(edits: int, d_in: int, d_out: int, seed: int) -> list[dict[str, float]]:
    """A row at each power of two steps, and at the end."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scale = torch.logspace(0, -1, d_in, dtype=torch.float64)
    corpus = draw(4 * d_in, d_in) * scale
    prior = Prior(corpus.T @ corpus / len(corpus), weight=100.0)
    least = float(torch.linalg.eigvalsh(prior.matrix)[0])
    closed = ClosedForm({0: prior}, d_out, seed=seed)
    square, spent, made, told = 0.0, 0.0, 0, 0
    rows: list[dict[str, float]] = []
    while made < edits:
        keys, residuals = draw(DELAYED_ROWS, d_in) * scale, draw(DELAYED_ROWS, d_out)
        residuals /= residuals.norm(dim=1, keepdim=True)
        for i in range(min(DELAYED_ROWS, edits - made)):
            began = time.process_time()
            closed.add_(residuals[i : i + 1], keys[i : i + 1], 0)
            delta = closed.delta(0)
            spent += time.process_time() - began
            square += float(residuals[i].square().sum())
            made += 1
            if made >= DELAYED_ROWS and (made & (made - 1) == 0 or made == edits):
                bound = square**0.5 / (2 * least**0.5)
                rows.append(
                    {
                        "edits": made,
                        "seconds_a_step": spent / (made - told),
                        "bytes": closed.nbytes,
                        "norm": float(delta.norm()),
                        "bound": bound,
                        "refreshes": closed.refreshes,
                    }
                )
                told, spent = made, 0.0
    return rows


def state_bytes(model: Model, edits: int) -> int:
    """Of all edited layers."""
    if model.experts == 1:
        return model.layers * sum(bytes_of_layer(model.d_model, model.d_in).values())
    parts = bytes_of_experts(model.d_model, model.d_in, model.experts, model.routed * ROWS, edits)
    return model.layers * sum(parts.values())


def cost(model: Model, edits: int, devices: int, rates: dict[str, float], batch: int = 1) -> dict[str, Any]:
    """Seconds and bytes of a sequence whose searches are shared, and whose steps are made one after another."""
    above = 1 - (model.last + 1) / model.blocks
    below = 1 - above
    a_token = 2 * model.active  # operations forward
    searching = ROWS * AFTER * LOOKS * 2 * above * a_token + ROWS * CONTEXT * a_token
    steps, tokens = edits / batch, batch * (ROWS + 1) * CONTEXT
    # A step's few tokens cost as much as the weights below cost to be read; of experts those that any of them goes to.
    read = 2 * min(model.parameters, model.active * (tokens if model.experts > 1 else 1))
    a_pass = max(tokens * a_token / rates["bfloat16"], read / rates["bytes"])
    keys = steps * model.layers * below * a_pass
    if model.experts == 1:
        moved = 8 * (model.d_in**2 + 3 * model.d_model * model.d_in)
        single = edits * moved / rates["bytes"]
        whole = steps * (model.d_in**3 / 3 + 2 * model.d_model * model.d_in**2) / rates["float64"]
        solving = model.layers * min(single, whole)
    else:
        # Row n meets the n before it: L is read, and the Y of its experts.
        touched = min(model.experts, model.routed * ROWS)
        rows = edits**2 / 2 * (edits / 3 * 2 + touched * model.d_in)  # Σ (n² + n · touched · d_in)
        solving = model.layers * 8 * rows / rates["bytes"]
    weights = 2 * model.parameters
    of_w = model.layers * model.experts * model.d_model * model.d_in
    state = state_bytes(model, edits)
    held = weights + 2 * 2 * of_w + state
    dense = [(model.d_model, model.d_in)] * model.layers
    sums = dense if model.experts == 1 else []
    journal = bytes_of_journal(2 * of_w, state, edits, sums)
    seconds = {
        "searches": edits * searching / rates["bfloat16"] / devices,
        "keys": keys,
        "closed form": solving,
    }
    longest = max(seconds, key=lambda name: seconds[name])
    breaks = []
    if (least := held / rates["memory"]) > devices:
        breaks.append(f"memory: {least:.0f} devices of {rates['memory'] / 1e9:.0f} GB")
    if sum(seconds.values()) > MONTH:
        breaks.append(f"time: {longest}")
    return {
        "model": model.name,
        "edits": edits,
        "devices": devices,
        "batch": batch,
        "weights_bytes": weights,
        "state_bytes": state,
        "journal_bytes": journal,
        **{f"{name.replace(' ', '_')}_seconds": taken for name, taken in seconds.items()},
        "seconds": sum(seconds.values()),
        "longest": longest,
        "breaks": "; ".join(breaks),
    }


def most_edits(model: Model, devices: int, rates: dict[str, float]) -> int:
    """Edits up to a billion whose state fits beside the weights on the devices."""
    room = devices * rates["memory"] - 2 * model.parameters
    low, high = 0, 10**9
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if state_bytes(model, middle) <= room else (low, middle - 1)
    return low


def main(arguments: Sequence[str] | None = None) -> None:
    import pandas

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, default=100_000)
    parser.add_argument("--d-in", type=int, default=512)
    parser.add_argument("--d-out", type=int, default=128)
    parser.add_argument("--size", type=int, default=1024, help="of the matrices that rates are measured with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)

    made = simulated(options.edits, options.d_in, options.d_out, options.seed)
    write_table(pandas.DataFrame(made), options.out / "edits.csv")
    here = limits(torch.device("cpu"), options.size, 3)
    memory = torch.finfo(torch.float64).max  # of this machine nothing is reckoned but time
    here = {"bytes": here["bytes"], "float64": here["float64"], "bfloat16": here["float32"], "memory": memory}
    rates = {"these two cores": here, "H100, half its data sheet": H100}
    table = [{"machine": name, **found} for name, found in rates.items()]
    write_table(pandas.DataFrame(table).drop(columns="memory"), options.out / "rates.csv")
    rows = []
    for machine, found in rates.items():
        for model in MODELS:
            for edits in (1_000, 10_000, 100_000, 1_000_000):
                for devices in (1,) if found is here else (8, 64):
                    rows.append({"machine": machine, **cost(model, edits, devices, found)})
                    most = most_edits(model, devices, found) if found is not here else None
                    rows[-1]["most_edits"] = most
    write_table(pandas.DataFrame(rows), options.out / "costs.csv")
    for one in made:
        print(
            f"{one['edits']:>8.0f} edits: {1e3 * one['seconds_a_step']:.3f} ms a step, {one['bytes'] / 1e6:.1f} MB, "
            f"norm {one['norm']:.2f} ≤ {one['bound']:.2f}"
        )
    for row in rows:
        print(
            f"{row['machine']}, {row['devices']}: {row['edits']} edits of {row['model']}: "
            f"{row['seconds'] / 3600:.3g} h, most of it {row['longest']}; {row['breaks'] or 'fits'}"
        )


if __name__ == "__main__":
    main()
