"""SPHERE (arXiv 2510.01172): a change is damped along the main directions of the weight that it changes,

    ΔW ← ΔW (I − α U Uᵀ)        Ŵᵀ Ŵ / d_out = Σ e u uᵀ, Ŵ = W with rows at unit length

U holds the top eigenvectors u, as many as it takes for their e to exceed the share β of all. ΔW is AlphaEdit's
(alphaedit.py), on which it is published with α = β = .5; on MEMIT the release takes α = .8. Any method that solves for
W takes `delta_projection`.

The release takes U of W as it is before each step, here it is W0's: what is written is then linear in what the edits
have put into the sums, so that they add up, and can be taken back, as without it. The rows of Ŵ are W's output
dimensions, for GPT-2 too, whose weight lies transposed and is projected from the other side by the release.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from d4s.configuration import AtLeast, AtMost, Length
from d4s.methods.alphaedit import AlphaEdit


@dataclass(frozen=True, kw_only=True)
class SPHERE(AlphaEdit):
    """Presets: AlphaEdit's, as in the release for GPT-J and Llama-3."""

    name: ClassVar[str] = "sphere"
    paper: ClassVar[str] = "arXiv 2510.01172"
    not_published: ClassVar[tuple[str, ...]] = ("gpt2-xl", "llama-2-7b")

    delta_projection: Annotated[
        tuple[float, ...] | None,
        "α and β: along W0's main directions, which hold the share β, 1 − α of a change is written",
        Length(2, "α and β"),
        AtLeast(0),
        AtMost(1),
    ] = (0.5, 0.5)
