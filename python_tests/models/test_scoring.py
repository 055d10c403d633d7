from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pytest
import torch
from support.bigram import Bigram
from support.tiny import REPRESENTATIVE, TEXTS, tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from d4s.errors import ConfigError, ModelError, TokenizerError
from d4s.models import recorded
from d4s.models.forward import _CACHED_WAY, Calling, Forward, run_in_batches
from d4s.models.prompts import prompt_and_target_ids
from d4s.models.scoring import _tokenised, perplexity, score

# One target of one token, several of several tokens, long prompts beside short ones, a prompt twice.
QUESTIONS = [
    ("The mother tongue of Danielle Darrieux is", ("English", "French", "the official religion")),
    ("Therefore", ("I",)),
    ("The capital of France, where Danielle Darrieux was born, is a twin city of", ("Lyon", "Manila")),
    ("You and", ("I", "Edwin", "Steve Jobs")),
    ("Therefore", ("Lyon in France",)),
]


def own_loss(model, tokenizer, prompt: str, target: str) -> tuple[float, list[int]]:
    """The model's own loss of one unpadded row, and its argmax tokens at the target's places."""
    prompt_ids, target_ids = prompt_and_target_ids(tokenizer, prompt, target)
    ids = torch.tensor([prompt_ids + target_ids])
    labels = torch.tensor([[-100] * len(prompt_ids) + target_ids])
    with torch.no_grad():
        output = model(input_ids=ids, labels=labels)
    return output.loss.item(), output.logits[0, len(prompt_ids) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_batched_scores_equal_the_models_own_loss_row_by_row(model_type: str, seed: int) -> None:
    model, tokenizer = tiny_model(model_type, seed=seed), tiny_tokenizer()
    assert Forward(model, 0).cached_way
    for (prompt, targets), scores in zip(QUESTIONS, score(model, tokenizer, QUESTIONS), strict=True):
        for target, found in zip(targets, scores, strict=True):
            loss, argmax = own_loss(model, tokenizer, prompt, target)
            assert found.nll == pytest.approx(loss, abs=1e-5)
            assert list(found.predicted) == argmax
            assert list(found.target) == prompt_and_target_ids(tokenizer, prompt, target)[1]


@pytest.mark.parametrize("model_type", ["gpt2", "bloom", "gemma2", "mistral"])
def test_left_padded_cached_rows_and_right_padded_whole_rows_agree(model_type: str, seed: int) -> None:
    model, tokenizer = tiny_model(model_type, seed=seed), tiny_tokenizer()
    assert Forward(model, 0).cached_way
    cached = score(model, tokenizer, QUESTIONS)
    _CACHED_WAY[model] = False
    whole = score(model, tokenizer, QUESTIONS)
    for a, b in zip(cached, whole, strict=True):
        assert [s.nll for s in a] == pytest.approx([s.nll for s in b], abs=1e-5)
        assert [s.predicted for s in a] == [s.predicted for s in b]


def test_a_recurrent_model_is_scored_without_the_cache(seed: int) -> None:
    tokenizer = tiny_tokenizer()
    config = AutoConfig.for_model(
        "mamba", hidden_size=32, state_size=4, num_hidden_layers=2, vocab_size=len(tokenizer)
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(std=2.0)  # tied: large enough for answers to differ
    assert not Forward(model, 0).cached_way
    for (prompt, targets), scores in zip(QUESTIONS, score(model, tokenizer, QUESTIONS), strict=True):
        for target, found in zip(targets, scores, strict=True):
            assert found.nll == pytest.approx(own_loss(model, tokenizer, prompt, target)[0], abs=1e-4)


def test_a_model_that_ignores_the_mask_is_scored_without_the_cache(seed: int) -> None:
    model, tokenizer = tiny_model("llama", seed=seed), tiny_tokenizer()
    forward = model.forward

    calling = Calling.of(model)

    def unmasked(input_ids, attention_mask=None, position_ids=None, cache=None, use_cache=None):
        kept = calling.with_cache(cache) if use_cache else calling.without_cache()
        output = forward(input_ids=input_ids, **kept)
        return SimpleNamespace(logits=output.logits, cache=calling.cache_of(output))

    model.forward = unmasked
    assert not Forward(model, 0).cached_way
    right = tiny_model("llama", seed=seed)
    for a, b in zip(score(model, tokenizer, QUESTIONS), score(right, tokenizer, QUESTIONS), strict=True):
        assert [s.nll for s in a] == pytest.approx([s.nll for s in b], abs=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_scores_depend_neither_on_order_nor_on_batches(batch_tokens: int, seed: int) -> None:
    model, tokenizer = tiny_model("llama", seed=seed), tiny_tokenizer()
    expected = {q: s for q, s in zip(QUESTIONS, score(model, tokenizer, QUESTIONS), strict=True)}
    shuffled = random.Random(seed).sample(QUESTIONS, len(QUESTIONS))
    for question, scores in zip(
        shuffled, score(model, tokenizer, shuffled, batch_tokens=batch_tokens), strict=True
    ):
        assert [s.nll for s in scores] == pytest.approx([s.nll for s in expected[question]], abs=1e-5)


def test_a_long_prompt_and_a_long_target_share_a_batch_that_none_of_them_outgrows(seed: int) -> None:
    model, tokenizer = tiny_model("llama", seed=seed, max_position_embeddings=48), tiny_tokenizer()
    long_prompt = "piano " * 8 + "is"
    length = len(tokenizer(long_prompt)["input_ids"])
    assert 24 < length < 44
    long_target = " ".join(["Lyon"] * 7)
    questions = [(long_prompt, ("Lyon", "Paris")), ("You", (long_target, "Paris"))]
    assert length + len(tokenizer(long_target)["input_ids"]) > 48
    together = score(model, tokenizer, questions)
    for question, scores in zip(questions, together, strict=True):
        (alone,) = score(model, tokenizer, [question])
        assert [s.nll for s in scores] == pytest.approx([s.nll for s in alone], abs=1e-5)


def test_a_prompt_runs_once_for_all_its_targets(seed: int) -> None:
    model, tokenizer = tiny_model("llama", seed=seed), tiny_tokenizer()
    assert Forward(model, 0).cached_way
    tokens = []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda _module, arguments, _output: tokens.append(arguments[0].numel())
    )
    prompt, targets = TEXTS[0], ("Danielle Darrieux", "French is Paris", "The capital")
    score(model, tokenizer, [(prompt, targets), (prompt, targets[:1]), (prompt, targets)])
    handle.remove()
    assert tokens[0] == len(tokenizer(prompt)["input_ids"])
    longest = max(len(prompt_and_target_ids(tokenizer, prompt, target)[1]) for target in targets)
    assert tokens[1:] == [3 * (longest - 1)]


def test_the_head_sees_only_the_positions_that_are_read(seed: int) -> None:
    model, tokenizer = tiny_model("llama", seed=seed), tiny_tokenizer()
    seen = []
    handle = model.get_output_embeddings().register_forward_hook(
        lambda _module, arguments, _output: seen.append(tuple(arguments[0].shape[:2]))
    )
    target = prompt_and_target_ids(tokenizer, TEXTS[0], "Lyon in France")[1]
    score(model, tokenizer, [(TEXTS[0], ("Lyon in France",)), (TEXTS[1], ("Lyon in France",))])
    handle.remove()
    assert seen == [(1, 2 * len(target))]


def test_tokens_are_those_of_one_pair_at_a_time() -> None:
    tokenizer = tiny_tokenizer()
    pairs = {prompt: dict.fromkeys(targets) for prompt, targets in QUESTIONS}
    for prompt, (prompt_ids, targets) in _tokenised(tokenizer, pairs).items():
        for target, ids in targets.items():
            assert prompt_and_target_ids(tokenizer, prompt, target) == (list(prompt_ids), list(ids))


def test_log_probabilities_are_float32_of_half_precision_logits(seed: int) -> None:
    model, tokenizer = tiny_model("llama", seed=seed, dtype=torch.bfloat16), tiny_tokenizer()
    prompt_ids, target_ids = prompt_and_target_ids(tokenizer, "Therefore", "I")
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids])).logits[0, -1]
    expected = -logits.float().log_softmax(-1)[target_ids[0]].item()
    assert score(model, tokenizer, [("Therefore", ("I",))])[0][0].nll == pytest.approx(expected, abs=1e-5)


