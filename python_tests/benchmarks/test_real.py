"""The scripts of the long runs, from start to end at a small size, with interruptions."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pandas
import pytest
import torch
from support.sequences import EDITS, FAST, failing, ready
from support.tiny import TEXTS, tiny_model, tiny_tokenizer

import d4s
from d4s.edits import Edit
from d4s.errors import ConfigError, EditingStopped
from d4s.locate.targets import TargetConfig
from d4s.measure.downstream import TaskMetric
from d4s.measure.metrics import evaluation_of
from d4s.methods import Editor, method_for
from d4s.methods.memit import MEMITEditor
from d4s.models.architectures import Anatomy
from d4s.sequence.record import Record

sys.path.append(str(Path(__file__).resolve().parents[2]))  # behind all else: d4s is the one that is tested
from benchmarks.real import claims, datasets, downstream, relations, search, setting, tables

try:
    import lm_eval
except ImportError:
    lm_eval = None

PEOPLE = ("Danielle Darrieux", "Steve Jobs", "Edwin", "Lyon Manila")
CITIES = ("Paris", "Lyon", "Bordeaux", "Manila")
ZSRE = [
    {
        "subject": name,
        "src": f"Where was {name} born?",
        "rephrase": f"What is the city of {name}?",
        "alt": CITIES[i],
        "answers": [CITIES[i - 1]],
        "loc": "who plays the piano",
        "loc_ans": "Edwin",
    }
    for i, name in enumerate(PEOPLE)
]


def case(number: int, name: str, city: str) -> dict:
    """Of two edits."""
    rewrites = [
        {
            "prompt": "{} was born in",
            "subject": name,
            "target_new": {"str": city},
            "target_true": {"str": "Apple"},
        },
        {"prompt": "{} is in", "subject": city, "target_new": {"str": "I"}, "target_true": {"str": "France"}},
    ]
    questions = [f"In which country was {name} born?"]
    return {"case_id": number, "requested_rewrite": rewrites, "questions": questions, "new_answer": "I"}


MQUAKE = [case(i, name, city) for i, (name, city) in enumerate(zip(PEOPLE, CITIES, strict=True))]
FACTS = [
    {
        "case_id": i,
        "requested_rewrite": {
            "prompt": "{} speaks",
            "subject": f"Apple {i}",
            "relation_id": "P1",
            "target_new": {"str": "Islam"},
            "target_true": {"str": ("French", "English")[i % 2]},
        },
        "paraphrase_prompts": [],
        "neighborhood_prompts": [],
    }
    for i in range(4)
]


@pytest.fixture
def world(tmp_path, monkeypatch, seed):
    """A folder with a model, data sets, texts and questions, and sequences that take no time."""
    monkeypatch.chdir(tmp_path)
    tiny_model("llama", seed, max_position_embeddings=1024).save_pretrained("model")
    tiny_tokenizer(start=False).save_pretrained("model")
    for name, records in (("zsre_mend", ZSRE), ("mquake", MQUAKE), ("counterfact", FACTS)):
        place = Path("edits") / f"{name}.json"
        place.parent.mkdir(exist_ok=True)
        place.write_text(json.dumps(records))
    Path("corpus.txt").write_text("\n".join(TEXTS * 20))
    Path("text.txt").write_text("A heading\n" + " ".join(TEXTS))
    monkeypatch.setitem(setting.SEQUENCES, "d4s", FAST)
    monkeypatch.setattr(datasets, "POINTS", (2,))
    monkeypatch.setattr(setting, "COLLAPSE", None)  # what a random model says is no measure
    return tmp_path


def test_data_sets_are_edited_through_interruptions(world, monkeypatch, capsys):
    asked = "model edits corpus.txt --text text.txt --out out --only zsre mquake --count 4 --generate 2 --methods d4s"
    edits, broken, edit, take = [], [], Editor.edit, setting.Generate.take

    def editing(self, batch):
        edits.extend(batch)
        if len(edits) == 7:  # the third of the second data set
            raise KeyboardInterrupt
        return edit(self, batch)

    def taking(self, model, tokenizer, asked, name):
        if self.folder.parent.name == "mquake" and name != "unedited" and not broken:
            broken.append(name)
            raise KeyboardInterrupt
        take(self, model, tokenizer, asked, name)

    monkeypatch.setattr(Editor, "edit", editing)
    monkeypatch.setattr(setting.Generate, "take", taking)
    with pytest.raises(EditingStopped):
        datasets.main(asked.split())
    assert len(edits) == 7 and list(Path("out/zsre/edited").iterdir())

    tables.main(["out/mquake/sequences", "--at", "4", "--out", "under-way"])
    told = Path("under-way/at-4.md").read_text()
    assert "| d4s, after 2 |" in told and "- d4s: after edit 2: KeyboardInterrupt" in told
    capsys.readouterr()
    with pytest.raises(KeyboardInterrupt):
        datasets.main(asked.split())
    assert len(edits) == 9 and not list(Path("out/mquake/generated").glob("d4s*"))
    datasets.main(asked.split())
    assert len(edits) == 9  # eight, and the one that was broken off
    said = capsys.readouterr().out
    assert "zsre, 4 edits" in said and "mquake, 4 edits" in said
    for name, figure in (("zsre", "efficacy_generated"), ("mquake", "multi_hop_generated")):
        out = Path("out") / name
        assert sorted(path.stem for path in (out / "generated").iterdir()) == [
            "d4s-base-measured",
            "unedited",
        ]
        for place in (out / "generated").iterdir():
            found = json.loads(place.read_text())
            assert figure in found["metrics"] and len(found["rows"]) == 2
        assert (out / "edited" / "d4s-base-measured.safetensors").exists()
        history = pandas.read_csv(out / "sequences" / "history.csv")
        assert list(history["step"]) == [0, 2, 4] and history["retained"].notna().all()
    model, tokenizer = d4s.load_model("model")
    d4s.sequence.saving.load_changes_(model, tokenizer, "out/zsre/edited/d4s-base-measured.safetensors")
    (record,) = [Record.load(path) for path in Path("out/zsre/sequences/results").iterdir()]
    made = [
        edit
        for edit in d4s.load_edits("edits/zsre_mend.json")
        if edit.id in {r["id"] for r in record.edits_table}
    ]
    assert d4s.evaluate(model, tokenizer, made)["efficacy"] == pytest.approx(record.history[-1]["efficacy"])

    tables.main(["out/zsre/sequences", "--out", "tables"])
    head, _, before, after = Path("tables/at-4.md").read_text().splitlines()[:4]
    cells = dict(zip(head.split(" | "), after.split(" | "), strict=True))
    row = record.history[-1]
    bounds = (100 * row[f"efficacy{bound}"] for bound in ("", ".low", ".high"))
    assert cells["efficacy"] == "{:.1f} [{:.1f}, {:.1f}]".format(*bounds)
    assert cells["mean \\|w\\|"] == f"{100 * row['l1_growth']:+.1f} %"
    assert before.startswith(f"| unedited | {100 * row['efficacy.unedited']:.1f} |")


def test_a_table_tells_how_far_each_is_from_one_of_them(tmp_path):
    def record(gain):
        edits = [d4s.Edit("{} is", f"s{i}", "x", id=f"e{i}") for i in range(6)]
        rows = [{"id": edit.id, "efficacy": (i % 3) / 4 + gain} for i, edit in enumerate(edits)]
        history = [
            {"step": step, "efficacy": 0.5, "l1_norm.1": 1.0, "l1_growth": 0.0, "edit_seconds": 1.0}
            for step in (0, 6)
        ]
        return Record(
            "d4s",
            history=history,
            evaluations=[evaluation_of([], [], 0), evaluation_of(rows, edits, 0)],
            edits_table=[{"id": edit.id, "step": i} for i, edit in enumerate(edits)],
        )

    for label, gain in (("d4s", 0.25), ("memit", 0.0), ("rome", 0.125)):
        record(gain).save(tmp_path / "sequences" / "results" / f"{label}-0.json")
    tables.main(
        [str(tmp_path / "sequences"), "--out", str(tmp_path / "tables"), "--against", "memit", "--at", "6"]
    )
    head, _, *rows = (tmp_path / "tables" / "differences.md").read_text().splitlines()
    assert head == "| less memit, edit by edit | efficacy |"
    assert rows == [
        "| d4s, after 6 | +25.0 [+25.0, +25.0] |",
        "| rome, after 6 | +12.5 [+12.5, +12.5] |",
    ]
    with pytest.raises(ConfigError, match="no sequence was scored after 5 edits or fewer"):
        tables.at(tables.sequences(tmp_path / "sequences"), 5)  # what is there is of the unedited model
    stored = pandas.read_csv(tmp_path / "tables" / "differences.csv")
    assert list(stored["against"]) == ["memit", "memit"]
    assert list(stored["efficacy"]) == pytest.approx([0.25, 0.125])


def test_claims_are_judged_by_what_is_there(monkeypatch, tmp_path, seed):
    model, covariance = ready(seed)
    monkeypatch.setattr(claims, "COLLAPSE", None)  # what a random model says is no measure
    with monkeypatch.context() as patch:
        failing(patch, MEMITEditor, 3)
        kept = d4s.compare(
            model,
            tiny_tokenizer(),
            EDITS,
            {"d4s": FAST, "weak": {"method": "d4s", **FAST, "clamp": 1e-3}, "memit": FAST, "memit-seq": FAST},
            covariance=covariance,
            evaluate_every=2,
            measure=lambda: {"retained": 0.5},
            out=tmp_path / "sequences",
            progress=False,
        )
    assert set(kept.collapsed) == {"memit"}
    claims.main([str(tmp_path / "sequences"), "--out", str(tmp_path / "claims")])
    said = (tmp_path / "claims" / "claims.md").read_text().splitlines()[2:]
    assert [line.split(" | ")[0].strip("| ").split(":")[0] for line in said] == [
        "Table 3", "Fig. 5", "Fig. 6", "Fig. 7", "Fig. 8",
    ]  # fmt: skip
    table = pandas.read_csv(tmp_path / "claims" / "table3" / "table3-table.csv")
    assert set(table["method"]) == {"d4s", "memit-seq"} and set(table["edits"]) == {2, 4, 6, 7}
    for name in ("fig5/fig5b", "fig6/fig6c", "fig7/fig7-memit-seq", "fig8/fig8"):
        assert (tmp_path / "claims" / f"{name}.png").exists() and (
            tmp_path / "claims" / f"{name}.csv"
        ).exists()
    lost = {
        label: record.history[-1]["original_efficacy"] - record.history[-1]["efficacy"]
        for label in ("d4s", "memit-seq")
        for record in kept.results[label].values()
    }
    assert ("**holds**" in said[3]) == (lost["d4s"] <= 0.05 and lost["memit-seq"] > lost["d4s"])

    claims.main(
        [
            str(tmp_path / "sequences"),
            "--out",
            str(tmp_path / "weak"),
            "--d4s",
            "weak",
            "--others",
            "memit-seq",
        ]
    )
    table = pandas.read_csv(tmp_path / "weak" / "fig6" / "fig6-table.csv").set_index(["method", "edits"])
    growth = kept.results["weak"][0].history[-1]["l1_growth"]
    assert table.loc[("d4s", 7), "l1_growth"] == pytest.approx(growth)
    # MEMIT's was stopped behind a point: up to it all of them can be judged, as they were there.
    early = claims.judged(tmp_path / "sequences", "d4s", ["memit", "memit-seq"], at=2)
    assert not early.collapsed and list(early.results) == ["d4s", "memit", "memit-seq"]
    for label, by_seed in early.results.items():
        (cut,) = by_seed.values()
        (whole,) = kept.results[label].values()
        assert [row["step"] for row in cut.history] == [0, 2] and len(cut.evaluations) == 2
        assert cut.history == whole.history[:2] and cut.edits_table == whole.edits_table[:2]
    assert "Table 3: methods on CounterFact" in claims.claims(early, tmp_path / "early")
    assert "Table 2: methods on zsRE" in claims.claims(early, tmp_path / "questions", "zsRE")
    assert (tmp_path / "questions" / "table2" / "table2-table.csv").exists()
    with pytest.raises(ConfigError, match="unknown sequence scored after 4 edits 'memit'"):
        claims.judged(tmp_path / "sequences", "d4s", ["memit"], at=4)
    with pytest.raises(ConfigError, match="unknown sequence that has ended 'rome'"):
        claims.main([str(tmp_path / "sequences"), "--out", str(tmp_path / "none"), "--others", "rome"])


def test_a_target_added_by_hand_does_in_its_own_prompt_what_its_search_found(seed):
    anatomy = Anatomy(tiny_model("llama", seed))
    own = [replace(edit, paraphrases=(edit.text, edit.text)) for edit in EDITS[:3]]
    others = [replace(EDITS[3], paraphrases=()), replace(EDITS[4], paraphrases=("The piano is in",))]
    edits, config = [*own, *others], TargetConfig(steps=6)
    found = search.measured(anatomy, tiny_tokenizer(), edits, (), 0, config)
    assert list(found["paraphrase_nll"][:3]) == pytest.approx(list(found["nll"][:3]), abs=1e-4)
    assert found["paraphrases_said"][3:].isna().all() and set(found["paraphrases_said"][:3]) <= {0.0, 1.0}
    shifted = [replace(edit, paraphrases=(f"I see that {edit.text}",)) for edit in own]
    moved = search.measured(anatomy, tiny_tokenizer(), shifted, (), 0, config)
    assert (moved["paraphrase_nll"] - found["nll"][:3]).abs().max() > 1e-3
    table = search.table_of(found.assign(setting=search.PUBLISHED))
    assert table["paraphrase_nll"].item() == pytest.approx(found["paraphrase_nll"].mean())


def test_other_relations_of_a_subject_are_asked(tmp_path, seed):
    kinds = {
        "P103": relations.PERSON,
        "P1303": relations.PERSON,
        "P131": relations.PLACE,
        "P176": relations.WORK,
    }
    for relation, kind in kinds.items():
        edit = Edit(prompt="{} is", subject="Lyon", target_new="Paris", relation=relation, id=relation)
        asked = relations.other_prompts(edit, seed)
        own = kind.get(relation, "").replace("{}", "Lyon")
        assert len(set(asked)) == 3 and own not in asked
        assert set(asked) <= {prompt.replace("{}", "Lyon") for prompt in kind.values()}

    model, covariance = ready(seed)
    measure = relations.OtherRelations(model, tiny_tokenizer(), EDITS, seed)
    assert measure()["other_relations_kept"] == 1
    head = model.get_output_embeddings().weight
    before = head.detach().clone()
    with torch.no_grad():
        head.zero_()  # all logits are equal: the first word of all is said
    assert set(measure.targets) - {0} and measure()["other_relations_said"] < 1
    measure.targets[:3] = [0, 0, 0]
    share = sum(token == 0 for token in measure.targets) / len(measure.targets)
    assert measure()["other_relations_said"] == pytest.approx(share) and share > 0
    kept = sum(token == 0 for token in measure.before) / len(measure.before)
    assert measure()["other_relations_kept"] == kept < 1
    with torch.no_grad():
        head.copy_(before)

    covariance.save(tmp_path / "c.safetensors")
    found = relations.measured(
        model, tiny_tokenizer(), EDITS, {"d4s": FAST}, seed,
        covariance=tmp_path / "c.safetensors", out=tmp_path / "out", progress=False,
    )  # fmt: skip
    row = found.results["d4s"][seed].history[-1]
    assert 0 <= row["other_relations_said"] <= 1 and "other_relations_kept" in row


def test_cases_stay_whole_and_do_not_contradict_each_other(tmp_path, seed):
    (tmp_path / "mquake.json").write_text(json.dumps([*MQUAKE, case(9, PEOPLE[0], "Manila")]))
    edits = d4s.load_edits(tmp_path / "mquake.json")
    every = datasets.chosen(edits, 100, seed)
    cases = [edit.tags["case"] for edit in every]
    assert len(every) == 8 and len({"0", "9"} & set(cases)) == 1
    assert all(cases[i] == cases[i + 1] for i in range(0, 8, 2))
    assert datasets.chosen(edits, 5, seed) == every[:4]


QUESTIONS = {
    "arc_challenge.jsonl": [
        {"query": f"Question: Who is {i}?", "choices": ["Edwin", "Apple", "the piano"], "gold": i % 3}
        for i in range(9)
    ],
    "winogrande.jsonl": [
        {
            "context_options": [
                f"The piano is not in the room {i}, for the piano",
                f"The piano is not in the room {i}, for the room",
            ],
            "continuation": "was too small.",
            "gold": i % 2,
        }
        for i in range(9)
    ],
}


@pytest.mark.skipif(lm_eval is None, reason="lm_eval is not installed (pip install lm_eval)")
def test_scores_are_taken_once_through_an_interruption(world, monkeypatch, capsys, seed):
    Path("questions").mkdir()
    for name, records in QUESTIONS.items():
        (Path("questions") / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    edited = (
        "model edits corpus.txt --text text.txt --out out --only zsre --count 3 --generate 0 --methods d4s"
    )
    datasets.main(edited.split())
    asked = "model out/zsre/edited --data questions --out scores --questions 6 --tasks arc_challenge winogrande gsm8k"
    calls, run_tasks = [], downstream.run_tasks

    def running(model, tokenizer, tasks, **options):
        calls.append(tasks)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return run_tasks(model, tokenizer, tasks, **options)

    monkeypatch.setattr(downstream, "run_tasks", running)
    arguments = [*asked.split(), "--gsm8k", "0"]
    with pytest.raises(KeyboardInterrupt):
        downstream.main(arguments)
    assert len(list(Path("scores/scores").rglob("*.json"))) == 3
    downstream.main(arguments)
    downstream.main(arguments)
    assert len(calls) == 5  # four, and the one that was broken off
    found = pandas.read_csv("scores/scores.csv")
    assert list(found["model"]) == ["unedited"] * 2 + ["d4s-base-measured"] * 2
    assert set(found["questions"]) == {6} and Path("scores/downstream.png").exists()
    before, after = (
        found[found["model"] == name].set_index("task") for name in dict.fromkeys(found["model"])
    )
    assert list(after["change"]) == pytest.approx(list(after["value"] - before["value"]))
    assert list((after["regained"] - after["lost"]) / 6) == pytest.approx(list(after["change"]))
    with pytest.raises(ConfigError, match="of another questions"):
        downstream.main([*arguments, "--questions", "4"])


def test_a_change_has_the_error_of_its_differences():
    before, after = (1.0, 1.0, 0.0, 0.0, 1.0), (1.0, 0.0, 0.0, 1.0, 0.0)
    row = downstream.compared(TaskMetric(0.6, 0.2, 5, before), TaskMetric(0.4, 0.2, 5, after))
    # Differences 0, −1, 0, 1, −1: their mean −1/5, their variance (3 − 5/25) / 4, over five.
    assert row["change"] == pytest.approx(-0.2)
    assert row["change_stderr"] == pytest.approx(math.sqrt(2.8 / 4 / 5))
    assert (row["lost"], row["regained"], row["mcnemar_p"]) == (2, 1, 1.0)
    assert row["within_one_stderr"] is True
    unpaired = downstream.compared(TaskMetric(0.6, 0.03, 5), TaskMetric(0.4, 0.04, 5))
    assert unpaired["change_stderr"] == pytest.approx(0.05) and unpaired["within_one_stderr"] is False
    shares = downstream.compared(TaskMetric(0.5, 0.1, 2, (0.25, 0.75)), TaskMetric(0.5, 0.1, 2, (0.75, 0.25)))
    assert "lost" not in shares and shares["within_one_stderr"] is True


def test_no_two_sequences_have_files_of_one_name():
    """What the second has written would be taken for the first's."""
    anatomy = Anatomy(tiny_model("llama"))
    names: dict[str, str] = {}
    for label, fields_ in setting.SEQUENCES.items():
        method = method_for(
            fields_.get("method", label), anatomy, {k: v for k, v in fields_.items() if k != "method"}
        )
        result = Record(method.name, json.loads(json.dumps(asdict(method))))
        assert names.setdefault(setting.name_of(result), label) == label
