"""Whether a model can be asked and edited at all, found out by one short forward pass before anything else runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from d4s.edits import Edit
from d4s.errors import ModelError, shown
from d4s.models.architectures import check_bare, check_on_devices
from d4s.models.causal_lm import CausalLM
from d4s.models.forward import STARTS, Forward, evaluating, most_positions
from d4s.models.prompts import pad_id, text_ids

_WORDS = "The capital of"  # said to a model where there are no edits


def check_ready(model: CausalLM, tokenizer: Any, edits: Sequence[Edit] = ()) -> None:
    """Raises ModelError unless the unedited model can be asked, and its weights and logits are finite."""
    check_askable(model, tokenizer, edits)
    check_finite(model)
    check_logits(model, tokenizer, edits[0].text if edits else _WORDS)


def check_askable(model: CausalLM, tokenizer: Any, edits: Sequence[Edit] = ()) -> None:
    """Raises ModelError unless the model is a bare one, on devices, with an embedding for each token of the edits.

    What it says may be NaN: editing can bring a model to that, and its figures then say so.
    """
    check_bare(model)
    check_on_devices(model)
    check_vocabulary(model, tokenizer, edits)
    check_lengths(model, tokenizer, edits)


def check_finite(model: CausalLM) -> None:
    """Raises ModelError if any weight holds NaN or infinity: nothing the model says then means anything."""
    for name, weight in model.named_parameters():
        # Quantised weights are left to `Anatomy.check_finite`, which refuses them where they are to be edited.
        if (
            weight.is_floating_point()
            and weight.element_size() > 1
            and not torch.isfinite(weight.detach()).all()
        ):
            raise ModelError(
                f"{name} holds values that are NaN or infinite; load the model again from an intact file"
            )


def check_logits(model: CausalLM, tokenizer: Any, text: str) -> None:
    """Raises ModelError if the model's logits after the text are not finite: its type of number is too small for it."""
    (ids,) = text_ids(tokenizer, (text,))
    if not ids:
        return
    with evaluating(model):
        logits = Forward(model, pad_id(tokenizer)).whole([ids], [(len(ids) - 1,)])
    if torch.isfinite(logits).all():
        return
    dtype = next(model.parameters()).dtype
    if dtype == torch.float16:
        raise ModelError(
            "the unedited model's logits are NaN or infinite in float16, which ends at 65504; load it in bfloat16 "
            "(dtype=torch.bfloat16, or --dtype bfloat16) or float32, which have room for what it computes"
        )
    raise ModelError(
        f"the unedited model's logits are NaN or infinite in {str(dtype).removeprefix('torch.')}, whose range is "
        "float32's: its weights, finite as they are, are not what its config.json says; load it from intact files"
    )


def check_vocabulary(model: CausalLM, tokenizer: Any, edits: Sequence[Edit]) -> None:
    """Raises ModelError for a token of the edits that the model has no embedding for: one added to its tokenizer."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    size = getattr(embeddings, "num_embeddings", None)
    if size is None or not edits or max(tokenizer.get_vocab().values(), default=0) < size:
        return  # most models: no text can have such a token
    for edit in edits:
        texts = list(dict.fromkeys(_texts_of(edit)))
        for text, ids in zip(texts, text_ids(tokenizer, texts), strict=True):
            for token in ids:
                if token >= size:
                    spelled = tokenizer.convert_ids_to_tokens(token)
                    raise ModelError(
                        f"edit {edit.id}: {text!r} has the token {spelled!r} (id {token}), and "
                        f"the model's embeddings end at {size - 1}; take the tokenizer the model was trained with, "
                        "or give it the token by model.resize_token_embeddings(len(tokenizer)) and training"
                    )


def check_lengths(model: CausalLM, tokenizer: Any, edits: Sequence[Edit]) -> None:
    """Raises ModelError for a text that an edit is scored by and that is longer than the model's positions."""
    most = most_positions(model)
    if most is None:
        return
    for edit in edits:
        for name, text in _scored(edit):
            if len(text.encode()) + STARTS <= most:  # a token has a byte at the least
                continue
            (ids,) = text_ids(tokenizer, (text,))
            if len(ids) > most:
                raise ModelError(
                    f"edit {edit.id}, {name}: {shown(text)} has {len(ids)} tokens with its answer, and the model has "
                    f"{most} positions; shorten the text, or leave the edit out"
                )


def _scored(edit: Edit) -> Iterator[tuple[str, str]]:
    """(field, text with its answer) of all that an edit is scored by."""
    answers = [edit.target_new] + ([edit.target_true] if edit.target_true is not None else [])
    fields = {"prompt": (edit.text,), "paraphrases": edit.paraphrases, "neighborhood": edit.neighborhood}
    for name, texts in fields.items():
        yield from ((name, f"{text} {answer}") for text in texts for answer in answers)
    for name, questions in (("locality", edit.locality), ("portability", edit.portability)):
        for question in questions:
            yield from ((name, f"{question.prompt} {answer}") for answer in question.answers or ("",))


def _texts_of(edit: Edit) -> Iterator[str]:
    """All that an edit may make a model read."""
    answers = [edit.target_new] + ([edit.target_true] if edit.target_true is not None else [])
    yield edit.text
    for answer in answers:
        yield f"{edit.text} {answer}"
    yield from (*edit.paraphrases, *edit.neighborhood, *edit.attribute, *edit.generation)
    for question in (*edit.locality, *edit.portability):
        yield question.prompt
        yield from (f"{question.prompt} {answer}" for answer in question.answers)
