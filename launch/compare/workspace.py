"""Writes a script that shows runs in W&B, a section for each question: a saved view of the workspace, and a report."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launch.compare.comparison import ComparedPoint, Comparison, compare
from launch.compare.curves import loss_relevant_settings
from launch.compare.repeats import REFUSED
from launch.compare.run_files import RecordedRun, is_run_directory
from launch.compare.settings import ComparisonRow
from launch.compare.wandb_files import RUN_DIRECTORY_NAME, is_wandb_address, is_wandb_directory
from launch.compare.workspace_script import BY_POSITION, COSTS, FASTEST, LOSSES, MEMORY, RESERVED, SETTINGS, script_text
from strategies.errors import ShardtuneError
from strategies.extras import install_command
from trainer.reporting.config import COLUMNS
from trainer.reporting.metric_names import EDITION, FIRST_EDITION, XAxis, tracked_name
from trainer.reporting.numbers import readable, short
from trainer.reporting.status import write_text_atomic

WORKSPACE = "workspace.py"
SUMMARY_COLUMNS = ("final/tokens_per_s", "final/step_s", "final/mfu", "final/memory_gib", "state")
"""Columns of the run table that come from a run's summary, behind the losses."""
FEWEST_OF_SEARCH = 5
"""Runs that each have a value of their own on a numeric axis: from this number on they are a search, or read like one."""
MOST_UNNAMED_AXES = 4
"""Settings without a column of their own that are shown as axes at most."""
MOST_CELL_CHARACTERS = 60
UNKNOWN = "-"


def workspace_script(comparison: Comparison, to: Path) -> str | None:
    """The Python script that shows a comparison in W&B; None if none of its runs is there.

    The views are called after the directory `to`, into which the comparison is written.
    """
    runs = runs_in_wandb(comparison)
    if not runs:
        return None
    axes = _axes(comparison)
    held_out_metric = str(runs[0].config.get("evaluation.watch") or "eval/loss")
    final = f"final/{held_out_metric}" if any(point.measured.after for point in comparison.points) else "final/loss"
    summary = dict.fromkeys(["final/loss", final, *SUMMARY_COLUMNS])
    grouping = [column for column, values in axes.items() if _is_grouping(values, len(runs))]
    return script_text(
        _questions(comparison, axes),
        install=install_command("workspace"),
        filters=_filter(runs),
        title=to.resolve().name,
        entity=_logging_setting(runs[0], "entity"),
        project=_logging_setting(runs[0], "project") or "shardtune",
        columns=_table_columns(axes, runs),
        group_by=grouping,
        baseline=_baseline(comparison),
        summary=list(summary),
        answer=comparison.conclusion.lines,
        verdict=[point.verdict for point in comparison.points],
        points=_points_table(comparison, axes, held_out_metric),
        max_runs=max(10, len(runs)),
        x=_x_axis(runs),
        loss=_names_in_wandb("loss", runs),
        grad_norm=_names_in_wandb("grad_norm", runs),
        tokens_per_s=_names_in_wandb("tokens_per_s", runs),
        memory_gib=_names_in_wandb("memory_gib", runs),
        held_out=held_out_metric,
        final=final,
    )


def write_workspace(comparison: Comparison, to: Path) -> str | None:
    """Write `workspace.py` into `to` if any of the runs is in W&B; returns the file's name, or None. Errors: StorageError."""
    script = workspace_script(comparison, to)
    if script is None:
        return None
    write_text_atomic(to / WORKSPACE, script)
    return WORKSPACE


def write_workspace_of_runs(run_dirs: Sequence[Path], to: Path) -> str | None:
    """Write `workspace.py` into `to`, the directory of a sweep or a search, for those of its runs that have begun.

    Returns a line that names the file, or says why there is none; None if no run has begun. An error is returned as a line, too:
    the runs must not fail for this file.
    """
    rows = [ComparisonRow((run_dir,), name=run_dir.name) for run_dir in run_dirs if is_run_directory(run_dir)]
    if not rows:
        return None
    try:
        comparison = compare(rows)
        if write_workspace(comparison, to) is None:
            return why_no_workspace(comparison)
    except ShardtuneError as error:
        return f"no {WORKSPACE}: {error}"
    return f"in W&B: {to / WORKSPACE} makes a view and a report of these runs there"


