"""Key statistics against a plain float64 loop over single texts, files, merging, and the cache."""

from __future__ import annotations

import copy
import logging
import os
import random
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.tiny import REPRESENTATIVE, TEXTS, tiny_model, tiny_tokenizer
from support.workbench import EDITS, relative_error

import d4s.locate.covariance
import d4s.tensor_files
from d4s.errors import ConfigError, CovarianceError, DataError, EditError
from d4s.locate.covariance import (
    LONGEST_TEXT,
    Covariance,
    cached_covariance,
    covariance_at_subjects,
    estimate_covariance,
    fingerprint_of,
)
from d4s.locate.keys import keys_at, subject_rows
from d4s.models.architectures import Anatomy


def sums_by_hand(model, rows, layer):
    """Σ k kᵀ in float64 and the number of keys: each row alone, unpadded, every one of its tokens."""
    keys = []
    module = Anatomy(model).projection(layer)
    handle = module.register_forward_pre_hook(lambda _m, args: keys.append(args[0].flatten(0, -2).double()))
    with torch.no_grad():
        for ids in rows:
            model(input_ids=torch.tensor([ids]), use_cache=False)
    handle.remove()
    joined = torch.cat(keys)
    return joined.T @ joined, len(joined)


def test_joined_and_separate_lines_give_the_same_statistics(seed):
    """Lines as long as the pieces that a joined text is cut into: the same tokens but at the seams.

    How far off rows without a start token would be differs from model to model: three are taken together.
    """
    seams, without = [], []
    for own in range(3):
        model, tokenizer = tiny_model("llama", seed + own), tiny_tokenizer()
        with (
            torch.no_grad()
        ):  # what begins a row is then unlike all else, as in models that park attention there
            model.get_input_embeddings().weight[tokenizer.bos_token_id] *= 30
        line = ""
        for word in (" ".join(TEXTS) * 2).split():
            if len(tokenizer(f"{line} {word}")["input_ids"]) > LONGEST_TEXT:
                break
            line = f"{line} {word}".strip()
        apart, joined = (
            estimate(model, [line] * 12, tokens=10**6),
            estimate(model, [" ".join([line] * 12)], tokens=10**6),
        )
        for layer in (1, 2):
            seams.append(relative_error(joined.mean(layer), apart.mean(layer)))
            total, count = sums_by_hand(model, [ids[1:] for ids in ids_of([line])], layer)
            without.append(relative_error(total / count, apart.mean(layer)))
    assert sum(seams) / len(seams) < 0.1
    assert sum(without) > 4 * sum(seams)


def ids_of(texts):
    return [tiny_tokenizer()(text)["input_ids"] for text in texts]


def estimate(model, corpus, **options):
    return estimate_covariance(model, tiny_tokenizer(), corpus, progress=False, **options)


