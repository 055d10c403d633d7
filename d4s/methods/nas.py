"""Norm-Anchor Scaling (arXiv 2602.02543): before the solve, what a target asks of the MLP is put on the norm that it
has on the unedited model. With v0, the MLP's output at the subject's last token on the bare prompt, and δ as found,

    v* = v0 + δ        ‖v*‖ > 2m: v* ← v0, else v* ← v* · m / ‖v*‖        z = (h − v0) + v*

and with z AlphaEdit's equation (alphaedit.py), on which it is published. m is the mean of ‖v*‖ over requests on the
unedited model, less the longest twentieth: in the release over 1,000 of CounterFact on bare prompts, here over the
first 64 edits, as they are searched. Any method that searches targets takes `target_norm="anchor"`.

Where δ is found at the MLP's output (ROME, PMET; models with a norm behind the MLP) v0 is what it starts from, and
z = v*.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from d4s.methods.alphaedit import AlphaEdit


@dataclass(frozen=True, kw_only=True)
class NAS(AlphaEdit):
    """Presets: AlphaEdit's, as in the release for gpt2-xl, GPT-J and Llama-3."""

    name: ClassVar[str] = "nas"
    paper: ClassVar[str] = "arXiv 2602.02543"
    not_published: ClassVar[tuple[str, ...]] = ("llama-2-7b",)

    target_norm: Annotated[
        Literal["found", "anchor"],
        "of what a target asks of the MLP: as it was found, or m for every edit (Norm-Anchor Scaling)",
    ] = "anchor"
