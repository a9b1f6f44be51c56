"""What notebooks show: HTML without a script, small whatever the run is, escaped, and readable in both themes."""

import json
import math
import re

import pytest

from launch.compare.comparison import compare_points
from launch.compare.settings import PointSource
from launch.notebook.curve import MAX_POINTS, Curve, draw_picture, running_means
from launch.notebook.fragment import notebook_html
from launch.notebook.results import ComparisonResult, EvaluationResult, PlanResult
from strategies.errors import ConfigError
from tests.helpers.browser import axe_problems
from trainer.pages.pieces import Callout, PageCard, PageCell, PageColumn, PageTable

MAX_RECORD_BYTES = 200_000


def write_run(run, *, steps=6, name="ddp", state="done", loss=lambda step: 3.0 - step / 10):
    run.mkdir()
    (run / "config.yaml").write_text(f"strategy: {{name: {name}}}\nlogging: {{every_steps: 1}}\n")
    rows = [
        {"step": step, "loss": loss(step), "tokens_per_s": 100.0, "memory_gib": 1.5} for step in range(1, steps + 1)
    ]
    rows += [{"step": 0, "eval/loss": 3.2}, {"step": steps, "eval/loss": 2.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "status.json").write_text(json.dumps({"state": state, "reason": "out of memory", "step": steps}))
    (run / "run.json").write_text(json.dumps({"device": "cpu", "world_size": 2}))
    return run


def without_scripts(html: str) -> str:
    assert len(html.encode()) < MAX_RECORD_BYTES
    assert not re.search(r"<(script|iframe|link|img|object)|\son\w+=|javascript:|https?://|url\(", html)
    return html


@pytest.fixture
def compared(tmp_path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", name="fsdp2")]
    runs.append(write_run(tmp_path / "c", name="<b>", steps=2, state="failed"))
    return ComparisonResult(compare_points([PointSource((run,), name=run.name) for run in runs]))


def test_comparison_is_tables_and_a_view(compared):
    runs = compared.runs()
    assert list(runs.index) == ["a", "b", "c"] and list(runs["steps"]) == [6, 6, 2]
    assert runs.loc["b", "strategy.name"] == "fsdp2" and runs.loc["a", "after/eval/loss"] == 2.5
    metrics = compared.metrics()
    assert list(metrics[metrics.loss.notna()].groupby("run").size()) == [6, 6, 2]
    assert set(metrics.repeat) == {1} and metrics[metrics.run == "a"]["eval/loss"].dropna().tolist() == [3.2, 2.5]
    assert "verdict:" in str(compared) and compared.answer and compared.verdict[1].startswith("b: same loss as a")
    html = without_scripts(compared._repr_html_())
    assert "out of memory" in html and html.count("<polyline") == 3 and "<b>" not in html


def test_long_comparison_is_a_small_view(tmp_path):
    rows = []
    for number in range(40):
        run = write_run(tmp_path / f"run{number}", steps=400, loss=lambda step: 2 + math.sin(step * 1.7))
        rows.append(PointSource((run,), name=f"{'a long name of a run' * 3}{number}"))
    html = without_scripts(ComparisonResult(compare_points(rows))._repr_html_())
    assert "16 runs are drawn" in html


def test_curve_of_a_long_run_keeps_its_spikes():
    points = [(step, 1000.0 if step == 54_321 else 2.0 + step % 7 / 10) for step in range(100_000)]
    drawn = draw_picture([Curve("loss", points)], x_title="steps", description="a loss").curves[0]
    positions = [tuple(map(float, pair.split(","))) for pair in drawn.polyline.split()]
    assert len(positions) <= MAX_POINTS + 2
    heights = sorted(height for _, height in positions)
    assert heights[0] < heights[1] - 50, "one point is far above the others"
    assert [x for x, _ in positions] == sorted(x for x, _ in positions)
    assert draw_picture([Curve("loss", [(1, 2.0)]), Curve("none", [(1, math.nan)])], x_title="", description="") is None


def test_curve_that_spans_magnitudes_has_a_logarithmic_axis():
    marks = draw_picture([Curve("loss", [(1, 10.0), (2, 1000.0), (3, 100.0)])], x_title="", description="").y_ticks
    assert [text for _, text in marks] == ["10", "100", "1000"]
    first, second, third = (float(position) for position, _ in marks)
    assert first - second == pytest.approx(second - third, abs=0.2)
    assert running_means([(step, 1.0) for step in range(100)]) == [(step, 1.0) for step in range(100)]


REPORT = {
    "model": {"run": "runs/first", "path": "models/base"},
    "tasks": {
        "facts": {
            "num_rows": 40,
            "seconds": 2.0,
            "metrics": {"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6, "greater_is_better": True}},
            "notes": ["<i>few</i> rows"],
        }
    },
    "against": {
        "what": "base",
        "not_there": [],
        "tasks": {
            "facts": {
                "metrics": {
                    "accuracy": {
                        "value": 0.7,
                        "difference": -0.2,
                        "low": -0.3,
                        "high": -0.1,
                        "p": 0.01,
                        "verdict": "worse",
                    }
                }
            }
        },
    },
    "regressions": ["facts: accuracy 0.5, before 0.7"],
}


def test_evaluation_is_tables_and_a_view(tmp_path):
    result = EvaluationResult(tmp_path)
    assert result.report == {} and result.metrics().empty and "not evaluated yet" in result._repr_html_()
    (tmp_path / "evaluation.json").write_text(json.dumps(REPORT))
    row = {"task": "facts", "arm": "tuned", "prompt": "p", "scores": {"right": 1.0}}
    (tmp_path / "evaluation_rows.jsonl").write_text(json.dumps(row) + "\n")
    (metric,) = result.metrics().to_dict("records")
    assert (metric["task"], metric["metric"], metric["value"], metric["other"]) == ("facts", "accuracy", 0.5, 0.7)
    assert (metric["difference_low"], metric["verdict"], metric["rows"]) == (-0.3, "worse", 40)
    assert result.rows().to_dict("records") == [{"task": "facts", "arm": "tuned", "prompt": "p", "score/right": 1.0}]
    assert result.regressions == REPORT["regressions"] and result.page == tmp_path / "evaluation.html"
    html = without_scripts(result._repr_html_())
    assert html.index("Worse than base") < html.index("accuracy 0.5, before 0.7") < html.index("&lt;i&gt;few")
    assert "0.4000 to 0.6000" in html and "worse" in html and "-0.2000" in html


def way(words, *, fits=True, speed=1000.0):
    taken = {
        "settings": words,
        "strategy": words[0].partition("=")[2],
        "fits": fits,
        "why": "fastest",
        "margin_gib": 2.0,
    }
    taken |= {"peak_at": "backward", "tokens_per_s": speed, "step_s": {"total": 0.5}, "hours": 2.0, "price": 12.5}
    return taken


def plan_of(*ways):
    best = next((each["settings"] for each in ways if each["fits"]), None)
    answer = {"model": {"parameters": 7 * 10**9, "trained": 10**6}, "job": {"nodes": 1, "gpus_per_node": 2}}
    answer |= {"hardware": {"name": "A10G", "memory_gib": 22.0}, "typed": ["model.path=m dir", "strategy=auto"]}
    answer |= {"best": best, "options": list(ways), "all": list(ways) * 2, "notes": ["a note"], "left_out": []}
    return PlanResult(answer)


def test_plan_is_tables_and_a_view():
    result = plan_of(way(["strategy=ddp", "batch.micro=2"]), way(["strategy=zero3"], fits=False))
    assert result.fits and result.settings == ["model.path=m dir", "strategy=ddp", "batch.micro=2"]
    assert list(result.options()["step_s/total"]) == [0.5, 0.5] and len(result.options(every=True)) == 4
    html = without_scripts(result._repr_html_())
    assert "shardtune train &#39;model.path=m dir&#39; strategy=ddp batch.micro=2" in html
    assert "20.0 GiB" in html and "$12.50" in html and "2 h" in html and "a note" in html
    nothing = plan_of(way(["strategy=ddp"], fits=False))
    assert not nothing.fits and "Nothing fits" in without_scripts(nothing._repr_html_())
    with pytest.raises(ConfigError, match=r"nothing fits"):
        nothing.settings  # noqa: B018


def test_notebook_views_are_readable_by_all(compared, browser, tmp_path):
    """In a window of 400 pixels, on both backgrounds, since a notebook brings its own."""
    table = PageTable([PageColumn("way"), PageColumn("speed", best="largest")], [])
    table.rows.extend([[PageCell(name, name), PageCell(str(speed), speed)] for name, speed in (("a", 1.0), ("b", 2.0))])
    everything = notebook_html(
        "A view",
        cards=[PageCard("loss", "2.3", "before 2.8", "good", "down"), PageCard("speed", "1,000 tokens/s")],
        callouts=[
            Callout(tone, f"{tone} news", "A sentence.", ["shardtune train x=1"]) for tone in ("bad", "warning", "note")
        ],
        tables=[table],
    )
    for colours in ("background:#fff;color:#111", "background:#111;color:#eee"):
        views = f"{everything}{compared._repr_html_()}"
        path = tmp_path / "notebook.html"
        path.write_text(
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f'<title>notebook</title></head><body style="{colours}"><main><h1>A notebook</h1>{views}</main></body></html>'
        )
        page = browser.open(path, width=400)
        assert axe_problems(page) == [] and not page.errors and not page.requests and not page.is_too_wide()
