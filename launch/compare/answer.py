"""Prints a comparison as tables, and as Markdown and HTML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from launch.compare import repeats
from launch.compare.comparison import TEST_DOCUMENTS_TITLE, ComparedPoint, Comparison
from launch.compare.conclusion import Conclusion
from launch.compare.curves import format_difference
from launch.compare.events import notable_step_lines, resolved_setting_lines
from launch.output import (
    TableColumn,
    TableRow,
    break_word,
    displayable,
    format_table,
    terminal_width,
    wrap_sentences,
)
from trainer.reporting.numbers import format_setting, format_times

if TYPE_CHECKING:
    from launch.compare.page import PlotImage

UNKNOWN_CELL = "-"
"""The cell of a number that is not known."""
LOSS_DIFFERENCE_HEADING = "loss diff"
MFU_HEADING = "MFU"
ANSWER_TITLE = "answer"
"""Title of the section that Markdown and HTML show first."""
MAX_LISTED_VALUES = 8
"""Up to this many points, the value of a setting is listed for each; beyond, each value stands once, with its count."""


def _number_cell(value: float | None, number_format: str) -> str:
    return UNKNOWN_CELL if value is None else format(value, number_format)


def _rate_cell(tokens_per_s: float | None) -> str:
    """A speed in tokens/s for a table: `12,345`, or `98.7` for a slow one."""
    if tokens_per_s is None:
        return UNKNOWN_CELL
    return format(tokens_per_s, ",.0f" if tokens_per_s >= 100 else ".1f")


def _milliseconds_cell(seconds: float | None) -> str:
    """A time for a table, in ms: three digits below a second, whole milliseconds above."""
    if seconds is None:
        return UNKNOWN_CELL
    if seconds < 1:
        return f"{seconds * 1000:.3g}"
    return f"{seconds * 1000:,.0f}"


def _loss_difference_cell(point: ComparedPoint) -> str:
    """How far a point's losses are from its baseline's over the first steps, for a table: `3e-7`."""
    difference = point.loss_difference
    return UNKNOWN_CELL if difference is None else format_difference(difference.first_steps_difference)


def _repeats_cell(point: ComparedPoint) -> str:
    """The range of a point's repeats for a table, slowest to fastest in tokens/s: `11,800-12,345`; `-` for a single repeat."""
    if point.summary.spread is None:
        return UNKNOWN_CELL
    return f"{_rate_cell(point.summary.spread.low)}-{_rate_cell(point.summary.spread.high)}"


class TextColumn(NamedTuple):
    """A column of a table of points whose cells are text."""

    heading: str
    cell_of: Callable[[ComparedPoint], str]
    """The cell of a point; `UNKNOWN_CELL` if the point has no such number."""


class TextTable(NamedTuple):
    """A table with a row for each of some points."""

    title: str
    """Empty for the main table, which alone has points that never began."""
    columns: list[TextColumn]
    """The columns behind the name of the point."""
    points: list[ComparedPoint]

    @property
    def is_main_table(self) -> bool:
        """Whether it is the table of all points, with steps, losses and speeds; the others are about costs."""
        return not self.title

    def row(self, point: ComparedPoint) -> list[str]:
        """The row of a point: its name, then its cell in each column."""
        return [point.name, *(column.cell_of(point) for column in self.columns)]


def _step_part_column(part: str) -> TextColumn:
    """The column of a part of a step, such as `forward`, in milliseconds."""
    return TextColumn(part, lambda point: _milliseconds_cell(point.summary.parts_s.get(part)))


