"""The step between two stored weights, such that either is made of the other bit for bit on every machine.

Dense, it is the exclusive or of their bits. Where the change has few factors it is smaller: whole numbers L̂ and R̂ from
which Δ = 2ᵉ L̂R̂ is predicted, and what the prediction has wrong, in both directions:

    edited = round(base + Δ) ⊕ forth        base = round(edited − Δ) ⊕ back

L̂R̂ is exact in float64, whatever the order of the sums, since no sum is above 2⁵³ (of float32 weights, whose factors
need more digits, it is four such products of halves); the rest is one operation an element, which IEEE 754 fixes. So no
machine predicts otherwise than the one that took the corrections.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
# 14 binary digits, and 40 to 51: what is wrong by less than the weight's own last digit needs few corrections.
FACTORS = {torch.float32: torch.int64, torch.float16: torch.int16, torch.bfloat16: torch.int16}
LARGEST_EXPONENT = 300  # so that 2ᵉ and all products with it are ordinary numbers


@dataclass(frozen=True)
class Step:
    """parts: tensors of whole numbers, as `part_types` names them; exponent: e, None where dense"""

    parts: dict[str, Tensor]
    exponent: int | None

    @property
    def bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self.parts.values())


def bits(weight: Tensor) -> Tensor:
    """A weight's bits as whole numbers, on the CPU. weight: float32 | float16 | bfloat16"""
    return weight.detach().cpu().contiguous().view(INTEGERS[weight.dtype])


def dense(base: Tensor, edited: Tensor) -> Step:
    return Step({"xor": bits(base) ^ bits(edited)}, None)


def factored(base: Tensor, edited: Tensor, left: Tensor, right: Tensor, transposed: bool) -> Step:
    """left [d_out, r], right [r, d_in]: of Δ, float64 and finite; transposed: the weights lie as [d_in, d_out]"""
    held = FACTORS[base.dtype]
    width = 14 if held == torch.int16 else 2 * _half(left.shape[1]) - 1
    whole, exponents = [], []
    for factor in (left, right):
        # The largest exponent with which no number is above 2^width.
        exponent = width - math.frexp(float(factor.abs().max()))[1]
        whole.append((factor.cpu().double() * 2.0**exponent).round().to(held).contiguous())
        exponents.append(exponent)
    step = Step(dict(zip(("left", "right"), whole, strict=True)), -sum(exponents))
    change = _change(step, transposed)
    for direction, start, end in (("forth", base, edited), ("back", edited, base)):
        predicted = bits(_predicted(start, change if direction == "forth" else -change)).flatten()
        wrong = predicted ^ bits(end).flatten()
        at = wrong.nonzero().flatten()
        step.parts[f"{direction}.xor"] = wrong[at]
        step.parts[f"{direction}.gaps"] = _gaps(at)
    return step


def taken(step: Step, start: Tensor, transposed: bool, *, back: bool = False) -> Tensor:
    """The weight at the other end of the step, as `start` is stored, on the CPU.

    start: the base, or the edited weight where `back`. Raises ValueError for parts that no step has.
    """
    start = start.detach().cpu().contiguous()
    if step.exponent is None:
        return (bits(start) ^ step.parts["xor"]).view(start.dtype)
    left, right = step.parts["left"], step.parts["right"]
    most = 4 ** _half(left.shape[1])
    sizes = [max(int(f.max()), -int(f.min())) for f in (left, right)]
    if abs(step.exponent) > LARGEST_EXPONENT or max(sizes) >= most:
        raise ValueError("its factors are too large for their product to be exact")
    change = _change(step, transposed)
    found = bits(_predicted(start, -change if back else change)).flatten()
    direction = "back" if back else "forth"
    at, wrong = _places(step.parts[f"{direction}.gaps"]), step.parts[f"{direction}.xor"]
    if at.numel() != wrong.numel() or (at.numel() and int(at[-1]) >= found.numel()):
        raise ValueError(
            f"the places of its corrections ({direction}) are not as many, or not within the weight"
        )
    found[at] ^= wrong
    return found.view(start.shape).view(start.dtype)


def part_types(exponent: int | None, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The parts of a step between two weights of this type, and what each is."""
    word, factor, gaps = INTEGERS[dtype], FACTORS[dtype], torch.uint8
    if exponent is None:
        return {"xor": word}
    corrections = {"forth.gaps": gaps, "forth.xor": word, "back.gaps": gaps, "back.xor": word}
    return {"left": factor, "right": factor, **corrections}


def _change(step: Step, transposed: bool) -> Tensor:
    """Δ as the weights lie, float64."""
    assert step.exponent is not None
    # Always on the CPU: an accelerator may put float64 together from smaller types.
    left, right = step.parts["left"], step.parts["right"]
    if left.dtype == torch.int16:
        product = left.double() @ right.double()
    else:
        half = _half(left.shape[1])
        high = [(factor >> half).double() for factor in (left, right)]
        low = [(factor & (2**half - 1)).double() for factor in (left, right)]
        product = high[0] @ high[1] * 4.0**half
        product += high[0] @ low[1] * 2.0**half
        product += low[0] @ high[1] * 2.0**half
        product += low[0] @ low[1]
    product *= 2.0**step.exponent
    return product.T if transposed else product


def _gaps(at: Tensor) -> Tensor:
    """Ascending places as how many are left out before each, in bytes: 255 leaves out so many, and names no place."""
    left_out = at.diff(prepend=at.new_tensor([-1])) - 1
    bytes_each = left_out // 255 + 1
    gaps = torch.full((int(bytes_each.sum()),), 255, dtype=torch.uint8)
    gaps[bytes_each.cumsum(0) - 1] = (left_out % 255).to(torch.uint8)
    return gaps


def _places(gaps: Tensor) -> Tensor:
    """What `_gaps` was made of; whatever the bytes are, places ascend from 0 on."""
    named = gaps != 255
    return gaps.long().cumsum(0)[named] + torch.arange(int(named.sum()))


def _half(rank: int) -> int:
    """Digits with which a sum of `rank` products stays at 2⁵³ or below."""
    return (53 - math.ceil(math.log2(rank))) // 2


def _predicted(start: Tensor, change: Tensor) -> Tensor:
    # By float32, lest a conversion to 16 bits be made in one step here and in two there.
    return (start.detach().cpu().double() + change).to(torch.float32).to(start.dtype).contiguous()
