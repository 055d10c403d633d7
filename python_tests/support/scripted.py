"""A method whose every edit is written down, on a bigram model: what a sequence should tell of it is worked by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from support.bigram import Bigram
from torch import nn

from d4s.edits import Edit
from d4s.methods.base import Editor, Method, Step, not_optimised
from d4s.models.architectures import Architecture

ARCHITECTURE = Architecture("blocks", "mlp_output", "mlp_input", "attention_output")
Change = tuple[str, str, float]  # word, follower, its probability from now on


class Scripted(Bigram):
    """A bigram model with a block that nothing runs through, so that there is a W to speak of."""

    def __init__(self, probability: dict[str, dict[str, float]]) -> None:
        super().__init__(probability)
        block = nn.Module()
        for name in ("mlp_output", "mlp_input", "attention_output"):
            block.add_module(name, nn.Linear(2, 2))
        self.blocks = nn.ModuleList([block])


@dataclass(frozen=True, kw_only=True)
class Script(Method):
    """script: id of an edit → what the step that makes it does to the model, as a sequence of `Change`"""

    name: ClassVar[str] = "script"
    paper: ClassVar[str] = "none"
    changes: ClassVar[str] = "what is written"
    script: dict

    @classmethod
    def preset(cls, anatomy) -> Script:
        return cls(script={})

    def editor(self, bench) -> Editor:
        return _Editor(self, bench, (0,))


class _Editor(Editor):
    def apply(self, batch: Sequence[Edit]) -> Step:
        for edit in batch:
            for change in self.method.script[edit.id]:
                self.anatomy.model.set(*change)
        return not_optimised(batch)
