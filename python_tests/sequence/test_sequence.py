"""Edits one after another: what is measured and when, what is refused, and what a failure leaves behind."""

from __future__ import annotations

import json
import math

import pandas
import pytest
import torch
from support.sequences import EDITS, FAST, STRONG, ready, same, sequence, state, without_times
from support.tiny import tiny_model, tiny_tokenizer
from tokenizers import normalizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

import d4s
from d4s.change.weights import EditedWeights
from d4s.edits import Edit
from d4s.errors import (
    ConfigError,
    CovarianceError,
    D4SError,
    DataError,
    EditError,
    EditingFailed,
    EditingInterrupted,
    ModelError,
    TokenizerError,
)
from d4s.locate.covariance import Covariance
from d4s.measure.metrics import evaluate, take_baseline
from d4s.methods import METHODS, Preset, Workbench, locate_then_edit, method_for
from d4s.methods.preset import model_facts
from d4s.models.architectures import Anatomy
from d4s.sequence.record import Record


def test_a_preset_stands_beside_the_method_and_fields_go_before_it(tmp_path, seed):
    model, covariance = ready(seed)
    given = dict(covariance=covariance, progress=False)
    result = d4s.edit_sequence(
        model, tiny_tokenizer(), EDITS[:1], preset="long", config=FAST | {"contexts": 0}, **given
    )
    assert (result.config["context_keys"], result.config["residual"]) == ("each", "measured")
    assert result.config["contexts"] == 0
    result.restore()
    facts = model_facts(Anatomy(model))
    Preset(method="memit", fields=FAST, model=facts).save(tmp_path / "p.json")
    named = d4s.edit_sequence(
        model, tiny_tokenizer(), EDITS[:1], method="memit", preset=tmp_path / "p.json", **given
    )
    assert named.method == "memit" and list(named.config["layers"]) == FAST["layers"]
    named.restore()
    whole = method_for("d4s", Anatomy(model))
    for wrong, words in (
        (dict(preset="logn"), "Did you mean 'long'"),
        (dict(preset="long", method="d4s:hold"), "names one of its own"),
        (dict(preset="long", config=whole), "is a whole configuration already"),
        (dict(preset="long", method=whole), "is a whole configuration already"),
        (dict(preset=tmp_path / "p.json"), "is of memit, and d4s was asked for"),
    ):
        with pytest.raises(ConfigError, match=words):
            d4s.edit_sequence(model, tiny_tokenizer(), EDITS[:1], **wrong, **given)


