"""The norm anchor of a target (Norm-Anchor Scaling, arXiv 2602.02543): how long what the MLP is to put out may be.

A search leaves δ as long as it likes, and over a sequence long targets make the weights grow, which makes the next
targets longer. With v0, the MLP's output at the subject's last token on the bare prompt, and v* = v0 + δ,

    ‖v*‖ > 2m: δ is dropped        else: v* ← v* · m / ‖v*‖        z = (h − v0) + v*

m is how long v* is on the unedited model: the mean over requests, less the longest twentieth.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from d4s.locate.targets import Targets

LEFT_OUT = 0.05  # of the requests, the longest v*
LONGEST = 2.0  # times m: a longer v* is a search gone astray


def norms(targets: Targets, outputs: Tensor) -> Tensor:
    """‖v*‖ of each request. outputs: v0, [requests, d_model]. Returns [requests] float64."""
    return (outputs.double() + targets.delta.double()).norm(dim=1)


def mean_norm(lengths: Tensor) -> float:
    """m. lengths: ‖v*‖ of requests on the unedited model, [requests]"""
    kept = len(lengths) - int(LEFT_OUT * len(lengths))
    return float(lengths.double().sort().values[:kept].mean())


def anchored(targets: Targets, outputs: Tensor, norm: float) -> Targets:
    """The targets with δ such that v* has the norm m; probabilities stay those of the search.

    outputs: v0, [requests, d_model]; norm: m
    """
    before = outputs.double()
    length = norms(targets, outputs).unsqueeze(1)
    wanted = before + targets.delta.double()
    wanted = wanted * (norm / length.clamp_min(1e-30))  # of length 0 it stays that
    delta = torch.where(length > LONGEST * norm, 0.0, wanted - before)
    return replace(targets, delta=delta.to(targets.delta.dtype))
