"""The same edits with several methods: one order, one seed, the same weights to begin with, one table."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import torch

from d4s import files
from d4s.architectures import Anatomy, Architecture
from d4s.covariance import Covariance
from d4s.edits import Edit
from d4s.errors import ConfigError, D4SError, ModelError
from d4s.files import write_table, write_text
from d4s.kept_targets import KeptTargets
from d4s.methods import Method, Workbench, method_for
from d4s.methods.locate import TargetMethod
from d4s.metrics import Baseline, finite_or_none, is_share, spelled, take_baseline
from d4s.plots import plot_metrics, plot_norms, plot_target_probability
from d4s.progress import stage
from d4s.sequence import HEADLINES, Record, edit_sequence
from d4s.target_search import check_targets

if TYPE_CHECKING:
    from pandas import DataFrame

# 97.5 % quantiles of Student's t, by degrees of freedom from 1 on.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip
_CLOCKS = ("step", "seconds", "edit_seconds")
_MOST_LAYERS = 8  # of a method whose norms are drawn layer by layer

Configs = Iterable[str] | Mapping[str, Mapping[str, Any] | Method | None]


@dataclass(frozen=True)
class Comparison:
    """What each method did.

    results: label of the method → seed → what was measured; a sequence that broke off has a `failure`. Row 0
        of every history is the unedited model, the same for all
    unfinished: (label, seed) of sequences worth another try, which `save` does not keep
    """

    results: dict[str, dict[int, Record]]
    unfinished: frozenset[tuple[str, int]] = frozenset()

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(seed for by_seed in self.results.values() for seed in by_seed))

    @property
    def interval(self) -> str:
        """What the 95 % intervals are taken over, and how."""
        return "; ".join(dict.fromkeys(_interval(len(by_seed)) for by_seed in self.results.values()))

    @property
    def collapsed(self) -> dict[str, str]:
        """Label → where and why it broke off; methods that went through are not in it."""
        several = len(self.seeds) > 1
        found = {}
        for label, by_seed in self.results.items():
            ends = [
                f"seed {seed}, {record.failure}" if several else record.failure
                for seed, record in by_seed.items()
                if record.failure is not None
            ]
            if ends:
                found[label] = "; ".join(ends)
        return found

    def histories(self) -> dict[str, DataFrame]:
        """Label → history as a DataFrame, mean over seeds with intervals <name>.low and <name>.high.

        Up to where all seeds went: a mean over those that are left would rise where another one broke off.
        """
        import pandas

        frames = {}
        for label, by_seed in self.results.items():
            if common := _common_steps(by_seed.values()):
                rows = {step: [_row_at(record, step) for record in by_seed.values()] for step in common}
                frames[label] = pandas.DataFrame([over_seeds([r for r in rows[s] if r]) for s in common])
        return frames

    def table(self, points: Sequence[int] | None = None) -> DataFrame:
        """A row a method (and a point): its figures, each with `.low` and `.high`.

        points: numbers of edits, of those at which was evaluated; None: the last that all seeds reached
        Columns: method, edits, the figures of the history, l1_growth, seconds_an_edit (evaluation not counted),
        interval (what the bounds are), collapsed (where and why the method broke off; empty: it did not).
        """
        import pandas

        rows = []
        for label, by_seed in self.results.items():
            common = _common_steps(by_seed.values())
            for point in points if points is not None else common[-1:] or (0,):
                found = [row for r in by_seed.values() if point in common and (row := _row_at(r, point))]
                if not found and points is not None and label not in self.collapsed:
                    continue  # of one that broke off the row says so
                cells: dict[str, Any] = {"method": label, "edits": point}
                if found:
                    timed = [
                        row
                        | {"seconds_an_edit": row["edit_seconds"] / row["step"] if row["step"] else math.nan}
                        for row in found
                    ]
                    figures = over_seeds(timed)
                    cells |= {name: value for name, value in figures.items() if _is_figure(name)}
                cells |= {"interval": _interval(len(by_seed)), "collapsed": self.collapsed.get(label, "")}
                rows.append(cells)
        last = ["interval", "collapsed"]
        table = pandas.DataFrame(rows, columns=None if rows else ["method", "edits", "l1_growth", *last])
        return table[[c for c in table.columns if c not in last] + last]

    def target_probabilities(self) -> dict[str, DataFrame]:
        """Label → edits_table, mean over seeds edit by edit in the order made, of methods that search a target."""
        import pandas

        tables = {}
        for label, by_seed in self.results.items():
            parts = [pandas.DataFrame(record.edits_table) for record in by_seed.values()]
            columns = ["first_probability", "last_probability"]
            parts = [part[columns] for part in parts if set(columns) <= set(part.columns)]
            if parts and not (mean := sum(parts) / len(parts)).isna().all(axis=None):
                tables[label] = mean
        return tables

    def summary(self, points: Sequence[int] | None = None) -> str:
        """The table as text: growth and what is known to be a share in percent, other figures as they are; intervals
        in brackets."""
        table = self.table(points)
        measured = dict.fromkeys(n for r in self.results.values() for one in r.values() for n in one.measured)
        names = [n for n in HEADLINES if n in table] + [
            n for n in table.columns if n.endswith("_argmax") or n in measured
        ]
        shown = [_spelled(table, name) for name in names]
        columns = [("method", list(table["method"])), ("edits", [str(n) for n in table["edits"]])]
        columns += list(zip([n.replace("_", " ") for n in names], shown, strict=True))
        if "l1_growth" in table:
            columns.append(("mean |w|", [f"{100 * g:+.2f} %" if g == g else "" for g in table["l1_growth"]]))
            columns.append(("s/edit", [f"{s:.3f}" if s == s else "" for s in table["seconds_an_edit"]]))
        lines = aligned(columns)
        others = [name.replace("_", " ") for name in names if not is_share(name)]
        plain = f" ({', '.join(others)}: as measured)" if others else ""
        lines.append(
            f"Shares in percent{plain}, [95 % interval {self.interval}]; mean |w|: growth over the edited layers."
        )
        lines += [f"{label} broke off: {why}" for label, why in self.collapsed.items()]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON values of the table; figures that are not finite are None."""
        return {
            "format": "d4s-comparison-1",
            "interval": self.interval,
            "seeds": list(self.seeds),
            "collapsed": self.collapsed,
            "rows": finite_or_none(self.table().to_dict("records")),
        }

    def save(self, folder: str | os.PathLike[str]) -> None:
        """table.csv, table.json, history.csv, the figures, and each sequence as results/<label>-<seed>.json."""
        import pandas

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_table(self.table(), folder / "table.csv")
        write_text(json.dumps(self.to_dict(), indent=1), folder / "table.json")
        frames = []
        for label, by_seed in self.results.items():
            for seed, record in by_seed.items():
                if (label, seed) not in self.unfinished:
                    record.save(_place(folder, label, seed))
                frame = record.to_frame()
                frame.insert(0, "seed", seed)
                frame.insert(0, "method", label)
                frames.append(frame)
        write_table(pandas.concat(frames, ignore_index=True), folder / "history.csv")
        histories = self.histories()
        plot_metrics(histories, folder / "metrics.png")
        plot_norms(few_layers(histories), folder / "norms.png")
        if probabilities := self.target_probabilities():
            plot_target_probability(probabilities, folder / "target_probability.png")


