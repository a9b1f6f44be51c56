"""Prints a comparison as tables, and as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from launch.compare import repeats
from launch.compare.comparison import TEST_DOCUMENTS, ComparedPoint, Comparison
from launch.compare.conclusion import Conclusion
from launch.compare.curves import rounded
from launch.compare.events import notable_step_lines, resolved_settings
from launch.output import Column, TableRow, fold_all, table
from trainer.reporting.numbers import short, times

MeasureColumn = tuple[str, Callable[[ComparedPoint], str]]
"""(heading of a column, function that returns the cell of a point in it)."""
UNKNOWN = "-"
"""The cell of a number that is not known."""
LOSS_DIFFERENCE = "loss diff"
MFU = "MFU"
ANSWER = "answer"
"""Title of the section that Markdown and HTML show first."""
MAX_LISTED_VALUES = 8
"""Up to this many points, the value of a setting is listed for each; beyond, each value stands once, with its count."""


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


def _loss_difference(point: ComparedPoint) -> str:
    return UNKNOWN if point.loss_difference is None else rounded(point.loss_difference.early)


def _start_seconds(point: ComparedPoint) -> float | None:
    """Seconds from the start of a run to its first step, without the evaluation before that step; None if not known."""
    measured = point.measured
    if measured.start_s is None:
        return None
    return measured.start_s - (measured.evaluation_before_s or 0)


def _spread(point: ComparedPoint) -> str:
    """The cell `slowest-fastest` of a point's repeats, in tokens/s."""
    if point.summary.spread is None:
        return UNKNOWN
    slowest, fastest = point.summary.spread
    return f"{_rate(slowest)}-{_rate(fastest)}"


def _part_column(part: str) -> MeasureColumn:
    return part, lambda point: _milliseconds(point.summary.parts_s.get(part))


MAIN_COLUMNS: tuple[MeasureColumn, ...] = (
    ("steps", lambda point: str(point.measured.steps)),
    ("loss", lambda point: _number(point.measured.loss, ".4f")),
    (LOSS_DIFFERENCE, _loss_difference),
    ("tokens/s", lambda point: _rate(point.measured.tokens_per_s)),
    # A model that learns labels has no supervised tokens: its rate of 0 is no measurement.
    ("supervised/s", lambda point: _rate(point.measured.supervised_tokens_per_s or None)),
    (MFU, lambda point: _number(point.measured.mfu, ".1%")),
    ("GiB", lambda point: _number(point.measured.memory_gib, ".3g")),
)
COST_COLUMNS: tuple[MeasureColumn, ...] = (
    ("repeats", _spread),
    ("planned", lambda point: _number(point.measured.planned_gib, ".3g")),
    ("start s", lambda point: _number(_start_seconds(point), ".1f")),
    ("save s", lambda point: _number(point.measured.checkpoint_s, ".2f")),
    ("GiB saved", lambda point: _number(point.measured.checkpoint_gib, ".3g")),
    ("$/M", lambda point: _number(point.summary.dollars_per_million, ".3g")),
)
STEP_PART_COLUMNS: tuple[MeasureColumn, ...] = (
    ("whole", lambda point: _milliseconds(point.measured.step_s)),
    *map(_part_column, (*repeats.STEP_PARTS, "rest")),
)
EXCHANGE_COLUMNS: tuple[MeasureColumn, ...] = (
    ("GiB a step", lambda point: _number(point.measured.exchanged_gib, ".3g")),
    ("planned", lambda point: _number(point.measured.planned_exchanged_gib, ".3g")),
    ("exposed ms", lambda point: _milliseconds(point.measured.exposed_s)),
)


def tables(comparison: Comparison) -> list[tuple[str, list[MeasureColumn]]]:
    """(title, columns) of each table of the comparison, for text, Markdown and HTML alike; the first table has no title.

    The first table has no MFU if no point has one, or if the points have different peaks. Of the others, columns that are unknown
    for every point are left out, and so are tables without a column.
    """
    begun_points = comparison.begun_points
    left_out_headings = set()
    if len(comparison.points) == 1:  # there is no other point that its loss could differ from
        left_out_headings.add(LOSS_DIFFERENCE)
    has_no_mfu = all(point.measured.mfu is None for point in begun_points)  # on CPUs, as a rule
    if begun_points and (has_no_mfu or not comparison.has_comparable_mfu):
        left_out_headings.add(MFU)
    main_columns = [(heading, cell_of) for heading, cell_of in MAIN_COLUMNS if heading not in left_out_headings]

    details: list[tuple[str, tuple[MeasureColumn, ...]]] = [("what it took", COST_COLUMNS)]
    if any(point.summary.parts_s for point in begun_points):
        details.append(("a step in ms", STEP_PART_COLUMNS))
    if any(point.measured.exchanged_gib for point in begun_points):
        details.append(("exchanged", EXCHANGE_COLUMNS))
    titled_columns = [("", main_columns)]
    for title, columns in details:
        known_columns = [column for column in columns if _is_known(column, begun_points)]
        if known_columns:
            titled_columns.append((title, known_columns))
    return titled_columns