@pytest.mark.parametrize(
    ("batch_size", "evaluate_every", "points"),
    [
        (1, 3, [3, 6, 7]),
        (1, 7, [7]),
        (2, None, [7]),
        (3, 2, [3, 6, 7]),
        (3, 4, [6, 7]),
        (10, 3, [7]),
        (2, {1, 5, 6}, [2, 6, 7]),
        (1, (), [7]),
    ],
)
def test_each_point_scores_all_edits_made_so_far(batch_size, evaluate_every, points, seed):
    """`measure` is called while the model holds the edits: there the figures are taken again."""
    model, covariance = ready(seed)
    baseline = take_baseline(model, tiny_tokenizer(), EDITS)
    left = [0, *points]
    again = []

    def measure():
        made = left[len(again)]
        again.append(evaluate(model, tiny_tokenizer(), EDITS[:made] or EDITS, baseline=baseline))
        return {"extra": float(made)}

    result = sequence(
        model, covariance, batch_size=batch_size, evaluate_every=evaluate_every, measure=measure
    )
    assert [row["step"] for row in result.history] == [row["extra"] for row in result.history] == left
    for row, evaluation, expected in zip(result.history, result.evaluations, again, strict=True):
        made = row["step"] or len(EDITS)
        assert [r["id"] for r in evaluation.rows] == [e.id for e in EDITS[:made]]
        assert evaluation.rows == expected.rows
        for name in ("efficacy", "paraphrase", "specificity", "average", "specificity_argmax"):
            assert row[name] == expected[name]
            assert row[f"{name}.low"] == expected.metrics[name].low <= row[name] <= row[f"{name}.high"]
    steps = [min(7, batch_size * (1 + i // batch_size)) for i in range(7)]
    assert [(row["id"], row["step"]) for row in result.edits_table] == [
        (e.id, s) for e, s in zip(EDITS, steps, strict=True)
    ]
    assert result.model is model and result.failure is None


def test_the_edits_are_made_and_nothing_else_is_changed(device, seed):
    # Wide enough for its random keys to differ: in 48 dimensions seven edits can do each other more harm than good.
    model, covariance = ready(seed, device=device, n_inner=512)
    before = state(model)
    result = sequence(model, covariance, config=FAST | {"layers": [1], "steps": 10, "prior_weight": 0.1})
    after = state(model)
    assert [n for n in before if not torch.equal(before[n], after[n])] == [Anatomy(model).weight_name(1)]
    last, first = result.evaluations[-1], result.evaluations[0]
    assert sum(r["nll_new"] for r in last.rows) < sum(r["nll_new"] for r in first.rows)
    for row in result.edits_table:
        assert 0 < row["first_probability"] < row["last_probability"] <= 1
    result.restore()
    assert same(before, state(model))
    assert evaluate(model, tiny_tokenizer(), EDITS).rows[0]["nll_new"] == first.rows[0]["nll_new"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_the_history_are_those_of_the_weights(dtype, seed):
    model, covariance = ready(seed, dtype=dtype)
    anatomy = Anatomy(model)
    weights = []

    def measure():
        weights.append({i: anatomy.weight(i).detach().double().clone() for i in (0, 1)})
        return {}

    result = sequence(model, covariance, evaluate_every=3, measure=measure)
    base = weights[0]
    for row, now in zip(result.history, weights, strict=True):
        growth = 0.0
        for i in (0, 1):
            assert row[f"l1_norm.{i}"] == pytest.approx(float(now[i].abs().mean()), rel=2**-23)
            assert row[f"delta_norm.{i}"] == pytest.approx(float((now[i] - base[i]).norm()), rel=1e-10)
            growth += float(now[i].abs().mean() / base[i].abs().mean() - 1) / 2
        assert row["l1_growth"] == pytest.approx(growth, rel=1e-6, abs=1e-12)
    assert result.history[-1]["delta_norm.1"] > 0 == result.history[0]["l1_growth"]
    seconds = [(row["edit_seconds"], row["seconds"]) for row in result.history]
    assert seconds == sorted(seconds) and all(0 <= e <= s for e, s in seconds) and seconds[-1][0] > 0


def test_a_sample_of_neighbours_is_scored_between_the_first_and_the_last_point(seed):
    model, covariance = ready(seed)
    result = sequence(model, covariance, evaluate_every=2, neighborhood_limit=1)
    counts = [{len(r["neighborhood_nll_true"]) for r in e.rows} for e in result.evaluations]
    assert counts == [{3}, {1}, {1}, {1}, {3}]


def test_the_table_the_frame_and_the_file_hold_the_history(tmp_path, seed):
    model, covariance = ready(seed)
    result = sequence(model, covariance, evaluate_every=3)
    frame = result.to_frame()
    assert isinstance(frame, pandas.DataFrame) and list(frame["step"]) == [0, 3, 6, 7]
    assert list(frame["average"]) == [row["average"] for row in result.history]

    lines = result.summary().splitlines()
    assert lines[0].split()[:6] == ["edits", "efficacy", "paraphrase", "specificity", "average", "harmonic"]
    for line, row in zip(lines[1 : 1 + len(result.history)], result.history, strict=True):
        cells = line.split()
        assert int(cells[0]) == row["step"] and float(cells[4]) == pytest.approx(row["average"], abs=5e-4)
        assert float(cells[6]) == pytest.approx(100 * row["l1_growth"], abs=5e-3)

    path = tmp_path / "deep" / "result.json"
    result.save(path)
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]
    stored = json.loads(path.read_text())
    assert stored["format"] == "d4s-result-1" and stored["method"] == "d4s" and stored["edits"] == 7
    assert stored["history"] == result.history and stored["edits_table"] == result.edits_table
    assert stored["config"]["prior_weight"] == 1e-2 and stored["config"]["target"]["steps"] == 4
    loaded = Record.load(path)
    assert loaded.summary() == result.summary() == result.record().summary()
    pandas.testing.assert_frame_equal(loaded.to_frame(), frame)
    pandas.testing.assert_frame_equal(loaded.forgetting(), result.forgetting())


def test_a_summary_shows_what_was_measured_besides(seed):
    model, covariance = ready(seed)
    shares = iter((0.25, 0.125))
    result = sequence(model, covariance, EDITS[:2], measure=lambda: {"arc_challenge acc_norm": next(shares)})
    assert result.measured == ["arc_challenge acc_norm"]
    head, *lines = result.summary().splitlines()
    end = head.index("arc_challenge acc_norm") + len("arc_challenge acc_norm")
    assert [line[:end].split()[-1] for line in lines[:2]] == ["0.250", "0.125"]


def test_a_file_of_a_collapsed_model_is_json_and_can_be_read_again(tmp_path, seed):
    """KN optimises no target, and figures of a broken model are not finite."""
    model, covariance = ready(seed)
    result = sequence(model, covariance, EDITS[:2], method="kn", config=None)
    result.history[-1]["l1_growth"] = result.history[-1]["average"] = float("inf")
    result.save(tmp_path / "r.json")

    def refuse(constant):
        pytest.fail(f"{constant} is not JSON")

    stored = json.loads((tmp_path / "r.json").read_text(), parse_constant=refuse)
    assert stored["edits_table"][0]["first_probability"] is None
    loaded = Record.load(tmp_path / "r.json")
    assert loaded.summary().splitlines()[1] == result.summary().splitlines()[1]
    assert "nan" in loaded.summary().splitlines()[-1]


def test_a_result_that_save_did_not_write_is_refused(tmp_path):
    for content in (
        "",
        "[]",
        "{}",
        '{"format": "d4s-result-9"}',
        '{"format": "d4s-result-1", "method": "d4s"}',
    ):
        (tmp_path / "r.json").write_text(content)
        with pytest.raises(DataError, match=r"r\.json: not what Result\.save wrote"):
            Record.load(tmp_path / "r.json")


def test_the_same_seed_gives_the_same_result(seed):
    runs = []
    for run_seed in (5, 5, 6):
        model, covariance = ready(seed)
        torch.manual_seed(torch.seed() % 2**31)  # what the caller's generator holds must not matter
        result = sequence(model, covariance, EDITS[:3], config=STRONG, evaluate_every=2, seed=run_seed)
        runs.append((state(model), without_times(result.history), result.edits_table))
    assert same(runs[0][0], runs[1][0]) and runs[0][1:] == runs[1][1:]
    assert not same(runs[0][0], runs[2][0]), "other contexts"


def test_the_callers_random_state_is_left_alone(seed):
    model, covariance = ready(seed)
    before = torch.get_rng_state()
    sequence(model, covariance, EDITS[:2], config=STRONG)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("ahead", [1, 3, 64])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_looking_ahead_changes_nothing(ahead, batch_size, monkeypatch, seed):
    model, covariance = ready(seed)
    plain = tiny_model("gpt2", seed)
    monkeypatch.setattr(locate_then_edit, "EDITS_AHEAD", ahead)
    sequence(model, covariance, config=STRONG | {"anchor": "base"}, batch_size=batch_size, seed=1)
    bench = Workbench(plain, tiny_tokenizer(), covariance=covariance, seed=1)
    editor = method_for("d4s", bench.anatomy, STRONG).editor(bench)
    for i in range(0, len(EDITS), batch_size):
        editor.edit(EDITS[i : i + batch_size])  # none announced: each target on its own
    for layer in (0, 1):
        change = editor.weights.delta(layer)
        found = Anatomy(model).weight(layer).detach().double().T - editor.weights.base[layer].double().T
        # Rows padded otherwise round otherwise, and Adam's first steps divide by gradients near 0.
        assert change.norm() > 0 and (found - change).norm() <= 5e-3 * change.norm()


@pytest.mark.parametrize("training", [True, False])
def test_the_training_flag_is_put_back_also_after_an_error(training, monkeypatch, seed):
    model, covariance = ready(seed)
    model.train(training)
    sequence(model, covariance, EDITS[:1]).restore()
    assert model.training == training
    monkeypatch.setattr(EditedWeights, "write_", lambda *_: 1 / 0)
    with pytest.raises(EditingFailed, match="division by zero"):
        sequence(model, covariance, EDITS[:1])
    assert model.training == training


class Spoiled:
    """`EditedWeights.write_` that fails at its n-th call, after the weight itself has been touched.

    whole: the edited weights after each earlier call
    """

    def __init__(self, monkeypatch, call, error):
        plain, self.whole = EditedWeights.write_, []

        def write_(weights, layer, delta):
            plain(weights, layer, delta)
            if len(self.whole) == call - 1:
                raise error
            self.whole.append(weights.current())

        monkeypatch.setattr(EditedWeights, "write_", write_)


@pytest.mark.parametrize("method", ["d4s", "memit", "alphaedit"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ModelError("no room")])
@pytest.mark.parametrize("call", [5, 6])  # two layers a step: the third edit's first and second write
def test_a_failure_within_a_step_leaves_the_weights_of_the_step_before(
    method, error, call, monkeypatch, seed
):
    config = {k: v for k, v in FAST.items() if method != "alphaedit" or k not in ("prior_weight", "ridge")}
    model, covariance = ready(seed)
    before = state(model)
    spoiled = Spoiled(monkeypatch, call, error)
    with pytest.raises(EditingInterrupted) as raised:
        sequence(model, covariance, method=method, config=config)
    assert raised.value.__cause__ is error
    anatomy, two_steps = Anatomy(model), spoiled.whole[3]
    for layer, weight in two_steps.items():
        name = anatomy.weight_name(layer)
        assert torch.equal(model.state_dict()[name], weight) and not torch.equal(before.pop(name), weight)
    assert same(before, state(model))


def test_what_is_raised_carries_the_result_so_far(monkeypatch, seed):
    model, covariance = ready(seed)
    before = state(model)
    Spoiled(monkeypatch, 9, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt) as caught:
        sequence(model, covariance, evaluate_every=3)
    result = caught.value.result
    assert result.failure == "after edit 4: KeyboardInterrupt" and len(result.edits_table) == 4
    assert [row["step"] for row in result.history] == [0, 3] and not same(before, state(model))
    monkeypatch.undo()
    result.restore()
    assert same(before, state(model))


def test_a_failure_may_end_the_sequence_with_its_result(monkeypatch, seed):
    model, covariance = ready(seed)
    Spoiled(monkeypatch, 9, ModelError("no room"))
    result = sequence(model, covariance, evaluate_every=3, stop_at_failure=True)
    assert result.failure == "edit 5: no room" and [row["step"] for row in result.history] == [0, 3, 4]
    assert [r["id"] for r in result.evaluations[-1].rows] == [e.id for e in EDITS[:4]]
    assert len(result.edits_table) == 4
    row = result.history[-1]
    for i in (0, 1):
        assert row[f"l1_norm.{i}"] == pytest.approx(
            float(Anatomy(model).weight(i).detach().double().abs().mean()), rel=1e-9
        )


def test_the_unedited_level_is_of_the_same_neighbours(seed):
    """A method that changes nothing stays at the unedited level, however few neighbours are scored."""
    model, covariance = ready(seed)
    still = FAST | dict(steps=1, learning_rate=1e-30)
    result = sequence(model, covariance, config=still, evaluate_every=1, neighborhood_limit=1)
    fewer = evaluate(model, tiny_tokenizer(), EDITS[:5], baseline=result.baseline, neighborhood_limit=1)
    assert result.history[5]["specificity.unedited"] == pytest.approx(fewer["specificity"])
    for row in result.history[1:]:
        assert row["specificity.unedited"] == pytest.approx(row["specificity"])
    whole = [row["specificity"] for row in result.evaluations[0].rows]
    assert result.history[-1]["specificity.unedited"] == pytest.approx(sum(whole) / len(whole))


def test_without_neighbours_on_the_way_there_is_no_level_of_theirs(seed):
    model, covariance = ready(seed)
    result = sequence(model, covariance, evaluate_every=3, neighborhood_limit=0)
    assert "specificity.unedited" not in result.history[1] and "efficacy.unedited" in result.history[1]
    assert "specificity.unedited" in result.history[-1]


def test_statistics_may_come_from_a_file_or_are_taken_and_cached(tmp_path, monkeypatch, seed):
    model, covariance = ready(seed)
    covariance.save(tmp_path / "c.safetensors")
    sequence(model, covariance, EDITS[:2])
    other = tiny_model("gpt2", seed)
    sequence(other, tmp_path / "c.safetensors", EDITS[:2])
    assert same(state(model), state(other))
    monkeypatch.setenv("D4S_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        result = sequence(tiny_model("gpt2", seed), None, EDITS[:1])
        assert result.history[-1]["delta_norm.0"] > 0
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_fact_may_be_changed_again_later_but_not_in_the_same_batch(seed):
    model, covariance = ready(seed)
    before = state(model)
    first = EDITS[0]
    later = Edit(
        prompt=first.prompt, subject=first.subject, target_new="Apple", target_true="Manila", id="later"
    )
    with pytest.raises(EditError, match="'e0' and 'later' contradict each other in one batch"):
        sequence(model, covariance, [first, later], batch_size=2)
    assert same(before, state(model))
    assert len(sequence(model, covariance, [first, later]).edits_table) == 2


@pytest.mark.parametrize("resumed", [False, True])
def test_a_fact_changed_again_is_as_if_it_had_been_changed_only_once(resumed, seed):
    """anchor="base", one layer: the first change leaves nothing behind, also when a stored state goes on."""
    (first, *others), later = (
        EDITS[:4],
        Edit("{} worked for", "Steve Jobs", "Apple", kind="question", id="later"),
    )
    first = Edit("{} worked for", "Steve Jobs", "English", kind="question", id="first")
    model, covariance = ready(seed)
    config = FAST | {"layers": [1]}
    wanted = sequence(model, covariance, [*others, later], config=config).editor.state_dict()
    editors = []
    for _ in range(2):
        bench = Workbench(tiny_model("gpt2", seed), tiny_tokenizer(), covariance=covariance)
        editors.append(method_for("d4s", bench.anatomy, config).editor(bench))
    editor, again = editors
    for edit in (first, *others):
        editor.edit([edit])
    if resumed:
        again.load_state_dict(editor.state_dict())
        editor = again
    editor.edit([later])
    found = editor.state_dict()
    assert found.keys() == wanted.keys()
    scale = wanted["1.residual_sum"].norm()
    assert (found["1.residual_sum"] - wanted["1.residual_sum"]).norm() <= 1e-3 * scale  # targets to float32
    torch.testing.assert_close(found["1.key_sum"], wanted["1.key_sum"], rtol=1e-5, atol=1e-5)  # keys, too


@pytest.mark.parametrize("anchor", ["base", "current"])
def test_a_fact_changed_again_takes_its_new_answer(anchor, seed):
    """What the second change adds at the key is most of the way to its target, not half."""
    model, covariance = ready(seed)
    bench = Workbench(model, tiny_tokenizer(), covariance=covariance)
    config = FAST | {"layers": [1], "anchor": anchor, "prior_weight": 1e-4, "ridge": 1e-3}
    editor = method_for("d4s", bench.anatomy, config).editor(bench)
    first, later = (Edit("{} worked for", "Steve Jobs", t, kind="question") for t in ("English", "Apple"))
    editor.edit([first])
    rows = editor.rows([first])
    before = editor.state(rows)
    with editor.weights.at_base():
        base_target = editor.targets([later]).target
    target = base_target if anchor == "base" else editor.targets([later]).target
    way = target.double() - before
    editor.edit([later])
    share = float(((editor.state(rows) - before) * way).sum() / way.square().sum())
    assert 0.6 < share < 1.1


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (dict(method="d5s"), ConfigError, "unknown method 'd5s'. Did you mean 'd4s'"),
        (dict(method="MEMIT_seq"), ConfigError, "memit-seq"),
        (dict(config={"prior_wieght": 3}), ConfigError, "'prior_wieght'. Did you mean 'prior_weight'"),
        (
            dict(config={"layers": [0, 3]}),
            ConfigError,
            "layers=[0, 3]: must be distinct, ascending and within 0…2",
        ),
        (dict(config={"layers": [1, 0]}), ConfigError, "ascending"),
        (dict(config={"prior_weight": 0}), ConfigError, "prior_weight"),
        (dict(config={"anchor": "sea"}), ConfigError, "anchor is 'sea'"),
        (dict(config={"steps": 0}), ConfigError, "steps"),
        (dict(config=METHODS["memit"](layers=(1,))), ConfigError, "config is one of 'memit'"),
        (dict(batch_size=0), ConfigError, "batch_size=0"),
        (dict(batch_size=1.5), ConfigError, "batch_size=1.5"),
        (dict(evaluate_every=0), ConfigError, "evaluate_every=0"),
        (dict(evaluate_every=-2), ConfigError, "evaluate_every=-2"),
        (dict(evaluate_every={3, 0}), ConfigError, "evaluate_every=0"),
        (dict(edits=[]), ConfigError, "no edits"),
        (dict(edits=[*EDITS, EDITS[2]]), EditError, "edits number 3 and 8 both have the id 'e2'"),
        (dict(edits=[*EDITS[:2], "e"]), EditError, "edit number 3 is a str"),
        (dict(covariance="nowhere.safetensors"), CovarianceError, "nowhere.safetensors"),
        (
            dict(covariance=Covariance({0: torch.eye(8), 1: torch.eye(8)}, 9)),
            CovarianceError,
            "8 × 8, the model's",
        ),
        (dict(covariance=Covariance({1: torch.eye(48)}, 9)), CovarianceError, "no key statistics of layer 0"),
    ],
)
def test_what_is_not_right_is_refused_before_anything_is_changed(options, error, text, seed):
    model, covariance = ready(seed)
    before = state(model)
    with pytest.raises(error) as caught:
        sequence(model, **({"covariance": covariance} | options))
    assert text in str(caught.value) and isinstance(caught.value, D4SError)
    assert same(before, state(model)) and not model.training


def test_statistics_of_another_model_are_refused_before_anything_is_changed(seed):
    model, _ = ready(seed)
    before = state(model)
    with pytest.raises(CovarianceError, match="another model"):
        sequence(model, ready(seed + 1)[1])
    assert same(before, state(model))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name",
    ["transformer.wte.weight", "transformer.h.1.mlp.c_proj.weight", "transformer.h.2.attn.c_attn.bias"],
)
def test_a_model_with_damaged_weights_is_refused_wherever_they_are(name, value, seed):
    model, covariance = ready(seed)
    model.get_parameter(name).data.view(-1)[3] = value
    before = state(model)
    with pytest.raises(ModelError, match=rf"{name} holds .*NaN or infinite"):
        sequence(model, Covariance(covariance.moments, covariance.count))
    assert all(torch.equal(before[n].nan_to_num(), t.nan_to_num()) for n, t in state(model).items())


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (dict(target_new=""), "'target_new' is empty"),
        (dict(target_new="  "), "'target_new' is empty"),
        (dict(prompt="The mother tongue is"), "'prompt' has no '{}'"),
        (dict(subject=""), "'subject' is empty"),
        (dict(target_true="English"), "must differ"),
    ],
)
def test_an_edit_that_cannot_be_made_is_refused_when_it_is_written_down(fields, text):
    with pytest.raises(EditError) as caught:
        Edit(**{"prompt": "The mother tongue of {} is", "subject": "Edwin", "target_new": "English"} | fields)
    assert text in str(caught.value)


