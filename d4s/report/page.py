"""A run, or several side by side, as one page of HTML that stands alone: no file beside it, no request, no library.

The script and the style are written into the page and named to the browser by their hashes (Content-Security-Policy),
so that nothing else runs in it and nothing leaves it, whatever a fact says. What is drawn goes along packed (zlib,
base64): ten thousand edits take less than a megabyte. Plotly's script alone would be 4.8.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from d4s.edits import Edit
from d4s.files import write_text
from d4s.measure.columns import HEADLINES, column
from d4s.report.content import content_of, last_row
from d4s.report.runs import ToldRun, runs_in, statements_in
from d4s.version import __version__

_SHARES = (*HEADLINES, "efficacy_argmax", "paraphrase_argmax", "specificity_argmax")
_FIRST = (
    "method",
    "model",
    "weights",
    "tokenizer",
    "data type",
    "edited",
    "data",
    "edits made",
    "key statistics",
    "seed",
)


def write_report(
    folders: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str], edits: Iterable[Edit] = ()
) -> int:
    """The page of what the folders hold (`runs_in`), whole or not at all; the same folders give the same bytes.

    edits: told in words where a folder holds nothing but ids
    Returns the number of runs on it.
    Raises DataError for a folder without a sequence, or with a damaged file.
    """
    runs = runs_in(folders, edits)
    write_text(page(runs, statements_in(folders)), path)
    return len(runs)


def page(runs: Sequence[ToldRun], statements: Mapping[str, str] | None = None) -> str:
    """The page's HTML. statements: name → what else is said, as plain text"""
    style, script = _asset("page.css"), _asset("page.js")
    title = "d4s: " + ", ".join(run.label for run in runs[:4]) + (" …" if len(runs) > 4 else "")
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    content = content_of(runs)
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            '<link rel="icon" href="data:,">',
            f"<title>{escape(title)}</title>",
            f"<style>{style}</style>",
            "</head>",
            "<body>",
            '<a class="skip" href="#main">to the content</a>',
            "<header>",
            "<div><h1>What a sequence of edits did</h1>",
            f"<p>{escape(_subtitle(runs))}</p></div>",
            '<button id="theme" type="button" hidden>dark</button>',
            "</header>",
            f'<nav aria-label="parts of the page">{_links(content)}</nav>',
            '<main id="main">',
            *_summary(runs),
            *(_statement(name, text) for name, text in (statements or {}).items()),
            *_settings(runs),
            '<section id="curves" hidden><h2>Curves</h2></section>',
            '<section id="forgetting" hidden><h2>Forgetting</h2></section>',
            '<section id="edits" hidden><h2>Edits</h2></section>',
            "<noscript><p>Curves, forgetting and the edits are drawn by a script, and scripts are off.</p></noscript>",
            '<p id="failed" role="alert" hidden></p>',
            "</main>",
            f"<footer>d4s {escape(__version__)}</footer>",
            f'<script type="text/plain" id="content">{_packed(content)}</script>',
            f"<script>{script}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _asset(name: str) -> str:
    return resources.files("d4s.report").joinpath(name).read_text("utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _packed(content: Mapping[str, Any]) -> str:
    """In base64 there is no '<', and so no end of the script that a fact could spell."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def _subtitle(runs: Sequence[ToldRun]) -> str:
    made = [len(run.record.edits_table) for run in runs]
    edits = f"{made[0]:,} edits" if min(made) == max(made) else f"{min(made):,} to {max(made):,} edits"
    return f"{edits}, {runs[0].label}" if len(runs) == 1 else f"{len(runs)} runs of {edits}, side by side"


def _links(content: Mapping[str, Any]) -> str:
    names = ["summary", "setting", "curves"]
    names += ["forgetting"] if any(one["cells"] for one in content["forgetting"]) else []
    titles = {"setting": "what was edited"}
    return " ".join(f'<a href="#{name}">{titles.get(name, name)}</a>' for name in [*names, "edits"])


def _summary(runs: Sequence[ToldRun]) -> list[str]:
    """A row a run: its figures at the last point, each with its interval, and the unedited model's beside it."""
    rows = [last_row(run.record) or {} for run in runs]
    own = {name: one for run in runs for name, one in run.record.columns.items()}
    measured = dict.fromkeys(name for run in runs for name in run.record.measured)
    names = [name for name in (*_SHARES, *measured) if any(row.get(name) is not None for row in rows)]
    heads = [
        "run",
        "edits",
        *(column(name, own).title for name in names),
        "mean |w|",
        "s/edit",
        "did not arrive",
    ]
    lines = [
        '<section id="summary"><h2>Summary</h2>',
        '<div class="wide" role="region" aria-label="summary" tabindex="0"><table>',
        "<caption>All edits made up to the last point, tested after it; below each figure its 95 % interval, "
        "and what it was: the unedited model's on the same prompts.</caption>",
        "<thead><tr>"
        + "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
        + "</tr></thead><tbody>",
    ]
    for run, row in zip(runs, rows, strict=True):
        cells = [f'<th scope="row">{escape(run.label)}</th>', f"<td>{row.get('step', 0):,}</td>"]
        cells += [_figure(row, name, own) for name in names]
        growth, seconds = row.get("l1_growth"), row.get("edit_seconds")
        cells.append("<td></td>" if growth is None else f"<td>{100 * growth:+.4g} %</td>")
        pace = "" if seconds is None else f"{seconds / row['step']:.3g}"
        cells.append(f"<td>{pace}</td>")
        searched = any(one.get("last_probability") is not None for one in run.record.edits_table)
        cells.append(f"<td>{len(run.record.not_arrived()) if searched else ''}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    lines += ["</tbody></table></div>"]
    said = [words for run in runs for words in _said(run, several=len(runs) > 1)]
    if said:
        lines.append("<ul>" + "".join(f"<li>{escape(words)}</li>" for words in said) + "</ul>")
    return [*lines, "</section>"]


def _figure(row: Mapping[str, Any], name: str, own: Mapping[str, Any]) -> str:
    value, about = row.get(name), column(name, own)
    if value is None or value != value:
        return "<td></td>"
    cell = f"<b>{escape(about.spelled(value))}</b>"
    low, high, level = (row.get(f"{name}.{bound}") for bound in ("low", "high", "unedited"))
    if low is not None and high is not None and low == low:
        cell += (
            f"<small>{escape(about.spelled(low).removesuffix(' %'))} – {escape(about.spelled(high))}</small>"
        )
    if level is not None and level == level:
        cell += f"<small>was {escape(about.spelled(level))}</small>"
    return f"<td>{cell}</td>"


def _said(run: ToldRun, *, several: bool) -> list[str]:
    """What has to be said of the figures."""
    record, name = run.record, f"{run.label}: " if several else ""
    said = [f"{name}broke off: {record.failure}"] if record.failure else []
    said += [f"{name}{line}" for line in record.missing()]
    notes = [*record.notes, *(record.evaluations[-1].notes if record.evaluations else ())]
    return said + [f"{name}{note}" for note in dict.fromkeys(notes)]


def _statement(name: str, text: str) -> str:
    return f"<section><h2>{escape(name)}</h2><pre>{escape(text)}</pre></section>"


def _settings(runs: Sequence[ToldRun]) -> list[str]:
    """What was edited; the method's configuration, which is long, behind a click."""
    names = list(dict.fromkeys(name for run in runs for name in run.setting))
    names.sort(key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))
    fields = [name for name in names if name.startswith("config: ")]
    return [
        '<section id="setting"><h2>What was edited</h2>',
        *_setting_table(runs, [name for name in names if name not in fields], "what was edited"),
        "<details><summary>configuration of the method</summary>",
        *_setting_table(runs, fields, "configuration"),
        "</details></section>",
    ]


def _setting_table(runs: Sequence[ToldRun], names: Sequence[str], label: str) -> list[str]:
    """A row a name, a column a run; what all have in common is said once."""
    heads = "".join(f'<th scope="col">{escape(run.label)}</th>' for run in runs)
    lines = [
        f'<div class="wide" role="region" tabindex="0" aria-label="{label}"><table class="words">',
        f'<thead><tr><th scope="col">setting</th>{heads}</tr></thead><tbody>',
    ]
    for name in names:
        values = [run.setting.get(name, "") for run in runs]
        if len(runs) > 1 and len(set(values)) == 1:
            cells = f'<td colspan="{len(runs)}">{escape(values[0])}</td>'
        else:
            cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        lines.append(f'<tr><th scope="row">{escape(name.removeprefix("config: "))}</th>{cells}</tr>')
    return [*lines, "</tbody></table></div>"]
