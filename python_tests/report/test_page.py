"""The page of a run: what stands on it, that nothing a fact says becomes markup, and that it stays small."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import re
import shutil
import zlib
from html.parser import HTMLParser

import pytest
from support.command import FAST as SETTINGS
from support.command import RECORDS, done, failed
from support.reports import made_up
from support.sequences import EDITS, FAST, ready, sequence
from support.tiny import TEXTS, tiny_model, tiny_tokenizer

from d4s.errors import ConfigError, DataError
from d4s.locate.covariance import estimate_covariance
from d4s.report import content as told_content
from d4s.report.content import content_of
from d4s.report.page import page, write_report
from d4s.report.runs import ToldRun, runs_in, statements_in
from d4s.sequence.compare import compare
from d4s.sequence.record import Record

LIMIT = 5_000_000  # bytes


def content(text: str) -> dict:
    """What the page's script unpacks."""
    (packed,) = re.findall(r'<script type="text/plain" id="content">([^<]*)</script>', text)
    return json.loads(zlib.decompress(base64.b64decode(packed)))


class Tags(HTMLParser):
    """Every tag of a page, and its text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data):
        if not self.open:
            self.words.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(filter(None, self.words))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as `d4s edit --out` leaves it, without the model; and the result."""
    model, covariance = ready(3)
    out = tmp_path_factory.mktemp("run")
    result = sequence(model, covariance, journal=out / "journal", evaluate_every=3)
    result.save(out / "result.json")
    return out, result


def test_a_page_tells_what_was_edited_and_what_came_of_it(folder, tmp_path):
    out, result = folder
    assert write_report([out], tmp_path / "report.html") == 1
    text = (tmp_path / "report.html").read_text("utf-8")
    tags = Tags(text)
    last = result.history[-1]
    for name in ("efficacy", "paraphrase", "specificity", "average"):
        assert f"{100 * last[name]:.1f} %" in tags.text
        assert f"{100 * last[f'{name}.low']:.1f} – {100 * last[f'{name}.high']:.1f} %" in tags.text
    assert "transformer.h.0.mlp.c_proj.weight" in tags.text and "float32" in tags.text
    assert f"{len(EDITS)} edits" in tags.text and "torch " in tags.text and "prior_weight" in tags.text

    found = content(text)
    assert found["facts"]["sentence"] == [edit.text for edit in EDITS]
    assert found["facts"]["new"] == [edit.target_new for edit in EDITS]
    assert found["facts"]["old"] == [edit.target_true for edit in EDITS]
    panels = {one["title"]: one for group in found["groups"] for one in group["panels"]}
    now, after, unedited = (
        next(line for line in panels["efficacy"]["lines"] if line["kind"] == kind)
        for kind in ("now", "right after", "unedited")
    )
    assert now["x"] == after["x"] == unedited["x"] == [3, 6, 7]
    for line, name in ((now, "efficacy"), (after, "original_efficacy"), (unedited, "efficacy.unedited")):
        assert line["y"] == pytest.approx([100 * row[name] for row in result.history[1:]], rel=1e-3, abs=1e-3)
    assert panels["growth of mean |w|"]["lines"][0]["x"] == [0, 3, 6, 7]
    written = panels["p(target) right after the step"]["lines"][0]
    assert written["y"] == pytest.approx(
        [row["written_probability"] for row in result.edits_table], rel=1e-3, abs=1e-6
    )
    (matrix,) = found["forgetting"]
    told = result.forgetting("efficacy")
    assert matrix["points"] == [3, 6, 7]
    for row, expected in zip(matrix["cells"]["efficacy"], told.to_numpy().tolist(), strict=True):
        for one, other in zip(row, expected, strict=True):
            assert (one is None) == math.isnan(other) and (
                one is None or one == pytest.approx(100 * other, rel=1e-3)
            )
    (edits,) = found["edits"]
    for i, row in enumerate(result.evaluations[-1].rows):
        assert edits["new_now"][i] == round(1e4 * math.exp(-row["nll_new"]))
        assert edits["old_before"][i] == round(1e4 * math.exp(-result.evaluations[0].rows[i]["nll_true"]))
    missing = result.not_arrived()
    assert edits["lost"] == [int(edit.id in missing) for edit in EDITS]