def test_a_model_of_nan_finds_everything_infinitely_unlikely() -> None:
    model = Bigram({"a": {"b": 0.5}})
    with torch.no_grad():
        model.table.fill_(math.nan)
    assert score(model, model.tokenizer, [("a", ("b",))])[0][0].nll == math.inf


def test_mean_token_nll_and_shares_of_a_model_written_down() -> None:
    model = Bigram({"a": {"b": 0.5, "c": 0.25}, "b": {"c": 0.1}, "c": {}})
    (one, two), *_ = score(model, model.tokenizer, [("a", ("b", "b c"))])
    assert one.nll == pytest.approx(math.log(2), abs=1e-6) and one.exact and one.right == 1
    assert two.nll == pytest.approx((math.log(2) + math.log(10)) / 2, abs=1e-6)
    assert two.right == 0.5 and not two.exact


def test_training_mode_comes_back(seed: int) -> None:
    model, tokenizer = tiny_model("gpt2", seed=seed).train(), tiny_tokenizer()
    first = score(model, tokenizer, QUESTIONS)
    assert model.training
    assert first == score(model, tokenizer, QUESTIONS)  # no dropout meanwhile


def test_errors_name_the_text_and_the_limit() -> None:
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer(start=False)
    with pytest.raises(ModelError, match="128 positions"):
        score(model, tokenizer, [("You " * 200, ("I",))])
    with pytest.raises(TokenizerError, match="prompt"):
        score(model, tokenizer, [("", ("I",))])


