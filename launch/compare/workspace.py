"""Writes a script that shows runs in W&B, a section for each question: a saved view of the workspace, and a report."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launch.compare.comparison import ComparedPoint, Comparison, compare_points
from launch.compare.curves import loss_relevant_settings
from launch.compare.repeats import REFUSED_STATE
from launch.compare.run_files import RecordedRun, is_run_directory
from launch.compare.settings import PointSource
from launch.compare.wandb_files import WANDB_RUN_DIRECTORY_REGEX, is_wandb_address, is_wandb_directory
from launch.compare.workspace_script import (
    COST_PANELS,
    LOSS_BY_POSITION_PANEL,
    LOSS_PANELS,
    MEMORY_PANELS,
    RESERVED_MEMORY_PANEL,
    SETTINGS_PANELS,
    SPEED_PANELS,
    PanelSection,
    WorkspaceContent,
    workspace_script_source,
)
from strategies.errors import ShardtuneError
from strategies.extras import install_command
from trainer.reporting.config import WANDB_COLUMN_BY_SETTING
from trainer.reporting.metric_names import CURRENT_NAMES_EDITION, FIRST_NAMES_EDITION, XAxis, tracked_name
from trainer.reporting.numbers import format_metric, format_setting
from trainer.reporting.status import write_text_atomic

WORKSPACE_FILE = "workspace.py"
SUMMARY_COLUMNS_BEHIND_LOSSES = ("final/tokens_per_s", "final/step_s", "final/mfu", "final/memory_gib", "state")
MIN_SHOWN_RUNS = 10
"""Runs that W&B's plots show at least: its own default."""
MIN_POINTS_OF_SEARCH = 5
"""Runs that each have a value of their own on a numeric axis: from this number on they are a search, or read like one."""
MAX_CONFIG_COLUMNS = 4
"""Settings without a column of their own that are shown as axes at most."""
MAX_CELL_CHARACTERS = 60
UNKNOWN_CELL = "-"


def workspace_script(comparison: Comparison, output_dir: Path) -> str | None:
    """Write the Python source of `workspace.py`, a script by which the user makes a view and a report of this comparison in W&B.

    Returns None if no run of the comparison logs to W&B. View and report get the name of `output_dir`, the directory that
    the comparison is written into. A point is one combination of settings, with a run for each repeat; an axis is a setting
    in which the points differ.
    """
    runs = runs_logged_to_wandb(comparison.points)
    if not runs:
        return None
    values_by_column = _axis_values_by_column(comparison)
    # The runs are judged by this metric; the first run's setting stands for all.
    held_out_metric = str(runs[0].config.get("evaluation.watch") or "eval/loss")
    was_evaluated = any(point.measured.metrics_at_end for point in comparison.points)
    final_metric = f"final/{held_out_metric}" if was_evaluated else "final/loss"
    # W&B folds runs with the same values of these columns into one line of its table and of its plots.
    group_columns = [column for column, values in values_by_column.items() if _is_grouping_axis(values, len(runs))]
    content = WorkspaceContent(
        title=output_dir.resolve().name,
        entity=_logging_setting(runs[0], "entity"),
        project=_logging_setting(runs[0], "project") or "shardtune",
        setting_columns=_table_columns(values_by_column, runs),
        group_columns=group_columns,
        baseline_run_id=_baseline_run_id(comparison),
        summary_columns=summary_columns(final_metric),
        answer_lines=comparison.conclusion.lines,
        verdict_lines=[point.verdict for point in comparison.points],
        points_markdown_lines=_points_markdown_lines(comparison, values_by_column, held_out_metric),
        max_runs=max(MIN_SHOWN_RUNS, len(runs)),
        x_axis_metric=_x_axis_metric(runs),
        loss_names=_metric_names_in_wandb("loss", runs),
        grad_norm_names=_metric_names_in_wandb("grad_norm", runs),
        tokens_per_s_names=_metric_names_in_wandb("tokens_per_s", runs),
        memory_gib_names=_metric_names_in_wandb("memory_gib", runs),
        held_out_metric=held_out_metric,
        final_metric=final_metric,
    )
    return workspace_script_source(
        _panel_sections(comparison.points, has_axes=bool(values_by_column)),
        content,
        run_filter_source=_run_filter_source(runs),
        install_command=install_command("workspace"),
    )


def summary_columns(final_metric: str) -> list[str]:
    """Columns of W&B's run table that come from a run's summary, each once. `final_metric`: by which runs are judged."""
    return list(dict.fromkeys(["final/loss", final_metric, *SUMMARY_COLUMNS_BEHIND_LOSSES]))


