"""Sums on the CPU beside a model that is elsewhere: the bits of one place, and who decides where they are."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.second_device import FIRST, SECOND, Elsewhere, TwoDevices, plain_ops, spread
from support.tiny import TEXTS, tiny_model, tiny_tokenizer
from support.workbench import STRONG, SUBJECT_LAST

from d4s.change.closed_form import ClosedForm, Prior
from d4s.errors import ConfigError, D4SError, DataError, EditingInterrupted
from d4s.journal.journal import Journal
from d4s.locate.covariance import estimate_covariance
from d4s.methods import Editor, Workbench, method_for, sums_place
from d4s.methods.base import LayerSize
from d4s.progress import amount
from d4s.sequence.observers import Observer
from d4s.sequence.run import edit_sequence

pytest.importorskip("accelerate")
LAYERS = {"layers": (1, 2), "steps": 2}
CONFIGS = {
    "d4s": LAYERS,
    "d4s, once": LAYERS | {"residual": "once"},
    "d4s, refined and projected": LAYERS | {"refine_looks": 1, "delta_projection": (0.5, 0.5)},
    "d4s, a key a context": LAYERS | {"context_keys": "each", "contexts": 1},
    "memit-seq": LAYERS,
    "memit": LAYERS,
    "alphaedit": LAYERS,
    "lyaplock": LAYERS,
    "rome": {"layers": (1,), "steps": 2},
}
AGAIN = replace(SUBJECT_LAST[0], target_new="Lyon", id="again")


def plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.held if isinstance(tensor, Elsewhere) else tensor


def bench_on(model: Any, seed: int, **options: Any) -> Workbench:
    tokenizer = tiny_tokenizer()
    covariance = estimate_covariance(
        model, tokenizer, TEXTS * 2, tokens=150, dtype=torch.float64, progress=False
    )
    return Workbench(model, tokenizer, covariance=covariance, seed=seed, **options)


def away(monkeypatch: pytest.MonkeyPatch, seed: int, model_type: str = "llama", **changes: Any) -> Any:
    """A tiny model with every block on the second device."""
    model = tiny_model(model_type, seed, attn_implementation="eager", **changes)
    spread(model, [*model.model.layers, model.model.norm], monkeypatch)
    return model


def edited(name: str, bench: Workbench, **more: Any) -> tuple[Editor, dict[str, torch.Tensor]]:
    """The editor, and the weights and its snapshot after two steps; of d4s the second edits the same prompt again."""
    own = name.split(",")[0]
    method = method_for(own, bench.anatomy, STRONG[own] | CONFIGS[name] | more)
    editor = method.settled(bench, SUBJECT_LAST).editor(bench)
    edits = (SUBJECT_LAST[0], AGAIN if own == "d4s" else SUBJECT_LAST[1])
    editor.announce(edits)
    for edit in edits:
        editor.edit([edit])
    found = {n: plain(p.detach()).clone() for n, p in bench.model.named_parameters()}
    state = editor.snapshot()
    editor.restore()
    editor.resume_(state)
    found |= {f"resumed.{n}": plain(p.detach()).clone() for n, p in bench.model.named_parameters()}
    return editor, found | {f"state.{key}": plain(value) for key, value in state.items()}


def priors_of(editor: Any) -> list[torch.Tensor]:
    held = getattr(editor, "_priors", {}) | ({0: editor._prior} if hasattr(editor, "_prior") else {})
    return [prior.matrix for prior in held.values()]


@pytest.mark.parametrize("name", CONFIGS)
def test_sums_on_the_cpu_give_the_bits_of_one_place(name, seed, monkeypatch):
    """The same operations in the same order, by the same processor: nothing may differ."""
    plain_ops(monkeypatch)
    _, whole = edited(name, bench_on(tiny_model("llama", seed, attn_implementation="eager"), seed))
    model = away(monkeypatch, seed)
    with TwoDevices():
        bench = bench_on(model, seed, sums_on="cpu")
        editor, found = edited(name, bench)
        assert all(bench.anatomy.device_of(layer) == SECOND for layer in editor.weights.layers)
        assert priors_of(editor) and not any(isinstance(one, Elsewhere) for one in priors_of(editor))
    wrong = [key for key in whole if not torch.equal(found[key], whole[key])]
    assert found.keys() == whole.keys() and not wrong


def test_experts_have_their_rows_on_the_cpu_with_the_bits_of_one_place(seed, monkeypatch):
    plain_ops(monkeypatch)
    one_layer = {"layers": (1,), "steps": 1}
    model = tiny_model("mixtral", seed, attn_implementation="eager")
    _, whole = edited("d4s", bench_on(model, seed), **one_layer)
    model = away(monkeypatch, seed, "mixtral")
    with TwoDevices():
        editor, found = edited("d4s", bench_on(model, seed, sums_on="cpu"), **one_layer)
        assert isinstance(editor.weights.base[1], Elsewhere)
        assert not isinstance(editor.closed_form.of_experts[1].factor, Elsewhere)
    assert found.keys() == whole.keys() and all(torch.equal(found[key], whole[key]) for key in whole)


def test_a_journal_goes_on_wherever_the_sums_are(seed, monkeypatch, tmp_path):
    """A step with the sums on the device, one with them on the CPU, one on the device again, each a new process's."""
    plain_ops(monkeypatch)
    model = tiny_model("llama", seed, attn_implementation="eager")
    covariance = bench_on(model, seed).covariance((1, 2))
    edits = (*SUBJECT_LAST, AGAIN)
    options: dict[str, Any] = dict(config=STRONG["d4s"] | LAYERS, covariance=covariance, original=False)
    options |= dict(progress=False, neighborhood_limit=0)
    edit_sequence(model, tiny_tokenizer(), edits, **options)
    whole = {n: p.detach().clone() for n, p in model.named_parameters()}
    options["journal"] = tmp_path / "journal"
    for number, place in enumerate(("device", "cpu", "device"), start=1):
        model = away(monkeypatch, seed)
        with TwoDevices():
            try:
                found = edit_sequence(
                    model, tiny_tokenizer(), edits, **options, sums_on=place, observers=[Stopping(number)]
                )
            except EditingInterrupted as error:
                assert number < 3 and "enough" in str(error)
                found = error.result
            matrices = priors_of(found.editor)
            assert len(found.edits_table) == number
            assert len(matrices) == 2 and {isinstance(one, Elsewhere) for one in matrices} == {place != "cpu"}
    assert all(torch.equal(plain(p.detach()), whole[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("place", ["device", "cpu"])
def test_what_a_journal_edits_anew_has_its_sums_where_it_is_told(place, seed, monkeypatch, tmp_path):
    plain_ops(monkeypatch)
    model = tiny_model("llama", seed, attn_implementation="eager")
    covariance, unedited = bench_on(model, seed).covariance((1, 2)), copy.deepcopy(model.state_dict())
    options: dict[str, Any] = dict(config=STRONG["d4s"] | LAYERS, covariance=covariance, progress=False)
    edit_sequence(model, tiny_tokenizer(), SUBJECT_LAST, **options, journal=tmp_path / "there")
    model.load_state_dict(unedited)
    shutil.copytree(tmp_path / "there", tmp_path / "here")
    told: dict[str, Any] = dict(tokenizer=tiny_tokenizer(), covariance=covariance)
    (first, *_) = (edit.id for edit in Journal(tmp_path / "here").edits)
    Journal(tmp_path / "here").revise(first, "Lyon", model=model, **told)
    with TwoDevices():
        journal = Journal(tmp_path / "there")
        places: list[bool] = []
        plain_editor = Journal._editor

        def watched(self: Journal, *arguments: Any) -> Editor:
            editor = plain_editor(self, *arguments)
            places.extend(isinstance(one, Elsewhere) for one in priors_of(editor))
            return editor

        monkeypatch.setattr(Journal, "_editor", watched)
        told |= dict(sums_on=place)
        assert journal.verify(model=away(monkeypatch, seed), **told).sound
        journal.revise(first, "Lyon", model=away(monkeypatch, seed), **told)
        assert all(
            torch.equal(plain(weight), wanted)
            for weight, wanted in zip(
                journal.weights().values(), Journal(tmp_path / "here").weights().values(), strict=True
            )
        )
        journal.consolidate(model=away(monkeypatch, seed), **told)
        assert len(places) == 6 and set(places) == {place == "device"}


class Stopping(Observer):
    """Breaks a sequence off after so many edits, unless they are all."""

    def __init__(self, edits: int) -> None:
        self.edits = edits

    def step(self, result: Any, batch: Any) -> None:
        if len(result.edits_table) == self.edits < 3:
            raise DataError("enough")


def test_what_a_gpus_generator_left_in_a_snapshot_is_taken(seed):
    torch.manual_seed(seed)
    rows = torch.randn(70, 2, 6, dtype=torch.float64)

    def fed(form: ClosedForm, some: torch.Tensor) -> ClosedForm:
        for residual, key in some:
            form.add_(residual[None, :4], key[None], 0)
            form.delta(0)
        return form

    one = fed(ClosedForm({0: Prior.identity(6)}, 4), rows[:9])
    state = one.snapshot() | {"0.generator": torch.zeros(16, dtype=torch.uint8)}
    other = ClosedForm({0: Prior.identity(6)}, 4)
    other.resume_(state)
    assert torch.equal(fed(one, rows[9:]).delta(0), fed(other, rows[9:]).delta(0))
    with pytest.raises(D4SError, match="generator"):
        other.resume_(state | {"0.generator": torch.zeros(17, dtype=torch.uint8)})


# Who decides


@pytest.fixture
def rule(seed, monkeypatch):
    """(workbench with its blocks on the second device, method, bytes that are certain to be held there, set free)"""
    bench = bench_on(tiny_model("llama", seed), seed, progress=True)
    monkeypatch.setattr(bench.anatomy, "device_of", lambda layer: SECOND)
    method = method_for("d4s", bench.anatomy, STRONG["d4s"] | LAYERS)
    sizes = {layer: LayerSize.of(bench.anatomy, layer) for layer in (1, 2)}
    needed = sum(sums_place.held(method, sizes, dict.fromkeys(sizes, "cpu:0"), 5)["cpu:0"].values())

    def set_free(room: int | None) -> None:
        monkeypatch.setattr(sums_place, "free_on", lambda device: room)

    return bench, method, needed, set_free


def test_sums_stay_where_there_is_room_for_all_that_is_certain(rule, capsys):
    bench, method, needed, set_free = rule
    set_free(needed)
    assert sums_place.on_host(bench, method, 5) == frozenset()
    assert sums_place.device_of_sums(bench, method, 1) == SECOND
    assert "sums" not in capsys.readouterr().err


def test_sums_go_to_the_cpu_where_a_byte_is_lacking_and_stay_there(rule, capsys):
    bench, method, needed, set_free = rule
    set_free(needed - 1)
    drawn = torch.get_rng_state()
    assert sums_place.on_host(bench, method, 5) == {1, 2}
    assert torch.equal(torch.get_rng_state(), drawn), "what is measured draws from a generator of its own"
    (said,) = capsys.readouterr().err.splitlines()
    crossing = 8 * 32 * bench.anatomy.shape(1)[1]
    assert "the sums of layers 1, 2 live on the CPU, for cpu:0 has" in said
    assert f"at each step {amount(crossing)} a layer cross to W's device" in said and "a solve" in said
    set_free(10**12)  # decided once, and said once
    assert sums_place.device_of_sums(bench, method, 2) == FIRST
    assert capsys.readouterr().err == ""


def test_what_is_not_known_is_room(rule):
    bench, method, _, set_free = rule
    set_free(None)
    assert sums_place.on_host(bench, method) == frozenset()


@pytest.mark.parametrize(("sums_on", "found"), [("device", set()), ("cpu", {1, 2})])
def test_a_place_that_is_named_is_taken_whatever_is_free(sums_on, found, rule):
    bench, method, needed, set_free = rule
    set_free(needed - 1 if sums_on == "device" else 10 * needed)
    bench.sums_on = sums_on
    assert sums_place.on_host(bench, method, 5) == found


def test_what_has_no_room_in_one_process_is_on_the_cpu_in_all(rule, monkeypatch):
    bench, method, needed, set_free = rule
    set_free(needed)

    class Two:
        is_first = True

        def gather(self, what, work):
            return [work(), [2]]

    monkeypatch.setattr(sums_place, "here", Two)
    assert sums_place.on_host(bench, method, 5) == {2}


def test_of_a_model_on_the_cpu_and_of_methods_without_sums_nothing_changes(seed):
    for sums_on in ("auto", "device", "cpu"):
        bench = bench_on(tiny_model("gpt2", seed), seed, sums_on=sums_on)
        for name in ("d4s", "kn", "ft-m", "ultraedit"):
            assert sums_place.on_host(bench, method_for(name, bench.anatomy)) == frozenset()


def test_a_place_that_cannot_be_is_refused(seed):
    with pytest.raises(ConfigError, match=r"unknown sums_on 'gpu'\..* Known: auto, cpu, device"):
        edit_sequence(tiny_model("gpt2", seed), tiny_tokenizer(), SUBJECT_LAST, sums_on="gpu")  # type: ignore[arg-type]
