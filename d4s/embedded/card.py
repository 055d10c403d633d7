"""The embedded model's card: what it knows, where it reads facts from, and how its targets come out by layer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d4s.edits import Edit
from d4s.files import write_text
from d4s.locate.targets import TargetConfig, optimise_targets
from d4s.models.architectures import Anatomy
from d4s.models.causal_lm import CausalLM
from d4s.models.prompts import generate_contexts, prompt_and_target_ids, subject_row
from d4s.models.scoring import score
from d4s.models.trace import Trace

PLACES = (
    "subject, before its last token",
    "subject's last token",
    "after the subject",
    "prompt's last token",
)


@torch.no_grad()
def causal_trace(
    model: CausalLM, tokenizer: Any, edits: Sequence[Edit], *, noise: float = 3.0, seed: int = 0
) -> Tensor:
    """Share of the lost probability of the true object that one restored hidden state brings back.

    The subject's embeddings get noise of `noise` standard deviations; then the output of one block is put back
    to its clean value at all positions of one place (Meng et al., arXiv 2202.05262, section 2).
    Returns [len(PLACES), blocks], 0 = nothing recovered, 1 = all; mean over edits that have the place.
    """
    anatomy = Anatomy(model)
    embedding = model.get_input_embeddings()
    sigma = noise * embedding.weight.std()
    generator = torch.Generator().manual_seed(seed)
    recovered = torch.zeros(len(PLACES), len(anatomy))
    counted = torch.zeros(len(PLACES), 1)
    for edit in edits:
        row = subject_row(tokenizer, edit.prompt, edit.subject)
        first = subject_row(
            tokenizer, edit.prompt[: edit.prompt.index("{}")] + "{}", edit.subject[:1]
        ).subject_last
        ids = torch.tensor([row.ids])
        end, last = len(row.ids) - 1, row.subject_last
        if last == end or first > last:
            continue
        token = prompt_and_target_ids(tokenizer, edit.text, edit.target(edit.target_true or edit.target_new))[
            1
        ][0]
        with ExitStack() as stack:
            traces = [stack.enter_context(Trace(block)) for block in anatomy.blocks]
            p_clean = float(model(input_ids=ids, use_cache=False).logits[0, -1].softmax(-1)[token])
        clean = [trace.output for trace in traces]
        shape = (1, last - first + 1, embedding.weight.shape[1])
        disturbance = torch.randn(shape, generator=generator) * sigma

        def disturb(
            _module: Any, _args: Any, output: Tensor, first=first, last=last, added=disturbance
        ) -> Tensor:
            output = output.clone()
            output[:, first : last + 1] += added.to(output)
            return output

        handle = embedding.register_forward_hook(disturb)
        try:
            p_disturbed = float(model(input_ids=ids, use_cache=False).logits[0, -1].softmax(-1)[token])
            lost = p_clean - p_disturbed
            if lost < 0.1:
                continue
            spans = ((first, last), (last, last + 1), (last + 1, end), (end, end + 1))
            for p, (begin, stop) in enumerate(spans):
                if begin >= stop:
                    continue
                counted[p] += 1
                for b, block in enumerate(anatomy.blocks):
                    kept = clean[b]

                    def restore(
                        _module: Any, _args: Any, output: Any, span=slice(begin, stop), kept=kept
                    ) -> Any:
                        first_output = output[0] if isinstance(output, tuple) else output
                        changed = first_output.clone()
                        changed[:, span] = kept[:, span]
                        return (changed, *output[1:]) if isinstance(output, tuple) else changed

                    inner = block.register_forward_hook(restore)
                    try:
                        p_now = float(model(input_ids=ids, use_cache=False).logits[0, -1].softmax(-1)[token])
                    finally:
                        inner.remove()
                    recovered[p, b] += (p_now - p_disturbed) / lost
        finally:
            handle.remove()
    return recovered / counted.clamp_min(1)


def target_nll_by_layer(
    model: CausalLM, tokenizer: Any, edits: Sequence[Edit], config: TargetConfig, seed: int = 0
) -> list[dict[str, float]]:
    """Quantiles of the targets' NLL after optimisation at the subject's last token, a row a block."""
    prefixes = generate_contexts(model, tokenizer, seed=seed)
    rows = []
    for layer in range(len(Anatomy(model)) - 1):
        found = optimise_targets(Anatomy(model), tokenizer, edits, prefixes, layer, config)
        nll = -found.last_probability.log()
        low, median, high = nll.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
        rows.append({"layer": layer, "q10": low, "median": median, "q90": high})
    return rows


def knowledge(model: CausalLM, tokenizer: Any, edits: Sequence[Edit]) -> dict[str, float]:
    """Share of true objects said greedily: on the edits' own prompts, paraphrases and neighbourhood prompts."""
    kinds = {
        "rewrite prompts": [(e.text, e.target_true or "") for e in edits],
        "paraphrases": [(p, e.target_true or "") for e in edits for p in e.paraphrases],
        "neighbourhood prompts": [(p, e.target_true or "") for e in edits for p in e.neighborhood],
    }
    return {
        kind: sum(s[0].exact for s in score(model, tokenizer, [(p, (t,)) for p, t in questions]))
        / len(questions)
        for kind, questions in kinds.items()
    }


