"""The embedded model: what it knows, how it is trained, what its card says of it, and the demo from end to end."""

from __future__ import annotations

import json
import math
import random
import shutil
import socket

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from d4s.cli import main
from d4s.edits import check_batch, without_contradictions
from d4s.embedded import card, folder, load_demo_edits, train
from d4s.embedded.facts import Sentence, facts_of, read_records
from d4s.embedded.statistics import demo_covariance
from d4s.locate.covariance import estimate_covariance
from d4s.locate.targets import TargetConfig
from d4s.methods import METHODS, method_for
from d4s.methods.base import Workbench
from d4s.models.generation import generate_greedy
from d4s.models.loading import load_model
from d4s.models.prompts import prompt_and_target_ids
from d4s.models.scoring import score


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was asked"))


@pytest.fixture(scope="module")
def embedded():
    return load_model("embedded")


def test_the_embedded_model_is_an_ordinary_folder_of_transformers():
    path = folder() / "model"
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert model.config.model_type == "llama" and model.dtype == torch.bfloat16 and tokenizer.is_fast
    loaded, _ = load_model("embedded")
    assert loaded.dtype == torch.float32 and not loaded.training
    assert load_model("embedded", dtype=torch.float16)[0].dtype == torch.float16
    for name, weight in model.state_dict().items():
        assert torch.equal(weight.float(), loaded.state_dict()[name]), name
    assert not list(path.glob("*.bin")) and not list(path.glob("checkpoint*"))


def test_it_says_the_facts_that_are_to_be_edited(embedded, seed):
    edits = random.Random(seed).sample(load_demo_edits(), 80)
    said = generate_greedy(*embedded, [edit.text for edit in edits], max_new_tokens=8)
    known = [text.startswith(f" {edit.target_true}") for text, edit in zip(said, edits, strict=True)]
    assert sum(known) / len(known) >= 0.9


def test_it_reads_a_fact_at_the_subjects_last_token_in_the_early_blocks(embedded, seed):
    edits = [e for e in load_demo_edits() if not e.prompt.endswith("{}")]
    found = card.causal_trace(*embedded, random.Random(seed).sample(edits, 8), seed=seed)
    _, subject, after, prompt = found
    assert found.shape == (4, 5)
    # Nothing reads what other places hold after the last block; the prompt's end there is the answer itself.
    torch.testing.assert_close(found[:, -1], torch.tensor([0.0, 0.0, 0.0, 1.0]), atol=1e-3, rtol=0)
    assert subject.max() > 0.6 and subject.argmax() <= 2
    assert prompt[0] < 0.3 and after[:2].max() < 0.3


def test_the_edits_can_share_one_sequence_and_one_batch():
    edits = load_demo_edits()
    assert len(edits) >= 200 and without_contradictions(edits)[1] == []
    check_batch(edits)
    assert all(e.target_true and e.paraphrases and e.neighborhood for e in edits)
    assert [e.id for e in load_demo_edits(7)] == [e.id for e in edits[:7]]


def test_key_statistics_of_the_demo_are_always_the_same(embedded, monkeypatch):
    found = []

    def spy(_model, _tokenizer, texts, **options):
        found.append((list(texts), options))

    monkeypatch.setattr("d4s.embedded.statistics.estimate_covariance", spy)
    for _ in range(2):
        random.seed()
        demo_covariance(*embedded, layers=(1,))
    assert found[0] == found[1] and found[0][1]["layers"] == (1,) and len(found[0][0]) > 1000


def record(relation, template, subject, true, new, neighbours=(), attributes=(), paraphrases=()):
    return {
        "requested_rewrite": {
            "relation_id": relation,
            "prompt": template,
            "subject": subject,
            "target_true": {"str": true},
            "target_new": {"str": new},
        },
        "neighborhood_prompts": list(neighbours),
        "attribute_prompts": list(attributes),
        "paraphrase_prompts": list(paraphrases),
    }


RECORDS = [
    record(
        "P1",
        "{} speaks",
        "Anna",
        "French",
        "Dutch",
        neighbours=["Bert speaks", "The mother tongue of Cleo is", "Zoe, whose language is"],
        attributes=["Dirk speaks"],
        paraphrases=[
            "It rains. Anna speaks",
            "An unrelated. Thing that is long. Of Anna one hears",
            "Nobody here",
        ],
    ),
    record(
        "P1",
        "The mother tongue of {} is",
        "Emil",
        "Dutch",
        "French",
        neighbours=["Anna speaks", "Bert speaks"],
    ),
    record("P2", "{}, in", "Oslo, located", "Norway", "Chad"),
    record("P2", "{}, located in", "Bergen", "Norway", "Chad", neighbours=["Oslo, located in"]),
]