MAIN_COLUMNS = (
    TextColumn("steps", lambda point: str(point.measured.steps)),
    TextColumn("loss", lambda point: _number_cell(point.measured.loss, ".4f")),
    TextColumn(LOSS_DIFFERENCE_HEADING, _loss_difference_cell),
    TextColumn("tokens/s", lambda point: _rate_cell(point.measured.tokens_per_s)),
    # A model that learns labels has no supervised tokens: its rate of 0 is no measurement.
    TextColumn("supervised/s", lambda point: _rate_cell(point.measured.supervised_tokens_per_s or None)),
    TextColumn(MFU_HEADING, lambda point: _number_cell(point.measured.mfu, ".1%")),
    TextColumn("GiB", lambda point: _number_cell(point.measured.memory_gib, ".3g")),
)
COST_COLUMNS = (
    TextColumn("repeats", _repeats_cell),
    TextColumn("planned", lambda point: _number_cell(point.measured.planned_gib, ".3g")),
    TextColumn("start s", lambda point: _number_cell(point.measured.start_without_evaluation_s, ".1f")),
    TextColumn("save s", lambda point: _number_cell(point.measured.checkpoint_s, ".2f")),
    TextColumn("GiB saved", lambda point: _number_cell(point.measured.checkpoint_gib, ".3g")),
    TextColumn("$/M", lambda point: _number_cell(point.summary.dollars_per_million, ".3g")),
)
STEP_PART_COLUMNS = (
    TextColumn("whole", lambda point: _milliseconds_cell(point.measured.step_s)),
    *map(_step_part_column, (*repeats.STEP_PARTS, "rest")),
)
COMMUNICATION_COLUMNS = (
    TextColumn("GiB a step", lambda point: _number_cell(point.measured.exchanged_gib, ".3g")),
    TextColumn("planned", lambda point: _number_cell(point.measured.planned_exchanged_gib, ".3g")),
    TextColumn("exposed ms", lambda point: _milliseconds_cell(point.measured.exposed_s)),
)


def text_tables(comparison: Comparison) -> list[TextTable]:
    """Choose the tables of a comparison for the terminal and for Markdown. A point is one combination of settings.

    - The main table, without a title, with a row for every point.
    - `costs`, `a step in ms` and `exchanged`, for the points that took a step. A column that is unknown for all of these is
      left out, and so is a table without columns.
    """
    begun_points = comparison.begun_points
    left_out_headings = _left_out_headings(comparison)
    main_columns = [column for column in MAIN_COLUMNS if column.heading not in left_out_headings]
    tables = [TextTable("", main_columns, list(comparison.points))]

    columns_by_title: dict[str, tuple[TextColumn, ...]] = {"costs": COST_COLUMNS}
    if any(point.summary.parts_s for point in begun_points):
        columns_by_title["a step in ms"] = STEP_PART_COLUMNS
    if any(point.measured.exchanged_gib for point in begun_points):
        columns_by_title["exchanged"] = COMMUNICATION_COLUMNS
    for title, columns in columns_by_title.items():
        known_columns = [column for column in columns if _is_known_of_any(begun_points, column)]
        if known_columns:
            tables.append(TextTable(title, known_columns, begun_points))
    return tables


def _is_known_of_any(points: list[ComparedPoint], column: TextColumn) -> bool:
    """Whether any of the points has a number in the column."""
    return any(column.cell_of(point) != UNKNOWN_CELL for point in points)


def _left_out_headings(comparison: Comparison) -> set[str]:
    """Find the `MAIN_COLUMNS` that say nothing in this comparison, by their headings.

    - The loss difference of a single point: there is no other point that its loss could differ from.
    - The MFU, if no point has one, or if the points measured it against different peaks.
    """
    headings = set()
    if len(comparison.points) == 1:
        headings.add(LOSS_DIFFERENCE_HEADING)
    begun_points = comparison.begun_points  # those that took a step
    is_mfu_unknown = all(point.measured.mfu is None for point in begun_points)
    if begun_points and (is_mfu_unknown or not comparison.has_comparable_mfu):
        headings.add(MFU_HEADING)
    return headings


def comparison_text(comparison: Comparison) -> str:
    """Write the comparison for a terminal: the tables, then the sections below them, such as the answer and the verdicts."""
    lines: list[str] = []
    for text_table in text_tables(comparison):
        # The first column has the names of the points; above them stands the title of the table.
        columns = [TableColumn("" if text_table.is_main_table else f"{text_table.title}:")]
        columns += [TableColumn(column.heading, is_number=True) for column in text_table.columns]
        rows = []
        for point in text_table.points:
            # Where a point is, and why it is not done, stand below its row of the main table only.
            notes = []
            if text_table.is_main_table:
                notes = [*_run_directory_lines(point), *wrap_sentences([point.reason] if point.reason else [])]
            rows.append(TableRow(text_table.row(point), notes))
        if lines:
            lines.append("")
        lines += format_table(columns, rows)
    for title, sentences in titled_sections(comparison):
        if sentences:
            lines += ["", f"{title}:", *wrap_sentences(sentences)]
    return "\n".join(lines)


