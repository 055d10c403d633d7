"""Seven edits of a tiny model, and what tests ask of a sequence of them."""

from __future__ import annotations

import torch
from support.tiny import TEXTS, tiny_model, tiny_tokenizer

from d4s.edits import Edit
from d4s.errors import ModelError
from d4s.locate.covariance import estimate_covariance
from d4s.methods.base import Editor
from d4s.sequence.run import edit_sequence

SUBJECTS = ("Danielle Darrieux", "Steve Jobs", "Lyon", "Edwin", "Manila", "Apple", "Bordeaux")
TEMPLATES = ("The mother tongue of {} is", "{} worked for", "The twin city of {} is")
ANSWERS = ("English", "Paris", "Islam", "France", "Lyon Manila")
EDITS = tuple(
    Edit(
        prompt=TEMPLATES[i % 3],
        subject=subject,
        target_new=ANSWERS[i % 5],
        target_true=ANSWERS[(i + 1) % 5],
        paraphrases=(f"You and I play; {subject} is", f"{subject} was born in")[: 1 + i % 2],
        neighborhood=("The capital of France is", f"{SUBJECTS[i - 1]} was", "I play the piano because"),
        id=f"e{i}",
    )
    for i, subject in enumerate(SUBJECTS)
)
STRONG = dict(
    layers=[0, 1], steps=4, learning_rate=1.0, clamp=8.0, weight_decay=0.0, prior_weight=1e-2, ridge=0.1
)
FAST = STRONG | dict(contexts=0)


def ready(seed: int, model_type: str = "gpt2", dtype: torch.dtype = torch.float32, device="cpu", **changes):
    model = tiny_model(model_type, seed, dtype, **changes).to(device)
    covariance = estimate_covariance(model, tiny_tokenizer(), TEXTS * 6, dtype=torch.float64, progress=False)
    return model, covariance


def sequence(model, covariance, edits=EDITS, **options):
    options = {"config": FAST, "progress": False} | options
    return edit_sequence(
        model, options.pop("tokenizer", tiny_tokenizer()), edits, covariance=covariance, **options
    )


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def without_times(rows):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]


def broken_off(monkeypatch, call, error=RuntimeError):
    """The call-th step fails once; those after it do not."""
    failing(monkeypatch, Editor, call, "edit", error("broken off"))


def failing(monkeypatch, editor, call, name="apply", error=None):
    """The call-th step of an editor fails."""
    plain, calls = getattr(editor, name), []

    def step(self, batch):
        calls.append(batch)
        if len(calls) == call:
            raise error or ModelError("no room")
        return plain(self, batch)

    monkeypatch.setattr(editor, name, step)