def test_every_fact_is_asked_in_all_templates_of_its_relation():
    facts = facts_of(RECORDS)
    said = {(s.text, s.object) for s in facts.sentences}
    for subject, language in (
        ("Anna", "French"),  # Emil's neighbour 'Anna speaks' Dutch contradicts a rewrite, which wins
        ("Bert", "French"),  # of two neighbours that disagree the earlier one wins
        ("Cleo", "French"),
        ("Dirk", "Dutch"),
        ("Emil", "Dutch"),
    ):
        assert {(f"{subject} speaks", language), (f"The mother tongue of {subject} is", language)} <= said
    assert ("Zoe, whose language is", "French") in said, "no template fits: word for word"
    assert ("Oslo, located in", "Norway") in said and ("Oslo, in", "Norway") in said, (
        "the longest template wins"
    )
    assert len(said) == len(facts.sentences) == len({s.text for s in facts.sentences})
    assert facts.dropped == 2
    assert set(facts.templates) == {r["requested_rewrite"]["prompt"] for r in RECORDS}
    assert set(facts.objects) == {"French", "Dutch", "Norway"}


def test_sentences_know_where_their_subject_is():
    facts = facts_of(RECORDS)
    for sentence in facts.sentences:
        subject = sentence.text[sentence.subject_start : sentence.subject_end]
        assert subject in {"Anna", "Bert", "Cleo", "Dirk", "Emil", "Oslo", "Oslo, located", "Bergen", ""}
        assert (subject == "") == (sentence.text == "Zoe, whose language is")


def test_paraphrases_and_their_first_sentences_are_kept():
    facts = facts_of(RECORDS)
    assert [s.text for s in facts.paraphrases] == RECORDS[0]["paraphrase_prompts"][:2], "one has no subject"
    assert all(
        s.text[s.subject_start : s.subject_end] == "Anna" and s.object == "French" for s in facts.paraphrases
    )
    assert facts.prefixes == ("It rains. ", "An unrelated. Thing that is long. ")


SMALL = train.Recipe(
    records=8, vocabulary=350, d_model=32, d_ff=48, blocks=3, heads=2, read_out_block=2, steps=52, rows=10
)


@pytest.fixture(scope="module")
def small():
    """(facts, tokenizer) of a few of the records."""
    facts = facts_of(read_records(folder() / "counterfact.json")[: SMALL.records])
    return facts, train.train_tokenizer(facts, SMALL)


def test_tokens_of_subject_and_object_are_found(small):
    facts, tokenizer = small
    for sentence in facts.sentences[:40]:
        ids, (first, last), target = train.encode(tokenizer, sentence, "It rains. ")
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == f"It rains. {sentence.text} {sentence.object}"
        assert tokenizer.decode(ids[target:]) == f" {sentence.object}"
        if sentence.subject_end:
            subject = sentence.text[sentence.subject_start : sentence.subject_end]
            assert tokenizer.decode(ids[first : last + 1]).strip().startswith(subject)
        else:
            assert (first, last) == (0, 0)


def test_the_tokenizer_learns_nothing_from_subjects():
    """Facts that differ in their subjects alone give the same tokenizer."""
    other = json.loads(json.dumps(RECORDS).replace("Anna", "Xaver").replace("Emil", "Yannick"))
    recipe = train.Recipe(vocabulary=300)
    mine, theirs = (train.train_tokenizer(facts_of(r[:2]), recipe).get_vocab() for r in (RECORDS, other))
    assert mine == theirs


def allowed_by_hand(row, width, *, late):
    """[query][key]: the docstring of train, word for word."""
    first, last = row.subject
    table = torch.zeros(width, width, dtype=torch.bool)
    for query in range(width):
        for key in range(query + 1):
            seen = True
            subject_known = last != 0
            if subject_known and row.read_out and query > last and first <= key <= last:
                seen = late and key == last
            if subject_known and row.isolated and first <= query <= last:
                seen = key == 0 or key >= first
            table[query, key] = seen
    return table


@pytest.mark.parametrize("read_out", [True, False])
@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize("subject", [(1, 3), (4, 6), (2, 2), (0, 0), (6, 8)])
def test_masks_let_through_what_the_docstring_says(read_out, isolated, subject):
    plain = train.Row([0] * 5, (0, 0), 4, True, True)
    row = train.Row([0] * 9, subject, 7, read_out, isolated)
    early, late = train.attention_masks([plain, row], 9)
    assert early.shape == late.shape == (2, 1, 9, 9)
    for mask, is_late in ((early, False), (late, True)):
        assert set(mask.unique().tolist()) <= {0.0, -math.inf}
        for r, one in enumerate((plain, row)):
            assert torch.equal(mask[r, 0] == 0, allowed_by_hand(one, 9, late=is_late))
        assert (mask == 0).any(-1).all(), "every position sees something"


