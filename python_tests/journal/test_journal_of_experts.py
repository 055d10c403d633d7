"""Journals of mixtures of experts: edits taken back, done again and revised, against the joint solve in float64."""

from __future__ import annotations

import pytest
import torch
from support.patches import all_bits, same
from support.sequences import EDITS, FAST, ready, sequence
from support.tiny import tiny_tokenizer

from d4s import Observer
from d4s.change.closed_form import Prior
from d4s.edits import Edit
from d4s.errors import ConfigError, DataError, EditError
from d4s.journal.journal import Journal
from d4s.journal.merge import merge
from d4s.journal.patch import apply_patch, remove_patch

ONE = FAST | {"layers": [1], "residual": "once"}  # one layer, no contexts, the paper's rule: undoing is exact
ROUNDED = 1e-4  # what two sequences' float32 targets and keys may be apart


class Put(Observer):
    """Notes what each edit has put in, with its keys."""

    def __init__(self) -> None:
        self.rows: dict[str, list] = {}

    def step(self, result, batch) -> None:
        for place, edit in enumerate(batch):
            self.rows[edit.id] = [
                (rows.layer, rows.residuals[i].double(), rows.keys[i].double())
                for rows in getattr(result.editor, "put", ())  # memit puts nothing into sums
                for i, own in enumerate(rows.edits)
                if own == place and rows.sign > 0
            ]


class Made:
    """A sequence that was made in a journal; the model is unedited again."""

    def __init__(self, path, seed, model_type, edits=EDITS[:4], config=ONE, **options) -> None:
        self.put = Put()
        self.model, self.covariance = ready(seed, model_type)
        self.unedited = all_bits(self.model)
        result = sequence(
            *(self.model, self.covariance, edits),
            config=config,
            journal=path,
            original=False,
            observers=[self.put],
            **options,
        )
        self.editor = result.editor
        self.edited = all_bits(self.model)
        result.restore()
        self.arguments = dict(model=self.model, tokenizer=tiny_tokenizer(), covariance=self.covariance)

    def truth(self, layer: int, ids) -> torch.Tensor:
        """Δ = Rᵀ K (λC + KᵀK)⁻¹ of these edits' rows over all experts side by side, by LU."""
        prior = self.editor._priors[layer]
        matrix = (
            prior.matrix
            if isinstance(prior, Prior)
            else torch.block_diag(*(prior.of(j).matrix for j in range(prior.experts)))
        )
        rows = [row for i in ids for row in self.put.rows[i] if row[0] == layer]
        residuals, keys = (torch.stack([row[part] for row in rows]) for part in (1, 2))
        return torch.linalg.solve(matrix + keys.T @ keys, keys.T @ residuals).T


def joint(journal: Journal, layer: int) -> torch.Tensor:
    """Δ of what stands, experts side by side."""
    delta = journal.sums.deltas()[layer]
    if isinstance(delta, torch.Tensor):
        return delta
    kept = journal.sums.kept[layer]
    nothing = torch.zeros(kept.d_out, kept.d_in, dtype=torch.float64)
    return torch.cat([delta.get(j, nothing) for j in range(kept.experts)], 1)


def off(found, truth) -> float:
    return float((found - truth).norm() / truth.norm())


def written(model, layer: int = 1) -> torch.Tensor:
    return model.model.layers[layer].mlp.experts.down_proj.detach().clone()


@pytest.mark.parametrize(
    ("model_type", "ids"), [("mixtral", ["e3", "e0"]), ("qwen3_moe", ["e2"]), ("gpt_oss", ["e2"])]
)
def test_an_undone_edit_of_experts_was_never_made(model_type, ids, tmp_path, seed):
    made = Made(tmp_path / "j", seed, model_type)
    journal = Journal(tmp_path / "j")
    (name,) = journal.weights()
    assert torch.equal(journal.weights()[name].view(torch.int32), made.edited[name])
    assert journal.verify().sound and journal.verify().difference is not None
    journal.undo(ids)
    left = [edit for edit in EDITS[:4] if edit.id not in ids]
    assert off(joint(journal, 1), made.truth(1, [edit.id for edit in left])) < 1e-9
    never = sequence(made.model, made.covariance, left, config=ONE, original=False)
    base = never.editor.weights.base[1].double()
    assert off(journal.weights()[name].double() - base, written(made.model).double() - base) < ROUNDED
    unreached = [j for j in range(len(base)) if j not in never.editor.closed_form.delta(1)]
    assert all(torch.equal(journal.weights()[name][j].double(), base[j]) for j in unreached)
    never.restore()
    again = Journal(tmp_path / "j")  # from the files
    assert torch.equal(again.weights()[name], journal.weights()[name])
    assert [edit.id for edit in again.edits] == [edit.id for edit in left]
    again.redo(reversed(ids))
    assert off(joint(again, 1), made.truth(1, [edit.id for edit in EDITS[:4]])) < 1e-9
    again.undo([edit.id for edit in EDITS[:4]])
    assert torch.equal(Journal(tmp_path / "j").weights()[name].double(), base), "no edit stands: W0"


