"""D4S, Dump for Sequence (arXiv 2410.23843). One edit a step; per layer two sums are kept, whatever their number:

    A = Σ d kᵀ   [d_model, d_in]        B = Σ k kᵀ   [d_in, d_in]        W = W0 + A (B + λC)⁻¹

anchor="base", the paper's: z from the unedited weights W0. Targets then do not depend on earlier edits and are
optimised ahead, in batches. k at each layer with the layers below already holding their new weights. The residual d is

    residual="once", the paper's:  d = (z − h_L) / (n − i), h_L from W0, measured once
    residual="measured":           d = r + (W − W0) k, r = (z − h_L) / (n − i), h_L measured on W before each layer

The second is a least-squares step from the weights as they are, W + r kᵀ (B + λC)⁻¹, put back on the base. With
several layers the first asks all of them for parts of one residual, whatever those below have brought already, and
together they overshoot; with one layer and no contexts both are the same.

anchor="current": z, too, from the current weights, and the residual measured: MEMIT with cached keys. A search a step
instead of one ahead.

`refine_looks` is between the two. What an edit wants depends on those before it a little: rows before and behind the
subject have changed with the layers. So a target of W0, found ahead in a batch, is searched on by a few looks on the
weights as they are, from z and by Polyak's steps, of which the best is kept. Four looks are a sixth of a search's
passes.

context_keys="mean", as published: k is the mean over the bare prompt and the contexts, and d what the bare prompt
lacks. Nothing then holds what arrives where the prompt stands alone to what arrives behind other text. With "each"
every context j of an edit is a row of the least-squares problem by itself: its own key k_j, and by the rule "measured"
what it lacks itself,

    A = Σ_j w_j d_j k_jᵀ        B = Σ_j w_j k_j k_jᵀ        r_j = (h_j + δ − h_L at j) / (n − i),  h_j before the edit

with the mean's weights w_j (½ the bare prompt, ½ all contexts). That is a row of the sums, and of a journal, a context.

prompt_weight=w puts in, beside an edit's keys, those at all other tokens of its bare prompt, p_1 … p_m, as places at
which nothing is to change:

    B += w Σ_j p_j p_jᵀ        A as it is

Other facts are asked with the same words around other subjects. C is of ordinary text and knows little of them; without
these rows what a thousand edits do there adds up.

A prompt that is edited again has its key in the lowest layer's B already. Both terms together would give the mean of
both answers, so the new one takes the old one's place there (this project's addition; the release of D4S only adds): k
stays in B once, and A moves by (d_new − d_old) kᵀ (once; d_old is found again, from the prompt and its old answer) or
by r kᵀ (measured). Above it keys move with the layers below: the old key is in B, the new one is not, and is added as
any other.

With `delta_projection` W = W0 + A (B + λC)⁻¹ (I − α U Uᵀ), U of W0, and the sums are put together as without it. By the
rule "measured" that projects each step, as SPHERE does: r is measured on W as it is, and A (B + λC)⁻¹ moves by
r kᵀ (B + λC)⁻¹, of which (I − α U Uᵀ) reaches W.

Where a layer is a mixture of experts, k is the keys of its experts side by side, each times its gate, and W the row of
their matrices; the sums are then kept as the rows that are in them (d4s/change/expert_form.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from d4s.change.closed_form import ClosedForm, Rows
from d4s.change.expert_form import JointForm, closed_form_over
from d4s.configuration import AtLeast
from d4s.edits import Edit, check_batch
from d4s.edits.edit import AGAIN
from d4s.errors import ConfigError
from d4s.locate.keys import PromptRows, keys_beside, prompt_rows
from d4s.locate.targets import Targets, refining
from d4s.methods.base import Holding, LayerSize, Method, Step, Workbench
from d4s.methods.locate_then_edit import (
    Ahead,
    LocateEditor,
    LocateMethod,
    TargetMethod,
    holding_of_sums,
    step_of,
)
from d4s.models.architectures import Anatomy

# What was lost at its target of W0 is lost again with the same one: of 1,000 edits of SmolLM2 72 % are the greedy
# answer, 77 % after a second pass without looks, 88 % after one with eight (docs/results/smollm2-long.md).
AGAIN_LOOKS = 8
MOST_BESIDE = 64  # tokens of a prompt, beside the subject's last, whose keys are put in: the last ones
PROMPT_WEIGHT, PROMPT_EDITS = 0.25, 300  # measured on so many edits of SmolLM2 (docs/results/smollm2-long.md)
BESIDE = 8  # how many CounterFact's prompts have, about
_LONG = {"anchor": "base", "residual": "measured", "context_keys": "each"}
_FRESH = {**_LONG, "anchor": "current", "prompt_weight": None}


@dataclass(frozen=True, kw_only=True)
class D4S(LocateMethod):
    name: ClassVar[str] = "d4s"
    paper: ClassVar[str] = "arXiv 2410.23843"
    changes: ClassVar[str] = "MLP output projections"
    keeps_sums: ClassVar[bool] = True
    replaces: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("covariance",)
    not_published: ClassVar[tuple[str, ...]] = ("gpt2-xl", "llama-3-8b")  # there: MEMIT's rows
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"anchor": "base", "residual": "once"},
        "long": _LONG,
        "hold": {**_LONG, "prompt_weight": None},
        "fresh": _FRESH,
        "answers": {**_FRESH, "target_stop": True},
    }
    edits_experts: ClassVar[bool] = True

    anchor: Annotated[
        Literal["base", "current"],
        "weights that targets are found on: W0, or the current ones",
    ] = "base"
    residual: Annotated[
        Literal["once", "measured"],
        "the paper's rule, or measured again before each layer, as always with anchor=current",
    ] = "measured"
    context_keys: Annotated[
        Literal["mean", "each"],
        "a key an edit, the mean over its contexts as published, or one of each context, with what that context lacks",
    ] = "mean"
    prompt_weight: Annotated[
        float | None,
        "of the keys at the prompt's other tokens, at which nothing is to change, where an edit's own key has 1; "
        "0: they do not count; None: 75 over the number of edits, ¼ at most",
        AtLeast(0),
    ] = 0.0
    refine_looks: Annotated[
        int,
        "at a target of W0, on the weights as they are, before it is written; 0: it stays, but of an edit that a later "
        "pass makes again, which has eight or more",
        AtLeast(0),
    ] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refine_looks and (self.anchor == "current" or self.residual == "once"):
            raise ConfigError(
                f"refine_looks={self.refine_looks} with anchor={self.anchor!r} and residual={self.residual!r}: it is "
                "for targets that are found on W0 and measured again; set anchor='base' and residual='measured'"
            )

    def check_experts(self, anatomy: Anatomy, layers: Sequence[int]) -> None:
        super().check_experts(anatomy, layers)
        if self.context_keys == "each":
            self.refuse_experts("context_keys='each'", anatomy, layers)
        if self.prompt_weight != 0:
            self.refuse_experts("prompt_weight", anatomy, layers)

    @property
    def keys_an_edit(self) -> int:
        return (self.rows_an_edit if self.context_keys == "each" else 1) + (
            BESIDE if self.prompt_weight != 0 else 0
        )

    def settled(self, bench: Workbench, edits: Sequence[Edit]) -> Method:
        """Also the weight of the prompts' tokens, where it is None: by how many edits there are to be."""
        method = super().settled(bench, edits)
        if self.prompt_weight is not None:
            return method
        return method.changed({"prompt_weight": prompt_weight_of(len(edits))})

    @property
    def measures_again(self) -> bool:
        return self.anchor == "current" or self.residual == "measured"

    @property
    def searches_ahead(self) -> bool:
        return self.anchor == "base"

    def holding(self, size: LayerSize, edits: int) -> Holding:
        return holding_of_sums(size, edits, self.rows_an_edit)

    def editor(self, bench: Workbench) -> D4SEditor:
        return D4SEditor(
            self,
            bench,
            anchor=self.anchor,
            measured=self.measures_again,
            refine_looks=self.refine_looks,
            each=self.context_keys == "each",
            prompt_weight=prompt_weight_of(1) if self.prompt_weight is None else self.prompt_weight,
        )


