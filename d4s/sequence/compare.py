"""The same edits with several methods, one after another, from the same weights."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Any

import torch

from d4s import files
from d4s.edits import Edit
from d4s.errors import ConfigError, D4SError, EditingFailed, EditingInterrupted, ModelError
from d4s.files import write_text
from d4s.locate.covariance import Covariance
from d4s.locate.kept_targets import KeptTargets, deciding
from d4s.measure.metrics import Baseline, take_baseline
from d4s.methods import Method, Preset, Workbench, method_for
from d4s.methods.base import SumsOn
from d4s.methods.locate_then_edit import TargetMethod
from d4s.methods.preset import without_probes
from d4s.models.architectures import Anatomy, Architecture
from d4s.models.causal_lm import CausalLM
from d4s.progress import stage
from d4s.ranks import here
from d4s.sequence.comparison import Comparison, record_place
from d4s.sequence.journaling import Journaling
from d4s.sequence.observers import Observer
from d4s.sequence.record import Record
from d4s.sequence.run import run
from d4s.sequence.schedule import Measure, Schedule
from d4s.sequence.target_search import check_targets
from d4s.sequence.together import FirstsJournal, journaling
from d4s.sequence.under_way import Unedited

Configs = Iterable[str] | Mapping[str, Mapping[str, Any] | Method | Preset | None]


def compare(
    model: CausalLM,
    tokenizer: Any,
    edits: Sequence[Edit],
    methods: Configs = ("d4s", "memit"),
    *,
    covariance: Covariance | str | os.PathLike[str] | None = None,
    targets: KeptTargets | str | os.PathLike[str] | None = None,
    batch_size: int = 1,
    evaluate_every: int | Collection[int] | None = None,
    seeds: int | Sequence[int] = (0,),
    shuffle: bool = False,
    count: int | None = None,
    neighborhood_limit: int | None = None,
    original: bool = True,
    generate: bool = False,
    measure: Measure | None = None,
    passes: int = 1,
    stop_on_collapse: float | None = None,
    baseline: Baseline | None = None,
    architecture: Architecture | None = None,
    out: str | os.PathLike[str] | None = None,
    sums_on: SumsOn = "auto",
    observers: Sequence[Observer] = (),
    progress: bool = True,
) -> Comparison:
    """The same edits with each method, from the same weights, which are put back bit for bit after each.

    methods: names as `edit_sequence` takes them, as ["d4s:fresh", "memit-seq"]; or label → what differs from the
        preset, as {"d4s": None, "re-anchored": {"method": "d4s", "anchor": "current"}}, or label → a configured method,
        or a preset that `load_preset` gives: edits that are its probes are then made with no method, and
        `Comparison.notes` says so
    seeds: of contexts and samples; several: figures are means over them with Student's t intervals
    shuffle: each seed also has its own order of the edits, the same for all methods; those of an MQuAKE case stay
        together
    count: edits made, the first of that order; None: all
    targets: of the unedited model, for the methods that search them there; None: those that one sequence has searched
        are kept in `out`, and serve all later ones with the same contexts, last layer and target optimiser
    baseline: the unedited model's answers to the edits; None: taken once, for all methods
    measure: also called once an order of the edits, not once a method, on the unedited model
    out: folder in which each sequence is kept as it is made (`journals/`, until it ends), so that a comparison that was
        interrupted, within a sequence or between two, or gets more methods or seeds, goes on where it was; sequences
        made otherwise are refused. None: nowhere
    All others: as `edit_sequence`.

    A method that fails after some edits, or cannot begin, is kept with what was measured up to there and the
    reason; the others go on. Memory: one copy of the edited weights of one method at a time.
    Raises ConfigError for a method or field that does not exist, before anything is changed; the error of the
    first method if none could begin; ModelError if a method does not give the weights back.
    """
    presets = (
        [one for one in methods.values() if isinstance(one, Preset)] if isinstance(methods, Mapping) else []
    )
    edits, notes = without_probes(edits, presets)
    for note in notes:
        stage(note, shown=progress)
    seeds = (seeds,) if isinstance(seeds, int) else tuple(dict.fromkeys(seeds))
    if not seeds:
        raise ConfigError("seeds is empty; give one or more, as seeds=(0, 1, 2)")
    if count is not None and not 1 <= count <= len(edits):
        raise ConfigError(f"count={count}: must be from 1 to {len(edits)}, the edits that were given")
    schedule = Schedule(
        batch_size=batch_size,
        evaluate_every=evaluate_every,
        neighborhood_limit=neighborhood_limit,
        original=original,
        generate=generate,
        measure=measure,
        stop_at_failure=True,
        passes=passes,
        stop_on_collapse=stop_on_collapse,
    )
    if isinstance(covariance, (str, os.PathLike)):
        covariance = Covariance.load(Path(covariance))
    anatomy = Anatomy(model, architecture)
    configured = configured_methods(methods, anatomy)
    if targets is not None:
        ahead = [m for m in configured.values() if isinstance(m, TargetMethod) and m.searches_ahead]
        if not ahead:  # else others may stand beside it, and search their own
            raise ConfigError(
                f"targets: are of the unedited model, and none of the methods compared ({', '.join(configured)}) "
                "searches its targets there; d4s with anchor='base' does"
            )
        if isinstance(targets, (str, os.PathLike)):
            targets = KeptTargets.load(targets)
        if len(seeds) > 1 and any(one.contexts for one in ahead):
            raise ConfigError(
                "targets hang on the contexts, which each seed has of its own; give one seed, or no targets: those of "
                "each seed are kept in out"
            )
        bench = Workbench(model, tokenizer, targets=targets, architecture=architecture, seed=seeds[0])
        for one in {decides_targets(one): one for one in ahead}.values():
            check_targets(bench, one)
    orders = _orders(edits, seeds, shuffle, count)
    before = weights_digest(model)
    kept = None
    if out is not None:
        settings = {
            "weights": before,
            "edits": hashlib.blake2b(json.dumps([asdict(edit) for edit in edits]).encode()).hexdigest(),
            "key statistics": [covariance.corpus, covariance.count] if covariance is not None else None,
            "shuffle": shuffle,
            "count": count,
        }
        kept = _Kept(Path(out), settings | schedule.told_apart())
    if baseline is None:
        made = [edit for order in orders.values() for edit in order]  # each prompt is asked once
        stage(f"baseline: the unedited model is asked about {len(set(made))} edits", shown=progress)
        baseline = take_baseline(model, tokenizer, made, progress=progress)
    results: dict[str, dict[int, Record]] = {label: {} for label in configured}
    errors: list[D4SError] = []
    unfinished: set[tuple[str, int]] = set()
    for seed, order in orders.items():
        unedited = Unedited()
        for label, method in configured.items():
            if kept is not None and (stored := kept.record(label, seed, method)) is not None:
                results[label][seed] = stored
                unedited.take_from(stored)
                continue
            if kept is not None and unedited.evaluation is None:
                kept.take_unedited(unedited, seed)
            place = 1 + sum(len(by_seed) for by_seed in results.values())
            stage(
                f"sequence {place} of {len(configured) * len(orders)}: {label}, seed {seed}", shown=progress
            )
            own_targets = targets if method.searches_ahead else None
            seeded = replace(schedule, seed=seed)
            journal = None if kept is None else kept.journal(label, seed)
            try:
                with ExitStack() as stack:
                    if own_targets is None and method.searches_ahead and kept is not None:
                        own_targets = stack.enter_context(kept.targets(method, seed))
                    bench = Workbench(
                        model,
                        tokenizer,
                        covariance=covariance,
                        targets=own_targets,
                        architecture=architecture,
                        sums_on=sums_on,
                        seed=seed,
                        progress=progress,
                    )
                    result = run(
                        bench,
                        order,
                        method,
                        seeded,
                        baseline=baseline,
                        journal=journal,
                        observers=observers,
                        unedited=unedited,
                    )
            except EditingInterrupted as error:
                error.result.restore()
                if not isinstance(error, EditingFailed) or not isinstance(error.__cause__, D4SError):
                    raise
                if not here().all_know(error):  # this process alone would go on
                    raise
                unfinished.add((label, seed))  # worth another try, so it is not kept in the folder
                if not error.result.edits_table:
                    errors.append(error)
                results[label][seed] = error.result.record()
            except D4SError as error:
                if (journal is not None and journal.is_anothers) or not here().all_know(error):
                    raise
                unfinished.add((label, seed))
                errors.append(error)
                results[label][seed] = Record(method.name, failure=f"before the first edit: {error}")
            else:
                results[label][seed] = result.record()
                result.restore()
                del result  # and with it the copy of the weights
                if kept is not None:
                    kept.keep(label, seed, results[label][seed])
            if weights_digest(model) != before:
                raise ModelError(f"{label} did not give back the weights it began with; load the model again")
    if len(errors) == len(configured) * len(seeds):
        raise errors[0]
    return Comparison(results, frozenset(unfinished), notes)


def _orders(
    edits: Sequence[Edit], seeds: Sequence[int], shuffle: bool, count: int | None
) -> dict[int, list[Edit]]:
    """Seed → the edits it makes, in their order. What follows from a case's edits is asked after its last one,
    so a shuffle moves whole cases."""
    cases: list[list[Edit]] = []
    for edit in edits:
        case = edit.tags.get("case")
        if case is not None and cases and cases[-1][-1].tags.get("case") == case:
            cases[-1].append(edit)
        else:
            cases.append([edit])
    orders = {}
    for seed in seeds:
        shuffled = Random(seed).sample(cases, len(cases)) if shuffle else cases
        orders[seed] = [edit for case in shuffled for edit in case][:count]
    return orders


def _targets_place(folder: Path, method: Method, seed: int) -> Path:
    """One file for all configurations that ask for the same targets."""
    name = hashlib.sha256(f"{decides_targets(method)} {seed}".encode()).hexdigest()[:12]
    return folder / "targets" / f"{name}.safetensors"


def decides_targets(method: Method) -> str:
    """All of a configuration that targets hang on."""
    fields = asdict(method)
    return json.dumps(
        [deciding(fields["target"]), fields["contexts"], fields["context_lengths"], fields["layers"][-1]]
    )


class _Kept:
    """The sequences of a comparison in a folder, and what they have in common."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        here().on_first(lambda: self._check(settings))

    def _check(self, settings: Mapping[str, Any]) -> None:
        folder, path = self.folder, self.folder / "settings.json"
        wanted = json.loads(json.dumps(settings))
        if not path.exists():
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise ConfigError(f"{folder}: already holds something else; name a new or empty folder")
            write_text(json.dumps(wanted, indent=1), path)
            return
        data = files.read_bytes(path, "the settings of a comparison")
        stored = files.parse_json(data.decode("utf-8", "replace"), f"{path}: not what a comparison wrote")
        with files.checking(path, "a comparison"):
            files.as_json(files.as_object(stored, "it"), "it")
        one_pass = {"passes": 1}  # is not told
        stored, wanted = one_pass | stored, one_pass | wanted
        for name in dict.fromkeys([*wanted, *stored]):
            if stored.get(name) != wanted.get(name):
                there, here = _short(stored.get(name)), _short(wanted.get(name))
                raise ConfigError(
                    f"{folder} holds a comparison with other {name} ({there} there, {here} here); "
                    "name a new folder, or ask for the same"
                )

    @contextmanager
    def targets(self, method: Method, seed: int) -> Iterator[KeptTargets]:
        """Those that the folder has for the method; what is found is kept, also by a sequence that breaks off."""
        place = _targets_place(self.folder, method, seed)
        found = here().from_first(lambda: KeptTargets.load(place) if place.exists() else KeptTargets())
        known = len(found)
        try:
            yield found
        finally:
            if len(found) > known and here().is_first:
                found.save(place)

    def journal(self, label: str, seed: int) -> Journaling | FirstsJournal:
        """Of a sequence that is under way, which goes on in it. ConfigError if another process makes this one."""
        return journaling(self._journal_place(label, seed), keep_vectors=False)

    def keep(self, label: str, seed: int, record: Record) -> None:
        """The record of a sequence that has ended, which says what is asked of it: its journal goes."""

        def write() -> None:
            record.save(record_place(self.folder, label, seed))
            shutil.rmtree(self._journal_place(label, seed), ignore_errors=True)

        here().on_first(write)

    def _journal_place(self, label: str, seed: int) -> Path:
        return self.folder / "journals" / record_place(self.folder, label, seed).stem

    def take_unedited(self, unedited: Unedited, seed: int) -> None:
        """From a sequence of this order that has ended, also of one that is not asked for now, if there is any."""
        own = re.compile(rf".*[^-]-{seed}\.json")
        found = here().from_first(lambda: self._first_of(own))
        if found is not None:
            unedited.take_from(found)

    def _first_of(self, names: re.Pattern[str]) -> Record | None:
        folder = self.folder / "results"
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if names.fullmatch(path.name):
                with suppress(D4SError):  # damaged: said where it is asked for
                    return Record.load(path)
        return None

    def record(self, label: str, seed: int, method: Method) -> Record | None:
        """The sequence of this label and seed, if it has ended. ConfigError if its configuration was another."""
        return here().from_first(lambda: self._record(label, seed, method))

    def _record(self, label: str, seed: int, method: Method) -> Record | None:
        path = record_place(self.folder, label, seed)
        if not path.exists():
            return None
        record = Record.load(path)
        wanted = json.loads(json.dumps(method.as_known_to(record.config)))
        if record.method != method.name or record.config != wanted:
            raise ConfigError(
                f"{path}: a sequence of {record.method} with another configuration; name a new folder, or another label"
            )
        return record


def _short(value: Any, most: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}…"


def configured_methods(methods: Configs, anatomy: Anatomy) -> dict[str, Method]:
    """Label → the configured method. ConfigError for one that does not exist, and if there are none."""
    named = methods if isinstance(methods, Mapping) else dict.fromkeys(methods)
    configured: dict[str, Method] = {}
    for label, config in named.items():
        if isinstance(config, Method):
            configured[label] = config
        elif isinstance(config, Preset):
            configured[label] = method_for(config.method, anatomy, config)
        else:
            fields = dict(config or {})
            configured[label] = method_for(str(fields.pop("method", label)), anatomy, fields)
    if not configured:
        raise ConfigError("no methods were given; d4s methods lists them")
    return configured


def weights_digest(model: CausalLM) -> str:
    """Hex digest of every bit of every parameter."""
    digest = hashlib.blake2b()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        flat = parameter.detach().reshape(-1).cpu().contiguous()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
