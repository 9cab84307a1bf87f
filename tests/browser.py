"""A headless Chromium for tests of pages; they skip by name where there is none."""

import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

SHOTS = Path(__file__).parent.parent / "build" / "screenshots"
"""Where tests leave what they saw; ignored by git."""


def chromium():
    """Its executable, or a skip that says what to install."""
    pytest.importorskip("playwright", reason="playwright is not installed")
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no Chromium is installed (apt-get install chromium)")


@contextmanager
def opened(width=1200, height=900, **more):
    """A page that fails the test for any error or refused resource."""
    from playwright.sync_api import sync_playwright

    executable = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable, args=["--no-sandbox", "--disable-gpu"]
        )
        context = browser.new_context(
            viewport={"width": width, "height": height}, **more
        )
        page = context.new_page()
        said = []
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on(
            "console",
            lambda one: said.append(one.text) if one.type == "error" else None,
        )
        page.said = said
        try:
            yield page
        finally:
            browser.close()
    assert not said, said


def shot(page, name):
    """A screenshot under `SHOTS`."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png")


def slide(page, selector, value):
    """Moves a range as a person does: its value, then the event."""
    page.eval_on_selector(
        selector,
        "(one, value) => { one.value = value;"
        " one.dispatchEvent(new Event('input', { bubbles: true })); }",
        str(value),
    )


def small_text(page, least=12):
    """Texts that are drawn smaller than ``least`` pixels, in HTML and in charts."""
    return page.evaluate(
        """(least) => {
          const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
          while (walker.nextNode()) {
            const node = walker.currentNode, one = node.parentElement;
            if (!node.data.trim() || one.closest('script, style, .hidden, option, [hidden]')) continue;
            const box = one.getBoundingClientRect();
            if (!box.width || !box.height || !one.checkVisibility({ visibilityProperty: true })) continue;
            let size = parseFloat(getComputedStyle(one).fontSize);
            const drawing = one.closest('svg');
            if (drawing && one.getCTM) size *= one.getScreenCTM().a;
            if (size < least - 0.05) found.push(`${size.toFixed(1)} ${node.data.trim().slice(0, 40)}`);
          }
          return found;
        }""",
        least,
    )


def sideways(page):
    """How far the page itself can be moved sideways."""
    return page.evaluate(
        "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )
