"""Writes a script that shows the runs of a comparison in W&B: a saved view of the workspace, and a report."""

from __future__ import annotations

from pathlib import Path
from string import Template

from launch.compare.comparison import Comparison
from launch.compare.repeats import REFUSED
from launch.compare.run_files import RecordedRun
from strategies.extras import install_command
from trainer.reporting.config import COLUMNS

SUMMARY_COLUMNS = (
    *("final/loss", "final/eval/loss", "final/tokens_per_s", "final/step_s", "final/mfu"),
    *("final/memory_gib", "state"),
)
"""Columns of the run table that come from a run's summary; of the held-out metrics only the loss."""
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
        wr.LinePlot(title="held-out loss by position", x="tokens", metric_regex="eval/loss_by_position/.*"),
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
    """The Python script that shows a comparison in W&B; None if none of its runs is there.

    The views are called after the directory `to`, into which the comparison is written.
    """
    runs = _runs_in_wandb(comparison)
    if not runs:
        return None
    # The filter must find these runs and no others of the project.
    groups = {_logging_setting(run, "group") for run in runs}
    if None in groups:  # runs without a group are found by their directories
        run_dirs = sorted({str(run.config.get("run.dir")) for run in runs})
        filters = f'ws.Config("run_dir").isin({run_dirs!r})'
    else:
        filters = f'ws.Metric("Group").isin({sorted(map(str, groups))!r})'
    return SCRIPT.substitute(
        install=install_command("workspace"),
        title=repr(to.resolve().name),
        entity=repr(_logging_setting(runs[0], "entity")),
        project=repr(_logging_setting(runs[0], "project") or "shardtune"),
        filters=filters,
        columns=repr(_table_columns(comparison, runs)),
        summary=repr(SUMMARY_COLUMNS),
        verdict=repr([run.verdict for run in comparison.runs]),
    )


def _runs_in_wandb(comparison: Comparison) -> list[RecordedRun]:
    """The runs of the comparison, with all repeats, that log to W&B."""
    runs: list[RecordedRun] = []
    for compared in comparison.runs:
        if compared.repeated.state != REFUSED:
            runs += compared.repeated.repeats
    return [run for run in runs if run.config.get("logging.wandb", "disabled") != "disabled"]


def _table_columns(comparison: Comparison, runs: list[RecordedRun]) -> list[str]:
    """Columns of W&B's run table: those of the settings that differ, then those that `logging.columns` of the runs names."""
    columns = [COLUMNS[difference.key] for difference in comparison.differences if difference.key in COLUMNS]
    user_columns: set[str] = set()
    for run in runs:
        user_columns |= {word.partition("=")[0] for word in run.config.get("logging.columns") or []}
    for name in sorted(user_columns):
        if name not in COLUMNS and f"{name}.name" not in COLUMNS:
            columns.append(name.replace(".", "_"))
    return list(dict.fromkeys(columns))  # each once: a setting may both differ and be named


def _logging_setting(run: RecordedRun, name: str) -> str | None:
    """A setting of `logging`: as configured, or as a variable such as WANDB_ENTITY decided when the run started."""
    key = f"logging.{name}"
    from_environment = run.record.from_environment
    setting = run.config.get(key) or (from_environment or {}).get(key)
    # Records of early versions do not have `from_environment`, but the sentence that was printed.
    if not setting and from_environment is None:
        setting = _value_in_sentence(run.record.substitutions.get(key))
    return str(setting) if setting else None


def _value_in_sentence(sentence: str | None) -> str | None:
    """The value `a team` in the sentence `a team (WANDB_ENTITY)`."""
    return sentence.rpartition(" (")[0] if sentence else None
