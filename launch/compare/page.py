"""Writes `compare.html`, or `report.html` of one run: one file with tables, plots and notes that needs no network."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from launch.compare.comparison import Comparison
from launch.compare.run_files import RecordedRun
from strategies.extras import install_command
from trainer.pages.vega import vega_script
from trainer.reporting.status import write_atomic

REQUIRED_PACKAGES = ("altair", "vl_convert")
"""Packages of the extra `report` that draw the plots."""
Table = tuple[str, list[str], list[list[str]]]
"""(title, headings, cells of each row)."""


def missing_packages(page_name: str = "compare.html") -> str | None:
    """A message that says how to install the packages that the page needs; None if all are there."""
    missing = [package for package in REQUIRED_PACKAGES if find_spec(package) is None]
    if not missing:
        return None
    return f"{page_name} needs {' and '.join(missing)}: {install_command('report')}"


def render_page(
    comparison: Comparison,
    tables: list[Table],
    sections: list[tuple[str, list[str]]],
    *,
    reload_after_s: float | None = None,
) -> str:
    """The HTML page of a comparison; a browser reloads it after `reload_after_s` seconds.

    `sections` are (title, lines). The page of a single run also has its settings, facts and profile.
    """
    from jinja2 import Environment, PackageLoader

    from launch.compare.plots import comparison_plots

    # Texts of runs may hold markup, and so may those of data sets: everything is escaped but the plots' own JSON.
    template = Environment(loader=PackageLoader("launch.compare", "."), autoescape=True).get_template("page.html.j2")
    single_run: dict[str, Any] = {"single_run": None, "settings": [], "facts": [], "profile": None}
    if len(comparison.runs) == 1:
        run = comparison.runs[0].first_repeat
        single_run = {
            "single_run": run,
            "settings": [(key, str(value)) for key, value in run.config.items()],
            "facts": run_facts(run),
            "profile": profile_context(run),
        }
    # The verdict stands at the head of the page.
    sections_below = [(title, lines) for title, lines in sections if title != "verdict"]
    return template.render(
        comparison=comparison,
        tables=_with_sort_values(tables),
        sections=sections_below,
        plots=comparison_plots(comparison),
        vega_script=vega_script(),
        reload_after_s=reload_after_s,
        **single_run,
    )


def _with_sort_values(tables: list[Table]) -> list[tuple[str, list[str], list[list[tuple[str, str]]]]]:
    """The tables with (cell, sort value) for each cell: a click on a heading sorts the rows by the latter."""
    sortable_tables = []
    for title, headings, rows in tables:
        sortable_rows = []
        for row in rows:
            sortable_rows.append([(cell, sort_value(cell)) for cell in row])
        sortable_tables.append((title, headings, sortable_rows))
    return sortable_tables


def profile_context(run: RecordedRun) -> dict[str, Any] | None:
    """What the page's template shows of a run's profiler trace: steps, files and tables; None if it was not profiled."""
    from launch.compare.profiles import OPERATORS, RANKS, read_profile

    profile = read_profile(run.directory)
    if profile is None:
        return None
    tables = [("", RANKS, profile.ranks), ("Operators, all ranks together", OPERATORS, profile.operators)]
    return {
        "steps": profile.steps,
        "measured_on": profile.measured_on,
        "traces": profile.traces,
        "tables": _with_sort_values(tables),
    }


def write_plot_images(comparison: Comparison, to: Path) -> list[tuple[str, str]]:
    """Write each plot as `plots/<name>.png` into `to`; returns (title, path relative to `to`) of each.

    Drawing takes seconds. Errors: StorageError.
    """
    from vl_convert import vegalite_to_png

    from launch.compare.plots import comparison_plots

    written = []
    for plot in comparison_plots(comparison):
        path = to / "plots" / f"{plot.name}.png"
        # In the page, `</` is escaped so that it does not end the script element; here it is plain JSON again.
        spec = plot.spec.replace("<\\/", "</")
        write_atomic(path, vegalite_to_png(spec, scale=2))
        written.append((plot.title, f"plots/{plot.name}.png"))
    return written


def run_facts(run: RecordedRun) -> list[tuple[str, str]]:
    """(title, text) of each row at the head of a single run's page; what the run did not record has no row."""
    record = run.record
    methods = (record.strategy, record.tuning, record.objective, record.precision, record.attention)
    batch = ""
    if record.global_batch and record.micro_batch and record.accumulation and record.world_size:
        parts = (f"{record.micro_batch} micro", f"{record.accumulation} accumulation", record.readers)
        batch = f"{record.global_batch} = {' x '.join(parts)}"
    rows = (
        ("state", run.reason or run.state),
        ("directory", str(run.directory)),
        ("model", record.base_model),
        ("data", record.data_directory),
        ("device", record.device_name or record.device),
        ("way", ", ".join(filter(None, methods))),
        ("batch", batch),
        ("host", record.host),
        ("revision", record.git_revision),
        ("versions", ", ".join(f"{package} {version}" for package, version in record.versions.items())),
    )
    return [(title, fact) for title, fact in rows if fact]


def sort_value(cell: str) -> str:
    """What the browser sorts a cell by: its first number, without separators and units, else the text itself.

    Empty for the dash of an unknown number. Examples: `1,234` -> `1234.0`, `41%` -> `41.0`, `90-110` -> `90.0`.
    """
    if cell == "-":
        return ""
    number = cell.replace(",", "").split("%")[0]
    lower_bound = number.split("-")[0]
    for candidate in (number, lower_bound):
        try:
            return repr(float(candidate))
        except ValueError:
            continue
    return cell