def rewrite_array_workspace(run_dir: Path) -> None:
    """Write the `workspace.py` of a job array anew, when the job of `run_dir`, one of its points, has ended.

    The submission wrote the first one, before any point had an id in W&B or a result. Does nothing outside of SLURM, where the
    command that starts the points writes the script when all have ended. Errors: StorageError, ConfigError.
    """
    sweep_dir = run_dir.resolve().parent
    if "SLURM_JOB_ID" not in os.environ or not (sweep_dir / WORKSPACE).is_file():
        return
    run_dirs = [path for path in sweep_dir.iterdir() if path.name.isdecimal() and is_run_directory(path)]
    write_workspace_of_runs(sorted(run_dirs, key=lambda path: int(path.name)), sweep_dir)


def why_no_workspace(comparison: Comparison) -> str | None:
    """Why W&B can show none of these runs, as a line for people; None if it has some, or if none was started."""
    if runs_in_wandb(comparison) or not any(point.state != REFUSED for point in comparison.points):
        return None
    return (
        "not in W&B: these runs were recorded with logging.wandb=disabled, which debug= sets too; "
        "logging.wandb=offline gives them a group, names and a workspace there"
    )


def runs_in_wandb(comparison: Comparison) -> list[RecordedRun]:
    """The runs of the comparison, with all repeats, that log to W&B."""
    runs: list[RecordedRun] = []
    for point in comparison.points:
        if point.state != REFUSED:
            runs += point.repeats
    return [run for run in runs if _wandb_mode(run) != "disabled"]


def _wandb_mode(run: RecordedRun) -> str:
    """How a run was recorded in W&B: `online`, `offline`, `disabled`, or `auto` if nothing else is known."""
    mode = str(run.config.get("logging.wandb", "disabled"))
    if mode == "auto":  # then WANDB_MODE decided when the run started
        mode = (run.record.from_environment or {}).get("logging.wandb") or mode
    return mode


def _names_in_wandb(metric: str, runs: list[RecordedRun]) -> list[str]:
    """What a metric of steps is called in W&B, once each: the names differ by the edition with which a run began."""
    # A run that was not started yet has no record, and will begin with today's names.
    editions = {EDITION if run.record.is_empty else run.record.metric_names for run in runs}
    names = [metric if edition == FIRST_EDITION else tracked_name(metric) for edition in sorted(editions)]
    return list(dict.fromkeys(names))  # later editions differ in few names


def _x_axis(runs: list[RecordedRun]) -> str:
    """The metric on the x axis of plots with all of these runs. The first case that applies:

    - The runs began with different editions of metric names: W&B's own count of steps, the only name they share.
    - First edition, or global batches or `logging.x` differ: tokens. A step of one run is not a step of another.
    - Otherwise: what `logging.x` of all runs says.
    """
    names_of_tokens = _names_in_wandb("tokens", runs)
    if len(names_of_tokens) > 1:
        return "Step"
    (tokens_name,) = names_of_tokens
    axes = {str(run.config.get("logging.x", XAxis.step)) for run in runs}
    batches = {run.config.get("batch.global") for run in runs}
    if tokens_name == "tokens" or len(batches) > 1 or len(axes) > 1:
        return tokens_name
    return XAxis(axes.pop()).tracked_name


