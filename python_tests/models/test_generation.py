from __future__ import annotations

import math
import random
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
from support.bigram import Bigram
from support.tiny import TEXTS, tiny_model, tiny_tokenizer

from d4s.errors import ConfigError
from d4s.models.forward import _CACHED_WAY
from d4s.models.generation import (
    TermWeights,
    Written,
    _slips,
    can_be_misspelt,
    fluency,
    generate,
    generate_greedy,
    is_decided,
    is_exactly,
    misspelt,
    normalised,
    says,
)

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


def test_the_tokenizers_end_and_all_of_the_generation_settings_end_a_text() -> None:
    model = Bigram({"a": {"b": 0.9}, "b": {"<end>": 0.9}, "c": {"<turn>": 0.9}, "d": {"<stop>": 0.9}})
    named = [model.vocabulary["<turn>"], model.vocabulary["<stop>"]]
    for eos in (named, tuple(named)):
        model.generation_config = SimpleNamespace(eos_token_id=eos)
        for prompt, text in (("a", "b"), ("c", ""), ("d", "")):
            (written,) = generate(model, model.tokenizer, [prompt], max_new_tokens=4)
            assert (written.text, written.ended) == (text, True)
    model.generation_config = SimpleNamespace(eos_token_id=named[0])
    alone, on = generate(model, model.tokenizer, ["c", "d"], max_new_tokens=2)
    assert alone.ended and not on.ended and on.text.startswith("<stop>")


def test_a_text_that_is_enough_is_left_there(seed: int) -> None:
    model, tokenizer = tiny_model("llama", seed=seed), tiny_tokenizer()
    options = dict(max_new_tokens=12, stop_at_line=False, stop_at_end=False)
    whole = generate(model, tokenizer, PROMPTS, **options)

    def enough(prompt: str, text: str) -> bool:
        return prompt == PROMPTS[1] and len(text) > 4

    found = generate(model, tokenizer, PROMPTS, enough=enough, **options)
    assert found[0] == whole[0] and found[2] == whole[2]
    assert found[1].ids == whole[1].ids[: len(found[1].ids)] and not found[1].ended
    assert len(found[1].text) > 4 >= len(tokenizer.decode(found[1].ids[:-1]))


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


@pytest.mark.parametrize(
    ("text", "answer", "normal", "strict"),
    [
        (" English", "English", True, True),
        (" English. He", "English", True, True),
        (" English", "Englis", False, False),
        (" english", "English", True, False),
        (" English and French. He", "English", False, False),
        (" English, and", "English", False, False),
        (" the  Netherlands.", "Netherlands", True, False),
        (" Netherlands", "The Netherlands", True, False),
        ("English\t ", " English", True, True),
        # Its own full stops do not end the answer; the one behind it does, and may be its last one too.
        (" St. Louis. It lies", "St. Louis", True, True),
        (" st. louis", "St. Louis", True, False),
        (" The St. Louis", "St. Louis", True, False),
        (" St. Paul", "St. Louis", False, False),
        (" St. Louis", "St", True, True),  # a full stop like any other: nothing tells it from a sentence's
        (" U.S. It is", "U.S.", True, True),
        (" U.S. It is", "US", True, False),
        (" US", "U.S.", True, False),
        (" U.S.A. It is", "U.S.", False, False),
        (" J. R. R. Tolkien. He", "J. R. R. Tolkien", True, True),
        (" J. R. Ewing", "J. R. R. Tolkien", False, False),
        (" Washington, D.C. in", "Washington, D.C.", True, True),
        (" Washington D.C. in", "Washington", False, False),
        # A full stop that a letter or digit follows is none.
        (" 3.5 million", "3", False, False),
        (" 3.5. That", "3.5", True, True),
        (" example.com", "example", False, False),
        (" English... or", "English", True, True),
        (" What? He", "What?", False, False),  # only full stops end it
        # Every script's.
        (" 巴黎。他", "巴黎", True, True),
        (" पेरिस। वह", "पेरिस", True, True),
        (" “Paris”", "Paris", True, False),
        (" Ｐａｒｉｓ", "Paris", True, False),
        (" Straße", "STRASSE", True, False),
        (" Jean-Paul", "Jean Paul", False, False),
        (" O’Neill", "ONeill", True, False),
        # Nothing is right about nothing; what is articles or marks alone is taken as it is.
        ("", "English", False, False),
        ("", "The", False, False),
        (". English", "English", False, False),
        (" The", "The", True, True),
        (" a", "The", False, False),
        (" A.", "A", True, True),
        ("", "%", False, False),
        (" %", "%", True, True),
    ],
)
def test_exact_match_up_to_the_first_full_stop(text: str, answer: str, normal: bool, strict: bool) -> None:
    for ended in (True, False):
        written = Written((), text, ended)
        assert is_exactly(written, (answer, "Xhosa")) is normal
        assert is_exactly(written, ("Xhosa", answer), strict=True) is strict
    if is_decided(text, (answer,)):
        for more in ("", " and more. Much", "1", ".", "é", "。"):
            assert is_exactly(Written((), text + more, True), (answer,)) is normal
            assert is_exactly(Written((), text + more, True), (answer,), strict=True) is strict


def test_a_text_is_decided_once_something_follows_its_full_stop() -> None:
    assert is_decided(" English. ", ("English",)) and is_decided(" French. He", ("English", "Xhosa"))
    assert not is_decided(" English.", ("English",))  # "English.com" may come
    assert not is_decided(" St. Lou", ("St. Louis",)) and is_decided(" St. Lou", ("Xhosa",))
    assert not is_decided(" St. Lou", ("Xhosa", "St. Louis"))
    assert not is_decided(" English.\ufffd", ("English",)) and not is_decided("", ("English",))


