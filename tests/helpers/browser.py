"""Our pages in Chromium, without a network: what was drawn, what a click does, what the page complained of and asked for.

The fixture `browser` (tests/conftest.py) starts Debian's `chromium` for a file of tests, or skips them and says why:

    page = browser.open(tmp_path / "report.html")
    page.wait("document.querySelectorAll('svg').length === 3")
    page.click("th button")
    assert page.evaluate("document.title") == "..." and not page.errors and not page.requests

While it is open `asyncio.run` cannot be used in this process, where playwright's own loop runs.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.speed import seconds

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
WIDTH, HEIGHT = 1200, 1000
LIMIT_S = 15


@dataclass
class Page:
    """A local file as the browser shows it."""

    tab: Any
    """playwright's page: locators, mouse, keyboard."""
    errors: list[str] = field(default_factory=list)
    """What its console had of errors, refused requests among them, and exceptions that nobody caught."""
    requests: list[str] = field(default_factory=list)
    """Addresses that it asked for, beside its own."""

    def evaluate(self, script: str) -> Any:
        """The value of an expression of JavaScript, or of what a function returns."""
        return self.tab.evaluate(script)

    def wait(self, script: str) -> None:
        """Until an expression is true; TimeoutError if it never is."""
        # Not playwright's `wait_for_function`: from its second look on, it evaluates the expression in a frame of
        # the page, where our pages forbid `eval`. It would fail whenever the first look comes too early.
        deadline = time.monotonic() + seconds(LIMIT_S)
        while not self.evaluate(script):
            if time.monotonic() > deadline:
                raise TimeoutError(f"never true in the page: {script}")
            self.tab.wait_for_timeout(20)

    def click(self, selector: str) -> None:
        """The first element that a CSS selector, or `text=...`, names."""
        self.tab.locator(selector).first.click()

    def texts(self, selector: str) -> list[str]:
        """Of all elements that the selector names."""
        return self.tab.locator(selector).all_inner_texts()

    def themed(self, *, dark: bool) -> None:
        """The page in the other theme, as if the reader had changed that of the system."""
        self.tab.emulate_media(color_scheme="dark" if dark else "light")
        self._wait_until_drawn()

    def resized(self, width: int) -> None:
        """The page in a window of another width, in pixels."""
        self.tab.set_viewport_size({"width": width, "height": HEIGHT})
        self._wait_until_drawn()

    def _wait_until_drawn(self) -> None:
        """Until no plot is about to be drawn anew: that replaces its menus, which a test may be going through."""
        # The page hears of a new width or theme before the next frame.
        self.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        self.wait("!document.querySelector('[aria-busy=true]')")

    def is_too_wide(self) -> bool:
        """Whether the page as a whole scrolls sideways: what is wide has to scroll inside a box of its own."""
        return self.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")

    def screenshot(self, path: Path) -> None:
        """All of the page as PNG."""
        self.tab.screenshot(path=str(path), full_page=True)