def _questions(comparison: Comparison, axes: dict[str, tuple[Any, ...]]) -> list[tuple[str, list[str]]]:
    """(question, panels in Python) of each section of the W&B workspace.

    The questions depend on whether there is a single point, points of the same job, or points of several jobs. `axes`: see
    `_axes`.
    """
    memory = list(MEMORY)
    losses = list(LOSSES)
    if any(point.measured.memory_reserved_gib is not None for point in comparison.points):  # on GPUs
        memory.append(RESERVED)
    for point in comparison.points:
        if any(metric.startswith("eval/loss_by_position/") for metric in point.measured.after):
            losses.append(BY_POSITION)
            break
    if len(comparison.points) == 1:
        return [
            ("Does it learn?", losses),
            ("How fast is it?", list(FASTEST)),
            ("What does it need?", memory),
            ("What does it cost?", list(COSTS)),
        ]
    jobs = [
        loss_relevant_settings(point.first_repeat) for point in comparison.points
    ]  # equal for points of one job and seed
    number_of_jobs = sum(job not in jobs[:index] for index, job in enumerate(jobs))
    questions = [("Which is fastest?", list(FASTEST)), ("What does each need?", memory)]
    if number_of_jobs > 1 and axes:
        questions.insert(0, ("Which settings are best?", list(SETTINGS)))
    # Points of one job must have the same loss. Of points of other jobs one wants to know which learns best.
    has_same_job = number_of_jobs < len(jobs)
    questions.append(("Is it the same loss?" if has_same_job else "Which learns best?", losses))
    return [*questions, ("What does each cost?", list(COSTS))]


def _axes(comparison: Comparison) -> dict[str, tuple[Any, ...]]:
    """The settings in which the points differ: {column of W&B's run table: value of each point}.

    If none of these settings has a column of its own, the columns are those of the whole configuration, such as
    `config.parallel.sequence`; at most `MOST_UNNAMED_AXES`.
    """
    configured_columns: set[str] = set()
    for point in comparison.points:
        configured_columns |= _configured_columns(point.first_repeat)
    axes = {}
    axes_without_column = {}
    for difference in comparison.differences:
        key = difference.key
        group = key.removesuffix(".name")
        if key in COLUMNS:
            axes[COLUMNS[key]] = difference.values
        elif key in configured_columns:
            axes[_column_name(key)] = difference.values
        elif group in configured_columns:
            axes[_column_name(group)] = difference.values
        elif " " not in key:  # `run.json host` is no setting
            axes_without_column[f"config.{key}"] = difference.values
    return axes or dict(list(axes_without_column.items())[:MOST_UNNAMED_AXES])


def _configured_columns(run: RecordedRun) -> set[str]:
    """The settings that `logging.columns` of a run names: the axes of its sweep, and what the user added."""
    return {argument.partition("=")[0] for argument in run.config.get("logging.columns") or []}


def _is_grouping(values: tuple[Any, ...], number_of_runs: int) -> bool:
    """Whether runs are grouped by an axis. Not by a number that differs in each run of a search: each group would be one run.

    `values`: of each point on the axis.
    """
    is_numeric = all(isinstance(value, int | float) for value in values)
    is_search = is_numeric and len(values) >= FEWEST_OF_SEARCH
    differs_in_each_run = len({*map(str, values)}) == len(values) == number_of_runs
    return not (is_search and differs_in_each_run)


def _table_columns(axes: dict[str, tuple[Any, ...]], runs: list[RecordedRun]) -> list[str]:
    """Columns of W&B's run table: those of the settings that differ, then those that `logging.columns` of the runs names."""
    columns = list(axes)
    user_columns: set[str] = set()
    for run in runs:
        user_columns |= _configured_columns(run)
    for name in sorted(user_columns):
        if name not in COLUMNS and f"{name}.name" not in COLUMNS:
            columns.append(_column_name(name))
    return list(dict.fromkeys(columns))  # each once: a setting may both differ and be named


def _column_name(key: str) -> str:
    """The column of a setting in W&B's run table."""
    return re.sub(r"\W", "_", key.strip("_"))