def write_workspace_script(comparison: Comparison, output_dir: Path) -> str | None:
    """Write the script `workspace.py` of a comparison into `output_dir`, so that its user can look at the runs in W&B.

    Returns the file's name; None, and writes nothing, if none of the runs logs to W&B. Raises StorageError.
    """
    script = workspace_script(comparison, output_dir)
    if script is None:
        return None
    write_text_atomic(output_dir / WORKSPACE_FILE, script)
    return WORKSPACE_FILE


def write_workspace_script_of_runs(run_dirs: Sequence[Path], sweep_dir: Path) -> str | None:
    """Write the W&B script `workspace.py` of a sweep into `sweep_dir`, for those of its runs that have begun.

    Returns a line to print:

    - Where the script is and what it does, if it was written.
    - Why there is none, if W&B has none of the runs, or after an error: a sweep must not fail for lack of this file.
    - None if no run has begun, that is, no directory has a `config.yaml` yet.
    """
    sources = [PointSource((run_dir,), name=run_dir.name) for run_dir in run_dirs if is_run_directory(run_dir)]
    if not sources:
        return None
    try:
        comparison = compare_points(sources)
        if write_workspace_script(comparison, sweep_dir) is None:
            return no_workspace_reason(comparison.points)
    except ShardtuneError as error:
        return f"no {WORKSPACE_FILE}: {error}"
    return f"in W&B: {sweep_dir / WORKSPACE_FILE} makes a view and a report of these runs there"


def rewrite_workspace_script_of_array(run_dir: Path) -> None:
    """Bring the W&B script `workspace.py` of a SLURM job array up to date, when the job that trained in `run_dir` has ended.

    The array has a job for each point (combination of settings); their directories `0`, `1` ... lie beside the script. When
    the array was submitted, no run had an id in W&B or a result yet, so each job writes the script again.

    Does nothing outside of SLURM: there, the command that starts the points writes the script after the last one. Also
    nothing if the submission wrote no script. Raises StorageError, ConfigError.
    """
    sweep_dir = run_dir.resolve().parent
    is_slurm_job = "SLURM_JOB_ID" in os.environ
    if not is_slurm_job or not (sweep_dir / WORKSPACE_FILE).is_file():
        return
    # Points that have not begun have no configuration yet.
    run_dirs = [path for path in sweep_dir.iterdir() if path.name.isdecimal() and is_run_directory(path)]
    write_workspace_script_of_runs(sorted(run_dirs, key=lambda path: int(path.name)), sweep_dir)


def no_workspace_reason(points: Sequence[ComparedPoint]) -> str | None:
    """Explain to the user why there is no `workspace.py`: the runs were recorded without W&B, and how to change that.

    None if there is nothing to explain: some run is in W&B, or every point was refused, so that none ran.
    """
    all_refused = all(point.state == REFUSED_STATE for point in points)
    if all_refused or runs_logged_to_wandb(points):
        return None
    return (
        "not in W&B: these runs were recorded with logging.wandb=disabled, which debug= sets too; "
        "logging.wandb=offline gives them a group, names and a workspace there"
    )


def runs_logged_to_wandb(points: Sequence[ComparedPoint]) -> list[RecordedRun]:
    """The runs of the comparison that log to W&B, all repeats of all points; refused points have none."""
    runs: list[RecordedRun] = []
    for point in points:
        if point.state != REFUSED_STATE:
            runs += point.repeats
    return [run for run in runs if _wandb_mode(run) != "disabled"]


def _wandb_mode(run: RecordedRun) -> str:
    """How a run was recorded in W&B: `online`, `offline`, `disabled`; `auto` if neither settings nor environment said more."""
    mode = str(run.config.get("logging.wandb", "disabled"))
    if mode == "auto":  # then WANDB_MODE decided when the run started
        mode = (run.record.from_environment or {}).get("logging.wandb") or mode
    return mode


def _metric_names_in_wandb(metric: str, runs: list[RecordedRun]) -> list[str]:
    """The names of a metric in W&B, for a plot over runs of several versions of shardtune: `["loss", "train/loss"]`.

    `metric`: its name in `metrics.jsonl`, such as `loss`. Versions of shardtune renamed metrics: each set of names is an
    edition, numbered from 1. A run keeps the edition with which it began, also when a later version resumes it.
    """
    # A run that was not started yet has no record, and will begin with today's names.
    editions = {CURRENT_NAMES_EDITION if run.record.is_empty else run.record.metric_names for run in runs}
    names = [metric if edition == FIRST_NAMES_EDITION else tracked_name(metric) for edition in sorted(editions)]
    return list(dict.fromkeys(names))  # later editions differ in few names


