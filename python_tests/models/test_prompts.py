"""From text to token rows: the subject's last token, the target's tokens, contexts, padding."""

from __future__ import annotations

import copy

import pytest
import torch
from support.tiny import tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from d4s.errors import EditError, TokenizerError
from d4s.models.prompts import (
    CONTEXT_SEEDS,
    generate_contexts,
    pad_id,
    padded,
    prompt_and_target_ids,
    sample,
    subject_row,
    text_ids,
)


def bpe(words: list[str], *, start: bool = True, metaspace: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer with these merged pieces over single characters, which does not split before merging."""
    characters = sorted(
        {c for word in words for c in word} | set("abcdefghijklmnopqrstuvwxyz .ABCDEFGHILMNOPRST")
    )
    vocabulary = {"<s>": 0, **{c: i for i, c in enumerate(characters, 1)}}
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            pair = (word[: end - 1], word[end - 1])
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append(pair)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        tokenizer.decoder = decoders.Metaspace()
    if start:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def token_texts(tokenizer, text: str) -> list[str]:
    """What of the text each token stands for, by its offsets."""
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return [text[first:stop] for first, stop in offsets]


def last_by_hand(tokenizer, text: str, end: int) -> int:
    """The last token any of whose characters stands before `end`, found by growing the text's offsets."""
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return max(i for i, (first, stop) in enumerate(offsets) if first < end and stop > first)


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("subject", ["Danielle Darrieux", "Lyon", "Xqzv", "Steve Jobs;", "a"])
@pytest.mark.parametrize(
    "template", ["The mother tongue of {} is", "{} worked for", "Who is {}", "{}'s capital"]
)
def test_the_subjects_last_token_is_found_by_offsets(start, subject, template):
    tokenizer = tiny_tokenizer(start)
    row = subject_row(tokenizer, template, subject)
    text = template.replace("{}", subject)
    assert list(row.ids) == tokenizer(text)["input_ids"] and row.target_start == len(row.ids)
    assert row.subject_last == last_by_hand(tokenizer, text, template.index("{}") + len(subject))
    assert token_texts(tokenizer, text)[row.subject_last].strip()[-1] == subject[-1]


def test_a_start_token_moves_the_place_by_one():
    with_start, without = (
        subject_row(tiny_tokenizer(start), "The capital of {} is", "France") for start in (True, False)
    )
    assert with_start.subject_last == without.subject_last + 1
    assert with_start.ids[1:] == without.ids


def test_of_a_subject_that_stands_twice_the_templates_one_is_meant():
    tokenizer = tiny_tokenizer()
    first = subject_row(tokenizer, "{} is a city, and Lyon is French", "Lyon")
    second = subject_row(tokenizer, "Lyon is a city, and {} is French", "Lyon")
    assert first.ids == second.ids
    texts = token_texts(tokenizer, "Lyon is a city, and Lyon is French")
    assert (
        "".join(texts[: first.subject_last + 1]).endswith("Lyon") and first.subject_last < second.subject_last
    )
    assert "".join(texts[: second.subject_last + 1]) == "Lyon is a city, and Lyon"


def test_of_a_subject_that_holds_itself_or_the_prefix_the_templates_end_counts():
    tokenizer = tiny_tokenizer()
    row = subject_row(tokenizer, "{} is", "Lyon Lyon", prefix="Lyon. ")
    assert "".join(token_texts(tokenizer, "Lyon. Lyon Lyon is")[: row.subject_last + 1]) == "Lyon. Lyon Lyon"


@pytest.mark.parametrize("subject", ["Škoda Ř", "東京", "Beyoncé", "naïve 🙂", "é"])
def test_of_a_character_of_several_bytes_the_last_token_counts(subject):
    tokenizer = tiny_tokenizer()
    row = subject_row(tokenizer, "Where is {}? In", subject)
    # Byte-level pieces: the bytes up to the token end exactly with the subject's last byte.
    spelled = "".join(tokenizer.convert_ids_to_tokens(list(row.ids[: row.subject_last + 1])))
    whole = "".join(tokenizer.convert_ids_to_tokens(tokenizer("Where is " + subject)["input_ids"]))
    assert spelled == whole


def test_a_token_that_reaches_over_the_subjects_end_is_its_last():
    tokenizer = bpe(["ork i", "Yo"])
    row = subject_row(tokenizer, "In {} it rains", "York")
    assert token_texts(tokenizer, "In York it rains")[row.subject_last] == "ork i"


def test_a_token_that_reaches_over_the_subjects_start_does_no_harm():
    tokenizer = bpe(["n Yo"])
    row = subject_row(tokenizer, "in {} it rains", "York")
    assert token_texts(tokenizer, "in York it rains")[row.subject_last] == "k"
    assert subject_row(tokenizer, "in {} it rains", "Yo").subject_last == row.subject_last - 2


def test_a_prefix_stands_before_the_prompt():
    tokenizer = tiny_tokenizer()
    plain = subject_row(tokenizer, "The capital of {} is", "France", "Paris")
    behind = subject_row(tokenizer, "The capital of {} is", "France", "Paris", prefix="You and {} play. ")
    text = "You and {} play. The capital of France is"
    assert list(behind.ids[: behind.target_start]) == tokenizer(text)["input_ids"]
    assert "".join(token_texts(tokenizer, text)[: behind.subject_last + 1]).endswith("France")
    assert behind.ids[behind.target_start :] == plain.ids[plain.target_start :]


def test_prompt_and_target_are_one_text_where_nothing_merges_across():
    tokenizer = tiny_tokenizer()
    prompt, target = prompt_and_target_ids(tokenizer, "The capital of France is", "Paris Lyon")
    assert prompt == tokenizer("The capital of France is")["input_ids"]
    assert prompt + target == tokenizer("The capital of France is Paris Lyon")["input_ids"]
    row = subject_row(tokenizer, "The capital of {} is", "France", "Paris Lyon")
    assert list(row.ids) == prompt + target and row.target_start == len(prompt)


def test_the_prompts_ids_stay_where_the_tokenizer_would_merge_across_the_border():
    """'is P' is one piece of the joined text; prompt and target keep their own pieces all the same."""
    tokenizer = bpe(["is P", "is"])
    joined = tokenizer("it is Paris")["input_ids"]
    prompt, target = prompt_and_target_ids(tokenizer, "it is", "Paris")
    assert prompt == tokenizer("it is")["input_ids"] and joined[: len(prompt)] != prompt
    assert "".join(tokenizer.convert_ids_to_tokens(target)) == " Paris", "with the one space that joins them"
    row = subject_row(tokenizer, "{} is", "it", "Paris")
    assert list(row.ids) == prompt + target and row.target_start == len(prompt)


@pytest.mark.parametrize("doubling", [True, False])
def test_a_sentencepiece_target_begins_with_one_space_mark(doubling):
    """Llama 2's tokenizer puts a mark in front of ' Paris' although there is one; newer ones do not."""
    tokenizer = bpe(["▁is▁P", "▁is"], metaspace=True)
    if doubling:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    prompt, target = prompt_and_target_ids(tokenizer, "it is", "Paris")
    assert prompt == tokenizer("it is")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(target) == list("▁Paris")


def test_a_target_gets_no_start_token():
    tokenizer = bpe(["is P", "is"])
    assert 0 not in prompt_and_target_ids(tokenizer, "it is", "Paris")[1]


def test_a_tokenizer_without_offsets_is_refused():
    with pytest.raises(TokenizerError, match=r"ByT5Tokenizer gives no character offsets.*fast tokenizer"):
        subject_row(ByT5Tokenizer(), "The capital of {} is", "France")


def test_a_template_without_place_for_the_subject_is_refused():
    with pytest.raises(EditError, match=r"'The capital is' has no '\{\}'"):
        subject_row(tiny_tokenizer(), "The capital is", "France")


def test_a_subject_whose_end_the_tokenizer_drops_is_named():
    tokenizer = bpe([])
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("ss!", "")
    with pytest.raises(TokenizerError, match=r"no token of .* covers the end of the subject 'lass!'"):
        subject_row(tokenizer, "who is {}", "lass!")


def test_contexts_are_seeded_continuations_of_the_five_seeds_by_the_model(seed):
    model, tokenizer = tiny_model("llama", seed), tiny_tokenizer()
    first = generate_contexts(model, tokenizer, per_seed=2, length=6, seed=7)
    assert first == generate_contexts(model, tokenizer, per_seed=2, length=6, seed=7)
    assert first != generate_contexts(model, tokenizer, per_seed=2, length=6, seed=8)
    assert first != generate_contexts(tiny_model("llama", seed + 1), tokenizer, per_seed=2, length=6, seed=7)
    assert len(first) == 10 and all(text.endswith(". ") for text in first)
    assert [text.startswith(word) for text, word in zip(first[::2], CONTEXT_SEEDS, strict=True)] == [True] * 5
    assert len(generate_contexts(model, tokenizer)) == 5


def test_contexts_take_one_of_the_five_likeliest_tokens_each_time(monkeypatch, seed):
    model, tokenizer = tiny_model("gpt2", seed), tiny_tokenizer()
    made: list[torch.Tensor] = []
    plain = model.generate

    def spy(**arguments):
        made.append(plain(**arguments))
        return made[-1]

    monkeypatch.setattr(model, "generate", spy)
    generate_contexts(model, tokenizer, per_seed=8, length=7, seed=seed)
    ranks = []
    for rows, word in zip(made, CONTEXT_SEEDS, strict=True):
        prompt = tokenizer(word)["input_ids"]
        assert rows.shape == (8, 7) and (rows[:, : len(prompt)] == torch.tensor(prompt)).all()
        with torch.no_grad():
            logits = model(rows).logits[:, len(prompt) - 1 : -1]
        logits[..., tokenizer.eos_token_id] = -torch.inf  # no text ends early
        chosen = rows[:, len(prompt) :].unsqueeze(-1)
        ranks.append((logits > logits.gather(-1, chosen)).sum(-1).flatten())
    ranks = torch.cat(ranks)
    assert ranks.max() <= 4 and (ranks > 0).float().mean() > 0.2


@pytest.mark.parametrize("start", [False, True])
def test_a_context_counts_its_seed_word_and_a_start_token(monkeypatch, start, seed):
    model, tokenizer = tiny_model("llama", seed), tiny_tokenizer(start)
    plain, widths = model.generate, []
    monkeypatch.setattr(model, "generate", lambda **a: widths.append((r := plain(**a)).shape[1]) or r)
    words = [len(tokenizer(word)["input_ids"]) for word in CONTEXT_SEEDS]
    assert min(words) == 1 + start and max(words) == 5 + start
    generate_contexts(model, tokenizer, length=10)
    assert widths == [10] * 5
    for length in (1, 4, 5 + start):
        widths.clear()
        found = generate_contexts(model, tokenizer, length=length)
        assert widths == [length] * sum(word < length for word in words)
        for text, seed_word, word in zip(found, CONTEXT_SEEDS, words, strict=True):
            assert (text == f"{seed_word}. ") or word < length  # without room for more it stays alone


WISHES = dict(
    top_p=0.01,
    temperature=1e-3,
    num_beams=4,
    repetition_penalty=9.0,
    no_repeat_ngram_size=1,
    return_dict_in_generate=True,
    output_scores=True,
    num_return_sequences=3,
    min_length=40,
    max_time=1e-9,
    forced_eos_token_id=1,
    bad_words_ids=[[7], [8], [9]],
    suppress_tokens=[10, 11, 12],
    begin_suppress_tokens=[13, 14],
    sequence_bias=[[[15], 50.0]],
    eos_token_id=[1, 20, 21, 22],
    use_cache=False,
)


@pytest.mark.parametrize(
    "wish", [*([name] for name in WISHES), ["num_beams", "num_return_sequences"]], ids="-".join
)
def test_contexts_do_not_depend_on_the_models_generation_settings(wish, seed):
    model, tokenizer = tiny_model("llama", seed), tiny_tokenizer()
    expected = generate_contexts(model, tokenizer, per_seed=2, seed=seed)
    for name in wish:
        setattr(model.generation_config, name, WISHES[name])
    wishes = model.generation_config.to_dict()
    assert generate_contexts(model, tokenizer, per_seed=2, seed=seed) == expected
    assert model.generation_config.to_dict() == wishes
    ids, drawn = torch.full((3, 1), tokenizer.bos_token_id), []
    for one in (model, tiny_model("llama", seed)):
        torch.manual_seed(seed)
        drawn.append(sample(one, tokenizer, ids, max_new_tokens=20))
    assert torch.equal(*drawn)


def test_settings_of_the_model_come_back_after_a_failure(monkeypatch, seed):
    model = tiny_model("gpt2", seed)
    own = model.generation_config
    monkeypatch.setattr(model, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(model, tiny_tokenizer(), torch.zeros(1, 1, dtype=torch.long), max_new_tokens=1)
    assert model.generation_config is own


def test_samples_follow_the_models_probabilities(seed):
    """Of 4,000 draws of one token each id's share is near its probability (5 standard errors)."""
    model, tokenizer = tiny_model("gpt2", seed), tiny_tokenizer()
    ids = torch.tensor([[5]])
    with torch.no_grad():
        p = model(ids).logits[0, -1].softmax(-1)
    drawn = sample(model, tokenizer, ids.repeat(4_000, 1), max_new_tokens=1)[:, 1]
    shares = torch.bincount(drawn, minlength=len(p)) / 4_000
    assert ((shares - p).abs() <= 5 * (p * (1 - p) / 4_000).sqrt() + 1e-3).all()


def test_contexts_leave_random_state_and_training_flag_as_they_were(seed):
    model = tiny_model("gpt2", seed, resid_pdrop=0.5).train()
    before = torch.get_rng_state()
    first = generate_contexts(model, tiny_tokenizer(), seed=1)
    assert model.training and torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert generate_contexts(model.eval(), tiny_tokenizer(), seed=1) == first, "no dropout while sampling"
    assert not model.training


def test_contexts_that_fail_leave_the_training_flag(monkeypatch, seed):
    model = tiny_model("gpt2", seed).train()
    before = torch.get_rng_state()
    monkeypatch.setattr(model, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate_contexts(model, tiny_tokenizer())
    assert model.training and torch.equal(torch.get_rng_state(), before)


def test_rows_are_padded_on_the_side_asked_for():
    rows = [(3, 1, 4), (1,), (5, 9)]
    ids, mask = padded(rows, 7)
    assert ids.tolist() == [[3, 1, 4], [1, 7, 7], [5, 9, 7]] and mask.tolist() == [
        [1, 1, 1],
        [1, 0, 0],
        [1, 1, 0],
    ]
    ids, mask = padded(rows, 7, left=True)
    assert ids.tolist() == [[3, 1, 4], [7, 7, 1], [7, 5, 9]] and mask.tolist() == [
        [1, 1, 1],
        [0, 0, 1],
        [0, 1, 1],
    ]
    assert ids.dtype == mask.dtype == torch.int64


def test_tokens_that_are_put_behind_a_text_are_left_out():
    start, both = tiny_tokenizer(), copy.deepcopy(tiny_tokenizer())
    both.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", start.bos_token_id), ("</s>", start.eos_token_id)]
    )
    assert both("Lyon")["input_ids"] == [*start("Lyon")["input_ids"], start.eos_token_id]
    texts = ["The capital of France is", "Lyon"]
    assert text_ids(both, texts) == text_ids(start, texts) == start(texts)["input_ids"]
    assert text_ids(tiny_tokenizer(False), texts) == tiny_tokenizer(False)(texts)["input_ids"]
    pair = ("The capital of France is", "Paris")
    assert prompt_and_target_ids(both, *pair) == prompt_and_target_ids(start, *pair)
    for target in ("", "Paris"):
        rows = [subject_row(t, "The capital of {} is", "France", target) for t in (start, both)]
        assert rows[0] == rows[1]


def test_an_id_to_pad_with_is_one_that_the_model_knows():
    tokenizer = bpe([])
    added = copy.deepcopy(tiny_tokenizer())
    added.add_special_tokens({"pad_token": "[PAD]"})
    known = tiny_model("llama").config.vocab_size
    assert added.pad_token_id == known
    assert pad_id(added) == added.eos_token_id < known
    assert pad_id(tokenizer) == tokenizer.bos_token_id
    tokenizer.bos_token = None
    assert pad_id(tokenizer) == 0


def test_a_text_that_begins_with_the_start_token_gets_one():
    tokenizer = tiny_tokenizer()
    bare, own = text_ids(tokenizer, ["The capital of France is", "<s>The capital of France is"])
    assert own == bare and bare.count(tokenizer.bos_token_id) == 1
    assert text_ids(tokenizer, ["<s><s>Lyon"]) == text_ids(tokenizer, ["Lyon"])
    assert prompt_and_target_ids(tokenizer, "<s>it is", "Lyon") == prompt_and_target_ids(
        tokenizer, "it is", "Lyon"
    )


@pytest.mark.parametrize("target", ["", "Paris"])
@pytest.mark.parametrize("prefix", ["", "You and I play. "])
@pytest.mark.parametrize("start", [True, False])
def test_a_template_with_its_own_start_token_gives_the_row_of_one_without(start, prefix, target):
    """With a context in front, too, the start token is the row's first and its only one."""
    tokenizer = tiny_tokenizer(start)
    own = subject_row(tokenizer, "<s>The capital of {} is", "France", target, prefix)
    plain = subject_row(tiny_tokenizer(True), "The capital of {} is", "France", target, prefix)
    assert own == plain
    assert own.ids.index(tokenizer.bos_token_id) == 0 and own.ids.count(tokenizer.bos_token_id) == 1


def test_a_tokenizer_that_adds_no_start_token_keeps_the_texts_own():
    tokenizer = tiny_tokenizer(False)
    (ids,) = text_ids(tokenizer, ["<s>Lyon"])
    assert ids == [tokenizer.bos_token_id, *text_ids(tokenizer, ["Lyon"])[0]]


@pytest.mark.parametrize("merged", ["▁20", "▁2"])
@pytest.mark.parametrize("doubling", [True, False])
def test_a_sentencepiece_target_without_a_space_gets_no_space_mark(doubling, merged):
    tokenizer = bpe(["▁is▁P", "s$2", merged, "\n", "0"], metaspace=True)
    if doubling:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    prompt, target = prompt_and_target_ids(tokenizer, "it is$", ("20", ""))
    assert prompt == tokenizer("it is$")["input_ids"], "although 's$2' would merge across the border"
    assert "".join(tokenizer.convert_ids_to_tokens(target)) == "20"


def test_two_spellings_of_a_subject_end_at_the_same_token():
    tokenizer = tiny_tokenizer()
    from d4s.edits import Edit

    rows = [
        subject_row(tokenizer, edit.prompt, edit.subject)
        for edit in (Edit("Where is {}? In", name, "x") for name in ("Beyonce\u0301", "Beyonc\u00e9"))
    ]
    assert rows[0] == rows[1]
    spelt = tokenizer.convert_ids_to_tokens(list(rows[0].ids[: rows[0].subject_last + 1]))
    assert "".join(spelt).endswith("".join(tokenizer.convert_ids_to_tokens(tokenizer("é")["input_ids"][1:])))
