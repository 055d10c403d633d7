"""Hyperparameter files of other programs: each name becomes what it means here; wrong files are refused."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from support.sequences import EDITS, ready, same, sequence, state
from support.tiny import tiny_model

import d4s
from d4s.errors import ConfigError, D4SError, DataError
from d4s.locate.targets import TargetConfig
from d4s.methods import METHODS, method_for
from d4s.methods.imported import import_config, read_hyperparameters, summary
from d4s.models.architectures import Anatomy

# As their files are built, with values of no published one.
LOCATED = """
alg_name: "{}"
model_name: ./somewhere/llama
stats_dir: "./data/stats"
device: 3
layers: [0, 1]
clamp_norm_factor: 6
layer_selection: "all"
fact_token: "subject_last"
v_num_grad_steps: 4
v_lr: 6e-1
v_loss_layer: 2
v_weight_decay: 2e-3
kl_factor: 0.03
mom2_adjustment: true
mom2_update_weight: 40
rewrite_module_tmp: "model.layers.{{}}.mlp.down_proj"
layer_module_tmp: "model.layers.{{}}"
mlp_module_tmp: "model.layers.{{}}.mlp"
attn_module_tmp: "model.layers.{{}}.self_attn"
ln_f_module: "model.norm"
lm_head_module: "lm_head"
mom2_dataset: "wikipedia"
mom2_n_samples: 1000
mom2_dtype: "float32"
model_parallel: false
"""
SEARCH = dict(steps=4, learning_rate=0.6, weight_decay=2e-3, clamp=6.0, kl_factor=0.03)


def file(folder: Path, text: str | dict[str, Any], name: str = "some.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text), "utf-8")
    return path


def imported(folder: Path, algorithm: str, more: str = "", **options: Any) -> d4s.Preset:
    return import_config(file(folder, LOCATED.format(algorithm) + more), **options).preset


def test_memit_s_names_become_the_fields_that_they_mean(tmp_path):
    found = imported(tmp_path, "MEMIT")
    assert found.method == "memit"
    assert found.fields == {"layers": [0, 1], "prior_weight": 40.0, **SEARCH}
    assert found.model == {"projection": "model.layers.{}.mlp.down_proj"}


@pytest.mark.parametrize(
    ("algorithm", "more", "method", "own"),
    [
        ("PMET", "nll_loss_factor: 1\n", "pmet", {"prior_weight": 40.0}),
        (
            "EMMET",
            "emmet_lambda: 0.2\nupdate_norm_lambda: 0\n",
            "emmet",
            {"prior_weight": 40.0, "epsilon": 0.2},
        ),
        (
            "ENCORE",
            "update_norm_lambda: 15\nprob_cutoff: -4\n",
            "encore",
            {"prior_weight": 40.0, "norm_weight": 15.0, "stop_after_argmax": 3},
        ),
        (
            "AlphaEdit",
            "nullspace_threshold: 3e-2\nL2: 7\nP_loc: p.pt\n",
            "alphaedit",
            {"null_space_threshold": 0.03, "threshold_is_relative": False, "l2": 7.0},
        ),
        (
            "SPHERE",
            "nullspace_threshold: 3e-2\nL2: 7\nsuppression_strength: 0.4\ncumulative_ratio: 0.6\n",
            "sphere",
            {
                "null_space_threshold": 0.03,
                "threshold_is_relative": False,
                "l2": 7.0,
                "delta_projection": [0.4, 0.6],  # α, then β
            },
        ),
    ],
)
def test_methods_of_several_layers(tmp_path, algorithm, more, method, own):
    found = imported(tmp_path, algorithm, more)
    assert found.method == method and found.fields == {"layers": [0, 1], **SEARCH, **own}


def test_rome_takes_contexts_and_c(tmp_path):
    one = LOCATED.format("ROME").replace("layers: [0, 1]", "layers: [1]")
    more = "context_template_length_params: [[5, 10], [10, 10]]\n"
    found = import_config(file(tmp_path, one + more)).preset
    # Ten contexts of each length, two of them for each of the five words that they begin with.
    assert found.fields == {
        "layers": [1],
        "identity_covariance": False,
        "contexts": 2,
        "context_lengths": [5, 10],
        **SEARCH,
    }
    without = one.replace("mom2_adjustment: true", "mom2_adjustment: false").replace("ROME", "R-ROME")
    found = import_config(file(tmp_path, without)).preset
    assert (found.method, found.fields["identity_covariance"]) == ("r-rome", True)
    uneven = import_config(file(tmp_path, one + "context_template_length_params: [[5, 10], [10, 5]]\n"))
    (row,) = (row for row in uneven.rows if row.name.startswith("context"))
    assert row.kind == "none" and "contexts" not in uneven.preset.fields


@pytest.mark.parametrize(
    ("record", "method", "expected"),
    [
        (
            {"norm_constraint": 2e-4, "objective_optimization": "prompt_last"},
            "ft-l",
            {"layers": [3], "steps": 9, "learning_rate": 1e-3, "epsilon": 2e-4},
        ),
        (
            {"norm_constraint": False},
            "ft-l",
            {"layers": [3], "steps": 9, "learning_rate": 1e-3, "epsilon": 1e9},
        ),
        (
            {"norm_constraint": False, "objective_optimization": "target_new"},
            "ft-m",
            {"layers": [3], "steps": 9, "learning_rate": 1e-3},
        ),
    ],
)
def test_fine_tuning_is_ft_l_or_ft_m_by_its_objective(tmp_path, record, method, expected):
    shared = {
        "alg_name": "FT",
        "layers": [3],
        "num_steps": 9,
        "lr": 1e-3,
        "weight_decay": 0,
        "kl_factor": 0,
        "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj.weight",
    }
    found = import_config(file(tmp_path, shared | record, "ft.json")).preset
    assert (found.method, found.fields) == (method, expected)


def test_paths_of_weights_become_layers_and_modules(tmp_path):
    grace = "alg_name: GRACE\nedit_lr: 0.7\nn_iter: 12\neps: 2\ninner_params:\n- transformer.h[3].mlp.c_fc.weight\n"
    found = import_config(file(tmp_path, grace)).preset
    assert found.method == "grace" and found.fields == {
        "learning_rate": 0.7,
        "steps": 12,
        "epsilon": 2.0,
        "layers": [3],
        "module": "mlp_input",
    }
    ultra = (
        "alg_name: ULTRAEDIT\nlr: 2e-6\nbatch_size: 20\ninner_params:\n"
        "- model.layers.5.mlp.up_proj\n- model.layers.2.mlp.gate_proj\n"
    )
    found = import_config(file(tmp_path, ultra)).preset
    assert found.method == "ultraedit" and found.fields == {
        "learning_rate": 2e-6,
        "layers": [2, 5],
        "modules": ["mlp.gate_proj", "mlp.up_proj"],
    }
    for token, kind in (("ans", "as here"), ("mask", "none")):  # of an answer, or all of a text
        rows = import_config(file(tmp_path, f"{ultra}token: {token}\n")).rows
        assert {row.name: row.kind for row in rows}["token"] == kind


def test_neurons_take_their_shares_and_no_integral_of_one_step(tmp_path):
    text = "alg_name: KN\np: 0.4\nadaptive_threshold: 0.3\nsteps: {}\nbatch_size: 1\nlr_scale: 1.0\n"
    assert import_config(file(tmp_path, text.format(8))).preset.fields == {
        "share": 0.4,
        "threshold": 0.3,
        "steps": 8,
    }
    one = import_config(file(tmp_path, text.format(1)))
    assert "steps" not in one.preset.fields
    assert {row.name for row in one.rows if row.kind == "none"} == {"steps", "lr_scale"}
    for refine, also in (("true", {}), ("false", {"paraphrases": False})):  # false: the prompt alone
        more = f"{text.format(8)}refine: {refine}\n"
        found = import_config(file(tmp_path, more)).preset.fields
        assert found == {"share": 0.4, "threshold": 0.3, "steps": 8, **also}


def test_a_number_that_yaml_takes_for_text_is_a_number(tmp_path):
    values = read_hyperparameters(
        file(tmp_path, "a: 5e-1\nb: .5\nc: 1e-05\nd: [1, 2e0]\ne: e5\nf: '1.2.3'\n")
    )
    assert values == {"a": 0.5, "b": 0.5, "c": 1e-5, "d": [1, 2.0], "e": "e5", "f": "1.2.3"}


def test_the_method_is_that_of_the_file_its_folder_or_the_caller(tmp_path):
    bare = LOCATED.format("").replace('alg_name: ""\n', "")
    assert import_config(file(tmp_path, bare, "AlphaEdit/x.yaml")).preset.method == "alphaedit"
    taken = import_config(file(tmp_path, bare, "AlphaEdit/x.yaml"), "d4s").preset
    assert taken.method == "d4s" and taken.fields == {"layers": [0, 1], "prior_weight": 40.0, **SEARCH}
    with pytest.raises(ConfigError, match=r"no alg_name, and its folder is 'nowhere'.*--method NAME"):
        import_config(file(tmp_path, bare, "nowhere/x.yaml"))
    with pytest.raises(ConfigError, match="alg_name is 'WISE', which is no method of d4s"):
        imported(tmp_path, "WISE")
    with pytest.raises(ConfigError, match="Did you mean 'memit'"):
        imported(tmp_path, "MEMIT", method="memti")


def test_every_name_is_told_once_with_what_became_of_it(tmp_path):
    found = import_config(file(tmp_path, LOCATED.format("AlphaEdit") + "L2: 7\nmystery: 1\n"))
    told = "\n".join(summary(found))
    assert [row.name for row in found.rows] == list(read_hyperparameters(found.source))
    for row in found.rows:
        assert told.count(f"  {row.name}: ") == 1 and (row.why or row.kind == "set")
    kinds = {row.name: row.kind for row in found.rows}
    assert kinds["mystery"] == kinds["mom2_update_weight"] == "none"
    assert kinds["device"] == kinds["stats_dir"] == kinds["fact_token"] == "as here"
    assert kinds["L2"] == kinds["v_lr"] == "set"
    other = import_config(file(tmp_path, LOCATED.format("MEMIT").replace("subject_last", "last")))
    assert {row.name: row.kind for row in other.rows}["fact_token"] == "none"


def test_only_fields_of_the_method_are_set_and_all_can_be_applied(tmp_path):
    anatomy, applied = Anatomy(tiny_model("gpt2")), []
    for name, method in METHODS.items():
        own = {field.name for field in fields(method)}
        if "target" not in own or name in ("rome", "r-rome"):
            continue
        found = imported(tmp_path, "MEMIT", "L2: 3\nemmet_lambda: 0.5\n", method=name)
        assert found.fields.keys() <= own | {field.name for field in fields(TargetConfig)}
        assert found.applied(method.preset(anatomy)).value("layers") == tuple(found.fields["layers"])
        applied.append(name)
    assert {"d4s", "memit", "alphaedit", "pmet", "emmet"} <= set(applied)


def test_a_preset_edits_as_its_fields_do_and_only_where_w_is_the_same(tmp_path, seed):
    model, covariance = ready(seed, "llama")
    preset = imported(tmp_path, "MEMIT", method="d4s")
    preset.save(tmp_path / "p.json")
    loaded = d4s.load_preset(tmp_path / "p.json")
    assert loaded.fields == preset.fields and loaded.model == preset.model
    more = {"contexts": 0, "ridge": 0.1}
    with_it = sequence(model, covariance, EDITS[:2], config=loaded.changed(more))
    assert with_it.notes == ()
    edited = state(model)
    with_it.restore()
    plain = sequence(model, covariance, EDITS[:2], config={**loaded.fields, **more})
    assert same(edited, state(model))
    plain.restore()
    other, _ = ready(seed, "gpt2")
    with pytest.raises(
        ConfigError, match=r"is for models whose W is model\.layers\.\{\}\.mlp\.down_proj, and here it is"
    ):
        method_for("d4s", Anatomy(other), loaded)
    everywhere = import_config(file(tmp_path, {"layers": [0], "v_lr": 0.5}, "MEMIT/y.json")).preset
    everywhere.save(tmp_path / "q.json")
    assert d4s.load_preset(tmp_path / "q.json").model == {}
    assert method_for("memit", Anatomy(other), d4s.load_preset(tmp_path / "q.json")).layers == (0,)


@pytest.mark.parametrize(
    ("text", "name", "error", "said"),
    [
        ("layers: [1, 2\n", "MEMIT/a.yaml", DataError, "not plain YAML: .* at line 2, column 1"),
        (
            "a: !!python/object/apply:os.system ['true']\n",
            "MEMIT/a.yaml",
            DataError,
            "not plain YAML: could not determine",
        ),
        ("- 1\n- 2\n", "MEMIT/a.yaml", DataError, "must be names and values"),
        ("", "MEMIT/a.yaml", DataError, "holds None"),
        ("{", "MEMIT/a.json", DataError, "not valid JSON"),
        ("a: &b [1, *b]\n", "MEMIT/a.yaml", DataError, "a.yaml: has an alias"),
        ("a: " + "[" * 30 + "]" * 30 + "\n", "MEMIT/a.yaml", DataError, "a is nested too deeply"),
        ("{1: 2}", "MEMIT/a.yaml", DataError, "must be names and values"),
        ("x: 2001-02-31\n", "MEMIT/a.yaml", DataError, "not plain YAML: day is out of range"),
        ("a: " + "[" * 5000, "MEMIT/a.yaml", DataError, "lists and mappings 101 deep"),
        ("a:\n" + "".join(f"{' ' * n}a:\n" for n in range(1, 400)), "MEMIT/a.yaml", DataError, "101 deep"),
        ("text: nothing of it\n", "MEMIT/a.yaml", ConfigError, "nothing in it is a setting of memit"),
        ("v_lr: -1\n", "MEMIT/a.yaml", ConfigError, "learning_rate is -1.*must be positive"),
        ("layers: some\n", "MEMIT/a.yaml", ConfigError, "layers is"),
        ("layers: [1]\ninner_params: [x]\n", "GRACE/a.yaml", DataError, "must be paths of weights"),
        ("layers: [1]\ncontext_template_length_params: 5\n", "ROME/a.yaml", DataError, "must be pairs"),
        (
            "inner_params: [model.layers.3.mlp.up_proj, model.layers.3.mlp.gate_proj]\n",
            "UltraEdit/a.yaml",
            ConfigError,
            "two weights of layer 3",
        ),
        (
            "layers: [1]\nrewrite_module_tmp: 'transformer.h.{}.attn.c_attn'\n",
            "FT/a.yaml",
            ConfigError,
            "unknown MLP output in rewrite_module_tmp 'transformer.h.{}.attn.c_attn'",
        ),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, text, name, error, said):
    path = file(tmp_path, text, name)
    with pytest.raises(error, match=said) as raised:
        import_config(path)
    assert str(raised.value).startswith(str(path)) and "\n" not in str(raised.value)


def test_what_is_no_small_text_file_is_refused(tmp_path):
    (tmp_path / "big.yaml").write_text("a: 1\n" * 300_000)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9\n")
    for name in ("big.yaml", "latin.yaml", "none.yaml", "."):
        with pytest.raises(D4SError):
            import_config(tmp_path / name)