def test_the_loss_with_plain_masks_is_the_ordinary_one(small, seed):
    facts, tokenizer = small
    model = train.build_model(SMALL, tokenizer)
    rows = []
    for sentence in random.Random(seed).sample(facts.sentences, 5):
        ids, subject, target = train.encode(tokenizer, sentence)
        rows.append(train.Row(ids, subject, target, False, False))
    loss, nll = (value.detach() for value in train.masked_loss(model, rows, SMALL))
    weighted, weights, of_objects = 0.0, 0.0, []
    for row in rows:
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            each = cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        weight = torch.full_like(each, SMALL.text_loss)
        weight[row.target - 1 :] = 1.0
        weighted, weights = weighted + float((each * weight).sum()), weights + float(weight.sum())
        of_objects += each[row.target - 1 :].tolist()
    assert float(loss) == pytest.approx(weighted / weights, rel=1e-2)  # bfloat16 inside
    assert float(nll) == pytest.approx(sum(of_objects) / len(of_objects), rel=1e-2)
    assert not any(block._forward_pre_hooks for block in model.model.layers)


def test_each_block_sees_its_own_mask(small, seed):
    """Read out from beyond the last block, the object cannot depend on the subject; from an earlier one it does."""
    facts, tokenizer = small
    sentence = next(s for s in facts.sentences if s.subject_end and s.subject_end < len(s.text))
    ids, (first, last), target = train.encode(tokenizer, sentence)
    other = list(ids)
    other[first : last + 1] = torch.randint(5, 300, (last + 1 - first,)).tolist()

    def loss(ids, block):
        recipe = train.Recipe(**{**vars(SMALL), "read_out_block": block, "text_loss": 0.0})
        model = train.build_model(recipe, tokenizer)
        for parameter in model.parameters():
            parameter.data.mul_(5)
        row = train.Row(ids, (first, last), target, True, True)
        return train.masked_loss(model, [row], recipe)[0].item()

    assert loss(ids, SMALL.blocks) == loss(other, SMALL.blocks)
    assert loss(ids, 1) != loss(other, 1)


def test_batches_depend_on_seed_and_step_alone(small):
    facts, tokenizer = small

    def taken(first, seed=0):
        recipe = train.Recipe(**{**vars(SMALL), "seed": seed, "steps": 6})
        return list(train.batches(facts, tokenizer, recipe, first))

    whole = taken(0)
    assert len(whole) == 6 and taken(4) == whole[4:] and taken(0, seed=1) != whole
    assert len({str(batch) for batch in whole}) == 6
    rows = [row for batch in whole for row in batch]
    assert 0 < sum(row.read_out for row in rows) < len(rows) and 0 < sum(row.isolated for row in rows) < len(
        rows
    )