@pytest.mark.parametrize("method", ["d4s", "memit", "rome"])
def test_a_tokenizer_without_offsets_is_refused_before_anything_is_changed(method, seed):
    model = tiny_model("gpt2", seed, vocab_size=400)
    before = state(model)
    covariance = Covariance({i: torch.eye(48) for i in range(3)}, 1)
    with pytest.raises(TokenizerError, match="ByT5Tokenizer gives no character offsets"):
        sequence(model, covariance, tokenizer=ByT5Tokenizer(), method=method, config={"layers": [1]})
    assert same(before, state(model))


def test_a_later_edit_that_the_tokenizer_cannot_place_is_refused_before_the_first_is_made(seed):
    model, covariance = ready(seed)
    before = state(model)
    dropping = PreTrainedTokenizerFast(
        tokenizer_object=type(tiny_tokenizer().backend_tokenizer).from_str(
            tiny_tokenizer().backend_tokenizer.to_str()
        ),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
    )
    dropping.backend_tokenizer.normalizer = normalizers.Replace("oo!", "")
    late = Edit(prompt="{} is", subject="Yahoo!", target_new="Apple", target_true="Lyon")
    with pytest.raises(TokenizerError, match="covers the end of the subject 'Yahoo!'"):
        sequence(model, covariance, [EDITS[0], EDITS[1], late], tokenizer=dropping)
    assert same(before, state(model))


