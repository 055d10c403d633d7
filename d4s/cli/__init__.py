"""The command line: `d4s VERB …`. Exit status 0: done; 1: failed, with one line that says why; 2: wrong arguments."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from d4s.errors import ConfigError, D4SError
from d4s.files import check_folder, check_place
from d4s.interrupts import Terminated, deferred, ending_signals_raise

# What `d4s reproduce` makes; the protocols stand in d4s/study/paper/protocols.py.
PAPER = ("table2", "table3", "table4", "fig2", "fig3", "fig5", "fig6", "fig7", "fig8")


def _without(options: argparse.Namespace, names: Sequence[str], where: str) -> None:
    for name in names:
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} means nothing with {where}")


def _load_model(options: argparse.Namespace) -> tuple[Any, Any]:
    """(model, tokenizer) of MODEL."""
    from d4s.models.loading import load_model

    _without_loading_bars()
    try:
        return load_model(options.model, dtype=options.dtype, device=options.device)
    except ConfigError as error:  # of the device: the rest is checked by the parser
        raise ConfigError(f"--{error}") from None


def _without_loading_bars() -> None:
    """transformers draws a bar for every file it loads; this command line has bars of its own."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _load_edits(options: argparse.Namespace) -> list[Any]:
    if options.edits == "embedded":
        from d4s.embedded import load_demo_edits

        return load_demo_edits(options.limit)
    from d4s.edits.formats import load_edits

    return load_edits(
        options.edits, limit=options.limit, skip_bad=options.skip_bad, zsre_target=options.zsre_target
    )


def _config(options: argparse.Namespace) -> dict[str, Any] | None:
    """--set FIELD=VALUE …, each value as JSON where it is JSON."""
    fields: dict[str, Any] = {}
    for item in options.set or ():
        name, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item!r}: must be FIELD=VALUE, as --set prior_weight=20000")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            try:
                fields[name] = float(value)  # .1, which is no JSON
            except ValueError:
                fields[name] = value
        except (
            ValueError,
            RecursionError,
        ) as error:  # a number of thousands of digits, lists in lists in lists
            why = "is nested too deeply" if isinstance(error, RecursionError) else "has too many digits"
            raise ConfigError(f"--set {name}: its value, {value[:20]}…, {why}") from None
    return fields or None


def _numbers(text: str) -> list[int]:
    """Whole numbers with commas, as --layers 4,5,6"""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers with commas, as 4,5,6") from None


