"""D4S's prior weight, layers and rule of the residual on a real model, each alone, with targets searched once.

python -m benchmarks.real.settings smollm2 counterfact.json --covariance c.safetensors --out settings [--count 100]

Cost on two idle cores, SmolLM2-135M: 100 targets 4 minutes, unless an earlier comparison's are given by --targets; each
setting 2 minutes. The edits are the first of the comparison's order (`benchmarks.real.comparison`).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import d4s
from d4s.methods import method_for


def settings(preset: Any) -> dict[str, dict[str, Any]]:
    """Label → what differs from the preset; the last edited layer, on which the targets hang, is the same in all."""
    layers = preset.layers
    found: dict[str, dict[str, Any]] = {
        f"λ {weight}": {"prior_weight": weight} for weight in (30, 100, 300, 1000, 3000)
    }
    found |= {
        f"layers {first}–{layers[-1]}": {"layers": list(range(first, layers[-1] + 1))} for first in layers[1:]
    }
    found["once"] = {"residual": "once"}
    return {label: {"method": "d4s"} | fields for label, fields in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("edits", type=Path, help="CounterFact, original or flat")
    parser.add_argument(
        "--covariance", type=Path, required=True, help="as benchmarks.real.comparison leaves it in --out"
    )
    parser.add_argument(
        "--targets", type=Path, help="of an earlier run; else they are searched, and kept in --out"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    model, tokenizer = d4s.load_model(options.model)
    preset = method_for("d4s", d4s.models.architectures.Anatomy(model))
    found = d4s.compare(
        model,
        tokenizer,
        d4s.load_edits(options.edits),
        {"preset": {"method": "d4s"}} | settings(preset),
        covariance=options.covariance,
        targets=options.targets,
        seeds=options.seed,
        shuffle=True,
        count=options.count,
        out=options.out,
    )
    found.save(options.out)
    print(found.summary())


if __name__ == "__main__":
    main()