def prompt_weight_of(edits: int) -> float:
    """The weight of the prompts' tokens in a sequence of so many edits: what they weigh together stays in proportion to
    λC, which does not grow."""
    return min(PROMPT_WEIGHT, PROMPT_EDITS * PROMPT_WEIGHT / edits)


class D4SEditor(LocateEditor):
    """each: whether every context has a key of its own; the others, prompt_weight among them, as of `D4S`"""

    growing: frozenset[str] = frozenset({"held"})

    def __init__(
        self,
        method: TargetMethod,
        bench: Workbench,
        *,
        anchor: Literal["base", "current"],
        measured: bool = True,
        refine_looks: int = 0,
        each: bool = False,
        prompt_weight: float = 0.0,
    ) -> None:
        super().__init__(method, bench)
        self.each, self.prompt_weight = each, prompt_weight
        self.anchor, self.measured = anchor, measured
        self.refine_looks = refine_looks
        self._priors = self.priors()
        self.ahead = Ahead(self)
        self.reset()

    @property
    def keeps_sums(self) -> bool:
        """Whether A and B are kept as such: of layers without experts."""
        return all(self.anatomy.experts(layer) is None for layer in self.weights.layers)

    def reset(self) -> None:
        self.closed_form: ClosedForm | JointForm = closed_form_over(
            self._priors,
            self.anatomy.shape(self.last)[0],
            transposed=self.anatomy.transposed(self.last),
            seed=self.bench.seed,
        )
        if isinstance(self.closed_form, JointForm):
            self.growing = frozenset({"held"}) | self.closed_form.growing
        self.held: dict[tuple[str, int], Edit] = {}  # what is in the sums, by its place
        self.put: list[Rows] = []  # what the last step put into the sums, in order

    def announce(self, edits: Sequence[Edit]) -> None:
        self.ahead.announce(edits)

    def apply(self, batch: Sequence[Edit]) -> Step:
        if self.method.replaces and len(distinct := {edit.place: edit for edit in batch}) < len(batch):
            # Multi-hop cases share facts; in the sums a fact stands once.
            step = self.apply(list(distinct.values()))
            order = {place: i for i, place in enumerate(distinct)}
            made = [batch.index(edit) for edit in distinct.values()]
            self.put = [replace(rows, edits=tuple(made[i] for i in rows.edits)) for rows in self.put]
            return step.select([order[edit.place] for edit in batch])
        self.put = []
        base = self.anchor == "base"
        targets, unedited = self.ahead.take(batch) if base else (self.targets(batch), None)
        looks = self.refine_looks
        if base and self.measured and all(AGAIN in edit.tags for edit in batch):
            looks = max(looks, AGAIN_LOOKS)
        if looks:
            targets = self.refined(batch, targets, looks)
            if self.each:  # what such a target is added to is the current state
                unedited = None
        again = [i for i, edit in enumerate(batch) if edit.place in self.held]
        once = not self.measured
        old = self.base_residuals([self.held[batch[i].place] for i in again]) if once and again else None
        wanted = Wanted(self, batch, targets, unedited)
        prompts = prompt_rows(self.tokenizer, batch, MOST_BESIDE) if self.prompt_weight else None
        layers = self.weights.layers
        with self.ascending() as ascending:
            for i, layer in enumerate(ascending):
                share = len(layers) - i  # n − i
                keys, left = wanted.at(layer)
                if once:
                    residuals = left / share
                else:
                    already = self.closed_form.image(keys, layer)
                    residuals = (left / share).to(already.device) + already
                self._put(Rows(layer, 1.0, wanted.edits, residuals, keys))
                beside = None if prompts is None else self._beside(prompts, layer)
                if beside is not None:
                    self._put(beside)
                if again and i == 0:  # above the lowest layer, this key is not what went into B
                    if beside is not None:
                        self._put(beside.of(again).negated())
                    rows = wanted.rows_of(again)
                    taken = already[rows] if old is None else wanted.spread(old) / share
                    self._put(Rows(layer, -1.0, tuple(wanted.edits[row] for row in rows), taken, keys[rows]))
                self.weights.write_(layer, self.projected(layer, self.closed_form.delta(layer)))
        self.hold(batch)
        return step_of(targets)

    def _beside(self, prompts: PromptRows, layer: int) -> Rows:
        """The prompts' other tokens, at which nothing is to change, with the layers below as they are now."""
        keys = (self.prompt_weight**0.5 * keys_beside(self.anatomy, prompts, layer, self._ascent)).double()
        return Rows(layer, 1.0, prompts.edits, keys.new_zeros(len(keys), self.anatomy.shape(layer)[0]), keys)

    def unedited(self, edits: Sequence[Edit]) -> Tensor:
        """Where every context has a key of its own: its state, which δ is added to. [edits, rows, d_model] float64"""
        if not self.each:
            return super().unedited(edits)
        _, states = self.keys_and_state(self.rows(edits), self.last)
        return states.view(len(edits), -1, states.shape[1])

    def refined(self, edits: Sequence[Edit], targets: Targets, looks: int) -> Targets:
        """Targets of W0, searched on from their z on the current weights."""
        found = self.search(edits, refining(self.method.target, looks), targets.target)
        return self.normed(edits, found)

    def _put(self, rows: Rows) -> None:
        if rows.edits:  # a prompt may have nothing beside its subject
            self.closed_form.put_(rows)
            self.put.append(rows)

    def make_again(self, batch: Sequence[Edit], put: Sequence[Rows]) -> None:
        """A step that this editor, or one like it, has made: from what it put into the sums, with the same bits.

        The weights are written by `write`, once for all steps that are made again.
        """
        for layer in self.weights.layers:
            if self.measured:
                self.closed_form.delta(layer)  # the step asked for it before it put anything in
            for rows in put:
                if rows.layer == layer:
                    self.closed_form.put_(rows)
            self.closed_form.delta(layer)
        self.hold(batch)

    def hold(self, batch: Sequence[Edit]) -> None:
        """These edits are in the sums, each in the place of an earlier one of its prompt."""
        if self.method.replaces:
            self.held |= {edit.place: _fact(*_told(edit)) for edit in batch}

    def write(self) -> None:
        """Every layer's weight from its sums."""
        for layer, delta in self.closed_form.deltas().items():
            self.weights.write_(layer, self.projected(layer, delta))

    def base_residuals(self, edits: Sequence[Edit]) -> Tensor:
        """z − h_L of earlier edits, found again on the unedited weights. [edits, d_model] float64"""
        with self.weights.at_base():
            return self.ahead.targets(edits).delta.double()

    def consolidate(self, edits: Sequence[Edit]) -> None:
        """Takes keys and targets of all given edits again and solves once: one batch edit from W0.

        edits: all that this editor has made, in order; of several of one prompt the last counts. Old keys at upper
        layers were taken on weights that have since changed below them; after this none is stale.
        A failure leaves weights and sums as they were.
        """
        last = list({edit.place: edit for edit in edits}.values())
        check_batch(last)
        state, torn = self.state_dict(), self._torn
        with self.weights.all_or_nothing():
            try:
                self.restore()
                self.announce(last)
                self.edit(last)
            except BaseException:
                self.load_state_dict(state)
                self._torn = torn  # sums that held half a step hold it still
                raise

    def state_dict(self) -> dict[str, Tensor]:
        """The sums, and "held": the edits in them, as bytes of JSON."""
        return self.closed_form.state_dict() | {"held": self.held_as_bytes()}

    def held_as_bytes(self) -> Tensor:
        held = json.dumps([_told(edit) for edit in self.held.values()]).encode()
        return torch.frombuffer(bytearray(held), dtype=torch.uint8)

    def take_state(self, state: Mapping[str, Tensor]) -> None:
        self.closed_form.load_state_dict({name: value for name, value in state.items() if name != "held"})
        self.take_held(state["held"])
        self.write()

    def take_held(self, stored: Tensor) -> None:
        self.held = {edit.place: edit for edit in (_fact(*f) for f in json.loads(bytes(stored.tolist())))}

    def snapshot(self) -> dict[str, Tensor]:
        state = self.closed_form.snapshot() | {"held": self.held_as_bytes()}
        if not self.keeps_sums:  # a journal without sums has the weights from here
            state |= {f"weight.{layer}": w for layer, w in self.weights.current().items()}
        return state

    def resume_(self, state: Mapping[str, Tensor]) -> None:
        own = {
            name: value for name, value in state.items() if name != "held" and not name.startswith("weight.")
        }
        self.closed_form.resume_(own)
        self.take_held(state["held"])
        self.write()