def test_an_undone_answer_gives_its_place_back(tmp_path, seed):
    """The fact was changed twice: the first answer comes back when the second is undone, and the other way round."""
    later = Edit(EDITS[0].prompt, EDITS[0].subject, "Lyon", id="later")
    made = Made(tmp_path / "j", seed, "qwen3_moe", [*EDITS[:3], later])
    journal = Journal(tmp_path / "j")

    def near(*ids) -> bool:
        return off(joint(journal, 1), made.truth(1, ids)) < 1e-9

    assert near("e1", "e2", "later")  # the later answer stands in the earlier one's place
    journal.undo("later")
    assert near("e0", "e1", "e2")
    journal.undo("e0")
    assert near("e1", "e2")
    journal.redo("later")
    assert near("e1", "e2", "later")
    journal.redo("e0")
    assert near("e1", "e2", "later")


@pytest.mark.parametrize("method", ["d4s", "memit-seq"])
def test_dense_layers_below_experts_go_along(method, tmp_path, seed):
    config = FAST | {"layers": [0, 1]}
    made = Made(tmp_path / "j", seed, "deepseek_v3", config=config, method=method)
    journal = Journal(tmp_path / "j")
    journal.undo("e1")
    for layer in (0, 1):
        assert off(joint(journal, layer), made.truth(layer, ["e0", "e2", "e3"])) < 1e-9
    assert Journal(tmp_path / "j").verify().sound
    journal.redo("e1")
    for layer in (0, 1):
        assert off(joint(journal, layer), made.truth(layer, ["e0", "e1", "e2", "e3"])) < 1e-9


def test_a_revised_edit_has_another_answer_and_the_old_one_may_come_back(tmp_path, seed):
    model_type = "gpt_oss"
    made = Made(tmp_path / "j", seed, model_type)
    journal = Journal(tmp_path / "j")
    new = journal.revise("e2", "Paris", **made.arguments)
    (name,) = journal.weights()
    assert [edit.id for edit in Journal(tmp_path / "j").edits] == ["e0", "e1", "e3", new.id]
    assert torch.equal(written(made.model), Journal(tmp_path / "j").weights()[name])
    other, its = ready(seed, model_type)
    right = sequence(other, its, [*EDITS[:2], EDITS[3], new], config=ONE, original=False)
    base = right.editor.weights.base[1].double()
    assert off(written(made.model).double() - base, written(other).double() - base) < ROUNDED
    journal.undo(new.id)
    journal.redo("e2")
    assert off(joint(Journal(tmp_path / "j"), 1), made.truth(1, ["e0", "e1", "e2", "e3"])) < 1e-9
    assert Journal(tmp_path / "j").verify().sound
    with pytest.raises(ConfigError, match="does not go on"):
        sequence(*ready(seed, model_type), EDITS[:4], config=ONE, journal=tmp_path / "j", original=False)


def test_consolidating_is_one_batch_of_the_edits_that_stand(tmp_path, seed):
    made = Made(tmp_path / "j", seed, "mixtral", config=FAST)
    journal = Journal(tmp_path / "j")
    journal.undo("e1")
    journal.consolidate(**made.arguments)
    left = [EDITS[0], *EDITS[2:4]]
    other, its = ready(seed, "mixtral")
    sequence(other, its, left, config=FAST, batch_size=3, original=False)
    found = Journal(tmp_path / "j")
    assert all(torch.equal(w, dict(other.named_parameters())[n]) for n, w in found.weights().items())
    before = {layer: joint(found, layer) for layer in (0, 1)}
    found.undo("e0")
    found.redo("e0")
    assert all(off(joint(found, layer), before[layer]) < 1e-9 for layer in (0, 1))
    assert found.verify().sound