def _count(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1 on")
    return int(text)


def _limit(text: str) -> int:
    """A whole number from 0 on."""
    return 0 if text == "0" else _count(text)


def _seed(text: str) -> int:
    """What every generator of random numbers takes."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 0 to 2³² − 1")
    return int(text)


def _seeds(text: str) -> list[int]:
    """Seeds with commas, as --seeds 0,1,2"""
    return [_seed(number) for number in text.split(",")]


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a share from 0 to 1, as .9 for 90 %")
    return share


def _names(text: str) -> list[str]:
    """Names with commas, as --methods d4s,memit"""
    return [name.strip() for name in text.split(",") if name.strip()]


def _empty_folder(path: Path) -> Path:
    """The folder, made if need be. ConfigError if it already holds something: nothing is overwritten."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        check_place(path)
        raise ConfigError(f"--out {path}: already holds files; name a new or empty folder")
    check_folder(path)
    return path


def _new_file(path: Path) -> None:
    """ConfigError where a folder stands in its place; OSError where its own folder cannot be made or written to."""
    if path.is_dir():
        raise ConfigError(
            f"--out {path}: is a folder; name a file in it, as {path / 'covariance.safetensors'}"
        )
    check_place(path)
    check_folder(path.parent)


def _print_json(value: Any) -> None:
    def plain(item: Any) -> Any:
        if isinstance(item, float) and not math.isfinite(item):
            return None
        if isinstance(item, dict):
            return {str(k): plain(v) for k, v in item.items()}
        if isinstance(item, (list, tuple)):
            return [plain(v) for v in item]
        return item

    print(json.dumps(plain(value), indent=1))


def _say(options: argparse.Namespace) -> Any:
    """Words go to stderr where stdout is for figures."""
    return (lambda text: print(text, file=sys.stderr)) if options.json else print


def demo(options: argparse.Namespace) -> None:
    from d4s.cli.demo import run_demo

    _without_loading_bars()
    figures = run_demo(
        options.out,
        model_name=options.model,
        count=options.edits,
        method=options.method,
        against=options.against,
        seed=options.seed,
        say=_say(options),
    )
    if options.json:
        _print_json(figures)


def edit(options: argparse.Namespace) -> None:
    from d4s.locate.covariance import fingerprint_of
    from d4s.locate.kept_targets import KeptTargets
    from d4s.methods import METHODS, method_for
    from d4s.models.architectures import Anatomy
    from d4s.sequence.run import Result, edit_sequence
    from d4s.sequence.saving import bytes_of

    if _is_unsaved(options.out):
        _save_again(options)
        return
    out = _empty_folder(options.out)
    edits, config = _load_edits(options), _config(options)
    model, tokenizer = _load_model(options)
    check_folder(out, room=int(1.1 * bytes_of(model)))  # the model, and what changed in it
    needs = getattr(METHODS.get(options.method), "needs", ())
    covariance = _covariance_for(options, model, tokenizer) if "covariance" in needs else None
    unedited = fingerprint_of(model)
    kept: KeptTargets | None = None
    if options.targets is not None:
        kept = KeptTargets.load(options.targets)
    elif method_for(options.method, Anatomy(model), config).searches_ahead:
        kept = KeptTargets()
    try:
        result = edit_sequence(
            model,
            tokenizer,
            edits,
            method=options.method,
            config=config,
            covariance=covariance,
            targets=kept,
            batch_size=options.batch_size,
            evaluate_every=options.evaluate_every,
            generate=options.generate,
            measure=_measure(options, model, tokenizer),
            seed=options.seed,
        )
    except BaseException as error:
        made: Result | None = getattr(error, "result", None)
        if made is None or not made.edits_table:
            raise
        before = f"{len(made.edits_table)} edits were made before; they are in {out}"
        _save(made, unedited, out)
        if isinstance(error, D4SError):
            raise D4SError(f"{error}. {before}") from error
        print(f"d4s: {before}", file=sys.stderr)
        raise
    _save(result, unedited, out)
    if options.json:
        _print_json(result.history[-1])
    else:
        print(result.summary())
        _print_notes([result])
        print(f"edited model: {out / 'model'}\nmetrics: {out / 'history.csv'}, {out / 'result.json'}")


_CHANGES = "weights.safetensors"  # in the folder of d4s edit, until the model itself is there


def _save(result: Any, unedited: str, out: Path) -> None:
    """First what cannot be made again, which is small; then the model, which can be made from it.

    Raises D4SError that says what is kept, if any of it cannot be written.
    """
    from d4s.files import write_table
    from d4s.sequence.saving import save_changes

    failed: list[str] = []

    def write(name: str, function: Callable[[Path], None]) -> None:
        try:
            function(out / name)
        except OSError as error:
            failed.append(f"{out / name} ({error.strerror or error})")

    try:
        with deferred():
            write(_CHANGES, lambda path: save_changes(result, unedited, path))
            write("result.json", result.save)
            write("baseline.json", result.baseline.save)
            write("history.csv", lambda path: write_table(result.to_frame(), path))
            if (found := result.editor.bench.targets) is not None and len(found):
                write("targets.safetensors", found.save)
        write("model", lambda path: _save_model(result.model, result.editor.tokenizer, path))
    except KeyboardInterrupt:
        if (out / _CHANGES).exists():
            print(f"d4s: the model was not saved; repeat the command with --out {out}", file=sys.stderr)
        raise
    if not failed:
        (out / _CHANGES).unlink()
        return
    kept = ", ".join(sorted(path.name for path in out.iterdir()))
    says = f"could not be written: {'; '.join(failed)}. In {out} there is: {kept or 'nothing'}"
    if _is_unsaved(out):
        says += f". Make room, and repeat the command with --out {out}: it then only saves the model"
    raise D4SError(says)


def _save_model(model: Any, tokenizer: Any, path: Path) -> None:
    from d4s.files import whole

    with whole(path) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)