def _is_known(column: MeasureColumn, points: list[ComparedPoint]) -> bool:
    """Whether any of the points has a number in the column."""
    _, cell_of = column
    return any(cell_of(point) != UNKNOWN for point in points)


def as_text(comparison: Comparison) -> str:
    """The comparison as text for a terminal: the tables, then the sections below them."""
    lines: list[str] = []
    for title, measure_columns in tables(comparison):
        is_main_table = not title
        columns = [Column("" if is_main_table else f"{title}:")]
        columns += [Column(heading, is_number=True) for heading, _ in measure_columns]
        rows = []
        # Only the main table has points that never began, and says why a point is not done.
        for point in comparison.points if is_main_table else comparison.begun_points:
            notes = fold_all([point.reason]) if is_main_table and point.reason else []
            rows.append(TableRow(_row(point, measure_columns), notes))
        if lines:
            lines.append("")
        lines += table(columns, rows)
    for title, sentences in sections(comparison):
        if sentences:
            lines += ["", f"{title}:", *fold_all(sentences)]
    return "\n".join(lines)


def _row(point: ComparedPoint, columns: Sequence[MeasureColumn]) -> list[str]:
    """The row of a point in a table: its name, then its cell in each column."""
    return [point.name, *(cell_of(point) for _, cell_of in columns)]


