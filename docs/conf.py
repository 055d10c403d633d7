"""The site: `make docs` builds it from this folder into build/site, offline, with every warning an error.

The pages are Markdown, and read as well where they lie. What the site alone needs is done here: docstrings, whose
arguments stand as `name: text`, become field lists, and links that lead out of this folder are followed as far as a
site can.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from inspect import signature
from pathlib import Path
from typing import Any, get_type_hints

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from pygments.lexers.data import JsonLexer
from sphinx.util.logging import getLogger
from sphinx.writers.html5 import HTML5Translator

from d4s.version import __version__

HERE = Path(__file__).resolve().parent

project, author, release, version = "d4s", "d4s contributors", __version__, __version__
copyright = author  # the name that Sphinx asks for
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
templates_path: list[str] = []
exclude_patterns: list[str] = []

html_theme = "furo"
html_title = f"d4s {__version__}"
html_copy_source = html_show_sourcelink = False

myst_enable_extensions = ["dollarmath"]
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"  # MathJax would be a request to another machine
myst_heading_anchors = 4
copybutton_exclude = ".linenos, .gp, .go"

default_role = "code"  # `name` in docstrings is code
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 90


# Docstrings.

_SHAPED = r"\*{0,2}\w+(?: \[[^\]]*\])?"
_NAME = re.compile(r"\*{0,2}\w+(?![^\[]*\])")
_ARGUMENT = re.compile(rf"({_SHAPED}(?:, {_SHAPED})*):\s+(\S.*)")
_NEXT = re.compile(r"; (?=(?!None|True|False)\w+: )")
_CODE = re.compile(r"(``.+?``|`[^`\n]+`)")


def _plain(text: str) -> str:
    """What reST would read as markup, as text; `code` stays."""
    parts = _CODE.split(text)
    return "".join(part if i % 2 else re.sub(r"([\\*_|])", r"\\\1", part) for i, part in enumerate(parts))


def _paragraphs(lines: list[str]) -> Iterator[list[str]]:
    """Lines between empty ones."""
    part: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            part.append(line)
        elif part:
            yield part
            part = []


def fields_of(lines: list[str]) -> tuple[list[str], list[str]]:
    """(`name: text` lines at the beginning of a paragraph as reST fields, its other lines).

    A line that is indented goes on with the one before; `a: …; b: …` in one line are two fields.
    """
    found: list[tuple[str, str]] = []
    rest = list(lines)
    while rest:
        if rest[0].startswith(" ") and found:
            name, text = found.pop()
            found.append((name, f"{text} {rest.pop(0).strip()}"))
            continue
        said = [_ARGUMENT.fullmatch(part.strip()) for part in _NEXT.split(rest[0])]
        if not all(said):
            break
        rest.pop(0)
        found += [(one[1], one[2]) for one in said if one]
    return [_field(name, text) for name, text in found], rest


def _field(names: str, text: str) -> str:
    """`left [d_out, r], right [r, d_in]` are two names with their shapes."""
    shapes = f"{names}: " if "[" in names else ""
    return f":param {_plain(','.join(_NAME.findall(names)))}: {_plain(shapes + text)}"


def restructured(lines: list[str]) -> list[str]:
    """A docstring of this package as reST: prose, equations (indented paragraphs), arguments, what is raised."""
    out: list[str] = []
    for part in _paragraphs(lines):
        if all(line.startswith(" ") for line in part):
            out += ["::", "", *part, ""]
            continue
        fields, others = fields_of(part)
        out += [*fields, ""]
        if all(line.startswith(("- ", "  ")) for line in others):
            out += [_plain(line) for line in others]
        else:
            for line in others:
                out += [""] if re.match(r"(Returns|Raises) ", line) else []
                out.append(_plain(line.strip()))
        out.append("")
    return out


def _docstring(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    if is_dataclass(thing) and lines and lines[0].startswith(f"{thing.__name__}("):
        lines.clear()  # it has no words of its own, and Python writes its signature there
    lines[:] = restructured(lines)
    if is_dataclass(thing):
        lines += [f":param {field}: {_plain(meaning)}" for field, meaning in _meanings(thing)]


def _meanings(thing: Any) -> Iterator[tuple[str, str]]:
    """(field, meaning) of a configuration, whose fields are annotated with what they mean."""
    hints = get_type_hints(thing, include_extras=True)
    for field in fields(thing):
        if said := [text for text in getattr(hints[field.name], "__metadata__", ()) if isinstance(text, str)]:
            yield field.name, " ".join(said)


def _signature(app: Any, what: str, name: str, thing: Any, *rest: Any) -> tuple[str, None] | None:
    """Of a dataclass its fields and their defaults; what they are is said below it."""
    if not is_dataclass(thing) or "__init__" not in vars(thing):
        return None
    parts = []
    for one in signature(thing).parameters.values():
        made = repr(one.default)
        default = "" if one.default is one.empty else f"={'...' if made.startswith('<') else made}"
        parts += ["*"] if one.kind is one.KEYWORD_ONLY and "*" not in parts else []
        parts.append(one.name + default)
    return f"({', '.join(parts)})", None


# Links that lead out of docs/.

_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*)\]\((\.\.?/[^)\s#]+)(#[^)\s]*)?\)")


def _inside(text: str, page: Path) -> str:
    """Links to files and folders beside docs/ as their words and their place in the sources; pictures are taken along
    by Sphinx."""

    def told(link: re.Match[str]) -> str:
        target = (page.parent / link[2]).resolve()
        if target.is_relative_to(HERE) and target.is_file():
            return link[0]
        place = target.relative_to(HERE.parent).as_posix() + ("/" if target.is_dir() else "")
        return f"`{place}`" if link[1].strip("`") in place else f"{link[1]} (`{place}` in the sources)"

    return _LINK.sub(told, text)


def _source(app: Any, name: str, source: list[str]) -> None:
    path = Path(app.env.doc2path(name))
    if path.suffix == ".md":
        source[0] = _inside(source[0], path)


# Equations.


def _mathml(node: nodes.Element, *, as_block: bool) -> str:
    """Warns, with the page and line, of what docutils cannot read."""
    try:
        return str(tex2mathml(node.astext(), as_block=as_block))
    except MathError as error:
        getLogger(__name__).warning("%s: %s", node.astext(), error, location=node)
        return ""


def _inline(writer: HTML5Translator, node: nodes.math) -> None:
    writer.body.append(_mathml(node, as_block=False))
    raise nodes.SkipNode


def _displayed(writer: HTML5Translator, node: nodes.math_block) -> None:
    writer.body.append(f'<div class="math">{_mathml(node, as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", _docstring)
    app.connect("autodoc-process-signature", _signature)
    app.connect("source-read", _source)
    app.add_lexer("jsonl", JsonLexer)
    app.add_html_math_renderer("mathml", (_inline, None), (_displayed, None))
    return {"parallel_read_safe": True}