def _is_unsaved(out: Path) -> bool:
    """Whether a sequence has ended there without its model."""
    return (out / _CHANGES).is_file() and not (out / "model").exists()


def _save_again(options: argparse.Namespace) -> None:
    """The model of a sequence that has ended, from what changed in it; no edit is made."""
    from d4s.sequence.saving import bytes_of, load_changes_

    out = options.out
    model, tokenizer = _load_model(options)
    check_folder(out, room=bytes_of(model))
    load_changes_(model, tokenizer, out / _CHANGES)
    _save_model(model, tokenizer, out / "model")
    (out / _CHANGES).unlink()
    _say(options)(
        f"the edits of {out} had been made, and their model is saved now; no other was made\n"
        f"edited model: {out / 'model'}"
    )


def targets(options: argparse.Namespace) -> None:
    from d4s.sequence.target_search import search_targets

    _new_file(options.out)
    edits, config = _load_edits(options), _config(options)
    model, tokenizer = _load_model(options)
    kept = search_targets(model, tokenizer, edits, config=config, out=options.out, seed=options.seed)
    if options.json:
        _print_json({"file": str(options.out), "targets": len(kept)})
    else:
        print(f"{options.out}: {len(kept)} targets")


def _print_notes(records: Sequence[Any]) -> None:
    """What was not scored, and why, by the last evaluation of each."""
    for note in dict.fromkeys(note for r in records if r.evaluations for note in r.evaluations[-1].notes):
        print(f"note: {note}")


def evaluate(options: argparse.Namespace) -> None:
    from d4s.measure.columns import spelled
    from d4s.measure.metrics import evaluate as evaluate_edits
    from d4s.models.readiness import check_ready

    edits = _load_edits(options)
    model, tokenizer = _load_model(options)
    if options.baseline is None:  # else it has been edited, and may have come to say NaN by that
        check_ready(model, tokenizer, edits)
    measure = _measure(options, model, tokenizer)
    found = evaluate_edits(
        model,
        tokenizer,
        edits,
        baseline=_baseline(options, edits),
        generate=options.generate,
        fluency=options.fluency,
        seed=options.seed,
        progress=True,
    )
    tasks = measure() if measure is not None else {}
    if options.json:
        _print_json(found.to_dict(rows=False) | ({"tasks": tasks} if tasks else {}))
    else:
        print(
            "\n".join(
                [found.summary(), *(f"{name}: {spelled(name, value, 2)}" for name, value in tasks.items())]
            )
        )


def _baseline(options: argparse.Namespace, edits: list[Any]) -> Any:
    """--baseline: a file that d4s edit wrote, or the unedited model itself, which is then asked."""
    from d4s.measure.metrics import Baseline, take_baseline

    if options.baseline is None:
        return None
    if Path(options.baseline).is_file():
        return Baseline.load(options.baseline)
    unedited = argparse.Namespace(**{**vars(options), "model": options.baseline})
    return take_baseline(*_load_model(unedited), edits, progress=True)


def _measure(options: argparse.Namespace, model: Any, tokenizer: Any) -> Any:
    """--tasks: their scores, taken when called; None without."""
    if not options.tasks:
        return None
    from d4s.measure.downstream import TaskScores, require_harness
    from d4s.measure.task_files import check_task_files

    require_harness()
    trusted = {"trust_task_code": True} if options.trust_task_code else {}
    if options.task_folder is not None and not trusted:
        check_task_files(options.task_folder)  # before the edits are made, not after
    return TaskScores(
        model,
        tokenizer,
        options.tasks,
        limit=options.task_limit,
        include_path=options.task_folder,
        seed=options.seed,
        **trusted,
    )


def covariance(options: argparse.Namespace) -> None:
    from d4s.locate.covariance import estimate_covariance
    from d4s.models.readiness import check_ready

    _new_file(options.out)
    model, tokenizer = _load_model(options)
    check_ready(model, tokenizer)
    found = estimate_covariance(
        model, tokenizer, options.corpus, layers=options.layers, tokens=options.tokens, seed=options.seed
    )
    found.save(options.out)
    facts = {
        "file": str(options.out),
        "layers": list(found.layers),
        "keys": found.count,
        "fingerprint": found.fingerprint,
    }
    if options.json:
        _print_json(facts)
    else:
        print(f"{options.out}: layers {facts['layers']}, {found.count} key vectors a layer")


