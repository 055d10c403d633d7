"""Tiny models made ready to be edited, and configurations under which an edit of theirs takes."""

from __future__ import annotations

from typing import Any

import torch
from support.tiny import TEXTS, tiny_model, tiny_tokenizer

from d4s.edits import Edit
from d4s.locate.covariance import estimate_covariance
from d4s.methods import Editor, Workbench, method_for

EDITS = (
    Edit(
        prompt="The mother tongue of {} is",
        subject="Danielle Darrieux",
        target_new="English",
        target_true="French",
        paraphrases=("Danielle Darrieux speaks", "Danielle Darrieux, a native speaker of"),
    ),
    Edit(prompt="{} worked for", subject="Steve Jobs", target_new="Manila Lyon", target_true="Apple"),
    Edit(prompt="The twin city of {} is", subject="Lyon", target_new="Paris"),
    Edit(prompt="The official religion of {} is", subject="Edwin", target_new="France", target_true="Islam"),
)
# A random model's attention carries little from the subject to the answer: here it ends the prompt.
SUBJECT_LAST = (
    Edit(prompt="You play the piano because of {}", subject="Danielle Darrieux", target_new="English"),
    Edit(prompt="Apple; {}", subject="Steve Jobs", target_new="Manila", target_true="Paris"),
)
# Targets need room in a random model, and little may hold the weights back.
_TARGET: dict[str, Any] = dict(steps=12, learning_rate=1.0, weight_decay=0.0, clamp=20.0, contexts=0)
_PRIOR: dict[str, Any] = dict(prior_weight=1e-2, ridge=0.1)
STRONG: dict[str, dict[str, Any]] = {
    "d4s": _TARGET | _PRIOR,
    "memit": _TARGET | _PRIOR,
    "memit-seq": _TARGET | _PRIOR,
    "rome": _TARGET | dict(ridge=0.1),
    "r-rome": _TARGET | dict(ridge=0.1),
    "pmet": _TARGET | _PRIOR,
    "emmet": _TARGET | _PRIOR,
    "alphaedit": _TARGET | dict(l2=1e-2, null_space_threshold=1.0, threshold_is_relative=True),
    "nas": _TARGET | dict(l2=1e-2, null_space_threshold=1.0, threshold_is_relative=True),
    "sphere": _TARGET | dict(l2=1e-2, null_space_threshold=1.0, threshold_is_relative=True),
    "lyaplock": _TARGET | _PRIOR,
    "encore": _TARGET | _PRIOR | dict(norm_weight=1e-2),
    "ultraedit": dict(learning_rate=3e-3),
    "ft-l": dict(learning_rate=1e-2, epsilon=0.1),
    "ft-l-w0": dict(learning_rate=1e-2, epsilon=0.1),
    "ft-m": dict(learning_rate=1e-2),
    "ft-bf": dict(learning_rate=1e-2),
    "grace": dict(steps=25),
    "kn": {},
}


def bench_of(
    model_type: str, seed: int, dtype: torch.dtype = torch.float32, device: Any = "cpu", **changes: Any
) -> Workbench:
    """A workbench at a new random model, always the same one for a seed, with statistics of all its layers."""
    model, tokenizer = tiny_model(model_type, seed, dtype, **changes).to(device), tiny_tokenizer()
    covariance = estimate_covariance(
        model, tokenizer, TEXTS * 8, tokens=800, dtype=torch.float64, progress=False
    )
    return Workbench(model, tokenizer, covariance=covariance, seed=seed)


def editor_of(name: str, bench: Workbench, **config: Any) -> Editor:
    """The method by name, strong, with single fields changed; what is left open decided by two edits."""
    method = method_for(name, bench.anatomy, STRONG[name] | config)
    return method.settled(bench, SUBJECT_LAST).editor(bench)


def state_of(bench: Workbench) -> dict[str, torch.Tensor]:
    """Copies of all the model's tensors."""
    return {name: tensor.clone() for name, tensor in bench.model.state_dict().items()}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    found, truth = found.detach().double(), truth.detach().double()
    return float((found - truth).norm() / truth.norm())
