"""Key statistics that ROME, MEMIT, AlphaEdit and EasyEdit have left as .npz files, one a layer."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy
import torch
from torch import Tensor

from d4s.errors import CovarianceError
from d4s.files import check_regular
from d4s.locate.covariance import Covariance, fingerprint_of
from d4s.models.architectures import Anatomy

# "model.layers.4.mlp.down_proj_float32_mom2_100000.npz": the number of the layer is that between two points.
_LAYER = re.compile(r"\.(\d+)\.")
_UNEVEN = 1e-3  # of the largest entry: by how much a sum of products on a GPU may differ from its transpose


def covariance_from_npz(
    files: Sequence[str | os.PathLike[str]] | Mapping[int, str | os.PathLike[str]], *, model: Any = None
) -> Covariance:
    """The statistics in these files, which `layer_stats` of the originals has written, as one `Covariance`.

    files: one a layer; a layer's number is read from the file's name, or is the key of a mapping
    model: of which they are; None: that is not checked, neither here nor when they are used

    C of a layer is the same to rounding: the sum of k kᵀ in the file over its number of keys. Nothing is unpickled.
    Raises CovarianceError for a file that is not of this kind, two files of a layer, or those of another model's size.
    """
    by_layer = dict(files) if isinstance(files, Mapping) else _by_layer(files)
    if not by_layer:
        raise CovarianceError("no file of key statistics was named; name one for each layer")
    read = {layer: _read(Path(path)) for layer, path in sorted(by_layer.items())}
    # A file has a number of keys of its own; one stands for all here, so that the means are as they were.
    count = max(number for _, number in read.values())
    moments = {layer: moment * (count / number) for layer, (moment, number) in read.items()}
    names = ", ".join(Path(path).name for _, path in sorted(by_layer.items()))
    fingerprint = "" if model is None else fingerprint_of(model, exact=False)
    found = Covariance(moments, count, fingerprint=fingerprint, corpus=f"npz: {names}")
    if model is not None:
        anatomy = Anatomy(model)
        anatomy.check_layers(found.layers)
        found.check(anatomy, found.layers)
    return found


def _by_layer(files: Sequence[str | os.PathLike[str]]) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for path in map(Path, files):
        numbers = _LAYER.findall(path.name)
        if not numbers:
            raise CovarianceError(
                f"{path}: its name does not say its layer, as model.layers.4.mlp.down_proj_float32_mom2_100000.npz "
                "does; rename it, or in Python give {4: path}"
            )
        layer = int(numbers[0])
        if layer in found:
            raise CovarianceError(f"{path}: is of layer {layer}, as {found[layer]} is; name one file a layer")
        found[layer] = path
    return found


def _read(path: Path) -> tuple[Tensor, int]:
    """(Σ k kᵀ [d_in, d_in], symmetric, float32 | float64; number of keys) of a file."""
    try:
        check_regular(path, "key statistics")
        with numpy.load(path, allow_pickle=False) as stored:
            moment, number = stored["mom2.mom2"], int(stored["mom2.count"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, EOFError, BadZipFile) as error:
        raise CovarianceError(
            f"{path}: not what layer_stats of ROME, MEMIT or AlphaEdit writes, with mom2.mom2 and mom2.count "
            f"({error}); get the file again, or estimate anew"
        ) from None
    if moment.ndim != 2 or moment.shape[0] != moment.shape[1] or moment.dtype not in ("f2", "f4", "f8"):
        raise CovarianceError(
            f"{path}: mom2.mom2 is {list(moment.shape)} {moment.dtype}, must be square [d_in, d_in] numbers"
        )
    if number < 1:
        raise CovarianceError(f"{path}: is of {number} keys, so it holds no statistics; estimate them")
    found = torch.from_numpy(moment)
    found = found.float() if found.dtype == torch.float16 else found
    if not torch.isfinite(found).all():
        raise CovarianceError(f"{path}: holds NaN or infinity; estimate the statistics again")
    largest = float(found.abs().max()) if found.numel() else 0.0
    if found.numel() and float((found - found.T).abs().max()) > _UNEVEN * largest:
        raise CovarianceError(
            f"{path}: mom2.mom2 is not symmetric, so it is no sum of k kᵀ; get the file again"
        )
    return (found + found.T) / 2, number
