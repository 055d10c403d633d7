from __future__ import annotations

import math
import random

import pytest
import torch
from support.bigram import Bigram
from support.tiny import TEXTS, tiny_model, tiny_tokenizer

from d4s.errors import ConfigError
from d4s.models.forward import _CACHED_WAY
from d4s.models.generation import TermWeights, Written, fluency, generate, generate_greedy, says

PROMPTS = [
    "The mother tongue of Danielle Darrieux is",
    "Therefore",
    "You and I play the piano because the official religion",
]


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mistral", "bloom", "gemma2"])
def test_greedy_text_is_the_argmax_token_by_token(model_type: str, seed: int) -> None:
    model, tokenizer = tiny_model(model_type, seed=seed), tiny_tokenizer()
    options = dict(max_new_tokens=12, stop_at_line=False, stop_at_end=False)
    for prompt, written in zip(PROMPTS, generate(model, tokenizer, PROMPTS, **options), strict=True):
        ids = tokenizer(prompt)["input_ids"]
        for token in written.ids:
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            logits[tokenizer.eos_token_id] = -math.inf
            assert logits[token] >= logits.max() - 1e-5
            ids.append(token)
        assert len(written.ids) == 12 and not written.ended


@pytest.mark.parametrize("top_k", [1, 5])
@pytest.mark.parametrize("cached", [True, False])
def test_text_depends_neither_on_order_nor_on_the_other_prompts(top_k: int, cached: bool, seed: int) -> None:
    model, tokenizer = tiny_model("llama", seed=seed), tiny_tokenizer()
    _CACHED_WAY[model] = cached
    options = dict(max_new_tokens=8, top_k=top_k, seed=seed)
    together = dict(zip(PROMPTS, generate(model, tokenizer, PROMPTS, **options), strict=True))
    shuffled = random.Random(seed).sample(PROMPTS, 3)
    assert generate(model, tokenizer, shuffled, batch_tokens=1, **options) == [together[p] for p in shuffled]


def test_sampled_tokens_are_among_the_k_likeliest_with_their_probabilities(seed: int) -> None:
    # Half of the weight is on 'other', a tenth on e, which is fifth and never drawn with k = 4.
    model = Bigram({f"p{i}": {"b": 0.2, "c": 0.15, "d": 0.1, "e": 0.05} for i in range(2000)})
    prompts = [f"p{i}" for i in range(2000)]
    texts = generate(model, model.tokenizer, prompts, max_new_tokens=1, top_k=4, seed=seed)
    share = {word: sum(w.text == word for w in texts) / 2000 for word in ("other", "b", "c", "d", "e")}
    assert share["e"] == 0
    for word, p in {"other": 0.5, "b": 0.2, "c": 0.15, "d": 0.1}.items():
        assert share[word] == pytest.approx(p / 0.95, abs=0.06)
    assert texts != generate(model, model.tokenizer, prompts, max_new_tokens=1, top_k=4, seed=seed + 1)


def test_text_ends_at_the_end_token_or_at_the_limit() -> None:
    model = Bigram({"a": {"b": 0.9}, "b": {"<end>": 0.9}, "c": {"d": 0.9}, "d": {"c": 0.9}})
    ended, cut = generate(model, model.tokenizer, ["a", "c"], max_new_tokens=4)
    assert (ended.text, ended.ended) == ("b", True)
    assert (cut.text, cut.ended) == ("d c d c", False)
    (on,) = generate(model, model.tokenizer, ["a"], max_new_tokens=3, stop_at_end=False)
    assert "<end>" not in on.text and len(on.ids) == 3


def test_text_ends_at_a_line_break_once_there_is_something_before_it(seed: int) -> None:
    model, tokenizer = tiny_model("llama", seed=seed), tiny_tokenizer()
    (break_id,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
    (word,) = tokenizer("a", add_special_tokens=False)["input_ids"]
    plan = iter([break_id, word, break_id, word, word])
    head = model.get_output_embeddings()

    def force(_head, _arguments, logits):
        forced = torch.full_like(logits, -100.0)
        forced[..., next(plan)] = 0.0
        return forced

    _CACHED_WAY[model] = True
    handle = head.register_forward_hook(force)
    (written,) = generate(model, tokenizer, ["You"], max_new_tokens=5)
    handle.remove()
    assert (written.text, written.ended) == ("a", True)


def test_the_models_own_generation_settings_do_not_count(seed: int) -> None:
    model, tokenizer = tiny_model("llama", seed=seed), tiny_tokenizer()
    plain = generate_greedy(model, tokenizer, PROMPTS, 8)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample = True
    assert generate_greedy(model, tokenizer, PROMPTS, 8) == plain


def test_generation_refuses_impossible_settings() -> None:
    with pytest.raises(ConfigError, match="top_k=0"):
        generate(tiny_model("llama"), tiny_tokenizer(), PROMPTS, max_new_tokens=1, top_k=0)


@pytest.mark.parametrize(
    ("text", "ended", "answer", "right"),
    [
        (" English", True, "English", True),
        (" english.", True, "English", True),
        (" The  Netherlands. They", False, "Netherlands", True),
        (" St. Louis. It lies", False, "St. Louis", True),
        (" English and French", True, "English", False),
        (" English", False, "English", False),  # cut off: 'English Channel' could have followed
        (" not English", True, "English", False),
        ("", True, "English", False),
        (" A", True, "A", True),  # a letter of a choice, not an article
        ("", True, "A", False),
        (" the. It", True, "A", False),
        (". English", True, "A", False),
    ],
)
def test_exact_match_of_free_text(text: str, ended: bool, answer: str, right: bool) -> None:
    assert says(Written((), text, ended), (answer, "Xhosa")) is right


def test_entropy_of_texts_worked_by_hand() -> None:
    assert fluency("a a a a a a") == 0
    # Bigrams ab ×2, bc, ca: 1.5 bits; trigrams abc, bca, cab: log2 3.
    assert fluency("a b c a b") == pytest.approx((2 / 3 * 1.5 + 4 / 3 * math.log2(3)) / 2)
    assert fluency("") == 0 and fluency(TEXTS[0]) > fluency("is is of of is is of of is is of of is is")


def test_likeness_of_texts_worked_by_hand() -> None:
    weights = TermWeights(["aa bb, I.", "aa cc, I."])
    rare, usual = math.log(3 / 2) + 1, 1.0
    assert weights.cosine("aa bb", "bb AA") == pytest.approx(1)
    assert weights.cosine("aa", "aa bb") == pytest.approx(usual / math.hypot(usual, rare))
    assert weights.cosine("bb", "cc") == 0 and weights.cosine("xx", "aa") == 0 and weights.cosine("", "") == 0
    assert weights.cosine("bb, I.", "cc, I.") == 0  # what all texts share tells nothing