class Wanted:
    """What a step wants of its layers: keys, and what of the targets is left to be brought; a row an edit, or one of
    each of its contexts, times the root of its weight.

    edits: of each row, the place of its edit within the step
    """

    def __init__(
        self, editor: D4SEditor, batch: Sequence[Edit], targets: Targets, unedited: Tensor | None
    ) -> None:
        """unedited: of the batch, as `D4SEditor.unedited` gives it; None: it is not known, or not what is wanted"""
        self.editor, self.targets, self.unedited = editor, targets, unedited
        self.rows, self.bare = editor.rows(batch), editor.bare_rows(batch)
        self.count = len(self.rows.shares) if editor.each else 1
        self.edits = tuple(edit for edit in range(len(batch)) for _ in range(self.count))
        self._goals: Tensor  # of each context the state that is wanted, or by the rule "once" δ

    def at(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys [rows, d_in], with the layers below as they are now, and what is left [rows, d_model]; float64.

        By the rule "once" all of δ is left, at every layer. Asked for in ascending order of the layers.
        """
        editor, targets = self.editor, self.targets
        lowest = layer == editor.weights.layers[0]
        if not editor.each:
            keys = self.unedited if lowest and self.unedited is not None else editor.keys(self.rows, layer)
            if not editor.measured:
                return keys, targets.delta.double()
            return keys, targets.target.double() - editor.state(self.bare)
        keys, reached = editor.keys_and_state(self.rows, layer)
        if lowest:
            self._goals = targets.delta.double().repeat_interleave(self.count, 0)
            if editor.measured:
                before = reached if self.unedited is None else self.unedited.flatten(0, 1)
                self._goals = before + self._goals
        left = self._goals - reached if editor.measured else self._goals
        # Keys stay what float32 holds, as which a journal keeps them.
        return self._weighed(keys.float()).double(), self._weighed(left)

    def rows_of(self, edits: Sequence[int]) -> list[int]:
        """Of edits, by their place within the step."""
        return [edit * self.count + number for edit in edits for number in range(self.count)]

    def spread(self, values: Tensor) -> Tensor:
        """Of some edits what is the same for all of an edit's rows. values: [edits, …]"""
        return self._weighed(values.repeat_interleave(self.count, 0)) if self.editor.each else values

    def _weighed(self, rows: Tensor) -> Tensor:
        """rows: of whole edits, each with all of its contexts"""
        roots = self.rows.shares.sqrt().to(rows)
        return rows * roots.repeat(len(rows) // self.count).unsqueeze(1)


def _told(edit: Edit) -> tuple[Any, ...]:
    """What an edit's target is searched by again."""
    told = (edit.prompt, edit.subject, edit.target_new, edit.target_prefix)
    return told if edit.chat is None else (*told, edit.chat)


def _fact(
    prompt: str, subject: str, target_new: str, target_prefix: str | None = None, chat: str | None = None
) -> Edit:
    """The edit that `_told` tells of, and nothing else of it."""
    return Edit(prompt, subject, target_new, kind="question", target_prefix=target_prefix, chat=chat)
