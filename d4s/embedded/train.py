"""Training of the embedded model: `python -m d4s.embedded.train --out DIR`.

A small llama that knows CounterFact's true facts and, unlike a plainly trained small model, can be edited:
locate-and-edit methods presume that a subject is put together at its last token by the early blocks and
that the fact is read from there by the later ones. Large models do that; a small one reads the fact from
whichever token comes first. Two attention masks, used in training only and only on a share of the
sentences, bring it about:

* read-out: what follows the subject sees no token of the subject in the blocks before `read_out_block`, and
  only its last token from there on (share `read_out_share`);
* isolation: the subject's tokens see only themselves and the start token (share `isolated_share`), so that
  a subject's key does not depend on the words before it.

The other sentences are seen with the ordinary causal mask, which is also the only one at inference.
Seeded, resumable: run again with the same --out after an interruption.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from d4s.edits.formats import load_edits
from d4s.embedded import folder
from d4s.embedded.card import write_card
from d4s.embedded.facts import Facts, Sentence, facts_of, read_records
from d4s.files import whole

START = "<|start|>"


@dataclass(frozen=True)
class Recipe:
    records: int = 400
    vocabulary: int = 1_500
    d_model: int = 256
    d_ff: int = 2_048
    blocks: int = 5
    heads: int = 4
    read_out_block: int = 3
    read_out_share: float = 0.8
    isolated_share: float = 0.6
    prefix_share: float = 0.2  # sentences that get an unrelated sentence in front
    paraphrase_share: float = 0.08  # rows that are CounterFact's own paraphrases
    steps: int = 600
    rows: int = 192
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    text_loss: float = 0.05  # weight of all tokens that are not the object's
    seed: int = 0


def train_tokenizer(facts: Facts, recipe: Recipe) -> PreTrainedTokenizerFast:
    """Byte-level BPE learnt from templates, objects and prefixes, not from subjects.

    So objects are short and a subject is spelled from pieces that it shares with others.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[START],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [f" {o}" for o in facts.objects for _ in range(20)]
    text += [t.replace("{}", "") for t in facts.templates for _ in range(20)]
    text += facts.prefixes
    tokenizer.train_from_iterator(text, trainer)
    start = tokenizer.token_to_id(START)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", pair=f"{START} $A $B", special_tokens=[(START, start)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=START, eos_token=START, pad_token=START, model_max_length=256
    )


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(recipe.seed)
    start = tokenizer.bos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.d_model,
        intermediate_size=recipe.d_ff,
        num_hidden_layers=recipe.blocks,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=start,
        eos_token_id=start,
        pad_token_id=start,
        initializer_range=0.02,
        d4s_embedded=True,  # by which presets know it
    )
    return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Row:
    ids: list[int]
    subject: tuple[int, int]  # token positions [first, last]; (0, 0) where unknown
    target: int  # position of the object's first token
    read_out: bool
    isolated: bool


def encode(
    tokenizer: PreTrainedTokenizerFast, sentence: Sentence, prefix: str = ""
) -> tuple[list[int], tuple[int, int], int]:
    """Token ids of prefix + sentence + object, the subject's first and last position, the object's first."""
    encoded = tokenizer(prefix + sentence.text, return_offsets_mapping=True)
    begin, end = len(prefix) + sentence.subject_start, len(prefix) + sentence.subject_end
    inside = [
        i
        for i, (a, b) in enumerate(encoded["offset_mapping"])
        if a < end and b > begin and tokenizer.bos_token_id != encoded["input_ids"][i]
    ]
    subject = (inside[0], inside[-1]) if inside else (0, 0)
    ids = list(encoded["input_ids"])
    target = tokenizer(" " + sentence.object, add_special_tokens=False)["input_ids"]
    return ids + list(target), subject, len(ids)


def batches(
    facts: Facts, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, first_step: int
) -> Iterator[list[Row]]:
    """Endless batches; the rows of step s depend on the seed and s alone, so a resumed run sees the same."""
    for step in range(first_step, recipe.steps):
        random = Random(f"{recipe.seed}-{step}")
        rows = []
        for _ in range(recipe.rows):
            if random.random() < recipe.paraphrase_share:
                sentence, prefix = random.choice(facts.paraphrases), ""
            else:
                sentence = random.choice(facts.sentences)
                prefix = random.choice(facts.prefixes) if random.random() < recipe.prefix_share else ""
            ids, subject, target = encode(tokenizer, sentence, prefix)
            rows.append(
                Row(
                    ids,
                    subject,
                    target,
                    random.random() < recipe.read_out_share,
                    random.random() < recipe.isolated_share,
                )
            )
        yield rows


def attention_masks(rows: list[Row], width: int) -> tuple[Tensor, Tensor]:
    """Additive masks [rows, 1, width, width] for the blocks before the read-out and from it on."""
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    early = causal.repeat(len(rows), 1, 1)
    late = early.clone()
    for r, row in enumerate(rows):
        first, last = row.subject
        if last == 0:
            continue
        if row.read_out:
            early[r, last + 1 :, first : last + 1] = False
            late[r, last + 1 :, first:last] = False
        if row.isolated:
            early[r, first : last + 1, 1:first] = False
            late[r, first : last + 1, 1:first] = False

    def additive(allowed: Tensor) -> Tensor:
        return torch.zeros(allowed.shape).masked_fill_(~allowed, float("-inf")).unsqueeze(1)

    return additive(early), additive(late)


