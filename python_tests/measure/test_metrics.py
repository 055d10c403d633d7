from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from support.bigram import Bigram
from support.tiny import TEXTS, tiny_model, tiny_tokenizer

from d4s.edits import Edit, Question
from d4s.edits.formats import load_edits
from d4s.errors import ConfigError, DataError
from d4s.measure.metrics import Baseline, evaluate, take_baseline
from d4s.sequence.record import read_evaluation

FIXTURES = sorted((Path(__file__).parents[1] / "support" / "fixtures").glob("*.json"))


def edit(prompt: str, new: str, true: str | None = None, **fields) -> Edit:
    """An edit whose prompt ends in `prompt`: all that a bigram model sees of it."""
    return Edit(f"{{}} {prompt}", fields.pop("subject", "x"), new, true, **fields)


def test_success_compares_mean_token_nll_of_new_and_true() -> None:
    # Sums would say the opposite: ½ · ½ = ¼ < 0.4.
    model = Bigram({"a": {"b": 0.5, "t": 0.4}, "b": {"c": 0.5}})
    ev = evaluate(model, model.tokenizer, [edit("a", "b c", "t")])
    assert ev["efficacy"] == 1
    (row,) = ev.rows
    assert row["nll_new"] == pytest.approx(math.log(2), abs=1e-6)
    assert row["nll_true"] == pytest.approx(-math.log(0.4), abs=1e-6)
    assert ev["target_probability"] == pytest.approx(0.5, abs=1e-6)


def test_argmax_is_reported_apart_from_the_comparison() -> None:
    # The new answer is likelier than the true one, but a third is likelier than both.
    model = Bigram({"a": {"b": 0.3, "t": 0.1, "z": 0.6}})
    ev = evaluate(model, model.tokenizer, [edit("a", "b", "t")])
    assert (ev["efficacy"], ev["efficacy_argmax"]) == (1, 0)


def test_paraphrases_are_averaged_per_edit_first() -> None:
    model = Bigram({"a": {"b": 0.6, "t": 0.1}, "z": {"b": 0.1, "t": 0.6}})
    edits = [
        edit("a", "b", "t", id="1", paraphrases=("y a",)),
        edit("a", "b", "t", id="2", paraphrases=("y z", "x z", "z z")),
    ]
    ev = evaluate(model, model.tokenizer, edits)
    assert ev["paraphrase"] == 0.5  # over prompts it would be a quarter
    assert [len(row["paraphrase_nll_new"]) for row in ev.rows] == [1, 3]


def test_specificity_of_neighbours_and_the_three_together() -> None:
    model = Bigram({"a": {"b": 0.6, "t": 0.1}, "n": {"t": 0.5, "b": 0.2}, "m": {"t": 0.2, "b": 0.5}})
    one = edit("a", "b", "t", paraphrases=("y a", "y m"), neighborhood=("y n", "y m", "z m", "w m"))
    ev = evaluate(model, model.tokenizer, [one])
    assert (ev["efficacy"], ev["paraphrase"], ev["specificity"]) == (1, 1, 0.25)
    assert ev["average"] == pytest.approx(0.75)
    assert ev["harmonic"] == pytest.approx(3 / (1 + 1 + 4))
    assert "specificity_argmax" not in ev  # nothing to compare with
    assert ev.rows[0]["neighborhood_nll_true"] == pytest.approx([-math.log(p) for p in (0.5, 0.2, 0.2, 0.2)])


def test_a_neighbours_argmax_is_compared_with_the_unedited_models() -> None:
    model = Bigram({"a": {"b": 0.1, "t": 0.6}, "n": {"t": 0.6}, "m": {"t": 0.3, "z": 0.6}})
    edits = [edit("a", "b", "t", neighborhood=("y n", "y m"))]
    baseline = take_baseline(model, model.tokenizer, edits)
    assert evaluate(model, model.tokenizer, edits, baseline=baseline)["specificity_argmax"] == 1
    model.set("m", "b", 0.9)
    ev = evaluate(model, model.tokenizer, edits, baseline=baseline)
    assert (ev["specificity_argmax"], ev["specificity"]) == (0.5, 0.5)
    model.set("n", "z", 0.9)  # still t before b, but another answer
    ev = evaluate(model, model.tokenizer, edits, baseline=baseline)
    assert (ev["specificity_argmax"], ev["specificity"]) == (0, 0.5)


