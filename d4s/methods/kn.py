"""KN, knowledge neurons (arXiv 2104.08696): the neurons (inputs of W) that a fact hangs on are found, and
their columns of W rewritten with embeddings. With w̄ the neurons of one layer at the prompt's last token,
and p the probability of the old answer as a function of them, integrated gradients over m steps (midpoint
rule):

    attribution = w̄ ⊙ 1/m Σ_j ∂p/∂w (α_j w̄),  α_j = (j − ½) / m        Σ attributions → p(w̄) − p(0)

Kept are neurons above .2 · the largest over all layers, and of these the ones that more than .7 of the texts
(the prompt and its paraphrases) share. Each one's column of W, the vector it adds to the stream:

    W[:, i] −= s λ₁ emb(old),  += s λ₂ emb(new)        λ = ‖W[:, i]‖ / ‖emb‖,  s = sign of w̄_i at the prompt

The paper has no s: its neurons come out of a GELU and are positive where they matter. Those of a gated MLP are
as often negative, and a column that is multiplied by a negative number must be changed the other way round.

This is the paper's rule, applied in sequence, for which it was not made: λ follows the column as it is now, so that
what many edits rewrite grows from one to the next, without end. The paper's own code undoes each edit, moves the share
of .7 until two to five neurons are left, and drops those that more than a tenth of a relation's texts have. The
baselines of ROME and EasyEdit ask the prompt alone and add −2 emb(old) + emb(new) at every edit, whatever the column's
length.

An answer of several tokens is represented by its first: p, emb(old) and emb(new) are about that token
alone. Embeddings are the output's, which raise a token's logit (the paper's model ties the two). Where the
old answer is not known, it is what the model says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from d4s.configuration import Above, AtLeast, Below
from d4s.edits import Edit
from d4s.errors import ModelError
from d4s.methods.base import Editor, Method, Step, Workbench, not_optimised
from d4s.methods.published import MODELS, model_key
from d4s.models.architectures import Anatomy
from d4s.models.causal_lm import CausalLM
from d4s.models.forward import Calling, Forward
from d4s.models.prompts import prompt_and_target_ids, text_ids
from d4s.models.trace import Trace, head_reads, replaced_forward


@dataclass(frozen=True, kw_only=True)
class KN(Method):
    name: ClassVar[str] = "kn"
    paper: ClassVar[str] = "arXiv 2104.08696"
    changes: ClassVar[str] = "columns of MLP output projections"
    needs: ClassVar[tuple[str, ...]] = ("paraphrases, where there are any",)
    not_published: ClassVar[tuple[str, ...]] = MODELS
    strength: ClassVar[str] = "threshold"

    layers: Annotated[tuple[int, ...], "whose neurons are searched"]
    steps: Annotated[
        int, "m, of the integral", AtLeast(2, "one step is a gradient at one point, not an integral")
    ] = 20
    threshold: Annotated[
        float, "neurons above it are kept, of the largest attribution", Above(0), Below(1)
    ] = 0.2
    share: Annotated[float, "of the texts that must agree on a neuron", AtLeast(0), Below(1)] = 0.7
    # The paraphrases that the edit brings are often those it is tested with.
    paraphrases: Annotated[bool, "ask them too; false: the prompt alone"] = True

    @classmethod
    def preset(cls, anatomy: Anatomy) -> KN:
        """All layers: the search decides. The embedded model, whose facts hang on more and weaker neurons: threshold
        .05 and share .3, without which few edits take."""
        layers = tuple(range(len(anatomy)))
        if model_key(anatomy) == "embedded":
            return cls(layers=layers, threshold=0.05, share=0.3)
        return cls(layers=layers)

    def editor(self, bench: Workbench) -> KNEditor:
        return KNEditor(self, bench)


class KNEditor(Editor):
    def __init__(self, method: KN, bench: Workbench) -> None:
        super().__init__(method, bench, method.layers)
        model: CausalLM = self.anatomy.model
        self.embeddings: Tensor = model.get_output_embeddings().weight
        width, d_out = self.embeddings.shape[1], self.anatomy.shape(method.layers[0])[0]
        if width != d_out:
            raise ModelError(
                f"embeddings have {width} dimensions and W puts out {d_out}; kn needs models where they agree"
            )

    def apply(self, batch: Sequence[Edit]) -> Step:
        for edit in batch:
            self.apply_one(edit)
        return not_optimised(batch)

    def apply_one(self, edit: Edit) -> None:
        prompt, new = prompt_and_target_ids(self.tokenizer, edit.text, edit.target(edit.target_new))
        if edit.target_true is None:
            old = int(self.last_probabilities(prompt).argmax())
        else:
            old = prompt_and_target_ids(self.tokenizer, edit.text, edit.target(edit.target_true))[1][0]
        texts = [prompt]
        if self.method.paraphrases:
            texts += text_ids(self.tokenizer, edit.paraphrases)
        for layer, neurons in self.shared_neurons(texts, old).items():
            signs = self.neurons(prompt, layer)[neurons].double().sign()
            weight = self.anatomy.weight(layer).detach().double()
            change = weight.new_zeros(self.anatomy.shape(layer))
            weight = weight.T if self.anatomy.transposed(layer) else weight
            lengths = signs * weight[:, neurons].norm(dim=0)  # s ‖W[:, i]‖
            for token, sign in ((old, -1.0), (new[0], 1.0)):
                embedding = self.embeddings[token].detach().double().to(weight.device)
                change[:, neurons] += sign * (embedding / embedding.norm()).outer(lengths)
            self.weights.write_(layer, self.weights.delta(layer) + change)

    def shared_neurons(self, texts: Sequence[Sequence[int]], token: int) -> dict[int, list[int]]:
        """Layer → neurons kept by the rules above."""
        votes: Counter[tuple[int, int]] = Counter()
        for ids in texts:
            found = torch.stack([self.attributions(ids, layer, token).cpu() for layer in self.weights.layers])
            kept = (found > self.method.threshold * found.max()).nonzero().tolist()
            votes.update((self.weights.layers[i], neuron) for i, neuron in kept)
        shared: dict[int, list[int]] = {}
        for (layer, neuron), count in sorted(votes.items()):
            if count > self.method.share * len(texts):
                shared.setdefault(layer, []).append(neuron)
        return shared

    def last_probabilities(
        self, ids: Sequence[int], rows: int = 1, last: Callable[[Tensor], Any] | None = None, layer: int = 0
    ) -> Tensor:
        """p over the vocabulary after the last token, in each of equal rows. [rows, vocabulary] float32.

        The tokens before it run once, as a KV cache: what is done at the last one cannot reach them.
        last: the forward of the layer's projection at the last token alone, on [rows, 1, d_in]; None: its own
        """
        model: CausalLM = self.anatomy.model
        calling, projection = Calling.of(model), self.anatomy.projection(layer)
        mask = torch.ones(rows, len(ids), dtype=torch.long, device=self.anatomy.device)
        tokens = torch.as_tensor([list(ids)], device=self.anatomy.device).expand(rows, -1)
        arguments = calling.without_cache()
        replaced = {} if last is None else {projection: last}
        if Forward(model, 0).cached_way and len(ids) > 1:
            unread = torch.zeros(1, dtype=torch.long)
            with torch.no_grad(), head_reads(model, unread, unread):
                kept = model(input_ids=tokens[:1, :-1], attention_mask=mask[:1, :-1], **calling.with_cache())
            cache = calling.cache_of(kept)
            cache.batch_repeat_interleave(rows)
            tokens, arguments = tokens[:, -1:], calling.with_cache(cache)
        elif last is not None:
            own = projection.forward
            replaced = {projection: lambda inputs: torch.cat([own(inputs[:, :-1]), last(inputs[:, -1:])], 1)}
        with replaced_forward(replaced):
            output = model(input_ids=tokens, attention_mask=mask, **arguments)
        return output.logits[:, -1].float().softmax(-1)

    def neurons(self, ids: Sequence[int], layer: int) -> Tensor:
        """w̄, the layer's neurons at the last token. [d_in] float32."""
        with torch.no_grad(), Trace(self.anatomy.projection(layer)) as trace:
            self.last_probabilities(ids)
        return trace.input.reshape(-1, trace.input.shape[-1])[-1].float()

    def attributions(self, ids: Sequence[int], layer: int, token: int) -> Tensor:
        """Of each neuron of the layer to p(token). [d_in] float32."""
        steps = self.method.steps
        own = self.anatomy.projection(layer).forward
        neurons = self.neurons(ids, layer)
        alphas = (torch.arange(steps, dtype=neurons.dtype, device=neurons.device) + 0.5) / steps
        scaled = (alphas.unsqueeze(1) * neurons).requires_grad_(True)
        p = self.last_probabilities(
            ids, steps, lambda inputs: own(scaled.to(inputs.dtype).view(inputs.shape)), layer
        )[:, token]
        (gradient,) = torch.autograd.grad(p.sum(), [scaled])
        return neurons * gradient.mean(0)
