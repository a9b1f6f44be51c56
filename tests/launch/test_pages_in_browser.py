"""Pages of an evaluation, an audit, a review, a plan and a search in Chromium: axe-core, narrow windows, clicks, keyboard."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.plan.page import plan_page
from launch.review.prompts import ReviewPrompt
from launch.review.sheet import make_review_sheet, review_page
from launch.sweep.page import render_search_page
from launch.sweep.space import SearchedSetting
from strategies.tensor_inventory import MemoryKind
from tests.data.test_report import everything
from tests.evaluation.test_page import TASKS, evaluation
from tests.helpers.browser import axe_problems, keyboard_problems, unaligned_cells
from trainer.config.review import ReviewConfig
from trainer.evaluation.report.page import render_page
from trainer.planner.hardware import GIB, Card, device_memory_fit

OPEN_ALL = "document.querySelectorAll('details').forEach(each => { each.open = true; })"


def check(page):
    """Nothing that axe-core finds in either theme, nothing wider than a window of 400 pixels, all of it without a mouse."""
    assert unaligned_cells(page) == []
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = false; })")
    assert keyboard_problems(page) == []
    for theme in ("light", "dark"):
        page.tab.emulate_media(color_scheme=theme)
        assert axe_problems(page) == []
    page.tab.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    assert not page.errors and not page.requests


def opened(browser, tmp_path, text):
    path = tmp_path / "page.html"
    path.write_text(text)
    page = browser.open(path)
    page.evaluate(OPEN_ALL)
    return page


def test_evaluation_page_filters_its_rows(browser, tmp_path):
    page = opened(browser, tmp_path, render_page(*evaluation(TASKS)))
    rows = page.tab.locator("#task-0 .row:visible")
    shown = {}
    for name in ("all", "lost", "won", "wrong"):
        page.tab.locator(f"#task-0 input[value={name}]").check()
        shown[name] = rows.count()
    assert shown == {"all": 4 + 6 + 20, "lost": 4, "won": 20, "wrong": 10}
    page.tab.keyboard.press("ArrowLeft")
    assert rows.count() == shown["won"], "from the last filter to the one before it, without a mouse"
    page.resized(400)
    verdicts = "[...document.querySelectorAll('#all-tasks tbody td:nth-child(2)')]"
    assert page.evaluate(f"Math.max(...{verdicts}.map(each => each.getBoundingClientRect().right))") <= 400
    page.resized(1200)
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = false; })")
    page.click("#all-tasks a >> text=sums")
    page.wait("document.getElementById('task-1').open")
    page.evaluate(OPEN_ALL)
    check(page)


def test_audit_page_has_no_problem_that_axe_finds(browser, tmp_path):
    made, _ = everything(tmp_path)
    page = browser.open(made.directory / "audit.html")
    page.evaluate(OPEN_ALL)
    check(page)


def test_review_page_shows_what_was_chosen_and_folds_long_prompts(browser, tmp_path):
    prompts = [ReviewPrompt(f"p:{n}", f"Why {n}? " + "and so on " * 100 * (n == 0), None) for n in range(4)]
    answers = {"tuned": ["because", "so", "", "x"], "base": ["a longer answer " * 20, "no", "it is", "y"]}
    config = ReviewConfig(rubric={"kind": "Which one is kinder?"}, repeats=0.0)
    sheet = make_review_sheet(prompts, answers, {}, config, salt="1")
    path = tmp_path / "page.html"
    path.write_text(review_page(sheet, config))
    page = browser.open(path)
    page.tab.fill("#name", "Ada")
    page.click("#begin")
    at = {
        item["prompt"][:6]: number
        for number, item in enumerate(json.loads(page.evaluate("JSON.stringify(data.items)")))
    }
    page.evaluate(f"go({at['Why 0?']})")
    assert page.texts("#unfold") == ["show the whole prompt (1,007 characters)"]
    folded = page.evaluate("$('prompt').clientHeight")
    page.tab.keyboard.press("p")
    assert page.evaluate("$('prompt').clientHeight") > folded
    heights = page.evaluate("['a', 'b'].map(side => $(`card-${side}`).getBoundingClientRect().height)")
    assert heights[0] == pytest.approx(heights[1], abs=0.5), "cards are of equal height, whatever is in them"
    # An item is complete when all questions are answered: only then one can go on.
    assert page.evaluate("$('next').disabled")
    page.tab.keyboard.press("ArrowRight")
    assert page.evaluate("place") == at["Why 0?"]
    page.tab.keyboard.press("1")
    assert page.evaluate("$('next').disabled") and page.texts(".answer.chosen h2 span") == ["✓ better"]
    page.evaluate("choose('tie'); go(place ? place - 1 : 1)")
    page.evaluate(f"go({at['Why 0?']})")
    assert page.evaluate("$('next').disabled") == (at["Why 0?"] == 3)
    check(page)
    page.evaluate(f"go({at['Why 2?']})")
    assert page.texts(".answer .empty") == ["(empty)"]


def planned():
    """An answer with one way that fits and one that does not, in figures that are made up."""
    card = Card(name="NVIDIA A10G", memory_gib=22.0, price_per_hour=1.0, sources=["here"], date="2026-01")
    choices = []
    for name, activations in (("fsdp2", 9.0), ("ddp", 60.0)):
        config = SimpleNamespace(
            strategy=SimpleNamespace(activation_checkpointing="none", mlp_tokens=None, offload_activations=False),
            parallel=SimpleNamespace(sequence=1, experts=1),
            model=SimpleNamespace(quantisation="none"),
            optim=SimpleNamespace(name="adamw"),
            budget=SimpleNamespace(steps=10, epochs=None, tokens=None),
            data=SimpleNamespace(path="train.jsonl", sources=None),
        )
        kinds = {MemoryKind.parameters: round(4 * GIB), MemoryKind.activations: round(activations * GIB)}
        peak = SimpleNamespace(total_bytes=sum(kinds.values()), bytes_by_kind=kinds)
        fit = device_memory_fit(peak.total_bytes, 1, 22.0)
        step = SimpleNamespace(
            total_s=2.0, matmul_s=1.5, memory_bound_s=0.3, exposed_communication_s=0.1, optimizer_s=0.1
        )
        choice = SimpleNamespace(
            variant=SimpleNamespace(config=config, name=name, offloads_to_host=False, overrides=()),
            overrides=(f"strategy={name}",),
            micro_batch=1, largest_micro_batch=2, memory_peak=peak, memory_fit=fit, step_time=step, tokens_per_s=4605.0,
            needed_host_gib=6.0, node_memory_gib=None, budget_hours=0.6, budget_dollars=2.43,
            fits=fit.margin_bytes >= 0, fits_host=True, round_time=None,
        )  # fmt: skip
        choices.append(choice)
    lengths = SimpleNamespace(mean=2048.0, longest=[2048])
    job = SimpleNamespace(
        card=card,
        precision="bf16",
        num_nodes=1,
        world_size=4,
        ranks_per_node=4,
        global_batch=32,
        document_lengths=lengths,
    )
    model = SimpleNamespace(
        num_parameters=8.07e9, num_trained_parameters=42_000_000, notes=("attention is flash",), layout="packed"
    )
    refused = [(choices[1].variant, "runs in one process")]
    return SimpleNamespace(
        planned_run=job,
        fastest_fitting_choice=choices[0],
        best_choices=choices,
        all_choices=choices,
        refused_variants=refused,
        cost_model=model,
    )


def test_plan_page_stacks_memory_against_the_card(browser, tmp_path):
    page = opened(browser, tmp_path, plan_page(planned(), ["model.path=m"]))
    boxes = "[...document.querySelectorAll('.stack')].map(each => each.getBoundingClientRect())"
    ends = page.evaluate(
        "[...document.querySelectorAll('.stack')].map(each => ({limit: each.querySelector('.limit').getBoundingClientRect().left,"
        " end: each.querySelector('.fill i:last-child').getBoundingClientRect().right}))"
    )
    assert page.evaluate(f"{boxes}.length") == 2
    assert ends[0]["end"] < ends[0]["limit"] and ends[1]["end"] > ends[1]["limit"]
    values = " ".join(page.texts(".card .value"))
    assert "4,605 tokens/s" in values and "480.7 MiB" in values  # 12 bytes for each trained parameter
    check(page)


def searched():
    """A search with trials that are done, one that failed and one that diverged, and its study."""
    space = (
        SearchedSetting("optim.lr", "tag(log,interval(1e-5,1e-2))", low=1e-5, high=1e-2, is_logarithmic=True),
        SearchedSetting("tuning.rank", "8,16", choices=("8", "16")),
    )
    trials = []
    for number, (rate, value) in enumerate([(1e-4, 2.5), (3e-4, 2.2), (1e-3, 2.4), (9e-3, 90.0), (2e-5, None)]):
        trials.append(
            SimpleNamespace(
                number=number, value=value, state=SimpleNamespace(name="FAIL" if value is None else "COMPLETE"),
                params={"optim.lr": rate, "tuning.rank": ("8", "16")[number % 2]}, intermediate_values={},
                user_attrs={"reason": "out of memory"} if value is None else {},
            )
        )  # fmt: skip
    search = SimpleNamespace(
        searched_settings=space, shared_arguments=("tuning=lora",), metric="eval/loss", greater_is_better=False,
        settings=SimpleNamespace(trials=6), trial_arguments=lambda params: [each.argument(params[each.key]) for each in space],
    )  # fmt: skip
    return SimpleNamespace(get_trials=lambda deepcopy: trials), search


def test_search_page_draws_each_setting_and_names_failures(browser, tmp_path):
    study, search = searched()
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "report.html").write_text("")
    page = opened(browser, tmp_path, render_search_page(study, search, tmp_path))
    assert "Best: trial 1, eval/loss 2.200" in page.texts(".action h2")[0]
    for selector in ("svg", ".best.point", ".point.beyond"):
        assert page.tab.locator(selector).count() == 2, selector
    # A smaller loss is lower in the drawing.
    tops = page.evaluate(
        "[...document.querySelector('svg').querySelectorAll('.point')]"
        ".map(each => [each.textContent, each.getBoundingClientRect().top])"
    )
    ordered = [text.split(":")[0] for text, _ in sorted(tops, key=lambda each: -each[1])]
    assert ordered == ["trial 1", "trial 2", "trial 0", "trial 3"]
    assert page.evaluate("document.querySelector('tbody a').getAttribute('href')") == str(Path("1/report.html"))
    assert "out of memory" in page.texts(".callout")[0]
    check(page)