def close(found, expected, tolerance=1e-5):
    assert (found.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_it_is_the_mean_of_k_kt_over_every_token_of_every_text(model_type, seed):
    model = tiny_model(model_type, seed)
    found = estimate(model, TEXTS, tokens=10**6)
    assert found.layers == (0, 1, 2)
    for layer in found.layers:
        total, count = sums_by_hand(model, ids_of(TEXTS), layer)
        assert found.count == count == sum(map(len, ids_of(TEXTS)))
        mean = found.mean(layer)
        assert mean.dtype == torch.float64 and torch.equal(mean, mean.T)
        close(mean, total / count)


@pytest.mark.parametrize(
    ("batch_tokens", "batches"), [(1, range(12, 13)), (80, range(2, 12)), (10**6, range(1, 2))]
)
def test_how_texts_are_batched_does_not_matter(batch_tokens, batches, seed):
    model = tiny_model("gpt2", seed).double()
    seen: list[int] = []
    found = estimate(
        model, TEXTS * 3, tokens=10**6, dtype=torch.float64, batch_tokens=batch_tokens, on_batch=seen.append
    )
    total, count = sums_by_hand(model, ids_of(TEXTS * 3), 1)
    close(found.mean(1), total / count, 1e-12)
    assert sum(seen) == count and len(seen) in batches


def test_one_pass_for_all_layers_gives_what_one_pass_a_layer_gives(seed):
    model = tiny_model("llama", seed)
    passes = []
    model.model.embed_tokens.register_forward_hook(lambda *_: passes.append(1))
    together = estimate(model, TEXTS, tokens=10**6)
    assert len(passes) == 1
    for layer in range(3):
        alone = estimate(model, TEXTS, tokens=10**6, layers=[layer])
        assert alone.layers == (layer,)
        assert torch.equal(alone.moments[layer], together.moments[layer])


def test_the_pass_ends_after_the_last_layer_that_is_asked_for(seed):
    model = tiny_model("llama", seed)
    ran = []
    for i, block in enumerate(model.model.layers):
        block.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    assert estimate(model, TEXTS[:1], layers=(1, 0)).layers == (0, 1)
    assert set(ran) == {0, 1}


def test_a_file_an_iterable_and_a_generator_of_the_same_texts_agree(tmp_path, seed):
    model = tiny_model("gpt2", seed)
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(["  ", *TEXTS, ""]) + "\n", encoding="utf-8")
    found = [estimate(model, corpus) for corpus in (TEXTS, (t for t in [*TEXTS, " "]), path, str(path))]
    for other in found[1:]:
        assert torch.equal(other.moments[0], found[0].moments[0])
        assert (other.count, other.corpus) == (found[0].count, found[0].corpus)
    assert estimate(model, TEXTS[:3]).corpus != found[0].corpus


@pytest.mark.parametrize("tokens", [1, 17, 60])
def test_it_stops_at_the_number_of_keys_asked_for(tokens, seed):
    model = tiny_model("gpt2", seed)

    def endless():
        while True:
            yield from TEXTS

    found = estimate(model, endless(), tokens=tokens)
    rows, left = [], tokens
    for ids in ids_of(TEXTS):
        rows.append(ids[:left])
        left -= len(rows[-1])
    total, count = sums_by_hand(model, [row for row in rows if row], 2)
    assert found.count == count == tokens
    close(found.mean(2), total / count)


def test_ten_keys_a_dimension_are_taken_unless_told(seed):
    model = tiny_model("gpt2", seed)
    assert estimate(model, TEXTS * 20).count == 10 * 48
    assert estimate(model, None, layers=(0,)).count == 10 * 48


@pytest.mark.parametrize("positions", [LONGEST_TEXT, 40])
def test_a_long_text_is_cut_into_pieces_that_fit_and_none_is_lost(positions, seed):
    model = tiny_model("gpt2", seed, n_positions=positions)
    text = " ".join(TEXTS * 3)
    ids = tiny_tokenizer()(text)["input_ids"]
    assert len(ids) > 2 * positions
    found = estimate(model, [text], tokens=10**6)
    start, body, step = ids[:1], ids[1:], positions - 1  # each piece starts as a text does
    pieces = [start + body[i : i + step] for i in range(0, len(body), step)]
    total, count = sums_by_hand(model, pieces, 1)
    assert found.count == count == len(body) + len(pieces)
    close(found.mean(1), total / count)


def test_no_warning_of_long_texts_is_shown_where_they_are_cut(seed, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer, model = copy.deepcopy(tiny_tokenizer()), tiny_model("gpt2", seed)
    tokenizer.model_max_length = 16
    estimate_covariance(model, tokenizer, [" ".join(TEXTS)], progress=False)
    assert "longer than" not in caplog.text
    tokenizer(" ".join(TEXTS))  # where nobody cuts them, it is
    assert "longer than" in caplog.text


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_without_a_corpus_the_model_itself_talks(model_type, monkeypatch, seed):
    model = tiny_model(model_type, seed)
    rows: list[list[int]] = []
    plain = d4s.locate.covariance._sampled_ids

    def spy(*arguments):
        for ids in plain(*arguments):
            rows.append(list(ids))
            yield ids

    monkeypatch.setattr(d4s.locate.covariance, "_sampled_ids", spy)
    state = torch.get_rng_state()
    found = estimate(model, None, tokens=500, seed=3)
    assert torch.equal(torch.get_rng_state(), state), "sampling leaves the random state alone"
    kept, left = [], 500
    for ids in rows:
        assert ids[0] == tiny_tokenizer().bos_token_id and tiny_tokenizer().eos_token_id not in ids
        kept.append(ids[:left])
        left -= len(kept[-1])
    total, count = sums_by_hand(model, [ids for ids in kept if ids], 1)
    assert found.count == count == 500
    close(found.mean(1), total / count)
    assert found.corpus == estimate(model, None, tokens=500, seed=3).corpus
    assert found.corpus != estimate(model, None, tokens=500, seed=4).corpus


@pytest.mark.parametrize("corpus", [TEXTS, None])
def test_the_model_is_left_as_it_was(corpus, seed):
    model = tiny_model("gpt2", seed, resid_pdrop=0.5, embd_pdrop=0.5).train()
    noisy = estimate(model, corpus, tokens=100)
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())
    still = estimate(model.eval(), corpus, tokens=100)
    assert not model.training and torch.equal(noisy.moments[1], still.moments[1]), "no dropout in keys"