def test_questions_count_tokens_and_compare_with_the_unedited_model() -> None:
    model = Bigram({"a": {"z": 0.6}, "b": {"c": 0.6}, "u": {"v": 0.6}, "v": {"w": 0.6}})
    edits = [
        edit(
            "a", "b c", kind="question", paraphrases=("y a",), locality=(Question("y u", ("v z",), "other"),)
        )
    ]
    baseline = take_baseline(model, model.tokenizer, edits)
    ev = evaluate(model, model.tokenizer, edits, baseline=baseline)
    assert ev["efficacy"] == 0.5  # the second token is right behind the forced first one
    assert (ev["efficacy_argmax"], ev["specificity"], ev["specificity_gold"]) == (0, 1, 0.5)
    model.set("a", "b", 0.9)
    model.set("v", "z", 0.9)
    ev = evaluate(model, model.tokenizer, edits, baseline=baseline)
    assert (ev["efficacy"], ev["efficacy_argmax"], ev["paraphrase"]) == (1, 1, 1)
    assert (ev["specificity"], ev["specificity_gold"]) == (0.5, 1)  # right by the data, but not as before
    assert ev["locality.other"] == 0.5


def test_without_a_baseline_specificity_is_absent_and_the_reason_given() -> None:
    model = Bigram({"a": {"b": 0.6}})
    one = edit("a", "b", kind="question", paraphrases=("y a",), locality=(Question("y a", ("b",)),))
    ev = evaluate(model, model.tokenizer, [one])
    assert "specificity" not in ev and "average" not in ev and ev["specificity_gold"] == 1
    assert "pass baseline=take_baseline(…) (--baseline FILE)" in ev.summary()
    with pytest.raises(ConfigError, match="baseline=take_baseline"):
        ev["specificity"]


def test_free_generation_fails_where_teacher_forcing_helps() -> None:
    model = Bigram({"a": {"z": 0.6}, "b": {"c": 0.6}, "z": {"<end>": 0.9}, "c": {"<end>": 0.9}})
    edits = [edit("a", "b c", kind="question", paraphrases=("y b",))]
    ev = evaluate(model, model.tokenizer, edits, generate=True)
    assert (ev["efficacy"], ev["efficacy_generated"]) == (0.5, 0)
    model.set("a", "b", 0.9)
    ev = evaluate(model, model.tokenizer, edits, generate=True)
    assert (ev["efficacy"], ev["efficacy_generated"]) == (1, 1)
    assert ev["paraphrase_generated"] == 0  # it says "c", and the target is "b c"
    assert "efficacy_generated" not in evaluate(model, model.tokenizer, edits)


def sentences() -> tuple[Bigram, list[Edit]]:
    """A model that says "b. c. z z z …" behind a, and edits of every kind."""
    model = Bigram(
        {
            **{"a": {"b": 0.6, "t": 0.1}, "b": {".": 0.9}, "c": {"!": 0.9}, "!": {".": 0.9}},
            **{".": {"c": 0.6, "z": 0.3}, "z": {"z": 0.9}, "s": {"True": 0.9}, "True": {"<end>": 0.9}},
        }
    )
    return model, [
        edit("a", "b", "t", id="completion", paraphrases=("y a", "y z"), neighborhood=("n a",)),
        edit("a", "B", "t", id="case", paraphrases=("y a",)),
        edit("a", "b", id="open"),
        edit("a", "b . c", id="question", kind="question"),
        edit("s", "True", id="statement", kind="statement"),
        edit("a", "z", "t", id="other"),
    ]


