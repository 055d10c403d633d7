"""Any order of edits, undoing, redoing, revising, solving anew and merging, against a list solved from scratch."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.journals import Simulated

from d4s.edits import Edit
from d4s.journal.folder import Folder
from d4s.journal.journal import Journal
from d4s.journal.merge import merge
from d4s.journal.sums import packed

PROMPTS = ("capital", "tongue", "twin", "river")


class Sequence(RuleBasedStateMachine):
    """The list: edits in the order made, and the ids of those that were undone."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.edits: list[Edit] = []
        self.undone: set[str] = set()
        self.numbers = iter(range(10_000))

    @initialize(seed=st.integers(0, 2**31))
    def begin(self, seed):
        self.world = Simulated(self.root / "0", seed)
        self.folder = self.world.begin()
        self.journal = Journal(self.world.path)

    def teardown(self):
        shutil.rmtree(self.root)

    @property
    def standing(self):
        return [edit for edit in self.edits if edit.id not in self.undone]

    def reopened(self):
        """The journal, as whoever opens it next finds it."""
        self.folder = Folder.open(self.world.path)
        self.journal = Journal(self.world.path)

    def latest(self, prompt):
        """Id of the edit of this prompt that a new one takes the place of."""
        found = [e.id for e in self.standing if e.prompt.startswith(f"{prompt} of")]
        return found[-1] if found else None

    @rule(prompt=st.sampled_from(PROMPTS))
    def edit(self, prompt):
        self.folder = Folder.open(self.world.path)
        new = self.world.edit(prompt, f"e{next(self.numbers)}")
        self.world.make(self.folder, new, self.latest(prompt))
        self.edits.append(new)
        self.reopened()

    @precondition(lambda self: self.standing)
    @rule(data=st.data())
    def undo(self, data):
        ids = [e.id for e in self.standing]
        chosen = data.draw(st.lists(st.sampled_from(ids), min_size=1, max_size=3, unique=True))
        self.journal.undo(chosen)
        self.undone |= set(chosen)

    @precondition(lambda self: self.undone)
    @rule(data=st.data())
    def redo(self, data):
        ids = sorted(self.undone)
        chosen = data.draw(st.lists(st.sampled_from(ids), min_size=1, max_size=3, unique=True))
        self.journal.redo(chosen)
        self.undone -= set(chosen)

    @precondition(lambda self: self.standing)
    @rule(data=st.data())
    def revise(self, data):
        old = data.draw(st.sampled_from(self.standing))
        prompt = old.prompt.split(" of ")[0]
        self.undone.add(old.id)
        self.folder = Folder.open(self.world.path)
        new = self.world.edit(prompt, f"e{next(self.numbers)}")
        self.world.make(self.folder, new, self.latest(prompt), kind="revised", id=old.id)
        self.edits.append(new)
        self.reopened()

    @precondition(lambda self: self.standing)
    @rule()
    def consolidate(self):
        """Earlier edits of a prompt are in no sum afterwards, and do not come back when the last one is undone."""
        last = {edit.prompt: edit for edit in self.standing}
        gone = [e for e in self.standing if e is not last[e.prompt]]
        if gone:  # else their redoing means something else than in the list
            self.journal.undo([e.id for e in gone])
            self.undone |= {e.id for e in gone}
        self.folder = Folder.open(self.world.path)
        self.world.count += 1
        put = []
        for i, edit in enumerate(last.values()):
            (row,) = self.world.rows(edit, None)
            put.append(type(row)(row.layer, row.sign, (i,), row.residuals, row.keys))
        digest = self.folder.save("segments", self.world.count, packed({self.world.count: put}))
        self.folder.append("segment", first=self.world.count, step=self.world.count, digest=digest)
        self.folder.append("consolidated", ids=[e.id for e in last.values()], step=self.world.count)
        self.reopened()

    @rule(prompt=st.sampled_from(PROMPTS))
    def merge(self, prompt):
        """With a journal of one other edit, made later, which wins where both have its prompt."""
        other = Simulated(self.root / f"other-{next(self.numbers)}", 0)
        other.prior, other.keys, other.generator = self.world.prior, self.world.keys, self.world.generator
        new = other.edit(prompt, f"e{next(self.numbers)}")
        folder = other.begin()
        other.make(folder, new, None)
        self.world.residuals |= other.residuals
        into, standing = self.root / f"merged-{next(self.numbers)}", self.standing
        merge([self.world.path, other.path], into)
        self.world.path, self.undone = into, set()
        kept = {edit.prompt: edit for edit in standing} | {new.prompt: new}
        self.edits = [*(e for e in standing if kept[e.prompt] is e), new]
        self.world.count = 10 * (1 + next(self.numbers))
        self.reopened()

    @invariant()
    def the_weights_are_those_of_the_list(self):
        truth = self.world.truth(self.standing)
        found = self.journal.sums.closed_form.delta(3)
        size = max(float(truth.norm()), 1e-3)
        assert float((found - truth).norm()) / size < 1e-8
        assert [e.id for e in self.journal.edits] == [e.id for e in self.standing]

    @invariant()
    def the_files_say_the_same(self):
        again = Journal(self.world.path)
        found, mine = again.sums.closed_form.delta(3), self.journal.sums.closed_form.delta(3)
        assert float((found - mine).norm()) <= 1e-8 * max(float(mine.norm()), 1e-3)
        left, right = again.sums.factors()[3]
        assert torch.allclose(left @ right, found, atol=1e-7)


def test_an_edit_between_two_others_of_its_prompt_is_revised(tmp_path):
    """The one after it takes the place of the one before it, and the new one that one's."""
    world = Simulated(tmp_path / "j", 0)
    folder = world.begin()
    edits = [world.edit("capital", f"e{i}") for i in range(4)]
    for i in range(3):
        world.make(folder, edits[i], edits[i - 1].id if i else None)
    world.make(folder, edits[3], "e2", kind="revised", id="e1")
    journal = Journal(world.path)
    found, truth = journal.sums.closed_form.delta(3), world.truth([edits[0], edits[2], edits[3]])
    assert float((found - truth).norm()) <= 1e-8 * float(truth.norm())
    left, right = journal.sums.factors()[3]
    assert torch.allclose(left @ right, found, atol=1e-7)


TestSequence = Sequence.TestCase
TestSequence.settings = settings(
    max_examples=25, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)
