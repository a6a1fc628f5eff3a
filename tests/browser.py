"""Debian's Chromium through playwright, for the tests of pages; they are skipped without it."""

import contextlib
import shutil

import pytest

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@contextlib.contextmanager
def browse(address, *, timeout=30, **options):
    """A page of a fresh browser; its scripts must not fail.

    Args:
      address: to open.
      timeout: seconds to wait for what a test looks for.
      options: of the page, such as its viewport.
    """
    if BROWSER is None:
        pytest.skip("no Chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    problems = []
    with playwright.sync_playwright() as player:
        switches = ["--no-sandbox", "--disable-gpu"]
        browser = player.chromium.launch(executable_path=BROWSER, args=switches)
        page = browser.new_page(**options)
        page.set_default_timeout(1000 * timeout)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        yield page
        browser.close()
    assert problems == []