def test_exact_generation_is_scored_for_every_kind_of_edit() -> None:
    model, edits = sentences()
    ev = evaluate(model, model.tokenizer, edits, generate=True)
    rows = {row["id"]: row for row in ev.rows}
    exact = {name: (row["efficacy_exact"], row["efficacy_exact_strict"]) for name, row in rows.items()}
    both, loosely, none = (1, 1), (1, 0), (0, 0)
    # What is before the second full stop is "b . c !", which is not "b . c" to the letter.
    assert exact == {
        **{"completion": both, "case": loosely, "open": both},
        **{"question": loosely, "statement": both, "other": none},
    }
    assert rows["completion"]["paraphrase_exact"] == rows["completion"]["paraphrase_exact_strict"] == 0.5
    assert "paraphrase_exact" not in rows["question"] and ev["efficacy_exact"] == pytest.approx(5 / 6)
    # Its answer is two sentences long, and the completions of the same prompt do not cut the text short.
    assert rows["question"]["efficacy_generated"] == rows["open"]["efficacy_generated"] == 1
    assert "efficacy_generated" not in rows["completion"]
    assert ev.metrics["paraphrase_exact"].count == 2


def test_a_target_that_is_nearly_spelled_is_told_with_what_was_written() -> None:
    model = Bigram(
        {
            **{"a": {"Rmoe": 0.6}, "Rmoe": {".": 0.9}, "c": {"Rome": 0.6}, "Rome": {".": 0.9}},
            **{"d": {"Iraq": 0.6}, "Iraq": {".": 0.9}, "e": {"of": 0.6}, "of": {"Rmoe": 0.9}},
        }
    )
    edits = [
        edit("a", "Rome", "Oslo", id="garbled"),
        edit("c", "Rome", "Oslo", id="right"),
        edit("d", "Iran", "Iraq", id="as before"),
        edit("d", "Iran", "Oslo", id="another"),  # nothing says that Iraq is right in itself
        edit("e", "Rome", "Oslo", id="behind a word"),
        edit("a", "Oslo", "Rome", id="far off"),
        edit("a", "Rmo", "Oslo", id="too short"),
    ]
    ev = evaluate(model, model.tokenizer, edits, generate=True)
    found = {row["id"]: (row.get("target_misspelt"), row.get("misspelt_as")) for row in ev.rows}
    assert found == {
        "garbled": (1, "rmoe"),
        "right": (0, None),
        "as before": (0, None),
        "another": (1, "iraq"),
        "behind a word": (1, "rmoe"),
        "far off": (0, None),
        "too short": (None, None),
    }
    assert ev["target_misspelt"] == 0.5 and ev.metrics["target_misspelt"].count == 6
    assert read_evaluation(json.loads(json.dumps(ev.to_dict())), "here").rows == ev.rows
    assert not [n for row in evaluate(model, model.tokenizer, edits).rows for n in row if "misspelt" in n]


def test_free_generation_leaves_all_other_figures_as_they_were() -> None:
    model, edits = sentences()
    plain = evaluate(model, model.tokenizer, edits).rows
    freely = evaluate(model, model.tokenizer, edits, generate=True, batch_tokens=1).rows
    added = {name for row in freely for name in row} - {name for row in plain for name in row}
    assert added == {
        "efficacy_generated",
        "target_misspelt",  # of the one target that is long enough, "True"
        *(f"{name}_exact{more}" for name in ("efficacy", "paraphrase") for more in ("", "_strict")),
    }
    assert [{k: v for k, v in row.items() if k not in added} for row in freely] == plain


@pytest.mark.parametrize("place", [p for p in FIXTURES if p.name != "probe.json"], ids=lambda p: p.stem)
def test_edits_of_every_format_have_the_exact_figures(place: Path, seed: int) -> None:
    model, tokenizer = tiny_model("llama", seed=seed, max_position_embeddings=4096), tiny_tokenizer()
    edits = load_edits(place)[:2]
    ev = evaluate(model, tokenizer, edits, generate=True, neighborhood_limit=0, portability=False)
    for row, one in zip(ev.rows, edits, strict=True):
        for name, prompts in (("efficacy", (one.text,)), ("paraphrase", one.paraphrases)):
            there = {n for n in row if n.startswith(f"{name}_exact")}
            assert there == ({f"{name}_exact", f"{name}_exact_strict"} if prompts else set())
            assert all(row[f"{name}_exact_strict"] <= row[f"{name}_exact"] for _ in there)
    assert ("paraphrase_exact" in ev) == any(one.paraphrases for one in edits)