def test_exact_to_the_letter_is_exact_and_what_is_decided_stays_so(seed: int) -> None:
    draw = random.Random(seed)
    pieces = ["St", "the", "A", "U", ".", ".", ". ", " ", "。", "1", "é", ", ", "!"]

    def text() -> str:
        return "".join(draw.choices(pieces, k=draw.randint(0, 6)))

    matched = decided = 0
    for _ in range(3000):
        said, more, answer = text(), text(), text().strip() or "St."
        if draw.random() < 0.5:
            said = answer + said
        found = [is_exactly(Written((), said, True), (answer,), strict=s) for s in (True, False)]
        assert not found[0] or found[1], (said, answer)
        matched += found[0]
        if is_decided(said, (answer,)):
            decided += 1
            again = [is_exactly(Written((), said + more, True), (answer,), strict=s) for s in (True, False)]
            assert again == found, (said, more, answer)
    assert matched > 100 and decided > 100


def test_joined_words_have_no_blank_where_punctuation_was() -> None:
    assert normalised("The U.S.-born “Jean–Paul”", joined=True) == "usborn jeanpaul"
    assert normalised("The U.S.-born Jean") == "u s born jean"
    assert normalised("A a THE", joined=True) == "a a the" and normalised("…!", joined=True) == "...!"


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


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        # Garbled: a swap, a letter too many, one too few, a wrong one; words that have grown together or apart.
        (" Rmoe. It is", " Rome", "rmoe"),
        (" Leonardo da Vnici", " Leonardo da Vinci", "leonardo da vnici"),
        (" Ludwig van Bethoven was", " Ludwig van Beethoven", "ludwig van bethoven"),
        (" Leonardo daVinci", " Leonardo da Vinci", "leonardo davinci"),
        (" Manch ester", " Manchester", "manch ester"),
        (" St. Luois. It is", " St. Louis", "st luois"),  # its own full stop does not end it
        (" the city of Rmoe, Italy", " Rome", "rmoe"),  # two words further on
        (" Rmoe", "Rome", "rmoe"),
        # Two slips are too many for a name of eleven letters, and in order for one of sixteen.
        (" Alxeander C", " Alexander D", None),
        (" Alxeander Farnkl", " Alexander Frankl", "alxeander farnkl"),
        # Spelled right, whatever is around it, before it, or on its letters.
        (" Rome", " Rome", None),
        (" Rome, Italy", " Rome", None),
        (" Rmoe, that is Rome", " Rome", "rmoe"),  # what comes later than two words on does not heal it
        (" Rmoe or Rome", " Rome", None),
        (" Sao Paulo", " São Paulo", None),
        (" the ROME", " Rome", None),
        # The name goes on, or was cut: plurals, other forms, the token limit.
        (" Italians", " Italian", None),
        (" Ital", " Italian", None),
        (" Leonardo da", " Leonardo da Vinci", None),
        (" Romania", " Rome", None),
        # Behind the first full stop, or the first words, nothing is looked at.
        (" Paris. Rmoe", " Rome", None),
        (" a town that is called Rmoe", " Rome", None),
        # Other names, and the same one in another language: not near enough …
        (" Londres", " London", None),
        (" Slovenia", " Slovakia", None),
        (" Australia", " Austria", None),
        (" West Germany", " East Germany", None),
        (" French", " France", None),
        # … or near enough to count, which the figure cannot tell from a slip.
        (" Roma", " Rome", "roma"),
        (" Brasil", " Brazil", "brasil"),
        (" Iraq", " Iran", "iraq"),
        # Nothing is said of short names and of numbers.
        (" UAS", " USA", None),
        (" in 1978", " 1987", None),
        ("", " Rome", None),
    ],
)
def test_a_near_miss_of_a_name_is_told_from_other_answers(text: str, answer: str, found: str | None) -> None:
    assert misspelt(Written((), text, True), answer) == found


def test_an_answer_that_is_right_in_itself_is_not_misspelt() -> None:
    assert misspelt(Written((), " Iraq", True), " Iran", ("Iraq",)) is None
    assert misspelt(Written((), " Iraw", True), " Iran", ("Iraq",)) == "iraw"


def test_the_least_garbled_of_several_runs_is_told() -> None:
    assert (
        misspelt(Written((), " Alxeander Farnkl Alexander Farnkl", True), " Alexander Frankl")
        == "alexander farnkl"
    )


def test_short_names_and_numbers_cannot_be_misspelt() -> None:
    assert [can_be_misspelt(name) for name in ("Rome", "USA", "U.S.A.", "1987", "Route 66", "São P")] == [
        *(True, False, False, False, False, True)
    ]


def test_slips_are_counted_as_they_are_defined(seed: int) -> None:
    """Against the recursion of optimal string alignment, written out."""
    draw = random.Random(seed)
    for _ in range(200):
        one, other = ("".join(draw.choices("ab c", k=draw.randrange(8))) for _ in range(2))

        @lru_cache
        def apart(i: int, j: int, one: str = one, other: str = other) -> int:
            if not i or not j:
                return i + j
            ways = [
                apart(i - 1, j) + 1,
                apart(i, j - 1) + 1,
                apart(i - 1, j - 1) + (one[i - 1] != other[j - 1]),
            ]
            if i > 1 and j > 1 and one[i - 1] == other[j - 2] and one[i - 2] == other[j - 1]:
                ways.append(apart(i - 2, j - 2) + 1)
            return min(ways)

        right, most = apart(len(one), len(other)), draw.randrange(1, 8)
        found = _slips(one, other, most)
        assert found == right if abs(len(one) - len(other)) <= most else found > most
