"""The result of `shardtune review score` as text."""

from __future__ import annotations

from typing import Any

SHOWN = 10


def text(found: dict[str, Any]) -> str:
    """Tables a terminal shows."""
    model = found["model"]
    lines = [
        f"{model['run']}, {model['checkpoint']}: {found['num_prompts']} prompts, {len(found['reviewers'])} reviewers"
    ]
    rows = [["tuned against", "question", "win rate", "95 % interval", "wins", "ties", "losses", "equal"]]
    for name, each in found["metrics"].items():
        parts = name.split("/")
        if parts[0] == "win_rate" and len(parts) > 1 and parts[1] in found["arms"]:
            span = f"{_number(each['low'])} to {_number(each['high'])}" if each["value"] is not None else ""
            counts = [str(each[side]) for side in ("wins", "ties", "losses")]
            question = parts[2] if len(parts) > 2 else "overall"
            rows.append([parts[1], question, _number(each["value"]), span, *counts, str(each.get("num_equal", 0))])
    lines += [*_table(rows), "", found["method"], ""]
    alphas = [f"{name} {_number(each['value'])}" for name, each in found["metrics"].items() if name.startswith("alpha")]
    lines.append(
        f"Krippendorff's nominal {', '.join(alphas)}"
        + (" (- : nobody could have disagreed)" if "-" in str(alphas) else "")
    )
    for pair in found["kappa"]:
        lines.append(
            f"Cohen's kappa of {' and '.join(pair['reviewers'])}: {_number(pair['kappa'])} on {pair['items']} items"
        )
    for each in found["reviewers"]:
        minutes = "" if each["minutes"] is None else f", {each['minutes']:.0f} min"
        state = " (dropped)" if each["dropped"] else ""
        lines.append(
            f"{each['name']}{state}: {each['judged']} judged, {each['open']} open, left side {each['left']:.0%}{minutes}"
        )
        lines += [f"  stands out: {flag}" for flag in each["flags"]]
    if (without := found["without_flagged"]) is not None:
        span = f"[{_number(without['low'])}, {_number(without['high'])}]"
        lines.append(f"without reviewers that stand out: win rate {_number(without['value'])} {span}")
    if found["disagreements"]:
        lines.append(f"{len(found['disagreements'])} items on which reviewers took opposite sides; the most even ones:")
    for each in found["disagreements"][:SHOWN]:
        votes = ", ".join(f"{reviewer} {vote}" for reviewer, vote in each["votes"].items())
        lines.append(f"  {each['item']} (answers/prompts.jsonl, line {each['prompt'] + 1}): {votes}")
    return "\n".join(lines)


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
