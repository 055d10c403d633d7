"""What stands between prompt and target: the rule, who may overrule it, and that all parts of an edit keep to it."""

from __future__ import annotations

import math

import pytest
import torch
from support.tiny import tiny_model, tiny_tokenizer

from d4s.edits import Edit, Question
from d4s.edits.spacing import continuation, joint, opened
from d4s.errors import EditError
from d4s.locate.keys import subject_rows
from d4s.locate.request_rows import request_of
from d4s.measure.metrics import Baseline, evaluate, take_baseline
from d4s.methods.answers import answer_rows, losses_in_batches
from d4s.models.generation import Written, generate, says
from d4s.models.prompts import prompt_and_target_ids, subject_row
from d4s.models.scoring import score


@pytest.mark.parametrize(
    ("prompt", "target", "between"),
    [
        ("The capital of France is", "Paris", " "),
        ("assistant\n", "Rome", ""),
        ("name:\t", "Rome", ""),
        ("def f():\n    ", "return 1", ""),
        ("It costs $", "20", ""),
        ("Es kostet €", "20", ""),
        ("Its other name (", "Lutetia", ""),
        ("Its other name is “", "Lutetia", ""),
        ('Its other name is "', "Lutetia", ""),
        ('The word "Lutetia"', "names", " "),  # the second of two marks closes
        ("Its address is http://", "x.com", ""),
        ("The rivers -", "Seine", " "),
        ("他出生于", "1990年", ""),
        ("这本书的名字是", "“红楼梦”", ""),
        ("ราคา", "100 บาท", " "),
        ("The share is 20", "%", ""),
        ("It has 20", "°C", ""),
        ("The end", ".", ""),
        ("Paris", ", France", ""),
        ("The framework is", ".NET", " "),
        ("The temperature is", "-3", " "),
        ("The first letter is", "(a)", " "),
        ("法国的首都是", "巴黎", ""),
        ("フランスの首都は", "パリ", ""),
        ("法国(France)的首都是", "巴黎", ""),
        ("问：法国的首都？答：", "巴黎", ""),
        ("เมืองหลวงของฝรั่งเศสคือ", "ปารีส", ""),
        ("ເມືອງຫຼວງ", "ປາຣີ", ""),
        ("រាជធានី", "ប៉ារីស", ""),
        ("မြို့တော်", "ပါရီ", ""),
        ("The Japanese name of Tokyo is", "東京", " "),
        ("他出生于", "Paris", " "),
        ("프랑스의 수도는", "파리", " "),
        ("Столица Франции —", "Париж", " "),
    ],
)
def test_one_space_but_where_none_belongs(prompt: str, target: str, between: str) -> None:
    assert joint(prompt, target) == between
    assert continuation(prompt, target) == between + target


@pytest.mark.parametrize("prefix", ["", " ", "\n", "    ", " = "])
@pytest.mark.parametrize("prompt", ["The capital is", "assistant\n", "It costs $", "法国的首都是"])
def test_what_an_edit_says_comes_before_the_rule(prompt: str, prefix: str) -> None:
    assert joint(prompt, "巴黎", prefix) == prefix
    assert continuation(prompt, ("巴黎", prefix)) == prefix + "巴黎"


@pytest.mark.parametrize(
    ("text", "prefix", "kept"),
    [
        ("The capital is ", None, "The capital is"),
        ("The capital is   ", " ", "The capital is"),
        ("The capital is ", "", "The capital is "),  # no space of the target's own that would double it
        ("The capital is ", "\n", "The capital is "),
        ("assistant\n", None, "assistant\n"),
        ("assistant\n\n", None, "assistant\n\n"),
        ("name:\t", None, "name:\t"),
        ("if x:\n    ", None, "if x:\n    "),  # an indentation
        ("東京\u3000", None, "東京\u3000"),
    ],
)
def test_only_spaces_that_would_double_are_cut(text: str, prefix: str | None, kept: str) -> None:
    assert opened(text, prefix) == kept
    edit = Edit("{} " + text, "Ada", "x", "y", paraphrases=[text], neighborhood=[text], target_prefix=prefix)
    assert (edit.prompt, edit.paraphrases, edit.neighborhood) == ("{} " + kept, (kept,), (kept,))
    assert Question(text, ("x",), target_prefix=prefix).prompt == kept


def test_a_target_prefix_must_be_text() -> None:
    with pytest.raises(EditError, match="'target_prefix' must be text or None, not int"):
        Edit("{} is", "Ada", "x", target_prefix=3)  # type: ignore[arg-type]
    with pytest.raises(EditError, match="'target_prefix' holds half of a surrogate pair"):
        Edit("{} is", "Ada", "x", target_prefix="\ud800")


def test_edits_that_differ_in_what_stands_before_the_target_are_two() -> None:
    one, other = (Edit("{} costs", "Bread", "20", target_prefix=prefix) for prefix in (None, ""))
    assert one.id != other.id and one != other


def spelled(ids) -> str:
    return tiny_tokenizer().decode(list(ids))


