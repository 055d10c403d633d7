"""The command line: `d4s VERB …`. Exit status 0: done; 1: failed, with one line that says why; 2: wrong arguments."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d4s.errors import ConfigError, D4SError, ModelError

# What `d4s reproduce` makes; the protocols stand in d4s/reproduce.py.
PAPER = ("table2", "table3", "table4", "fig2", "fig3", "fig5", "fig6", "fig7", "fig8")


def _without(options: argparse.Namespace, names: Sequence[str], where: str) -> None:
    for name in names:
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} means nothing with {where}")


def _load_model(options: argparse.Namespace) -> tuple[Any, Any]:
    """(model, tokenizer) of MODEL: a folder, a hub name, or "embedded"."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = "auto" if options.dtype == "auto" else getattr(torch, options.dtype)
    _without_loading_bars()
    if options.model == "embedded":
        from d4s import demo

        model, tokenizer = demo.load_model(None if dtype == "auto" else dtype)
    else:
        try:
            # Other weight files than safetensors are pickles, and nothing is unpickled here.
            model, report = AutoModelForCausalLM.from_pretrained(
                options.model, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(options.model)
        # Whatever transformers, safetensors, tokenizers or the code behind a config.json raise.
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(
                f"{options.model}: no causal language model could be loaded ({reason}). MODEL is a folder with "
                "config.json, model.safetensors and tokenizer.json, the name of one on the hub, or 'embedded'"
            ) from None
        if missing := sorted(report["missing_keys"]):
            raise ModelError(
                f"{options.model}: its files lack {len(missing)} weights that config.json asks for, "
                f"{missing[0]} among them; is it another model's config.json?"
            )
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = model.to(device).eval()
    # No such device, or a torch that was built without it.
    except (AssertionError, RuntimeError) as error:
        raise ConfigError(f"--device {device}: {str(error).splitlines()[0]}") from None
    from d4s.methods.grace import CODEBOOK_FILE, load_codebook

    if (Path(options.model) / CODEBOOK_FILE).exists():
        load_codebook(model, tokenizer, options.model)
    return model, tokenizer


def _without_loading_bars() -> None:
    """transformers draws a bar for every file it loads; this command line has bars of its own."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _load_edits(options: argparse.Namespace) -> list[Any]:
    if options.edits == "embedded":
        from d4s import demo

        return demo.load_demo_edits(options.limit)
    from d4s.datasets import load_edits

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
            fields[name] = value
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
        raise ConfigError(f"--out {path}: already holds files; name a new or empty folder")
    path.mkdir(parents=True, exist_ok=True)
    return path


def _new_file(path: Path) -> None:
    """ConfigError where a folder stands in its place, or its own folder cannot be made."""
    if path.is_dir():
        raise ConfigError(
            f"--out {path}: is a folder; name a file in it, as {path / 'covariance.safetensors'}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)


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
    from d4s.demo.run import run_demo

    _without_loading_bars()
    figures = run_demo(
        options.out,
        count=options.edits,
        method=options.method,
        against=options.against,
        seed=options.seed,
        say=_say(options),
    )
    if options.json:
        _print_json(figures)


def edit(options: argparse.Namespace) -> None:
    from d4s.files import whole, write_table
    from d4s.methods import METHODS
    from d4s.sequence import Result, edit_sequence

    out = _empty_folder(options.out)
    edits, config = _load_edits(options), _config(options)
    model, tokenizer = _load_model(options)
    needs = getattr(METHODS.get(options.method), "needs", ())
    covariance = _covariance_for(options, model, tokenizer) if "covariance" in needs else None

    def save(result: Result) -> None:
        result.save(out / "result.json")
        write_table(result.to_frame(), out / "history.csv")
        result.baseline.save(out / "baseline.json")
        with whole(out / "model") as beside:
            model.save_pretrained(beside)
            tokenizer.save_pretrained(beside)

    try:
        result = edit_sequence(
            model,
            tokenizer,
            edits,
            method=options.method,
            config=config,
            covariance=covariance,
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
        save(made)
        before = f"{len(made.edits_table)} edits were made before; they are in {out}"
        if isinstance(error, D4SError):
            raise D4SError(f"{error}. {before}") from error
        print(f"d4s: {before}", file=sys.stderr)
        raise
    save(result)
    if options.json:
        _print_json(result.history[-1])
    else:
        print(result.summary())
        _print_notes([result])
        print(f"edited model: {out / 'model'}\nmetrics: {out / 'history.csv'}, {out / 'result.json'}")


def _print_notes(records: Sequence[Any]) -> None:
    """What was not scored, and why, by the last evaluation of each."""
    for note in dict.fromkeys(note for r in records if r.evaluations for note in r.evaluations[-1].notes):
        print(f"note: {note}")


def evaluate(options: argparse.Namespace) -> None:
    from d4s.metrics import evaluate as evaluate_edits

    edits = _load_edits(options)
    model, tokenizer = _load_model(options)
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
            "\n".join([found.summary(), *(f"{name}: {100 * value:.2f} %" for name, value in tasks.items())])
        )


def _baseline(options: argparse.Namespace, edits: list[Any]) -> Any:
    """--baseline: a file that d4s edit wrote, or the unedited model itself, which is then asked."""
    from d4s.metrics import Baseline, take_baseline

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
    from d4s.downstream import TaskScores, require_harness

    require_harness()
    return TaskScores(
        model,
        tokenizer,
        options.tasks,
        limit=options.task_limit,
        include_path=options.task_folder,
        seed=options.seed,
    )


def covariance(options: argparse.Namespace) -> None:
    from d4s.covariance import estimate_covariance

    _new_file(options.out)
    model, tokenizer = _load_model(options)
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
    from d4s.compare import compare as compare_methods

    edits = _load_edits(options)
    model, tokenizer = _load_model(options)
    found = compare_methods(
        model,
        tokenizer,
        edits,
        options.methods,
        out=options.out,
        covariance=_covariance_for(options, model, tokenizer),
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
    from d4s.analysis import analyze_data, analyze_model
    from d4s.compare import compare as compare_methods
    from d4s.sequence import Record

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
    from d4s.datasets import load_edits
    from d4s.reproduce import reproduce as reproduce_one

    if options.name not in ("table4", "fig6"):
        _without(options, ("tasks", "task_folder", "task_limit"), options.name)
    out = options.out
    if not any(out.glob(f"{options.name}*-details/settings.json")):  # else it goes on where it was
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
    from d4s.covariance import Covariance

    if options.covariance:
        return Covariance.load(options.covariance)
    if options.model == "embedded":
        from d4s.demo.run import demo_covariance

        return demo_covariance(model, tokenizer, layers=tuple(range(len(model.model.layers))))
    return None


def models(options: argparse.Namespace) -> None:
    from d4s.architectures import ARCHITECTURES

    if options.json:
        _print_json({name: dataclasses.asdict(row) for name, row in ARCHITECTURES.items()})
        return
    width = max(map(len, ARCHITECTURES))
    print(f"{'model type':{width}}  blocks                edited projection (W)")
    for name, row in sorted(ARCHITECTURES.items()):
        print(f"{name:{width}}  {row.blocks:20}  {row.mlp_output}")


def methods(options: argparse.Namespace) -> None:
    from d4s.methods import METHODS, presets

    if options.json:
        _print_json({name: presets.describe(cls) for name, cls in METHODS.items()})
        return
    for name, cls in METHODS.items():
        about = presets.describe(cls)
        print(
            f"{name}\n    {about['paper']}; changes {about['changes']}; needs {', '.join(about['needs']) or 'nothing'}"
        )
        for key, fields in about["presets"].items():
            print(f"    {key}: " + ", ".join(f"{k}={v}" for k, v in fields.items()))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="d4s", description="Edits facts in language models, in sequence.")
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
            made.add_argument("model", metavar="MODEL", help="folder, hub name, or 'embedded'")
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
    made.add_argument("--edits", type=_count, default=200, help="edits, one at a time")
    made.add_argument("--method", default="d4s")
    made.add_argument("--against", default="memit")

    def scored(made: argparse.ArgumentParser) -> None:
        made.add_argument("--generate", action="store_true", help="also score free generation")
        tasks(made)

    def tasks(made: argparse.ArgumentParser) -> None:
        made.add_argument(
            "--tasks", type=_names, help="downstream tasks of lm-evaluation-harness, as arc_challenge,mmlu"
        )
        made.add_argument("--task-folder", type=Path, help="folder of local task files")
        made.add_argument("--task-limit", type=_count, help="questions of each task")

    made = verb(edit, "edit a model in sequence", model=True, edits=True)
    made.add_argument("--method", default="d4s")
    made.add_argument(
        "--out", type=Path, required=True, help="new folder for the edited model and its metrics"
    )
    made.add_argument("--covariance", type=Path, help="file made by d4s covariance")
    made.add_argument("--batch-size", type=_count, default=1, help="edits a step")
    made.add_argument("--evaluate-every", type=_count, help="edits between evaluations")
    made.add_argument(
        "--set",
        nargs="+",
        action="extend",
        metavar="FIELD=VALUE",
        help="fields of the method's configuration",
    )

    scored(made)

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
    tasks(made)  # for table4 and fig6

    verb(models, "model types that can be edited")
    verb(methods, "methods, what they need, and their presets")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        options.function(options)
    except D4SError as error:
        print(f"d4s: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print("d4s: stopped; what had been written is whole", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"d4s: {error.filename or ''} {error.strerror or error}".replace("  ", " "), file=sys.stderr)
        return 1
    return 0
