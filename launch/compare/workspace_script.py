"""The script `workspace.py`, which makes a saved view and a report in W&B, before its values are filled in."""

from __future__ import annotations

from dataclasses import dataclass, fields
from string import Template
from typing import NamedTuple

SCRIPT_TEMPLATE = Template(
    '''"""These runs in W&B: a saved view of the project's workspace, and a report. Made by shardtune compare.

    $install_command && wandb login
    python workspace.py              # or: python workspace.py <team or user>

Offline runs must have been uploaded before (`wandb sync`, as the last lines of each run say). Change what you like: the
same command makes a new view and a new report.
"""

import sys

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

TITLE = $title
ENTITY = $entity
PROJECT = $project
FILTERS = [$run_filter_source]
"""Finds these runs, and no others of the project."""
COLUMNS = $setting_columns
"""Settings in which the runs differ."""
GROUP_BY = $group_columns
"""Axes: the runs of one point, such as its repeats, are one group."""
BASELINE = $baseline_run_id
"""Id of the run that the others are compared with."""
SUMMARY = $summary_columns
ANSWER = $answer_lines
"""Whether the points differ, and which one to take for what; empty for a single run."""
VERDICT = $verdict_lines
"""A sentence on each point."""
POINTS = "\\n".join($points_markdown_lines)

# Metrics by the names that these runs log them under.
X = $x_axis_metric
LOSS = $loss_names
GRAD_NORM = $grad_norm_names
TOKENS_PER_S = $tokens_per_s_names
MEMORY_GIB = $memory_gib_names
HELD_OUT = $held_out_metric
FINAL = $final_metric


def column(name):
    """A setting as W&B names its column: `lr`, or `config.parallel.sequence` of the whole configuration."""
    first, *below = name.split(".")
    return "config:" + ".".join([first, "value", *below])


def answer_and_points():
    """The answer and the table of the points, as Markdown."""
    return "\\n".join([*(f"- {line}" for line in ANSWER or VERDICT), "", POINTS])


def settings_plot(metric):
    """Every differing setting beside the metric: a line for each run."""
    columns = [wr.ParallelCoordinatesPlotColumn(metric=wr.Config(name)) for name in COLUMNS]
    return wr.ParallelCoordinatesPlot(columns=[*columns, wr.ParallelCoordinatesPlotColumn(metric=wr.SummaryMetric(metric))])


def questions():
    """(question, the panels that answer it) for each section."""
    return [
$questions
    ]


def workspace(entity):
    """A saved view: these runs alone, what differs as columns, the first point as the baseline."""
    pinned = ["run:displayName", *map(column, COLUMNS), *(f"summary:{name}" for name in SUMMARY)]
    points = ws.Section(name="Points", panels=[wr.MarkdownPanel(markdown=answer_and_points())], is_open=True)
    points.layout_settings = ws.SectionLayoutSettings(columns=1, rows=1)
    return ws.Workspace(
        entity=entity,
        project=PROJECT,
        name=TITLE,
        sections=[points, *(ws.Section(name=name, panels=panels, is_open=True) for name, panels in questions())],
        settings=ws.WorkspaceSettings(x_axis=X, max_runs=$max_runs),
        runset_settings=ws.RunsetSettings(
            filters=FILTERS,
            groupby=[ws.Config(name) for name in GROUP_BY],
            order=[ws.Ordering(ws.Metric("CreatedTimestamp"), ascending=True)],
            pinned_columns=pinned,
            baseline_run=BASELINE,
        ),
    )


def report(entity):
    """The answer, the points as a table, the same panels with a heading for each question, and a sentence on each point."""
    blocks = [wr.H1("Answer"), wr.UnorderedList(ANSWER or VERDICT), wr.H1("Points"), wr.MarkdownBlock(POINTS)]
    for name, panels in questions():
        runs = wr.Runset(
            entity=entity,
            project=PROJECT,
            name=TITLE,
            filters=FILTERS,
            groupby=[f"config.{column}" for column in GROUP_BY],
            order=[wr.OrderBy("CreatedTimestamp", ascending=True)],
        )
        blocks += [wr.H1(name), wr.PanelGrid(runsets=[runs], panels=panels)]
    if ANSWER:  # else the verdict stood first
        blocks += [wr.H1("Verdict on each point"), wr.UnorderedList(VERDICT)]
    return wr.Report(entity=entity, project=PROJECT, title=TITLE[:128], blocks=blocks, width="fluid")


if __name__ == "__main__":
    import wandb

    owner = sys.argv[1] if len(sys.argv) > 1 else ENTITY or wandb.Api().default_entity
    print("workspace:", workspace(owner).save().url)
    print("report:   ", report(owner).save(draft=True).url)
'''
)

