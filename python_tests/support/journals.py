"""Journals of one layer whose keys and residuals are drawn, as a sequence by the paper's rule would leave them."""

from __future__ import annotations

from pathlib import Path

import torch

from d4s.change.closed_form import Rows
from d4s.edits import Edit
from d4s.journal.folder import Folder
from d4s.journal.sums import packed
from d4s.measure.metrics import Baseline

D_IN, D_OUT = 12, 5


class Simulated:
    """A journal that grows as a sequence's does, one edit a step.

    keys: of each prompt, which decides it; residuals: of each edit
    """

    def __init__(self, path: Path, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        keys = self.draw(60, D_IN)
        self.prior = keys.T @ keys / 60
        self.keys: dict[str, torch.Tensor] = {}
        self.residuals: dict[str, torch.Tensor] = {}
        self.path, self.count = path, 0

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def begin(self) -> Folder:
        layer = {"3": "model.3.weight"}
        folder = Folder.create(
            self.path,
            {
                **{
                    name: ""
                    for name in ("created", "by", "model", "tokenizer", "statistics", "edits", "source")
                },
                **{"versions": {}, "method": "d4s", "config": {"residual": "once"}, "chosen": {}, "count": 1},
                **{"schedule": {"seed": 0}, "dtype": "float32", "layers": [3], "weights": layer},
                **{
                    "transposed": {"3": False},
                    "keeps_vectors": True,
                    "snapshot_every": 5,
                    "segment_every": 1,
                },
            },
        )
        folder.save("base", None, {"3": torch.zeros(D_OUT, D_IN)})
        folder.save("priors", None, {"3": self.prior})
        Baseline({}).save(self.path / "baseline.json")
        return folder

    def edit(self, prompt: str, edit_id: str, at: str | None = None) -> Edit:
        """A new edit of a prompt."""
        if prompt not in self.keys:
            self.keys[prompt] = self.draw(1, D_IN)
        self.residuals[edit_id] = self.draw(1, D_OUT)
        return Edit(f"{prompt} of {{}} is", "Lyon", f"answer {edit_id}", id=edit_id)

    def rows(self, edit: Edit, replaced: str | None) -> list[Rows]:
        """What the edit puts into the sums, in the place of another one of its prompt, if that stands."""
        key = self.keys[edit.prompt.split(" of ")[0]]
        put = [Rows(3, 1.0, (0,), self.residuals[edit.id], key)]
        return put if replaced is None else [*put, Rows(3, -1.0, (0,), self.residuals[replaced], key)]

    def make(self, folder: Folder, edit: Edit, replaced: str | None, kind: str = "step", **fields) -> None:
        self.count += 1
        digest = folder.save("segments", self.count, packed({self.count: self.rows(edit, replaced)}))
        folder.append("segment", first=self.count, step=self.count, digest=digest)
        folder.append(kind, step=self.count, edits=[edit.to_dict()], seconds=0.0, **fields)

    def truth(self, standing: list[Edit]) -> torch.Tensor:
        """Δ by LU, of the last edit of each prompt that stands."""
        last = {edit.prompt: edit for edit in standing}.values()
        if not last:
            return torch.zeros(D_OUT, D_IN, dtype=torch.float64)
        keys = torch.cat([self.keys[edit.prompt.split(" of ")[0]] for edit in last])
        residuals = torch.cat([self.residuals[edit.id] for edit in last])
        return torch.linalg.solve(self.prior + keys.T @ keys, keys.T @ residuals).T