def compare(
    model: Any,
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
    measure: Callable[[], Mapping[str, float]] | None = None,
    baseline: Baseline | None = None,
    architecture: Architecture | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Comparison:
    """The same edits with each method, from the same weights, which are put back bit for bit after each.

    methods: names from `d4s.methods()`; or label → what differs from the preset, as {"d4s": None,
        "re-anchored": {"method": "d4s", "anchor": "current"}}, or label → a configured method
    seeds: of contexts and samples; several: figures are means over them with Student's t intervals
    shuffle: each seed also has its own order of the edits, the same for all methods; those of an MQuAKE case stay
        together
    count: edits made, the first of that order; None: all
    targets: of the unedited model, for the methods that search them there; None: those that one sequence has searched
        are kept in `out`, and serve all later ones with the same contexts, last layer and target optimiser
    baseline: the unedited model's answers to the edits; None: taken once, for all methods
    out: folder in which each sequence is kept as soon as it ends, so that a comparison that was interrupted, or
        gets more methods or seeds, goes on where it was; sequences made otherwise are refused. None: nowhere
    All others: as `edit_sequence`.

    A method that fails after some edits, or cannot begin, is kept with what was measured up to there and the
    reason; the others go on. Memory: one copy of the edited weights of one method at a time.
    Raises ConfigError for a method or field that does not exist, before anything is changed; the error of the
    first method if none could begin; ModelError if a method does not give the weights back.
    """
    edits = list(edits)
    seeds = (seeds,) if isinstance(seeds, int) else tuple(dict.fromkeys(seeds))
    if not seeds:
        raise ConfigError("seeds is empty; give one or more, as seeds=(0, 1, 2)")
    if count is not None and not 1 <= count <= len(edits):
        raise ConfigError(f"count={count}: must be from 1 to {len(edits)}, the edits that were given")
    if isinstance(covariance, (str, os.PathLike)):
        covariance = Covariance.load(Path(covariance))
    if isinstance(targets, (str, os.PathLike)):
        targets = KeptTargets.load(targets)
    configured = _configured(methods, Anatomy(model, architecture))
    if targets is not None:
        ahead = [m for m in configured.values() if isinstance(m, TargetMethod) and m.searches_ahead]
        if len(seeds) > 1 and any(one.contexts for one in ahead):
            raise ConfigError(
                "targets hang on the contexts, which each seed has of its own; give one seed, or no targets: those of "
                "each seed are kept in out"
            )
        bench = Workbench(model, tokenizer, targets=targets, architecture=architecture, seed=seeds[0])
        for one in {_decides_targets(one): one for one in ahead}.values():
            check_targets(bench, one)
    orders = _orders(edits, seeds, shuffle, count)
    before = weights_digest(model)
    kept = None
    if out is not None:
        settings = {
            "weights": before,
            "edits": hashlib.blake2b(json.dumps([asdict(edit) for edit in edits]).encode()).hexdigest(),
            "key statistics": [covariance.corpus, covariance.count] if covariance is not None else None,
            "batch_size": batch_size,
            "evaluate_every": sorted(evaluate_every)
            if isinstance(evaluate_every, Collection)
            else evaluate_every,
            "shuffle": shuffle,
            "count": count,
            "neighborhood_limit": neighborhood_limit,
            "original": original,
            "generate": generate,
            "measure": _told_apart(measure),
        }
        kept = _Kept(Path(out), settings)
    if baseline is None:
        made = [edit for order in orders.values() for edit in order]  # each prompt is asked once
        stage(f"baseline: the unedited model is asked about {len(set(made))} edits", shown=progress)
        baseline = take_baseline(model, tokenizer, made, progress=progress)
    results: dict[str, dict[int, Record]] = {label: {} for label in configured}
    errors: list[D4SError] = []
    unfinished: set[tuple[str, int]] = set()
    for seed, order in orders.items():
        for label, method in configured.items():
            if kept is not None and (stored := kept.record(label, seed, method)) is not None:
                results[label][seed] = stored
                continue
            place = 1 + sum(len(by_seed) for by_seed in results.values())
            stage(
                f"sequence {place} of {len(configured) * len(orders)}: {label}, seed {seed}", shown=progress
            )
            place_of_targets = None
            own_targets = targets if method.searches_ahead else None
            if own_targets is None and method.searches_ahead and kept is not None:
                place_of_targets = _targets_place(kept.folder, method, seed)
                there = place_of_targets.exists()
                own_targets = KeptTargets.load(place_of_targets) if there else KeptTargets()
            known = 0 if own_targets is None else len(own_targets)
            try:
                result = edit_sequence(
                    model,
                    tokenizer,
                    order,
                    method=method,
                    covariance=covariance,
                    targets=own_targets,
                    batch_size=batch_size,
                    evaluate_every=evaluate_every,
                    neighborhood_limit=neighborhood_limit,
                    original=original,
                    generate=generate,
                    measure=measure,
                    stop_at_failure=True,
                    baseline=baseline,
                    architecture=architecture,
                    seed=seed,
                    progress=progress,
                )
            except D4SError as error:
                unfinished.add((label, seed))  # worth another try, so it is not kept in the folder
                partial = getattr(error, "result", None)
                if partial is None or not partial.edits_table:
                    errors.append(error)
                if partial is None:
                    results[label][seed] = Record(method.name, failure=f"before the first edit: {error}")
                else:  # an evaluation failed
                    results[label][seed] = partial.record()
                    partial.restore()
            except BaseException as error:
                if hasattr(error, "result"):
                    error.result.restore()
                raise
            else:
                results[label][seed] = result.record()
                result.restore()
                del result  # and with it the copy of the weights
                if kept is not None:
                    results[label][seed].save(_place(kept.folder, label, seed))
            finally:  # also what a sequence that was interrupted has found
                if place_of_targets is not None and own_targets is not None and len(own_targets) > known:
                    own_targets.save(place_of_targets)
            if weights_digest(model) != before:
                raise ModelError(f"{label} did not give back the weights it began with; load the model again")
    if len(errors) == len(configured) * len(seeds):
        raise errors[0]
    return Comparison(results, frozenset(unfinished))


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


def _told_apart(measure: Callable[[], Mapping[str, float]] | None) -> Any:
    """What a folder keeps of a measure: its `settings`; of any other callable that there was one."""
    owner = getattr(measure, "__self__", measure)
    return getattr(owner, "settings", measure is not None)


def _place(folder: Path, label: str, seed: int) -> Path:
    # Quoted, so that no two labels share a file: a/b is a%2Fb, and a-b stays as it is.
    return folder / "results" / f"{quote(label, safe=' +,=()[]')}-{seed}.json"


def _targets_place(folder: Path, method: Method, seed: int) -> Path:
    """One file for all configurations that ask for the same targets."""
    name = hashlib.sha256(f"{_decides_targets(method)} {seed}".encode()).hexdigest()[:12]
    return folder / "targets" / f"{name}.safetensors"


def _decides_targets(method: Method) -> str:
    """All of a configuration that targets hang on."""
    fields = asdict(method)
    return json.dumps(
        [fields[name] for name in ("target", "contexts", "context_lengths")] + [fields["layers"][-1]]
    )


class _Kept:
    """The sequences of a comparison in a folder, and what they have in common."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        path = folder / "settings.json"
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
        for name, value in wanted.items():
            if stored.get(name) != value:
                there, here = _short(stored.get(name)), _short(value)
                raise ConfigError(
                    f"{folder} holds a comparison with other {name} ({there} there, {here} here); "
                    "name a new folder, or ask for the same"
                )

    def record(self, label: str, seed: int, method: Method) -> Record | None:
        """The sequence of this label and seed, if it has ended. ConfigError if its configuration was another."""
        path = _place(self.folder, label, seed)
        if not path.exists():
            return None
        record = Record.load(path)
        if record.method != method.name or record.config != json.loads(json.dumps(asdict(method))):
            raise ConfigError(
                f"{path}: a sequence of {record.method} with another configuration; name a new folder, or another label"
            )
        return record


def _short(value: Any, most: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}…"


def _configured(methods: Configs, anatomy: Anatomy) -> dict[str, Method]:
    named = methods if isinstance(methods, Mapping) else dict.fromkeys(methods)
    configured: dict[str, Method] = {}
    for label, config in named.items():
        if isinstance(config, Method):
            configured[label] = config
        else:
            fields = dict(config or {})
            configured[label] = method_for(str(fields.pop("method", label)), anatomy, fields)
    if not configured:
        raise ConfigError("no methods were given; d4s methods lists them")
    return configured


def weights_digest(model: Any) -> str:
    """Hex digest of every bit of every parameter."""
    digest = hashlib.blake2b()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        flat = parameter.detach().reshape(-1).cpu().contiguous()
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of history rows of several seeds, with 95 % intervals by Student's t; one row stays as it is."""
    if len(rows) == 1:
        return dict(rows[0])
    combined: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        if name.endswith((".low", ".high")):
            continue
        values = [float(row[name]) for row in rows if row.get(name) is not None]
        if not values:
            continue
        combined[name] = mean = sum(values) / len(values)
        if name not in (*_CLOCKS, "seconds_an_edit") and len(values) > 1:  # the machine's, not the seed's
            # Products, since a square that overflows raises; a collapsed model's perplexity may.
            deviation = math.sqrt(sum((v - mean) * (v - mean) for v in values) / (len(values) - 1))
            half = student_t(len(values) - 1) * deviation / math.sqrt(len(values))
            low, high = mean - half, mean + half
            if is_share(name):  # Student's t does not know that these end at 0 and 1
                low, high = max(low, 0.0), min(high, 1.0)
            combined |= {f"{name}.low": low, f"{name}.high": high}
    combined["step"] = min(row["step"] for row in rows)
    return combined


def student_t(freedom: int) -> float:
    """97.5 % quantile of Student's t; beyond the table's end to .1 %."""
    return _T[freedom - 1] if freedom <= len(_T) else 1.960 + 2.4 / freedom + 2.7 / freedom**2


def few_layers(histories: Mapping[str, DataFrame]) -> dict[str, DataFrame]:
    """Without methods that edit too many layers to be drawn a panel each, if others remain."""
    few = {
        label: frame
        for label, frame in histories.items()
        if sum(str(c).startswith("l1_norm.") and str(c).count(".") == 1 for c in frame.columns)
        <= _MOST_LAYERS
    }
    chosen = few or histories
    # Means over seeds carry intervals of the norms too, which are no layers.
    return {
        label: frame[[c for c in frame.columns if not (c.startswith("l1_norm.") and c.count(".") > 1)]]
        for label, frame in chosen.items()
    }


def _is_figure(name: str) -> bool:
    stem = name.removesuffix(".low").removesuffix(".high")
    return stem not in _CLOCKS and "." not in stem


def _interval(seeds: int) -> str:
    return f"over {seeds} seeds, Student's t" if seeds > 1 else "over edits, bootstrap"


def _common_steps(records: Iterable[Record]) -> list[int]:
    """Numbers of edits at which every sequence that began was evaluated, ascending."""
    steps = [{row["step"] for row in record.history} for record in records if record.history]
    return sorted(set.intersection(*steps)) if steps else []


def _row_at(record: Record, point: int) -> dict[str, Any] | None:
    return next((row for row in record.history if row["step"] == point), None)


def _spelled(table: DataFrame, name: str) -> list[str]:
    def number(value: float) -> str:
        return spelled(name, value).removesuffix(" %")  # said once, below the table

    cells = []
    for _, row in table.iterrows():
        value, low, high = (row.get(n, math.nan) for n in (name, f"{name}.low", f"{name}.high"))
        text = "" if value != value else number(value)
        cells.append(text if low != low or not text else f"{text} [{number(low)}, {number(high)}]")
    return cells


def aligned(columns: Sequence[tuple[str, list[str]]]) -> list[str]:
    """Lines of a text table: the first column to the left, the others to the right."""
    widths = [max(len(head), *map(len, cells)) for head, cells in columns]
    rows = zip(*([head, *cells] for head, cells in columns), strict=True)
    lines = []
    for row in rows:
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([first.strip().ljust(widths[0]), *rest]).rstrip())
    return lines
