"""Opening the page in a real Chromium, and seeing that it does nothing that it must not."""

import contextlib
import json
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

REPORT_VIOLATIONS = """
addEventListener("securitypolicyviolation", (event) =>
    console.error("CSP", event.violatedDirective, event.blockedURI, event.sourceFile));
"""
expect.set_options(timeout=20_000)  # the machine may be busy


@contextlib.contextmanager
def open_browser() -> Iterator[Browser]:
    """A Chromium of the system; without one the test is skipped."""
    path = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if path is None:
        pytest.skip("no chromium: apt install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


class Reader:
    """Someone who reads the page.

    Attributes:
        faults: errors of the page, of its security policy among them.
        requests: the addresses that it asked for.
    """

    def __init__(self, context, url: str, may_fail: bool):
        self.context, self.url, self.may_fail = context, url, may_fail
        self.faults: list[str] = []
        self.requests: list[str] = []
        context.add_init_script(REPORT_VIOLATIONS)
        context.on("request", lambda request: self.requests.append(request.url))
        context.on("console", self._hear)
        context.on("weberror", lambda error: self.faults.append(str(error.error)))
        self.page = self.another_tab()

    def another_tab(self) -> Page:
        page = self.context.new_page()
        page.set_default_timeout(20_000)
        page.goto(self.url)
        known = "#model-name:not(:empty), #model:not([hidden]), dialog[open]"
        expect(page.locator(known)).to_have_count(1)
        return page

    def _hear(self, message) -> None:
        # The browser's own word for an answer that is no 200, or a server that is gone
        failed = message.text.startswith("Failed to load resource") and self.may_fail
        if message.type in ("error", "warning") and not failed:
            self.faults.append(f"{message.text} {message.location}")

    @property
    def answers(self) -> Locator:
        return self.page.locator(".answer .body")

    def ask(self, text: str) -> None:
        self.page.fill("#question", text)
        self.page.keyboard.press("Enter")

    def set(self, field: str, value: str) -> None:
        """Fill a field of the drawer."""
        self.page.click("#open-settings")
        if field == "#thinking":
            self.page.select_option(field, value)
        else:
            self.page.fill(field, value)
        self.page.keyboard.press("Escape")

    def requests_of(self, path: str) -> list[str]:
        return [url for url in self.requests if url.endswith(path)]

    def wait_for_answer(self) -> None:
        """Until the reply on its way is complete, one that has just been asked for included."""
        expect(self.page.locator("#stop")).to_be_hidden()
        expect(self.page.locator(".answer.streaming")).to_have_count(0)

    def saved(self) -> dict:
        """The open conversation as the browser keeps it."""
        text = self.page.evaluate(
            "localStorage['minimind.chat.' + JSON.parse(localStorage['minimind.current'])]"
        )
        return json.loads(text)

    def check(self) -> None:
        assert not self.faults
        elsewhere = [url for url in self.requests if not url.startswith(self.url)]
        assert not elsewhere and self.requests


class Answers:
    """Opens pages for a test; at its end, all must have behaved."""

    def __init__(self, browser: Browser):
        self.browser = browser
        self.readers: list[Reader] = []

    def open(
        self,
        url: str,
        *,
        width: int = 1280,
        locale: str = "en-US",
        scheme: str = "light",
        permissions: list[str] | None = None,
        may_fail: bool = False,
    ) -> Reader:
        context = self.browser.new_context(
            viewport={"width": width, "height": 800},
            locale=locale,
            color_scheme=scheme,
            permissions=permissions or [],
        )
        self.readers.append(Reader(context, url, may_fail))
        return self.readers[-1]

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, *failure) -> None:
        for reader in self.readers:
            reader.context.close()
        if failure == (None, None, None):
            for reader in self.readers:
                reader.check()
