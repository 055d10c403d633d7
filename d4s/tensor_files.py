"""Files of tensors: safetensors with a format, facts as text, and a digest over all of it."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from d4s.errors import D4SError
from d4s.files import whole

Outline = tuple[str, tuple[int, ...]]  # type, as safetensors names it ("F32", "I16"), and shape


@dataclass(frozen=True)
class TensorFile:
    """What such a file holds.

    facts: its metadata, without the digest
    intact: whether all of it is what was written
    digest: of all of it as it is
    """

    path: str
    tensors: dict[str, Tensor]
    facts: dict[str, str]
    intact: bool
    digest: str

    def check_intact(self, error: type[D4SError]) -> None:
        """Raises `error` if it is damaged; a wrong shape or type, where there is one, says more, and goes first."""
        if not self.intact:
            raise error(f"{self.path}: damaged: what it holds is not what was written (its digest differs)")


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], facts: Mapping[str, str]
) -> str:
    """One file, written beside its place and then renamed; its digest. facts: "format" among them"""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    digest = _digest(on_cpu, facts)
    with whole(path) as beside:
        save_file(on_cpu, beside, metadata={**facts, "digest": digest})
    return digest


def load_tensors(
    path: str | os.PathLike[str],
    wanted: str,
    made_by: str,
    error: type[D4SError],
    before: Callable[[dict[str, str], dict[str, Outline]], None] | None = None,
) -> TensorFile:
    """Raises `error` for a file that is no safetensors file, or whose format is not the wanted one.

    made_by: the command that makes such files, for the text of the error
    before: called with the facts and what tensors there are, before any of them is read; raises what is wrong with them
    """
    try:
        if not stat.S_ISDIR(mode := os.stat(path).st_mode) and not stat.S_ISREG(mode):
            raise OSError("is a pipe or a device")
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            if facts.get("format") != wanted:
                raise error(
                    f"{path}: format {facts.get('format')!r}, must be {wanted!r}; make it again ({made_by})"
                )
            if before is not None:
                found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                outlines = {name: (one.get_dtype(), tuple(one.get_shape())) for name, one in found.items()}
                before({name: fact for name, fact in facts.items() if name != "digest"}, outlines)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, RuntimeError) as problem:  # of torch: no room for a file of terabytes
        raise error(f"{path}: not a readable safetensors file ({problem})") from None
    digest, made = facts.pop("digest", None), _digest(tensors, facts)
    return TensorFile(os.fspath(path), tensors, facts, digest == made, made)


def _digest(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted(facts.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.flatten().contiguous().view(dtype=torch.uint8).numpy().data)
    return digest.hexdigest()
