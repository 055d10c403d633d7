"""What a journal gives back: edits undone, done again, revised and merged, the log, and proof of what is there."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace

import pytest
import torch
from support.sequences import EDITS, FAST, ready, same, sequence, state
from support.tiny import tiny_tokenizer

from d4s.edits import Edit
from d4s.errors import ConfigError, DataError, EditError, ModelError
from d4s.journal import merge as merging
from d4s.journal.folder import Folder, differing
from d4s.journal.journal import Journal
from d4s.journal.merge import merge
from d4s.journal.sums import Sums
from d4s.locate.covariance import Covariance
from d4s.measure.metrics import Baseline, take_baseline
from d4s.models.architectures import ARCHITECTURES, Architecture
from d4s.sequence import journaling

ONE = FAST | {"layers": [1], "residual": "once"}  # one layer, no contexts, the paper's rule: undoing is exact


def made(path, seed, edits=EDITS, config=FAST, **options):
    """(model, covariance, the weights that a sequence in a journal left); the model is unedited again."""
    model, covariance = ready(seed)
    result = sequence(model, covariance, edits, config=config, journal=path, original=False, **options)
    weights = edited(result)
    result.restore()
    return model, covariance, weights


def edited(result):
    anatomy = result.editor.anatomy
    return {anatomy.weight_name(i): anatomy.weight(i).detach().clone() for i in result.editor.weights.layers}


def solved(path, ids):
    """Δ of layer 1 in float64 by LU, from what the log and the vectors say of these edits alone."""
    sums = Sums(Folder.open(path))
    rows = [rows for i in ids for rows in sums.standing.made[i].rows if rows.sign > 0]
    residuals, keys = torch.cat([r.residuals for r in rows]), torch.cat([r.keys for r in rows])
    return torch.linalg.solve(sums.priors[1].matrix + keys.T @ keys, keys.T @ residuals).T


def off(delta, truth):
    return float((delta - truth).norm() / truth.norm())


# Targets and keys of other edits beside them are rounded otherwise, in float32: two sequences are no nearer.
ROUNDED = 1e-4


def apart(one, other):
    """The largest relative difference of two sets of weights' changes, as sizes of W itself."""
    return max(float((one[n].double() - other[n].double()).norm() / other[n].double().norm()) for n in other)


def test_the_weights_are_those_of_the_sequence(tmp_path, seed):
    model, _, weights = made(tmp_path / "j", seed)
    found = Journal(tmp_path / "j").weights()
    assert set(found) == set(weights) and all(torch.equal(found[n], weights[n]) for n in weights)
    Journal(tmp_path / "j").write_to(model)
    assert all(torch.equal(model.state_dict()[n], weights[n]) for n in weights)
    with pytest.raises(ModelError, match="not the unedited one"):
        Journal(tmp_path / "j").write_to(model)
    compiled = torch.compile(ready(seed)[0])
    Journal(tmp_path / "j").write_to(compiled)
    assert all(torch.equal(compiled._orig_mod.state_dict()[n], weights[n]) for n in weights)


def test_a_journal_from_before_a_field_was_there_goes_on_at_its_default(monkeypatch, tmp_path, seed):
    model, covariance = ready(seed)
    with monkeypatch.context() as patch:
        patch.setattr(
            journaling,
            "asdict",
            lambda method: {name: value for name, value in asdict(method).items() if name != "context_keys"},
        )
        sequence(model, covariance, EDITS, config=FAST, journal=tmp_path / "j").restore()
    assert "context_keys" not in Journal(tmp_path / "j").head["config"]
    with pytest.raises(ConfigError, match="is the journal of another sequence: config"):
        sequence(model, covariance, EDITS, config=FAST | {"context_keys": "each"}, journal=tmp_path / "j")
    again = sequence(model, covariance, EDITS, config=FAST, journal=tmp_path / "j")
    assert len(again.edits_table) == len(EDITS)