@pytest.mark.parametrize(
    ("prompt", "prefix", "between"),
    [
        ("The price of {} is $", None, ""),
        ("The price of {} is", "", ""),
        ("Q: {}\nA:\n", None, ""),
        ("{} is", None, " "),
    ],
)
def test_edit_key_target_and_answer_rows_all_read_the_same_text(prompt, prefix, between) -> None:
    tokenizer = tiny_tokenizer()
    edit = Edit(prompt, "Lyon", "20 and I", "30", target_prefix=prefix)
    text = edit.text + between
    asked, target = prompt_and_target_ids(tokenizer, edit.text, edit.target(edit.target_new))
    assert spelled(asked) == f"<s>{edit.text}" and spelled(target) == f"{between}20 and I"

    row = subject_row(tokenizer, edit.prompt, edit.subject, edit.target(edit.target_new))
    assert spelled(row.ids) == f"<s>{text}20 and I"
    request = request_of(tokenizer, edit, ["You. "])
    for beginning, before, after, wanted in zip(
        ("", "You. "), request.before, request.after, request.target, strict=False
    ):
        assert spelled((*before, *after, wanted[-1])) == f"<s>{beginning}{text}20 and I"
        assert spelled(wanted) == f"{between}20 and I"
    keys = subject_rows(tokenizer, [edit])
    assert (
        keys is not None
        and row.subject_last == subject_row(tokenizer, edit.prompt, edit.subject).subject_last
    )
    answers = answer_rows(tokenizer, [edit], torch.device("cpu"))
    assert spelled(answers.wanted.tolist()) == f"{between}20 and I"


@pytest.mark.parametrize("prefix", ["", "\n", None])
def test_the_metric_reads_what_the_edit_says(seed: int, prefix: str | None) -> None:
    """Against the model's own loss of the text, written out by hand."""
    model, tokenizer = tiny_model("llama", seed=seed), tiny_tokenizer()
    edit = Edit(
        "The price of {} is $",
        "Lyon",
        "20",
        "30",
        paraphrases=["Lyon costs $"],
        neighborhood=["Manila costs $"],
        locality=[Question("France is", ("Paris",), "other", target_prefix=prefix)],
        target_prefix=prefix,
    )
    between = prefix or ""

    def nll(text: str, target: str) -> float:
        before = tokenizer(text)["input_ids"]
        behind = tokenizer(target, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            log_p = model(torch.tensor([before + behind])).logits[0].log_softmax(-1)
        places = range(len(before) - 1, len(before) + len(behind) - 1)
        return -sum(log_p[p, t].item() for p, t in zip(places, behind, strict=True)) / len(behind)

    baseline = take_baseline(model, tokenizer, [edit])
    (row,) = evaluate(model, tokenizer, [edit], baseline=baseline).rows
    assert row["nll_new"] == pytest.approx(nll(edit.text, f"{between}20"), abs=1e-4)
    assert row["nll_true"] == pytest.approx(nll(edit.text, f"{between}30"), abs=1e-4)
    assert row["paraphrase_nll_new"] == pytest.approx([nll("Lyon costs $", f"{between}20")], abs=1e-4)
    assert row["neighborhood_nll_true"] == pytest.approx([nll("Manila costs $", f"{between}30")], abs=1e-4)
    assert row["locality"] == 1
    joined = f"{' ' if prefix is None else prefix}Paris"
    target = "Paris" if prefix is None else ("Paris", prefix)
    assert baseline("France is", target).nll == pytest.approx(nll("France is", joined), abs=1e-4)


def test_a_baseline_keeps_targets_that_say_what_stands_before_them(tmp_path, seed: int) -> None:
    model, tokenizer = tiny_model("llama", seed=seed), tiny_tokenizer()
    edits = [
        Edit(
            "{} costs",
            "Lyon",
            "20",
            kind="question",
            locality=[Question("I", ("Paris",), "", prefix)],
            id=str(i),
        )
        for i, prefix in enumerate(("", " ", None, "\n"))
    ]
    baseline = take_baseline(model, tokenizer, edits)
    assert set(baseline.answers) == {("I", "Paris"), *(("I", ("Paris", p)) for p in ("", " ", "\n"))}
    baseline.save(tmp_path / "b.json")
    assert Baseline.load(tmp_path / "b.json") == baseline


def test_scores_of_one_prompt_with_and_without_a_space_are_two(seed: int) -> None:
    model, tokenizer = tiny_model("gpt2", seed=seed), tiny_tokenizer()
    ((ruled, spaced, bare),) = score(model, tokenizer, [("You", ("and", ("and", " "), ("and", "")))])
    assert ruled == spaced and bare.target != spaced.target and math.isfinite(bare.nll)
    edits = [Edit("{}", "You", "and", target_prefix=p, kind="question") for p in (None, "")]
    from d4s.models.architectures import Anatomy

    losses = losses_in_batches(Anatomy(model), tokenizer, edits, lambda rows, losses: None)
    assert losses.tolist() == pytest.approx([ruled.nll, bare.nll], abs=1e-4)


def test_the_model_writes_on_from_the_whole_prompt(seed: int) -> None:
    model, tokenizer = tiny_model("llama", seed=seed), tiny_tokenizer()
    edit = Edit("{}\n", "You", "and", kind="question")
    (written,) = generate(model, tokenizer, [edit.text], max_new_tokens=1)
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer("You\n")["input_ids"]])).logits
    assert written.ids in ((logits[0, -1].argmax().item(),), ())  # () where it is the end token


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("%", "%", True),
        ("% of it", "%", False),
        ("巴黎。它在", "巴黎", True),
        ("巴黎市。", "巴黎", False),
        ("。", "巴黎", False),
    ],
)
def test_answers_without_words_or_spaces_are_compared_too(text: str, answer: str, right: bool) -> None:
    assert says(Written((), text, True), (answer,)) is right
