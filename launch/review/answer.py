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
    """Write what `review score` prints: win rates, agreement of the reviewers, a line on each reviewer, and disputed items.

    `score`: the record of the review, {"metrics": {"win_rate": {"value": 0.6, ...}}, "arms": ["tuned", "base"],
    "reviewers": [...], ...}.
    """
    model = score["model"]
    lines = [
        f"{model['run']}, {model['checkpoint']}: {score['num_prompts']} prompts, {len(score['reviewers'])} reviewers"
    ]
    lines += format_table(WIN_RATE_COLUMNS, _win_rate_rows(score["metrics"], score["arms"]))
    lines += ["", *wrap_text(score["method"]), "", *_agreement_lines(score["metrics"], score["kappa"])]
    for reviewer in score["reviewers"]:
        lines += _reviewer_lines(reviewer)
    win_rate = score["without_flagged"]  # of careful reviewers; None if nobody is flagged, or everybody
    if win_rate is not None:
        interval = f"[{_format_number_or_dash(win_rate['low'])}, {_format_number_or_dash(win_rate['high'])}]"
        lines.append(
            f"without reviewers that stand out: win rate {_format_number_or_dash(win_rate['value'])} {interval}"
        )
    return "\n".join([*lines, *_disagreement_lines(score["disagreements"])])


def _win_rate_rows(metrics: dict[str, dict[str, Any]], arms: list[str]) -> list[TableRow]:
    """Rows of the table of win rates: how often reviewers preferred the tuned model to each other model (arm), on each question.

    {"win_rate/base": {"value": 0.6, "low": 0.5, "high": 0.7, "wins": 9, ...}} -> base, overall, 0.6, 0.5 to 0.7, 9, ...
    """
    rows = []
    for name, metric in metrics.items():
        metric_kind, *arm_and_question = name.split("/")
        # `win_rate` and `win_rate/<question>`, without an arm, repeat the numbers of one arm.
        has_arm = bool(arm_and_question) and arm_and_question[0] in arms
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


def _agreement_lines(metrics: dict[str, dict[str, Any]], kappas: list[dict[str, Any]]) -> list[str]:
    """Say how far the reviewers agree: Krippendorff's alpha of each question, then Cohen's kappa of every two reviewers.

    `metrics`: those of the review by name, of which `alpha` and `alpha/<question>` are shown. `kappas`: {"reviewers":
    [name, name], "items": 12, "kappa": 0.4} each.
    """
    alphas = []
    is_any_undefined = False
    for name, metric in metrics.items():
        if name.startswith("alpha"):
            alphas.append(f"{name} {_format_number_or_dash(metric['value'])}")
            is_any_undefined = is_any_undefined or metric["value"] is None
    line = f"Krippendorff's nominal {', '.join(alphas)}"
    if is_any_undefined:
        line += " (- : nobody could have disagreed)"
    lines = [line]
    for pair in kappas:
        reviewers = " and ".join(pair["reviewers"])
        lines.append(f"Cohen's kappa of {reviewers}: {_format_number_or_dash(pair['kappa'])} on {pair['items']} items")
    return lines


def _reviewer_lines(reviewer: dict[str, Any]) -> list[str]:
    """A line on how much one reviewer judged, then a line for each sign that the answers are careless.

    `reviewer`: {"name": "ada", "judged": 48, "open": 2, "left": 0.5, "minutes": 31.0, "flags": [], "dropped": False, ...};
    `left` is the share of votes for the left answer.
    """
    line = reviewer["name"]
    if reviewer["dropped"]:
        line += " (dropped)"
    line += f": {reviewer['judged']} judged, {reviewer['open']} open, left side {reviewer['left']:.0%}"
    if reviewer["minutes"] is not None:
        line += f", {reviewer['minutes']:.0f} min"
    return [line, *(f"  stands out: {flag}" for flag in reviewer["flags"])]


def _disagreement_lines(disagreements: list[dict[str, Any]]) -> list[str]:
    """List the items on which reviewers took opposite sides, with everybody's vote; at most `MAX_PRINTED_DISAGREEMENTS`.

    `disagreements`: {"item": id, "prompt": 3, "votes": {"ada": "tuned", "bert": "other"}, ...}, the most even ones first.
    """
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