def sections(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """(title, lines) of each section below the tables, in order. Callers leave out sections without lines."""
    differences = []
    for difference in comparison.differences:
        differences.append(f"{difference.key}: {_listed_values(difference.values)}")
    return [
        (ANSWER, comparison.conclusion.lines),
        ("verdict", [point.verdict for point in comparison.points]),
        ("loss curves", _curve_lines(comparison)),
        ("held-out metrics, before and after", _evaluation_lines(comparison)),
        ("steps that stood out", notable_step_lines(comparison)),
        ("what differs", differences),
        ("resolved", resolved_settings(comparison)),
        ("to know", list(comparison.notes)),
        (TEST_DOCUMENTS, _test_lines(comparison)),
    ]


def _listed_values(values: Sequence[Any]) -> str:
    """The values of a setting in the order of the points; of many points each value once, with how many have it."""
    if len(values) <= MAX_LISTED_VALUES:
        return ", ".join(short(value) for value in values)
    counts = Counter(short(value) for value in values)
    return ", ".join(f"{value} ({count} runs)" for value, count in counts.items())


def _curve_lines(comparison: Comparison) -> list[str]:
    """A line for each point with a baseline: how far its loss curve is from the baseline's, or why they are not comparable."""
    lines = []
    for point in comparison.points:
        difference = point.loss_difference
        if point.baseline_name is None:
            continue
        if point.not_comparable:
            lines.append(f"{point.name}: not comparable with {point.baseline_name}: {'; '.join(point.not_comparable)}")
        elif difference is None:
            lines.append(f"{point.name}: no step with a loss that {point.baseline_name} has too")
        else:
            lines.append(
                f"{point.name} against {point.baseline_name}: largest relative difference "
                f"{rounded(difference.early)} over the first five steps (step {difference.early_step}), "
                f"{rounded(difference.drift)} over all {difference.steps} common ones (step {difference.drift_step})"
            )
    return lines


def _metric_names(comparison: Comparison) -> list[str]:
    """Names of the held-out metrics that any point has, each once, in the order of the points."""
    names: dict[str, None] = {}
    for point in comparison.points:
        names |= dict.fromkeys(point.measured.before) | dict.fromkeys(point.measured.after)
    return list(names)


def _evaluation_lines(comparison: Comparison) -> list[str]:
    """A line `metric  point: before -> after` for each held-out metric and each point that has it."""
    lines = []
    for metric in _metric_names(comparison):
        for point in comparison.points:
            before = point.measured.before.get(metric)
            after = point.measured.after.get(metric)
            if before is not None or after is not None:
                lines.append(f"{metric}  {point.name}: {_number(before, '.4f')} -> {_number(after, '.4f')}")
    return lines


def _test_lines(comparison: Comparison) -> list[str]:
    """A line for each metric of the test documents and each point that has it, such as `test/loss  ddp: 2.3100 (...)`."""
    lines = []
    for point in comparison.points:
        measured = point.first_repeat.record.test or {}
        about = f"{measured.get('documents')} documents, looked at {times(measured.get('looks') or 0)}"
        for name, value in (measured.get("metrics") or {}).items():
            lines.append(f"{name}  {point.name}: {_number(value, '.4f')} ({about})")
    return sorted(lines)


def cell_tables(comparison: Comparison) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, headings, rows of cells) of each table, for Markdown.

    The first table has no title, and ends with the state of each point; it alone has points that never began.
    """
    tables_of_cells = []
    for title, columns in tables(comparison):
        headings = ["run", *(heading for heading, _ in columns)]
        is_main_table = not title
        if not is_main_table:
            rows = [_row(point, columns) for point in comparison.begun_points]
        else:
            headings.append("state")
            rows = []
            for point in comparison.points:
                state = point.reason or point.state
                rows.append([*_row(point, columns), state])
        tables_of_cells.append((title, headings, rows))
    return tables_of_cells


def as_markdown(comparison: Comparison, pictures: Sequence[tuple[str, str]] = ()) -> str:
    """The comparison as a Markdown page; `pictures` are (title, path relative to the page) of plots."""
    is_single_run = len(comparison.points) == 1
    lines = [f"# Run {comparison.default_baseline}" if is_single_run else "# Comparison"]
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
    for point in comparison.points:
        run_dirs = [f"`{run_dir}`" for run_dir in _run_directories(point)]
        if run_dirs:
            lines.append(f"- {point.name}: {', '.join(run_dirs)}")
    return "\n".join(lines) + "\n"


def _take_when_lines(conclusion: Conclusion) -> list[str]:
    """Lines of Markdown: a table of which point to take for which goal, then what to run to learn more."""
    lines = []
    if conclusion.recommendations:
        lines += ["", _markdown_row(["for", "take", "why", "words"]), _markdown_row(["---"] * 4)]
        for choice in conclusion.recommendations:
            arguments = f"`{choice.arguments}`" if choice.arguments else "-"
            lines.append(_markdown_row([choice.goal, f"`{choice.point.name}`", choice.why, arguments]))
    if conclusion.to_learn_more:
        lines += ["", conclusion.to_learn_more]
    return lines


def _capitalised(title: str) -> str:
    return title[0].upper() + title[1:]


def _run_directories(point: ComparedPoint) -> list[str]:
    """The run directory of each repeat of a point; empty for a refused point, for which nothing was ever written."""
    if not point.row.directories:
        return []
    return [str(repeat.directory) for repeat in point.repeats]


def as_html(comparison: Comparison, *, reload_after_s: float | None = None) -> str:
    """The comparison as one HTML file; of a single point it is the page of its run.

    `reload_after_s`: seconds after which a browser reloads the page; None for a page that will not change any more. Without the
    packages of the extra `report` the page has no plots.
    """
    if len(comparison.points) == 1:
        from launch.compare.run_page.page import run_page

        return run_page(comparison, reload_after_s=reload_after_s)
    from launch.compare.comparison_page import comparison_page

    return comparison_page(comparison, sections(comparison), reload_after_s=reload_after_s)


def _markdown_row(cells: list[str]) -> str:
    escaped = [cell.replace("|", "\\|") for cell in cells]  # a bar would begin a cell
    return f"| {' | '.join(escaped)} |"


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON values, as in `compare.json`. Sizes are GiB, times seconds, speeds those of all ranks together."""
    test_documents = {point.name: point.first_repeat.record.test for point in comparison.points}
    return {
        "first": comparison.default_baseline,
        "answer": _answer_as_dict(comparison.conclusion),
        "runs": [_run_as_dict(comparison, point_index) for point_index in range(len(comparison.points))],
        "notes": list(comparison.notes),
        "test_documents": test_documents,
    }


def _answer_as_dict(conclusion: Conclusion) -> dict[str, Any]:
    """The answer as JSON values: its sentences, which point to take for which goal, and the jobs by quality, the best first.

    A point is one row of the comparison. A job is all points that train the same apart from seed and strategy. Of each job,
    `shown_worse` says whether it is worse than the best one beyond chance, and `interval` and `seed_interval` where the relative
    difference lies, by held-out documents and by seeds.
    """
    take = []
    for choice in conclusion.recommendations:
        take.append({"for": choice.goal, "run": choice.point.name, "why": choice.why, "words": choice.arguments})
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
                    "interval": None if difference is None else difference.document_interval,
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