def _x_axis_metric(runs: list[RecordedRun]) -> str:
    """Choose the metric on the x axis of W&B plots that show all of these runs. The first case that applies:

    - The runs use different editions of metric names, so they share no counter: `Step`, which is W&B's own.
    - The runs use the first edition, or differ in global batch or in `logging.x`: tokens, since a step is not the same
      amount of training in each.
    - Otherwise: the counter that `logging.x` of all runs names.
    """
    tokens_names = _metric_names_in_wandb("tokens", runs)
    if len(tokens_names) > 1:
        return "Step"
    (tokens_name,) = tokens_names
    x_axes = {str(run.config.get("logging.x", XAxis.step)) for run in runs}
    global_batches = {run.config.get("batch.global") for run in runs}
    # Its metrics have no prefix; today's name is `train/tokens`.
    is_first_edition = tokens_name == "tokens"
    if is_first_edition or len(global_batches) > 1 or len(x_axes) > 1:
        return tokens_name
    return XAxis(x_axes.pop()).tracked_name


def _panel_sections(points: Sequence[ComparedPoint], *, has_axes: bool) -> list[PanelSection]:
    """Choose the sections of the W&B workspace: questions such as `Which is fastest?`, and the plots that answer them.

    They are in the order of display. A comparison of one point asks about its run, one of several points asks which is best.
    `has_axes`: whether the points differ in a setting that W&B has as a column. Then a section compares settings, if some of
    them can change the loss.
    """
    memory_panels = list(MEMORY_PANELS)
    if any(point.measured.memory_reserved_gib is not None for point in points):  # on GPUs
        memory_panels.append(RESERVED_MEMORY_PANEL)
    loss_panels = list(LOSS_PANELS)
    if any(map(_has_loss_by_position, points)):
        loss_panels.append(LOSS_BY_POSITION_PANEL)
    if len(points) == 1:
        return [
            PanelSection("Does it learn?", loss_panels),
            PanelSection("How fast is it?", list(SPEED_PANELS)),
            PanelSection("What does it need?", memory_panels),
            PanelSection("What does it cost?", list(COST_PANELS)),
        ]
    # Points with the same of these settings must have the same loss. Of other points one wants to know which learns best.
    loss_settings = [loss_relevant_settings(point.first_repeat) for point in points]
    num_different = sum(settings not in loss_settings[:index] for index, settings in enumerate(loss_settings))
    has_points_of_same_loss = num_different < len(loss_settings)
    sections = []
    if num_different > 1 and has_axes:
        sections.append(PanelSection("Which settings are best?", list(SETTINGS_PANELS)))
    sections += [
        PanelSection("Which is fastest?", list(SPEED_PANELS)),
        PanelSection("What does each need?", memory_panels),
        PanelSection("Is it the same loss?" if has_points_of_same_loss else "Which learns best?", loss_panels),
        PanelSection("What does each cost?", list(COST_PANELS)),
    ]
    return sections


def _has_loss_by_position(point: ComparedPoint) -> bool:
    """Whether a point has the held-out loss by position in the sequence, as in `eval/loss_by_position/512`."""
    return any(metric.startswith("eval/loss_by_position/") for metric in point.measured.metrics_at_end)


def _axis_values_by_column(comparison: Comparison) -> dict[str, tuple[Any, ...]]:
    """The settings in which the points differ: {column of W&B's run table: value at each point}, such as {"lr": (1e-4, 2e-4)}.

    A setting has a column of its own if it is one of `WANDB_COLUMN_BY_SETTING`, or named in `logging.columns`. Only if no
    differing setting has one, columns of the whole configuration are taken, such as `config.parallel.sequence`, at most
    `MAX_CONFIG_COLUMNS`.
    """
    configured_columns: set[str] = set()
    for point in comparison.points:
        configured_columns |= _configured_columns(point.first_repeat)
    values_by_column = {}
    values_without_own_column = {}
    for difference in comparison.differences:
        key = difference.key
        # `logging.columns` may name the choice `strategy.name` by its group, `strategy`, as the command line does.
        group = key.removesuffix(".name")
        if key in WANDB_COLUMN_BY_SETTING:
            values_by_column[WANDB_COLUMN_BY_SETTING[key]] = difference.values
        elif key in configured_columns:
            values_by_column[_column_name(key)] = difference.values
        elif group in configured_columns:
            values_by_column[_column_name(group)] = difference.values
        elif difference.is_setting:
            values_without_own_column[f"config.{key}"] = difference.values
    return values_by_column or dict(list(values_without_own_column.items())[:MAX_CONFIG_COLUMNS])


