"""What a comparison's models say by themselves: edits', paraphrases' and neighbours' greedy answers against edits made.

python -m benchmarks.real.greedy comparison/sequences greedy.png [--only d4s-long memit-seq]

The folder is one that `d4s compare` or `benchmarks.real.comparison` has made, or is making; cost: seconds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas

from benchmarks.real.tables import sequences
from d4s.figures.plots import plot_lines

PANELS = {
    "efficacy_argmax": "the edit is the greedy answer",
    "paraphrase_argmax": "its paraphrases' answer",
    "specificity_argmax": "neighbours keep their greedy answer",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("figure", type=Path)
    parser.add_argument("--only", nargs="+", metavar="LABEL", help="in this order; default: all")
    options = parser.parse_args()
    found = sequences(options.folder).results
    if options.only is not None:
        if lacking := [label for label in options.only if label not in found]:
            parser.error(f"--only: {options.folder} has no sequence {lacking[0]}; it has {', '.join(found)}")
        found = {label: found[label] for label in options.only}
    histories = {label: by_seed[min(by_seed)].to_frame() for label, by_seed in found.items()}
    parts = []
    for name, panel in PANELS.items():
        for label, history in histories.items():
            edited = history[history["step"] > 0]
            bounds = {bound: 100 * edited[f"{name}.{bound}"] for bound in ("low", "high")}
            points = {"panel": panel, "line": label, "x": edited["step"], "y": 100 * edited[name]}
            parts.append(pandas.DataFrame(points | bounds))
    data = pandas.concat(parts)
    plot_lines(
        data,
        options.figure,
        x_label="edits made, those made again counted",
        y_label="share (%)",
        y_range=(0, 100),
    )


if __name__ == "__main__":
    main()
