"""Writes `compare.html`, or `report.html` of one run: one file with tables, plots and notes that needs no network."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from launch.compare.comparison import Comparison
from launch.compare.run_files import Point
from strategies.cache_dir import cache_directory
from strategies.errors import StorageError
from strategies.extras import install_command
from trainer.reporting.status import write_atomic, write_text_atomic

NEEDS = ("altair", "vl_convert")
"""What draws the page, of the extra `report`."""
Table = tuple[str, list[str], list[list[str]]]
"""(title, headings, cells of each row)."""


def missing_packages(what: str = "compare.html") -> str | None:
    """What to install for a page; None where all is there."""
    missing = [package for package in NEEDS if find_spec(package) is None]
    return f"{what} needs {' and '.join(missing)}: {install_command('report')}" if missing else None


@cache
def vega_script() -> str:
    """What draws plots in a browser, one text; gathering it takes seconds, so it is kept in the cache directory."""
    cached = cache_directory() / "pages" / f"vega-{version('vl-convert-python')}.js"
    try:
        return cached.read_text(encoding="utf-8")
    except OSError:
        from vl_convert import javascript_bundle

        text = javascript_bundle().replace("</script", "<\\/script")  # type: ignore[call-arg]  # its stub forgets the default
    with suppress(StorageError):  # the page does without
        write_text_atomic(cached, text)
    return text


def render_page(
    comparison: Comparison,
    tables: list[Table],
    sections: list[tuple[str, list[str]]],
    *,
    again_s: float | None = None,
) -> str:
    """The text of the page; what comes from runs is escaped. A browser reads it anew after `again_s` seconds."""
    from jinja2 import Environment, PackageLoader

    from launch.compare.plots import comparison_plots

    # Texts of runs may hold markup, and so may those of data sets: everything is escaped but the plots' own JSON.
    template = Environment(loader=PackageLoader("launch.compare", "."), autoescape=True).get_template("page.html.j2")
    single: dict[str, Any] = {"one": None, "settings": [], "facts": [], "profile": None}
    if len(comparison.runs) == 1:
        point = comparison.runs[0].point
        settings = [(key, str(value)) for key, value in point.config.items()]
        single = {"one": point, "settings": settings, "facts": run_facts(point), "profile": profile_of(point)}
    return template.render(
        found=comparison,
        tables=_sortable(tables),
        sections=[(title, lines) for title, lines in sections if title != "verdict"],
        plots=comparison_plots(comparison),
        scripts=vega_script(),
        again_s=again_s,
        **single,
    )


def _sortable(tables: list[Table]) -> list[tuple[str, list[str], list[list[tuple[str, str]]]]]:
    """The tables with, beside each cell, what a click on its heading sorts by."""
    sortable = []
    for title, headings, rows in tables:
        cells = []
        for row in rows:
            cells.append([(cell, sort_value(cell)) for cell in row])
        sortable.append((title, headings, cells))
    return sortable


def profile_of(point: Point) -> dict[str, Any] | None:
    """The traced steps of a run, and their tables as those of the page."""
    from launch.compare.profiles import OPERATORS, RANKS, read_profile

    profile = read_profile(point.directory)
    if profile is None:
        return None
    tables = [("", RANKS, profile.ranks), ("Operators, all ranks together", OPERATORS, profile.operators)]
    return {
        "steps": profile.steps,
        "of": profile.measured_on,
        "traces": profile.traces,
        "tables": _sortable(tables),
    }


def write_plot_images(comparison: Comparison, to: Path) -> list[tuple[str, str]]:
    """Each plot as `plots/<name>.png` in `to`; (title, path from there) of each. Takes seconds. Errors: StorageError."""
    from vl_convert import vegalite_to_png

    from launch.compare.plots import comparison_plots

    written = []
    for plot in comparison_plots(comparison):
        path = to / "plots" / f"{plot.name}.png"
        write_atomic(path, vegalite_to_png(plot.spec.replace("<\\/", "</"), scale=2))
        written.append((plot.title, f"plots/{plot.name}.png"))
    return written


def run_facts(point: Point) -> list[tuple[str, str]]:
    """Rows of the table at the head of a run's page; facts that the run did not record have no row."""
    record = point.record
    choices = (record.strategy, record.tuning, record.objective, record.precision, record.attention)
    batch = ""
    if record.global_batch and record.micro_batch and record.accumulation and record.world_size:
        batch = (
            f"{record.global_batch} = {record.micro_batch} micro x {record.accumulation} accumulation x "
            f"{record.world_size} rank(s)"
        )
    rows = (
        ("state", point.reason or point.state),
        ("directory", str(point.directory)),
        ("model", record.base_model),
        ("data", record.data_directory),
        ("device", record.device_name or record.device),
        ("way", ", ".join(filter(None, choices))),
        ("batch", batch),
        ("host", record.host),
        ("revision", record.git_revision),
        ("versions", ", ".join(f"{package} {version}" for package, version in record.versions.items())),
    )
    return [(title, fact) for title, fact in rows if fact]


def sort_value(cell: str) -> str:
    """What a cell is sorted by: its first number, without separators and units, else its text; nothing where it has none."""
    if cell == "-":
        return ""
    first = cell.replace(",", "").split("%")[0]
    for candidate in (first, first.split("-")[0]):
        try:
            return repr(float(candidate))
        except ValueError:
            continue
    return cell
