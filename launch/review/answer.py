"""Prints the scores of a review."""

from __future__ import annotations

from typing import Any

from launch.output import TableColumn, TableRow, format_table, wrap_text

MAX_PRINTED_DISAGREEMENTS = 10
"""Disputed items that are printed; the record has more."""
WIN_RATE_COLUMNS = (
    TableColumn("tuned against"),
    TableColumn("question"),
    *(TableColumn(title, is_number=True) for title in ("win rate", "95 % interval", "wins", "ties", "losses", "equal")),
)


def score_text(score: dict[str, Any]) -> str:
    """What `review score` prints: win rates, agreement of the reviewers, a line on each reviewer, and disputed items.

    `score`: the record of a review, such as {"metrics": {"win_rate": {"value": 0.6, ...}}, "reviewers": [...], ...}.
    """
    model = score["model"]
    lines = [
        f"{model['run']}, {model['checkpoint']}: {score['num_prompts']} prompts, {len(score['reviewers'])} reviewers"
    ]
    lines += format_table(WIN_RATE_COLUMNS, _win_rate_rows(score))
    lines += ["", *wrap_text(score["method"]), "", *_agreement_lines(score)]
    for reviewer in score["reviewers"]:
        lines += _reviewer_lines(reviewer)
    without_flagged = score["without_flagged"]
    if without_flagged is not None:
        interval = (
            f"[{_format_number_or_dash(without_flagged['low'])}, {_format_number_or_dash(without_flagged['high'])}]"
        )
        lines.append(
            f"without reviewers that stand out: win rate {_format_number_or_dash(without_flagged['value'])} {interval}"
        )
    return "\n".join([*lines, *_disagreement_lines(score["disagreements"])])


def _win_rate_rows(score: dict[str, Any]) -> list[TableRow]:
    """A table row for each metric `win_rate/<arm>` and `win_rate/<arm>/<question>`; an arm is a model beside the tuned one."""
    rows = []
    for name, metric in score["metrics"].items():
        metric_kind, *arm_and_question = name.split("/")
        # `win_rate` and `win_rate/<question>`, without an arm, repeat the numbers of one arm.
        has_arm = bool(arm_and_question) and arm_and_question[0] in score["arms"]
        if metric_kind != "win_rate" or not has_arm:
            continue
        arm = arm_and_question[0]
        question = arm_and_question[1] if len(arm_and_question) > 1 else "overall"
        interval = (
            ""
            if metric["value"] is None
            else f"{_format_number_or_dash(metric['low'])} to {_format_number_or_dash(metric['high'])}"
        )
        counts = (metric["wins"], metric["ties"], metric["losses"], metric.get("num_equal", 0))
        rows.append(TableRow((arm, question, _format_number_or_dash(metric["value"]), interval, *map(str, counts))))
    return rows


def _agreement_lines(score: dict[str, Any]) -> list[str]:
    """Krippendorff's alpha of each question on one line, then a line with Cohen's kappa of every two reviewers."""
    alphas = []
    is_any_undefined = False
    for name, metric in score["metrics"].items():
        if name.startswith("alpha"):
            alphas.append(f"{name} {_format_number_or_dash(metric['value'])}")
            is_any_undefined = is_any_undefined or metric["value"] is None
    line = f"Krippendorff's nominal {', '.join(alphas)}"
    if is_any_undefined:
        line += " (- : nobody could have disagreed)"
    lines = [line]
    for pair in score["kappa"]:
        reviewers = " and ".join(pair["reviewers"])
        lines.append(f"Cohen's kappa of {reviewers}: {_format_number_or_dash(pair['kappa'])} on {pair['items']} items")
    return lines


def _reviewer_lines(reviewer: dict[str, Any]) -> list[str]:
    """A line on how much one reviewer judged, then a line for each rule that flags careless answers."""
    line = reviewer["name"]
    if reviewer["dropped"]:
        line += " (dropped)"
    line += f": {reviewer['judged']} judged, {reviewer['open']} open, left side {reviewer['left']:.0%}"
    if reviewer["minutes"] is not None:
        line += f", {reviewer['minutes']:.0f} min"
    return [line, *(f"  stands out: {flag}" for flag in reviewer["flags"])]


def _disagreement_lines(disagreements: list[dict[str, Any]]) -> list[str]:
    """A line on each item that reviewers dispute, with everybody's vote; at most `MAX_PRINTED_DISAGREEMENTS`."""
    if not disagreements:
        return []
    lines = [f"{len(disagreements)} items on which reviewers took opposite sides; the most even ones:"]
    for disputed_item in disagreements[:MAX_PRINTED_DISAGREEMENTS]:
        votes = ", ".join(f"{reviewer} {vote}" for reviewer, vote in disputed_item["votes"].items())
        prompt_line = disputed_item["prompt"] + 1
        lines.append(f"  {disputed_item['item']} (answers/prompts.jsonl, line {prompt_line}): {votes}")
    return lines


def _format_number_or_dash(number: float | None) -> str:
    return "-" if number is None else f"{number:.3g}"