@pytest.mark.parametrize("ids", [["e3"], ["e0", "e6"], ["e5", "e1", "e2"]])
def test_an_undone_edit_was_never_made(ids, tmp_path, seed):
    model, covariance, weights = made(tmp_path / "j", seed, config=ONE)
    without = sequence(model, covariance, [e for e in EDITS if e.id not in ids], config=ONE, original=False)
    right = without.editor.closed_form.delta(1).clone()
    never = edited(without)
    without.restore()
    journal = Journal(tmp_path / "j")
    journal.undo(ids)
    delta = journal.sums.closed_form.delta(1)
    left = [e.id for e in EDITS if e.id not in ids]
    assert off(delta, solved(tmp_path / "j", left)) < 1e-9
    assert off(delta, right) < ROUNDED and apart(journal.weights(), never) < ROUNDED
    again = Journal(tmp_path / "j")  # from the files
    assert torch.equal(again.sums.closed_form.delta(1), delta)
    assert [edit.id for edit in again.edits] == [e.id for e in EDITS if e.id not in ids]
    again.redo(reversed(ids))
    assert apart(again.weights(), weights) < 1e-6 and [e.id for e in again.edits] == [e.id for e in EDITS]


def test_an_undone_answer_gives_its_place_back(tmp_path, seed):
    """The fact was changed twice: the first answer comes back when the second is undone, and the other way round."""
    later = Edit(EDITS[0].prompt, EDITS[0].subject, "Lyon", id="later")
    others = EDITS[1:4]
    whole = [EDITS[0], *others, later]
    made(tmp_path / "j", seed, whole, ONE)
    journal = Journal(tmp_path / "j")
    stand = {"second": whole[1:], "first": whole[:-1], "none": others}
    truth = {name: solved(tmp_path / "j", [e.id for e in edits]) for name, edits in stand.items()}

    def near(name):
        return off(journal.sums.closed_form.delta(1), truth[name]) < 1e-9

    assert near("second")  # the later answer stands in the earlier one's place
    journal.undo("later")
    assert near("first")
    journal.undo("e0")
    assert near("none")
    journal.redo("later")
    assert near("second")
    journal.redo("e0")
    assert near("second")


def test_what_cannot_be_undone_is_refused_and_nothing_changes(tmp_path, seed):
    made(tmp_path / "j", seed, EDITS[:3])
    journal = Journal(tmp_path / "j")
    before = (tmp_path / "j" / "log.jsonl").read_bytes()
    for ids, text in (
        ("e9", "unknown edit 'e9'"),
        (["e1", "e7"], "unknown edit 'e7'"),
        ([], "no edit was named"),
    ):
        with pytest.raises(EditError, match=text):
            journal.undo(ids)
    with pytest.raises(EditError, match="'e1' stands already"):
        journal.redo("e1")
    assert (tmp_path / "j" / "log.jsonl").read_bytes() == before and len(journal.edits) == 3
    journal.undo("e1")
    with pytest.raises(EditError, match="'e1' was undone already"):
        journal.undo(["e0", "e1"])
    assert [edit.id for edit in journal.edits] == ["e0", "e2"]


def test_methods_without_sums_say_that_they_cannot(tmp_path, seed):
    model, covariance = ready(seed)
    result = sequence(
        model, covariance, EDITS[:3], method="memit", config=FAST, journal=tmp_path / "j", original=False
    )
    weights = edited(result)
    found = Journal(tmp_path / "j")
    assert all(torch.equal(found.weights()[n], weights[n]) for n in weights) and found.verify().sound
    with pytest.raises(DataError, match="memit keeps no sums"):
        found.undo("e1")


def test_without_vectors_a_sequence_goes_on_but_no_edit_is_undone(tmp_path, seed):
    made(tmp_path / "j", seed, keep_vectors=False)
    assert not (tmp_path / "j" / "segments").exists()
    found = Journal(tmp_path / "j")
    with pytest.raises(DataError, match="--keep-vectors no"):
        found.undo("e1")
    assert len(found.log()) == 7


def test_a_revised_edit_has_another_answer(tmp_path, seed):
    model, covariance, _ = made(tmp_path / "j", seed, EDITS[:4], ONE)
    journal = Journal(tmp_path / "j")
    new = journal.revise("e2", "Paris", model=model, tokenizer=tiny_tokenizer(), covariance=covariance)
    assert (
        new.target_new == "Paris"
        and new.prompt == EDITS[2].prompt
        and new.paraphrases == EDITS[2].paraphrases
    )
    held = {n: model.state_dict()[n].clone() for n in journal.weights()}
    assert all(torch.equal(held[n], w) for n, w in Journal(tmp_path / "j").weights().items())
    other, its = ready(seed)
    result = sequence(other, its, [*EDITS[:2], EDITS[3], new], config=ONE, original=False)
    right = result.editor.closed_form.delta(1)
    delta = Journal(tmp_path / "j").sums.closed_form.delta(1)
    assert off(delta, right) < ROUNDED
    assert off(delta, solved(tmp_path / "j", ["e0", "e1", "e3", new.id])) < 1e-9
    assert [e.id for e in journal.edits] == ["e0", "e1", "e3", new.id]
    journal.undo(new.id)
    journal.redo("e2")
    assert [e.id for e in Journal(tmp_path / "j").edits] == ["e0", "e1", "e2", "e3"]
    with pytest.raises(ConfigError, match="does not go on"):
        sequence(*ready(seed), EDITS[:4], config=ONE, journal=tmp_path / "j", original=False)


