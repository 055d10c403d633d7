"""The same edits with two methods, from the same unedited model: a table, and figures with their data beside them.

    python examples/compare_methods.py --edits 20 --methods d4s,memit --out compared

Stopped and started again with the same --out it goes on where it was; so it does with more methods.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import d4s
from d4s.embedded import load_demo_edits
from d4s.embedded.statistics import demo_covariance

parser = argparse.ArgumentParser(description="Compares methods on the embedded model and draws the figures.")
parser.add_argument("--edits", type=int, default=20, help="made one at a time (default: 20)")
parser.add_argument(
    "--methods", default="d4s,memit", help="of d4s.methods(), with commas (default: d4s,memit)"
)
parser.add_argument("--out", type=Path, default=Path("compared"), help="folder of table and figures")
options = parser.parse_args()

model, tokenizer = d4s.load_model("embedded", dtype="float32")
found = d4s.compare(
    model,
    tokenizer,
    load_demo_edits(limit=options.edits),
    options.methods.split(","),
    covariance=demo_covariance(model, tokenizer, layers=(0,)),
    evaluate_every=max(1, options.edits // 4),
    neighborhood_limit=2,  # neighbours an edit that are asked on the way; all at the end
    out=options.out,
    progress=False,
)
print(found.summary())
found.save(options.out)
print("Figures:", ", ".join(sorted(str(path) for path in options.out.glob("*.png"))))