def test_a_page_is_the_same_again_and_asks_for_nothing(folder, tmp_path):
    out, _ = folder
    for name in ("one", "two"):
        write_report([out], tmp_path / name)
    text = (tmp_path / "one").read_text("utf-8")
    assert text == (tmp_path / "two").read_text("utf-8")
    tags = Tags(text)
    places = [
        value
        for _, fields in tags.tags
        for name, value in fields.items()
        if name in ("src", "href", "action", "data")
    ]
    assert all(value.startswith("#") or value == "data:," for value in places)
    (policy,) = [
        fields["content"] for _, fields in tags.tags if fields.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "http" not in policy
    for kind in ("script", "style"):
        (inside,) = re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
        wanted = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{wanted}'" in policy
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text)


EVIL = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> ' \" & {}"


def test_no_text_of_the_data_becomes_markup():
    run = made_up(3, 0)
    one = run.record.edits_table[0]["id"]
    run.facts[one] = dataclasses.replace(run.facts[one], sentence=EVIL, new=EVIL, old=EVIL)
    run.record.notes = (EVIL,)
    run.record.failure = EVIL
    run = dataclasses.replace(run, label=EVIL, setting={EVIL: EVIL, f"config: {EVIL}": EVIL})
    text = page([run, dataclasses.replace(run, label="b")], {EVIL: EVIL})
    tags, plain = Tags(text), Tags(page([made_up(3, 0), made_up(3, 0, label="b")], {"name": "text"}))
    assert "alert" not in [tag for tag, _ in tags.tags] and "img" not in [tag for tag, _ in tags.tags]
    assert sum(tag == "script" for tag, _ in tags.tags) == sum(tag == "script" for tag, _ in plain.tags) == 2
    assert EVIL in tags.text and content(text)["facts"]["sentence"][0] == EVIL


def test_ten_thousand_edits_stay_small(seed):
    """Of one run, and of four side by side; and the size is that of the data: a tenth of the edits take far less."""
    runs = [made_up(10_000, seed + i, points=2, label=f"run {i}") for i in range(4)]
    one, four = (len(page(some).encode()) for some in (runs[:1], runs))
    print(one, four)
    assert one < LIMIT / 2 and four < LIMIT
    assert len(page([made_up(1_000, seed)]).encode()) < one / 3


def test_a_misspelt_answer_is_told_with_its_edit(seed):
    run = made_up(3, seed)
    assert "misspelt" not in content_of([run])["edits"][0]
    run.record.evaluations[0].rows[0]["misspelt_as"] = "of the unedited model"
    run.record.evaluations[-1].rows[1]["misspelt_as"] = "rmoe"
    assert content_of([run])["edits"][0]["misspelt"] == [None, "rmoe", None]


def test_runs_side_by_side_keep_their_names_and_share_the_facts(tmp_path):
    model = tiny_model("gpt2", 1)
    covariance = estimate_covariance(model, tiny_tokenizer(), TEXTS * 3, progress=False)
    method = {"method": "d4s", "layers": [0, 1], "steps": 2, "contexts": 0, "prior_weight": 0.01}
    compare(
        model,
        tiny_tokenizer(),
        EDITS[:2],
        {"a/b": method, "ft-m": {"layers": [1], "steps": 1}},
        covariance=covariance,
        out=tmp_path / "c",
        seeds=(0, 1),
        progress=False,
    ).save(tmp_path / "c")
    runs = runs_in([tmp_path / "c"])
    assert [run.label for run in runs] == ["a/b, seed 0", "a/b, seed 1", "ft-m, seed 0", "ft-m, seed 1"]
    assert not any(run.facts for run in runs), "a comparison stores ids"
    found = content(page(runs_in([tmp_path / "c"], EDITS)))
    assert found["facts"]["sentence"] == [edit.text for edit in EDITS[:2]]
    assert [run["colour"] for run in found["runs"]] == [0, 0, 1, 1] and len(found["edits"]) == 4

    details = tmp_path / "fig8" / "fig8-details"
    shutil.copytree(tmp_path / "c", details)
    (tmp_path / "fig8" / "fig8.md").write_text("# fig8\n\nThe claim holds.\n")
    assert [run.label for run in runs_in([tmp_path / "fig8"])] == [f"fig8: {run.label}" for run in runs]
    assert statements_in([tmp_path / "fig8"]) == {"fig8": "# fig8\n\nThe claim holds."}
    both = runs_in([tmp_path / "c", tmp_path / "fig8"])
    assert len({run.label for run in both}) == 8 and both[0].label == "c: a/b, seed 0"