def compare(options: argparse.Namespace) -> None:
    from d4s.sequence.compare import compare as compare_methods

    check_folder(options.out)
    edits = _load_edits(options)
    model, tokenizer = _load_model(options)
    found = compare_methods(
        model,
        tokenizer,
        edits,
        options.methods,
        out=options.out,
        covariance=_covariance_for(options, model, tokenizer),
        targets=options.targets,
        batch_size=options.batch_size or 1,
        evaluate_every=options.evaluate_every,
        seeds=options.seeds or options.seed,
        shuffle=options.shuffle,
        count=options.count,
        neighborhood_limit=options.neighborhood_limit,
        generate=options.generate,
        measure=_measure(options, model, tokenizer),
    )
    found.save(options.out)
    if options.json:
        _print_json(found.to_dict())
    else:
        print(found.summary())
        _print_notes([record for by_seed in found.results.values() for record in by_seed.values()])
        print(f"table, histories, figures: {options.out}")


def analyze(options: argparse.Namespace) -> None:
    from d4s.sequence.compare import compare as compare_methods
    from d4s.sequence.record import Record
    from d4s.study.data_view import analyze_data
    from d4s.study.model_view import analyze_model

    bounds = {n: b for n in ("efficacy", "specificity") if (b := getattr(options, f"{n}_bound")) is not None}
    view: Any
    if options.view == "data":
        _without(options, ("neighborhood_limit", "efficacy_bound", "specificity_bound"), "analyze data")
    if options.edits is None:
        if options.view == "data":
            raise ConfigError("analyze data needs EDITS: d4s analyze data MODEL EDITS --out DIR")
        of_a_run = (
            "methods",
            "batch_size",
            "covariance",
            "evaluate_every",
            "neighborhood_limit",
            "device",
            "limit",
        )
        _without(options, of_a_run, "the result of an earlier run")
        record = Record.load(options.model)
        out = _empty_folder(options.out)
        view = analyze_model(record, bounds=bounds, seed=options.seed)
    else:
        out = _empty_folder(options.out)
        edits = _load_edits(options)
        model, tokenizer = _load_model(options)
        run: dict[str, Any] = {
            "methods": options.methods or ["rome", "memit"],
            "covariance": _covariance_for(options, model, tokenizer),
            "batch_size": options.batch_size or 1,
            "evaluate_every": options.evaluate_every or max(1, len(edits) // 10),
        }
        if options.view == "data":
            view = analyze_data(model, tokenizer, edits, **run, seed=options.seed)
        else:
            limit = options.neighborhood_limit
            found = compare_methods(
                model, tokenizer, edits, **run, seeds=options.seed, neighborhood_limit=limit
            )
            view = analyze_model(found, bounds=bounds, seed=options.seed)
    view.save(out)
    if options.json:
        _print_json(view.to_dict())
    else:
        print(f"{view.summary()}\ntables, figures: {out}")


def reproduce(options: argparse.Namespace) -> None:
    from d4s.edits.formats import load_edits
    from d4s.study.paper.reproduce import reproduce as reproduce_one

    if options.name not in ("table4", "fig6"):
        _without(options, ("tasks", "task_folder", "task_limit"), options.name)
    out = options.out
    if any(out.glob(f"{options.name}*-details/settings.json")):  # it goes on where it was
        check_folder(out)
    else:
        out = _empty_folder(out)
    edits = {
        label: load_edits(path, skip_bad=options.skip_bad)
        for label, path in _labels(options.edits or ()).items()
    }
    model, tokenizer = _load_model(options)
    found = reproduce_one(
        options.name,
        model,
        tokenizer,
        edits or None,
        out=out,
        counts=options.counts,
        methods=options.methods,
        covariance=_covariance_for(options, model, tokenizer),
        tasks=options.tasks,
        task_folder=options.task_folder,
        task_limit=options.task_limit,
        trust_task_code=options.trust_task_code,
        seed=options.seed,
    )
    if options.json:
        _print_json(found.to_dict())
    else:
        print(f"{found.summary()}\nfigure, data, details: {out}")


def _labels(paths: Sequence[Path]) -> dict[str, Path]:
    """Names of data sets: the files', with their folders' where two files are called the same."""
    stems = [path.stem for path in paths]
    labels = [
        path.stem if stems.count(path.stem) == 1 else f"{path.resolve().parent.name}-{path.stem}"
        for path in paths
    ]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"--edits: two of the files are both called {label!r}; rename one")
    return dict(zip(labels, paths, strict=True))