def test_a_failing_pass_leaves_the_training_flag(seed):
    model = tiny_model("gpt2", seed).train()

    def fail(_counted):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        estimate(model, TEXTS, on_batch=fail)
    assert model.training and not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_over_a_half_precision_model_are_exact_in_its_keys(dtype, seed):
    model = tiny_model("llama", seed, dtype)
    found = estimate(model, TEXTS[:1], tokens=10**6)
    total, count = sums_by_hand(model, ids_of(TEXTS[:1]), 1)
    assert found.moments[1].dtype == torch.float32
    close(found.mean(1), total / count, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_sums_in_half_precision_are_refused(dtype):
    model = tiny_model("gpt2")
    with pytest.raises(CovarianceError, match=f"dtype={dtype}.*float32 or float64"):
        estimate(model, TEXTS, dtype=dtype)
    with pytest.raises(CovarianceError, match=rf"layer 3: .*{dtype}.*float32 or float64"):
        Covariance({3: torch.eye(4).to(dtype)}, 1)


def test_an_empty_corpus_says_so(tmp_path):
    (tmp_path / "blank.txt").write_text("\n  \n")
    for corpus in ([], ["", "  "], tmp_path / "blank.txt"):
        with pytest.raises(CovarianceError, match="no text"):
            estimate(tiny_model("gpt2"), corpus)


@pytest.mark.parametrize("tokens", [0, -3])
def test_a_number_of_keys_below_one_is_refused(tokens):
    with pytest.raises(CovarianceError, match=f"tokens={tokens}"):
        estimate(tiny_model("gpt2"), TEXTS, tokens=tokens)


def test_a_corpus_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt: there is no such file; name one that is there"):
        estimate(tiny_model("gpt2"), tmp_path / "nowhere.txt")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"in\.txt: cannot be read \(Not a directory\); name a file that can"):
        estimate(tiny_model("gpt2"), tmp_path / "file" / "in.txt")
    (tmp_path / "latin.txt").write_bytes("Škoda".encode("utf-16"))
    with pytest.raises(DataError, match=r"latin\.txt: cannot be read as UTF-8"):
        estimate(tiny_model("gpt2"), str(tmp_path / "latin.txt"))
    with pytest.raises(DataError, match=r"text 2 of the corpus is a dict"):
        estimate(tiny_model("gpt2"), ["The capital", {"text": "of France"}])


def test_statistics_of_two_halves_add_up_to_those_of_the_whole(seed):
    model = tiny_model("gpt2", seed)
    a, b, whole = (estimate(model, texts, tokens=10**6) for texts in (TEXTS[:2], TEXTS[2:], TEXTS))
    merged = a.merge(b)
    assert merged.count == whole.count and merged.layers == whole.layers
    for layer in whole.layers:
        close(merged.mean(layer), whole.mean(layer))
    merged.check(Anatomy(model), (0, 1, 2))
    assert a.count < merged.count, "the parts stay as they are"