def test_the_public_name_takes_what_the_interface_says(seed):
    model, covariance = ready(seed, "llama")
    result = d4s.edit_sequence(
        model,
        tiny_tokenizer(),
        list(EDITS[:3]),
        method=METHODS["memit"](layers=(1,), contexts=0),
        config={"steps": 2, "prior_weight": 1.0},
        covariance=covariance,
        batch_size=2,
        seed=0,
        progress=False,
    )
    assert (
        result.method == "memit"
        and result.config["prior_weight"] == 1.0
        and result.config["target"]["steps"] == 2
    )
    assert [row["step"] for row in result.history] == [0, 3] and "l1_norm.1" in result.history[-1]
    assert isinstance(result, d4s.Result)


def test_the_probability_written_is_that_of_the_target_right_after_the_step(seed):
    model, covariance = ready(seed)
    written = [row["written_probability"] for row in sequence(model, covariance).edits_table]
    other, _ = ready(seed)
    editor = method_for("d4s", Anatomy(other), FAST).editor(
        Workbench(other, tiny_tokenizer(), covariance=covariance)
    )
    editor.announce(EDITS)
    for edit, found in zip(EDITS, written, strict=True):
        editor.edit([edit])
        assert found == pytest.approx(
            evaluate(other, tiny_tokenizer(), [edit])["target_probability"], rel=1e-4
        )


