"""Writes a script that shows the runs of a comparison in W&B: a saved view of the workspace, and a report."""

from __future__ import annotations

from pathlib import Path
from string import Template

from launch.compare.comparison import Comparison
from launch.compare.repeats import REFUSED
from launch.compare.run_files import Point
from strategies.extras import install_command
from trainer.reporting.config import COLUMNS

SUMMARY = (
    *("final/loss", "final/eval/loss", "final/tokens_per_s", "final/step_s", "final/mfu"),
    *("final/memory_gib", "state"),
)
"""What a run's summary has for the table; of held-out metrics the loss."""
SCRIPT = Template('''"""$title in W&B: a saved view of the project's workspace, and a report. Made by shardtune compare.

    $install && wandb login
    python workspace.py              # or: python workspace.py <team or user>

Offline runs must have been uploaded before (`wandb sync`, as the last line of each run says).
"""

import sys

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

TITLE = $title
ENTITY = $entity
PROJECT = $project
FILTERS = [$filters]
COLUMNS = $columns
SUMMARY = $summary
VERDICT = $verdict


def panels():
    """Loss over tokens, speed and memory, and quality against cost."""
    return [
        wr.LinePlot(title="loss", x="tokens", y=["loss"]),
        wr.LinePlot(title="held-out loss", x="tokens", y=["eval/loss"]),
        wr.BarPlot(title="tokens/s, median", metrics=["final/tokens_per_s"]),
        wr.BarPlot(title="GiB, largest of all ranks", metrics=["final/memory_gib"]),
        wr.ScatterPlot(title="loss against memory", x="final/memory_gib", y="final/loss"),
        wr.ParallelCoordinatesPlot(
            columns=[wr.ParallelCoordinatesPlotColumn(metric=wr.Config(name)) for name in COLUMNS]
            + [wr.ParallelCoordinatesPlotColumn(metric=wr.SummaryMetric("final/loss"))]
        ),
    ]


def workspace(entity):
    """A saved view: the runs of the comparison alone, what differs as columns."""
    pinned = ["run:displayName", *(f"config:{name}.value" for name in COLUMNS), *(f"summary:{name}" for name in SUMMARY)]
    return ws.Workspace(
        entity=entity,
        project=PROJECT,
        name=TITLE,
        sections=[ws.Section(name=TITLE, panels=panels(), is_open=True)],
        settings=ws.WorkspaceSettings(x_axis="tokens"),
        runset_settings=ws.RunsetSettings(filters=FILTERS, pinned_columns=pinned),
    )


def report(entity):
    """The verdict, and the same plots."""
    runs = wr.Runset(entity=entity, project=PROJECT, name=TITLE, filters=FILTERS)
    return wr.Report(
        entity=entity,
        project=PROJECT,
        title=TITLE,
        blocks=[wr.H1("Verdict"), wr.UnorderedList(VERDICT), wr.H1("Runs"), wr.PanelGrid(runsets=[runs], panels=panels())],
    )


if __name__ == "__main__":
    import wandb

    owner = sys.argv[1] if len(sys.argv) > 1 else ENTITY or wandb.Api().default_entity
    print("workspace:", workspace(owner).save().url)
    print("report:   ", report(owner).save(draft=True).url)
''')


def workspace_script(comparison: Comparison, to: Path) -> str | None:
    """The script for a comparison that is written into `to`; None where none of its runs is in W&B."""
    points = _points_in_wandb(comparison)
    if not points:
        return None
    groups = {_logging_setting(point, "group") for point in points}
    if None in groups:  # runs without a group are found by their directories
        directories = sorted({str(point.config.get("run.dir")) for point in points})
        filters = f'ws.Config("run_dir").isin({directories!r})'
    else:
        filters = f'ws.Metric("Group").isin({sorted(map(str, groups))!r})'
    return SCRIPT.substitute(
        install=install_command("workspace"),
        title=repr(to.resolve().name),
        entity=repr(_logging_setting(points[0], "entity")),
        project=repr(_logging_setting(points[0], "project") or "shardtune"),
        filters=filters,
        columns=repr(_columns(comparison, points)),
        summary=repr(SUMMARY),
        verdict=repr([run.verdict for run in comparison.runs]),
    )


def _points_in_wandb(comparison: Comparison) -> list[Point]:
    points: list[Point] = []
    for run in comparison.runs:
        if run.repeated.state != REFUSED:
            points += run.repeated.points
    return [point for point in points if point.config.get("logging.wandb", "disabled") != "disabled"]


def _columns(comparison: Comparison, points: list[Point]) -> list[str]:
    """Columns of the run table: those of the settings that differ, then those that `logging.columns` names."""
    columns = [COLUMNS[difference.key] for difference in comparison.differences if difference.key in COLUMNS]
    named: set[str] = set()
    for point in points:
        named |= {word.partition("=")[0] for word in point.config.get("logging.columns") or []}
    for name in sorted(named):
        if name not in COLUMNS and f"{name}.name" not in COLUMNS:
            columns.append(name.replace(".", "_"))
    return list(dict.fromkeys(columns))  # each once: a setting may both differ and be named


def _logging_setting(point: Point, name: str) -> str | None:
    """A setting of `logging`: as configured, or as a variable such as WANDB_ENTITY decided when the run started."""
    key = f"logging.{name}"
    from_environment = point.record.from_environment
    setting = point.config.get(key) or (from_environment or {}).get(key)
    if not setting and from_environment is None:
        setting = _from_sentence(point.record.substitutions.get(key))
    return str(setting) if setting else None


def _from_sentence(sentence: str | None) -> str | None:
    """The value in `a team (WANDB_ENTITY)`: an early run's record has the sentence alone."""
    return sentence.rpartition(" (")[0] if sentence else None