def test_consolidating_is_one_batch_of_the_edits_that_stand(tmp_path, seed):
    model, covariance, _ = made(tmp_path / "j", seed)
    journal = Journal(tmp_path / "j")
    journal.undo(["e1", "e4"])
    journal.consolidate(model=model, tokenizer=tiny_tokenizer(), covariance=covariance)
    left = [e for e in EDITS if e.id not in ("e1", "e4")]
    other, its = ready(seed)
    batch = sequence(other, its, left, config=FAST, batch_size=len(left), original=False)
    right = edited(batch)
    assert all(torch.equal(w, right[n]) for n, w in Journal(tmp_path / "j").weights().items())
    journal.undo("e0")
    assert Journal(tmp_path / "j").verify().sound


def test_a_journal_knows_the_architecture_that_its_sequence_was_given(tmp_path, seed):
    model, covariance = ready(seed)
    model.config.model_type = "a-type-of-ones-own"
    given = replace(ARCHITECTURES["gpt2"], plain_where=(("scale_attn_weights", True),))
    options = {"config": ONE, "journal": tmp_path / "j", "original": False, "architecture": given}
    result = sequence(model, covariance, **options)
    result.restore()
    tools = {"model": model, "tokenizer": tiny_tokenizer(), "covariance": covariance}
    Journal(tmp_path / "j").revise("e2", "Paris", **tools)
    before = Journal(tmp_path / "j").weights()
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    head = json.loads((tmp_path / "j" / "journal.json").read_text())
    assert Architecture.from_dict(head["architecture"]) == given
    with pytest.raises(ConfigError, match=r"another sequence: .*architecture: another one there"):
        sequence(model, covariance, **(options | {"architecture": ARCHITECTURES["gpt2"]}))
    with pytest.raises(TypeError, match="nothing"):
        Architecture.from_dict({**head["architecture"], "nothing": 1})


@pytest.mark.parametrize("verb", ["revise", "consolidate"])
def test_what_another_process_has_undone_meanwhile_is_not_taken_in(verb, tmp_path, seed):
    model, covariance, _ = made(tmp_path / "j", seed, EDITS[:3], ONE)
    journal = Journal(tmp_path / "j")
    assert len(journal.edits) == 3  # by the log as it is now
    Journal(tmp_path / "j").undo("e0")
    given = dict(model=model, tokenizer=tiny_tokenizer(), covariance=covariance)
    if verb == "revise":
        with pytest.raises(EditError, match="'e0' was undone already"):
            journal.revise("e0", "Lyon Manila", **given)
        return
    journal.consolidate(**given)
    assert [edit.id for edit in Journal(tmp_path / "j").edits] == ["e1", "e2"]
    assert off(Journal(tmp_path / "j").sums.closed_form.delta(1), solved(tmp_path / "j", ["e1", "e2"])) < 1e-9
    assert Journal(tmp_path / "j").verify().sound


def test_sums_that_hold_what_does_not_stand_are_found(tmp_path, seed):
    model, covariance, _ = made(tmp_path / "j", seed, EDITS[:3], ONE)
    journal = Journal(tmp_path / "j")
    journal.undo("e0")
    journal.consolidate(model=model, tokenizer=tiny_tokenizer(), covariance=covariance)
    for event in journal.folder.events:
        if event["kind"] == "consolidated":
            event["ids"].insert(0, "e0")
    assert any("has consolidated e0, which did not stand" in text for text in journal.verify().problems)


@pytest.mark.parametrize("verb", ["revise", "consolidate"])
def test_a_failure_leaves_the_journal_and_an_unedited_model(verb, monkeypatch, tmp_path, seed):
    model, covariance, _ = made(tmp_path / "j", seed, EDITS[:3], ONE)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    journal = Journal(tmp_path / "j")
    events = list(journal.folder.events)
    given = dict(model=model, tokenizer=tiny_tokenizer(), covariance=covariance)
    call = (
        (lambda: journal.revise("e1", "Paris", **given))
        if verb == "revise"
        else lambda: journal.consolidate(**given)
    )

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "add_segment", full)
        with pytest.raises(OSError, match="No space"):
            call()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert Journal(tmp_path / "j").folder.events == events
    call()
    assert Journal(tmp_path / "j").verify().sound


