"""What editing changed in a model, as one small file: the model can be made again from it, should saving it fail."""

from __future__ import annotations

import json
import os
from typing import Any

import torch

from d4s.errors import D4SError, DataError, ModelError
from d4s.locate.covariance import fingerprint_of
from d4s.methods import Workbench
from d4s.methods.grace import GRACE, GRACEEditor
from d4s.models.causal_lm import CausalLM, parameters_by_name
from d4s.sequence.result import Result
from d4s.tensor_files import load_tensors, save_tensors

FORMAT = "d4s-weights-1"


def save_changes(result: Result, fingerprint: str, path: str | os.PathLike[str]) -> None:
    """The weights that differ from the unedited model's, or the codebook, as safetensors.

    fingerprint: of the unedited model (`fingerprint_of`), which the file then belongs to
    """
    editor = result.editor
    if isinstance(editor, GRACEEditor):
        tensors, grace = editor.state_dict(), result.config
    else:
        weights = editor.weights
        tensors = {
            weights.anatomy.weight_name(i): weights.anatomy.weight(i).detach() for i in weights.changed()
        }
        grace = None
    save_tensors(path, tensors, {"format": FORMAT, "unedited": fingerprint, "grace": json.dumps(grace)})


def load_changes_(model: CausalLM, tokenizer: Any, path: str | os.PathLike[str]) -> None:
    """Makes the unedited model, in place, what it was when `save_changes` wrote the file.

    Raises ModelError if the model is not the one that was edited, DataError if the file is not such a file; the
    model is then left as it was.
    """
    file = load_tensors(path, FORMAT, "d4s edit", DataError)
    file.check_intact(DataError)
    try:
        grace, unedited, tensors = json.loads(file.facts["grace"]), file.facts["unedited"], file.tensors
    except (KeyError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not the changes that d4s edit kept ({error}); make the edits again"
        ) from None
    if unedited != (mine := fingerprint_of(model)):
        raise ModelError(
            f"{path} belongs to another model (weights {unedited[:12]}, this one {mine[:12]}); name the one that was "
            "edited, in the same --dtype"
        )
    if grace is not None:
        try:
            grace["layers"] = tuple(grace["layers"])
            editor = GRACE(**grace).editor(Workbench(model, tokenizer))
            editor.load_state_dict(tensors)
        except (KeyError, TypeError, D4SError) as error:
            raise DataError(f"{path}: holds no codebook of GRACE ({error}); make the edits again") from None
        return
    own = parameters_by_name(model)
    for name, tensor in tensors.items():
        if name not in own or own[name].shape != tensor.shape or own[name].dtype != tensor.dtype:
            raise DataError(f"{path}: {name} is no weight of this model; name the one that was edited")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def bytes_of(model: CausalLM) -> int:
    """What the model takes on disk: its parameters and buffers, each once."""
    tensors = {
        id(t) if t.is_meta else t.data_ptr(): t for t in (*model.parameters(), *model.buffers())
    }  # on meta nothing has a place
    return sum(t.numel() * t.element_size() for t in tensors.values())