def test_consequences_take_the_first_accepted_answer_and_any_of_the_multi_hop_questions() -> None:
    model = Bigram({"a": {"b": 0.6}, "b": {"<end>": 0.9}, "c": {"d": 0.6}, "d": {"z": 0.6}})
    edits = [
        edit(
            "a",
            "b",
            "t",
            portability=(
                Question("y c", ("t", "d z"), "multi_hop"),
                Question("y d", ("t",), "multi_hop"),
                Question("y c", ("d t",), "single_hop"),
            ),
        )
    ]
    ev = evaluate(model, model.tokenizer, edits, generate=True)
    assert ev["portability"] == pytest.approx((0 + 0 + 0.5) / 3)  # tokens of further names would add up
    assert (ev["portability.multi_hop"], ev["portability.single_hop"]) == (0, 0.5)
    assert ev["multi_hop"] == 1  # by one name of one of the two
    assert ev["multi_hop_generated"] == 0  # it goes on after "d z"
    model.set("z", "<end>", 0.9)
    assert evaluate(model, model.tokenizer, edits, generate=True)["multi_hop_generated"] == 1
    assert "portability" not in evaluate(model, model.tokenizer, edits, portability=False)


def test_statements_are_judged_by_the_nll_of_true_and_false() -> None:
    likely, unlikely = {"True": 0.5, "False": 0.2}, {"True": 0.1, "False": 0.3}
    model = Bigram({"a.": likely, "p.": unlikely, "u.": likely, "v.": unlikely, "w.": likely})
    edits = [
        edit(
            "a.",
            "False",
            kind="statement",
            paraphrases=("y p.", "y a."),
            locality=(Question("y u.", (), "unaffected"), Question("y v.", (), "unaffected")),
            portability=(Question("y w.", ("False",), "affected"), Question("y p.", ("False",), "affected")),
        )
    ]
    baseline = take_baseline(model, model.tokenizer, edits)
    model.set("u.", "False", 0.9)
    ev = evaluate(model, model.tokenizer, edits, baseline=baseline)
    assert (ev["efficacy"], ev["paraphrase"], ev["specificity"]) == (0, 0.5, 0.5)
    assert (ev["portability"], ev["locality.unaffected"]) == (0.5, 0.5)
    model.set("a.", "False", 0.9)
    assert evaluate(model, model.tokenizer, edits, baseline=baseline)["efficacy"] == 1
    with pytest.raises(ConfigError, match="'True' or 'False'"):
        evaluate(model, model.tokenizer, [edit("a.", "b", kind="statement")])


def test_mixed_kinds_are_each_counted_where_they_have_a_figure() -> None:
    model = Bigram({"a": {"b": 0.6, "t": 0.1}})
    edits = [
        edit("a", "b", "t", id="completion", neighborhood=("y a",)),
        edit("a", "t", id="no true answer"),
        edit("a", "t", kind="question", id="question", paraphrases=("y a",)),
        edit("a", "True", kind="statement", id="statement"),
    ]
    ev = evaluate(model, model.tokenizer, edits)
    assert {n: ev.metrics[n].count for n in ("efficacy", "paraphrase", "specificity")} == {
        "efficacy": 4,
        "paraphrase": 1,
        "specificity": 1,
    }
    assert [row["kind"] for row in ev.rows] == ["completion", "question", "question", "statement"]
    assert list(ev.to_frame()["id"]) == [e.id for e in edits]
    (note,) = (note for note in ev.notes if note.startswith("efficacy and paraphrase are means over two"))
    assert ": 2 edits without an old answer, or questions, count right tokens, 2 whether" in note
    for alike in (edits[:1], edits[1:3]):
        assert not any("two measures" in note for note in evaluate(model, model.tokenizer, alike).notes)