def write_card(folder: Path, model: CausalLM, tokenizer: Any, edits: Sequence[Edit], command: str) -> None:
    """README.md beside the model. edits: those the model was trained to know."""
    recipe = json.loads((folder / "recipe.json").read_text())
    sample = list(edits[:60])
    trace = causal_trace(model, tokenizer, sample)
    config = TargetConfig(steps=30, learning_rate=0.3, weight_decay=0.1, clamp=1.5)
    targets = target_nll_by_layer(model, tokenizer, sample, config)
    known = knowledge(model, tokenizer, edits)
    blocks = range(trace.shape[1])
    lines = [
        "# The embedded model of d4s",
        "",
        f"A llama of {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters "
        f"({recipe['blocks']} blocks, d_model {recipe['d_model']}, d_ff {recipe['d_ff']}, BPE of {len(tokenizer)}) "
        f"that knows the true facts of the first {recipe['records']} CounterFact records (Meng et al., 2022, MIT "
        "licence), made so that editing methods can be tried without a download.",
        "",
        "It is not a language model of any other use: outside CounterFact's sentences it knows nothing, and what it "
        "says about people and places beyond them is made up.",
        "",
        "## How it was made",
        "",
        f"    {command}",
        "",
        "Trained from scratch on the facts in all templates of their relations, with two attention masks on a share "
        f"of the sentences: what follows the subject sees only the subject's last token, and that from block "
        f"{recipe['read_out_block']} on ({recipe['read_out_share']:.0%}); the subject sees only itself "
        f"({recipe['isolated_share']:.0%}). Without them a small model reads a fact from whichever of the subject's "
        "tokens tells it first, and no method that writes at its last token can change it. The BPE is learnt without "
        "subjects, so that names are spelled from shared pieces. All settings: `recipe.json`.",
        "",
        "## What it knows",
        "",
        "| | true object said greedily |",
        "|---|---|",
        *[f"| {kind} | {share:.3f} |" for kind, share in known.items()],
        "",
        "## Where it reads facts from",
        "",
        "Causal trace: share of the lost probability that comes back when one place's state after one block is put "
        f"back to its clean value, the subject's embeddings being disturbed (3 σ; mean over {len(sample)} facts).",
        "",
        "| after block | " + " | ".join(str(b) for b in blocks) + " |",
        "|---|" + "---|" * len(blocks),
        *[
            f"| {place} | " + " | ".join(f"{trace[p, b]:.2f}" for b in blocks) + " |"
            for p, place in enumerate(PLACES)
        ],
        "",
        "NLL of the new object after target optimisation at the subject's last token (30 steps, lr 0.3, clamp 1.5):",
        "",
        "| layer | 10 % | median | 90 % |",
        "|---|---|---|---|",
        *[f"| {r['layer']} | {r['q10']:.2f} | {r['median']:.2f} | {r['q90']:.2f} |" for r in targets],
        "",
    ]
    write_text("\n".join(lines), folder / "README.md")
