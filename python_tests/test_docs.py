"""The documents: what they point to is there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("benchmarks/**/*.md"),
        *ROOT.glob("examples/*.md"),
    ]
)
PATHS = re.compile(r"`((?:d4s|csrc|python_tests|benchmarks|docs|examples)/[\w./-]+)`")


def prose(page: Path) -> str:
    """Without blocks of code, whose brackets are no links."""
    return re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What a link behind '#' may name: headings, small, without marks, with hyphens for spaces."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing(page: Path) -> list[str]:
    """Links and images of a page that lead nowhere. Addresses of the web are not asked for."""
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        place, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        target = page if not place else page.parent / place
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    return lost


def test_a_lost_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Two words\n[a](page.md) [b](none.md) ![](none.png) [c](https://a.b/c) [d](#two-words) [e](#three)\n"
        "```\n[f](inside-code)\n```\n"
    )
    assert missing(page) == ["none.md", "none.png", "#three"]


@pytest.mark.parametrize("page", PAGES, ids=[path.relative_to(ROOT).as_posix() for path in PAGES])
def test_links_and_images_are_there(page):
    assert not missing(page)


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name != "CHANGELOG.md"],  # which speaks of what was
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_files_that_are_named_are_there(page):
    named = PATHS.findall(page.read_text("utf-8"))
    # The method that CONTRIBUTING shows how to add is not there.
    assert not [name for name in named if "toy" not in name and not (ROOT / name).exists()]


def test_every_page_can_be_reached_from_the_readme():
    seen, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop().resolve()
        if page in seen or page.suffix != ".md" or not page.is_file():
            continue
        seen.add(page)
        ahead += [page.parent / link.partition("#")[0] for link in re.findall(r"\]\(([^)\s#]+)", prose(page))]
    assert not {page for page in PAGES if page.is_relative_to(ROOT / "docs")} - seen


def test_the_readme_is_a_door():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 90


def test_pages_that_follow_from_the_package_are_up_to_date():
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    for path, page in reference.PAGES.items():
        assert path.read_text("utf-8") == page(), f"{path.name}: make reference"
