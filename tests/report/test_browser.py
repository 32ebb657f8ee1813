"""The page in a real browser: silent, self-contained, within a phone's width, readable in light and in dark."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixquant.report import write

from . import sample
from .browser import CHROMIUM, Browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt install chromium)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that a report can hold, of two runs of one model."""
    folder = tmp_path_factory.mktemp("report")
    files = [
        sample.save(sample.results(limit=3), folder / "nvfp4.json"),
        sample.save(sample.results(limit=3, emulated=False), folder / "fp8.json"),
    ]
    write(files, folder / "report.html")
    return folder / "report.html"


def variant(page: Path, old: str, new: str) -> Path:
    """The page with a fault planted in it."""
    source = page.read_text(encoding="utf-8")
    assert old in source
    other = page.with_name("fault.html")
    other.write_text(source.replace(old, new, 1), encoding="utf-8")
    return other


def test_the_page_loads_nothing_else_and_says_nothing(browser: Browser, page: Path) -> None:
    visit = browser.open(page)
    assert [url for url in visit.requests if not url.startswith("data:")] == [page.as_uri()]
    assert visit.complaints == []


@pytest.mark.parametrize("planted", ["<script>throw Error()</script>", '<img src="https://example.invalid/x.png">'])
def test_control_errors_and_requests_are_seen(browser: Browser, page: Path, planted: str) -> None:
    visit = browser.open(variant(page, "<main>", f"<main>{planted}"))
    assert visit.complaints or len(visit.requests) > 1
    assert ("throw" in planted) == any("Error" in said and "exceptionDetails" in said for said in visit.complaints)


OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_no_page_scrolls_sideways(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width)
    assert browser.evaluate(OVERFLOW) == 0
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.evaluate(OVERFLOW) == 0


def test_control_a_wide_element_overflows(browser: Browser, page: Path) -> None:
    browser.open(variant(page, "<main>", '<main><div style="width: 500px">wide</div>'), 360)
    assert browser.evaluate(OVERFLOW) > 0


CONTRASTS = """
(() => {
  const numbers = colour => (colour.match(/[\\d.]+/g) || []).map(Number);
  const light = colour => {
    const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = numbers(colour).map(v => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (numbers(colour)[3] !== 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  document.querySelectorAll("details").forEach(d => d.open = true);
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const words = [...element.childNodes].filter(n => n.nodeType === 3).map(n => n.data).join("").trim();
    if (!words) continue;
    const style = getComputedStyle(element);
    const colour = element.namespaceURI.endsWith("svg") ? style.fill : style.color;
    const [a, b] = [light(colour), light(ground(element))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), words, colour]);
  }
  return JSON.stringify(found);
})()
"""


@pytest.mark.parametrize("dark", [False, True])
def test_all_words_stand_out_from_what_is_behind_them(browser: Browser, page: Path, dark: bool) -> None:
    browser.open(page, dark=dark)
    found = json.loads(browser.evaluate(CONTRASTS))
    assert {"bf16", "uniform", "phase", "How to reproduce"} <= {words for _, words, _ in found}
    assert min(found)[0] >= 4.5, min(found)


def test_control_faint_words_are_seen(browser: Browser, page: Path) -> None:
    browser.open(variant(page, "--muted: #5a6473", "--muted: #8a94a3"))
    assert min(json.loads(browser.evaluate(CONTRASTS)))[0] < 4.5


def test_dark_mode_is_dark(browser: Browser, page: Path) -> None:
    grounds = []
    for dark in (False, True):
        browser.open(page, dark=dark)
        grounds.append(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(252, 251, 248)", "rgb(20, 23, 28)"]


def test_contents_and_verdict_are_on_the_first_screen(browser: Browser, page: Path) -> None:
    browser.open(page)
    verdict = browser.evaluate("document.querySelector('.verdict').innerText")
    assert verdict.replace("\N{NO-BREAK SPACE}", " ") == sample.results(limit=3)["verdict"]["sentence"]
    assert browser.evaluate("document.querySelector('.verdict').getBoundingClientRect().bottom") < 600
    assert browser.evaluate("document.querySelector('nav').getBoundingClientRect().top") < 50
    wanted = browser.evaluate("[...document.querySelectorAll('nav a')].map(e => e.getAttribute('href').slice(1))")
    assert len(wanted) == 2 * 9
    assert set(wanted) <= set(browser.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)"))


def test_every_chart_has_words_and_every_table_headers(browser: Browser, page: Path) -> None:
    browser.open(page)
    charts = browser.evaluate("[...document.querySelectorAll('[role=img]')].map(e => e.ariaLabel)")
    assert len(charts) == browser.evaluate("document.querySelectorAll('svg').length") > 20
    assert all(len(words) > 40 for words in charts)
    tables = browser.evaluate("document.querySelectorAll('table').length")
    assert browser.evaluate("document.querySelectorAll('table:has(th[scope=col])').length") == tables > 10
    assert browser.evaluate("document.querySelectorAll('tbody tr:not(:has(> th[scope=row]))').length") == 0


def test_ids_are_unique_and_every_reference_is_met(browser: Browser, page: Path) -> None:
    browser.open(page)
    ids = browser.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    used = browser.evaluate("[...document.querySelectorAll('use')].map(e => e.getAttribute('href').slice(1))")
    assert used
    assert set(used) <= set(ids)
