"""A journal of ten thousand edits: its bytes, an event's time, going on, and one edit taken back."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import torch

from benchmarks.measure import relative_error, seconds
from d4s.change.closed_form import ClosedForm, Prior, Rows
from d4s.edits import Edit
from d4s.journal.folder import HEAD, Folder
from d4s.journal.sums import Sums, packed

D_IN, D_OUT, EDITS, SEGMENT = 2048, 512, 10_000, 64
LAYER = 0


def edit(number: int) -> Edit:
    """With the fields of a CounterFact record that a sequence scores."""
    return Edit(
        "The mother tongue of {} is",
        f"Danielle Darrieux {number}",
        "English",
        "French",
        paraphrases=[
            f"Danielle Darrieux {number} spoke the language",
            f"Danielle Darrieux {number}, a speaker of",
        ],
        neighborhood=[f"The native language of number {i} is" for i in range(10)],
        id=f"{number}",
    )


def head() -> dict[str, object]:
    text = dict.fromkeys(("created", "by", "model", "tokenizer", "edits", "dtype", "source"), "x")
    shapes = {"weights": {str(LAYER): "w"}, "transposed": {str(LAYER): False}, "layers": [LAYER]}
    counts = {"count": EDITS, "segment_every": SEGMENT, "snapshot_every": 1000, "keeps_vectors": True}
    nothing = {"versions": {}, "config": {}, "chosen": {}, "statistics": None}
    made = text | shapes | counts | nothing | {"method": "d4s", "schedule": {"seed": 0}}
    assert set(made) == set(HEAD)
    return made


class Journal:
    """Ten thousand single edits with simulated keys and residuals, of prompts of their own."""

    def __init__(self, path: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        scale = torch.logspace(0, -1, D_IN, dtype=torch.float64)
        sample = torch.randn(2 * D_IN, D_IN, generator=generator, dtype=torch.float64) * scale
        prior = Prior(sample.T @ sample / len(sample), weight=float(D_IN))
        self.closed = ClosedForm({LAYER: prior}, D_OUT)
        self.folder = Folder.create(path, head())
        self.folder.save("base", None, {f"{LAYER}": torch.randn(D_OUT, D_IN, generator=generator)})
        self.folder.save("priors", None, {f"{LAYER}": prior.matrix})
        self.append_seconds: list[float] = []
        self.snapshot_bytes = 0
        waiting: dict[int, list[Rows]] = {}
        for step in range(1, EDITS + 1):
            # As a model gives them: in float32.
            keys, residuals = (torch.randn(1, d, generator=generator).double() for d in (D_IN, D_OUT))
            waiting[step] = [Rows(LAYER, 1.0, (0,), residuals, keys)]
            self.closed.put_(waiting[step][0])
            self.closed.delta(LAYER)
            fields = {"edits": [edit(step).to_dict()], "first_probability": [0.1], "last_probability": [0.9]}

            def append(step: int = step, fields: dict = fields) -> None:
                self.folder.append("step", step=step, **fields, seconds=0.5 * step)

            self.append_seconds.append(seconds(append, torch.device("cpu")))
            self.folder.append(
                "tested", made=step, written_probability=[0.9], efficacy=[1.0], paraphrase=[0.5]
            )
            if len(waiting) == SEGMENT or step == EDITS:
                digest = self.folder.save("segments", step, packed(waiting))
                self.folder.append("segment", first=min(waiting), step=step, digest=digest)
                waiting.clear()
            if step == EDITS - SEGMENT // 2:  # so that going on takes a snapshot, and vectors behind it
                event = len(self.folder.events) - 1
                digest = self.folder.save("snapshots", event, self.closed.snapshot())
                self.folder.append("snapshot", event=event, digest=digest)
                self.snapshot_bytes = self.folder.place("snapshots", event).stat().st_size
        self.folder.unlock()


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Journal:
    return Journal(tmp_path_factory.mktemp("journal") / "j")


def test_bytes(benchmark, claim, journal):
    root = journal.folder.root
    vectors = sum(path.stat().st_size for path in (root / "segments").iterdir())
    log = (root / "log.jsonl").stat().st_size
    text = sum(len(json.dumps(edit(step).to_dict())) for step in range(1, EDITS + 1))
    made = (vectors + log) / EDITS
    claim(
        f"journal, bytes an edit, d_in {D_IN}, d_out {D_OUT}, one layer",
        made,
        1.05 * (4 * D_IN + 4 * D_OUT + text / EDITS + 600),
        at_least=False,
        vectors=vectors / EDITS,
        log=log / EDITS,
        snapshot=journal.snapshot_bytes,
    )
    benchmark.pedantic(lambda: None, rounds=1)


def test_an_event(benchmark, claim, journal):
    late = statistics.median(journal.append_seconds[-1000:])
    early = statistics.median(journal.append_seconds[:1000])
    claim(
        "journal, ms to append and sync an edit's event", 1e3 * late, 20.0, at_least=False, early=1e3 * early
    )
    claim("journal, event 10,000 over event 1,000", late / early, 1.5, at_least=False)
    benchmark.pedantic(lambda: None, rounds=1)


def test_going_on(benchmark, claim, device, journal):
    """Log, snapshot and the vectors of every edit: all of them, since any may be taken back."""
    found: list[Sums] = []
    taken = seconds(lambda: found.append(Sums(Folder.open(journal.folder.root))), device)
    error = relative_error(found[0].closed_form.delta(LAYER), journal.closed.delta(LAYER))
    claim("journal, seconds to read 10,000 edits back", taken, 20.0, at_least=False)
    claim("journal, read back: relative error of Δ", error, 1e-12, at_least=False)
    benchmark.pedantic(lambda: Folder.open(journal.folder.root), rounds=1)


def test_undo(benchmark, claim, device, journal):
    sums = Sums(Folder.open(journal.folder.root))
    chosen = [f"{1 + i * EDITS // 20}" for i in range(20)]
    sums.change(chosen[:1], stand=False)
    first = seconds(sums.weights, device)  # P = (λC + B)⁻¹ is made once
    change, write = [], []

    def undo(edit_id: str) -> None:
        def step() -> None:
            sums.change([edit_id], stand=False)
            sums.closed_form.delta(LAYER)

        change.append(seconds(step, device))
        write.append(seconds(sums.weights, device))

    for edit_id in chosen[1:]:
        undo(edit_id)
    claim(
        "journal, ms to undo one of 10,000 edits, Δ without it",
        1e3 * statistics.median(change),
        100.0,
        at_least=False,
        weights=1e3 * statistics.median(write),
        first=1e3 * first,
    )
    rows = [made.rows[0] for edit_id, made in sums.standing.made.items() if edit_id not in chosen]
    keys, residuals = (torch.cat([getattr(r, name) for r in rows]) for name in ("keys", "residuals"))
    matrix = sums.priors[LAYER].matrix + keys.T @ keys
    never = torch.linalg.solve(matrix, keys.T @ residuals).T
    error = relative_error(sums.closed_form.delta(LAYER), never)
    claim("journal, 20 undone of 10,000: relative error to those never made", error, 1e-8, at_least=False)
    benchmark.pedantic(lambda: None, rounds=1)