def _configured_columns(run: RecordedRun) -> set[str]:
    """Keys of the settings that `logging.columns` of a run lists: the axes of its sweep, and what the user added."""
    # An entry is a key, or `name=text` for a column of the user's own.
    return {argument.partition("=")[0] for argument in run.config.get("logging.columns") or []}


def _is_grouping_axis(axis_values: tuple[Any, ...], num_runs: int) -> bool:
    """Whether W&B's run table should put the runs into groups by this axis; `axis_values`: its value at each point.

    Not if it is a number with at least `MIN_POINTS_OF_SEARCH` values that differs in each run, as in a search of learning
    rates: each group would be one run. A sweep of two or three values is read point by point, so it is grouped.
    """
    is_numeric = all(isinstance(value, int | float) for value in axis_values)
    is_search = is_numeric and len(axis_values) >= MIN_POINTS_OF_SEARCH
    num_different_values = len({str(value) for value in axis_values})
    # As many runs as points: with repeats, the runs of one point form a group.
    differs_in_each_run = num_different_values == len(axis_values) == num_runs
    return not (is_search and differs_in_each_run)


def _table_columns(values_by_column: dict[str, tuple[Any, ...]], runs: list[RecordedRun]) -> list[str]:
    """Columns of W&B's run table for settings: those in which the points differ, then those in `logging.columns` of a run."""
    columns = list(values_by_column)
    configured_keys: set[str] = set()
    for run in runs:
        configured_keys |= _configured_columns(run)
    for key in sorted(configured_keys):
        # Settings with a column of their own are shown anyway if they differ.
        has_standard_column = key in WANDB_COLUMN_BY_SETTING or f"{key}.name" in WANDB_COLUMN_BY_SETTING
        if not has_standard_column:
            columns.append(_column_name(key))
    return list(dict.fromkeys(columns))  # each once: a setting may both differ and be named


def _column_name(key: str) -> str:
    """The column that a setting of `logging.columns` has in W&B's run table: `data.max_length` -> `data_max_length`."""
    return re.sub(r"\W", "_", key.strip("_"))


def _run_filter_source(runs: list[RecordedRun]) -> str:
    """Write the filter by which the script finds exactly these runs in their W&B project: `ws.Metric("ID").isin(['ab12'])`.

    It names the ids of the runs if all are known, else their W&B groups if each has one, else their run directories.
    """
    # A run that was not started, such as a later repeat, has no id yet; the same command writes this file anew when it has.
    run_ids = [_wandb_run_id(run) for run in runs if run.state != "not started"]
    if run_ids and None not in run_ids:
        return f'ws.Metric("ID").isin({sorted(map(str, run_ids))!r})'
    # W&B's files of a run may be elsewhere (WANDB_DIR), and one that failed early has no id in `run.json`.
    groups = {_logging_setting(run, "group") for run in runs}
    if None not in groups:
        return f'ws.Metric("Group").isin({sorted(map(str, groups))!r})'
    run_dirs = sorted({str(run.config.get("run.dir")) for run in runs})
    return f'ws.Config("run_dir").isin({run_dirs!r})'


def _baseline_run_id(comparison: Comparison) -> str | None:
    """The id in W&B of the run that the plots mark as baseline, to which the others are compared.

    None for a single point, for a baseline that is not in W&B, or if the id is not known.
    """
    if len(comparison.points) == 1:
        return None
    baseline_run = next(
        point.first_repeat for point in comparison.points if point.name == comparison.default_baseline_name
    )
    return None if _wandb_mode(baseline_run) == "disabled" else _wandb_run_id(baseline_run)


def _wandb_run_id(run: RecordedRun) -> str | None:
    """Find the id that a run has in W&B, such as `ab12cd34`; None if it is not known. The first of these that has it:

    - The run's address, if the run was read from W&B's server.
    - `run.json`, if the run ended.
    - The name of the directory that W&B wrote: `run-20250131_120000-ab12cd34`.
    """
    if is_wandb_address(run.directory):
        return str(run.directory).rpartition("/")[2]
    if run.record.outcome is not None and run.record.outcome.progress.get("wandb_id"):
        return str(run.record.outcome.progress["wandb_id"])
    # A run that did not end has its id in the name of W&B's directory. The latest counts: if an earlier start saved nothing,
    # the next start got a new id.
    candidates = [run.directory] if is_wandb_directory(run.directory) else [*run.directory.glob("wandb/*run-*")]
    names = [path.name.removeprefix("offline-") for path in candidates if is_wandb_directory(path)]
    latest_name = max(names, default="")  # a name begins with the time of the start
    match = WANDB_RUN_DIRECTORY_REGEX.fullmatch(latest_name)
    return match["id"] if match else None


