"""`d4s report`: a page of what was edited and what came of it."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from d4s.cli.arguments import check_file
from d4s.cli.printing import print_json

HELP = (
    "a page of runs, one HTML file that needs nothing else: what was edited, metrics, norms, forgetting, every edit. "
    "Of a run under way too, as far as it has come"
)


def add(verb: ArgumentParser) -> None:
    verb.add_argument(
        "folders",
        nargs="+",
        metavar="DIR",
        help="the --out of d4s edit, compare or reproduce, or a journal; several: side by side",
    )
    verb.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the first DIR")
    verb.add_argument(
        "--edits",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="the edits that were made, which tell those in words of which a comparison keeps ids alone",
    )


def run(options: Namespace) -> None:
    from d4s.edits.formats import load_edits
    from d4s.report.page import write_report

    out = options.out or Path(options.folders[0]) / "report.html"
    if options.out is not None:
        check_file(options)
    edits = [edit for path in options.edits for edit in load_edits(path)]
    runs = write_report(options.folders, out, edits)
    size = out.stat().st_size
    if options.json:
        print_json({"page": str(out), "bytes": size, "runs": runs})
    else:
        print(f"{runs} run{'s' * (runs > 1)}, {size / 1e6:.2f} MB: {out}")
