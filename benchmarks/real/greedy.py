"""What a comparison's models say by themselves: edits' and neighbours' greedy answers against edits made.

python -m benchmarks.real.greedy comparison/sequences greedy.png

The folder is one that `d4s compare` or `benchmarks.real.comparison` has made; cost: seconds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas

from d4s.figures.plots import plot_lines
from d4s.sequence.record import Record

PANELS = {
    "efficacy_argmax": "the edit is the greedy answer",
    "specificity_argmax": "neighbours keep their greedy answer",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("figure", type=Path)
    options = parser.parse_args()
    paths = sorted(
        (options.folder / "results").glob("*-0.json"), key=lambda path: path.stem.removesuffix("-0")
    )
    histories = {path.stem.removesuffix("-0"): Record.load(path).to_frame() for path in paths}
    parts = []
    for name, panel in PANELS.items():
        for label, history in histories.items():
            edited = history[history["step"] > 0]
            bounds = {bound: 100 * edited[f"{name}.{bound}"] for bound in ("low", "high")}
            points = {"panel": panel, "line": label, "x": edited["step"], "y": 100 * edited[name]}
            parts.append(pandas.DataFrame(points | bounds))
    data = pandas.concat(parts)
    plot_lines(data, options.figure, x_label="edits made", y_label="share (%)", y_range=(0, 100))


if __name__ == "__main__":
    main()