class _MarkdownColumn(NamedTuple):
    """A column of the table of points in the W&B report."""

    heading: str
    cells: list[str]
    """For each point; `UNKNOWN_CELL` for what is not known."""


def _points_markdown_lines(
    comparison: Comparison, values_by_column: dict[str, tuple[Any, ...]], held_out_metric: str
) -> list[str]:
    """Write the points of the comparison as a Markdown table for the W&B report: axes, losses, speed, memory, price and state.

    A column without a value at any point is left out. `values_by_column`: the settings in which the points differ, with the
    value at each point. `held_out_metric`: the metric by which the runs are judged, such as `eval/loss`.
    """
    points = comparison.points
    columns = [_MarkdownColumn("run", [point.name for point in points])]
    for column, values in values_by_column.items():
        columns.append(_MarkdownColumn(column.removeprefix("config."), [format_setting(value) for value in values]))
    measured_cells = [_measured_cells(point, held_out_metric) for point in points]
    for heading in measured_cells[0]:
        columns.append(_MarkdownColumn(heading, [cell_by_heading[heading] for cell_by_heading in measured_cells]))
    columns.append(_MarkdownColumn("state", [point.reason or point.state for point in points]))

    known_columns = [column for column in columns if set(column.cells) != {UNKNOWN_CELL}]
    lines = [_markdown_row([column.heading for column in known_columns]), _markdown_row(["---"] * len(known_columns))]
    for point_index in range(len(points)):
        lines.append(_markdown_row([column.cells[point_index] for column in known_columns]))
    return lines


def _markdown_row(cells: list[str]) -> str:
    """A line of a Markdown table: `| a | b |`."""
    return f"| {' | '.join(map(markdown_cell, cells))} |"


def _measured_cells(point: ComparedPoint, held_out_metric: str) -> dict[str, str]:
    """The measured numbers of one point for the table of the report, by the heading of their column; `-` if not known.

    Of the repeats of the point these are the first one's loss, the median speed, and the largest memory.
    """
    measured = point.measured
    return {
        "steps": str(measured.steps or UNKNOWN_CELL),
        "loss": _number_cell(measured.loss, format_metric),
        held_out_metric: _number_cell(measured.metrics_at_end.get(held_out_metric), format_metric),
        "tokens/s": _number_cell(measured.tokens_per_s, "{:,.0f}".format),
        "s a step": _number_cell(measured.step_s, "{:.3g}".format),
        "GiB": _number_cell(measured.memory_gib, "{:.3g}".format),
        "$/M tokens": _number_cell(point.summary.dollars_per_million, "{:.3g}".format),
    }


def _number_cell(number: float | None, format_number: Callable[[float], str]) -> str:
    return UNKNOWN_CELL if number is None else format_number(number)


def markdown_cell(text: str) -> str:
    """Fit a text into a cell of a Markdown table: on one line, at most `MAX_CELL_CHARACTERS` long, bars escaped.

    A bar would begin another cell, and a line break would end the table.
    """
    one_line = " ".join(text.split())
    if len(one_line) > MAX_CELL_CHARACTERS:
        one_line = f"{one_line[: MAX_CELL_CHARACTERS - 3]}..."
    return one_line.replace("|", "\\|")


def _logging_setting(run: RecordedRun, name: str) -> str | None:
    """The value that `logging.<name>` had for a run, such as the W&B project or team; None if it had none.

    The first source that has one:

    - The run's configuration.
    - The environment when the run started, such as WANDB_ENTITY, as `run.json` recorded it.
    - For a run of an early version, whose `run.json` has no such record: the sentence that it printed.
    """
    key = f"logging.{name}"
    from_environment = run.record.from_environment
    setting = run.config.get(key) or (from_environment or {}).get(key)
    is_of_early_version = from_environment is None
    if not setting and is_of_early_version:
        # The value `a team` in the sentence `a team (WANDB_ENTITY)`; empty if nothing was printed.
        setting = (run.record.substitutions.get(key) or "").rpartition(" (")[0]
    return str(setting) if setting else None