@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_keys_of_facts_are_those_at_their_subjects_last_tokens(model_type, seed):
    model = tiny_model(model_type, seed)
    anatomy, rows = Anatomy(model), subject_rows(tiny_tokenizer(), EDITS)
    found = covariance_at_subjects(model, tiny_tokenizer(), EDITS, batch_tokens=20)
    assert found.count == len(EDITS) and found.layers == tuple(range(len(anatomy)))
    for layer in found.layers:
        keys = keys_at(anatomy, rows, layer).double()
        close(found.mean(layer), keys.T @ keys / len(EDITS), 1e-4)
    with pytest.raises(EditError, match="no facts are given"):
        covariance_at_subjects(model, tiny_tokenizer(), [])


def test_facts_weigh_what_they_are_said_to_weigh_however_few_they_are(seed):
    model = tiny_model("gpt2", seed)
    text, facts = estimate(model, TEXTS), covariance_at_subjects(model, tiny_tokenizer(), EDITS)
    counts = {0.0: text.count, 0.25: text.count + facts.count, 1.0: facts.count}
    for share, count in counts.items():
        mixed = text.mixed(facts, share)
        assert mixed.count == count
        for layer in text.layers:
            close(mixed.mean(layer), (1 - share) * text.mean(layer) + share * facts.mean(layer))
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="must be from 0 to 1"):
            text.mixed(facts, share)
    with pytest.raises(CovarianceError, match="layers"):
        text.mixed(covariance_at_subjects(model, tiny_tokenizer(), EDITS, layers=(0,)), 0.5)


def test_experts_are_not_weighed_against_facts(seed):
    model = tiny_model("mixtral", seed)
    facts = covariance_at_subjects(model, tiny_tokenizer(), EDITS)
    with pytest.raises(CovarianceError, match="mixtures of experts"):
        estimate(model, TEXTS).mixed(facts, 0.5)


def test_statistics_of_other_layers_or_of_another_model_do_not_add_up(seed):
    model = tiny_model("gpt2", seed)
    a = estimate(model, TEXTS)
    for other in (estimate(model, TEXTS, layers=(0, 1)), estimate(tiny_model("gpt2", seed + 1), TEXTS)):
        with pytest.raises(CovarianceError, match="add up"):
            a.merge(other)


def test_a_file_gives_the_same_statistics_back(tmp_path, seed):
    model = tiny_model("gpt2", seed)
    saved = estimate(model, TEXTS)
    path = tmp_path / "new" / "folder" / "c.safetensors"
    saved.save(path)
    loaded = Covariance.load(path)
    assert (loaded.count, loaded.fingerprint, loaded.corpus) == (saved.count, saved.fingerprint, saved.corpus)
    assert loaded.layers == saved.layers
    assert all(torch.equal(loaded.moments[i], saved.moments[i]) for i in saved.layers)
    loaded.check(Anatomy(model), (0, 1, 2))
    assert [p.name for p in path.parent.iterdir()] == ["c.safetensors"], "nothing is left beside it"
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "d4s-covariance-2"


