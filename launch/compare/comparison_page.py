"""`compare.html`: the answer first, then what to take, one table, plots, and all details folded."""

from __future__ import annotations

from collections.abc import Sequence

from launch.compare.compared_axes import ComparedAxis
from launch.compare.compared_job import point_has_diverged
from launch.compare.comparison import TEST_DOCUMENTS_TITLE, ComparedPoint, Comparison
from launch.compare.conclusion import Conclusion
from launch.compare.cost_plots import comparison_plots
from launch.compare.page_table import held_out_table, points_table
from launch.compare.recommendation import join_names
from launch.compare.repeats import REFUSED_STATE
from trainer.pages.pieces import Callout, PageCard, Tone, worst_first
from trainer.pages.render import render
from trainer.pages.vega import vega_script
from trainer.reporting.status import RunState

MAX_AXIS_VALUES = 12
"""Values of an axis that the head of the page names."""
MAX_LINES = 60
"""Lines of a folded section; of more the first are shown, and where the others are."""
MAX_REASONS = 5
"""Points that a call-out names with their reasons; the table has all."""
HEADING_BY_FOLDED_TITLE = {
    "verdict": "Verdict on each point",
    "loss curves": "Loss curves",
    "steps that stood out": "Steps that stood out",
    "what differs": "All settings that differ",
    "resolved": "Settings that the runs chose themselves",
    "to know": "To know",
    TEST_DOCUMENTS_TITLE: "Test documents: no answer, verdict or ranking above uses them; choose nothing by them",
}


def comparison_page(
    comparison: Comparison, sections: Sequence[tuple[str, list[str]]], *, reload_after_s: float | None = None
) -> str:
    """Write the HTML page of a comparison of several points: the answer first, then what to take, a table, plots, details.

    `sections`: (title, lines) of the sections below the tables in a terminal, most of which the page folds. A browser
    reloads the page after `reload_after_s` seconds; None for a page that will not change any more.
    """
    conclusion = comparison.conclusion
    return render(
        "launch.compare",
        "comparison.html.j2",
        heading=f"Comparison of {len(comparison.points)} points",
        axes=_axis_texts(comparison.axes),
        answer=conclusion_callout(conclusion),
        callouts=worst_first(point_callouts(comparison.points)),
        cards=recommendation_cards(conclusion),
        recommendations=conclusion.recommendations,
        to_learn_more=conclusion.to_learn_more,
        table=points_table(comparison),
        held_out=held_out_table(comparison.begun_points),
        plots=comparison_plots(comparison),
        sections=_folded_sections(sections),
        runs=_run_directory_texts(comparison.points),
        vega_script=vega_script(),
        reload_after_s=reload_after_s,
    )


def _axis_texts(axes: Sequence[ComparedAxis]) -> list[tuple[str, str]]:
    """Name the settings in which the points differ, for the head of the page: ("strategy", "ddp, fsdp2") for each axis.

    At most `MAX_AXIS_VALUES` values of an axis are named.
    """
    texts = []
    for axis in axes:
        values = ", ".join(axis.values[:MAX_AXIS_VALUES])
        if len(axis.values) > MAX_AXIS_VALUES:
            values += " ..."
        texts.append((axis.title, values))
    return texts


def conclusion_callout(conclusion: Conclusion) -> Callout:
    """The answer of a comparison as a call-out, to stand first: its headline is the heading, its other sentences the text."""
    if not conclusion.sentences:
        return Callout("note", "Nothing to compare", text="")
    heading = conclusion.headline
    # Points that are not done have call-outs of their own.
    text_sentences = [sentence for sentence in conclusion.sentences if sentence not in (heading, conclusion.unfinished)]
    return Callout(conclusion.tone, heading, text=" ".join(text_sentences))


def recommendation_cards(conclusion: Conclusion) -> list[PageCard]:
    """A card for each recommended point."""
    cards = []
    for recommendation in conclusion.recommendations:
        cards.append(PageCard(f"For {recommendation.goal}", recommendation.point.name, recommendation.why, tone="good"))
    return cards


def point_callouts(points: Sequence[ComparedPoint]) -> list[Callout]:
    """Warn the reader of points without a result, a call-out for each state (failed, running ...), and of diverged points.

    A call-out names its points, and the reasons of at most `MAX_REASONS`. A state is a `RunState`, or `REFUSED_STATE` for a
    point that no run was started for.
    """
    tones: dict[str, Tone] = {
        RunState.failed: "bad",
        REFUSED_STATE: "warning",
        RunState.preempted: "warning",
        RunState.running: "note",
    }
    points_by_state: dict[str, list[ComparedPoint]] = {}
    diverged_names = []
    for point in points:
        if point.unfinished_state is not None:
            points_by_state.setdefault(point.state, []).append(point)
        elif point_has_diverged(point):
            diverged_names.append(point.name)
    callouts = []
    for state, points_in_state in points_by_state.items():
        state_text = "stopped" if state == RunState.preempted else state
        names = join_names([point.name for point in points_in_state])
        heading = f"{len(points_in_state)} of {len(points)} points {state_text}: {names}"
        reasons = [f"{point.name}: {point.reason}" for point in points_in_state[:MAX_REASONS] if point.reason]
        callouts.append(Callout(tones.get(state, "note"), heading, ". ".join(reasons)))
    if diverged_names:
        advice = (
            "Their losses ended above those at the beginning. They are left out of every recommendation. Try a lower optim.lr, "
            "or schedule.warmup_share=0.1."
        )
        callouts.append(Callout("bad", f"Diverged: {join_names(diverged_names)}", advice))
    return callouts


def _folded_sections(sections: Sequence[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """Choose the sections that the page shows folded, as (heading, lines), from (title, lines) of all sections.

    A section without lines is left out. Of more than `MAX_LINES` lines the first are kept, and a last line says where all
    are.
    """
    folded_sections = []
    for title, lines in sections:
        if title not in HEADING_BY_FOLDED_TITLE or not lines:
            continue
        shown_lines = lines[:MAX_LINES]
        if len(lines) > MAX_LINES:
            shown_lines.append(f"{len(lines) - MAX_LINES} more lines: see compare.md")
        folded_sections.append((HEADING_BY_FOLDED_TITLE[title], shown_lines))
    return folded_sections


def _run_directory_texts(points: Sequence[ComparedPoint]) -> list[tuple[str, str]]:
    """(name of a point, its run directories with commas between them) of each point that was not refused."""
    texts = []
    for point in points:
        if point.run_dirs:
            texts.append((point.name, ", ".join(point.run_dirs)))
    return texts
