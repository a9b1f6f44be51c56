"""Prints a comparison as tables, and as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from launch.compare import repeats
from launch.compare.comparison import TEST_DOCUMENTS, ComparedRun, Comparison
from launch.compare.conclusion import Conclusion
from launch.compare.curves import rounded
from launch.compare.events import notable_step_lines, resolved_settings
from launch.output import Column, TableRow, fold_all, table
from trainer.reporting.numbers import short, times

MeasureColumn = tuple[str, Callable[[ComparedRun], str]]
"""(heading of a column, function that returns a run's cell in it)."""
UNKNOWN = "-"
"""The cell of a number that is not known."""
LOSS_DIFFERENCE = "loss diff"
MFU = "MFU"
ANSWER = "answer"
"""Title of the section that Markdown and HTML show first."""
MAX_LISTED_VALUES = 8
"""Values of a setting that differs which are listed one a run; of more runs each value stands once, with its count."""


def _number(value: float | None, number_format: str) -> str:
    return UNKNOWN if value is None else format(value, number_format)


def _rate(per_second: float | None) -> str:
    """The cell of a speed in tokens/s: `12,345`, or `98.7` for a slow one."""
    if per_second is None:
        return UNKNOWN
    return format(per_second, ",.0f" if per_second >= 100 else ".1f")


def _milliseconds(seconds: float | None) -> str:
    """The cell of a time in ms: three digits below a second, whole milliseconds above."""
    if seconds is None:
        return UNKNOWN
    if seconds < 1:
        return f"{seconds * 1000:.3g}"
    return f"{seconds * 1000:,.0f}"


def _loss_difference(run: ComparedRun) -> str:
    return UNKNOWN if run.loss_difference is None else rounded(run.loss_difference.early)


def _start_seconds(run: ComparedRun) -> float | None:
    """Seconds from the start of a run to its first step; the evaluation before that step is not counted."""
    measured = run.measured
    if measured.start_s is None:
        return None
    return measured.start_s - (measured.evaluation_before_s or 0)


def _spread(run: ComparedRun) -> str:
    """The cell `slowest-fastest` of the repeats, in tokens/s."""
    if run.summary.spread is None:
        return UNKNOWN
    slowest, fastest = run.summary.spread
    return f"{_rate(slowest)}-{_rate(fastest)}"


def _part_column(part: str) -> MeasureColumn:
    return part, lambda run: _milliseconds(run.summary.parts_s.get(part))


MAIN_COLUMNS: tuple[MeasureColumn, ...] = (
    ("steps", lambda run: str(run.measured.steps)),
    ("loss", lambda run: _number(run.measured.loss, ".4f")),
    (LOSS_DIFFERENCE, _loss_difference),
    ("tokens/s", lambda run: _rate(run.measured.tokens_per_s)),
    # A model that learns labels has no supervised tokens: its rate of 0 is no measurement.
    ("supervised/s", lambda run: _rate(run.measured.supervised_tokens_per_s or None)),
    (MFU, lambda run: _number(run.measured.mfu, ".1%")),
    ("GiB", lambda run: _number(run.measured.memory_gib, ".3g")),
)
COST_COLUMNS: tuple[MeasureColumn, ...] = (
    ("repeats", _spread),
    ("planned", lambda run: _number(run.measured.planned_gib, ".3g")),
    ("start s", lambda run: _number(_start_seconds(run), ".1f")),
    ("save s", lambda run: _number(run.measured.checkpoint_s, ".2f")),
    ("GiB saved", lambda run: _number(run.measured.checkpoint_gib, ".3g")),
    ("$/M", lambda run: _number(run.summary.dollars_per_million, ".3g")),
)
STEP_PART_COLUMNS: tuple[MeasureColumn, ...] = (
    ("whole", lambda run: _milliseconds(run.measured.step_s)),
    *map(_part_column, (*repeats.STEP_PARTS, "rest")),
)
EXCHANGE_COLUMNS: tuple[MeasureColumn, ...] = (
    ("GiB a step", lambda run: _number(run.measured.exchanged_gib, ".3g")),
    ("planned", lambda run: _number(run.measured.planned_exchanged_gib, ".3g")),
    ("exposed ms", lambda run: _milliseconds(run.measured.exposed_s)),
)


def tables(comparison: Comparison) -> list[tuple[str, list[MeasureColumn]]]:
    """(title, columns) of each table of the comparison, for text, Markdown and HTML alike; the first table has no title.

    A column is a heading and a function that gives a run's cell. The first table has no MFU if no run has one, or if the runs
    measured it against different peaks. Of the others,
    columns that are unknown for every run are left out, and so are tables without a column.
    """
    begun = comparison.begun_runs
    details: list[tuple[str, tuple[MeasureColumn, ...]]] = [("what it took", COST_COLUMNS)]
    if any(run.summary.parts_s for run in begun):
        details.append(("a step in ms", STEP_PART_COLUMNS))
    if any(run.measured.exchanged_gib for run in begun):
        details.append(("exchanged", EXCHANGE_COLUMNS))

    main_columns = list(MAIN_COLUMNS)
    if len(comparison.runs) == 1:  # there is no other run that its loss could differ from
        main_columns = [(heading, cell_of) for heading, cell_of in MAIN_COLUMNS if heading != LOSS_DIFFERENCE]
    has_no_mfu = all(run.measured.mfu is None for run in begun)  # on CPUs, as a rule
    if begun and (has_no_mfu or not comparison.has_comparable_mfu):
        main_columns = [(heading, cell_of) for heading, cell_of in main_columns if heading != MFU]
    titled_columns = [("", main_columns)]
    for title, columns in details:
        known_columns = [column for column in columns if _is_known(column, begun)]
        if known_columns:
            titled_columns.append((title, known_columns))
    return titled_columns


def _is_known(column: MeasureColumn, runs: list[ComparedRun]) -> bool:
    """Whether any run has a number in the column."""
    _, cell_of = column
    return any(cell_of(run) != UNKNOWN for run in runs)


def as_text(comparison: Comparison) -> str:
    """The comparison as text for a terminal: the tables, then the sections below them."""
    lines: list[str] = []
    for title, measures in tables(comparison):
        columns = [Column(f"{title}:" if title else "")]
        columns += [Column(heading, is_number=True) for heading, _ in measures]
        rows = []
        for run in comparison.runs:
            is_main_table = not title
            if not is_main_table and not run.measured.steps:
                continue  # only the first table has runs that never began
            notes: list[str] = []
            if is_main_table and run.repeated.reason:
                notes = fold_all([run.repeated.reason])
            rows.append(TableRow(_row(run, measures), notes))
        if lines:
            lines.append("")
        lines += table(columns, rows)
    for title, sentences in sections(comparison):
        if sentences:
            lines += ["", f"{title}:", *fold_all(sentences)]
    return "\n".join(lines)


def _row(run: ComparedRun, columns: Sequence[MeasureColumn]) -> list[str]:
    """A run's row of a table: its name, then its cell in each column."""
    return [run.name, *(cell_of(run) for _, cell_of in columns)]


def sections(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """(title, lines) of each section below the tables; a section without lines is shown nowhere."""
    differences = []
    for difference in comparison.differences:
        differences.append(f"{difference.key}: {_listed_values(difference.values)}")
    return [
        (ANSWER, comparison.conclusion.lines),
        ("verdict", [run.verdict for run in comparison.runs]),
        ("loss curves", _curve_lines(comparison)),
        ("held-out metrics, before and after", _evaluation_lines(comparison)),
        ("steps that stood out", notable_step_lines(comparison)),
        ("what differs", differences),
        ("resolved", resolved_settings(comparison)),
        ("to know", list(comparison.notes)),
        (TEST_DOCUMENTS, _test_lines(comparison)),
    ]


def _listed_values(values: Sequence[Any]) -> str:
    """The values of a setting in the order of the runs, or of many runs each value once with the number of its runs."""
    if len(values) <= MAX_LISTED_VALUES:
        return ", ".join(short(value) for value in values)
    counts = Counter(short(value) for value in values)
    return ", ".join(f"{value} ({count} runs)" for value, count in counts.items())


def _curve_lines(comparison: Comparison) -> list[str]:
    """A line for each run with a baseline: how far its loss curve is from the baseline's, or why they cannot be compared."""
    lines = []
    for run in comparison.runs:
        difference = run.loss_difference
        if run.against is None:
            continue
        if run.not_comparable:
            lines.append(f"{run.name}: not comparable with {run.against}: {'; '.join(run.not_comparable)}")
        elif difference is None:
            lines.append(f"{run.name}: no step with a loss that {run.against} has too")
        else:
            lines.append(
                f"{run.name} against {run.against}: largest relative difference {rounded(difference.early)} over the first "
                f"five steps (step {difference.early_step}), {rounded(difference.drift)} over all {difference.steps} common "
                f"ones (step {difference.drift_step})"
            )
    return lines


def _metric_names(comparison: Comparison) -> list[str]:
    """Names of the held-out metrics that any run has, each once, in the order of the runs."""
    names: dict[str, None] = {}
    for run in comparison.runs:
        names |= dict.fromkeys(run.measured.before) | dict.fromkeys(run.measured.after)
    return list(names)


def _evaluation_lines(comparison: Comparison) -> list[str]:
    """A line `metric  run: before -> after` for each held-out metric and each run that has it."""
    lines = []
    for metric in _metric_names(comparison):
        for run in comparison.runs:
            before = run.measured.before.get(metric)
            after = run.measured.after.get(metric)
            if before is not None or after is not None:
                lines.append(f"{metric}  {run.name}: {_number(before, '.4f')} -> {_number(after, '.4f')}")
    return lines


def _test_lines(comparison: Comparison) -> list[str]:
    """A line for each metric of the test documents and each run that has it, with how often they were looked at."""
    lines = []
    for run in comparison.runs:
        measured = run.first_repeat.record.test or {}
        about = f"{measured.get('documents')} documents, looked at {times(measured.get('looks') or 0)}"
        for name, value in (measured.get("metrics") or {}).items():
            lines.append(f"{name}  {run.name}: {_number(value, '.4f')} ({about})")
    return sorted(lines)


def cell_tables(comparison: Comparison) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, headings, cells of each row) of each table, for Markdown and HTML; the first one ends with each run's state."""
    tables_of_cells = []
    for title, columns in tables(comparison):
        headings = ["run", *(heading for heading, _ in columns)]
        rows = []
        if title:
            rows = [_row(run, columns) for run in comparison.begun_runs]
        else:
            headings.append("state")
            for run in comparison.runs:
                state = run.repeated.reason or run.repeated.state
                rows.append([*_row(run, columns), state])
        tables_of_cells.append((title, headings, rows))
    return tables_of_cells


def as_markdown(comparison: Comparison, pictures: Sequence[tuple[str, str]] = ()) -> str:
    """The comparison as a Markdown page; `pictures` are (title, path relative to the page) of plots."""
    is_single_run = len(comparison.runs) == 1
    lines = [f"# Run {comparison.first}" if is_single_run else "# Comparison"]
    if comparison.conclusion.sentences:
        lines += ["", " ".join(comparison.conclusion.sentences)]
        lines += _take_when_lines(comparison.conclusion)
    for title, headings, rows in cell_tables(comparison):
        lines.append("")
        if title:
            lines += [f"## {_capitalised(title)}", ""]
        lines += [_markdown_row(headings), _markdown_row(["---"] * len(headings))]
        lines += [_markdown_row([f"`{name}`", *cells]) for name, *cells in rows]
    for title, sentences in sections(comparison):
        if sentences and title != ANSWER:
            lines += ["", f"## {_capitalised(title)}", "", *(f"- {sentence}" for sentence in sentences)]
    for title, path in pictures:
        lines += ["", f"## {title}", "", f"![{title}]({path})"]
    lines += ["", "## Runs", ""]
    for run in comparison.runs:
        run_dirs = [f"`{run_dir}`" for run_dir in _run_directories(run)]
        if run_dirs:
            lines.append(f"- {run.name}: {', '.join(run_dirs)}")
    return "\n".join(lines) + "\n"


def _take_when_lines(conclusion: Conclusion) -> list[str]:
    """A Markdown table of which point (combination of settings) to take for which goal, and what to run to learn more."""
    lines = []
    if conclusion.take:
        lines += ["", _markdown_row(["for", "take", "why", "words"]), _markdown_row(["---"] * 4)]
        for choice in conclusion.take:
            words = f"`{choice.words}`" if choice.words else "-"
            lines.append(_markdown_row([choice.goal, f"`{choice.point.name}`", choice.why, words]))
    if conclusion.to_learn_more:
        lines += ["", conclusion.to_learn_more]
    return lines


def _capitalised(title: str) -> str:
    return title[0].upper() + title[1:]


def _run_directories(run: ComparedRun) -> list[str]:
    """The run directory of each repeat; empty for a point that was refused, because nothing was ever written for it."""
    if not run.repeated.row.directories:
        return []
    return [str(repeat.directory) for repeat in run.repeated.repeats]


def as_html(comparison: Comparison, *, reload_after_s: float | None = None) -> str:
    """The comparison as one HTML file, or the page of its only run. Without the extra `report` it only lacks its plots.

    `reload_after_s`: seconds after which a browser reloads it; None for a page that will not change any more.
    """
    if len(comparison.runs) == 1:
        from launch.compare.run_page.page import run_page

        return run_page(comparison, reload_after_s=reload_after_s)
    from launch.compare.comparison_page import comparison_page

    return comparison_page(comparison, sections(comparison), reload_after_s=reload_after_s)


def _markdown_row(cells: list[str]) -> str:
    escaped = [cell.replace("|", "\\|") for cell in cells]  # a bar would begin a cell
    return f"| {' | '.join(escaped)} |"


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON values, as in `compare.json`. Sizes are GiB, times seconds, speeds those of all ranks together."""
    test_documents = {run.name: run.first_repeat.record.test for run in comparison.runs}
    return {
        "first": comparison.first,
        "answer": _answer_as_dict(comparison.conclusion),
        "runs": [_run_as_dict(comparison, run_index) for run_index in range(len(comparison.runs))],
        "notes": list(comparison.notes),
        "test_documents": test_documents,
    }


def _answer_as_dict(conclusion: Conclusion) -> dict[str, Any]:
    """The answer as JSON values: its sentences, which point to take for which goal, and the jobs by quality, the best first.

    A job is all points that train alike but for seed and strategy; a point is one row of the comparison. `shown_worse` says
    whether a job is worse than the best one beyond chance, `interval` over which range the relative difference lies.
    """
    take = []
    for choice in conclusion.take:
        take.append({"for": choice.goal, "run": choice.point.name, "why": choice.why, "words": choice.words})
    ranked = conclusion.ranked
    quality = None
    if ranked is not None:
        jobs = []
        for job, difference in zip(ranked.jobs, ranked.differences, strict=True):
            jobs.append(
                {
                    "runs": [point.name for point in job.points],
                    "value": ranked.value(job),
                    "shown_worse": difference is not None and difference.is_shown,
                    "interval": None if difference is None else difference.interval,
                    "seed_interval": None if difference is None else difference.seed_interval,
                    "seeds": job.seeds,
                }
            )
        quality = {
            "metric": ranked.metric.name,
            "greater_is_better": ranked.metric.greater_is_better,
            "jobs": jobs,
        }
    return {"sentences": list(conclusion.sentences), "take": take, "quality": quality}


def _run_as_dict(comparison: Comparison, run_index: int) -> dict[str, Any]:
    """Run `run_index` as JSON values; `differing` holds the settings in which the runs differ, with this run's values."""
    run = comparison.runs[run_index]
    run_dirs = _run_directories(run)
    loss_difference = None
    if run.loss_difference is not None:
        loss_difference = {**asdict(run.loss_difference), "same": run.loss_difference.same}
    return {
        "name": run.name,
        "directory": run_dirs[0] if run_dirs else None,
        "repeats": run_dirs,
        "state": run.repeated.state,
        "reason": run.repeated.reason,
        "measured": asdict(run.measured) | asdict(run.summary),
        "against": run.against,
        "same_job": run.is_same_job,
        "loss_difference": loss_difference,
        "not_comparable": list(run.not_comparable),
        "verdict": run.verdict,
        "differing": {setting.key: setting.values[run_index] for setting in comparison.differences},
    }


def as_csv(comparison: Comparison) -> str:
    """The comparison as CSV: a row for each run, with its measurements, then the settings in which the runs differ."""
    metrics = _metric_names(comparison)
    collectives: dict[str, None] = {}
    for run in comparison.runs:
        collectives |= dict.fromkeys(run.measured.exchanged_bytes)
    rows = []
    for run_index in range(len(comparison.runs)):
        rows.append(_csv_row(comparison, run_index, metrics, list(collectives)))
    csv_file = io.StringIO()
    writer = csv.DictWriter(csv_file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return csv_file.getvalue()


def _csv_row(comparison: Comparison, run_index: int, metrics: list[str], collectives: list[str]) -> dict[str, Any]:
    """The cells of run `run_index` by column of the CSV.

    Every run has the same columns in the same order, because the first row makes the header: `metrics` and `collectives`
    are those of any run, and a run without one has an empty cell.
    """
    run = comparison.runs[run_index]
    run_dirs = _run_directories(run)
    slowest, fastest = run.summary.spread or (None, None)
    difference = asdict(run.loss_difference) if run.loss_difference is not None else {}
    row = {
        "name": run.name,
        "directory": run_dirs[0] if run_dirs else None,
        "state": run.repeated.state,
        "reason": run.repeated.reason,
        "verdict": run.verdict,
        **_measured_cells(run, collectives),
        **_summary_cells(run),
        "tokens_per_s_slowest": slowest,
        "tokens_per_s_fastest": fastest,
        "against": run.against,
        "loss_difference_early": difference.get("early"),
        "loss_difference_early_step": difference.get("early_step"),
        "loss_difference_drift": difference.get("drift"),
        "loss_difference_drift_step": difference.get("drift_step"),
        "not_comparable": "; ".join(run.not_comparable),
    }
    for metric in metrics:
        row[f"before/{metric}"] = run.measured.before.get(metric)
    for metric in metrics:
        row[f"after/{metric}"] = run.measured.after.get(metric)
    for setting in comparison.differences:
        row[setting.key] = setting.values[run_index]
    return row


def _measured_cells(run: ComparedRun, collectives: list[str]) -> dict[str, Any]:
    """A run's measurements by column of the CSV; `collectives` are those that any run used, a column each."""
    cells = asdict(run.measured)
    # A cell of CSV holds one number: these get columns of their own below, or stand in `before/` and `after/`.
    for field_of_several in ("before", "after", "tokens_per_s_quartiles", "exchanged_bytes"):
        del cells[field_of_several]
    for collective in collectives:
        cells[f"exchanged_{collective}_gib"] = run.measured.exchanged_bytes.get(collective, 0) / 2**30
    low, high = run.measured.tokens_per_s_quartiles or (None, None)
    return {**cells, "tokens_per_s_low": low, "tokens_per_s_high": high}


def _summary_cells(run: ComparedRun) -> dict[str, Any]:
    """The figures of a run's repeats by column of the CSV; the parts of a step have a column each."""
    cells = asdict(run.summary)
    # Its slowest and fastest repeat, and `<part>_s`, have columns of one number each.
    for field_of_several in ("tokens_per_s_repeats", "memory_gib_repeats", "parts_s"):
        del cells[field_of_several]
    for part in (*repeats.STEP_PARTS, "rest"):
        cells[f"{part}_s"] = run.summary.parts_s.get(part)
    return cells
