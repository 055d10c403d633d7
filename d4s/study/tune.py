"""Settings that find themselves: a method's fields, chosen by sequences of probe edits that are not edited later.

Each setting makes the probes one after another, so that what one edit does to those before it shows, and is scored
as `d4s.study.front` says. First come settings that differ from the method's own in one field each, and one that has the
best of them together, on few probes; then twice as many probes for the better half, and so on; at last λ beside the
best one's. How many probes and settings that are, the clock decides: by what the first few probes cost.

Chosen is, of the settings that made all probes, the one with the largest mean of written · kept over probes, which one
that writes nothing does not have; but the method's own where that is within one standard error of it (of the
difference, probe by probe).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

from torch import Tensor

from d4s.edits import Edit, check_sequence
from d4s.errors import ConfigError, D4SError
from d4s.files import finite_or_none
from d4s.locate.covariance import Covariance
from d4s.locate.kept_targets import KeptTargets
from d4s.measure.metrics import Baseline, evaluate, take_baseline
from d4s.methods import Method, Preset, Workbench, method_for
from d4s.methods.base import SumsOn
from d4s.methods.locate_then_edit import PROBES, LocateMethod, TargetMethod, arriving, weight_at_which
from d4s.methods.preset import model_facts
from d4s.models.architectures import Anatomy, Architecture
from d4s.models.causal_lm import CausalLM
from d4s.models.forward import evaluating
from d4s.models.readiness import check_ready
from d4s.progress import stage
from d4s.sequence.comparison_folder import decides_targets
from d4s.study.front import Outcome, outcome
from d4s.study.tuned_fields import SEARCHED, other_layers, scaled
from d4s.study.tuning import FEWEST, Scored, Trial, Tuning, as_told, chosen_of, figures_of, in_short, plain
from d4s.version import versions

FIRST = 4  # probes whose cost decides about all others
MOST = 512  # probes
KEPT_BACK = 0.1  # of the time, for what costs more than foreseen
NEIGHBOURS = 5  # of a probe that are scored, which is most of what a setting costs
SLICE = 4  # targets searched between two looks at the clock
SHARES = (0.99, 0.95, 0.8, 0.6)  # of an edit that arrive, beside the method's own
_OWN = "own"  # what the method's own setting is called
_TOGETHER = "together"
_ARRIVING = "arriving"  # the share of an edit that is to arrive, by which λ is chosen for whatever layers


def tune(
    model: CausalLM,
    tokenizer: Any,
    edits: Sequence[Edit],
    *,
    method: str | Method = "d4s",
    config: Mapping[str, Any] | Method | Preset | None = None,
    minutes: float = 10.0,
    probes: int | None = None,
    probe_edits: Sequence[Edit] | None = None,
    covariance: Covariance | str | os.PathLike[str] | None = None,
    architecture: Architecture | None = None,
    sums_on: SumsOn = "auto",
    seed: int = 0,
    progress: bool = True,
    clock: Callable[[], float] = time.monotonic,
) -> Tuning:
    """Finds layers, λ, clamp, norm anchor, anchor and contexts of a method for a model, within a time.

    edits: from which the probes are drawn, by `seed`; those that were are named in the preset, and no figure should be
        taken on them later
    config: what the method begins from, and its name for what is not searched
    minutes: that the search may take, the estimation of key statistics, where they are not given, among them
    probes: edits a sequence of the last settings; None: as many as the time allows
    probe_edits: the probes, where they are not to be drawn from the edits
    sums_on: as of `edit_sequence`
    clock: seconds

    With the same measured times the same is found. Weights come back bit for bit.
    Raises ConfigError for a time or number that is none, too few edits, and a time in which not even the method's own
    setting can be measured.
    """
    if not (isinstance(minutes, (int, float)) and 0 < minutes < math.inf):
        raise ConfigError(f"minutes={minutes!r}, must be a positive number")
    if probes is not None and probes < 2:
        raise ConfigError(f"probes={probes!r}, must be a whole number from 2 on, or None")
    began = clock()
    pool = _pool(edits if probe_edits is None else probe_edits, probes, seed, drawn=probe_edits is None)
    check_sequence(pool)
    check_ready(model, tokenizer, pool)
    bench = Workbench(
        model,
        tokenizer,
        covariance=covariance,
        architecture=architecture,
        sums_on=sums_on,
        seed=seed,
        progress=progress,
    )
    configured = method_for(method, bench.anatomy, config)
    search = _Search(bench, configured, pool, 60.0 * minutes, began, clock, progress, wanted=probes)
    with evaluating(model):
        return search.run()


def _pool(edits: Sequence[Edit], probes: int | None, seed: int, *, drawn: bool) -> list[Edit]:
    """The probes to come, in their order: one a prompt, of those that bring what must not change."""
    distinct = list({edit.text: edit for edit in edits if _is_scored_whole(edit)}.values())
    if drawn:
        distinct = Random(seed).sample(distinct, len(distinct))
    least = probes or 2
    if len(distinct) < least:
        raise ConfigError(
            f"{len(distinct)} different edits with neighbours, and {least} probes are needed; give more"
        )
    return distinct[: probes or MOST]


def _is_scored_whole(edit: Edit) -> bool:
    """Whether what an edit disturbs can be scored: without that the one that writes the most would always win."""
    neighbours = edit.target_true is not None and edit.kind != "statement" and edit.neighborhood
    return bool(neighbours or ((edit.kind != "completion" or edit.target_true is None) and edit.locality))


class _OutOfTime(Exception):
    """A setting would end after the time."""


class _Search:
    """The course of a search: its clock, its costs, and what has been scored."""

    def __init__(
        self,
        bench: Workbench,
        method: Method,
        pool: Sequence[Edit],
        budget: float,
        began: float,
        clock: Callable[[], float],
        progress: bool,
        wanted: int | None,
    ) -> None:
        self.bench, self.pool, self.clock, self.progress = bench, list(pool), clock, progress
        self.budget, self.began, self.wanted = budget, began, wanted
        self.asked = method
        self.kept: dict[str, KeptTargets] = {}  # by what decides targets
        self.scored: dict[str, Scored] = {}
        self.failed: dict[str, str] = {}
        self.searched, self.made, self.asked_before, self.begun = _Pace(), _Pace(), _Pace(), _Pace()
        self.squares: dict[str, Tensor] = {}
        self.share: float | None = None  # that arrives with the method's own λ
        self.baseline = Baseline({})
        self.known: set[str] = set()  # ids of the probes that it holds
        self.seen = 0  # probes that were looked at
        self.over = False  # the time
        self.unedited: Outcome | None = None

    @property
    def spent(self) -> float:
        return self.clock() - self.began

    def run(self) -> Tuning:
        bench, method = self.bench, self.asked
        if "covariance" in method.needs:
            layers = self._layers_there()
            stage(f"tune: key statistics of {len(layers)} layers", shown=self.progress)
            bench.covariance(layers)
        own = Trial(_OWN, _OWN, self._anchored(method).settled(bench, self.pool))
        if isinstance(own.method, LocateMethod):
            weight = own.method.value("prior_weight")
            self.share = float(
                arriving(self._squares(own.method), weight, own.method.measures_again).median()
            )
            self.seen = min(PROBES, len(self.pool))
        first = min(FIRST, len(self.pool))
        self._try(own, first, own=True)
        trials = self._trials(own)
        count, fitting = self._planned(own, trials)
        left_out = [one.label for one in trials if one not in fitting]
        stage(f"tune: {len(fitting) + 1} settings, {count} probes", shown=self.progress)
        best = self._halving(own, fitting, count)
        self._beside(best, count)
        return self._found(own, left_out)

    # What is tried.

    def _layers_there(self) -> tuple[int, ...]:
        """Layers whose statistics there are, of those that may be edited: all that are given, or else all tried."""
        given = self.bench._covariance
        if given is not None:
            return tuple(given.layers)
        tried = [self.asked.value("layers"), *other_layers(self.asked, self.bench.anatomy)]
        return tuple(sorted({layer for layers in tried for layer in layers}))

    def _trials(self, own: Trial) -> list[Trial]:
        """Settings that differ in one field, those first that share targets with the method's own."""
        method, anatomy = own.method, self.bench.anatomy
        found: list[Trial] = []

        def add(name: str, value: Any, label: str = "") -> None:
            label = label or f"{name} {in_short(value)}"
            try:
                found.append(Trial(label, as_told(name), self._changed({name: value}), {name: value}))
            except D4SError as error:  # out of its range, or a layer that there is not
                self.failed[label] = str(error)

        strength = method.strength
        if isinstance(method, LocateMethod):
            for share in SHARES:
                add(_ARRIVING, share, f"λ: {100 * share:.0f} % arrive")
        elif strength and strength not in SEARCHED:
            for value in scaled(0.1, 0.3, 3.0, 10.0)(method, anatomy, strength):
                add(strength, value)
        statistics = set(self._layers_there()) if "covariance" in method.needs else None
        for name, values in SEARCHED.items():
            if method.value(name) is None:
                continue
            for value in values(method, anatomy, name):
                if name == "layers" and statistics is not None and not statistics >= set(value):
                    continue
                add(name, value)
        distinct = {decides(one.method): one for one in reversed(found)}
        return sorted(
            (one for one in found if distinct[decides(one.method)] is one),
            key=lambda one: self._group(one.method) != self._group(method),
        )

    def _changed(self, changes: Mapping[str, Any]) -> Method:
        """The method asked for with these changes; λ, where they do not name it, by the share that arrives: theirs, or
        that of the method's own."""
        method = self.asked.changed({name: value for name, value in changes.items() if name != _ARRIVING})
        if isinstance(method, TargetMethod):
            self.bench.anatomy.check_layers(method.layers)
        share = changes.get(_ARRIVING, self.share)
        by_share = self.asked.value("prior_weight") is None or {_ARRIVING, "layers", "contexts"} & set(
            changes
        )
        if (
            isinstance(method, LocateMethod)
            and share is not None
            and by_share
            and "prior_weight" not in changes
        ):
            method = method.weighed(weight_at_which(self._squares(method), share, method.measures_again))
        return self._anchored(method).settled(self.bench, self.pool)

    def _anchored(self, method: Method) -> Method:
        """With the norm that its targets are to have, where that is left open: of the first probes' targets, of as many
        as there is time for; those that are kept cost nothing."""
        if not isinstance(method, TargetMethod) or not method.lacks_norm:
            return method
        kept, first = self._targets_of(method), self.pool[:FEWEST]
        new = first if kept is None else kept.lacking(first)
        if len(new) * self.searched.each > KEPT_BACK * (self.budget - self.spent):
            first = self.pool[:FIRST]
        self.bench.targets = kept
        self.seen = max(self.seen, len(first))
        return TargetMethod.settled(method, self.bench, first)

    def _squares(self, method: LocateMethod) -> Tensor:
        """What λ is chosen by: once for all settings that differ in λ alone, since it takes a factor of C a layer."""
        key = decides(method.weighed(1.0))
        if key not in self.squares:
            self.squares[key] = method.key_squares(self.bench, self.pool)
        return self.squares[key]

    def _together(self, own: Trial, scored: Sequence[Scored]) -> Trial | None:
        """The best value of each field, of those that did better than the method's own; None: fewer than two did."""
        level = self.scored[own.label].found.total
        changes: dict[str, Any] = {}
        for one in sorted(scored, key=lambda one: -one.found.total):
            if one.found.total > level:
                for name, value in one.trial.changes.items():
                    changes.setdefault(name, value)
        if len(changes) < 2:
            return None
        try:
            return Trial(_TOGETHER, _TOGETHER, self._changed(changes), changes)
        except D4SError as error:
            self.failed[_TOGETHER] = str(error)
            return None

    # What it costs.

    def _group(self, method: Method) -> str | None:
        """What decides the targets that a setting shares; None: it shares none."""
        if not method.searches_ahead or not isinstance(method, TargetMethod):
            return None
        return decides_targets(method)

    def _targets_of(self, method: Method) -> KeptTargets | None:
        """Those that it shares; None: it shares none."""
        group = self._group(method)
        return None if group is None else self.kept.setdefault(group, KeptTargets())

    def _cost(self, method: Method, count: int, held: Mapping[str, int]) -> float:
        """Seconds that a sequence of so many probes is expected to take; held: targets there are, by group."""
        group = self._group(method)
        searches = isinstance(method, TargetMethod)
        new = count - min(count, held.get(group, 0)) if group is not None else count
        return self.begun.each + count * self.made.each + (new * self.searched.each if searches else 0.0)

    def _planned(self, own: Trial, trials: list[Trial]) -> tuple[int, list[Trial]]:
        """(probes of the last settings, settings to begin with) that the time is expected to suffice for.

        First settings are let go, from the end of the list, until `FEWEST` probes fit; then probes are doubled.
        """
        left = (1 - KEPT_BACK) * (self.budget - self.spent)
        most = len(self.pool)
        counts = [self.wanted] if self.wanted else _doubled(min(FEWEST, most), most)
        for keep in range(len(trials), 0, -1):
            if self._whole(own, trials[:keep], counts[0]) <= left:
                fitting = trials[:keep]
                if keep < len(trials):
                    return counts[0], fitting
                return max(n for n in counts if self._whole(own, fitting, n) <= left), fitting
        # Not one beside its own: as many probes as there is time for.
        few = counts[0]
        while few > 2 and self._whole(own, trials[:1], few) > left:
            few //= 2
        return max(2, few), trials[:1]

    def _whole(self, own: Trial, trials: Sequence[Trial], count: int) -> float:
        """Seconds of all rounds, where the settings stay in the order they are in, and one with all together joins."""
        held = {group: len(kept) for group, kept in self.kept.items()}
        alive, seconds = list(trials), 0.0
        for number in _rounds(count):
            for trial in [own, *alive]:
                seconds += self._cost(trial.method, number, held)
                if (group := self._group(trial.method)) is not None:
                    held[group] = max(held.get(group, 0), number)
            alive = alive[: max(1, -(-len(alive) // 2))]
        together = any(self._group(one.method) != self._group(own.method) for one in trials)
        seconds += 2 * count * self.asked_before.each  # the baseline, and the unedited model's outcome
        return seconds + self._cost(own.method, count, {} if together else held)

    # What is done.

    def _halving(self, own: Trial, trials: Sequence[Trial], count: int) -> Trial:
        """Rounds of more probes for fewer settings; the best of the last one."""
        alive = list(trials)
        with suppress(_OutOfTime):
            self._baseline(count)
        self.unedited = self._outcome(self.pool[: len(self.known)], 0.0)
        for number, probes in enumerate(_rounds(count)):
            stage(f"tune: {len(alive) + 1} settings, {probes} probes each", shown=self.progress)
            if not self._try(own, probes):
                break
            done = [self.scored[one.label] for one in alive if self._try(one, probes)]
            if number == 0 and (both := self._together(own, done)) is not None and self._try(both, probes):
                done.append(self.scored[both.label])
            done.sort(key=lambda one: -one.found.total)
            if not done:
                break
            best = [one.trial for one in done]
            alive = best[: max(1, -(-len(best) // 2))]
        most = max(one.probes for one in self.scored.values())
        last = [one for one in self.scored.values() if one.probes == most]
        return max(last, key=lambda one: one.found.total).trial

    def _beside(self, best: Trial, count: int) -> None:
        """λ (or what else its strength is) of the best setting, by a half up and down, where time is left."""
        name = best.method.strength
        own = best.method.value(name) if name else None
        if own is None or self.scored[best.label].probes < count:
            return
        for factor in (0.5, 2.0):
            value = float(f"{factor * own:.2g}")
            changes = {k: v for k, v in best.changes.items() if k != _ARRIVING} | {name: value}
            label = (
                f"{best.label}, {as_told(name)} {value:g}"
                if best.label != _OWN
                else f"{as_told(name)} {value:g}"
            )
            try:
                trial = Trial(label, as_told(name), self._changed(changes), changes)
            except D4SError:  # beyond its bounds
                continue
            if any(
                decides(one.trial.method) == decides(trial.method) and one.probes == count
                for one in self.scored.values()
            ):
                continue
            held = {group: len(kept) for group, kept in self.kept.items()}
            if self._cost(trial.method, count, held) > self.budget - self.spent:
                return
            self._try(trial, count)

    def _try(self, trial: Trial, count: int, *, own: bool = False) -> bool:
        """Scores a setting on the first probes; False if it failed, or the time was over before it ended.

        own: a setting without which nothing can be said
        """
        known = self.scored.get(trial.label)
        if known is not None and known.probes == count:
            return True
        if trial.label in self.failed or self.over:
            return False
        try:
            self.scored[trial.label] = Scored(trial, count, self._sequence(trial.method, count))
        except _OutOfTime:
            if own:
                raise ConfigError(
                    f"{self.budget / 60:g} minutes are over before {count} probes of the method's own setting were "
                    f"made ({self.spent:.0f} s); give more minutes"
                ) from None
            return False
        except D4SError as error:
            if own:
                raise
            self.failed[trial.label] = str(error)
            return False
        return True

    def _sequence(self, method: Method, count: int) -> Outcome:
        """The first probes one after another, scored at the end; the weights come back."""
        bench, edits = self.bench, self.pool[:count]
        group = self._group(method)
        bench.targets = self._targets_of(method)
        began = self.clock()
        editor = method.editor(bench)
        self.begun.add(self.clock() - began, 1)
        try:
            self._baseline(count)
            for at in range(0, count, SLICE):
                new = [] if bench.targets is None else bench.targets.lacking(edits[at : at + SLICE])
                if new:
                    began = self._now()
                    editor.ahead.targets(new)  # type: ignore[attr-defined]
                    self.searched.add(self.clock() - began, len(new))
            before = editor.weights.mean_absolute()
            editor.announce(edits)
            began = self._now()
            for edit in edits:
                self._now()
                editor.edit([edit])
            now = editor.weights.mean_absolute()
            growth = sum(now[layer] / before[layer] - 1 for layer in now) / len(now) if now else 0.0
            found = self._outcome(edits, growth)
            took = self.clock() - began
            if group is not None or not isinstance(method, TargetMethod):
                self.made.add(took, count)
            else:  # its search is part of each step
                self.searched.add(max(0.0, took - count * self.made.each), count)
                if not self.made.number:
                    self.made.add(0.0, count)
            return found
        finally:
            editor.restore()

    def _baseline(self, count: int) -> None:
        """The unedited model, which it has to be now, is asked about the first probes."""
        if new := [edit for edit in self.pool[:count] if edit.id not in self.known]:
            began = self._now()
            found = take_baseline(self.bench.model, self.bench.tokenizer, new)
            self.baseline = Baseline({**self.baseline.answers, **found.answers})
            self.known |= {edit.id for edit in new}
            self.asked_before.add(self.clock() - began, len(new))
        self.seen = max(self.seen, count)

    def _outcome(self, edits: Sequence[Edit], growth: float) -> Outcome:
        bench = self.bench
        found = evaluate(
            bench.model,
            bench.tokenizer,
            edits,
            baseline=self.baseline,
            portability=False,
            neighborhood_limit=NEIGHBOURS,
            seed=bench.seed,
            check=False,
        )
        return outcome(found.rows, growth)

    def _now(self) -> float:
        """Raises _OutOfTime where the time is over."""
        now = self.clock()
        if now - self.began >= self.budget:
            self.over = True
            raise _OutOfTime
        return now

    # What is chosen.

    def _found(self, own: Trial, left_out: Sequence[str]) -> Tuning:
        scored = list(self.scored.values())
        most = max(one.probes for one in scored)
        last = [one for one in scored if one.probes == most]
        chosen, because = chosen_of(last, self.scored[own.label])
        method = chosen.trial.method
        names = [name for name in SEARCHED if method.value(name) is not None]
        if method.strength and method.strength not in names:
            names.append(method.strength)
        names += [name for name in _differing(method, self.bench.anatomy) if name not in names]
        fields = {name: plain(method.value(name)) for name in names}
        if "prompt_weight" in fields and self.asked.value("prompt_weight") is None:
            fields["prompt_weight"] = None  # by how many edits there are to be
        measured = {
            "rule": "the largest mean of written · kept over probes; own, where it is within one standard error",
            "because": because,
            "chosen": chosen.trial.label,
            "seconds": round(self.spent, 1),
            "settings": [
                {
                    "label": one.trial.label,
                    "changes": {name: plain(value) for name, value in one.trial.changes.items()},
                    "strength": one.trial.method.value(one.trial.method.strength),
                    "probes": one.probes,
                    **figures_of(one.found),
                }
                for one in scored
            ],
        }
        preset = Preset(
            method=method.name,
            fields=fields,
            model=model_facts(self.bench.anatomy),
            measured=finite_or_none(measured),
            versions=versions(),
            probes=tuple((edit.id, edit.text) for edit in self.pool[: self.seen]),
        )
        costs = {"a target": self.searched.each, "a probe made and scored": self.made.each}
        assert self.unedited is not None
        return Tuning(
            preset,
            chosen.trial.label,
            tuple(scored),
            self.unedited,
            dict(self.failed),
            tuple(left_out),
            self.spent,
            self.budget,
            {name: seconds for name, seconds in costs.items() if seconds},
        )


@dataclass
class _Pace:
    """Seconds for each of what has been done."""

    seconds: float = 0.0
    number: int = 0

    def add(self, seconds: float, number: int) -> None:
        self.seconds += seconds
        self.number += number

    @property
    def each(self) -> float:
        return self.seconds / self.number if self.number else 0.0


def decides(method: Method) -> str:
    """All of a configuration."""
    return repr((method.name, asdict(method)))


def _rounds(count: int) -> list[int]:
    """Probes of each round, doubling up to `count`: 4, 8, 16 of 16."""
    rounds = [count]
    while rounds[0] // 2 >= FIRST and len(rounds) < 4:
        rounds.insert(0, rounds[0] // 2)
    return rounds


def _doubled(least: int, most: int) -> list[int]:
    counts = [least]
    while counts[-1] * 2 <= most:
        counts.append(counts[-1] * 2)
    return counts


def _differing(method: Method, anatomy: Anatomy) -> Iterator[str]:
    """Names of the fields in which it differs from its own preset for the model, a target's by their own names."""
    usual = type(method).preset(anatomy)
    for name in asdict(method):
        if name == "target":
            inner = asdict(method.value("target"))
            yield from (one for one in inner if inner[one] != usual.value(one))
        elif method.value(name) != usual.value(name):
            yield name
