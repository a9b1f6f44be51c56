"""Every piece in Chromium: both themes, wide and narrow, keyboard and clicks, and what axe-core finds."""

import pytest

from tests.helpers.browser import axe_problems, keyboard_problems, unaligned_cells
from tests.helpers.covering import EVERYTHING
from trainer.pages.pieces import Callout, IntervalBar, PageCard, PageCell, PageColumn, PageTable
from trainer.pages.render import render
from trainer.pages.vega import vega_script

PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
SPEC = {
    "data": {
        "values": [{"step": s, "loss": 3 / s + which, "run": f"run {which}"} for s in range(1, 9) for which in (0, 1)]
    },
    "mark": {"type": "line", "point": True},
    "encoding": {
        "x": {"field": "step", "type": "quantitative"},
        "y": {"field": "loss", "type": "quantitative"},
        "color": {"field": "run", "type": "nominal"},
    },
    "params": [{"name": "over", "value": "step", "bind": {"input": "select", "options": ["step", "tokens"]}}],
    "width": 860,
}


def every_piece() -> dict:
    cards = [
        PageCard("Held-out loss", "2.336", "before: 2.872", tone="good", arrow="down"),
        PageCard("Duration", "3 min 20 s"),
        PageCard("Memory", "12.6 GiB", "94% of the card", tone="warning", href="#memory"),
    ]
    callouts = [
        Callout(tone, f"A {tone}", "What it is.", [f"shardtune export runs/{tone}"]) for tone in ("bad", "note")
    ]
    bars = [IntervalBar(-0.1, 0.05, 0.2, -0.5, 0.5, tone="good"), IntervalBar(-0.4, -0.3, -0.2, -0.5, 0.5, tone="bad")]
    losses = [2.4, 9.1]
    rows = [
        [
            PageCell(f"task {index}", f"task {index}", note="of 200 rows"),
            PageCell(str(losses[index]), losses[index]),
            PageCell("", bars[index].value, interval=bars[index]),
            PageCell("worse", "worse", tone="bad"),
            *(PageCell("1,000,000 tokens/s", 1e6 + index) for _ in range(6)),
        ]
        for index in range(2)
    ]
    columns = [
        *(PageColumn("task"), PageColumn("loss", "quality", "smallest"), PageColumn("interval", "quality")),
        *(PageColumn("verdict", "quality"), *(PageColumn("speed", "cost", unit="tokens/s") for _ in range(6))),
    ]
    table = PageTable(columns, rows, "All tasks")
    return {"name": "Every piece", "cards": cards, "callouts": callouts, "table": table, "picture": PIXEL, "spec": SPEC}


# Pages without plots are opened in tests/launch/test_pages_in_browser.py, too.
@pytest.mark.parametrize("plots", [True, False] if EVERYTHING else [True])
def test_every_piece_in_the_browser(browser, tmp_path, plots):
    script = vega_script() if plots else ""
    if plots and not script:
        pytest.skip("plots need the extra report")
    file = tmp_path / "pieces.html"
    file.write_text(render("tests.pages", "every_piece.html.j2", vega_script=script, **every_piece()))
    page = browser.open(file, width=400)
    if plots:
        page.wait("document.querySelectorAll('#loss svg.marks').length === 1")
        assert page.evaluate("document.querySelector('#loss svg.marks').getBoundingClientRect().width") < 400
    assert not page.is_too_wide()
    assert page.tab.locator(".scroll-hint").first.is_visible()
    assert page.evaluate("document.querySelector('.facts th').innerHTML") == "tuning.<wbr>rank"
    assert page.evaluate("document.querySelector('.facts .unbroken').textContent") == "lr1e-3", (
        "no line ends in a minus"
    )
    assert page.evaluate("document.querySelectorAll('.facts td')[1].textContent") == "lora-lr1e-3"
    assert page.evaluate("document.querySelector('caption span').getBoundingClientRect().right") < 400
    assert axe_problems(page) == []

    page.resized(1200)
    page.themed(dark=True)
    page.click("summary:text-is('All settings')")
    if plots:
        color = "document.querySelector('#loss .role-axis-title text').getAttribute('fill')"
        page.wait(f"{color} === '#e7ecf2'")
        page.wait("document.querySelectorAll('#speed svg.marks').length === 1")
        page.wait("document.querySelector('#loss svg.marks').getBoundingClientRect().width > 900")
    assert axe_problems(page) == [] and unaligned_cells(page) == []
    assert keyboard_problems(page) == []
    assert page.texts("td.best") == ["2.4\n(best)"]

    first = "document.querySelector('table.data').tBodies[0].rows[0].cells[0].dataset.value"
    page.tab.locator("th button:text-is('loss')").focus()
    page.tab.keyboard.press("Enter")
    page.tab.keyboard.press("Enter")
    assert page.evaluate(first) == "task 1"
    assert not page.errors and not page.requests