def test_saving_that_fails_leaves_the_old_file_whole(tmp_path, monkeypatch, seed):
    path = tmp_path / "c.safetensors"
    saved = estimate(tiny_model("gpt2", seed), TEXTS)
    saved.save(path)
    before = path.read_bytes()

    def half(tensors, beside, metadata):
        beside.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(d4s.tensor_files, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        saved.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_statistics_of_another_model_are_refused(seed):
    model = tiny_model("gpt2", seed)
    found = estimate(model, TEXTS)
    found.check(Anatomy(model), (1,))
    with pytest.raises(CovarianceError, match=r"taken on another model .*unedited model"):
        found.check(Anatomy(tiny_model("gpt2", seed + 1)), (1,))
    model.transformer.h[2].mlp.c_proj.weight.data[3, 5] += 0.01
    with pytest.raises(CovarianceError, match="before it was changed"):
        found.check(Anatomy(model), (1,))


def test_statistics_of_the_wrong_size_or_without_a_layer_are_refused(seed):
    anatomy = Anatomy(tiny_model("gpt2", seed))
    with pytest.raises(CovarianceError, match=r"layer 1: the key statistics are 32 × 32, .* have 48"):
        Covariance({1: torch.eye(32)}, 5).check(anatomy, (1,))
    with pytest.raises(CovarianceError, match=r"no key statistics of layer 2; held are those of \[0, 1\]"):
        Covariance({0: torch.eye(48), 1: torch.eye(48)}, 5).check(anatomy, (0, 2))
    with pytest.raises(CovarianceError, match=r"layer 4: moment is \[3, 4\], must be square"):
        Covariance({4: torch.ones(3, 4)}, 5)
    Covariance({1: torch.eye(48)}, 5).check(anatomy, (1,))  # without a fingerprint: any model of the size


def test_nan_is_refused(seed):
    moment = torch.eye(48)
    moment[3, 4] = float("nan")
    with pytest.raises(CovarianceError, match=r"layer 2: .* NaN"):
        Covariance({1: torch.eye(48), 2: moment}, 5)
    model = tiny_model("gpt2", seed)
    model.transformer.h[0].mlp.c_fc.weight.data[0, 0] = float("nan")
    with pytest.raises(CovarianceError, match="NaN"):
        estimate(model, TEXTS)


def test_files_that_save_did_not_write_are_refused(tmp_path, seed):
    good = tmp_path / "good.safetensors"
    estimate(tiny_model("gpt2", seed), TEXTS).save(good)
    whole = good.read_bytes()
    bad = tmp_path / "bad.safetensors"

    def refused(match):
        with pytest.raises(CovarianceError, match=rf"bad\.safetensors: .*{match}"):
            Covariance.load(bad)

    refused("not a readable safetensors file")  # there is none
    for content in (whole[:-100], whole[:50], b"", b"\x80\x02cposix\nsystem\nq", bytes(1000)):
        bad.write_bytes(content)
        refused("not a readable safetensors file")
    bad.unlink()
    bad.mkdir()
    refused("not a readable safetensors file")
    bad.rmdir()

    tensors = load_file(good)
    with safe_open(good, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, bad)
    refused("format None, must be 'd4s-covariance-2'")
    save_file(tensors, bad, metadata=metadata | {"format": "d4s-covariance-9"})
    refused("format 'd4s-covariance-9'")
    for changes in ({"count": "many"}, {"count": ""}, {"count": "0"}):
        save_file(tensors, bad, metadata=metadata | changes)
        refused("")
    save_file(tensors, bad, metadata={k: v for k, v in metadata.items() if k != "fingerprint"})
    refused("fingerprint")
    save_file({"layer.one": tensors["layer.0"]}, bad, metadata=metadata)
    refused("'one'")
    save_file({"layer.0": tensors["layer.0"].half()}, bad, metadata=metadata)
    refused("float32 or float64")
    save_file({"layer.0": tensors["layer.0"] * float("nan")}, bad, metadata=metadata)
    refused("NaN")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fingerprint_tells_weights_apart(dtype, seed):
    model = tiny_model("llama", seed, dtype)
    mine = fingerprint_of(model)
    assert mine == fingerprint_of(tiny_model("llama", seed, dtype)) == fingerprint_of(model.train())
    assert mine != fingerprint_of(tiny_model("llama", seed + 1, dtype))
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    assert mine != fingerprint_of(tiny_model("llama", seed, other))
    weight = model.model.layers[2].mlp.down_proj.weight.data
    row, column = torch.randint(32, ()).item(), torch.randint(48, ()).item()
    weight[row, column] *= 1.0 + 2 * torch.finfo(dtype).eps
    assert mine != fingerprint_of(model), f"one step of weight[{row}, {column}]"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("D4S_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def cached(model, layers=(0, 1), seed=0):
    return cached_covariance(model, tiny_tokenizer(), layers, seed=seed, progress=False)


def test_the_second_call_reads_the_file(cache, monkeypatch, seed):
    model = tiny_model("gpt2", seed)
    first = cached(model)
    (path,) = cache.iterdir()
    assert path.suffix == ".safetensors" and first.layers == (0, 1)
    monkeypatch.setattr(
        d4s.locate.covariance, "estimate_covariance", lambda *_, **__: pytest.fail("estimated again")
    )
    second = cached(model)
    assert all(torch.equal(first.moments[i], second.moments[i]) for i in (0, 1))
    second.check(Anatomy(model), (0, 1))


def test_other_weights_layers_or_seeds_have_other_files(cache, seed):
    model = tiny_model("gpt2", seed)
    cached(model), cached(model, (1,)), cached(model, seed=1)
    assert len(list(cache.iterdir())) == 3
    model.transformer.h[2].mlp.c_proj.weight.data[0, 0] += 0.1
    cached(model).check(Anatomy(model), (0, 1))
    assert len(list(cache.iterdir())) == 4


def test_another_place_of_the_keys_or_another_tokenizer_has_another_file(cache, seed):
    """A first guess at the architecture of a type of model that d4s does not know left its statistics to the second."""
    model, tokenizer = tiny_model("llama", seed), copy.deepcopy(tiny_tokenizer())
    mistaken = replace(Anatomy(model).architecture, mlp_output="self_attn.o_proj")
    corrected = replace(mistaken, mlp_output="self_attn.q_proj")
    first, second = (
        cached_covariance(model, tokenizer, (1,), architecture=one, progress=False)
        for one in (mistaken, corrected)
    )
    truth = estimate_covariance(model, tokenizer, None, layers=(1,), architecture=corrected, progress=False)
    assert torch.equal(second.moments[1], truth.moments[1])
    assert not torch.equal(first.moments[1], second.moments[1])
    tokenizer.eos_token = "Paris"
    cached_covariance(model, tokenizer, (1,), architecture=corrected, progress=False)
    assert len(list(cache.iterdir())) == 3


def test_a_damaged_file_of_the_cache_is_made_again(cache, seed):
    model = tiny_model("gpt2", seed)
    first = cached(model)
    (path,) = cache.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(cached(model).moments[0], first.moments[0])
    assert torch.equal(Covariance.load(path).moments[0], first.moments[0])


def test_the_cache_is_in_the_users_cache_folder_unless_told(tmp_path, monkeypatch, seed):
    monkeypatch.delenv("D4S_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    cached(tiny_model("gpt2", seed))
    assert len(list((tmp_path / "xdg" / "d4s").iterdir())) == 1


def test_one_model_in_two_precisions_and_compiled_has_one_fingerprint(seed):
    model = tiny_model("llama", seed)
    half = copy.deepcopy(model).bfloat16()
    assert fingerprint_of(half, exact=False) == fingerprint_of(model, exact=False)
    assert fingerprint_of(model) == fingerprint_of(torch.compile(model))
    found = estimate(model, TEXTS, layers=[1])
    found.check(Anatomy(half), (1,))
    with torch.no_grad():
        half.model.layers[1].mlp.down_proj.weight[0, 0] += 0.5
    with pytest.raises(CovarianceError, match="another model"):
        found.check(Anatomy(half), (1,))


def test_a_file_with_one_flipped_bit_is_refused(seed, tmp_path):
    path = tmp_path / "c.safetensors"
    estimate(tiny_model("llama", seed), TEXTS, layers=[0, 1]).save(path)
    whole = path.read_bytes()
    assert Covariance.load(path).layers == (0, 1)
    generator = random.Random(seed)
    for _ in range(60):
        at = generator.randrange(len(whole))
        flipped = bytearray(whole)
        flipped[at] ^= 1 << generator.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(CovarianceError):
            Covariance.load(path)


def test_sums_that_cannot_be_sums_of_squares_are_refused():
    right = torch.eye(3)
    with pytest.raises(CovarianceError, match="negative"):
        Covariance({0: -right}, 3)
    with pytest.raises(CovarianceError, match="symmetric"):
        Covariance({0: right + torch.tensor([[0.0, 1, 0], [0, 0, 0], [0, 0, 0]])}, 3)


def test_float64_as_the_default_type_changes_nothing(seed):
    model = tiny_model("llama", seed)
    expected = estimate(model, TEXTS, layers=[1]).moments[1]
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(estimate(model, TEXTS, layers=[1]).moments[1], expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_pipe_is_no_corpus_and_no_file_of_statistics(tmp_path, seed):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe or a device"):
        estimate(tiny_model("gpt2", seed), tmp_path / "pipe")
    with pytest.raises(CovarianceError, match="pipe or a device"):
        Covariance.load(tmp_path / "pipe")