def test_a_run_under_way_is_told_as_far_as_it_has_come(tmp_path):
    model, covariance = ready(5)
    out = tmp_path / "c"

    class Stop(Exception):
        pass

    def stop():
        if (out / "journals").exists() and len(told := runs_in([out])) == 1 and told[0].record.edits_table:
            raise Stop
        return {}

    with pytest.raises(Exception, match="after edit 2"):
        compare(
            model,
            tiny_tokenizer(),
            EDITS,
            {"d4s": dict(layers=[0, 1], steps=2, contexts=0, prior_weight=0.01)},
            covariance=covariance,
            out=out,
            evaluate_every=2,
            measure=stop,
            progress=False,
        )
    (run,) = runs_in([out])
    assert run.label == "d4s" and len(run.record.edits_table) == 2 and [*run.facts] == ["e0", "e1"]
    tags = Tags(page([run]))
    assert "broke off" in tags.text and "2 edits" in tags.text


def test_a_run_that_goes_on_with_a_pass_is_told_by_its_journal(tmp_path, seed):
    options = dict(config=FAST | dict(steps=1, learning_rate=1e-30), journal=tmp_path / "journal")
    sequence(*ready(seed), **options).save(tmp_path / "result.json")
    (ended,) = runs_in([tmp_path])
    assert ended.record.failure is None and len(ended.record.edits_table) == len(EDITS)
    found = sequence(*ready(seed), **options, passes=2)
    again = len(found.edits_table) - len(EDITS)
    (run,) = runs_in([tmp_path])
    assert again > 0 and len(run.record.edits_table) == len(EDITS) + again


def test_of_an_edit_that_was_made_again_the_last_row_says_whether_it_arrived():
    table = [
        {"id": "a", "last_probability": 0.9, "written_probability": 0.85},
        {"id": "b", "last_probability": 0.2, "written_probability": 0.2},
        {"id": "a~2", "again": "a", "last_probability": 0.9, "written_probability": 0.2},
    ]
    record = Record("d4s", {"target": {"steps": 25}}, edits_table=table)
    columns = told_content._edits(
        ToldRun("d4s", record, {}, {}), {row["id"]: i for i, row in enumerate(table)}
    )
    assert columns["lost"] == [0, 0, 1]
    unfound, lost = record.missing()
    assert unfound.startswith("1 of 2 edits") and lost.startswith("1 of 2 edits")


def test_a_folder_without_a_run_or_with_a_damaged_one_is_said(folder, tmp_path):
    out, _ = folder
    with pytest.raises(ConfigError, match="name one folder or more"):
        runs_in([])
    with pytest.raises(DataError, match="nowhere: there is no such folder"):
        runs_in([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: holds no sequence; must have a journal .* result\.json"):
        runs_in([tmp_path / "empty"])
    bad = tmp_path / "bad"
    bad.mkdir()
    text = (out / "result.json").read_text()
    (bad / "result.json").write_text(
        text.replace('"efficacy": 1.0', '"efficacy": 0.5', 1).replace("e0", "x0", 1)
    )
    with pytest.raises(DataError, match=r"result\.json: has changed since Result\.save wrote it"):
        write_report([bad], tmp_path / "page.html")
    (bad / "result.json").write_text(text[: len(text) // 2])
    with pytest.raises(DataError, match=r"result\.json: not what Result\.save wrote"):
        write_report([bad], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists(), "nothing half is left"
    (bad / "result.json").unlink()
    (bad / "results").mkdir()
    shutil.copy(out / "result.json", bad / "results" / "d4s-0.json")
    for words in ("[1, 2]", "{", '{"edits": ' + "[" * 10_000):
        (bad / "settings.json").write_text(words)
        with pytest.raises(DataError, match=r"settings\.json: not "):
            runs_in([bad])


def test_the_verb_writes_the_page_beside_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("D4S_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    model = tiny_model("gpt2", 1)
    model.save_pretrained("m")
    tiny_tokenizer().save_pretrained("m")
    (tmp_path / "edits.json").write_text(json.dumps(RECORDS))
    estimate_covariance(model, tiny_tokenizer(), TEXTS * 3, progress=False).save("c.safetensors")
    done(capsys, "edit", "m", "edits.json", "--covariance", "c.safetensors", *SETTINGS, "--out", "run")
    assert "1 run, " in done(capsys, "report", "run")
    text = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "Steve Jobs worked for" in content(text)["facts"]["sentence"]
    said = json.loads(
        done(capsys, "report", "run", "--out", "deep/page.html", "--edits", "edits.json", "--json")
    )
    assert said == {"page": "deep/page.html", "bytes": len(text.encode()), "runs": 1}
    assert "holds no sequence" in failed(capsys, "report", "m")
    assert "is a folder; name a file in it" in failed(capsys, "report", "run", "--out", "deep")
