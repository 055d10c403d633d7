"""Damaged inputs by the thousand: a reader gives what it reads or a D4SError in a few words, and never hangs.

Every file that the project reads is a row in READERS; a further one joins by a row. Inputs are mutated afresh in
every run: the seed is printed, and D4S_FUZZ_SEED=… repeats it.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.hanging import ends_within

from d4s.edits import Edit, Question
from d4s.edits.formats import load_edits, save_edits
from d4s.errors import D4SError
from d4s.journal.changes import Change
from d4s.journal.edits_card import read_edits_card, write_edits_card
from d4s.journal.patch import export_patch, read_patch
from d4s.locate.covariance import Covariance
from d4s.locate.kept_targets import KeptTargets
from d4s.locate.targets import Targets
from d4s.measure.metrics import Baseline, Evaluation, Metric
from d4s.methods import METHODS, Preset
from d4s.methods.imported import import_config, summary
from d4s.methods.preset import load_preset
from d4s.models.scoring import Score
from d4s.sequence.comparison_folder import ComparisonFolder
from d4s.sequence.record import Record

FIXTURES = Path(__file__).parent / "support" / "fixtures"
MUTATED = 1_000  # inputs a reader
LONGEST = 2.0  # seconds of the processor that one of them may take
HANGS = 300  # seconds by the clock after which a reader's inputs count as hanging, on a machine however busy
WORDY = 6_000  # characters that an error may have: a format that is not known lists all that are


class Reader(NamedTuple):
    """make: writes a whole input to the path; read: reads it; guarded: by a digest, so a changed byte is an error"""

    make: Callable[[Path], object]
    read: Callable[[Path], object]
    guarded: bool = False


def _small(name: str) -> Callable[[Path], object]:
    """The first two records of a fixture, so that mutations meet all of its fields."""

    def make(path: Path) -> None:
        records = json.loads((FIXTURES / name).read_text(encoding="utf-8"))[:2]
        path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")

    return make


def _edits(path: Path) -> object:
    """Whatever is read can be written and read again."""
    edits = load_edits(path)
    save_edits(edits, path.with_name("again"))
    assert load_edits(path.with_name("again")) == edits
    return edits


def _lines(path: Path) -> None:
    question = Question("Who?", ("Ada", "Bo"), "other", "")
    edit = Edit(
        "{} is", "José", "here", "there", paraphrases=["Ada stands"], locality=[question], tags={"case": "1"}
    )
    save_edits([edit, Edit("{} costs $", "Brot", "20", target_prefix="", kind="question")], path)


def _table(path: Path) -> None:
    path.write_text(
        "prompt,subject,target_new,paraphrases,locality,tags,id\n"
        '"{} is, a",Ada,here,One | Two,"[{""prompt"": ""Who?"", ""answers"": [""Ada""]}]","{""case"": ""9""}",1\n'
        '{} was,Bo,there,"[""a""]",,,2\n'
    )


def _result(path: Path) -> None:
    row = {"step": 1, "average": 0.25, "l1_growth": 0.5, "edit_seconds": 2.0, "tasks": float("nan")}
    metrics = {"efficacy": Metric(0.75, 0.5, 1.0, 4)}
    evaluation = Evaluation([{"id": "a", "kind": "question", "nll": [0.5, 1.5]}], metrics, ("a note",))
    made = [{"id": "é", "step": 1, "last_probability": 0.875}]
    config = {"layers": [4, 5], "target": {"steps": 4}}
    Record("d4s", config, [row], made, [evaluation], "edit 2: no", {"prior_weight": 3.5}).save(path)


def _load_result(path: Path) -> object:
    """What is read can be used: its table, its figures, its file."""
    record = Record.load(path)
    record.summary(), record.to_frame(), record.forgetting(), [e.summary() for e in record.evaluations]
    record.save(path.with_name("again"))
    return record


def _baseline(path: Path) -> None:
    answers = {("a", "b"): Score(0.5, (1, 2), (1, 3)), ("é", ("b", "")): Score(1.5, (1,), (1,))}
    Baseline(answers).save(path)


def _load_baseline(path: Path) -> object:
    baseline = Baseline.load(path)
    baseline.save(path.with_name("again"))
    return baseline


SETTINGS = {"weights": "0a1b2c", "edits": ["a", "b"], "batch_size": 1, "count": None, "shuffle": True}


def _covariance(path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(9, 6, generator=generator)
    Covariance({1: keys.T @ keys, 4: keys.T @ keys}, 9, fingerprint="ab", corpus="cd").save(path)


def _targets(path: Path) -> None:
    kept = KeptTargets({"model": "ab", "layer": "4"})
    edits = [Edit("{} is", "José", "here"), Edit("{} costs $", "Brot", "20", target_prefix="")]
    kept.add(edits, Targets(torch.ones(2, 3), torch.zeros(2, 3), torch.zeros(2), torch.ones(2)))
    kept.save(path)


def _patch(path: Path) -> None:
    """One weight as factors, one dense."""
    generator = torch.Generator().manual_seed(0)
    base, key = torch.randn(6, 4, generator=generator), torch.randn(1, 4, generator=generator)
    few = Change("h.1.weight", base, base + torch.ones(6, 1) @ key)
    full = Change("h.2.weight", base, torch.randn(6, 4, generator=generator), transposed=True)
    export_patch([few, full], path, fingerprint="ab", edits=[Edit("{} is", "José", "here", id="1")])


def _card(path: Path) -> None:
    facts = dict(base_fingerprint="ab", base_name="m", method="d4s", when="2026-01-01T00:00:00+00:00")
    write_edits_card(path.parent, [Edit("{} is", "José", "here", paraphrases=["a"])], **facts)


def _preset(path: Path) -> None:
    facts = {"type": "gpt2", "fingerprint": "ab", "blocks": 3, "width": 32, "vocabulary": 320}
    measured = {"because": "é", "settings": [{"label": "own", "written": 0.5, "kept": None}]}
    Preset(
        method="d4s",
        fields={"layers": [0, 1], "prior_weight": 3.5, "clamp": 2.0, "contexts": 1, "anchor": "base"},
        model=facts,
        measured=measured,
        versions={"d4s": "1"},
        probes=(("1", "José is"), ("2", "Ada was")),
    ).save(path)


def _load_preset(path: Path) -> object:
    """What is read can be put into a configuration, or is refused as one, and written again."""
    preset = load_preset(path)
    preset.notes_on([Edit("{} is", "José", "here")])
    preset.save(path.with_name("again"))
    return preset.applied(METHODS[preset.method](layers=(0,)))


HYPERPARAMETERS = {
    "alg_name": "R-ROME",
    "layers": [1],
    "v_num_grad_steps": 7,
    "v_lr": "3e-1",
    "mom2_adjustment": False,
    "context_template_length_params": [[4, 5], [6, 5]],
    "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj",
    "inner_params": ["transformer.h[1].mlp.c_proj.weight"],
}


def _import(path: Path) -> object:
    """What is read can be told, and is a preset that can be written and read."""
    found = import_config(path)
    list(summary(found))
    found.preset.save(path.with_name("again"))
    return load_preset(path.with_name("again"))


READERS = {
    **{
        f"edits: {path.stem}": Reader(_small(path.name), _edits)
        for path in sorted(FIXTURES.glob("*.json"))
        if path.stem != "knowedit_lines"
    },
    "edits: lines": Reader(_lines, _edits),
    "edits: table": Reader(_table, _edits),
    "result.json": Reader(_result, _load_result, guarded=True),
    "baseline.json": Reader(_baseline, _load_baseline, guarded=True),
    "covariance.safetensors": Reader(_covariance, Covariance.load, guarded=True),
    "targets.safetensors": Reader(_targets, KeptTargets.load, guarded=True),
    "patch.safetensors": Reader(_patch, read_patch, guarded=True),
    "d4s_edits.json": Reader(_card, lambda path: read_edits_card(path.parent), guarded=True),
    "preset.json": Reader(_preset, _load_preset, guarded=True),
    "imported.json": Reader(lambda path: path.write_text(json.dumps(HYPERPARAMETERS)), _import),
    "imported.yaml": Reader(
        lambda path: path.write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in HYPERPARAMETERS.items())),
        _import,
    ),
    "settings.json": Reader(
        lambda path: path.write_text(json.dumps(SETTINGS, indent=1)),
        lambda path: ComparisonFolder(path.parent, SETTINGS),
    ),
}

# What stands in for a value of a JSON text, or is put into any text.
_ODD = (
    *(
        "null",
        "true",
        "-1",
        "1e999",
        "NaN",
        "[]",
        "{}",
        '""',
        '" "',
        "3.5",
        "12345678901234567890",
        "[[[[[]]]]]",
    ),
    *("9" * 5_000, "9" * 400, "[" * 3_000, "[" * 500 + "]" * 500, '{"a":' * 500 + "1" + "}" * 500),
    *(
        '"\\ud800"',
        '"{}"',
        '"{} {}"',
        '"\\u0000"',
        '"' + "x" * 50_000 + '"',
        '"e\\u0301"',
        "\ufeff",
        "\u2028",
    ),
    *('{"str": "x"}', '[{"prompt": "x"}]', "[1]", '["a", ["b"]]', '"~2"', "\r\n", "\t", ",", '"', "\\", "\0"),
)


def flipped(data: bytes, draw: random.Random) -> bytes:
    """One bit."""
    changed = bytearray(data)
    changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _bytes(data: bytes, draw: random.Random) -> bytes:
    """A stretch lost, doubled, replaced, or the rest cut off."""
    begin, end = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    end = min(end, begin + draw.choice((1, 2, 8, 64)))
    put = draw.choice((b"", data[begin:end] * 2, draw.randbytes(end - begin), draw.choice(_ODD).encode()))
    return data[:begin] if draw.random() < 0.1 else data[:begin] + put + data[end:]


def _value(data: bytes, draw: random.Random) -> bytes:
    """One value of a JSON text, at whatever depth, replaced, left out or renamed."""
    try:
        whole = json.loads(data)
    except (ValueError, RecursionError):
        return _bytes(data, draw)
    if not isinstance(whole, (dict, list)) or not whole:
        return _bytes(data, draw)
    if isinstance(whole, dict) and draw.random() < 0.8:
        whole.pop("digest", None)  # or nothing behind the check of it would ever be met
    holder: Any = whole
    while True:
        places = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        place = draw.choice(places)
        if not isinstance(holder[place], (dict, list)) or not holder[place] or draw.random() < 0.25:
            break
        holder = holder[place]
    kind = draw.random()
    if kind < 0.15:
        del holder[place]
    elif kind < 0.25 and isinstance(holder, dict):
        holder[f"{place}x"] = holder.pop(place)
    elif kind < 0.35:
        holder[place] = [holder[place]]
    else:
        holder[place] = "HERE"
    return (
        json.dumps(whole, ensure_ascii=False)
        .replace('"HERE"', draw.choice(_ODD), 1)
        .encode("utf-8", "replace")
    )


def mutated(data: bytes, draw: random.Random) -> bytes:
    kinds = (flipped, _bytes, _value, _value)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        data = draw.choice(kinds)(data, draw) if data else data
    return data


@pytest.fixture(autouse=True)
def _not_for_ever() -> Iterator[None]:
    with ends_within(HANGS, "an input"):
        yield


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_input_is_read_or_refused_in_words(tmp_path: Path, draw: random.Random, name: str) -> None:
    reader = READERS[name]
    path = tmp_path / name.rpartition(" ")[2]
    reader.make(path)
    reader.read(path)
    whole = path.read_bytes()
    refused = 0
    for number in range(MUTATED):
        data = mutated(whole, draw)
        path.write_bytes(data)
        began = time.process_time()
        try:
            reader.read(path)
        except D4SError as error:
            refused += 1
            assert 0 < len(str(error)) < WORDY, f"input {number}: an error of {len(str(error))} characters"
        except Exception as error:
            pytest.fail(f"input {number}: {type(error).__name__}: {error}\n{data[:400]!r}")
        assert time.process_time() - began < LONGEST, f"input {number} took too long: {data[:400]!r}"
    assert refused > MUTATED // 20, "mutations that nothing objects to test nothing"


@pytest.mark.parametrize("name", [name for name, reader in READERS.items() if reader.guarded])
def test_no_flipped_bit_is_read_where_there_is_a_digest(
    tmp_path: Path, draw: random.Random, name: str
) -> None:
    reader = READERS[name]
    path = tmp_path / name
    reader.make(path)
    whole = path.read_bytes()
    for _ in range(MUTATED):
        path.write_bytes(data := flipped(whole, draw))
        with pytest.raises(D4SError):
            reader.read(path)
            pytest.fail(f"read although a bit was flipped: {data!r}")
