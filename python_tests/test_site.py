"""The site: it is built without a warning, asks no other machine for anything, and tells all that d4s offers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html import unescape
from importlib import util
from pathlib import Path

import pytest

import d4s
from d4s import ops

ROOT = Path(__file__).resolve().parents[1]
SPHINX = (sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", "-b", "html")

for needed in ("sphinx", "furo", "myst_parser", "sphinx_copybutton"):
    if util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed: pip install '.[docs]'", allow_module_level=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built as `make docs` does."""
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [*SPHINX, "-d", out / "kept", ROOT / "docs", out / "pages"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return out / "pages"


def words(page: Path) -> str:
    """A page's text, without its marks."""
    return " ".join(unescape(re.sub(r"<[^>]+>", "", page.read_text("utf-8"))).split())


def test_every_page_is_in_the_site_and_in_its_contents(site):
    pages = {p.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for p in ROOT.glob("docs/**/*.md")}
    assert pages <= {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    contents = (site / "index.html").read_text("utf-8")
    navigation = contents[contents.index('class="sidebar-tree"') : contents.index("</aside>")]
    assert not [page for page in pages - {"index.html"} if f'href="{page}"' not in navigation]


def test_a_page_asks_no_other_machine_for_anything(site):
    for page in site.rglob("*.html"):
        text = page.read_text("utf-8")
        assert not re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"(?:https?:)?//[^\"]*", text), page
        assert not re.findall(r"<link[^>]*href=\"(?:https?:)?//[^\"]*", text), page
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import\s+)[\"']?(?:https?:)?//", sheet.read_text("utf-8")), sheet


def test_all_that_d4s_offers_is_told(site):
    text = (site / "api.html").read_text("utf-8")
    told = set(re.findall(r'id="d4s\.([\w.]+)"', text))
    compiled = {f"ops.{name}" for name, op in vars(ops).items() if getattr(op, "__module__", "") == "d4s.ops"}
    assert not ({*d4s.__all__} | {name for name in compiled if not name.startswith("ops._")}) - told


def test_arguments_are_a_list_of_fields(site):
    text = words(site / "api.html")
    for said in (
        "Parameters: model – a transformers causal language model, float32",
        "targets – of the unedited model, found before (d4s targets), or their file; those of edits",
        "base,edited – as stored in the model",
        "learning_rate – of a target’s search (Adam)",
        "moment – [d, d], float32 | float64, contiguous; changed in place.",
    ):
        assert said in text, said
    assert "None –" not in text  # "None: …" says what a value means, and is no argument


def test_a_link_out_of_the_site_names_its_place_in_the_sources(site):
    assert "A method of your own: CONTRIBUTING.md." in words(site / "guide" / "methods.html")
    for page in site.rglob("*.html"):
        for link in re.findall(r'href="([^"#?:]+)"', page.read_text("utf-8")):
            assert (page.parent / link).resolve().is_relative_to(site) and (page.parent / link).exists(), link


def test_equations_are_drawn_by_the_browser_itself(site):
    assert "<math" in (site / "guide" / "how-it-works.html").read_text("utf-8")