def test_what_was_replaced_before_consolidating_is_in_the_journal_no_more(tmp_path, seed):
    other = Edit(EDITS[1].prompt, EDITS[1].subject, "Lyon Manila", id="other")
    model, covariance, _ = made(tmp_path / "j", seed, [*EDITS[:4], other])
    journal = Journal(tmp_path / "j")
    assert [e.id for e in journal.edits] == ["e0", "e1", "e2", "e3", "other"]
    journal.consolidate(model=model, tokenizer=tiny_tokenizer(), covariance=covariance)
    assert [e.id for e in journal.edits] == ["e0", "e2", "e3", "other"]
    journal.undo("other")
    assert [e.id for e in Journal(tmp_path / "j").edits] == ["e0", "e2", "e3"]
    assert [row["id"] for row in journal.log() if row["stands"]] == ["e0", "e2", "e3"]
    with pytest.raises(EditError, match="'e1' had been replaced when the journal was consolidated"):
        journal.redo("e1")
    journal.redo("other")
    assert journal.edits[-1].id == "other" and Journal(tmp_path / "j").verify().sound


@pytest.mark.parametrize("consolidated", [False, True])
def test_an_edit_of_two_passes_is_called_as_the_first(consolidated, tmp_path, seed):
    weak = ONE | dict(steps=1, learning_rate=1e-30)
    for name, edits in (("a", EDITS[:2]), ("b", EDITS[2:4])):
        model, covariance = ready(seed)
        found = sequence(model, covariance, edits, config=weak, passes=2, journal=tmp_path / name)
        again = [row["id"] for row in found.edits_table if row["id"].endswith("~2")]
        assert again
        found.restore()
    if consolidated:
        journal = Journal(tmp_path / "b")
        journal.consolidate(model=model, tokenizer=tiny_tokenizer(), covariance=covariance)
        first = again[-1].removesuffix("~2")
        journal.undo(first)
        assert again[-1] not in [e.id for e in journal.edits]
        journal.redo(first)
        assert again[-1] in [e.id for e in journal.edits]
        return
    joined, _ = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "ab")
    assert sorted(e.id for e in joined.edits) == ["e0", "e1", "e2", "e3"]
    joined.undo("e3")
    assert Journal(tmp_path / "ab").verify().sound


def test_sequences_made_apart_become_one(tmp_path, seed):
    made(tmp_path / "a", seed, EDITS[:3], ONE)
    made(tmp_path / "b", seed, EDITS[3:], ONE)
    model, covariance = ready(seed)
    whole = sequence(model, covariance, EDITS, config=ONE, original=False)
    right = whole.editor.closed_form.delta(1)
    joined, conflicts = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "ab")
    delta = joined.sums.closed_form.delta(1)
    assert not conflicts and off(delta, right) < ROUNDED
    assert off(delta, solved(tmp_path / "ab", [e.id for e in EDITS])) < 1e-9
    assert [e.id for e in joined.edits] == [e.id for e in EDITS]
    joined.undo("e4")
    assert Journal(tmp_path / "ab").verify().sound
    answers = Baseline.load(tmp_path / "ab" / "baseline.json").answers
    assert answers == take_baseline(ready(seed)[0], tiny_tokenizer(), EDITS).answers
    with pytest.raises(ConfigError, match="do not add up: config"):
        made(tmp_path / "c", seed, EDITS[3:], ONE | {"prior_weight": 2.0})
        merge([tmp_path / "a", tmp_path / "c"], tmp_path / "ac")
    with pytest.raises(ConfigError, match="do not add up: model"):
        made(tmp_path / "d", seed + 1, EDITS[3:], ONE)
        merge([tmp_path / "a", tmp_path / "d"], tmp_path / "ad")
    assert not (tmp_path / "ac").exists() and not (tmp_path / "ad").exists()


