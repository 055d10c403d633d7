"""The page as a browser shows it: curves drawn, search, order and the switch at work, no error, and no request."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.reports import made_up

from d4s.report.page import page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
COUNT = 1500

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser is there ({', '.join(BROWSERS)})")

# Before the page's own script: what goes wrong, and what would leave the page.
WATCH = """
  window.wrong = [];
  addEventListener("error", (e) => wrong.push(String(e.message)));
  addEventListener("unhandledrejection", (e) => wrong.push(String(e.reason)));
  addEventListener("securitypolicyviolation", (e) => wrong.push("asks for " + e.blockedURI));
  for (const kind of ["error", "warn"]) console[kind] = (...words) => wrong.push(words.join(" "));
"""
# Behind it: what a person would do.
TRY = """
(async () => {
  const $ = (id) => document.getElementById(id), found = {};
  const wait = (time) => new Promise((go) => setTimeout(go, time));
  const root = document.documentElement, all = (css) => [...document.querySelectorAll(css)];
  for (let i = 0; i < 400 && !root.dataset.drawn; i++) await wait(10);
  const rows = () => all("#rows tbody tr");
  const column = (name) => all("#rows thead th").findIndex((th) => th.textContent === name);
  const cells = (name) => { const at = column(name); return rows().map((row) => row.children[at].textContent); };
  const say = (id, value, kind = "input") => { $(id).value = value; $(id).dispatchEvent(new Event(kind)); };
  const sorted = () => all("#rows th[aria-sort]").map((th) => [th.textContent, th.getAttribute("aria-sort")]);

  found.curves = all("#curves svg").map((svg) => svg.querySelectorAll(".curve").length);
  found.titles = all("#curves figcaption b").map((b) => b.textContent);
  found.lazily = rows().length;
  found.sorted = [sorted()];
  found.first = cells("p(new) now").slice(0, 20);
  document.querySelectorAll("#rows thead th button")[column("p(new) now")].click();
  found.sorted.push(sorted());
  found.last = cells("p(new) now").slice(0, 20);
  document.querySelectorAll("#rows thead th button")[column("fact")].click();
  found.sorted.push(sorted());
  found.alphabet = cells("fact").slice(0, 30);
  document.querySelector(".more").click();
  found.more = rows().length;

  say("search", "nothing such");
  found.none = [rows().length, $("count").textContent];
  say("search", "COUNTERFACT-77 ");
  found.searched = [cells("fact").length, $("count").textContent];
  found.evil = cells("fact").filter((text) => text.includes("<script>")).length;
  say("search", "");
  say("filter", "did not arrive", "change");
  found.lost = [$("count").textContent, [...new Set(cells("mark"))]];
  say("filter", "all edits", "change");
  say("which", "all", "change");
  found.beside = all("#rows thead th").map((th) => th.textContent);

  const svg = document.querySelector("#curves svg");
  svg.dispatchEvent(new KeyboardEvent("keydown", { key: "End" }));
  found.read = svg.parentElement.querySelector("output").textContent;
  document.querySelector("#curves details").open = true;
  await wait(50);
  found.numbers = document.querySelectorAll("#curves details:first-of-type table tbody tr").length > 0;
  document.querySelector("#curves fieldset input").click();
  found.fewer = svg.querySelectorAll(".curve").length;
  found.heat = all("#forgetting td.cell").length;
  const lit = () => [root.dataset.theme, getComputedStyle(root).backgroundColor];
  found.theme = [lit()];
  $("theme").click();
  found.theme.push(lit());
  found.labels = all("input, select").every((one) => one.labels.length === 1);
  found.heads = all("th").every((th) => th.hasAttribute("scope"));
  found.wide = root.scrollWidth <= innerWidth;
  const asked = performance.getEntriesByType("resource").map((one) => one.name);
  found.asked = asked.filter((name) => !name.startsWith("data:"));
  found.failed = $("failed").textContent;
  found.wrong = wrong;
  const told = document.createElement("pre");
  told.id = "told";
  told.textContent = JSON.stringify(found);
  document.body.append(told);
})();
"""


def hashed(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def in_a_browser(text: str, folder: Path, *options: str) -> dict:
    """What TRY finds. The page's policy is left as it is, but that it knows the two scripts of the test."""
    text = text.replace("script-src ", f"script-src {hashed(WATCH)} {hashed(TRY)} ", 1)
    text = text.replace("<title>", f"<script>{WATCH}</script><title>", 1)
    text = text.replace("</body>", f"<script>{TRY}</script></body>", 1)
    (folder / "page.html").write_text(text, encoding="utf-8")
    done = subprocess.run(
        [
            *(BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--disable-background-networking", "--disable-component-update", "--no-first-run"),
            *(
                f"--user-data-dir={folder / 'profile'}",
                "--window-size=1200,900",
                "--virtual-time-budget=20000",
            ),
            *("--dump-dom", *options, f"file://{folder / 'page.html'}"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    told = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)
    assert told is not None, done.stderr[-3000:]
    return json.loads(html.unescape(told[1]))


def probability(text: str) -> float:
    return 0.0 if text.startswith("<") else float(text)


def test_the_page_works_in_a_browser(seed, tmp_path):
    one, two = made_up(COUNT, seed), made_up(COUNT // 2, seed + 1, label="memit")
    evil = one.facts["counterfact-77"]
    one.facts["counterfact-77"] = type(evil)("a </script><script>alert(1)</script> b", "<b>", None)
    found = in_a_browser(page([one, two]), tmp_path)
    assert found["wrong"] == [] and found["asked"] == [] and found["failed"] == ""

    assert found["titles"][:3] == ["efficacy (%)", "paraphrase (%)", "specificity (%)"]
    assert found["curves"][0] == 6 and min(found["curves"]) == 2  # now, right after and unedited, of two runs
    assert found["fewer"] == 3
    assert found["read"].startswith(f"edits made {COUNT:,}:") and "d4s " in found["read"] and found["numbers"]
    assert found["heat"] == 2 * (4 * 5 // 2)

    assert 0 < found["lazily"] <= 400 < COUNT and found["more"] > 100
    worst = sorted(row["nll_new"] for row in one.record.evaluations[-1].rows)
    first, last = ([probability(text) for text in found[name]] for name in ("first", "last"))
    assert first == sorted(first) and last == sorted(last, reverse=True)
    assert first[0] == pytest.approx(2.718281828 ** -worst[-1], abs=6e-4)
    assert last[0] == pytest.approx(2.718281828 ** -worst[0], abs=6e-4)
    assert found["sorted"] == [
        [["p(new) now", "ascending"]],
        [["p(new) now", "descending"]],
        [["fact", "ascending"]],
    ]
    assert found["alphabet"] == sorted(found["alphabet"])

    assert found["none"] == [0, f"0 of {COUNT:,} edits"]
    # counterfact-77, 770 … 779
    assert found["searched"] == [11, f"11 of {COUNT:,} edits"] and found["evil"] == 1
    missing = one.record.not_arrived()
    assert found["lost"] == [f"{len(missing)} of {COUNT:,} edits", ["did not arrive"] if missing else []]
    assert found["beside"][-2:] == ["p(new) now, d4s", "p(new) now, memit"]

    (before, light), (after, dark) = found["theme"]
    assert {before, after} == {"light", "dark"} and light != dark
    assert found["labels"] and found["heads"] and found["wide"]


def test_a_dark_system_has_a_dark_page_and_a_small_screen_no_sideways_scrolling(seed, tmp_path):
    found = in_a_browser(
        page([made_up(120, seed), made_up(60, seed, label="memit")]),
        tmp_path,
        "--force-dark-mode",
        "--window-size=600,900",
    )
    assert found["theme"][0][0] == "dark" and found["wide"] and found["wrong"] == []
