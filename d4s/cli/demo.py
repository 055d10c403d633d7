"""`d4s demo`: edits the embedded model, or another, in sequence with D4S, and for comparison with plain MEMIT."""

from __future__ import annotations

import math
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from d4s.cli.arguments import Once, count, hide_loading_bars
from d4s.cli.printing import print_json, words
from d4s.errors import ConfigError
from d4s.files import check_folder
from d4s.models.causal_lm import CausalLM
from d4s.progress import stage

if TYPE_CHECKING:
    from d4s.edits import Edit
    from d4s.sequence.result import Result

HELP = "edit the embedded model with D4S and with plain MEMIT, side by side"
SHOWN = 5  # facts printed before and after
FIGURES = ("efficacy", "paraphrase", "specificity", "average")


def add(verb: ArgumentParser) -> None:
    verb.add_argument("--out", type=Path, default=Path("d4s-demo"), help="folder for the figures")
    verb.add_argument(
        "--model", default="embedded", help="as of the other verbs, as smollm2; default: embedded"
    )
    verb.add_argument(
        "--edits", type=count, help="edits, one at a time; default: 200 of the embedded model, else 20"
    )
    verb.add_argument("--method", action=Once, default="d4s")
    verb.add_argument("--against", default="memit")


def run(options: Namespace) -> None:
    hide_loading_bars()
    figures = run_demo(
        options.out,
        model_name=options.model,
        count=options.edits,
        method=options.method,
        against=options.against,
        seed=options.seed,
        say=words(options),
    )
    if options.json:
        print_json(figures)


def answers(model: CausalLM, tokenizer: Any, edits: list[Edit]) -> list[tuple[str, float, float]]:
    """(what the model says, as long as the longer object, p(new), p(true)) an edit, on its own prompt.

    An object's probability is that of all its tokens.
    """
    from d4s.models.generation import generate_greedy
    from d4s.models.scoring import score

    found = []
    questions = [
        (edit.text, (edit.target(edit.target_new), edit.target(edit.target_true or edit.target_new)))
        for edit in edits
    ]
    for edit, (new, true) in zip(edits, score(model, tokenizer, questions), strict=True):
        length = max(len(new.target), len(true.target))
        (said,) = generate_greedy(model, tokenizer, [edit.text], max_new_tokens=length)
        of_new, of_true = (math.exp(-one.nll * len(one.target)) for one in (new, true))
        found.append((said.strip(), of_new, of_true))
    return found


def run_demo(
    out: Path,
    *,
    model_name: str = "embedded",
    count: int | None = None,
    method: str = "d4s",
    against: str = "memit",
    seed: int = 0,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Edits, prints, draws; returns the figures that `d4s demo --json` prints.

    out: folder for metrics.png, norms.png, their data, and the two results
    model_name: as of `d4s.load_model`
    count: edits made, one at a time; None: 200 of the embedded model, 20 of another one, which is larger
    """
    from d4s.embedded import load_demo_edits
    from d4s.embedded.statistics import demo_covariance
    from d4s.measure.metrics import take_baseline
    from d4s.methods import method_for
    from d4s.models.architectures import Anatomy
    from d4s.models.loading import load_model
    from d4s.sequence.curves import plot_metrics, plot_norms
    from d4s.sequence.run import edit_sequence

    check_folder(out)
    embedded = model_name == "embedded"
    if count is None:
        count = 200 if embedded else 20
    edits = load_demo_edits()
    if not 10 <= count <= len(edits):
        raise ConfigError(
            f"--edits {count}: must be within 10…{len(edits)}, the facts that come with the model"
        )
    Random(seed).shuffle(edits)
    edits = edits[:count]
    model, tokenizer = load_model(model_name, dtype="float32")
    anatomy = Anatomy(model)
    layers = {
        layer for name in (method, against) for layer in getattr(method_for(name, anatomy), "layers", ())
    }
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    say(
        f"{'The embedded model' if embedded else model_name}: {millions:.1f} M parameters, {len(anatomy)} blocks."
    )
    if not embedded:
        say(
            f"It is larger than the embedded one, so {count} edits are made of facts that it may or may not know; "
            "--edits N for more."
        )
    before = answers(model, tokenizer, edits[:SHOWN])
    stage(f"baseline: the unedited model is asked about {count} edits", shown=progress)
    baseline = take_baseline(model, tokenizer, edits, progress=progress)
    covariance = demo_covariance(model, tokenizer, layers=tuple(sorted(layers)), progress=progress)
    results: dict[str, Result] = {}
    after = before
    for name in (method, against):
        say(f"\n{count} edits, one at a time, with {name}:")
        result = edit_sequence(
            model,
            tokenizer,
            edits,
            method=name,
            covariance=covariance,
            evaluate_every=max(1, count // 10),
            neighborhood_limit=2,
            baseline=baseline,
            seed=seed,
            progress=progress,
        )
        say(result.summary())
        if name == method:
            after = answers(model, tokenizer, edits[:SHOWN])
        result.save(out / f"{name}.json")
        results[name] = result
        result.restore()

    say(f"\nThe first {SHOWN} edits, before and after all {count} (with {method}):")
    for edit, (old, _, _), (new, p_new, p_true) in zip(edits, before, after, strict=False):
        say(f"  {edit.text}")
        say(
            f"      before: {old!r}   after: {new!r}   "
            f"p({edit.target_new}) = {p_new:.2f}, p({edit.target_true}) = {p_true:.2f}"
        )
    frames = {name: result.to_frame() for name, result in results.items()}
    plot_metrics(frames, out / "metrics.png")
    plot_norms(frames, out / "norms.png")
    say(f"\nFigures: {os.path.join(out, 'metrics.png')} and {os.path.join(out, 'norms.png')}")
    figures: dict[str, Any] = {}
    for name, result in results.items():
        figures[name] = {f: result.history[-1][f] for f in FIGURES} | {
            "l1_growth": result.history[-1]["l1_growth"]
        }
    figures["unedited"] = {f: results[method].history[0][f] for f in FIGURES}
    figures["edits"] = count
    return figures
