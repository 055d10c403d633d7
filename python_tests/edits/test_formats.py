"""Every format a file of edits may have, what becomes of its fields, and what is said about damaged files."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest

from d4s.edits import Edit, Question, check_batch, check_sequence
from d4s.edits.edit import made_again
from d4s.edits.formats import FORMATS, load_edits, save_edits
from d4s.edits.formats.fields import FieldError, split_subject
from d4s.errors import ConfigError, DataError

FIXTURES = Path(__file__).parents[1] / "support" / "fixtures"


def _real_data() -> Path | None:
    named = os.environ.get("D4S_DATA")
    folder = Path(named) if named else Path(__file__).parents[3] / "shared" / "data"
    return folder / "edits" if (folder / "edits").is_dir() else None


REAL = _real_data()
needs_real_data = pytest.mark.skipif(REAL is None, reason="the published files are not here (D4S_DATA)")


def records(name: str) -> list[dict]:
    return json.loads((FIXTURES / name).read_text(encoding="utf-8"))


def write(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


# What becomes of the fields


def test_counterfact_keeps_every_prompt_in_its_role() -> None:
    for record, edit in zip(
        records("counterfact.json"), load_edits(FIXTURES / "counterfact.json"), strict=True
    ):
        rewrite = record["requested_rewrite"]
        assert (edit.prompt, edit.subject, edit.relation) == (
            rewrite["prompt"],
            rewrite["subject"],
            rewrite["relation_id"],
        )
        assert (edit.target_new, edit.target_true) == (
            rewrite["target_new"]["str"],
            rewrite["target_true"]["str"],
        )
        assert list(edit.paraphrases) == record["paraphrase_prompts"]
        assert list(edit.neighborhood) == record["neighborhood_prompts"]
        assert list(edit.attribute) == record["attribute_prompts"]
        assert list(edit.generation) == record["generation_prompts"]
        assert edit.kind == "completion" and edit.id == f"counterfact-{record['case_id']}"
        assert edit.tags == {"source": "counterfact", "case": str(record["case_id"])}


def test_counterfact_additions_become_portability_questions() -> None:
    plain, reasoning, aliased = load_edits(FIXTURES / "counterfact.json")
    assert plain.portability == ()
    assert reasoning.portability == (
        Question(
            "What popular food from Laurent Cars' city of employment is famous worldwide?",
            ("Philly cheesesteak",),
            "reasoning",
        ),
    )
    assert Question("lawn tennis, from", ("Japan",), "subject_aliasing") in aliased.portability


def test_flat_counterfact_puts_the_place_holder_where_the_subject_stands() -> None:
    for record, edit in zip(
        records("counterfact_flat.json"), load_edits(FIXTURES / "counterfact_flat.json"), strict=True
    ):
        assert edit.text == record["prompt"] and edit.subject == record["subject"]
        assert (edit.target_new, edit.target_true) == (record["target_new"], record["ground_truth"])
        assert edit.paraphrases == (record["rephrase_prompt"],)
        assert edit.neighborhood == (record["locality_prompt"],)
        assert edit.kind == "completion" and edit.id == f"counterfact-{record['case_id']}"


def test_a_flat_neighbour_with_another_answer_is_a_locality_question(tmp_path: Path) -> None:
    record = {**records("counterfact_flat.json")[0], "locality_ground_truth": "Basque"}
    (edit,) = load_edits(write(tmp_path / "x", [record]))
    assert edit.neighborhood == ()
    assert edit.locality == (Question(record["locality_prompt"], ("Basque",), "neighborhood"),)


def test_zsre_asks_the_question_and_takes_the_first_answer_as_the_old_one() -> None:
    for record, edit in zip(records("zsre_mend.json"), load_edits(FIXTURES / "zsre_mend.json"), strict=True):
        assert edit.text == record["src"] and edit.subject == record["subject"]
        assert (edit.target_new, edit.target_true) == (record["alt"], record["answers"][0])
        assert edit.paraphrases == (record["rephrase"],) and edit.kind == "question"
        assert edit.locality == (Question(record["loc"], (record["loc_ans"],), "unrelated"),)
        (portability,) = edit.portability
        assert portability.prompt == record["portability"]["New Question"]
        assert portability.answers == (record["portability"]["New Answer"],)


def test_mquake_asks_multi_hop_questions_after_the_last_edit_of_the_case() -> None:
    first, last, other = load_edits(FIXTURES / "mquake.json")
    assert [e.tags["case"] for e in (first, last, other)] == ["12", "12", "13"]
    assert [e.id for e in (first, last, other)] == ["mquake-12-1", "mquake-12-2", "mquake-13-1"]
    assert (first.text, first.target_new, first.target_true) == (
        "The Salt Ledger was written by",
        "Ilka Morrow",
        "Bertil Sand",
    )
    assert first.paraphrases == ("Who wrote The Salt Ledger?",) and first.relation == "P50"
    assert first.portability == ()
    multi = [q for q in last.portability if q.kind == "multi_hop"]
    assert [q.prompt for q in multi] == records("mquake.json")[0]["questions"]
    assert {q.answers for q in multi} == {("Norway", "Kingdom of Norway", "NO")}
    single = [q for q in last.portability if q.kind == "single_hop"]
    assert [q.answers for q in single] == [("Ilka Morrow", "I. Morrow"), ("Norway",)]


def test_a_case_cut_off_by_the_limit_asks_no_multi_hop_question() -> None:
    (only,) = load_edits(FIXTURES / "mquake.json", limit=1)
    assert only.portability == ()


def test_knowedit_questions_keep_their_group_and_all_answers() -> None:
    capital, prince, lion = load_edits(FIXTURES / "knowedit.json")
    assert capital.kind == "question" and capital.target_true is None
    assert [q.kind for q in capital.portability] == ["reasoning"]
    assert lion.prompt == "The gender of {} is" and lion.target_new == "female organism"
    assert lion.locality == (
        Question("The name of the father of Igugu is", ("Galileo",), "relation_specificity"),
    )
    by_prompt = {q.prompt: q.answers for q in prince.locality}
    assert by_prompt["The name of the mother of Liu Cang is"] == (
        "Yin Lihua",
        "Empress Yin Lihua",
        "Empress Guanglie",
    )
    siblings = by_prompt["The names of the siblings of Liu Cang are"]
    assert siblings[0] == "Emperor Ming of Han" and "Liu Zhongli" in siblings
    assert by_prompt["The name of the child of Liu Cang is"] == ()


def test_knowedit_as_jsonl_under_a_json_name_is_the_same() -> None:
    assert load_edits(FIXTURES / "knowedit_lines.json") == load_edits(FIXTURES / "knowedit.json")


def test_knowedit_takes_truth_and_rephrasing_where_they_are_given(tmp_path: Path) -> None:
    record = {
        **records("knowedit.json")[2],
        "ground_truth": [["male", "man"]],
        "rephrase_prompt": "Igugu is a",
    }
    (edit,) = load_edits(write(tmp_path / "x", [record]))
    assert edit.target_true == "male" and edit.paraphrases == ("Igugu is a",)


def test_knowedit_portability_without_an_answer_cannot_be_scored_and_is_left_out(tmp_path: Path) -> None:
    record = records("knowedit.json")[0]
    record["portability"]["Reasoning"].append({"prompt": "Its river is", "ground_truth": [[]]})
    (edit,) = load_edits(write(tmp_path / "x", [record]))
    assert [q.prompt for q in edit.portability] == [record["portability"]["Reasoning"][0]["prompt"]]


def test_qaedit_carries_all_unrelated_questions() -> None:
    for record, edit in zip(records("qaedit.json"), load_edits(FIXTURES / "qaedit.json"), strict=True):
        assert edit.text == record["prompt"] and edit.subject == record["subject"]
        assert edit.target_new == record["target"] and edit.target_true is None
        assert edit.paraphrases == (record["rephrase"],) and edit.kind == "question"
        assert [(q.prompt, *q.answers) for q in edit.locality] == [
            (q["loc"], q["loc_ans"]) for q in record["locality"]
        ]
        assert edit.id == f"qaedit-{record['source']}-{record['id']}"
        assert edit.tags["question_set"] == record["source"]


def test_statements_take_their_first_word_after_articles_as_subject() -> None:
    edits = load_edits(FIXTURES / "statements_20q.json")
    assert [e.text for e in edits] == [r["prompt"] for r in records("statements_20q.json")]
    assert [e.subject for e in edits] == ["revolver", "Furnishings", "coordinator", "vegetarians"]
    assert [(e.target_new, e.target_true) for e in edits] == [
        ("True", "False"),
        ("False", "True"),
        ("True", "False"),
        ("False", "True"),
    ]
    assert {e.kind for e in edits} == {"statement"}


def test_probes_tell_what_the_edit_affects_from_what_it_does_not() -> None:
    noise, _ = load_edits(FIXTURES / "probe.json")
    record = records("probe.json")[0]
    assert (noise.text, noise.subject, noise.target_new) == ("Furnishings make noise", "Furnishings", "False")
    assert list(noise.paraphrases) == record["affected_paraphrase"]
    assert Question("Furnishings make din", ("False",), "affected_neighborhood_object") in noise.portability
    # The sentences of the reasoning are true, whatever the statement's label.
    reasoning = [q for q in noise.portability if q.kind == "affected_reasoning"]
    assert [q.prompt for q in reasoning] == record["affected_reasoning"]
    assert {q.answers for q in reasoning} == {("True",)}
    assert len(noise.locality) == 10 and all(q.answers == () for q in noise.locality)


def test_elken_events_are_cut_in_the_middle_and_read_on_to_the_event() -> None:
    edits = load_edits(FIXTURES / "elken.json")
    assert [f"{e.text} {e.target_new}" for e in edits] == [r["event"] for r in records("elken.json")]
    # From a fact question; from the sentence's opening name; a genitive stays outside; no name at all.
    assert [e.subject for e in edits] == [
        "Halvard Mills",
        "Lund Harbour Museum",
        "Odo Brandt",
        "small beetle with",
    ]
    assert edits[2].prompt == "{}'s life" and edits[2].target_new == "ended in Lisbon."
    assert edits[1].prompt == "The {} opens"


def test_the_genitive_of_the_name_an_event_begins_with_is_no_part_of_the_subject(tmp_path: Path) -> None:
    record = {**records("elken.json")[1], "event": "Tindra's new mill burns less wood."}
    (edit,) = load_edits(write(tmp_path / "x", [record]))
    assert edit.subject == "Tindra" and edit.prompt == "{}'s new mill"


def test_elken_questions_of_both_kinds_are_portability_and_locality() -> None:
    mills = load_edits(FIXTURES / "elken.json")[0]
    assert mills.portability == (
        Question("Who owns Halvard Mills?", ("Tindra Group", "Tindra"), "fact"),
        Question("When did Tindra Group buy Halvard Mills?", ("unknown",), "fact"),
        Question(
            "How may the number of paper mills of the group change? (A) Fall (B) Rise (C) No change Answer:",
            ("B",),
            "tendency",
        ),
    )
    assert [(q.answers, q.kind) for q in mills.locality] == [(("Norway",), "fact"), (("C",), "tendency")]
    assert mills.relation == "acquire"


def test_zsre_may_be_written_towards_the_true_answer_as_rome_and_memit_do() -> None:
    for record, edit in zip(
        records("zsre_mend.json"), load_edits(FIXTURES / "zsre_mend.json", zsre_target="answer"), strict=True
    ):
        assert (edit.target_new, edit.target_true) == (record["answers"][0], None)
        assert edit.locality == (Question(f"{record['loc']}?", (record["loc_ans"],), "unrelated"),)
        assert edit.portability == (), "it follows from the other answer"
    for record, edit in zip(
        records("zsre_flat.json"), load_edits(FIXTURES / "zsre_flat.json", zsre_target="answer"), strict=True
    ):
        assert (edit.target_new, edit.target_true) == (record["ground_truth"], None)
        assert [q.prompt for q in edit.locality] == [record["locality"]["prompt"]]
    with pytest.raises(ConfigError, match=r"unknown zsre_target 'answers'. Did you mean 'answer'"):
        load_edits(FIXTURES / "zsre_mend.json", zsre_target="answers")  # type: ignore[arg-type]


def test_flat_zsre_knows_both_answers_and_one_unrelated_question() -> None:
    for record, edit in zip(records("zsre_flat.json"), load_edits(FIXTURES / "zsre_flat.json"), strict=True):
        assert edit.text == record["prompt"] and edit.subject == record["subject"]
        assert (edit.target_new, edit.target_true) == (record["target"], record["ground_truth"])
        assert edit.paraphrases == (record["generality"],) and edit.kind == "question"
        asked = record["locality"]
        assert edit.locality == (Question(asked["prompt"], (asked["target"],), "unrelated"),)


def test_a_change_without_an_old_answer_is_scored_as_a_question() -> None:
    for record, edit in zip(
        records("wikibigedit.json"), load_edits(FIXTURES / "wikibigedit.json"), strict=True
    ):
        assert edit.text == record["prompt"] and edit.subject == record["subject"]
        assert (edit.target_new, edit.target_true, edit.kind) == (record["target_new"], None, "question")
        assert edit.paraphrases == (record["rephrase_prompt"],)
        gold = (record["locality_ground_truth"],)
        assert edit.locality == (Question(record["locality_prompt"], gold, "neighborhood"),)


def test_the_key_of_an_unstructured_answer_is_the_questions_last_token() -> None:
    for record, edit in zip(records("unke.json"), load_edits(FIXTURES / "unke.json"), strict=True):
        assert (edit.prompt, edit.subject, edit.target_new) == ("{}", record["question"], record["answer"])
        assert edit.paraphrases == (record["para_question"],) and edit.id == f"unke-{record['id']}"
        assert [(q.prompt, *q.answers) for q in edit.portability] == list(
            zip(record["sub_question"], record["sub_answer"], strict=True)
        )


def test_the_passage_of_an_unstructured_case_is_a_reference_text(tmp_path: Path) -> None:
    case = records("mquake.json")[1]
    case["requested_rewrite"][0]["fact_new_uns"] = "A passage."
    (edit,) = load_edits(write(tmp_path / "x", [case]))
    assert edit.reference_texts == ("A passage.",)


# The same thing in another spelling


def _as_object(value: str) -> dict[str, str]:
    return {"str": value, "id": "Q1"}


@pytest.mark.parametrize(
    ("file", "change"),
    [
        (
            "counterfact.json",
            lambda r: r["requested_rewrite"].update(
                target_new=r["requested_rewrite"]["target_new"]["str"],
                target_true=r["requested_rewrite"]["target_true"]["str"],
            ),
        ),
        ("counterfact_flat.json", lambda r: r.update(target_new=_as_object(r["target_new"]))),
        ("counterfact_flat.json", lambda r: r.update(ground_truth=_as_object(r["ground_truth"]))),
        ("counterfact_flat.json", lambda r: r.update(ground_truth=[r["ground_truth"], "another name"])),
        (
            "counterfact_flat.json",
            lambda r: r.update(
                prompt=r["prompt"].replace(r["subject"], "{}"),
                rephrase_prompt=r["rephrase_prompt"].replace(r["subject"], "{}"),
            ),
        ),
        ("zsre_mend.json", lambda r: r.update(alt=_as_object(r["alt"]), answers=r["answers"][0])),
        ("zsre_mend.json", lambda r: r.update(src=r["src"].replace(r["subject"], "{}"))),
        (
            "zsre_flat.json",
            lambda r: r.update(target=_as_object(r["target"]), ground_truth=[r["ground_truth"]]),
        ),
        ("zsre_flat.json", lambda r: r.update(locality=[r["locality"]])),
        (
            "zsre_flat.json",
            lambda r: r.update(
                locality={
                    "Unrelated": {"prompt": r["locality"]["prompt"], "ground_truth": r["locality"]["target"]}
                }
            ),
        ),
        (
            "zsre_flat.json",
            lambda r: r.update(
                locality={
                    "unrelated": {
                        "prompt": [r["locality"]["prompt"]],
                        "ground_truth": [r["locality"]["target"]],
                    }
                }
            ),
        ),
        (
            "mquake.json",
            lambda r: [w.update(target_new=w["target_new"]["str"]) for w in r["requested_rewrite"]],
        ),
        ("knowedit.json", lambda r: r.update(target_new=_as_object(r["target_new"]))),
        ("wikibigedit.json", lambda r: r.update(target_new=_as_object(r["target_new"]))),
        ("wikibigedit.json", lambda r: r.update(locality_ground_truth=[r["locality_ground_truth"]])),
        ("qaedit.json", lambda r: r.update(target=_as_object(r["target"]))),
        ("unke.json", lambda r: r.update(answer=_as_object(r["answer"]))),
    ],
)
def test_answers_prompts_and_groups_are_read_in_every_spelling(tmp_path: Path, file: str, change) -> None:
    changed = records(file)
    for record in changed:
        change(record)
    assert load_edits(write(tmp_path / "x", changed)) == load_edits(FIXTURES / file)


def test_flat_records_with_named_groups_of_locality_keep_the_groups(tmp_path: Path) -> None:
    record = records("counterfact_flat.json")[0]
    record["locality"] = {"Distracting": {"prompt": "Water is", "ground_truth": ["wet", "liquid"]}}
    (edit,) = load_edits(write(tmp_path / "x", [record]))
    assert edit.target_true == record["ground_truth"]
    assert Question("Water is", ("wet", "liquid"), "distracting") in edit.locality


def test_edits_of_the_projects_own_fields_may_give_answers_as_objects(tmp_path: Path) -> None:
    record = {
        "prompt": "{} is",
        "subject": "Ada",
        "target_new": {"str": "here"},
        "target_true": {"str": "there"},
    }
    assert load_edits(write(tmp_path / "x", [record])) == [Edit("{} is", "Ada", "here", "there")]


def test_a_list_beside_other_fields_is_read(tmp_path: Path) -> None:
    zsre = records("zsre_mend.json")
    for wrapped in ({"version": 2, "data": zsre}, {"data": zsre, "license": ["MIT"]}, {"edits": zsre}):
        assert load_edits(write(tmp_path / "x", wrapped)) == load_edits(FIXTURES / "zsre_mend.json")
    own = {"prompt": "{} is", "subject": "Ada", "target_new": "here", "paraphrases": ["Ada stands"]}
    assert [e.paraphrases for e in load_edits(write(tmp_path / "x", own))] == [("Ada stands",)]


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_composed_and_combining_spellings_of_a_subject_are_one(
    tmp_path: Path, forms: tuple[str, str]
) -> None:
    spelt = {"NFC": "Jose\u0301 Nu\u0303ez", "NFD": "Jose\u0301 Nu\u0303ez"}
    spelt = {form: unicodedata.normalize(form, name) for form, name in spelt.items()}
    in_prompt, in_field = (spelt[form] for form in forms)
    record = {**records("wikibigedit.json")[0], "prompt": f"Where is {in_prompt} from?", "subject": in_field}
    (edit,) = load_edits(write(tmp_path / "x", [record]))
    assert (edit.prompt, edit.subject) == ("Where is {} from?", spelt["NFC"])
    assert edit == dataclasses.replace(edit, subject=spelt["NFD"]), "one fact, with one id"


# Subjects in prompts


@pytest.mark.parametrize(
    ("prompt", "subject", "template", "found"),
    [
        (
            "The 1971 hit Ernie by Hill: whom did Ernie love?",
            "Ernie",
            "The 1971 hit Ernie by Hill: whom did {} love?",
            "Ernie",
        ),
        (
            "'tandoori' comes from tandoor, so tandoori",
            "tandoor",
            "'tandoori' comes from {}, so tandoori",
            "tandoor",
        ),
        ("i want to sing", "i", "{} want to sing", "i"),
        ("the isles", "isle", "the {}s", "isle"),
        ("who wrote the sea wolf", "The Sea Wolf", "who wrote {}", "the sea wolf"),
        ("the WHO and the who", "the who", "the WHO and {}", "the who"),
        ("Where is Apple Inc.?", "Apple Inc.", "Where is {}?", "Apple Inc."),
        ("Ada speaks", " Ada ", "{} speaks", "Ada"),
        # Lower-casing 'İ' gives two characters: positions must be those in the prompt.
        ("in İzmir lives ada", "ADA", "in İzmir lives {}", "ada"),
    ],
)
def test_the_subject_is_found_and_kept_as_it_stands(
    prompt: str, subject: str, template: str, found: str
) -> None:
    assert split_subject(prompt, subject, "prompt") == (template, found)


def test_a_subject_that_does_not_occur_is_named_with_file_record_and_field(tmp_path: Path) -> None:
    flat = records("counterfact_flat.json")
    flat[1]["subject"] = "Nobody"
    path = write(tmp_path / "flat.json", flat)
    with pytest.raises(
        DataError, match=r"flat\.json, record 2: field 'prompt' does not contain the subject 'Nobody'"
    ):
        load_edits(path)
    for subject in ("", "nobody"):
        with pytest.raises(FieldError, match="does not contain"):
            split_subject("who wrote it", subject, "prompt")


# Recognition


def test_every_format_is_recognised_whatever_the_file_is_called(tmp_path: Path) -> None:
    names = {
        "counterfact.json": "counterfact",
        "counterfact_flat.json": "counterfact_flat",
        "zsre_mend.json": "zsre",
        "zsre_flat.json": "zsre_flat",
        "mquake.json": "mquake",
        "unke.json": "unke",
        "wikibigedit.json": "wikibigedit",
        "knowedit.json": "knowedit",
        "elken.json": "elken",
        "statements_20q.json": "commonsense",
        "probe.json": "commonsense_probe",
        "qaedit.json": "qaedit",
    }
    assert {*names.values(), "edits"} == set(FORMATS)
    for file, name in names.items():
        as_list = load_edits(shutil.copy(FIXTURES / file, tmp_path / "data.txt"))
        assert {e.tags["source"] for e in as_list} == {name}
        lines = tmp_path / "lines"
        lines.write_text("\n\n".join(json.dumps(r) for r in records(file)), encoding="utf-8")
        assert load_edits(lines) == as_list
        assert load_edits(FIXTURES / file, format=name) == as_list


def test_an_unknown_format_lists_what_was_looked_for_and_what_was_found(tmp_path: Path) -> None:
    path = write(tmp_path / "facts.json", [{"head": "x", "tail": "y"}])
    with pytest.raises(DataError) as caught:
        load_edits(path)
    message = str(caught.value)
    assert "facts.json" in message and "record 1: 'head', 'tail'" in message
    assert all(f" {name}: " in message for name in FORMATS) and "'requested_rewrite'" in message


@pytest.mark.parametrize("text", ["just some prose\nin two lines", "[1, 2]", '["a"]', "a,b\n1,2\n"])
def test_text_that_holds_no_edits_is_no_known_format(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x"
    path.write_text(text)
    with pytest.raises(DataError, match=r"not a known format of edits.*found, in record 1"):
        load_edits(path)


def test_a_damaged_first_record_does_not_hide_the_format(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", [{"odd": 1}, *records("zsre_mend.json")])
    with pytest.raises(DataError, match=r"x\.json, record 1: field 'src' is missing"):
        load_edits(path)
    assert len(load_edits(path, skip_bad=True)) == 3


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match=r"unknown format 'zsrre'. Did you mean 'zsre'"):
        load_edits(FIXTURES / "zsre_mend.json", format="zsrre")
    for limit in (0, -1, 2.5, True):
        with pytest.raises(ConfigError, match="limit is"):
            load_edits(FIXTURES / "zsre_mend.json", limit=limit)  # type: ignore[arg-type]


def test_a_list_wrapped_in_one_field_and_a_single_object_are_read(tmp_path: Path) -> None:
    zsre = records("zsre_mend.json")
    assert len(load_edits(write(tmp_path / "wrapped", {"data": zsre}))) == 3
    (tmp_path / "single").write_text(json.dumps(zsre[0], indent=1))
    assert len(load_edits(tmp_path / "single")) == 1


# Damaged files


def test_a_file_that_is_cut_off_names_the_place_and_the_last_complete_record(tmp_path: Path) -> None:
    whole = (FIXTURES / "zsre_mend.json").read_text(encoding="utf-8")
    third = whole.index("{", whole.index('"Sunset Boulevard"'))
    cuts = [third + 1, whole.index("Yemen") + 2, whole.index('"Armenia"'), whole.index("Sana'a") + 5]
    for cut in cuts:
        path = tmp_path / "cut.json"
        path.write_text(whole[:cut], encoding="utf-8")
        with pytest.raises(DataError) as caught:
            load_edits(path)
        message = str(caught.value)
        line, column = whole.count("\n", 0, cut) + 1, cut - whole.rfind("\n", 0, cut)
        assert "cut.json, record 3: the file is cut off inside this record" in message
        assert f"it ends at line {line}, column {column} (byte {cut})" in message
        assert "the last complete record is number 2" in message
        skipped: list[str] = []
        assert len(load_edits(path, skip_bad=True, skipped=skipped)) == 2
        assert skipped == [message]


def test_bytes_are_counted_in_the_file_not_in_characters(tmp_path: Path) -> None:
    text = '\ufeff[{"prompt": "é {}", "subject": "é", "target_new": "é"}, {"prompt": "é'
    path = tmp_path / "x"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=rf"byte {path.stat().st_size}\)"):
        load_edits(path)


def test_a_list_without_its_end_or_with_text_after_it_is_damaged(tmp_path: Path) -> None:
    whole = (FIXTURES / "zsre_mend.json").read_text(encoding="utf-8").strip()
    path = tmp_path / "x"
    path.write_text(whole[:-1], encoding="utf-8")
    with pytest.raises(DataError, match="the list has no end after record 3"):
        load_edits(path)
    path.write_text(whole + "\n{}", encoding="utf-8")
    with pytest.raises(DataError, match="text after the end of the list, at line"):
        load_edits(path)
    assert len(load_edits(path, skip_bad=True)) == 3


def test_an_error_in_the_middle_of_a_list_is_not_called_a_cut(tmp_path: Path) -> None:
    whole = (FIXTURES / "zsre_mend.json").read_text(encoding="utf-8")
    at = whole.index(',\n  "src"', whole.index("At Midnight"))
    path = tmp_path / "x"
    path.write_text(whole[:at] + whole[at + 1 :], encoding="utf-8")
    line = whole.count("\n", 0, at) + 2
    with pytest.raises(
        DataError, match=rf"record 2: not valid JSON: Expecting ',' delimiter at line {line}, column 3"
    ):
        load_edits(path)


def test_a_damaged_line_is_named_and_the_others_can_still_be_read(tmp_path: Path) -> None:
    lines = (FIXTURES / "knowedit_lines.json").read_text(encoding="utf-8").splitlines()
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join([lines[0], "", lines[1][:40], lines[2]]), encoding="utf-8")
    with pytest.raises(
        DataError, match=r"x\.jsonl, record 2 \(line 3\): the line is cut off: .* at line 3, column"
    ):
        load_edits(path)
    assert [e.subject for e in load_edits(path, skip_bad=True)] == ["Tila", "Igugu"]


def test_a_line_separator_inside_a_string_does_not_end_the_record(tmp_path: Path) -> None:
    edit = Edit("{} says", "Ada\u2028Quist", "one\u2029two\x85three", id="x")
    save_edits([edit, Edit("{} is", "Bo", "here")], tmp_path / "x.jsonl")
    assert "\u2028" in (tmp_path / "x.jsonl").read_text(encoding="utf-8")
    assert load_edits(tmp_path / "x.jsonl")[0] == edit


def test_files_that_are_no_text_of_edits_say_why(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(DataError, match=r"x\.json: there is no such file"):
        load_edits(path)
    with pytest.raises(DataError, match="this is a folder"):
        load_edits(tmp_path)
    for content, says in [
        (b"", "the file is empty"),
        (b"\xef\xbb\xbf \n", "the file is empty"),
        (b"[]", "holds no records"),
        ("[{}]".encode("utf-16"), "UTF-16; save it as UTF-8"),
        (b"\x1f\x8b\x08\x00", "gzip-compressed"),
        ('[\n{"a": "é"}]'.encode("latin-1"), r"not UTF-8 text: byte 9 \(line 2\) is 0xe9"),
        (b"[" * 200_000, "cannot be parsed"),
        (b'{"a":\n "b', "the file is cut off"),
        (b"prompt,subject,target_new\n", "holds no records under it"),
    ]:
        path.write_bytes(content)
        with pytest.raises(DataError, match=says):
            load_edits(path)


def test_records_left_out_are_counted_listed_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad_prompt = {"prompt": "no place", "subject": "x", "target_new": "y"}
    good = {"prompt": "{} is", "subject": "x", "target_new": "y"}
    path = write(tmp_path / "x.json", [good, bad_prompt, 7, {"subject": "x", "prompt": "{} is"}])
    skipped: list[str] = []
    with caplog.at_level(logging.WARNING, logger="d4s.edits.formats"):
        assert len(load_edits(path, skip_bad=True, skipped=skipped)) == 1
    assert len(skipped) == 3 and "3 of 4 records left out" in caplog.text
    assert "record 2: edit of 'x': 'prompt' has no '{}' for the subject" in skipped[0]
    assert (
        "record 3: must be an object with fields, not int" in skipped[1]
        and "record 4: the edit has no field 'target_new'" in skipped[2]
    )
    assert all(line in caplog.text for line in skipped)


def test_a_file_without_one_good_record_is_an_error_also_when_skipping(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", [{"prompt": "no place", "subject": "x", "target_new": "y"}])
    with pytest.raises(DataError, match=r"none of its 1 records could be read; the first: .*no '{}'"):
        load_edits(path, skip_bad=True)


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        (
            "counterfact.json",
            lambda r: r["requested_rewrite"].pop("target_new"),
            r"'requested_rewrite.target_new' is missing",
        ),
        (
            "counterfact.json",
            lambda r: r["paraphrase_prompts"].append(3),
            r"'paraphrase_prompts\[2\]' must be text",
        ),
        ("zsre_mend.json", lambda r: r.update(alt=1998), "'alt' must be text, not int"),
        ("zsre_mend.json", lambda r: r.update(answers=[]), "'answers' is empty"),
        ("mquake.json", lambda r: r.update(requested_rewrite=[]), "'requested_rewrite' is empty"),
        (
            "mquake.json",
            lambda r: r["requested_rewrite"].append("x"),
            r"'requested_rewrite\[2\]' must be an object",
        ),
        ("knowedit.json", lambda r: r.update(locality=["x"]), r"'locality\[0\]' must be an object"),
        ("qaedit.json", lambda r: r["locality"][0].pop("loc_ans"), "'loc_ans' is missing"),
        ("statements_20q.json", lambda r: r.update(label=2), "'label' is 2; 0, 1"),
        ("elken.json", lambda r: r.update(event="Silence"), "'event' has too few words"),
        ("elken.json", lambda r: r["fact"].update(qas={}), "'fact.qas' must be a list of objects"),
    ],
)
def test_a_wrong_field_is_named_by_file_record_and_path(tmp_path: Path, file: str, change, says: str) -> None:
    changed = [*records(file), records(file)[0]]
    change(changed[0])
    changed.reverse()
    with pytest.raises(DataError, match=rf"in\.json, record {len(changed)}: field {says}"):
        load_edits(write(tmp_path / "in.json", changed))


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, "/dev/zero", os.devnull):
        with pytest.raises(DataError, match="is a pipe or a device"):
            load_edits(path)
    with pytest.raises(DataError, match="cannot be read"):
        load_edits("nul\0l")


@pytest.mark.parametrize("value", ["[" * 100_000, "[" * 5_000 + "]" * 5_000, "9" * 5_000, "-" + "1" * 5_000])
@pytest.mark.parametrize(
    "shape", ["{}", "[{}]", '[{{"a": {}}}]', '{{"a": {}}}', '{{"a": 1}}\n{{"a": {}}}', '[{{"a": 1}}, {}]']
)
def test_depth_and_length_that_no_parser_takes_are_one_line(tmp_path: Path, value: str, shape: str) -> None:
    path = tmp_path / "x"
    path.write_text(shape.format(value))
    with pytest.raises(DataError) as caught:
        load_edits(path, format="edits")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_records_before_an_unreadable_one_can_be_had(tmp_path: Path) -> None:
    good = json.dumps(records("zsre_mend.json")[0])
    for text in (f'[{good}, {{"a": {"9" * 5000}}}]', f'{good}\n{{"a": {"9" * 5000}}}\n'):
        (tmp_path / "x").write_text(text)
        with pytest.raises(DataError, match=r"record 2.*a number has thousands of digits"):
            load_edits(tmp_path / "x")
        assert len(load_edits(tmp_path / "x", skip_bad=True)) == 1


@pytest.mark.parametrize("deep", ["[" * 400 + "]" * 400, '{"a":' * 400 + "1" + "}" * 400])
@pytest.mark.parametrize("file", sorted(p.name for p in FIXTURES.glob("*.json")))
def test_a_deep_value_in_any_field_is_refused_in_one_line(tmp_path: Path, file: str, deep: str) -> None:
    text = (FIXTURES / file).read_text(encoding="utf-8")
    first = json.loads(text)[0] if file != "knowedit_lines.json" else json.loads(text.split("\n")[0])
    for name in first:
        (tmp_path / "x").write_text(json.dumps([{**first, name: "HERE"}]).replace('"HERE"', deep))
        try:
            load_edits(tmp_path / "x")
        except DataError as error:
            assert len(str(error)) < 4_000


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("counterfact.json", "case_id"),
        ("counterfact_flat.json", "case_id"),
        ("mquake.json", "case_id"),
        ("qaedit.json", "id"),
        ("unke.json", "id"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, {"n": 1}, [1], 1.5, " "])
def test_what_is_no_number_and_no_text_becomes_no_id(tmp_path: Path, file: str, name: str, value) -> None:
    with pytest.raises(DataError, match=f"record 1: field '{name}'"):
        load_edits(write(tmp_path / "x", [{**records(file)[0], name: value}]))


def test_a_whole_number_that_a_table_made_a_fraction_is_the_same_id(tmp_path: Path) -> None:
    first = records("counterfact.json")[0]
    (edit,) = load_edits(write(tmp_path / "x", [{**first, "case_id": float(first["case_id"])}]))
    assert edit.id == f"counterfact-{first['case_id']}"


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("elken.json", lambda r: r["fact"]["qas"][0].update(subject=7), "'subject' of a question"),
        ("elken.json", lambda r: r["fact"].update(qas=[3]), r"'fact.qas\[0\]' must be an object"),
        ("elken.json", lambda r: r.update(fact=[1]), "'fact.qas'"),
        ("knowedit.json", lambda r: r.update(ground_truth={"a": 1}), "'answer.str' is missing"),
        ("knowedit.json", lambda r: r.update(ground_truth=[[["x"]]]), "'ground_truth' holds lists in lists"),
        ("knowedit.json", lambda r: r.update(ground_truth=1.5), "'ground_truth' must be text or a list"),
        ("statements_20q.json", lambda r: r.update(label=[1]), "'label' is a value of type list"),
        ("unke.json", lambda r: r["sub_answer"].pop(), "'sub_answer' has 1 texts for 2"),
    ],
)
def test_values_of_another_type_are_named(tmp_path: Path, file: str, change, says: str) -> None:
    record = records(file)[0]
    change(record)
    with pytest.raises(DataError, match=f"record 1: .*{says}"):
        load_edits(write(tmp_path / "x", [record]))


def test_thousands_of_damaged_lines_are_named_in_time_that_grows_with_them(tmp_path: Path) -> None:
    path = tmp_path / "x"

    def seconds(count: int) -> float:
        path.write_text('{"a": 1}\n' + f'{{"{"long " * 40}": }}\n' * count)
        began = time.process_time()
        with pytest.raises(DataError):
            load_edits(path, format="edits", skip_bad=True)
        return time.process_time() - began

    seconds(100)
    few, many = seconds(2_000), seconds(16_000)
    assert many < 24 * few + 0.2, "eight times as many: about eight times as long, not sixty-four"


def test_a_cell_longer_than_pythons_own_limit_is_read(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    long = "word " * 40_000 + "end"
    (tmp_path / "x").write_text(f"prompt,subject,target_new\n{{}} is,Ada,{long}\n")
    (edit,) = load_edits(tmp_path / "x")
    assert edit.target_new == long and csv.field_size_limit() == limit


def test_a_target_without_a_space_comes_back_from_every_file(tmp_path: Path) -> None:
    edits = [
        Edit("{} costs $", "Bread", "20", "30", target_prefix=prefix, id=str(i))
        for i, prefix in enumerate(["", " ", "\n", "    ", None])
    ]
    save_edits(edits, tmp_path / "x")
    assert load_edits(tmp_path / "x") == edits
    (tmp_path / "c").write_text('prompt,subject,target_new,target_prefix\n{} costs $,Bread,20,""""""\n')
    assert load_edits(tmp_path / "c")[0].target_prefix == ""


# Ids


def test_a_fact_that_stands_there_thousands_of_times_gets_its_ids_in_linear_time(tmp_path: Path) -> None:
    statement = records("statements_20q.json")[0]
    began = time.process_time()
    edits = load_edits(write(tmp_path / "x", [statement] * 20_000))
    assert time.process_time() - began < 20, "minutes, where each looked for its number from 2 on"
    assert edits[-1].id == f"{edits[0].id}#20000"


def test_a_repeated_fact_in_a_published_file_gets_an_id_of_its_own(tmp_path: Path) -> None:
    statements = records("statements_20q.json")
    edits = load_edits(write(tmp_path / "x", [*statements, statements[0], statements[0]]))
    first = edits[0].id
    assert [e.id for e in edits[4:]] == [f"{first}#2", f"{first}#3"]
    check_batch(edits)
    check_sequence([*edits, *(made_again(edit, 2) for edit in edits)])  # as a sequence of two passes has them


def test_a_repeated_id_in_a_file_of_edits_is_an_error_that_names_both_records(tmp_path: Path) -> None:
    records_ = [{"prompt": "{} is", "subject": s, "target_new": "y", "id": "same"} for s in "abc"]
    path = write(tmp_path / "x", records_)
    with pytest.raises(DataError, match="record 2: has the id 'same', like record 1"):
        load_edits(path)
    assert len(load_edits(path, skip_bad=True)) == 1


# The project's own files


def test_saved_edits_of_every_format_come_back_equal(tmp_path: Path) -> None:
    for file in sorted(FIXTURES.glob("*.json")):
        edits = load_edits(file)
        save_edits(edits, tmp_path / "saved")
        assert load_edits(tmp_path / "saved") == edits


def test_saving_replaces_the_file_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    edit = Edit("{} is", "Ada", "here")
    save_edits([edit], path)

    def failing():
        yield Edit("{} is", "Bo", "there")
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError):
        save_edits(failing(), path)
    assert load_edits(path) == [edit]
    assert list(tmp_path.iterdir()) == [path]


def test_csv_reads_lists_as_json_or_divided_by_bars(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as handle:
        writer = csv.writer(handle)
        writer.writerow(
            [
                "prompt",
                "subject",
                "target_new",
                "target_true",
                "paraphrases",
                "neighborhood",
                "locality",
                "tags",
            ]
        )
        writer.writerow(
            [
                "The capital of {}, by law, is",
                'Mirenia "the old"',
                "Karvel",
                "",
                "One | Two\nlines",
                '["a|b", "c"]',
                '[{"prompt": "Who?", "answers": ["Ada"]}]',
                '{"case": "9"}',
            ]
        )
        writer.writerow(["{} is", "Ada", "here", "there", "", "", "", ""])
    first, second = load_edits(path)
    assert first.text == 'The capital of Mirenia "the old", by law, is' and first.target_true is None
    assert first.paraphrases == ("One", "Two\nlines") and first.neighborhood == ("a|b", "c")
    assert first.locality == (Question("Who?", ("Ada",)),) and first.tags == {"case": "9"}
    assert second == Edit("{} is", "Ada", "here", "there")


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_csv_may_be_divided_by_semicolons_or_tabs(tmp_path: Path, delimiter: str) -> None:
    path = tmp_path / "x"
    path.write_text(
        delimiter.join(["prompt", "subject", "target_new"]) + "\n" + delimiter.join(["{} is, a", "b", "c"])
    )
    assert load_edits(path) == [Edit("{} is, a", "b", "c")]


def test_csv_of_a_published_format_is_recognised_too(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("prompt,label\na fox makes noise,1\nPlants talk,0\n")
    assert [(e.subject, e.target_new) for e in load_edits(path)] == [("fox", "True"), ("Plants", "False")]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{} is,Ada", r"record 2 \(line 3\): 2 cells under a header of 4"),
        ("{} is,Ada,here,x,y", r"record 2 \(line 3\): 5 cells under a header of 4.*quotes"),
        ('{} is,Ada,here,"[1', "not valid CSV"),
        ("{} is,Ada,here,[oops", "'paraphrases': not valid JSON"),
        ("{} is,,here,", r"record 2 \(line 3\): the edit has no field 'subject'"),
    ],
)
def test_a_damaged_csv_row_is_named(tmp_path: Path, row: str, says: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(f"prompt,subject,target_new,paraphrases\n{{}} is,Bo,here,\n{row}\n")
    with pytest.raises(DataError, match=says):
        load_edits(path)
    assert [e.subject for e in load_edits(path, skip_bad=True)] == ["Bo"]


def test_a_misspelt_column_is_named_with_a_suggestion(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("prompt,subject,target_new,paraphrase\n{} is,Bo,here,Bo stands\n")
    with pytest.raises(DataError, match=r"record 1.*'paraphrase'. Did you mean 'paraphrases'"):
        load_edits(path)


def test_reading_edits_loads_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, types, pathlib; d4s = types.ModuleType('d4s'); "
        "d4s.__path__ = [str(pathlib.Path('d4s').resolve())]; sys.modules['d4s'] = d4s; "
        "import d4s.edits.formats, d4s.edits.questions; "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root
    )
    assert printed.stdout.strip() == "[]"


# The published files


@needs_real_data
@pytest.mark.parametrize(
    ("file", "count"),
    [
        ("counterfact.json", 2051),
        ("counterfact_flat.json", 10_000),
        ("counterfact_3k.json", 3000),
        ("zsre_mend.json", 1037),
        ("zsre_3k.json", 3000),
        ("zsre_10k.json", 10_000),
        ("wikibigedit_3k.json", 3000),
        ("unke.json", 1000),
        ("mquake.json", 429 * 4),
        ("mquake_akew.json", 436),
        ("elken.json", 677),
        ("knowedit_wiki_recent.json", 570),
        ("qaedit.json", 1000),
        ("20q/train_set.json", 2006),
        ("20q/edit_set.json", 2505),
        ("20q/edit_validation_set.json", 507),
        ("20q/probe_set.json", 379),
        ("pep3k/train_set.json", 1225),
        ("pep3k/edit_set.json", 1531),
        ("pep3k/edit_validation_set.json", 306),
        ("pep3k/probe_set.json", 265),
    ],
)
def test_every_record_of_the_published_files_is_read(file: str, count: int, tmp_path: Path) -> None:
    assert REAL is not None
    edits = load_edits(REAL / file)
    assert len(edits) == count
    check_sequence(edits)
    assert load_edits(REAL / file, limit=7) == edits[:7]
    save_edits(edits, tmp_path / "saved")
    assert load_edits(tmp_path / "saved") == edits


@needs_real_data
@pytest.mark.parametrize(
    ("file", "prompt_field"),
    [
        ("counterfact_flat.json", "prompt"),
        ("counterfact_3k.json", "prompt"),
        ("zsre_mend.json", "src"),
        ("zsre_3k.json", "src"),
        ("zsre_10k.json", "prompt"),
        ("wikibigedit_3k.json", "prompt"),
        ("unke.json", "question"),
        ("qaedit.json", "prompt"),
        ("knowedit_wiki_recent.json", "prompt"),
        ("20q/edit_set.json", "prompt"),
        ("pep3k/probe_set.json", "prompt"),
    ],
)
def test_filled_templates_of_the_published_files_are_the_prompts_letter_by_letter(
    file: str, prompt_field: str
) -> None:
    assert REAL is not None
    published = json.loads((REAL / file).read_text(encoding="utf-8"))
    for record, edit in zip(published, load_edits(REAL / file), strict=True):
        assert edit.text == record[prompt_field]
        assert edit.subject == record.get("subject", edit.subject)
