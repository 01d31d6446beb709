"""Debian's Chromium, driven headless by Playwright."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

SLOW_MS = 120_000
"""How long a page may take for anything: it may have to wait for a core."""
expect.set_options(timeout=SLOW_MS)  # Playwright's own is 5 s

_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

_CONTRASTS = """() => {
    const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
    const luminance = (rgb) => rgb.slice(0, 3)
        .map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4))
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const background = (element) => {
        for (let at = element; at; at = at.parentElement) {
            const color = numbers(getComputedStyle(at).backgroundColor);
            if (color.length === 3) return color;
        }
        throw new Error("no background");
    };
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const found = [];
    while (texts.nextNode()) {
        const { textContent, parentElement } = texts.currentNode;
        if (!textContent.trim() || !parentElement.checkVisibility({ visibilityProperty: true })) {
            continue;
        }
        const color = numbers(getComputedStyle(parentElement).color);
        const [low, high] = [color, background(parentElement)].map(luminance).sort((a, b) => a - b);
        found.push([textContent.trim(), (high + 0.05) / (low + 0.05)]);
    }
    return found;
}"""


@contextmanager
def running_browser() -> Iterator[Browser]:
    """Start it; skips the test where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        pytest.skip("no Chromium on PATH: `apt-get install -y chromium` brings it")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=executable, args=_FLAGS, timeout=SLOW_MS
        )
        yield running
        running.close()


def contrasts_of(page: Page) -> list[tuple[str, float]]:
    """All texts that a page shows, each with the ratio of its contrast by WCAG."""
    return [(text, ratio) for text, ratio in page.evaluate(_CONTRASTS)]
