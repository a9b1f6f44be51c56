"""Pages that real runs left, opened in Chromium: plots drawn, tables sorted, zoom, no complaint and no request."""

import json
import shutil

import pytest

from launch.compare.run_page.page import run_page
from tests.helpers.browser import axe_problems, keyboard_problems, unaligned_cells
from tests.helpers.building import model_dir
from tests.helpers.launching import command_here
from tests.helpers.tokenizers import write_chat_data
from tests.launch.compare.test_run_page import compared, rounds_of, run_of, with_rewards

pytest.importorskip("altair")
pytest.importorskip("vl_convert")
PLOTS = ["difference", "loss", "held-out", "trade", "speed", "memory", "parts", "course"]


@pytest.fixture(scope="module")
def site(tmp_path_factory, pages_of_runs):
    """runs/lora, which stands out in some steps, a copy of it whose losses are smaller, and `compare`'s answer on both."""
    site = tmp_path_factory.mktemp("pages")
    data = write_chat_data(site / "train.jsonl", 24)
    words = [f"model.path={model_dir(site)}", f"data.path={data}", f"data.eval_path={data}", "budget.steps=6"]
    words += [f"data.cache_dir={site / 'cache'}", "export.at_end=false", "debug=tiny", "run.device=cpu"]
    words += ["logging.step_parts=true", "guards.window=10", "guards.threshold=0.5", "tuning=lora"]
    assert command_here(["train", *words, "logging.report=true", f"run.dir={site / 'runs' / 'lora'}"]) == 0
    shutil.copytree(site / "runs" / "lora", site / "runs" / "other")
    metrics = site / "runs" / "other" / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows = [row | {"loss": 0.99 * row["loss"]} if "loss" in row else row for row in rows]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert command_here(["compare", str(site / "runs"), f"to={site / 'reports'}"]) == 0
    return site


def drawn(page, plot: str, kind: str) -> int:
    """Marks of a kind in a plot."""
    return page.evaluate(f"document.querySelectorAll('#{plot} [aria-roledescription=\"{kind}\"]').length")


def all_are_drawn(page, plots: list[str]) -> None:
    assert page.evaluate("[...document.querySelectorAll('.plot')].map(plot => plot.id)") == plots
    page.wait(f"document.querySelectorAll('.plot svg.marks').length === {len(plots)}")


def zooms(page, plot: str) -> None:
    """The wheel changes the numbers at the axes, a double click brings them back, and `over` those of tokens."""
    shown = f"[...document.querySelectorAll('#{plot} .role-axis-label text')].map(t => t.textContent).sort().join(' ')"
    before = page.evaluate(shown)
    canvas = page.tab.locator(f"#{plot} svg.marks")
    canvas.hover(position={"x": 300, "y": 60})
    page.tab.mouse.wheel(0, -300)
    page.wait(f"{shown} !== {before!r}")
    canvas.dblclick(position={"x": 300, "y": 60})
    page.wait(f"{shown} === {before!r}")
    page.tab.locator(f"#{plot} select").first.select_option("tokens")
    page.wait(f"{shown} !== {before!r}")


def test_compare_page_of_several_runs_in_the_browser(site, browser):
    """Wide and dark: plots, sorting, a click in the legend. Narrow and light: nothing wider than the window."""
    page = browser.open(site / "reports" / "compare.html", dark=True)
    all_are_drawn(page, PLOTS)
    assert drawn(page, "loss", "line mark") == 2 and drawn(page, "held-out", "line mark") == 2
    assert drawn(page, "difference", "line mark") == 1 and drawn(page, "course", "line mark") == 2
    assert [drawn(page, plot, "bar") for plot in ("speed", "memory", "parts")] == [2, 2, 10]
    zooms(page, "loss")
    assert axe_problems(page) == [] and unaligned_cells(page) == []
    assert keyboard_problems(page) == []

    title = "document.querySelector('#loss .role-title-text').textContent"
    assert page.evaluate(title) == "tokens"  # as was chosen for the zoom
    faded = "document.querySelectorAll('#loss .mark-line path[opacity=\"0.1\"]').length"
    page.tab.locator("#loss .role-legend-label text").first.click()
    page.wait(f"{faded} === 1")

    first = "document.querySelector('#points')"
    names = f"[...{first}.tBodies[0].rows].map(row => row.cells[0].dataset.value)"
    assert page.evaluate(names) == ["lora", "other"]
    page.click("#points th button:text-is('last loss')")
    assert page.evaluate(names) == ["other", "lora"]
    page.click("#points th button:text-is('last loss')")
    assert page.evaluate(names) == ["lora", "other"]
    assert "1 of 1 points that should only compute elsewhere has another loss" in page.texts(".action h2")[0]

    page.resized(400)
    page.themed(dark=False)
    page.wait("document.querySelector('#parts svg.marks').getBoundingClientRect().width < 400")
    assert (
        page.evaluate("document.querySelectorAll('details.folded:not([open])').length") == 0
    )  # by the keyboard, above
    assert not page.is_too_wide() and axe_problems(page) == []
    assert not page.errors and not page.requests