def test_a_patch_of_a_journal_holds_what_stands(tmp_path, seed):
    made = Made(tmp_path / "j", seed, "gpt_oss")
    journal, path = Journal(tmp_path / "j"), tmp_path / "p.safetensors"
    again = journal.verify(**made.arguments)
    assert again.sound and "made again from the log alone" in str(again)
    journal.undo(["e0", "e2"])
    assert all(change.left is not None for change in journal.changes())
    journal.export_patch(path)
    (name,) = journal.weights()
    assert [edit.id for edit in apply_patch(made.model, path).edits] == ["e1", "e3"]
    assert torch.equal(written(made.model), journal.weights()[name])
    remove_patch(made.model, path)
    assert same(all_bits(made.model), made.unedited)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_a_saved_model_follows_however_its_experts_are_kept(model_type, tmp_path, seed):
    made = Made(tmp_path / "j", seed, model_type, EDITS[1:3])
    made.model.save_pretrained(tmp_path / "j" / "model")
    journal = Journal(tmp_path / "j")
    assert any("is not what the journal comes to" in text for text in journal.verify().problems)
    journal.undo("e2")
    journal.write_to_folder(tmp_path / "j" / "model")
    assert Journal(tmp_path / "j").verify().sound
    again = type(made.model).from_pretrained(tmp_path / "j" / "model", dtype=torch.float32)
    (name,) = journal.weights()
    assert torch.equal(written(again), journal.weights()[name])


def test_where_the_newest_snapshot_is_damaged_the_one_before_it_has_the_rows(tmp_path, seed):
    made = Made(tmp_path / "j", seed, "mixtral")
    journal = Journal(tmp_path / "j")
    journal.undo("e1")
    (name,), before = journal.weights(), journal.weights()
    newest = max((tmp_path / "j" / "snapshots").iterdir())
    newest.write_bytes(newest.read_bytes()[:-9])
    assert torch.equal(Journal(tmp_path / "j").weights()[name], before[name])
    Journal(tmp_path / "j").redo("e1")
    assert off(joint(Journal(tmp_path / "j"), 1), made.truth(1, ["e0", "e1", "e2", "e3"])) < 1e-9
    for file in (tmp_path / "j" / "snapshots").iterdir():
        file.write_bytes(b"")
    with pytest.raises(DataError, match="has no sound snapshot"):
        Journal(tmp_path / "j").undo("e1")


def test_an_unfinished_sequence_is_finished_first(tmp_path, seed, monkeypatch):
    """Its steps since the last snapshot are in the log alone."""
    with monkeypatch.context() as patch:
        patch.setattr("d4s.sequence.journaling.Journaling.ended", lambda self, *_: self.close())
        Made(tmp_path / "j", seed, "mixtral")
    with pytest.raises(DataError, match="go on with"):
        Journal(tmp_path / "j").undo("e1")
    made = Made(tmp_path / "whole", seed, "mixtral")
    model, covariance = ready(seed, "mixtral")
    sequence(model, covariance, EDITS[:4], config=ONE, journal=tmp_path / "j", original=False)
    assert same(all_bits(model), made.edited)
    journal = Journal(tmp_path / "j")
    journal.undo("e1")
    assert off(joint(journal, 1), made.truth(1, ["e0", "e2", "e3"])) < 1e-9


def test_what_cannot_be_done_is_refused_and_nothing_changes(tmp_path, seed):
    Made(tmp_path / "j", seed, "mixtral")
    journal = Journal(tmp_path / "j")
    before = (tmp_path / "j" / "log.jsonl").read_bytes()
    with pytest.raises(EditError, match="unknown edit 'e9'"):
        journal.undo("e9")
    with pytest.raises(EditError, match="'e1' stands already"):
        journal.redo("e1")
    with pytest.raises(DataError, match="is of a mixture of experts"):
        merge([tmp_path / "j", tmp_path / "j"], tmp_path / "jj")
    assert (tmp_path / "j" / "log.jsonl").read_bytes() == before and not (tmp_path / "jj").exists()
    for name, options, why in (
        ("memit", dict(method="memit", config=FAST), r"the weights alone are kept \(memit"),
        ("few", dict(keep_vectors=False), "no vectors.*--keep-vectors yes"),
    ):
        made = Made(tmp_path / name, seed, "mixtral", EDITS[:2], **options)
        found = Journal(tmp_path / name)
        assert all(torch.equal(w.view(torch.int32), made.edited[n]) for n, w in found.weights().items())
        assert found.verify().sound
        with pytest.raises(DataError, match=why):
            found.undo("e1")