def _run_as_dict(comparison: Comparison, point_index: int) -> dict[str, Any]:
    """A point as JSON values; `differing` holds its values of the settings in which the points differ."""
    point = comparison.points[point_index]
    run_dirs = _run_directories(point)
    loss_difference = None
    if point.loss_difference is not None:
        loss_difference = {**asdict(point.loss_difference), "same": point.loss_difference.same}
    return {
        "name": point.name,
        "directory": run_dirs[0] if run_dirs else None,
        "repeats": run_dirs,
        "state": point.state,
        "reason": point.reason,
        "measured": asdict(point.measured) | asdict(point.summary),
        "against": point.baseline_name,
        "same_job": point.is_same_job,
        "loss_difference": loss_difference,
        "not_comparable": list(point.not_comparable),
        "verdict": point.verdict,
        "differing": {setting.key: setting.values[point_index] for setting in comparison.differences},
    }


def as_csv(comparison: Comparison) -> str:
    """The comparison as CSV: a row for each point, with its measurements, then the settings in which the points differ."""
    metrics = _metric_names(comparison)
    collectives: dict[str, None] = {}
    for point in comparison.points:
        collectives |= dict.fromkeys(point.measured.exchanged_bytes)
    rows = []
    for point_index in range(len(comparison.points)):
        rows.append(_csv_row(comparison, point_index, metrics, list(collectives)))
    csv_file = io.StringIO()
    writer = csv.DictWriter(csv_file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return csv_file.getvalue()


def _csv_row(comparison: Comparison, point_index: int, metrics: list[str], collectives: list[str]) -> dict[str, Any]:
    """The cells of a point by column of the CSV.

    Every point has the same columns in the same order, because the first row makes the header. So `metrics` and `collectives`
    are those that any point has, and a point without one has an empty cell.
    """
    point = comparison.points[point_index]
    run_dirs = _run_directories(point)
    slowest, fastest = point.summary.spread or (None, None)
    difference = asdict(point.loss_difference) if point.loss_difference is not None else {}
    row = {
        "name": point.name,
        "directory": run_dirs[0] if run_dirs else None,
        "state": point.state,
        "reason": point.reason,
        "verdict": point.verdict,
        **_measured_cells(point, collectives),
        **_summary_cells(point),
        "tokens_per_s_slowest": slowest,
        "tokens_per_s_fastest": fastest,
        "against": point.baseline_name,
        "loss_difference_early": difference.get("early"),
        "loss_difference_early_step": difference.get("early_step"),
        "loss_difference_drift": difference.get("drift"),
        "loss_difference_drift_step": difference.get("drift_step"),
        "not_comparable": "; ".join(point.not_comparable),
    }
    for metric in metrics:
        row[f"before/{metric}"] = point.measured.before.get(metric)
    for metric in metrics:
        row[f"after/{metric}"] = point.measured.after.get(metric)
    for setting in comparison.differences:
        row[setting.key] = setting.values[point_index]
    return row


def _measured_cells(point: ComparedPoint, collectives: list[str]) -> dict[str, Any]:
    """The measurements of a point by column of the CSV; each of the `collectives` has a column of its own."""
    cells = asdict(point.measured)
    # A cell of CSV holds one number. Of these, two get columns below, and two stand in the columns `before/` and `after/`.
    for field_of_several in ("before", "after", "tokens_per_s_quartiles", "exchanged_bytes"):
        del cells[field_of_several]
    for collective in collectives:
        cells[f"exchanged_{collective}_gib"] = point.measured.exchanged_bytes.get(collective, 0) / 2**30
    low, high = point.measured.tokens_per_s_quartiles or (None, None)
    return {**cells, "tokens_per_s_low": low, "tokens_per_s_high": high}


def _summary_cells(point: ComparedPoint) -> dict[str, Any]:
    """The figures over a point's repeats by column of the CSV; each part of a step has a column of its own."""
    cells = asdict(point.summary)
    # A cell of CSV holds one number: the parts get columns below, the slowest and fastest repeat have some already.
    for field_of_several in ("tokens_per_s_repeats", "memory_gib_repeats", "parts_s"):
        del cells[field_of_several]
    for part in (*repeats.STEP_PARTS, "rest"):
        cells[f"{part}_s"] = point.summary.parts_s.get(part)
    return cells