def test_batches_are_halved_where_memory_runs_out() -> None:
    served: list[int] = []

    def run(chosen: list[int]) -> None:
        if len(chosen) > 3:
            raise torch.OutOfMemoryError
        served.extend(chosen)

    widths = [5, 9, 2, 7, 7, 3, 8, 1, 4, 6]
    run_in_batches(widths, run, 100)
    assert sorted(served) == list(range(10))
    assert [widths[i] for i in served] == sorted(widths, reverse=True)

    def never(_chosen: list[int]) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        run_in_batches(widths, never, 100)


def test_what_recordings_keep_is_given_back_before_a_single_row_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served: list[int] = []
    held = [True]
    monkeypatch.setattr(recorded, "keep_memory", lambda: held[0])
    monkeypatch.setattr(recorded, "release", lambda: held.__setitem__(0, False))

    def run(chosen: list[int]) -> None:
        if held[0]:
            raise torch.OutOfMemoryError
        served.extend(chosen)

    run_in_batches([5], run, 100)
    assert served == [0]

    def never(_chosen: list[int]) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(recorded, "keep_memory", lambda: True)  # as after a recording that failed
    with pytest.raises(torch.OutOfMemoryError):
        run_in_batches([5, 3], never, 100)


def test_batches_keep_to_the_token_budget() -> None:
    widths, copies = [4, 10, 6, 4, 5, 9], [1, 1, 3, 2, 1, 1]
    batches: list[list[int]] = []
    run_in_batches(widths, batches.append, 20, copies=copies)
    assert sorted(i for batch in batches for i in batch) == list(range(6))
    for batch in batches:
        assert len(batch) == 1 or sum(copies[i] for i in batch) * max(widths[i] for i in batch) <= 20


def test_perplexity_of_one_window_is_the_models_own(seed: int) -> None:
    model, tokenizer = tiny_model("llama", seed=seed), tiny_tokenizer()
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = math.exp(model(input_ids=ids, labels=ids).loss.item())
    assert perplexity(model, tokenizer, [TEXTS[0]]) == pytest.approx(expected, rel=1e-5)


def test_windows_score_each_token_once_behind_their_overlap(seed: int) -> None:
    model, tokenizer = tiny_model("llama", seed=seed), tiny_tokenizer()
    window, overlap, nll = 16, 5, []
    for text in TEXTS[:2]:
        ids = torch.tensor(tokenizer(text)["input_ids"])
        with torch.no_grad():
            scored = 1
            while scored < len(ids):
                # Every window begins with the start token, as the text does.
                begin = 1 if scored == 1 else scored - 1 - overlap
                part = torch.cat([ids[:1], ids[begin : begin + window]])
                log_p = model(part[None, :-1]).logits[0].log_softmax(-1)
                each = -log_p.gather(1, part[1:, None]).squeeze(1)
                nll += each[scored - begin :].tolist()
                scored = begin + len(part) - 1
    assert len(nll) == sum(len(tokenizer(text)["input_ids"]) - 1 for text in TEXTS[:2]) > 2 * window
    found = perplexity(model, tokenizer, TEXTS[:2], window=window, overlap=overlap, batch_tokens=200)
    assert found == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-5)


def test_perplexity_refuses_what_it_cannot_measure(seed: int) -> None:
    model, tokenizer = tiny_model("llama", seed=seed), tiny_tokenizer()
    with pytest.raises(ConfigError, match="two tokens"):
        perplexity(model, tokenizer, [])
    with pytest.raises(ConfigError, match="overlap=20"):
        perplexity(model, tokenizer, TEXTS, window=10, overlap=20)


def test_a_compiled_model_keeps_its_cache(seed: int) -> None:
    model = tiny_model("llama", seed=seed)
    assert Calling.of(torch.compile(model)) == Calling.of(model)