def _run_directory_lines(point: ComparedPoint) -> list[str]:
    """Say below a point's name in which directory its first run is: `runs/first`; no lines if the name says it.

    Runs that somebody started one by one are named by the settings in which they differ, such as `clean-lr1e-3`.
    """
    if not point.run_dirs:
        return []
    directory = Path(point.run_dirs[0])
    directory_name = directory.resolve().name
    # `train -m` calls its runs 0, 1, ...: such a number may be part of a learning rate in the name.
    is_part_of_name = f"-{directory_name}-" in f"-{point.name}-" and not directory_name.isdecimal()
    if point.name == directory_name or is_part_of_name:
        return []
    indent = "  "
    folded = break_word(displayable(str(directory)), terminal_width() - len(indent))
    return [f"{indent}{line}" for line in folded.split("\n")]


def titled_sections(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """The text of a comparison, which terminal, Markdown and page share: (title, lines) of each section, in order.

    For example ("verdict", ["fsdp2: same loss as ddp within 3e-7"]). A section may have no lines; callers do not show it
    then.
    """
    points = comparison.points
    setting_lines = []
    for setting in comparison.differences:
        setting_lines.append(f"{setting.key}: {_setting_values_text(setting.values)}")
    return [
        (ANSWER_TITLE, comparison.conclusion.lines),
        ("verdict", [point.verdict for point in points]),
        ("loss curves", _loss_curve_lines(points)),
        ("held-out metrics, before and after", _held_out_metric_lines(comparison.held_out_metrics, points)),
        ("steps that stood out", notable_step_lines(points)),
        ("what differs", setting_lines),
        ("resolved", resolved_setting_lines(points)),
        ("to know", list(comparison.notes)),
        (TEST_DOCUMENTS_TITLE, _test_metric_lines(points)),
    ]


def _setting_values_text(values: Sequence[Any]) -> str:
    """Write the value of a setting at each point: `8, 8, 16`; for many points each value once: `8 (7 runs), 16 (5 runs)`."""
    if len(values) <= MAX_LISTED_VALUES:
        return ", ".join(format_setting(value) for value in values)
    counts = Counter(format_setting(value) for value in values)
    return ", ".join(f"{value} ({count} runs)" for value, count in counts.items())


def _loss_curve_lines(points: Sequence[ComparedPoint]) -> list[str]:
    """Say for each point with a baseline how far its loss curve is from the baseline's, or why they are not comparable.

    The baseline is the point that its loss is compared with. Curves are not comparable if the data, its order or the
    objective differs: `lora: not comparable with full: data.path: a and b`.
    """
    lines = []
    for point in points:
        if point.baseline_name is None:
            continue
        difference = point.loss_difference
        if point.incomparable_settings:
            reasons = "; ".join(map(str, point.incomparable_settings))
            lines.append(f"{point.name}: not comparable with {point.baseline_name}: {reasons}")
        elif difference is None:
            lines.append(f"{point.name}: no step with a loss that {point.baseline_name} has too")
        else:
            first_steps = f"{format_difference(difference.first_steps_difference)} over the first five steps"
            all_steps = f"{format_difference(difference.all_steps_difference)} over all {difference.num_common_steps} common ones"
            lines.append(
                f"{point.name} against {point.baseline_name}: largest relative difference "
                f"{first_steps} (step {difference.step_of_first_steps_difference}), "
                f"{all_steps} (step {difference.step_of_all_steps_difference})"
            )
    return lines


def _held_out_metric_lines(metrics: Sequence[str], points: Sequence[ComparedPoint]) -> list[str]:
    """Show how each held-out metric changed in training: a line `eval/loss  ddp: 2.8700 -> 2.3400` for each point that has it."""
    lines = []
    for metric in metrics:
        for point in points:
            before = point.measured.metrics_before_training.get(metric)
            after = point.measured.metrics_at_end.get(metric)
            if before is not None or after is not None:
                lines.append(f"{metric}  {point.name}: {_number_cell(before, '.4f')} -> {_number_cell(after, '.4f')}")
    return lines


def _test_metric_lines(points: Sequence[ComparedPoint]) -> list[str]:
    """Show the metrics of the test documents, such as `test/loss  ddp: 2.3100 (40 documents, looked at once)`.

    A run records how often its test documents were evaluated, since who chooses by them spoils them. The first repeat
    stands for all. Lines are sorted, so that those of a metric are together.
    """
    lines = []
    for point in points:
        test_record = point.first_repeat.record.test or {}
        num_documents = test_record.get("documents")
        num_looks = test_record.get("looks") or 0
        for metric, value in (test_record.get("metrics") or {}).items():
            lines.append(
                f"{metric}  {point.name}: {_number_cell(value, '.4f')} "
                f"({num_documents} documents, looked at {format_times(num_looks)})"
            )
    return sorted(lines)


def comparison_markdown(comparison: Comparison, plot_images: Sequence[PlotImage] = ()) -> str:
    """Write `compare.md`, the comparison as a Markdown page: answer, tables, sections, plots, and the run directories.

    A point is one combination of settings, with its runs. `plot_images`: the pictures of plots that the page shows.
    """
    is_single_point = len(comparison.points) == 1
    lines = [f"# Run {comparison.points[0].name}" if is_single_point else "# Comparison"]
    if comparison.conclusion.sentences:
        lines += ["", " ".join(comparison.conclusion.sentences)]
        lines += _recommendation_lines(comparison.conclusion)
    for text_table in text_tables(comparison):
        lines += ["", *_markdown_table(text_table)]
    for title, sentences in titled_sections(comparison):
        if sentences and title != ANSWER_TITLE:  # the answer stands at the top already
            lines += ["", f"## {_capitalised(title)}", "", *(f"- {sentence}" for sentence in sentences)]
    for title, path in plot_images:
        lines += ["", f"## {title}", "", f"![{title}]({path})"]
    lines += ["", "## Runs", ""]
    for point in comparison.points:
        run_dirs = [f"`{run_dir}`" for run_dir in point.run_dirs]
        if run_dirs:
            lines.append(f"- {point.name}: {', '.join(run_dirs)}")
    return "\n".join(lines) + "\n"


def _markdown_table(text_table: TextTable) -> list[str]:
    """Write a table as lines of Markdown below its title as a heading.

    The main table has no title, and a last column that says how each point ended.
    """
    lines = [] if text_table.is_main_table else [f"## {_capitalised(text_table.title)}", ""]
    headings = ["run", *(column.heading for column in text_table.columns)]
    if text_table.is_main_table:
        headings.append("state")
    lines += [_markdown_row(headings), _markdown_row(["---"] * len(headings))]
    for point in text_table.points:
        name, *cells = text_table.row(point)
        if text_table.is_main_table:
            cells.append(point.reason or point.state)
        lines.append(_markdown_row([f"`{name}`", *cells]))
    return lines


def _recommendation_lines(conclusion: Conclusion) -> list[str]:
    """Write the recommendations as Markdown: a table of which point to take for which goal, then what to run to learn more.

    The column `settings` has the arguments to paste behind `shardtune train`; `-` if the point differs in none.
    """
    lines = []
    if conclusion.recommendations:
        lines += ["", _markdown_row(["for", "take", "why", "settings"]), _markdown_row(["---"] * 4)]
        for recommendation in conclusion.recommendations:
            point_name = f"`{recommendation.point.name}`"
            arguments = f"`{recommendation.arguments}`" if recommendation.arguments else "-"
            lines.append(_markdown_row([recommendation.goal, point_name, recommendation.why, arguments]))
    if conclusion.to_learn_more:
        lines += ["", conclusion.to_learn_more]
    return lines


def _capitalised(title: str) -> str:
    return title[0].upper() + title[1:]


def comparison_html(comparison: Comparison, *, reload_after_s: float | None = None) -> str:
    """Write `compare.html`, the comparison as one HTML file; for a comparison with a single point, the page of that run.

    `reload_after_s`: seconds after which a browser reloads the page; None for a page that will not change any more. Without
    the packages of the extra `report` the page has no plots.
    """
    if len(comparison.points) == 1:
        from launch.compare.run_page.page import run_page

        return run_page(comparison, reload_after_s=reload_after_s)
    from launch.compare.comparison_page import comparison_page

    # The page shows the text sections of the terminal, such as ("verdict", [...]), below its own tables and plots.
    return comparison_page(comparison, titled_sections(comparison), reload_after_s=reload_after_s)


def _markdown_row(cells: list[str]) -> str:
    escaped = [cell.replace("|", "\\|") for cell in cells]  # a bar would begin a cell
    return f"| {' | '.join(escaped)} |"
