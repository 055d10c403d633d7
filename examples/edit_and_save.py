"""Edits the embedded model, one fact after another, saves it, and asks the saved model what it knows now.

    python examples/edit_and_save.py --edits 20 --out edited

The folder it writes is an ordinary one of transformers; `d4s.load_model` and `AutoModelForCausalLM` both read it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import d4s
from d4s.embedded import load_demo_edits
from d4s.embedded.statistics import demo_covariance
from d4s.models.generation import generate_greedy

parser = argparse.ArgumentParser(description="Edits the embedded model in sequence and saves it.")
parser.add_argument(
    "--edits", type=int, default=20, help="facts that are changed, one at a time (default: 20)"
)
parser.add_argument(
    "--out", type=Path, default=Path("edited"), help="folder of the edited model (default: edited)"
)
options = parser.parse_args()

model, tokenizer = d4s.load_model("embedded", dtype="float32")
edits = load_demo_edits(limit=options.edits)
# The sum of k kᵀ over what the model was trained on: what an edit should leave alone.
covariance = demo_covariance(model, tokenizer, layers=(0,))

result = d4s.edit_sequence(
    model,
    tokenizer,
    edits,
    method="d4s",
    covariance=covariance,
    evaluate_every=max(1, options.edits // 2),
    progress=False,
)
print(result.summary())
result.save(options.out / "result.json")
model.save_pretrained(options.out / "model")
tokenizer.save_pretrained(options.out / "model")

saved, tokenizer = d4s.load_model(options.out / "model")
asked = [edit.text for edit in edits[:3]]
for edit, said in zip(edits, generate_greedy(saved, tokenizer, asked, max_new_tokens=3), strict=False):
    print(f"{edit.text} …{said}   (was: {edit.target_true}, asked for: {edit.target_new})")
