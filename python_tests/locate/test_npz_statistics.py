"""Statistics of the originals' files: the same C, and a clear no to anything else."""

from __future__ import annotations

import json

import numpy
import pytest
import torch
from support.command import FAST, RECORDS, done, failed
from support.sequences import EDITS, ready, sequence
from support.tiny import TEXTS, tiny_model, tiny_tokenizer

from d4s.errors import CovarianceError
from d4s.locate.covariance import Covariance, estimate_covariance
from d4s.locate.npz_statistics import covariance_from_npz


def kept(folder, covariance, dtype=numpy.float32, more=1):
    """A file a layer, with the names and fields of `layer_stats`; more: times the keys, of layer 1"""
    paths = []
    for layer in covariance.layers:
        times = more if layer == 1 else 1
        paths.append(folder / f"transformer.h.{layer}.mlp.c_proj_float32_mom2_100000.npz")
        numpy.savez(
            paths[-1],
            **{
                "mom2.constructor": "util.runningstats.SecondMoment()",
                "mom2.count": covariance.count * times,
                "mom2.mom2": (covariance.moments[layer] * times).numpy().astype(dtype),
                "sample_size": 100000,
            },
        )
    return paths


@pytest.mark.parametrize("more", [1, 3])
def test_c_is_the_same_and_so_is_what_is_edited_with_it(more, seed, tmp_path):
    model, covariance = ready(seed)
    found = covariance_from_npz(kept(tmp_path, covariance, numpy.float64, more), model=model)
    assert found.layers == covariance.layers and found.fingerprint == covariance.fingerprint
    for layer in found.layers:
        torch.testing.assert_close(found.mean(layer), covariance.mean(layer), rtol=1e-12, atol=0)
    right = sequence(*ready(seed), edits=EDITS[:2]).editor.weights.current()
    for layer, weight in sequence(model, found, edits=EDITS[:2]).editor.weights.current().items():
        torch.testing.assert_close(weight, right[layer], rtol=1e-5, atol=1e-6)


def test_the_layer_may_be_named_and_what_a_gpu_leaves_uneven_is_evened(seed, tmp_path):
    _, covariance = ready(seed)
    path = kept(tmp_path, covariance)[1]
    with numpy.load(path) as stored:
        fields = dict(stored)
    largest = numpy.abs(fields["mom2.mom2"]).max()
    fields["mom2.mom2"][0, 1] += 1e-5 * largest
    numpy.savez(tmp_path / "renamed.npz", **fields)
    found = covariance_from_npz({5: tmp_path / "renamed.npz"})
    assert found.layers == (5,) and found.fingerprint == ""
    assert torch.equal(found.moments[5], found.moments[5].T)
    assert (found.mean(5) - covariance.mean(1)).norm() < 1e-4 * covariance.mean(1).norm()


class Bad:
    """A pickle of it runs code as it is read."""

    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mom2.mom2": None}, "with mom2.mom2 and mom2.count"),
        ({"mom2.count": None}, "with mom2.mom2 and mom2.count"),
        ({"mom2.mom2": numpy.array([Bad()], dtype=object)}, "with mom2.mom2 and mom2.count"),
        ({"mom2.count": numpy.array([1, 2])}, "with mom2.mom2 and mom2.count"),
        ({"mom2.count": 0}, "is of 0 keys"),
        ({"mom2.mom2": numpy.ones((3, 4))}, r"\[3, 4\] float64, must be square"),
        ({"mom2.mom2": numpy.ones((3, 3), dtype=numpy.int64)}, "must be square"),
        ({"mom2.mom2": numpy.array([[1.0, 0.5], [0.0, 1.0]])}, "not symmetric"),
        ({"mom2.mom2": numpy.full((2, 2), numpy.nan)}, "holds NaN"),
        ({"mom2.mom2": -numpy.eye(3)}, "negative"),
    ],
)
def test_what_is_none_is_refused(change, said, seed, tmp_path):
    _, covariance = ready(seed)
    path = kept(tmp_path, covariance)[0]
    with numpy.load(path) as stored:
        fields = {name: value for name, value in (dict(stored) | change).items() if value is not None}
    numpy.savez(path, **fields)
    with pytest.raises(CovarianceError, match=said):
        covariance_from_npz([path])


def test_files_that_do_not_go_together_are_refused(seed, tmp_path):
    _, covariance = ready(seed)
    paths = kept(tmp_path, covariance)
    with pytest.raises(CovarianceError, match="its name does not say its layer"):
        covariance_from_npz([paths[0].rename(tmp_path / "stats.npz")])
    (tmp_path / "again").mkdir()
    twice = kept(tmp_path / "again", covariance)
    with pytest.raises(CovarianceError, match=r"is of layer 1, as .* is; name one file a layer"):
        covariance_from_npz([paths[1], twice[1]])
    with pytest.raises(CovarianceError, match="no file"):
        covariance_from_npz([])
    (tmp_path / "a.0.npz").write_bytes(b"PK\x03\x04 cut off")
    (tmp_path / "a.1.npy.npz").write_bytes(paths[1].read_bytes()[:300])
    for broken in ("a.0.npz", "a.1.npy.npz", "a.2.gone.npz"):
        with pytest.raises(CovarianceError, match="not what layer_stats"):
            covariance_from_npz([tmp_path / broken])
    wide = tiny_model("gpt2", seed, n_inner=52)
    with pytest.raises(CovarianceError, match="belong to another model"):
        covariance_from_npz([twice[0]], model=wide)


def test_the_command_makes_a_file_that_edits_take(seed, tmp_path, capsys):
    model = tiny_model("gpt2", 1)
    model.save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "edits.json").write_text(json.dumps(RECORDS))
    covariance = estimate_covariance(model, tiny_tokenizer(), TEXTS * 3, progress=False)
    paths = [str(path) for path in kept(tmp_path, covariance)]
    out, m = str(tmp_path / "c.safetensors"), str(tmp_path / "m")
    text = done(capsys, "covariance", m, "--from-npz", *paths, "--out", out)
    assert f"layers {list(covariance.layers)}, {covariance.count} key vectors a layer" in text
    assert Covariance.load(out).fingerprint == covariance.fingerprint
    edits = str(tmp_path / "edits.json")
    done(capsys, "edit", m, edits, "--covariance", out, "--out", str(tmp_path / "run"), *FAST)
    without = done(capsys, "covariance", "--from-npz", paths[0], "--out", out)
    assert "layers [0]" in without and Covariance.load(out).fingerprint == ""
    assert "--tokens means nothing with --from-npz" in failed(
        capsys, "covariance", m, "--from-npz", *paths, "--out", out, "--tokens", "7"
    )
    assert "c.txt: is a text, and --from-npz takes none" in failed(
        capsys, "covariance", m, "c.txt", "--from-npz", *paths, "--out", out
    )
    assert "name one of --merge and --from-npz" in failed(
        capsys, "covariance", "--merge", out, out, "--from-npz", *paths, "--out", out
    )