def _covariance_for(options: argparse.Namespace, model: Any, tokenizer: Any) -> Any:
    """--covariance, or the embedded model's own; None: estimated and cached where a method needs it."""
    from d4s.locate.covariance import Covariance

    if options.covariance:
        return Covariance.load(options.covariance)
    if options.model == "embedded":
        from d4s.embedded.statistics import demo_covariance

        return demo_covariance(model, tokenizer, layers=tuple(range(len(model.model.layers))))
    return None


def models(options: argparse.Namespace) -> None:
    from d4s.models.architectures import ARCHITECTURES

    if options.json:
        _print_json({name: dataclasses.asdict(row) for name, row in ARCHITECTURES.items()})
        return
    width, blocks = max(map(len, ARCHITECTURES)), max(len(row.blocks) for row in ARCHITECTURES.values())
    print(f"{'model type':{width}}  {'blocks':{blocks}}  edited projection (W)")
    for name, row in sorted(ARCHITECTURES.items()):
        print(f"{name:{width}}  {row.blocks:{blocks}}  {row.mlp_output}")


def methods(options: argparse.Namespace) -> None:
    from d4s.methods import METHODS, published, tables

    told = tables.overview() if options.name is None else tables.about(options.name)
    if options.json:
        names = METHODS if options.name is None else (options.name,)
        _print_json({name: published.describe(METHODS[name]) for name in names})
    else:
        print(told)
        if options.name is None:
            print("d4s methods NAME: a method's fields and presets")


def tasks(options: argparse.Namespace) -> None:
    from d4s.measure.downstream import known_tasks
    from d4s.measure.downstream_tasks import make_tasks

    if options.do == "list":
        if len(options.names) > 1:
            raise ConfigError("d4s tasks list takes one part of a name, as d4s tasks list mmlu")
        found = known_tasks(*options.names)
        if options.json:
            _print_json(found)
        else:
            print("\n".join(found))
        return
    if len(options.names) < 2:
        raise ConfigError("d4s tasks make needs FOLDER and DATA, as d4s tasks make my-tasks facts.json")
    folder, *data = options.names
    check_folder(folder)
    made = make_tasks(data, folder, seed=options.seed)
    if options.json:
        _print_json({"folder": folder, "tasks": made})
    else:
        print(f"{folder}: {', '.join(made)}; use them by --task-folder {folder} --tasks {made[-1]}")


class _Parser(argparse.ArgumentParser):
    """Takes options between positional arguments also where one of these may be left out."""

    _within = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._within or self._subparsers is not None:
            return super().parse_known_args(args, namespace)
        self._within = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._within = False


