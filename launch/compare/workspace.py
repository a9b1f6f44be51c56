"""Writes a script that shows runs in W&B, a section for each question: a saved view of the workspace, and a report."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launch.compare.comparison import ComparedRun, Comparison, compare
from launch.compare.curves import step_settings
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
    watched = str(runs[0].config.get("evaluation.watch") or "eval/loss")
    final = f"final/{watched}" if any(run.measured.after for run in comparison.runs) else "final/loss"
    summary = dict.fromkeys(["final/loss", final, *SUMMARY_COLUMNS])
    grouping = [column for column, values in axes.items() if _groups(values, len(runs))]
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
        verdict=[run.verdict for run in comparison.runs],
        points=_points_table(comparison, axes, watched),
        max_runs=max(10, len(runs)),
        x=_x_axis(runs),
        loss=_names_in_wandb("loss", runs),
        grad_norm=_names_in_wandb("grad_norm", runs),
        tokens_per_s=_names_in_wandb("tokens_per_s", runs),
        memory_gib=_names_in_wandb("memory_gib", runs),
        held_out=watched,
        final=final,
    )


def write_workspace(comparison: Comparison, to: Path) -> str | None:
    """Write `workspace.py` into `to` if any of the runs is in W&B; returns the file's name, or None. Errors: StorageError."""
    script = workspace_script(comparison, to)
    if script is None:
        return None
    write_text_atomic(to / WORKSPACE, script)
    return WORKSPACE