def axe_problems(page: Page) -> list[str]:
    """What axe-core finds on a page as it is shown now, a line for each element: rule, element, what is wrong."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page.tab).response["violations"]
    return [
        f"{rule['id']}: {' '.join(node['target'])}: {' '.join(node['failureSummary'].split())}"
        for rule in found
        for node in rule["nodes"]
    ]


OPERABLE = "a[href], button:enabled, select, input:enabled, textarea, summary, [tabindex='0']"
"""What a reader can operate, or scroll, and so has to reach with the keyboard."""
MOST_TABS = 1000
AT_FOCUS = """() => {
  const element = document.activeElement;
  if (!element || element === document.body || element.hasAttribute("data-reached")) return null;
  element.setAttribute("data-reached", "");
  const outlined = [element, element.closest("label")].filter(Boolean).map((each) => getComputedStyle(each));
  return {
    name: element.outerHTML.slice(0, 120),
    closed: element.matches("details:not([open]) > summary"),
    seen: outlined.some((style) => style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 1),
  };
}"""
FOCUS_BEFORE_ALL = """() => {
  const first = document.createElement("span");
  first.tabIndex = -1;
  document.body.prepend(first);
  first.focus();
}"""
"""Tab goes on from where the reader last clicked, also where nothing has the focus."""
NEVER_REACHED = """(operable) => [...document.querySelectorAll(operable)].filter((element) => {
  if (element.hasAttribute("data-reached") || !element.checkVisibility({visibilityProperty: true})) return false;
  const group = element.type === "radio" && document.querySelector(`input[name="${element.name}"][data-reached]`);
  return !group;  // one key reaches a group of radio buttons, others its members
}).map((element) => element.outerHTML.slice(0, 120))"""


def keyboard_problems(page: Page) -> list[str]:
    """What a reader without a mouse cannot reach, open or see: a line for each element.

    Goes through the page with Tab alone, and opens with Enter whatever is folded. Leaves it open.
    """
    problems = []
    page.evaluate(FOCUS_BEFORE_ALL)
    for _ in range(MOST_TABS):
        page.tab.keyboard.press("Tab")
        focused = page.evaluate(AT_FOCUS)
        if focused is None:
            break
        if not focused["seen"]:
            problems.append(f"nobody sees that it has the focus: {focused['name']}")
        if focused["closed"]:
            page.tab.keyboard.press("Enter")
            if not page.evaluate("document.activeElement.parentElement.open"):
                problems.append(f"Enter does not open it: {focused['name']}")
    return problems + [f"Tab never reaches it: {name}" for name in page.tab.evaluate(NEVER_REACHED, OPERABLE)]


UNALIGNED = """() => {
  const edges = (element) => {  // of the words that are seen
    const texts = document.createTreeWalker(element, NodeFilter.SHOW_TEXT), range = document.createRange(), boxes = [];
    while (texts.nextNode()) {
      if (texts.currentNode.parentElement.closest(".hidden") || !texts.currentNode.data.trim()) continue;
      range.selectNodeContents(texts.currentNode);
      boxes.push(...range.getClientRects());
    }
    return {left: Math.min(...boxes.map((box) => box.left)), right: Math.max(...boxes.map((box) => box.right))};
  };
  const found = [];
  for (const table of document.querySelectorAll("table.data")) {
    if (!table.checkVisibility()) continue;
    for (const heading of table.querySelectorAll("th[data-column]")) {
      const isNumber = heading.classList.contains("number"), words = edges(heading);
      for (const row of table.tBodies[0].rows) {
        const cell = row.cells[heading.cellIndex], content = edges(cell);
        if (!isFinite(content.left) || cell.querySelector(".interval, .mark")) continue;
        const apart = isNumber ? words.right - content.right : words.left - content.left;
        if (isNumber !== cell.classList.contains("number") || Math.abs(apart) > 1.5)
          found.push(`${heading.textContent.trim()}: ${cell.textContent.trim()} is ${apart.toFixed(1)} pixels aside`);
      }
    }
  }
  return found;
}"""


def unaligned_cells(page: Page) -> list[str]:
    """Cells whose text does not stand below its heading: numbers end where it ends, words begin where it begins."""
    return page.evaluate(UNALIGNED)


@dataclass
class Browser:
    """One Chromium with a profile of its own."""

    chromium: Any

    def open(self, path: Path, *, dark: bool = False, width: int = WIDTH) -> Page:
        """A file in a tab of its own, offline, once it is loaded; `width` is the window's, in pixels."""
        address = path.resolve().as_uri()
        context = self.chromium.new_context(
            offline=True, viewport={"width": width, "height": HEIGHT}, color_scheme="dark" if dark else "light"
        )
        page = Page(context.new_page())
        page.tab.set_default_timeout(1000 * seconds(LIMIT_S))
        page.tab.on("console", lambda said: page.errors.append(said.text) if said.type == "error" else None)
        page.tab.on("pageerror", lambda error: page.errors.append(str(error)))
        page.tab.on("request", lambda asked: page.requests.append(asked.url) if asked.url != address else None)
        page.tab.on("websocket", lambda opened: page.requests.append(opened.url))
        page.tab.goto(address)
        return page


@contextmanager
def started() -> Iterator[Browser]:
    """A browser until the end of the block. Skips the test where there is none."""
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"pages are opened in a browser, and there is none of {', '.join(NAMES)}: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=program, args=list(FLAGS), timeout=1000 * seconds(60), handle_sigint=False
        )
        try:
            yield Browser(chromium)
        finally:
            chromium.close()
