"""D4S's prior weight, layers, rule of the residual, and targets' search on a real model, each alone.

python -m benchmarks.real.settings smollm2 counterfact.json --covariance c.safetensors --out settings [--count 100]
    [--skip 1000] [--retain 500] [--only preset long] [--generate] [--batch 500]

The edits are those of the comparison's order (`benchmarks.real.comparison`) behind the first --skip: what is chosen by
them should be reported on others. With --retain, half of the statistics are of so many facts that are neither edited
nor asked.

Cost on two idle cores, SmolLM2-135M: 100 targets 4 minutes, unless an earlier comparison's are given by --targets; each
setting 2 minutes, and 5 more with --generate.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import d4s
from benchmarks.real.setting import split, to_retain, with_facts
from d4s.locate.covariance import Covariance
from d4s.methods import method_for
from d4s.models.architectures import Anatomy

# Whose targets are not the preset's.
OTHER_TARGETS: dict[str, dict[str, Any]] = {
    "polyak": {"optimizer": "polyak", "steps": 8, "bare_looks": 6, "stop_nll": 0.02},
    "eos": {"target_eos": True},
    "stop": {"target_stop": True},
}


def further_up(preset: Any) -> dict[str, dict[str, Any]]:
    """The preset `long` on layers that end above the preset's own."""
    first, last = preset.layers[0], preset.layers[-1]
    ranges = ((first, last + 6, None), (first, last + 6, 5.0), (first + 6, last + 9, None))
    found = {}
    for begin, end, times in ranges:
        fields: dict[str, Any] = {**preset.presets["long"], "layers": list(range(begin, end + 1))}
        label = f"long, layers {begin}–{end}"
        if times is not None and preset.prior_weight is not None:
            fields["prior_weight"] = times * preset.prior_weight
            label += f", λ {fields['prior_weight']:g}"
        found[label] = fields
    return found


def settings(preset: Any) -> dict[str, dict[str, Any]]:
    """Label → what differs from the preset. The last edited layer, on which the targets hang, is the same in all but
    those of `further_up`."""
    layers = preset.layers
    found: dict[str, dict[str, Any]] = {
        f"λ {weight}": {"prior_weight": weight} for weight in (30, 100, 300, 1000, 3000)
    }
    found |= {
        f"layers {first}–{layers[-1]}": {"layers": list(range(first, layers[-1] + 1))} for first in layers[1:]
    }
    found[f"layers {layers[0] - 2}–{layers[-1]}"] = {"layers": list(range(layers[0] - 2, layers[-1] + 1))}
    found["once"] = {"residual": "once"}
    found["each"] = {"context_keys": "each"}
    found |= {
        f"each, λ {weight}": {"context_keys": "each", "prior_weight": weight}
        for weight in (400, 800, 3200, 6400)
    }
    found |= {
        f"each, prompts {share}, λ {weight}": {
            "context_keys": "each",
            "prompt_weight": share,
            "prior_weight": weight,
        }
        for share in (0.25, 0.5, 1)
        for weight in (400, 800, 1600)
    }
    found |= {
        f"long, layers {first}–{layers[-1]}": {
            **preset.presets["long"],
            "layers": list(range(first, layers[-1] + 1)),
        }
        for first in (0, layers[0] - 2)
    }
    found["refined"] = {"refine_looks": 4}
    found |= {name: dict(preset.presets[name]) for name in ("long", "hold", "fresh", "answers")}
    found["fresh, contexts of 20"] = {**preset.presets["fresh"], "context_lengths": [20]}
    found |= OTHER_TARGETS | further_up(preset)
    return {label: {"method": "d4s"} | fields for label, fields in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("edits", type=Path, help="CounterFact, original or flat")
    parser.add_argument(
        "--covariance", type=Path, required=True, help="as benchmarks.real.comparison leaves it in --out"
    )
    parser.add_argument(
        "--targets", type=Path, help="of an earlier run; else they are searched, and kept in --out"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--neighbors", type=int, help="neighbourhood prompts an edit that are asked")
    parser.add_argument("--retain", type=int, default=0, metavar="FACTS")
    parser.add_argument("--batch", type=int, default=1, help="edits a step")
    parser.add_argument("--generate", action="store_true", help="what is freely written, too")
    parser.add_argument(
        "--only", nargs="+", metavar="LABEL", help="of the settings; preset is the method's own"
    )
    options = parser.parse_args()

    model, tokenizer = d4s.load_model(options.model)
    anatomy = Anatomy(model)
    labels = {"preset": {"method": "d4s"}} | settings(method_for("d4s", anatomy))
    if options.targets is not None:
        others = {*OTHER_TARGETS, *further_up(method_for("d4s", anatomy))}
        labels = {label: fields for label, fields in labels.items() if label not in others}
    if unknown := set(options.only or ()) - set(labels):
        parser.error(
            f"--only: no setting is called {', '.join(sorted(unknown))}; there are {', '.join(labels)}"
        )
    edits = d4s.load_edits(options.edits)
    made, _ = split(edits, options.count, options.neighbors, options.seed, skip=options.skip)
    covariance = Covariance.load(options.covariance)
    if options.retain:
        stay = to_retain(edits, made, [], options.retain)
        covariance = with_facts(covariance, model, tokenizer, stay)
    found = d4s.compare(
        model,
        tokenizer,
        made,
        {label: fields for label, fields in labels.items() if label in (options.only or labels)},
        covariance=covariance,
        targets=options.targets,
        seeds=options.seed,
        batch_size=options.batch,
        generate=options.generate,
        out=options.out,
    )
    found.save(options.out)
    print(found.summary())


if __name__ == "__main__":
    main()
