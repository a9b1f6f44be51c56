"""`compare.html`: the answer first, then what to take, one table, plots, and all details folded."""

from __future__ import annotations

from collections.abc import Sequence

from launch.compare.comparison import TEST_DOCUMENTS, ComparedRun, Comparison
from launch.compare.conclusion import Conclusion, listed
from launch.compare.cost_plots import comparison_plots
from launch.compare.page_table import held_out_table, points_table
from launch.compare.quality import diverged
from launch.compare.repeats import REFUSED
from trainer.pages.pieces import Callout, PageCard, Tone, worst_first
from trainer.pages.render import render
from trainer.pages.vega import vega_script
from trainer.reporting.status import State

MAX_LINES = 60
"""Lines of a folded section; of more the first are shown, and where the others are."""
MAX_REASONS = 5
"""Points that a call-out names with their reasons; the table has all."""
FOLDED_SECTIONS = {
    "verdict": "Verdict on each point",
    "loss curves": "Loss curves",
    "steps that stood out": "Steps that stood out",
    "what differs": "All settings that differ",
    "resolved": "Settings that the runs chose themselves",
    "to know": "To know",
    TEST_DOCUMENTS: "Test documents: no answer, verdict or ranking above uses them; choose nothing by them",
}


def comparison_page(
    comparison: Comparison, sections: Sequence[tuple[str, list[str]]], *, reload_after_s: float | None = None
) -> str:
    """The HTML page of a comparison. `sections`: (title, lines) of the details; a browser reloads it after `reload_after_s`."""
    conclusion = comparison.conclusion
    return render(
        "launch.compare",
        "comparison.html.j2",
        heading=f"Comparison of {len(comparison.runs)} points",
        axes=_axis_lines(comparison),
        answer=answer_of(conclusion),
        callouts=worst_first(point_callouts(comparison)),
        cards=recommendation_cards(conclusion),
        take=conclusion.take,
        to_learn_more=conclusion.to_learn_more,
        table=points_table(comparison),
        held_out=held_out_table(comparison),
        plots=comparison_plots(comparison),
        sections=_shortened(sections),
        runs=_run_lines(comparison),
        vega_script=vega_script(),
        reload_after_s=reload_after_s,
    )


def _axis_lines(comparison: Comparison) -> list[tuple[str, str]]:
    """(title, values) of each axis."""
    return [
        (axis.title, ", ".join(axis.values[:12]) + (" ..." if len(axis.values) > 12 else ""))
        for axis in comparison.axes
    ]


def answer_of(conclusion: Conclusion) -> tuple[Tone, str, str]:
    """(tone, heading, text): the sentence about quality or parity is the heading, the others follow."""
    if not conclusion.sentences:
        return "note", "Nothing to compare", ""
    heading = conclusion.headline
    # Points that are not done have call-outs of their own.
    others = [sentence for sentence in conclusion.sentences if sentence not in (heading, conclusion.unfinished)]
    return conclusion.tone, heading, " ".join(others)


def recommendation_cards(conclusion: Conclusion) -> list[PageCard]:
    """A card for each recommended point."""
    return [PageCard(f"For {choice.goal}", choice.point.name, choice.why, "good") for choice in conclusion.take]


def point_callouts(comparison: Comparison) -> list[Callout]:
    """What a reader should know of points that have no result: failed, refused, diverged, not done."""
    tones: dict[str, Tone] = {
        State.failed: "bad",
        REFUSED: "warning",
        State.preempted: "warning",
        State.running: "note",
    }
    words = {State.failed: "failed", REFUSED: "refused", State.preempted: "stopped", State.running: "running"}
    by_state: dict[str, list[ComparedRun]] = {}
    for run in comparison.runs:
        if run.repeated.ended is not None:
            by_state.setdefault(run.repeated.state, []).append(run)
    callouts = []
    for state, runs in by_state.items():
        heading = f"{len(runs)} of {len(comparison.runs)} points {words.get(state, state)}: {listed([run.name for run in runs])}"
        reasons = [f"{run.name}: {run.repeated.reason}" for run in runs[:MAX_REASONS] if run.repeated.reason]
        callouts.append(Callout(tones.get(state, "note"), heading, ". ".join(reasons)))
    names = [run.name for run in comparison.runs if run.repeated.ended is None and diverged(run)]
    if names:
        text = (
            "Their losses ended above those at the beginning. They are left out of every recommendation. Try a lower optim.lr, "
            "or schedule.warmup_share=0.1."
        )
        callouts.append(Callout("bad", f"Diverged: {listed(names)}", text))
    return callouts


def _shortened(sections: Sequence[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """(heading, lines) of the folded sections that have lines, cut to `MAX_LINES`."""
    shortened = []
    for title, lines in sections:
        if title not in FOLDED_SECTIONS or not lines:
            continue
        shown = lines[:MAX_LINES]
        if len(lines) > MAX_LINES:
            shown.append(f"{len(lines) - MAX_LINES} more lines: see compare.md")
        shortened.append((FOLDED_SECTIONS[title], shown))
    return shortened


def _run_lines(comparison: Comparison) -> list[tuple[str, str]]:
    """(name, directories) of each point that was run."""
    lines = []
    for run in comparison.runs:
        if run.repeated.row.directories:
            lines.append((run.name, ", ".join(str(repeat.directory) for repeat in run.repeated.repeats)))
    return lines
