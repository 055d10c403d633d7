"""Targets searched once, and λ explored with them: how much of an edit arrives, and what it does to its neighbours.

    python examples/explore_prior.py --edits 20 --weights 60,600,6000 --out explored

D4S looks for its targets on the unedited model, so they serve every λ (`prior_weight`). λ is how much what the
model knew before weighs against an edit: small, and neighbours suffer; large, and edits no longer arrive.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import d4s
from d4s.embedded import load_demo_edits
from d4s.embedded.statistics import demo_covariance

parser = argparse.ArgumentParser(description="Explores λ of D4S on the embedded model with kept targets.")
parser.add_argument("--edits", type=int, default=20, help="made one at a time (default: 20)")
parser.add_argument("--weights", default="60,600,6000", help="λ, with commas (default: 60,600,6000)")
parser.add_argument("--out", type=Path, default=Path("explored"), help="folder of the kept targets")
options = parser.parse_args()

model, tokenizer = d4s.load_model("embedded", dtype="float32")
edits = load_demo_edits(limit=options.edits)
covariance = demo_covariance(model, tokenizer, layers=(0,))
baseline = d4s.take_baseline(model, tokenizer, edits, progress=False)
options.out.mkdir(parents=True, exist_ok=True)
targets = d4s.search_targets(model, tokenizer, edits, out=options.out / "targets.safetensors", progress=False)
print(f"{len(targets)} targets in {options.out / 'targets.safetensors'}")

print(f"{'λ':>8} {'efficacy':>9} {'paraphrase':>11} {'specificity':>12} {'growth of |w|':>14}")
for weight in map(float, options.weights.split(",")):
    result = d4s.edit_sequence(
        model,
        tokenizer,
        edits,
        method="d4s",
        config={"prior_weight": weight},
        covariance=covariance,
        targets=targets,
        baseline=baseline,
        progress=False,
    )
    last = result.history[-1]
    print(
        f"{weight:8g} {last['efficacy']:9.2f} {last['paraphrase']:11.2f} {last['specificity']:12.2f} "
        f"{last['l1_growth']:+14.1%}"
    )
    result.restore()  # the next λ begins with the unedited weights