def test_page_of_one_run_in_the_browser(site, browser):
    """Written as the run ended, on a phone and on a screen, light and dark, with all that is folded opened."""
    page = browser.open(site / "runs" / "lora" / "report.html", width=400)
    page.wait("document.querySelectorAll('#loss svg.marks').length === 1")
    assert not page.is_too_wide() and axe_problems(page) == []
    assert page.texts("h1") == ["Run lora"] and page.texts(".action h2") != []
    events = [json.loads(line) for line in (site / "runs" / "lora" / "events.jsonl").read_text().splitlines()]
    assert events and drawn(page, "loss", "rule mark") == len(events)
    assert drawn(page, "loss", "line mark") == 3  # each step's loss, the smoothed one, and the held-out one

    axis = "[...document.querySelectorAll('#loss .role-axis-label text')].map(text => text.textContent).join(' ')"
    linear = page.evaluate(axis)
    page.tab.locator("#loss select").nth(2).focus()
    page.tab.keyboard.press("ArrowDown")  # without a mouse
    page.wait(f"{axis} !== {linear!r}")
    curve = "document.querySelectorAll('#loss .mark-line path')[1].getAttribute('d')"
    smooth = page.evaluate(curve)
    page.tab.locator("#loss select").nth(1).select_option("none")
    page.wait(f"{curve} !== {smooth!r}")

    page.tab.locator("#loss select").nth(1).focus()
    page.resized(1200)
    page.themed(dark=True)
    assert (
        page.evaluate("document.activeElement.name") == "smoothing"
    )  # drawn anew twice, and the reader is where they were
    assert not page.tab.locator("#settings td").first.is_visible()
    assert keyboard_problems(page) == [] and unaligned_cells(page) == []
    page.wait("document.querySelectorAll('figure.plot svg.marks').length === 4")
    assert page.evaluate("[...document.querySelectorAll('figure.plot')].map(plot => plot.id)") == [
        *("loss", "held-out", "course", "parts"),
    ]
    assert drawn(page, "course", "line mark") == 3
    page.wait("document.querySelector('#loss .role-axis-title text').getAttribute('fill') === '#e7ecf2'")
    # A plot that is drawn anew keeps what was chosen.
    assert page.evaluate("[...document.querySelectorAll('#loss select')].map(menu => menu.value)") == [
        "step",
        "none",
        "log",
    ]
    assert axe_problems(page) == []
    said = page.evaluate("document.body.innerText")
    assert all(f"step {event['step']}: " in said for event in events) and "standard deviations above" in said
    assert "precision: auto -> fp32" in said and "Trained 6 steps" in said
    assert page.tab.locator("#settings td:text-is('lora')").first.is_visible()
    assert not page.errors and not page.requests


def test_pictures_of_each_plot(site):
    shown = {path.name: path.read_bytes() for path in (site / "reports" / "plots").iterdir()}
    assert set(shown) == {f"{name}.png" for name in PLOTS}
    assert all(picture.startswith(b"\x89PNG") and len(picture) > 5000 for picture in shown.values())
    assert "![Training loss](plots/loss.png)" in (site / "reports" / "compare.md").read_text()


def test_page_of_a_run_that_learns_from_rewards_in_the_browser(tmp_path, browser):
    """Its reward, and answers of three rounds that nobody would write, opened on a phone and in the dark."""
    directory = run_of(tmp_path / "rewarded", config={"strategy": {"name": "single"}, "evaluation": {"watch": None}})
    with_rewards(directory, 20)
    rounds_of(
        directory, {1: [0.2, 0.9], 10: [0.1, 0.5], 20: [0.7, 0.8]}, answer="x" * 400 + " <script>alert(1)</script> "
    )
    report = directory / "report.html"
    report.write_text(run_page(compared(directory)))
    page = browser.open(report, width=400)
    page.wait("document.querySelectorAll('#reward svg.marks').length === 1")
    assert drawn(page, "reward", "line mark") == 2  # while training, and held out
    assert page.texts("h2").count("Answers while training") == 1
    page.evaluate("document.querySelectorAll('details.folded').forEach(part => { part.open = true; })")
    assert len(page.texts("details .pair h3")) == 6 * 4
    assert not page.is_too_wide() and axe_problems(page) == []
    page.themed(dark=True)
    page.tab.locator("#reward select").nth(1).select_option("completions/mean_length")
    assert keyboard_problems(page) == []
    assert axe_problems(page) == [] and not page.errors and not page.requests