def parser() -> argparse.ArgumentParser:
    from d4s import __version__

    top = _Parser(prog="d4s", description="Edits facts in language models, in sequence.")
    top.add_argument("--version", action="version", version=f"d4s {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(
        function: Any,
        text: str,
        *,
        first: dict[str, Any] | None = None,
        model: bool = False,
        edits: bool = False,
    ) -> argparse.ArgumentParser:
        made = verbs.add_parser(function.__name__, help=text, description=text)
        made.set_defaults(function=function)
        made.add_argument("--json", action="store_true", help="figures as JSON on standard output")
        made.add_argument("--seed", type=_seed, default=0)
        if first is not None:
            made.add_argument(**first)
        if model:
            made.add_argument(
                "model", metavar="MODEL", help="folder, hub name, .gguf file, 'embedded' or 'smollm2'"
            )
            made.add_argument("--device", help="cpu, cuda, cuda:1 …; default: cuda where there is one")
            made.add_argument(
                "--dtype",
                default="auto",
                choices=("auto", "float32", "float16", "bfloat16"),
                help="of the weights",
            )
        if edits:
            # A file of results comes without edits.
            optional: dict[str, Any] = {"nargs": "?"} if function is analyze else {}
            made.add_argument("edits", metavar="EDITS", help="file of edits, or 'embedded'", **optional)
            made.add_argument("--limit", type=_count, help="take the first LIMIT edits")
            made.add_argument(
                "--skip-bad", action="store_true", help="leave wrong records out, and list them"
            )
            made.add_argument(
                "--zsre-target",
                choices=("alt", "answer"),
                default="alt",
                help="zsRE: write the made-up answer, as EasyEdit (default), or the true one, as ROME and MEMIT",
            )
        return made

    made = verb(demo, "edit the embedded model, and compare with a method that collapses")
    made.add_argument("--out", type=Path, default=Path("d4s-demo"), help="folder for the figures")
    made.add_argument(
        "--model", default="embedded", help="as of the other verbs, as smollm2; default: embedded"
    )
    made.add_argument(
        "--edits", type=_count, help="edits, one at a time; default: 200 of the embedded model, else 20"
    )
    made.add_argument("--method", default="d4s")
    made.add_argument("--against", default="memit")

    def scored(made: argparse.ArgumentParser) -> None:
        made.add_argument("--generate", action="store_true", help="also score free generation")
        downstream(made)

    def downstream(made: argparse.ArgumentParser) -> None:
        made.add_argument(
            "--tasks", type=_names, help="downstream tasks of lm-evaluation-harness, as arc_challenge,mmlu"
        )
        made.add_argument("--task-folder", type=Path, help="folder of local task files")
        made.add_argument("--task-limit", type=_count, help="questions of each task")
        made.add_argument(
            "--trust-task-code",
            action="store_true",
            help="run the Python that the task files in --task-folder name (!function)",
        )

    def fields(made: argparse.ArgumentParser) -> None:
        made.add_argument(
            "--set",
            nargs="+",
            action="extend",
            metavar="FIELD=VALUE",
            help="fields of the method's configuration",
        )

    def kept(made: argparse.ArgumentParser) -> None:
        made.add_argument(
            "--targets",
            type=Path,
            help="file made by d4s targets, or an earlier run's: the targets in it are not searched again",
        )

    made = verb(
        edit,
        "edit a model in sequence. Where the edits were made but the model could not be saved (a full disk), the same "
        f"command again only saves it, from {_CHANGES} in --out",
        model=True,
        edits=True,
    )
    made.add_argument("--method", default="d4s")
    made.add_argument(
        "--out", type=Path, required=True, help="new folder for the edited model and its metrics"
    )
    made.add_argument("--covariance", type=Path, help="file made by d4s covariance")
    made.add_argument("--batch-size", type=_count, default=1, help="edits a step")
    made.add_argument("--evaluate-every", type=_count, help="edits between evaluations")
    fields(made)
    kept(made)
    scored(made)

    made = verb(
        targets,
        "search the targets of edits on the unedited model, for edit and compare --targets; repeated, it goes on",
        model=True,
        edits=True,
    )
    made.add_argument("--out", type=Path, required=True, help="safetensors file")
    fields(made)

    made = verb(evaluate, "score a model on edits", model=True, edits=True)
    scored(made)
    made.add_argument(
        "--fluency", action="store_true", help="also fluency and consistency of generated texts"
    )
    made.add_argument(
        "--baseline",
        metavar="FILE|MODEL",
        help="the unedited model's answers (baseline.json of d4s edit), or that model: for what must not change",
    )

    made = verb(covariance, "key statistics of a model over a corpus, all layers in one pass", model=True)
    made.add_argument(
        "corpus", metavar="CORPUS", nargs="?", help="text file; default: sampled from the model"
    )
    made.add_argument("--out", type=Path, required=True, help="safetensors file")
    made.add_argument("--layers", type=_numbers, help="as 4,5,6; default: all")
    made.add_argument("--tokens", type=_count, help="key vectors; default: 10 · d_in")

    def several(made: argparse.ArgumentParser, again: str = "") -> None:
        made.add_argument("--out", type=Path, required=True, help=f"new folder for tables and figures{again}")
        made.add_argument("--covariance", type=Path, help="file made by d4s covariance")
        made.add_argument("--batch-size", type=_count, help="edits a step; default: 1")
        made.add_argument(
            "--neighborhood-limit",
            type=_limit,
            help="neighbours an edit that are scored on the way; default: all",
        )

    made = verb(compare, "the same edits with several methods", model=True, edits=True)
    several(made, "; or that of an earlier run, which then goes on")
    made.add_argument("--methods", type=_names, default=["d4s", "memit"], help="as d4s,memit,rome")
    made.add_argument("--evaluate-every", type=_count, help="edits between evaluations; default: at the end")
    made.add_argument("--seeds", type=_seeds, help="as 0,1,2: means over them; default: --seed")
    made.add_argument("--shuffle", action="store_true", help="each seed has its own order of the edits")
    made.add_argument("--count", type=_count, help="edits made, the first of that order; default: all")
    kept(made)
    scored(made)

    made = verb(
        analyze,
        "why editing makes a model decline: by what it is edited with (data), or by what changes inside it (model). "
        "The model view also takes the result of an earlier run: d4s analyze model RESULT.json",
        first={"dest": "view", "choices": ("data", "model")},
        model=True,
        edits=True,
    )
    several(made)
    made.add_argument("--methods", type=_names, help="as rome,memit,d4s; default: rome,memit")
    made.add_argument(
        "--evaluate-every", type=_count, help="edits between evaluations; default: a tenth of them"
    )
    for name in ("efficacy", "specificity"):
        made.add_argument(
            f"--{name}-bound",
            type=_share,
            help="share it must not fall under; default: 90 %% of its first level",
        )

    made = verb(
        reproduce,
        "a table or figure of the D4S paper",
        first={"dest": "name", "metavar": "NAME", "choices": PAPER, "help": ", ".join(PAPER)},
        model=True,
    )
    made.add_argument(
        "--edits", type=Path, nargs="+", help="a file a data set; default: the embedded model's"
    )
    made.add_argument("--skip-bad", action="store_true", help="leave wrong records out, and list them")
    made.add_argument("--counts", type=_numbers, help="edits at which is scored; default: the paper's")
    made.add_argument("--methods", type=_names, help="as rome,memit,d4s; default: the paper's")
    made.add_argument("--out", type=Path, required=True, help="new folder for table, figure and statement")
    made.add_argument("--covariance", type=Path, help="file made by d4s covariance")
    downstream(made)  # for table4 and fig6

    made = verb(
        tasks,
        "downstream tasks: list those that lm-evaluation-harness knows, d4s tasks list [PART OF A NAME]; or make local "
        "ones that need no network, d4s tasks make FOLDER DATA …, DATA being folders with arc_challenge.jsonl, "
        "winogrande.jsonl, gsm8k.jsonl, truthfulqa.csv or mmlu/test, and files of edits, whose old answers are asked",
        first={"dest": "do", "choices": ("list", "make")},
    )
    made.add_argument("names", nargs="*", metavar="NAME", help="part of a task's name; or FOLDER DATA …")

    verb(models, "model types that can be edited")
    verb(
        methods,
        "methods and what they need; of one its fields and presets",
        first={"dest": "name", "metavar": "NAME", "nargs": "?", "help": "a method; default: all of them"},
    )
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        with ending_signals_raise():
            options.function(options)
            sys.stdout.flush()
    except D4SError as error:
        print(f"d4s: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except Terminated as error:
        print(f"d4s: {error}; what had been written is whole", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("d4s: stopped; what had been written is whole", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Who read standard output (head) has had enough; Python's last flush of it would complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # as a program that SIGPIPE ends
    except OSError as error:
        print(f"d4s: {error.filename or ''} {error.strerror or error}".replace("  ", " "), file=sys.stderr)
        return 1
    return 0
