"""The report in a real, headless browser: `make test-browser`."""

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.browsing import EVERY, SCREENS, opened
from tests.report.pages import gallery, write

pytestmark = pytest.mark.browser
# Contrast of every piece of text with what is behind it: WCAG 2, relative luminance.
CONTRAST = """() => {
  const paint = document.createElement('canvas').getContext('2d', {willReadFrequently: true})
  const pixel = (...layers) => {
    for (const layer of layers) { paint.fillStyle = layer; paint.fillRect(0, 0, 1, 1) }
    return [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3)
  }
  const channel = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4
  const light = rgb => [0.2126, 0.7152, 0.0722].reduce((sum, w, i) => sum + w * channel(rgb[i]), 0)
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = []
  while (walker.nextNode()) {
    const owner = walker.currentNode.parentElement, style = getComputedStyle(owner)
    if (!walker.currentNode.textContent.trim() || !owner.checkVisibility()) continue
    const layers = []
    for (let e = owner; e; e = e.parentElement) layers.unshift(getComputedStyle(e).backgroundColor)
    const inside = owner.closest('svg'), behind = pixel(...layers)
    const [a, b] = [light(pixel(...layers, inside ? style.fill : style.color)), light(behind)]
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)
    found.push([contrast, walker.currentNode.textContent.trim()])
  }
  return found
}"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("browser") / "report.html"
    pictures = gallery(3)
    pictures[1] = replace(
        pictures[1], panels=[replace(panel, right=False) for panel in pictures[1].panels]
    )
    facts = {"questions": 150, "date": "2026-11-23", "hardware": "a_CPU_" * 30}
    write(
        path,
        gallery=pictures,
        facts=facts,
        commands=["a_command_" * 40],
        config_yaml=f"key: {'value_' * 60}",
    )
    return path


@pytest.fixture
def page(browser: Any, report: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    with opened(browser, report.as_uri(), *getattr(request, "param", ())) as page:
        yield page


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


@pytest.mark.parametrize("page", EVERY, indirect=True)
def test_nothing_is_fetched_and_nothing_is_complained_about(page: Any, report: Path) -> None:
    assert page.heard == []
    assert [url for url in page.asked if not url.startswith("data:")] == [report.as_uri()]


@pytest.mark.parametrize("page", EVERY, indirect=True)
def test_the_page_does_not_scroll_sideways_with_everything_open(page: Any) -> None:
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    wide, room = page.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert wide <= room
    tables = page.evaluate(
        "[...document.querySelectorAll('table')].map(t => !!t.closest('.scroll[tabindex]'))"
    )
    assert len(tables) > 3
    assert all(tables)


@pytest.mark.parametrize("page", EVERY, indirect=True)
def test_text_is_legible(page: Any) -> None:
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    contrasts = page.evaluate(CONTRAST)
    assert len(contrasts) > 300
    assert [(round(ratio, 2), text) for ratio, text in contrasts if ratio < 4.5] == []


def test_plots_and_pictures_are_not_blank_in_either_scheme(browser: Any, report: Path) -> None:
    grounds = []
    for screen, scheme in EVERY:
        width, height = SCREENS[screen]
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.goto(report.as_uri())
        whole = pixels(page.screenshot(full_page=True))
        grounds.append(int(whole[0, 0].mean()))
        plots = page.locator(".plot svg:visible")
        assert plots.count() == 6
        for i in range(plots.count()):
            pictures = pixels(plots.nth(i).screenshot())
            assert 0.01 < (abs(pictures - whole[0, 0]).max(-1) > 60).mean() < 0.6
        assert page.locator(".panels img").first.evaluate("image => image.naturalWidth") > 100
        page.close()
    assert grounds == [255, 20, 255, 20]


@pytest.mark.parametrize("page", [("desk", "light")], indirect=True)
def test_a_keyboard_reaches_everything(page: Any) -> None:
    """Tab by tab: the link to the content first, then every link, table and summary, each visibly
    in focus."""
    wanted = page.evaluate("document.querySelectorAll('a, summary, .scroll').length")
    seen = []
    for _ in range(wanted + 5):
        page.keyboard.press("Tab")
        now = (
            "(e => [e.tagName + e.className, "
            "getComputedStyle(e).outlineStyle])(document.activeElement)"
        )
        name, outline = page.evaluate(now)
        if name.startswith("BODY"):
            break
        seen.append(name)
        assert outline not in ("none", "hidden"), name
        if name == "SUMMARY":
            before = page.evaluate("document.activeElement.parentElement.open")
            page.keyboard.press("Enter")
            assert page.evaluate("document.activeElement.parentElement.open") != before
            if before:
                page.keyboard.press("Enter")  # what it holds comes next
    assert seen[0] == "Askip"
    for tag, mark in (("A", "a"), ("SUMMARY", "summary"), ("DIVscroll", ".scroll")):
        assert sum(name.startswith(tag) for name in seen) == page.locator(mark).count()


@pytest.mark.parametrize("page", [("phone", "light")], indirect=True)
def test_a_phone_is_told_where_to_scroll(page: Any) -> None:
    overflowing = page.evaluate(
        "[...document.querySelectorAll('.scroll')].filter(s => s.checkVisibility())"
        ".filter(s => s.scrollWidth > s.clientWidth + 1)"
        ".map(s => [...s.parentElement.querySelectorAll('.hint')].some(h => h.checkVisibility()))"
    )
    assert overflowing
    assert all(overflowing)


def test_paper_shows_what_is_folded_and_no_links(page: Any) -> None:
    folded = page.locator("details:not([open]) table").first
    assert not folded.is_visible()
    page.emulate_media(media="print", color_scheme="dark")
    assert folded.evaluate("table => table.getBoundingClientRect().height") > 50
    assert not page.locator("nav").is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_headings_tables_and_regions_have_names(page: Any) -> None:
    assert page.get_by_role("main").count() == 1
    assert page.get_by_role("navigation", name="Sections").count() == 1
    assert page.get_by_role("region", name="What was kept").count() == 1
    assert page.get_by_role("img", name="Accuracy against FLOPs").count() == 1
    assert page.evaluate(
        "[...document.querySelectorAll('th')].every(h => ['row', 'col'].includes(h.scope))"
    )
    assert page.get_by_text("Failure: tprl is wrong, all tokens are right").count() == 1
    targets = page.evaluate(
        "[...document.querySelectorAll('a')].map(a => !!document.querySelector(a.hash))"
    )
    assert len(targets) > 5
    assert all(targets)