def test_a_merge_that_is_refused_leaves_what_another_process_has_begun_there(monkeypatch, tmp_path, seed):
    made(tmp_path / "a", seed, EDITS[:1], ONE)
    made(tmp_path / "b", seed, EDITS[1:2], ONE)
    decided = merging._decided

    def meanwhile(journals):
        folder = Folder.open(tmp_path / "a")
        head = {name: value for name, value in folder.head.items() if name != "format"}
        Folder.create(tmp_path / "ab", head | {"by": "another"})
        return decided(journals)

    monkeypatch.setattr(merging, "_decided", meanwhile)
    with pytest.raises(ConfigError, match="another process"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "ab")
    assert Folder.open(tmp_path / "ab").head["by"] == "another"


def test_no_half_of_a_merge_is_left(monkeypatch, tmp_path, seed):
    made(tmp_path / "a", seed, EDITS[:1], ONE)
    made(tmp_path / "b", seed, EDITS[1:2], ONE)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Folder, "add_segment", full)
    with pytest.raises(OSError, match="No space"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "ab")
    assert not (tmp_path / "ab").exists()


@pytest.mark.parametrize("rule", ["latest", "fail"])
def test_a_fact_with_two_answers_is_told_and_decided(rule, tmp_path, seed):
    other = Edit(EDITS[1].prompt, EDITS[1].subject, "Lyon Manila", id="other")
    made(tmp_path / "a", seed, EDITS[:3], ONE)
    made(tmp_path / "b", seed, [other, EDITS[2], EDITS[5]], ONE)
    if rule == "fail":
        with pytest.raises(ConfigError, match=r"1 facts have different answers.*'Steve Jobs worked for'"):
            merge([tmp_path / "a", tmp_path / "b"], tmp_path / "ab", on_conflict=rule)
        assert not (tmp_path / "ab").exists()
        return
    joined, (conflict,) = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "ab")
    assert [edit.id for _, edit in conflict.edits] == ["e1", "other"]
    assert {e.id for e in joined.edits} == {"e0", "other", "e2", "e5"}
    model, covariance = ready(seed)
    right = sequence(model, covariance, [EDITS[0], other, EDITS[2], EDITS[5]], config=ONE, original=False)
    delta, wanted = joined.sums.closed_form.delta(1), right.editor.closed_form.delta(1)
    assert off(delta, wanted) < ROUNDED
    assert off(delta, solved(tmp_path / "ab", ["e0", "other", "e2", "e5"])) < 1e-9


def test_of_a_merged_journal_the_time_of_an_answer_is_when_it_was_made(monkeypatch, tmp_path, seed):
    """A conflict goes by what was made last, and not by what was merged last."""
    clock = iter(range(10_000))
    monkeypatch.setattr(
        "d4s.journal.folder.now", lambda: {"at": f"2026-01-01T00:{next(clock):05}", "by": "somebody"}
    )
    later = Edit(EDITS[0].prompt, EDITS[0].subject, "Lyon Manila", id="later")
    made(tmp_path / "a", seed, EDITS[:1], ONE)
    made(tmp_path / "b", seed, EDITS[1:2], ONE)
    made(tmp_path / "c", seed, [later], ONE)
    both, _ = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "ab")
    assert [row["at"] for row in both.log()] == sorted(
        row["at"] for name in "ab" for row in Journal(tmp_path / name).log()
    )
    joined, (conflict,) = merge([tmp_path / "ab", tmp_path / "c"], tmp_path / "abc")
    assert {e.id for e in joined.edits} == {"later", "e1"} and conflict.edits[-1][1].id == "later"


def test_what_differs_is_told_field_by_field(tmp_path, seed):
    """Each field that differs, and none that does not, however long the rest is."""
    made(tmp_path / "j", seed, EDITS[:2], ONE)
    there = Journal(tmp_path / "j").head
    here = {**there, "schedule": {**there["schedule"], "seed": 5, "extra": 1}}
    here["config"] = {**there["config"], "target": {**there["config"]["target"], "steps": 99}}
    steps = there["config"]["target"]["steps"]
    assert differing(there, here) == [
        f"config.target.steps ({steps} there, 99 here)",
        f"schedule.seed ({there['schedule']['seed']} there, 5 here)",
        "schedule.extra (null there, 1 here)",
    ]


def test_statistics_of_another_corpus_say_nothing_of_a_journal(tmp_path, seed):
    made(tmp_path / "j", seed, EDITS[:2], ONE)
    model, covariance = ready(seed)
    other = Covariance(
        {i: 2 * m for i, m in covariance.moments.items()}, 9, fingerprint=covariance.fingerprint
    )
    with pytest.raises(ConfigError, match="the key statistics are not those of"):
        Journal(tmp_path / "j").verify(model=model, tokenizer=tiny_tokenizer(), covariance=other)