def test_an_edit_whose_target_does_not_arrive_is_named():
    found = [
        ("lost", 0.9, 0.44),
        ("kept", 0.9, 0.46),
        ("never found", 0.49, 0.01),
        ("not searched", math.nan, 0.0),
    ]
    table = [
        {
            "id": name,
            "step": i,
            "first_probability": 0.0,
            "last_probability": last,
            "written_probability": now,
        }
        for i, (name, last, now) in enumerate(found, 1)
    ]
    assert Record("d4s", edits_table=table).not_arrived() == ["lost"]
    told = Record("d4s", config={"target": {"steps": 25}}, edits_table=table)
    assert told.not_found() == ["never found"] and Record("d4s", edits_table=table[3:]).not_found() == []
    *_, unfound, lost = told.summary().splitlines()
    assert unfound == (
        "1 of 4 edits: no target that makes the answer likelier than ½ was found within 25 looks; a longer search, as "
        "steps=50, may: never found"
    )
    assert lost.startswith("1 of 4 edits: the target was found, but") and lost.endswith(": lost")
    never = [table[0] | {"last_probability": 0.0}]
    assert Record("d4s", edits_table=never).not_found() == ["lost"]
    for config in ({}, {"target": None}, {"target": {"steps": "25"}}):  # a file that somebody has written to
        assert "½ was found: lost" in Record("d4s", config=config, edits_table=never).summary()
    many = [table[0] | {"id": f"lost {i}"} for i in range(12)]
    assert "lost 9 …" in Record("d4s", edits_table=many).summary()