def many_edits(count: int, seed: int) -> list[Edit]:
    """Facts of every kind with prompts of many lengths, in the words of the tiny tokenizer."""
    draw = random.Random(seed)
    words = TEXTS[0].split() + TEXTS[3].split()

    def text() -> str:
        return " ".join(draw.choices(words, k=draw.randint(2, 9)))

    edits = []
    for i in range(count):
        new, true = draw.sample(["Paris", "Lyon in France", "Steve Jobs", "English", "the piano"], 2)
        questions = tuple(Question(text(), (new, text()), "multi_hop") for _ in range(draw.randint(0, 2)))
        edits.append(
            Edit(
                f"{{}} {text()}",
                "Danielle Darrieux",
                new,
                true if i % 3 else None,
                id=str(i),
                paraphrases=tuple(text() for _ in range(draw.randint(0, 3))),
                neighborhood=tuple(text() for _ in range(draw.randint(0, 5))),
                locality=tuple(Question(text(), (true,), "other") for _ in range(2)),
                portability=questions,
                generation=(text(), text()),
                reference_texts=(text(),),
                kind=("completion", "question")[i % 2],
            )
        )
    return edits


def test_figures_depend_neither_on_order_nor_on_the_other_edits(seed: int) -> None:
    model, tokenizer = tiny_model("llama", seed=seed), tiny_tokenizer()
    edits = many_edits(8, seed)
    baseline = take_baseline(tiny_model("llama", seed=seed + 1), tokenizer, edits)
    options = dict(baseline=baseline, generate=True, neighborhood_limit=2, seed=seed)
    together = evaluate(model, tokenizer, edits, **options)
    shuffled = random.Random(seed).sample(edits, len(edits))
    again = evaluate(model, tokenizer, shuffled, batch_tokens=200, **options)
    assert list(again.metrics) == list(together.metrics)
    for name, metric in together.metrics.items():
        assert again.metrics[name].count == metric.count
        for bound in ("mean", "low", "high"):
            assert getattr(again.metrics[name], bound) == pytest.approx(getattr(metric, bound), abs=1e-5)
    rows = {row["id"]: row for row in together.rows}
    for one in edits[:3]:
        (alone,) = evaluate(model, tokenizer, [one], **options).rows
        assert alone.keys() == rows[one.id].keys()
        for name, value in alone.items():
            expected = value if isinstance(value, str) else pytest.approx(value, abs=1e-5)
            assert rows[one.id][name] == expected


def test_the_sample_of_neighbours_is_fixed_by_seed_and_edit() -> None:
    # A tokenizer that knows the neighbours shows which ones the model was asked.
    model = Bigram({"a": {"b": 0.6, "t": 0.1}, **{f"y{i}": {} for i in range(20)}})
    one = edit("a", "b", "t", neighborhood=tuple(f"y{i} a" for i in range(20)))
    drawn: list[list[int]] = []
    model.register_forward_pre_hook(
        lambda _m, _a, kwargs: drawn.append(sorted(kwargs["input_ids"].flatten().tolist())), with_kwargs=True
    )
    for seed in (1, 1, 2):
        ev = evaluate(model, model.tokenizer, [one], neighborhood_limit=3, seed=seed)
        assert len(ev.rows[0]["neighborhood_nll_true"]) == 3
    assert drawn[0] == drawn[1] != drawn[2]
    assert "specificity" not in evaluate(model, model.tokenizer, [one], neighborhood_limit=0)


def test_copies_of_a_fact_are_one_sample() -> None:
    model = Bigram({"a": {"b": 0.6}})
    several = [edit("a", "b", id=f"{i}") for i in range(30)] + [edit("a", "t", id="other")]
    metric = evaluate(model, model.tokenizer, several).metrics["efficacy_argmax"]
    assert metric.count == 31 and (metric.low, metric.high) == (0, 1)  # two facts, one of them right


