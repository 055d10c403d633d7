"""Table, histories, figures and a Markdown table of a comparison at any point, of sequences that are under way or were
stopped too, by their journals; nothing in the comparison's folder is changed.

python -m benchmarks.real.tables comparison/sequences --at 300 --out tables

SEQUENCES is the folder that `d4s compare --out` or a long run keeps its sequences in. A sequence that was not scored
at the point has a row of its last one before it, with the number of edits. OUT gets table.csv (each sequence's last
point), history.csv, differences.csv and the figures, and at-N.csv and at-N.md for each N of --at. Cost: seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from d4s.errors import ConfigError
from d4s.files import write_table, write_text
from d4s.measure.columns import column
from d4s.sequence.comparison import Comparison
from d4s.sequence.journaling import record_of
from d4s.sequence.record import Record

if TYPE_CHECKING:
    from pandas import DataFrame

# Head of a column → the figure in it.
FIGURES = {
    "efficacy": "efficacy",
    "said": "efficacy_argmax",
    "generated": "efficacy_generated",
    "paraphrase": "paraphrase",
    "paraphrases said": "paraphrase_argmax",
    "specificity": "specificity",
    "neighbours kept": "specificity_argmax",
    "average": "average",
    "harmonic": "harmonic",
    "portability": "portability",
    "multi-hop": "multi_hop",
    "mean \\|w\\|": "l1_growth",
    "targets lost": "",  # counted below
    "retained facts": "retained",
    "text perplexity": "text_perplexity",
}


def sequences(folder: Path) -> Comparison:
    """Those that have ended, and those that a journal tells of, if they were scored after some edits."""
    ended = {path.stem: Record.load(path) for path in sorted((folder / "results").glob("*.json"))}
    journals = sorted((folder / "journals").iterdir()) if (folder / "journals").is_dir() else []
    going = {path.name: record_of(path) for path in journals if path.name not in ended}
    results: dict[str, dict[int, Record]] = {}
    for name, record in sorted((ended | going).items()):
        label, _, seed = name.rpartition("-")
        if record.history and record.history[-1]["step"]:
            results.setdefault(unquote(label), {})[int(seed)] = record
    if not results:
        raise ConfigError(
            f"{folder}: holds no result or journal of a sequence that was scored after some edits"
        )
    every = frozenset((label, seed) for label, by_seed in results.items() for seed in by_seed)
    return Comparison(results, every)  # so that `save` copies none of them


def at(found: Comparison, point: int) -> dict[str, dict[str, Any]]:
    """Label → its figures at the point, or at its last one before it, with `edits`, `targets_lost` and why it ended
    before it (`ended`), of those that were scored by then. Raises ConfigError if none was."""
    rows = {}
    for label, by_seed in found.results.items():
        scored = [{row["step"] for row in record.history} for record in by_seed.values()]
        place = max(step for step in set.intersection(*scored) if step <= point)
        if place == 0:  # the unedited model alone
            continue
        only = Comparison({label: by_seed})
        row = only.table([place]).iloc[0].dropna().to_dict()
        (history,) = (frame[frame["step"] == place].iloc[0] for frame in only.histories().values())
        row |= {name: value for name, value in history.items() if str(name).endswith(".unedited")}
        lost = [
            len(replace(record, edits_table=record.edits_table[:place]).not_arrived())
            for record in by_seed.values()
            if any("last_probability" in one for one in record.edits_table)
        ]
        row["targets_lost"] = sum(lost) / len(lost) if lost else None
        row["ended"] = row.pop("collapsed") if place < point else ""
        rows[label] = row
    if not rows:
        raise ConfigError(f"no sequence was scored after {point} edits or fewer; name a later point")
    return rows


def unedited(found: Comparison, point: int) -> dict[str, Any]:
    """The unedited model's figures on the edits that are made at the point, of a sequence that was scored there."""
    rows = at(found, point)
    label = max(rows, key=lambda name: rows[name]["edits"])
    before = found.histories()[label].iloc[0].dropna()
    row = {n.removesuffix(".unedited"): v for n, v in rows[label].items() if n.endswith(".unedited")}
    row |= {name: before[name] for name in ("retained", "text_perplexity") if name in before}
    return row | {"specificity_argmax": 1.0} if "specificity_argmax" in row else row


def cell(row: Mapping[str, Any], name: str) -> str:
    if name == "":
        lost = row.get("targets_lost")
        return "" if lost is None else f"{lost:g}"
    value = row.get(name)
    if value is None:
        return ""
    if name == "l1_growth":
        return f"{100 * value:+.1f} %"
    about = column(name)
    if not about.is_share:
        return f"{value:.4g}"
    low, high = row.get(f"{name}.low"), row.get(f"{name}.high")
    bounds = "" if low is None or high is None else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{100 * value:.1f}{bounds}"


def markdown(found: Comparison, point: int) -> str:
    """A row a sequence, that of the unedited model first; columns that none of them has are left out."""
    rows = at(found, point)
    told = {"unedited": unedited(found, point)}
    for label, row in rows.items():
        told[label if row["edits"] == point else f"{label}, after {row['edits']}"] = row
    heads = {head: name for head, name in FIGURES.items() if any(cell(row, name) for row in told.values())}
    lines = [f"| after {point} edits | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for label, row in told.items():
        lines.append(f"| {label} | {' | '.join(cell(row, name) for name in heads.values())} |")
    notes = [f"- {label}: {row['ended']}" for label, row in rows.items() if row["ended"]]
    text = f"Shares in percent, [95 % interval {found.interval}]; mean |w|: growth over the edited layers."
    return "\n".join([*lines, "", text, *(["", *notes] if notes else []), ""])


def apart(table: DataFrame, against: str) -> str:
    """`Comparison.differences` from one sequence: a row a sequence, in points."""
    heads = {head: name for head, name in FIGURES.items() if name in table and column(name).is_share}
    lines = [f"| less {against}, edit by edit | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for _, row in table.iterrows():
        cells = [
            "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * row[f"{name}{end}"] for end in ("", ".low", ".high")))
            for name in heads.values()
        ]
        lines.append(f"| {row['method']}, after {row['edits']} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    import pandas

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sequences", type=Path)
    parser.add_argument("--at", type=int, nargs="+", help="edits; default: the most at which any was scored")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--against", metavar="LABEL", help="of what each differs from it by: differences.md, .csv"
    )
    options = parser.parse_args(arguments)
    if options.out.resolve() == options.sequences.resolve():
        parser.error("--out is the comparison's own folder, which is not to be changed; name another one")

    found = sequences(options.sequences)
    most = max(int(frame["step"].max()) for frame in found.histories().values())
    found.save(options.out)
    if options.against is not None:
        table = found.differences(options.against)
        write_table(table, options.out / "differences.csv")
        write_text(apart(table, options.against), options.out / "differences.md")
    for point in options.at or [most]:
        text = markdown(found, point)
        write_text(text, options.out / f"at-{point}.md")
        write_table(pandas.DataFrame(list(at(found, point).values())), options.out / f"at-{point}.csv")
        print(text)


if __name__ == "__main__":
    main()