def test_looks_are_told_of_a_first_search_alone():
    """What a later pass has searched on has had more."""
    row = {"id": "a", "step": 1, "last_probability": 0.1, "written_probability": 0.1}
    again = row | {"id": "a~2", "again": "a"}
    for table, within in (([row], " within 25 looks; a longer search, as steps=50, may"), ([row, again], "")):
        told = Record("d4s", config={"target": {"steps": 25}}, edits_table=table)
        assert told.missing() == [
            f"1 of 1 edits: no target that makes the answer likelier than ½ was found{within}: a"
        ]


@pytest.mark.parametrize("method", ["d4s", "memit", "rome"])
def test_an_edit_too_long_for_its_contexts_is_named_before_the_first_is_made(method, tmp_path, seed):
    model, covariance = ready(seed)
    before = state(model)
    config = FAST
    if method == "rome":
        config = {name: value for name, value in FAST.items() if name != "prior_weight"} | {"layers": [1]}
    long = Edit("Paris " * 38 + "{} is", "Lyon", "Manila", id="long")
    alone = dict(method=method, config=config)
    sequence(model, covariance, [long], **alone).restore()  # by itself it fits
    behind = dict(method=method, config=config | {"contexts": 1}, journal=tmp_path / "journal")
    said = r"edit long: prompt and target behind the longest context are 1\d\d tokens"
    with pytest.raises(ModelError, match=said):
        sequence(model, covariance, [*EDITS, long], **behind)
    assert same(state(model), before) and not (tmp_path / "journal").exists()