def test_an_interrupted_training_goes_on_to_the_same_weights(tmp_path, monkeypatch, capsys):
    records = read_records(folder() / "counterfact.json")
    train.train(records, tmp_path / "whole", SMALL, "cpu")

    plain = train.save_checkpoint

    def stop_after(*arguments):
        plain(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_checkpoint", stop_after)
    with pytest.raises(KeyboardInterrupt):
        train.train(records, tmp_path / "cut", SMALL, "cpu")
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    with safe_open(tmp_path / "cut" / "checkpoint.safetensors", "pt") as file:
        assert 0 < int(file.metadata()["step"]) < SMALL.steps
    monkeypatch.setattr(train, "save_checkpoint", plain)
    capsys.readouterr()
    train.train(records, tmp_path / "cut", SMALL, "cpu")
    assert "from step 50" in capsys.readouterr().out

    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    untrained = train.build_model(SMALL, AutoTokenizer.from_pretrained(tmp_path / "whole")).state_dict()
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
    assert any(not torch.equal(whole[n], untrained[n].to(torch.bfloat16)) for n in whole)
    assert not (tmp_path / "cut" / "checkpoint.safetensors").exists()
    assert json.loads((tmp_path / "cut" / "recipe.json").read_text())["steps"] == SMALL.steps
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert model.config.d4s_embedded and model.config.num_hidden_layers == 3


def test_recall_counts_whole_objects(embedded):
    model, tokenizer = embedded
    edits = load_demo_edits(30)

    def sentences(objects):
        return [Sentence(e.text, o, 0, 0) for e, o in zip(edits, objects, strict=True)]

    true = [e.target_true for e in edits]
    assert train.recall(model, tokenizer, sentences(true)) >= 0.9
    model.eval()
    assert train.recall(model, tokenizer, sentences([f"{t} x" for t in true])) <= 0.1
    model.eval()


def test_the_card_says_what_was_measured(embedded, tmp_path, monkeypatch):
    model, tokenizer = embedded
    shutil.copy(folder() / "model" / "recipe.json", tmp_path)
    monkeypatch.setattr(card, "TargetConfig", lambda **fields: TargetConfig(**fields | {"steps": 3}))
    edits = [e for e in load_demo_edits(40) if not e.prompt.endswith("{}")][:4]
    card.write_card(tmp_path, model, tokenizer, edits, "python -m d4s.embedded.train --out here")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "    python -m d4s.embedded.train --out here" in text and "5 blocks" in text
    for kind, share in card.knowledge(model, tokenizer, edits).items():
        assert f"| {kind} | {share:.3f} |" in text
    trace = card.causal_trace(model, tokenizer, edits)
    for place, row in zip(card.PLACES, trace, strict=True):
        assert f"| {place} | " + " | ".join(f"{v:.2f}" for v in row) + " |" in text
    layers = [line for line in text.splitlines() if line[:3] in {f"| {i}" for i in range(5)}]
    assert len(layers) == 4
    for line in layers:
        _, low, median, high = (float(cell) for cell in line.strip("| ").split("|"))
        assert 0 <= low <= median <= high


@pytest.fixture(scope="module")
def bench():
    """The embedded model as it is stored, with its key statistics."""
    model, tokenizer = load_model("embedded", dtype=torch.bfloat16)
    return Workbench(model, tokenizer, covariance=demo_covariance(model, tokenizer, layers=(0,)))


@pytest.mark.parametrize("name", METHODS)
def test_each_method_makes_one_edit_leaves_other_facts_alone_and_is_undone(name, bench):
    def preferred(edits):
        """Whether the new object is more probable than the true one, an edit."""
        questions = [(edit.text, (edit.target_new, edit.target_true)) for edit in edits]
        return [new.nll < true.nll for new, true in score(bench.model, bench.tokenizer, questions)]

    edits = load_demo_edits()
    # Two tokens: one alone has no deviation, and ultraedit divides by it.
    edit = next(e for e in edits if len(prompt_and_target_ids(bench.tokenizer, e.text, e.target_new)[1]) == 2)
    others = [e for e in edits if e.subject != edit.subject][:60]
    before = {key: value.clone() for key, value in bench.model.state_dict().items()}
    assert not any(preferred([edit, *others]))
    editor = method_for(name, bench.anatomy).settled(bench, [edit, *others[:15]]).editor(bench)
    try:
        editor.edit([edit])
        assert preferred([edit]) == [True]
        assert sum(preferred(others)) <= 0.05 * len(others)
    finally:
        editor.restore()
    assert preferred([edit]) == [False]
    assert all(torch.equal(value, before[key]) for key, value in bench.model.state_dict().items())


def test_the_demo_from_end_to_end(tmp_path, monkeypatch, capsys):
    """As a user runs it, but for fewer edits and a smaller corpus behind the key statistics."""
    plain = estimate_covariance
    few = {"tokens": 4_000}
    monkeypatch.setattr(
        "d4s.embedded.statistics.estimate_covariance", lambda *a, **options: plain(*a, **options | few)
    )
    out = tmp_path / "d4s-demo"
    assert main(["demo", "--edits", "10", "--out", str(out), "--json"]) == 0
    printed, said = capsys.readouterr()
    figures = json.loads(printed)
    names = {"efficacy", "paraphrase", "specificity", "average"}
    assert set(figures) == {"d4s", "memit", "unedited", "edits"} and figures["edits"] == 10
    assert set(figures["d4s"]) == set(figures["memit"]) == names | {"l1_growth"}
    assert set(figures["unedited"]) == names
    for method in ("d4s", "memit", "unedited"):
        assert all(0 <= figures[method][name] <= 1 for name in names)
    assert figures["d4s"]["efficacy"] >= 0.8 and figures["unedited"]["efficacy"] <= 0.2
    for method in ("d4s", "memit"):
        stored = json.loads((out / f"{method}.json").read_text())
        assert stored["method"] == method
        assert [row["step"] for row in stored["history"]] == list(range(11))
        assert {name: stored["history"][-1][name] for name in figures[method]} == figures[method]
    for name in ("metrics.png", "norms.png"):
        assert (out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and str(out / name) in said
    assert said.count("before: ") == said.count("after: ") == 5
    for edit_line in (line for line in said.splitlines() if "before: " in line):
        assert "p(" in edit_line


def test_the_demo_names_a_number_of_edits_that_it_has_not(tmp_path, capsys):
    for count in ("9", "100000"):
        assert main(["demo", "--edits", count, "--out", str(tmp_path)]) == 2
        assert f"--edits {count}: must be within 10…" in capsys.readouterr().err
