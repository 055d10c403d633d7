"""Edits one after another, with everything that is measured on the way."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from d4s.edits import Edit, check_batch, check_sequence
from d4s.edits.edit import made_again
from d4s.errors import ConfigError, EditingFailed, EditingStopped
from d4s.interrupts import ending_signals_raise
from d4s.locate.covariance import Covariance
from d4s.locate.kept_targets import KeptTargets
from d4s.measure.metrics import Baseline, take_baseline
from d4s.methods import Method, Preset, Workbench, method_for, sums_place
from d4s.methods.base import SumsOn
from d4s.methods.locate_then_edit import LocateEditor, TargetMethod
from d4s.methods.preset import with_preset
from d4s.models.architectures import Architecture
from d4s.models.causal_lm import CausalLM
from d4s.models.forward import evaluating
from d4s.models.prompts import subject_row
from d4s.models.readiness import check_ready
from d4s.progress import stage
from d4s.ranks import here
from d4s.sequence.journaling import Journaling
from d4s.sequence.observers import Bar, Observer
from d4s.sequence.result import Result
from d4s.sequence.schedule import Measure, Schedule
from d4s.sequence.together import FirstsJournal, journaling, watched_by
from d4s.sequence.under_way import Run, Unedited


def edit_sequence(
    model: CausalLM,
    tokenizer: Any,
    edits: Sequence[Edit],
    *,
    method: str | Method = "d4s",
    config: Mapping[str, Any] | Method | Preset | None = None,
    preset: str | os.PathLike[str] | None = None,
    covariance: Covariance | str | os.PathLike[str] | None = None,
    targets: KeptTargets | str | os.PathLike[str] | None = None,
    batch_size: int = 1,
    evaluate_every: int | Collection[int] | None = None,
    neighborhood_limit: int | None = None,
    original: bool = True,
    generate: bool = False,
    measure: Measure | None = None,
    stop_at_failure: bool = False,
    passes: int = 1,
    stop_on_collapse: float | None = None,
    baseline: Baseline | None = None,
    architecture: Architecture | None = None,
    seed: int = 0,
    journal: str | os.PathLike[str] | None = None,
    keep_vectors: bool = True,
    sums_on: SumsOn = "auto",
    observers: Sequence[Observer] = (),
    progress: bool = True,
) -> Result:
    """Makes the edits in order, `batch_size` a step, in place, and measures as it goes.

    model: a transformers causal language model, float32 | float16 | bfloat16, CPU or CUDA
    edits: in the order they are to be made; a later edit may change a fact that an earlier one has changed
    method: a name from `d4s.methods()`, with one of its named presets as in "d4s:fresh", or a configured method
    config: fields that differ from the preset, as {"prior_weight": 2e4, "steps": 30}; or a whole configuration,
        or what `load_preset` gives, whose probes among the edits are named in `Result.notes`
    preset: a named preset of the method, as "long", or a file that `d4s tune` wrote; fields of `config` go before it
    covariance: key statistics of the unedited model, or their file; None: estimated on text that the model
        samples, and cached
    targets: of the unedited model, found before (d4s targets), or their file; those of edits that are not among them
        are searched, and added to a `KeptTargets`. For methods that search on the unedited model: d4s, anchor="base"
    evaluate_every: edits between evaluations, or the numbers of edits after which to evaluate, as {100, 500};
        each scores ALL edits made so far. None: only at the end
    neighborhood_limit: neighbourhood prompts an edit that are scored at the points between the first and the
        last; None: all
    original: also test each edit right after its own step
    generate: also score free generation
    measure: called at each evaluation point while the model holds the edits; its figures join the history row.
        Its attribute `columns`, a mapping name → `measure.columns.Column`, says what they are; without it those named
        "<task> acc" or as another accuracy are shown in percent, others as they are
    stop_at_failure: a step that fails, also for want of device memory, ends the sequence instead of raising;
        `Result.failure` says why
    passes: over the edits. In each behind the first those are made again, `batch_size` a step, whose target is not the
        greedy answer at the end of the pass before, or, where targets have an end (target_stop, target_eos), whose free
        answer goes on behind it; they have steps, rows and a point of their own, as "<id>~2"
    stop_on_collapse: ends the sequence at a point where a smaller share of the edits made is still the greedy answer,
        as .1; `Result.failure` says so
    baseline: the unedited model's answers to these edits, where they have been taken before
    seed: of contexts, samples and intervals; same seed, same machine: same result
    journal: folder in which the sequence is kept as it is made (docs/formats/journal.md): what was done is durable, and
        the same call goes on in it after an interruption; None: nowhere
    keep_vectors: whether the journal keeps keys and residuals, without which no single edit can be taken back
    sums_on: where key statistics, sums and Δ of a closed form live: on the layer's "device", on the "cpu", from which Δ
        crosses to the device at each step, or "auto": on the device where there is room for them, decided before the
        first edit and said where it is the CPU. The same results to rounding; a journal goes on either way
    observers: told of each step and point while it happens (`d4s.Observer`)

    Of several processes (`d4s.ranks`) all give the same arguments and have the same result. Targets and answers each
    searches in part; the journal, the observers and `measure` are the first's alone.

    Raises a D4SError before anything is changed if an edit, the model, the statistics or an argument is not
    right. A step that fails leaves the weights as the step before it left them. What breaks a sequence off that has
    begun is raised as EditingFailed or, by Ctrl-C or a signal, EditingStopped: both are EditingInterrupted, with the
    cause behind them and the Result so far as `result`, whose `restore()` is the way back.
    """
    edits = tuple(edits)
    schedule = Schedule(
        batch_size=batch_size,
        evaluate_every=evaluate_every,
        neighborhood_limit=neighborhood_limit,
        original=original,
        generate=generate,
        measure=measure,
        stop_at_failure=stop_at_failure,
        passes=passes,
        stop_on_collapse=stop_on_collapse,
        seed=seed,
    )
    bench = Workbench(
        model,
        tokenizer,
        covariance=covariance,
        targets=targets,
        architecture=architecture,
        sums_on=sums_on,
        seed=seed,
        progress=progress,
    )
    if preset is not None:
        method, config = with_preset(method, preset, config)
    configured = method_for(method, bench.anatomy, config)
    kept = None if journal is None else journaling(journal, keep_vectors=keep_vectors)
    return run(
        bench,
        edits,
        configured,
        schedule,
        baseline=baseline,
        journal=kept,
        observers=observers,
        notes=config.notes_on(edits) if isinstance(config, Preset) else (),
    )


@ending_signals_raise()  # a scheduler's SIGTERM, too, finds the journal closed
def run(
    bench: Workbench,
    edits: Sequence[Edit],
    method: Method,
    schedule: Schedule,
    *,
    baseline: Baseline | None = None,
    journal: Journaling | FirstsJournal | None = None,
    observers: Sequence[Observer] = (),
    notes: tuple[str, ...] = (),
    unedited: Unedited | None = None,
) -> Result:
    """`edit_sequence`, where the workbench, the configuration and the schedule are there already.

    notes: what has to be said of the figures
    unedited: what other sequences over these edits have scored before their first; what is taken is added
    """
    edits = tuple(edits)
    begun: list[Run] = []

    def begin() -> None:
        check_asked(bench, edits, method, schedule)
        with evaluating(bench.model):
            begun.append(_begun(bench, edits, method, schedule, baseline, journal, unedited or Unedited()))

    try:
        here().agree("beginning", begin)
    except BaseException:
        if begun:  # here, and not everywhere
            begun[0].result.editor.restore()
        if journal is not None:
            journal.close()
        raise
    (under_way,) = begun
    result = under_way.result
    result.notes = notes
    with evaluating(bench.model):
        bar = Bar(shown=bench.progress and not any(one.draws for one in observers))
        told = watched_by(journal, [bar], observers)
        try:
            told.began(result)
            under_way.steps(told)
        except BaseException as error:
            why = str(error) or type(error).__name__
            result.failure = result.failure or f"after edit {len(result.edits_table)}: {why}"
            told.ended(result, error)
            stopped = isinstance(error, KeyboardInterrupt)
            raise (EditingStopped if stopped else EditingFailed)(result.failure, result) from error
        told.ended(result, None)
    return result


def _begun(
    bench: Workbench,
    edits: tuple[Edit, ...],
    method: Method,
    schedule: Schedule,
    baseline: Baseline | None,
    journal: Journaling | FirstsJournal | None,
    unedited: Unedited,
) -> Run:
    """The sequence with its unedited model scored, or as far as its journal goes."""
    model, shown = bench.model, bench.progress
    if journal is not None:
        journal.check(method, bench, edits, schedule)
    sums_place.on_host(bench, method, len(edits))
    settled = method.settled(bench, edits) if journal is None else journal.settled(method, bench, edits)
    if journal is not None and settled.searches_ahead:
        bench.targets = journal.targets(bench.targets)
    elif schedule.passes > 1 and settled.searches_ahead and bench.targets is None:
        bench.targets = KeptTargets()  # what is made again is not searched again
    editor = settled.editor(bench)
    if isinstance(editor, LocateEditor):
        editor.check_lengths(edits)
    if baseline is None and journal is not None:
        baseline = journal.baseline()
    if baseline is None:
        stage(f"baseline: the unedited model is asked about {len(edits)} edits", shown=shown)
        baseline = take_baseline(model, bench.tokenizer, edits, progress=shown)
    result = Result(
        method.name,
        asdict(method),
        chosen=method.decided(settled),
        model=model,
        edits=edits,
        editor=editor,
        baseline=baseline,
    )
    under_way = Run(result, schedule, shown, unedited)
    if journal is not None:
        journal.open(result, method, bench, schedule)
    editor.announce(edits)
    try:
        if journal is not None:
            journal.restore(under_way)
        if not result.history:
            under_way.point(0)
    except BaseException:
        editor.restore()
        raise
    stage(f"{method.name}: {len(edits)} edits, {schedule.batch_size} a step", shown=shown)
    return under_way


def check_asked(bench: Workbench, edits: Sequence[Edit], method: Method, schedule: Schedule) -> None:
    """Raises what `edit_sequence` raises before anything is changed."""
    if not edits:
        raise ConfigError("no edits were given; at least one is needed")
    check_sequence([*edits, *(made_again(edit, n + 1) for n in range(1, schedule.passes) for edit in edits)])
    for batch in schedule.batches(edits):
        check_batch(batch)
    if bench.targets is not None and not method.searches_ahead:
        raise ConfigError(
            f"targets: {method.name} searches its targets on the weights as they are, so none of the unedited "
            "model can be given; d4s with anchor='base' takes them"
        )
    check_ready(bench.model, bench.tokenizer, edits)
    if isinstance(method, TargetMethod):
        for edit in edits:
            subject_row(bench.tokenizer, edit.prompt, edit.subject)