def test_a_model_that_says_nothing_judges_no_statement(seed: int) -> None:
    model, tokenizer = tiny_model("llama", seed), tiny_tokenizer()
    statements = tuple(Question(f"Lyon is a city {i}.", (word,)) for i, word in enumerate(("True", "False")))
    edits = [edit("Lyon.", "False", kind="statement", locality=statements, portability=statements)]
    before = take_baseline(model, tokenizer, edits)
    assert evaluate(model, tokenizer, edits, baseline=before)["specificity"] == 1
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(float("nan"))
    broken = evaluate(model, tokenizer, edits, baseline=before)
    assert broken["specificity"] == broken["portability"] == broken["efficacy"] == 0


def test_a_baseline_survives_its_file(tmp_path, seed: int) -> None:
    model, tokenizer = tiny_model("llama", seed=seed), tiny_tokenizer()
    edits = many_edits(24, seed)  # so many that some have neighbours
    baseline = take_baseline(model, tokenizer, edits)
    baseline.save(tmp_path / "deep" / "baseline.json")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["baseline.json"]
    loaded = Baseline.load(tmp_path / "deep" / "baseline.json")
    assert loaded == baseline
    ev = evaluate(model, tokenizer, edits, baseline=loaded)
    assert ev["specificity_argmax"] == 1 and ev["locality"] == 1

    (tmp_path / "other.json").write_text('{"format": "something else"}')
    with pytest.raises(DataError, match=r"other\.json.*d4s-baseline-1"):
        Baseline.load(tmp_path / "other.json")


def test_a_baseline_of_other_edits_or_another_tokenizer_is_refused() -> None:
    model = Bigram({"a": {"b": 0.6}})
    known = edit("a", "b", kind="question", locality=(Question("y a", ("b b",)),))
    unknown = edit("a", "b", kind="question", locality=(Question("z a", ("b",)),))
    baseline = take_baseline(model, model.tokenizer, [known])
    with pytest.raises(ConfigError, match="no answer to 'z a'"):
        evaluate(model, model.tokenizer, [unknown], baseline=baseline)
    other = Bigram({"b": {"a": 0.6}})
    with pytest.raises(ConfigError, match="another tokenizer"):
        evaluate(other, other.tokenizer, [known], baseline=baseline)


def test_a_model_that_has_collapsed_to_nan_fails_everywhere_and_still_makes_json() -> None:
    model = Bigram({"a": {"b": 0.6}})
    with torch.no_grad():
        model.table.fill_(math.nan)
    ev = evaluate(model, model.tokenizer, [edit("a", "b", "t", paraphrases=("y a",), neighborhood=("y a",))])
    assert [ev[n] for n in ("efficacy", "paraphrase", "specificity", "harmonic")] == [0, 0, 0, 0]
    assert ev["target_probability"] == 0
    record = json.loads(json.dumps(ev.to_dict(), allow_nan=False))
    assert record["rows"][0]["nll_new"] is None and record["metrics"]["efficacy"]["mean"] == 0


def test_fluency_and_consistency_of_what_is_written(seed: int) -> None:
    model, tokenizer = tiny_model("llama", seed=seed), tiny_tokenizer()
    model.config.max_position_embeddings = 256  # a prompt and 100 tokens more
    edits = many_edits(2, seed)
    ev = evaluate(model, tokenizer, edits, fluency=True, seed=seed)
    assert ev["fluency"] > 3 and 0 <= ev["consistency"] <= 1
    assert ev["fluency"] == evaluate(model, tokenizer, edits, fluency=True, seed=seed)["fluency"]
    stuck = Bigram({"a": {"b": 0.999}, "b": {"b": 0.999}})
    ev = evaluate(stuck, stuck.tokenizer, [edit("a", "b", "t", generation=("y a",))], fluency=True)
    assert ev["fluency"] == 0


def test_the_summary_names_each_figure_with_its_unit_and_count() -> None:
    model = Bigram({"a": {"b": 0.6, "t": 0.1}})
    lines = evaluate(model, model.tokenizer, [edit("a", "b", "t"), edit("a", "t", "b")]).summary().split("\n")
    (line,) = [line for line in lines if line.startswith("efficacy ")]
    assert line.split()[1:7] == ["50.00", "0.00", "–", "100.00", "2", "%"]