def test_where_no_edit_stands_there_is_no_change_to_hand_on(tmp_path, seed):
    made(tmp_path / "j", seed, EDITS[:2], ONE)
    journal = Journal(tmp_path / "j")
    journal.undo(["e0", "e1"])
    with pytest.raises(ModelError, match="no weight differs from the unedited model's"):
        journal.export_patch(tmp_path / "p.safetensors")
    assert not (tmp_path / "p.safetensors").exists()


def test_the_log_says_what_was_done(tmp_path, seed):
    model, covariance = ready(seed)
    result = sequence(model, covariance, EDITS[:3], journal=tmp_path / "j", batch_size=2)
    journal = Journal(tmp_path / "j")
    journal.undo("e1")
    rows = journal.log()
    assert [row["id"] for row in rows] == ["e0", "e1", "e2"] and [row["step"] for row in rows] == [1, 1, 2]
    assert [row["stands"] for row in rows] == [True, False, True]
    assert [row["written_probability"] for row in rows] == [
        row["written_probability"] for row in result.edits_table
    ]
    for name in ("first_probability", "last_probability"):
        assert [row[name] for row in rows] == [row[name] for row in result.edits_table]
    assert list(journal.to_frame()["target_new"]) == [e.target_new for e in EDITS[:3]]


@pytest.mark.parametrize("method", ["d4s", "memit"])
def test_the_log_alone_makes_the_same_weights(method, tmp_path, seed):
    model, covariance = ready(seed)
    before = state(model)
    options = dict(method=method, config=FAST, batch_size=2, journal=tmp_path / "j", original=False)
    sequence(model, covariance, **options).restore()
    arguments = dict(model=model, tokenizer=tiny_tokenizer(), covariance=covariance)
    found = Journal(tmp_path / "j").verify(**arguments)
    assert found.sound and "made again from the log alone" in str(found) and same(before, state(model))
    other, _ = ready(seed + 1)
    wrong = Journal(tmp_path / "j").verify(**arguments | {"model": other})
    assert "not the unedited one" in str(wrong)


def test_damage_is_found(tmp_path, seed):
    made(tmp_path / "j", seed)
    assert Journal(tmp_path / "j").verify().sound
    generator = random.Random(seed)
    for kind in ("segments", "snapshots", "points"):
        file = generator.choice(sorted((tmp_path / "j" / kind).iterdir()))
        data = bytearray(file.read_bytes())
        whole = bytes(data)
        data[generator.randrange(len(data) * 3 // 4, len(data))] ^= 1 << generator.randrange(8)
        file.write_bytes(data)
        found = Journal(tmp_path / "j").verify()
        assert not found.sound and kind in str(found), kind
        file.write_bytes(whole)
    assert Journal(tmp_path / "j").verify().sound
    log = tmp_path / "j" / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    for damaged in (
        lines[:2] + lines[3:],
        [lines[1], lines[0], *lines[2:]],
        [*lines[:1], lines[0], *lines[1:]],
    ):
        log.write_bytes(b"".join(damaged))
        with pytest.raises(DataError, match="its check does not fit"):
            Journal(tmp_path / "j")
    log.write_bytes(b"".join(lines))
    head = json.loads((tmp_path / "j" / "journal.json").read_text())
    (tmp_path / "j" / "journal.json").write_text(json.dumps(head | {"method": "memit"}))
    with pytest.raises(DataError, match="has changed since"):
        Journal(tmp_path / "j")


def test_a_saved_model_gets_the_journals_weights(tmp_path, seed):
    model, *_ = made(tmp_path / "j", seed)
    model.save_pretrained(tmp_path / "j" / "model")
    journal = Journal(tmp_path / "j")
    assert not journal.verify().sound  # the unedited one
    journal.write_to_folder(tmp_path / "j" / "model")
    assert journal.verify().sound
    journal.undo("e2")
    assert any("is not what the journal comes to" in text for text in journal.verify().problems)
    journal.write_to_folder(tmp_path / "j" / "model")
    assert Journal(tmp_path / "j").verify().sound
    again = type(model).from_pretrained(tmp_path / "j" / "model")
    assert all(torch.equal(again.state_dict()[n], w) for n, w in journal.weights().items())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="holds no"):
        journal.write_to_folder(tmp_path / "empty")
