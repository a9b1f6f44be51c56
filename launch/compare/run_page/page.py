"""Puts the page of one run together (`run.html.j2`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from launch.compare.comparison import Comparison
from launch.compare.events import notable_steps, resolved_setting_lines
from launch.compare.profiles import OPERATOR_TABLE_HEADINGS, RANK_TABLE_HEADINGS, ProfiledSteps, read_profile
from launch.compare.run_page import contents, figures
from launch.compare.run_page.answers import answer_pairs
from launch.compare.run_page.rounds import shown_round_groups
from launch.compare.run_page.verdict import run_callouts, run_verdict
from strategies.extras import install_command
from trainer.pages.pieces import PageCell, PageColumn, PageTable
from trainer.pages.render import render
from trainer.pages.vega import vega_script

MAX_NOTABLE_STEPS = 50
"""Steps that stood out which are listed: the last ones."""
TEMPLATE_PACKAGE = "launch.compare.run_page"


@dataclass(frozen=True, slots=True)
class ProfileTables:
    """What the page shows of a profiled run."""

    steps: tuple[int, int]
    is_measured_on_device: bool
    """Whether the times are those of kernels on a GPU; else of operators on the CPU."""
    traces: str
    tables: list[PageTable]


def run_page(comparison: Comparison, *, reload_after_s: float | None = None) -> str:
    """Write the HTML page of a single run, `report.html`: its verdict, cards, plots, answers, costs, settings and provenance.

    `comparison` has the run as its only point. A browser reloads the page after `reload_after_s` seconds; None: never.
    """
    compared = comparison.points[0]
    run = compared.first_repeat
    profile = read_profile(run.directory)
    main_plots, folded_plots = figures.run_figures(run, compared.summary.parts_s, profile)
    notable = notable_steps(run)
    return render(
        TEMPLATE_PACKAGE,
        "run.html.j2",
        name=compared.name,
        model=PurePath(run.record.base_model or "").name,
        run=run,
        verdict=run_verdict(run),
        cards=contents.run_cards(compared),
        callouts=run_callouts(run),
        main_plots=main_plots,
        folded_plots=folded_plots,
        answers=answer_pairs(run),
        rounds=shown_round_groups(run),
        costs=contents.cost_table(compared),
        settings=contents.run_settings(run),
        provenance=contents.provenance_rows(run),
        links=contents.run_links(run),
        notable=notable[-MAX_NOTABLE_STEPS:],
        notable_left_out=max(len(notable) - MAX_NOTABLE_STEPS, 0),
        resolved=resolved_setting_lines(comparison.points),
        notes=comparison.notes,
        profile=None if profile is None else _profile_tables(profile),
        vega_script=vega_script(),
        install_command=install_command("report"),
        reload_after_s=reload_after_s,
    )


def _profile_tables(profile: ProfiledSteps) -> ProfileTables:
    """Prepare what the page shows of a profiled run: a table with a row for each rank, and one with a row for each operator."""
    return ProfileTables(
        steps=profile.steps,
        is_measured_on_device=profile.measured_on == "device",
        traces=profile.traces,
        tables=[
            _text_table(RANK_TABLE_HEADINGS, profile.ranks, "Ranks"),
            _text_table(OPERATOR_TABLE_HEADINGS, profile.operators, "Operators, all ranks"),
        ],
    )


def _text_table(headings: list[str], rows: list[list[str]], caption: str) -> PageTable:
    """Make a table of the page from cells that are text already; a column is sorted by the numbers with which its cells begin."""
    cells = []
    for row in rows:
        cells.append([PageCell(text, sort_value=_sort_value(text)) for text in row])
    columns = [PageColumn(heading) for heading in headings]
    return PageTable(columns, cells, caption)


def _sort_value(text: str) -> float | str:
    """What a cell is sorted by: its number, such as 1234.5 for `1,234.5` and 12 for `12%`, or its text if it is none."""
    try:
        return float(text.replace(",", "").split("%")[0])
    except ValueError:
        return text