def test_what_the_edits_decide_is_told_and_kept(tmp_path, seed):
    model, covariance = ready(seed)
    config = FAST | {"prior_weight": None}
    result = sequence(model, covariance, config=config)
    assert result.config["prior_weight"] is None and result.chosen["prior_weight"] > 0
    assert f"prior_weight={result.chosen['prior_weight']:g}" in result.summary()
    result.save(tmp_path / "r.json")
    assert Record.load(tmp_path / "r.json").chosen == result.chosen
    other, covariance = ready(seed)
    again = sequence(other, covariance, config=config | result.chosen)
    assert again.chosen == {}
    assert same(state(model), state(other))


def test_consolidating_is_one_batch_edit_from_the_original_weights(seed):
    model, covariance = ready(seed)
    result = sequence(model, covariance, EDITS[:4])
    assert d4s.consolidate(result) is None
    at_once, _ = ready(seed)
    sequence(at_once, covariance, EDITS[:4], batch_size=4)
    for layer in (0, 1):
        torch.testing.assert_close(
            Anatomy(model).weight(layer), Anatomy(at_once).weight(layer), rtol=1e-4, atol=1e-5
        )
    other = sequence(tiny_model("gpt2", seed), None, EDITS[:1], method="ft-m", config={"steps": 1})
    with pytest.raises(ConfigError, match="ft-m keeps nothing to consolidate"):
        other.consolidate()
