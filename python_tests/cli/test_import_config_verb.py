"""`d4s import-config`: presets out of other programs' hyperparameter files, which an edit takes."""

from __future__ import annotations

import json
from pathlib import Path

from support.command import done, failed

import d4s

SETTINGS = {
    "layers": [0, 1],
    "v_num_grad_steps": 3,
    "v_lr": 0.5,
    "mom2_update_weight": 0.01,
    "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj",
    "nullspace_threshold": 0.5,
    "stats_dir": "./data/stats",
}


def theirs(folder: Path, name: str, record: dict = SETTINGS) -> str:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(record))
    return str(folder / name)


def test_a_file_becomes_a_preset_that_an_edit_takes(tmp_path, capsys):
    path, out = theirs(tmp_path, "MEMIT/small.json"), tmp_path / "p.json"
    told = done(capsys, "import-config", path, "--out", str(out))
    assert f"{path} → {out}" in told and f"--preset {out}" in told
    for line in (
        "v_num_grad_steps: 3",
        "steps=3",
        "prior_weight=0.01",
        "nullspace_threshold: 0.5",
        "stats_dir: ./data",
    ):
        assert line in told, line
    assert told.index("fields of memit") < told.index("without a counterpart") < told.index("nothing to set")
    run = tmp_path / "run"
    given = ("--covariance", "c.safetensors", "--set", "contexts=0", "ridge=0.1")
    done(capsys, "edit", "m", "edits.json", "--preset", str(out), "--out", str(run), *given)
    stored = json.loads((run / "result.json").read_text())
    assert stored["method"] == "memit" and stored["config"]["layers"] == [0, 1]
    assert stored["config"]["target"]["steps"] == 3 and stored["config"]["prior_weight"] == 0.01
    wrong = theirs(
        tmp_path, "MEMIT/llama.json", SETTINGS | {"rewrite_module_tmp": "model.layers.{}.mlp.down_proj"}
    )
    done(capsys, "import-config", wrong, "--out", str(tmp_path / "llama-p.json"))
    options = ("--preset", str(tmp_path / "llama-p.json"), "--out", str(tmp_path / "other"), *given)
    assert "is for models whose W is" in failed(capsys, "edit", "m", "edits.json", *options)


def test_several_files_become_presets_in_a_folder(tmp_path, capsys):
    paths = [theirs(tmp_path, "MEMIT/small.json"), theirs(tmp_path, "AlphaEdit/small.json")]
    told = json.loads(done(capsys, "import-config", *paths, "--out", str(tmp_path / "presets"), "--json"))
    assert [one["method"] for one in told] == ["memit", "alphaedit"]
    assert {path.name for path in (tmp_path / "presets").iterdir()} == {
        "memit-small.json",
        "alphaedit-small.json",
    }
    for one in told:
        assert d4s.load_preset(one["preset"]).fields == one["fields"]
        assert {row["name"] for row in one["rows"]} == SETTINGS.keys()


def test_nothing_is_written_where_one_file_or_the_place_is_wrong(tmp_path, capsys):
    good, bad = theirs(tmp_path, "MEMIT/small.json"), theirs(tmp_path, "WISE/small.json")
    out = tmp_path / "presets"
    assert "no method of d4s" in failed(capsys, "import-config", good, bad, "--out", str(out))
    assert not out.exists()
    assert "name a folder" in failed(capsys, "import-config", good, good, "--out", str(tmp_path / "p.json"))
    assert "two of the files would be" in failed(capsys, "import-config", good, good, "--out", str(out))
    assert "is the file that is read" in failed(capsys, "import-config", good, "--out", good)
    assert "Did you mean 'memit'" in failed(
        capsys, "import-config", good, "--method", "memti", "--out", str(out)
    )
    assert json.loads(Path(good).read_text()) == SETTINGS
