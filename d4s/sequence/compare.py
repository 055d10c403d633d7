"""The same edits with several methods, one after another, from the same weights."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch

from d4s.edits import Edit
from d4s.errors import ConfigError, D4SError, EditingFailed, EditingInterrupted, ModelError, shown
from d4s.locate.covariance import Covariance
from d4s.locate.kept_targets import KeptTargets
from d4s.measure.metrics import Baseline, take_baseline
from d4s.methods import Method, Preset, Workbench, method_for
from d4s.methods.base import SumsOn
from d4s.methods.locate_then_edit import TargetMethod
from d4s.methods.preset import without_probes
from d4s.models.architectures import Anatomy, Architecture
from d4s.models.causal_lm import CausalLM
from d4s.progress import stage
from d4s.ranks import here
from d4s.sequence.comparison import Comparison
from d4s.sequence.comparison_folder import ComparisonFolder, decides_targets
from d4s.sequence.journaling import Journaling
from d4s.sequence.observers import Observer
from d4s.sequence.record import Record
from d4s.sequence.result import Result
from d4s.sequence.run import run
from d4s.sequence.schedule import Measure, Schedule
from d4s.sequence.target_search import check_targets
from d4s.sequence.together import FirstsJournal
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
    configured = configured_methods(methods, Anatomy(model, architecture))
    bench = partial(
        Workbench,
        model,
        tokenizer,
        covariance=covariance,
        architecture=architecture,
        sums_on=sums_on,
        progress=progress,
    )
    if targets is not None:
        if isinstance(targets, (str, os.PathLike)):
            targets = KeptTargets.load(targets)
        _check_targets(targets, configured, seeds, bench)
    orders = _orders(edits, seeds, shuffle, count)
    weights = weights_digest(model)
    folder = None
    if out is not None:
        settings = {
            "weights": weights,
            "edits": hashlib.blake2b(json.dumps([asdict(edit) for edit in edits]).encode()).hexdigest(),
            "key statistics": [covariance.corpus, covariance.count] if covariance is not None else None,
            "shuffle": shuffle,
            "count": count,
        }
        folder = ComparisonFolder(Path(out), settings | schedule.told_apart())
    if baseline is None:
        made = [edit for order in orders.values() for edit in order]  # each prompt is asked once
        stage(f"baseline: the unedited model is asked about {len(set(made))} edits", shown=progress)
        baseline = take_baseline(model, tokenizer, made, progress=progress)
    results: dict[str, dict[int, Record]] = {label: {} for label in configured}
    under_way = _UnderWay(model, bench, schedule, baseline, observers, targets, folder, weights, results)
    whole = len(configured) * len(orders)
    for seed, order in orders.items():
        unedited = Unedited()
        for label, method in configured.items():
            if not under_way.has_ended(label, method, seed, unedited):
                place = 1 + sum(map(len, results.values()))
                stage(f"sequence {place} of {whole}: {label}, seed {seed}", shown=progress)
                under_way.make(label, method, seed, order, unedited)
    if len(under_way.errors) == whole:
        raise under_way.errors[0]
    return Comparison(results, frozenset(under_way.unfinished), notes)


@dataclass
class _UnderWay:
    """A comparison under way, on one model.

    bench: makes the workbench of a sequence, of its seed and targets
    targets: that were given; None: those that the folder keeps
    weights: digest of those that each sequence begins with, and gives back
    errors: of sequences that could not begin
    """

    model: CausalLM
    bench: Callable[..., Workbench]
    schedule: Schedule
    baseline: Baseline
    observers: Sequence[Observer]
    targets: KeptTargets | None
    folder: ComparisonFolder | None
    weights: str
    results: dict[str, dict[int, Record]]
    unfinished: set[tuple[str, int]] = field(default_factory=set)
    errors: list[D4SError] = field(default_factory=list)

    def has_ended(self, label: str, method: Method, seed: int, unedited: Unedited) -> bool:
        """Whether the folder has this sequence, which then is a result. It, or another of the folder over the same
        edits, says what the unedited model scored."""
        if self.folder is None:
            return False
        if (stored := self.folder.record(label, seed, method)) is not None:
            self.results[label][seed] = stored
            unedited.take_from(stored)
        elif unedited.evaluation is None:
            self.folder.take_unedited(unedited, seed)
        return stored is not None

    def make(self, label: str, method: Method, seed: int, order: Sequence[Edit], unedited: Unedited) -> None:
        """A sequence, and its result: also of one that broke off, unless it did so in this process alone."""
        with ExitStack() as stack:
            journal = None
            if self.folder is not None:
                journal = stack.enter_context(closing(self.folder.journal(label, seed)))
            try:
                result = self._run(method, seed, order, unedited, journal)
            except EditingInterrupted as error:
                error.result.restore()
                if not isinstance(error, EditingFailed) or not isinstance(error.__cause__, D4SError):
                    raise
                if not here().all_know(error):  # this process alone would go on
                    raise
                self.unfinished.add((label, seed))  # worth another try, so it is not kept in the folder
                if not error.result.edits_table:
                    self.errors.append(error)
                self.results[label][seed] = error.result.record()
            except D4SError as error:
                if (journal is not None and journal.is_anothers) or not here().all_know(error):
                    raise
                self.unfinished.add((label, seed))
                self.errors.append(error)
                self.results[label][seed] = Record(method.name, failure=f"before the first edit: {error}")
            else:
                self.results[label][seed] = result.record()
                result.restore()
                del result  # and with it the copy of the weights
                if self.folder is not None:
                    self.folder.keep(label, seed, self.results[label][seed])
        if weights_digest(self.model) != self.weights:
            raise ModelError(f"{label} did not give back the weights it began with; load the model again")

    def _run(
        self,
        method: Method,
        seed: int,
        order: Sequence[Edit],
        unedited: Unedited,
        journal: Journaling | FirstsJournal | None,
    ) -> Result:
        with ExitStack() as stack:
            targets = self.targets if method.searches_ahead else None
            if targets is None and method.searches_ahead and self.folder is not None:
                targets = stack.enter_context(self.folder.targets(method, seed))
            return run(
                self.bench(seed=seed, targets=targets),
                order,
                method,
                replace(self.schedule, seed=seed),
                baseline=self.baseline,
                journal=journal,
                observers=self.observers,
                unedited=unedited,
            )


def _check_targets(
    targets: KeptTargets,
    configured: Mapping[str, Method],
    seeds: Sequence[int],
    bench: Callable[..., Workbench],
) -> None:
    """ConfigError unless they serve the methods that search theirs on the unedited model, of which there is one."""
    ahead = [m for m in configured.values() if isinstance(m, TargetMethod) and m.searches_ahead]
    if not ahead:  # else others may stand beside it, and search their own
        raise ConfigError(
            f"targets: are of the unedited model, and none of the methods compared ({', '.join(configured)}) "
            "searches its targets there; d4s with anchor='base' does"
        )
    if len(seeds) > 1 and any(one.contexts for one in ahead):
        raise ConfigError(
            "targets hang on the contexts, which each seed has of its own; give one seed, or no targets: those of "
            "each seed are kept in out"
        )
    for one in {decides_targets(one): one for one in ahead}.values():
        check_targets(bench(targets=targets, seed=seeds[0]), one)


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


def by_label(methods: Configs) -> Mapping[str, Mapping[str, Any] | Method | Preset | None]:
    """Label → configuration. ConfigError for a text, of which every letter would be a method."""
    if isinstance(methods, str):
        raise ConfigError(f"methods is the text {shown(methods)}, must be a list, as [{shown(methods)}]")
    return methods if isinstance(methods, Mapping) else dict.fromkeys(methods)


def configured_methods(methods: Configs, anatomy: Anatomy) -> dict[str, Method]:
    """Label → the configured method. ConfigError for one that does not exist, and if there are none."""
    named = by_label(methods)
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