def workspace_line(run_dirs: Sequence[Path], to: Path) -> str | None:
    """Write `workspace.py` into `to`, the directory of a sweep or a search, for those of its runs that have begun.

    Returns a line that names the file, or says why there is none; None if no run has begun. The runs are what was asked
    for, so that an error is a line, too.
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


def renew_workspace(run_dir: Path) -> None:
    """Write the `workspace.py` of a job array anew, when the job of `run_dir`, one of its points, has ended.

    The submission wrote the first one, before any point had an id in W&B or a result. Does nothing outside of SLURM, where the
    command that starts the points writes the script when all have ended. Errors: StorageError, ConfigError.
    """
    sweep_dir = run_dir.resolve().parent
    if "SLURM_JOB_ID" not in os.environ or not (sweep_dir / WORKSPACE).is_file():
        return
    run_dirs = [path for path in sweep_dir.iterdir() if path.name.isdecimal() and is_run_directory(path)]
    workspace_line(sorted(run_dirs, key=lambda path: int(path.name)), sweep_dir)


def why_no_workspace(comparison: Comparison) -> str | None:
    """Why W&B can show none of these runs, as a line for people; None if it has some, or if none was started."""
    if runs_in_wandb(comparison) or not any(run.repeated.state != REFUSED for run in comparison.runs):
        return None
    return (
        "not in W&B: these runs were recorded with logging.wandb=disabled, which debug= sets too; "
        "logging.wandb=offline gives them a group, names and a workspace there"
    )


def runs_in_wandb(comparison: Comparison) -> list[RecordedRun]:
    """The runs of the comparison, with all repeats, that log to W&B."""
    runs: list[RecordedRun] = []
    for compared in comparison.runs:
        if compared.repeated.state != REFUSED:
            runs += compared.repeated.repeats
    return [run for run in runs if _wandb_mode(run) != "disabled"]


def _wandb_mode(run: RecordedRun) -> str:
    """How a run was recorded in W&B: `online`, `offline`, `disabled`, or `auto` if nothing else is known."""
    mode = str(run.config.get("logging.wandb", "disabled"))
    if mode == "auto":  # then WANDB_MODE decided when the run started
        mode = (run.record.from_environment or {}).get("logging.wandb") or mode
    return mode


def _names_in_wandb(metric: str, runs: list[RecordedRun]) -> list[str]:
    """What a metric of steps is called in W&B: several names if the runs began with different editions of them."""
    # A run that waits has no record yet, and will begin with today's names.
    editions = {EDITION if run.record.is_empty else run.record.metric_names for run in runs}
    names = [metric if edition == FIRST_EDITION else tracked_name(metric) for edition in sorted(editions)]
    return list(dict.fromkeys(names))  # later editions differ in few names


def _x_axis(runs: list[RecordedRun]) -> str:
    """The metric that all of these runs can be drawn over.

    It is the axis of `logging.x`, or tokens if the batches differ: a step of one run is then not a step of another. Runs of
    different editions of the names share W&B's own count of steps alone.
    """
    (first_name, *other_names) = _names_in_wandb("tokens", runs)
    if other_names:
        return "Step"
    axes = {str(run.config.get("logging.x", XAxis.step)) for run in runs}
    batches = {run.config.get("batch.global") for run in runs}
    if first_name == "tokens" or len(batches) > 1 or len(axes) > 1:
        return first_name
    return XAxis(axes.pop()).tracked_name


def _questions(comparison: Comparison, axes: dict[str, tuple[Any, ...]]) -> list[tuple[str, list[str]]]:
    """(question, panels) of each section of the W&B workspace; which questions depends on whether there is a single run, runs
    that differ in strategy alone, or others.
    """
    memory = list(MEMORY)
    losses = list(LOSSES)
    if any(run.measured.memory_reserved_gib is not None for run in comparison.runs):  # on GPUs
        memory.append(RESERVED)
    for run in comparison.runs:
        if any(metric.startswith("eval/loss_by_position/") for metric in run.measured.after):
            losses.append(BY_POSITION)
            break
    if len(comparison.runs) == 1:
        return [
            ("Does it learn?", losses),
            ("How fast is it?", list(FASTEST)),
            ("What does it need?", memory),
            ("What does it cost?", list(COSTS)),
        ]
    same_job, other_jobs = _jobs(comparison)
    questions = [("Which is fastest?", list(FASTEST)), ("What does each need?", memory)]
    if other_jobs and axes:
        questions.insert(0, ("Which settings are best?", list(SETTINGS)))
    # Points that compute the same must have the same loss. Of others one wants to know which learns best.
    questions.append(("Is it the same loss?" if same_job else "Which learns best?", losses))
    return [*questions, ("What does each cost?", list(COSTS))]


def _jobs(comparison: Comparison) -> tuple[bool, bool]:
    """(whether two points train the same job, whether two points train different ones), a job being all but its speed."""
    jobs = [step_settings(run.first_repeat) for run in comparison.runs]
    number_of_jobs = sum(job not in jobs[:index] for index, job in enumerate(jobs))
    return number_of_jobs < len(jobs), number_of_jobs > 1


def _axes(comparison: Comparison) -> dict[str, tuple[Any, ...]]:
    """The settings in which the points differ: {column of W&B's run table: value of each point}.

    If none of them has a column of its own, they are found in the whole configuration, `config`.
    """
    asked: set[str] = set()
    for run in comparison.runs:
        asked |= _asked_columns(run.first_repeat)
    axes = {}
    others = {}
    for difference in comparison.differences:
        group = difference.key.removesuffix(".name")
        if difference.key in COLUMNS:
            axes[COLUMNS[difference.key]] = difference.values
        elif difference.key in asked or group in asked:
            axes[_column_name(difference.key if difference.key in asked else group)] = difference.values
        elif " " not in difference.key:  # `run.json host` is no setting
            others[f"config.{difference.key}"] = difference.values
    return axes or dict(list(others.items())[:MOST_UNNAMED_AXES])


def _asked_columns(run: RecordedRun) -> set[str]:
    """The settings that `logging.columns` of a run names: the axes of its sweep, and what the user added."""
    return {word.partition("=")[0] for word in run.config.get("logging.columns") or []}


def _groups(values: tuple[Any, ...], number_of_runs: int) -> bool:
    """Whether an axis groups the runs. A number that each run of a search has for itself would make groups of one run."""
    numbers = [value for value in values if isinstance(value, int | float)]
    has_own_values = len({*map(str, values)}) == len(values) == number_of_runs
    return not (len(numbers) == len(values) >= FEWEST_OF_SEARCH and has_own_values)


def _table_columns(axes: dict[str, tuple[Any, ...]], runs: list[RecordedRun]) -> list[str]:
    """Columns of W&B's run table: those of the settings that differ, then those that `logging.columns` of the runs names."""
    columns = list(axes)
    user_columns: set[str] = set()
    for run in runs:
        user_columns |= _asked_columns(run)
    for name in sorted(user_columns):
        if name not in COLUMNS and f"{name}.name" not in COLUMNS:
            columns.append(_column_name(name))
    return list(dict.fromkeys(columns))  # each once: a setting may both differ and be named


def _column_name(key: str) -> str:
    """The column of a setting in W&B's run table."""
    return re.sub(r"\W", "_", key.strip("_"))


def _filter(runs: list[RecordedRun]) -> str:
    """A filter in Python that finds these runs and no others of the project: by their ids, their groups or directories."""
    # A run that waits, such as a later repeat, has no id yet; the same command writes this file anew when it has.
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
    """The id in W&B of the run that the others are compared with; None for a single run, or if it is not known."""
    if len(comparison.runs) == 1:
        return None
    first = next(run.first_repeat for run in comparison.runs if run.name == comparison.first)
    return None if _wandb_mode(first) == "disabled" else _run_id(first)


def _run_id(run: RecordedRun) -> str | None:
    """The id of a run in W&B; None if the run left none behind."""
    if is_wandb_address(run.directory):
        return str(run.directory).rpartition("/")[2]
    if run.record.outcome is not None and run.record.outcome.progress.get("wandb_id"):
        return str(run.record.outcome.progress["wandb_id"])
    # A run that did not end says it in the name of W&B's directory: that of the last start, since a start that never saved
    # is forgotten by the next one.
    parts = [run.directory] if is_wandb_directory(run.directory) else [*run.directory.glob("wandb/*run-*")]
    started = [part.name.removeprefix("offline-") for part in parts if is_wandb_directory(part)]
    match = RUN_DIRECTORY_NAME.fullmatch(max(started, default=""))
    return match["id"] if match else None


def _points_table(comparison: Comparison, axes: dict[str, tuple[Any, ...]], watched: str) -> list[str]:
    """The points as the lines of a Markdown table: their values on the axes, what they reached, and what they took."""
    settings = [column.removeprefix("config.") for column in axes]
    headings = ["run", *settings, "steps", "loss", watched, "tokens/s", "s a step", "GiB", "$/M tokens", "state"]
    rows = []
    for number, run in enumerate(comparison.runs):
        axis_cells = [short(values[number]) for values in axes.values()]
        rows.append([run.name, *axis_cells, *_measured_cells(run, watched), run.repeated.reason or run.repeated.state])
    # Columns that no point has anything in are left out.
    columns = []
    for cells in zip(headings, *rows, strict=True):
        if any(cell != UNKNOWN for cell in cells[1:]):
            columns.append(cells)
    lines = [f"| {' | '.join(map(markdown_cell, cells))} |" for cells in zip(*columns, strict=True)]
    lines.insert(1, f"| {' | '.join(['---'] * len(columns))} |")
    return lines


def _measured_cells(run: ComparedRun, watched: str) -> list[str]:
    """Steps, loss, held-out metric, speed, memory and price of a point; a dash for what is not known."""
    measured = run.measured
    return [
        str(measured.steps or UNKNOWN),
        _cell(measured.loss, readable),
        _cell(measured.after.get(watched), readable),
        _cell(measured.tokens_per_s, "{:,.0f}".format),
        _cell(measured.step_s, "{:.3g}".format),
        _cell(measured.memory_gib, "{:.3g}".format),
        _cell(run.summary.dollars_per_million, "{:.3g}".format),
    ]


def _cell(number: float | None, written: Callable[[float], str]) -> str:
    return UNKNOWN if number is None else written(number)


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