SPEED_PANELS = (
    'wr.BarPlot(title="tokens/s, median", metrics=["final/tokens_per_s"])',
    'wr.BarPlot(title="seconds a step, median", metrics=["final/step_s"])',
    'wr.LinePlot(title="tokens/s", x=X, y=TOKENS_PER_S)',
)
"""This and the next: panels that answer a question, in Python."""
MEMORY_PANELS = (
    'wr.BarPlot(title="memory in GiB, the largest of all ranks", metrics=["final/memory_gib"])',
    'wr.LinePlot(title="memory in GiB", x=X, y=MEMORY_GIB)',
)
RESERVED_MEMORY_PANEL = (
    'wr.BarPlot(title="memory that the allocator reserved, in GiB", metrics=["final/memory_reserved_gib"])'
)
LOSS_PANELS = (
    'wr.LinePlot(title="loss", x=X, y=LOSS)',
    "wr.LinePlot(title=HELD_OUT, x=X, y=[HELD_OUT])",
    'wr.LinePlot(title="gradient norm", x=X, y=GRAD_NORM, log_y=True)',
)
LOSS_BY_POSITION_PANEL = 'wr.LinePlot(title="held-out loss by position", x=X, metric_regex="eval/loss_by_position/.*")'
SETTINGS_PANELS = (
    "wr.BarPlot(title=FINAL, metrics=[FINAL])",
    "settings_plot(FINAL)",
    "wr.ParameterImportancePlot(with_respect_to=FINAL)",
)
COST_PANELS = (
    'wr.BarPlot(title="seconds in all", metrics=["_runtime"])',
    'wr.ScatterPlot(title=f"{FINAL} against seconds", x="_runtime", y=FINAL)',
    'wr.ScatterPlot(title=f"{FINAL} against memory in GiB", x="final/memory_gib", y=FINAL)',
)
MAX_LINE_LENGTH = 100
"""Characters of a list of texts on one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkspaceContent:
    """What `workspace.py` shows: a value for each placeholder of `SCRIPT_TEMPLATE` that becomes a Python literal."""

    title: str
    """Of the view and the report."""
    entity: str | None
    """The user or team in W&B; None: whoever runs the script."""
    project: str
    setting_columns: list[str]
    """Columns of the run table for the settings in which the runs differ."""
    group_columns: list[str]
    """Those by which runs are grouped."""
    baseline_run_id: str | None
    summary_columns: list[str]
    """Columns of the run table that come from a run's summary."""
    answer_lines: list[str]
    verdict_lines: list[str]
    points_markdown_lines: list[str]
    """The table of the points."""
    max_runs: int
    """Runs that a plot shows at most."""
    x_axis_metric: str
    loss_names: list[str]
    """The names that the runs log this metric under; the same for the next three."""
    grad_norm_names: list[str]
    tokens_per_s_names: list[str]
    memory_gib_names: list[str]
    held_out_metric: str
    final_metric: str
    """The metric of a run's summary by which runs are judged."""


class PanelSection(NamedTuple):
    """A section of the view and of the report in W&B: a question, and the plots that answer it."""

    question: str
    panel_sources: list[str]
    """Each plot as Python source, such as `wr.BarPlot(...)`."""


def workspace_script_source(
    sections: list[PanelSection], content: WorkspaceContent, *, run_filter_source: str, install_command: str
) -> str:
    """Write the source of `workspace.py`: the template with its values filled in.

    `content`: what becomes a Python literal in it. `run_filter_source`: the filter that finds the runs in W&B, as Python
    source.
    `install_command`: the shell command that installs what the script needs.
    """
    section_sources = []
    for section in sections:
        panel_lines = "".join(f"                {panel_source},\n" for panel_source in section.panel_sources)
        section_sources.append(
            f"        (\n            {section.question!r},\n            [\n{panel_lines}            ],\n        ),"
        )
    literals = {field.name: python_source(getattr(content, field.name)) for field in fields(content)}
    return SCRIPT_TEMPLATE.substitute(
        questions="\n".join(section_sources),
        run_filter_source=run_filter_source,
        install_command=install_command,
        **literals,
    )


def python_source(value: object) -> str:
    """Write a value as Python source for the script. A long list of texts has one on each line, so that people can edit it."""
    source = repr(value)
    if not isinstance(value, list) or len(source) <= MAX_LINE_LENGTH:
        return source
    lines = [f"    {entry!r},\n" for entry in value]
    return f"[\n{''.join(lines)}]"
