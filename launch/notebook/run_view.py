"""What a notebook shows of a run: its verdict, cards, call-outs and losses, as on its page, without a script."""

from __future__ import annotations

from pathlib import Path

from launch.compare.comparison import compare_points
from launch.compare.run_files import RecordedRun
from launch.compare.run_page.contents import run_cards
from launch.compare.run_page.verdict import run_callouts, run_verdict
from launch.compare.run_report import REPORT_FILE
from launch.compare.settings import PointSource
from launch.config.prices import gpu_hour_price
from launch.notebook.curve import Curve, Picture, draw_picture, running_means
from launch.notebook.fragment import notebook_html
from strategies.errors import ConfigError
from trainer.pages.pieces import Callout


def run_notebook_html(run_dir: Path) -> str:
    """Show a run below a notebook cell: verdict, cards and its losses; only a message if it has not begun or cannot be read."""
    try:
        comparison = compare_points([PointSource((run_dir,))], gpu_hour_price)
    except ConfigError as error:
        return notebook_html(str(run_dir), lead=Callout("note", "No run to show", "; ".join(error.problems)))
    # The pieces are those of a comparison and of the run's page, of which this run is the only one.
    only_point = comparison.points[0]
    run = only_point.first_repeat
    verdict = run_verdict(run)
    report = run_dir / REPORT_FILE
    return notebook_html(
        str(run_dir),
        cards=run_cards(only_point),
        lead=Callout(verdict.tone, verdict.heading, verdict.text, verdict.commands),
        callouts=run_callouts(run),
        picture=_loss_picture(run),
        footer=f"page with all plots and settings: {report}" if report.is_file() else "",
    )


def _loss_picture(run: RecordedRun) -> Picture | None:
    """The picture of a run's losses over its steps: smoothed training loss over its own faint line, and held-out loss.

    None if there is no line to draw.
    """
    losses = [(step, row["loss"]) for step, row in run.steps.items() if row["loss"] is not None]
    held_out_losses = []
    for step, metrics in run.evaluations.items():
        if metrics.get("eval/loss") is not None:
            held_out_losses.append((step, metrics["eval/loss"]))
    curves = [
        Curve("training loss of a step", losses, style="faint"),
        Curve("training loss", running_means(losses)),
        Curve("held-out loss", held_out_losses, style="dots"),
    ]
    return draw_picture(
        curves, x_title="steps", description="Training loss and held-out loss over the steps of the run"
    )