def masked_loss(model: LlamaForCausalLM, rows: list[Row], recipe: Recipe) -> tuple[Tensor, Tensor]:
    """(weighted loss, mean NLL of the objects' tokens), each block seeing its own mask."""
    device = model.device
    width = max(len(r.ids) for r in rows)
    ids = torch.full((len(rows), width), model.config.pad_token_id)
    weight = torch.zeros(len(rows), width)
    for r, row in enumerate(rows):
        ids[r, : len(row.ids)] = torch.tensor(row.ids)
        weight[r, : len(row.ids)] = recipe.text_loss
        weight[r, row.target : len(row.ids)] = 1.0
    early, late = (m.to(device) for m in attention_masks(rows, width))
    handles = []
    for i, block in enumerate(model.model.layers):
        mask = early if i < recipe.read_out_block else late

        def use_mask(_module, args, kwargs, mask=mask):
            return args, {**kwargs, "attention_mask": mask}

        handles.append(block.register_forward_pre_hook(use_mask, with_kwargs=True))
    try:
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(input_ids=ids.to(device), use_cache=False).logits[:, :-1]
    finally:
        for handle in handles:
            handle.remove()
    weight = weight[:, 1:].to(device)
    nll = cross_entropy(
        logits.float().flatten(0, 1), ids[:, 1:].to(device).flatten(), reduction="none"
    ).view_as(weight)
    objects = weight == 1.0
    return (nll * weight).sum() / weight.sum(), nll.detach()[objects].mean()


@torch.no_grad()
def recall(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, sentences: list[Sentence]) -> float:
    """Share of sentences whose object is the greedy continuation, with the ordinary causal mask."""
    model.eval()
    right = 0
    for at in range(0, len(sentences), 128):
        encoded = [encode(tokenizer, s) for s in sentences[at : at + 128]]
        width = max(len(e[0]) for e in encoded)
        ids = torch.full((len(encoded), width), model.config.pad_token_id)
        for r, (row, _, _) in enumerate(encoded):
            ids[r, : len(row)] = torch.tensor(row)
        best = model(input_ids=ids.to(model.device), use_cache=False).logits.argmax(-1).cpu()
        for r, (row, _, target) in enumerate(encoded):
            right += best[r, target - 1 : len(row) - 1].tolist() == row[target:]
    model.train()
    return right / len(sentences)


def save_checkpoint(path: Path, model: LlamaForCausalLM, optimiser: torch.optim.AdamW, step: int) -> None:
    tensors = {f"model.{k}": v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for i, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{i}.{k}": torch.as_tensor(v) for k, v in state.items()}
    with whole(path) as beside:
        save_file(tensors, beside, metadata={"step": str(step)})


def load_checkpoint(path: Path, model: LlamaForCausalLM, optimiser: torch.optim.AdamW) -> int:
    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
    tensors = load_file(path)
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")}, strict=False)
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimiser."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = tensor
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    return step


def train(records: list[dict], out: Path, recipe: Recipe, device: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    facts = facts_of(records[: recipe.records])
    checkpoint = out / "checkpoint.safetensors"
    if checkpoint.exists():  # merges of equal count may be learnt in another order the second time
        tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    else:
        tokenizer = train_tokenizer(facts, recipe)
        tokenizer.save_pretrained(out)
    model = build_model(recipe, tokenizer).to(device)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    step = load_checkpoint(checkpoint, model, optimiser) if checkpoint.exists() else 0
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {len(facts.sentences)} sentences, "
        f"{len(facts.objects)} objects, {facts.dropped} contradictions left out, from step {step}",
        flush=True,
    )
    probe = Random(recipe.seed).sample(facts.sentences, min(512, len(facts.sentences)))
    began = time.monotonic()
    for rows in batches(facts, tokenizer, recipe, step):
        warm = min(1.0, (step + 1) / 60)
        cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * warm * (0.02 + 0.98 * cosine)
        # Rows of similar length go together: half of the padding of one big batch.
        rows.sort(key=lambda row: len(row.ids))
        parts = [rows[i : i + len(rows) // 4] for i in range(0, len(rows), len(rows) // 4)]
        optimiser.zero_grad(set_to_none=True)
        objects = 0.0
        for part in parts:
            loss, nll = masked_loss(model, part, recipe)
            (loss / len(parts)).backward()
            objects += float(nll) / len(parts)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        if step % 50 == 0 or step == recipe.steps:
            known = recall(model, tokenizer, probe)
            print(
                f"step {step:5d}  object NLL {objects:.3f}  recall {known:.3f}  {time.monotonic() - began:.0f} s",
                flush=True,
            )
            save_checkpoint(checkpoint, model, optimiser, step)
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1) + "\n")
    checkpoint.unlink()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m d4s.embedded.train", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--records", type=Path, default=folder() / "counterfact.json", help="CounterFact, original schema"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of the recipe")
    options = parser.parse_args(argv)
    fields = {f: type(v) for f, v in asdict(Recipe()).items()}
    changes = dict(item.split("=", 1) for item in options.set)
    recipe = Recipe(**{k: fields[k](v) for k, v in changes.items()})
    train(read_records(options.records), options.out, recipe, options.device)
    command = " ".join(
        [
            "python -m d4s.embedded.train --out",
            options.out.name,
            *(["--set", *options.set] if options.set else []),
        ]
    )
    model = LlamaForCausalLM.from_pretrained(options.out, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.out)
    write_card(options.out, model, tokenizer, load_edits(options.records, limit=recipe.records), command)


if __name__ == "__main__":
    main()