def _filter(runs: list[RecordedRun]) -> str:
    """A filter in Python that finds these runs and no others of the project.

    By their ids if all are known, else by their groups, else by their directories.
    """
    # A run that was not started, such as a later repeat, has no id yet; the same command writes this file anew when it has.
    run_ids = [_run_id(run) for run in runs if run.state != "not started"]
    if run_ids and None not in run_ids:
        return f'ws.Metric("ID").isin({sorted(map(str, run_ids))!r})'
    # W&B's files of a run may be elsewhere (WANDB_DIR), and one that failed early has no id in `run.json`.
    groups = {_logging_setting(run, "group") for run in runs}
    if None not in groups:
        return f'ws.Metric("Group").isin({sorted(map(str, groups))!r})'
    run_dirs = sorted({str(run.config.get("run.dir")) for run in runs})
    return f'ws.Config("run_dir").isin({run_dirs!r})'


def _baseline(comparison: Comparison) -> str | None:
    """The id in W&B of the first run of the default baseline; None for a single point, or if the id is not known."""
    if len(comparison.points) == 1:
        return None
    first = next(point.first_repeat for point in comparison.points if point.name == comparison.default_baseline_name)
    return None if _wandb_mode(first) == "disabled" else _run_id(first)


def _run_id(run: RecordedRun) -> str | None:
    """The id of a run in W&B; None if the run left none behind."""
    if is_wandb_address(run.directory):
        return str(run.directory).rpartition("/")[2]
    if run.record.outcome is not None and run.record.outcome.progress.get("wandb_id"):
        return str(run.record.outcome.progress["wandb_id"])
    # A run that did not end has its id in the name of W&B's directory. The latest counts: if an earlier start saved nothing,
    # the next start got a new id.
    candidates = [run.directory] if is_wandb_directory(run.directory) else [*run.directory.glob("wandb/*run-*")]
    names = [path.name.removeprefix("offline-") for path in candidates if is_wandb_directory(path)]
    match = RUN_DIRECTORY_NAME.fullmatch(max(names, default=""))
    return match["id"] if match else None


def _points_table(comparison: Comparison, axes: dict[str, tuple[Any, ...]], held_out_metric: str) -> list[str]:
    """The points as lines of a Markdown table: values on the axes, losses, speed, memory, price and state."""
    settings = [column.removeprefix("config.") for column in axes]
    headings = [
        "run",
        *settings,
        "steps",
        "loss",
        held_out_metric,
        "tokens/s",
        "s a step",
        "GiB",
        "$/M tokens",
        "state",
    ]
    rows = []
    for number, point in enumerate(comparison.points):
        axis_cells = [short(values[number]) for values in axes.values()]
        rows.append([point.name, *axis_cells, *_measured_cells(point, held_out_metric), point.reason or point.state])
    # Columns that are unknown for every point are left out.
    columns = []
    for cells in zip(headings, *rows, strict=True):
        if any(cell != UNKNOWN for cell in cells[1:]):
            columns.append(cells)
    lines = [f"| {' | '.join(map(markdown_cell, cells))} |" for cells in zip(*columns, strict=True)]
    lines.insert(1, f"| {' | '.join(['---'] * len(columns))} |")
    return lines


def _measured_cells(point: ComparedPoint, held_out_metric: str) -> list[str]:
    """Steps, loss, held-out metric, speed, memory and price of a point; a dash for what is not known."""
    measured = point.measured
    return [
        str(measured.steps or UNKNOWN),
        _cell(measured.loss, readable),
        _cell(measured.after.get(held_out_metric), readable),
        _cell(measured.tokens_per_s, "{:,.0f}".format),
        _cell(measured.step_s, "{:.3g}".format),
        _cell(measured.memory_gib, "{:.3g}".format),
        _cell(point.summary.dollars_per_million, "{:.3g}".format),
    ]


def _cell(number: float | None, format_number: Callable[[float], str]) -> str:
    return UNKNOWN if number is None else format_number(number)


def markdown_cell(text: str) -> str:
    """A cell that cannot end early: a bar would begin another one, and a line break the text below the table."""
    one_line = " ".join(text.split())
    if len(one_line) > MOST_CELL_CHARACTERS:
        one_line = f"{one_line[: MOST_CELL_CHARACTERS - 3]}..."
    return one_line.replace("|", "\\|")


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
