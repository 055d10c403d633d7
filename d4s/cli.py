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


def _load_model(options: argparse.Namespace) -> tuple[Any, Any]:
    """(model, tokenizer) of MODEL: a folder, a hub name, or "embedded"."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if options.model == "embedded":
        from d4s import demo

        return demo.load_model()
    try:
        dtype = "auto" if options.dtype == "auto" else getattr(torch, options.dtype)
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{options.model}: no causal language model could be loaded ({reason}). MODEL is a folder with "
            "config.json, weights and tokenizer.json, the name of one on the hub, or 'embedded'"
        ) from None
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval(), tokenizer


def _load_edits(options: argparse.Namespace) -> list[Any]:
    if options.edits == "embedded":
        from d4s import demo

        return demo.load_demo_edits(options.limit)
    from d4s.datasets import load_edits

    return load_edits(options.edits, limit=options.limit, skip_bad=options.skip_bad)


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


def _empty_folder(path: Path) -> Path:
    """The folder, made if need be. ConfigError if it already holds something: nothing is overwritten."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"--out {path}: already holds files; name a new or empty folder")
    path.mkdir(parents=True, exist_ok=True)
    return path


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
    from d4s.covariance import Covariance
    from d4s.sequence import edit_sequence

    out = _empty_folder(options.out)
    edits, config = _load_edits(options), _config(options)
    covariance = Covariance.load(options.covariance) if options.covariance else None
    model, tokenizer = _load_model(options)
    result = edit_sequence(
        model,
        tokenizer,
        edits,
        method=options.method,
        config=config,
        covariance=covariance,
        batch_size=options.batch_size,
        evaluate_every=options.evaluate_every,
        seed=options.seed,
    )
    result.save(out / "result.json")
    result.to_frame().to_csv(out / "history.csv", index=False)
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    if options.json:
        _print_json(result.history[-1])
    else:
        print(result.summary())
        print(f"edited model: {out / 'model'}\nmetrics: {out / 'history.csv'}, {out / 'result.json'}")


def evaluate(options: argparse.Namespace) -> None:
    from d4s.metrics import evaluate as evaluate_edits

    edits = _load_edits(options)
    model, tokenizer = _load_model(options)
    found = evaluate_edits(
        model, tokenizer, edits, generate=options.generate, seed=options.seed, progress=True
    )
    if options.json:
        _print_json({name: dataclasses.asdict(metric) for name, metric in found.metrics.items()})
    else:
        print(found.summary())


def covariance(options: argparse.Namespace) -> None:
    from d4s.covariance import estimate_covariance

    model, tokenizer = _load_model(options)
    layers = [int(i) for i in options.layers.split(",")] if options.layers else None
    found = estimate_covariance(
        model, tokenizer, options.corpus, layers=layers, tokens=options.tokens, seed=options.seed
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
        function: Any, text: str, *, model: bool = False, edits: bool = False
    ) -> argparse.ArgumentParser:
        made = verbs.add_parser(function.__name__, help=text, description=text)
        made.set_defaults(function=function)
        made.add_argument("--json", action="store_true", help="figures as JSON on standard output")
        made.add_argument("--seed", type=int, default=0)
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
            made.add_argument("edits", metavar="EDITS", help="file of edits, or 'embedded'")
            made.add_argument("--limit", type=int, help="take the first LIMIT edits")
            made.add_argument(
                "--skip-bad", action="store_true", help="leave wrong records out, and list them"
            )
        return made

    made = verb(demo, "edit the embedded model, and compare with a method that collapses")
    made.add_argument("--out", type=Path, default=Path("d4s-demo"), help="folder for the figures")
    made.add_argument("--edits", type=int, default=200, help="edits, one at a time")
    made.add_argument("--method", default="d4s")
    made.add_argument("--against", default="memit")

    made = verb(edit, "edit a model in sequence", model=True, edits=True)
    made.add_argument("--method", default="d4s")
    made.add_argument(
        "--out", type=Path, required=True, help="new folder for the edited model and its metrics"
    )
    made.add_argument("--covariance", type=Path, help="file made by d4s covariance")
    made.add_argument("--batch-size", type=int, default=1, help="edits a step")
    made.add_argument("--evaluate-every", type=int, help="edits between evaluations")
    made.add_argument("--set", nargs="*", metavar="FIELD=VALUE", help="fields of the method's configuration")

    made = verb(evaluate, "score a model on edits", model=True, edits=True)
    made.add_argument("--generate", action="store_true", help="also score free generation")

    made = verb(covariance, "key statistics of a model over a corpus, all layers in one pass", model=True)
    made.add_argument(
        "corpus", metavar="CORPUS", nargs="?", help="text file; default: sampled from the model"
    )
    made.add_argument("--out", type=Path, required=True, help="safetensors file")
    made.add_argument("--layers", help="as 4,5,6; default: all")
    made.add_argument("--tokens", type=int, help="key vectors; default: 10 · d_in")

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
        return 1
    except KeyboardInterrupt:
        print("d4s: stopped; what had been written is whole", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"d4s: {error.filename or ''} {error.strerror or error}".replace("  ", " "), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
