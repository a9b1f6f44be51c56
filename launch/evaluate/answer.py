"""The report of `shardtune evaluate` as text."""

from __future__ import annotations

from typing import Any


def text(report: dict[str, Any]) -> str:
    """Tables a terminal shows."""
    model = report["model"]
    head = model["run"] or model["path"]
    head += f", {model['checkpoint']}" if model["checkpoint"] else ""
    head += f" with {', '.join(model['adapters'])}" if model["adapters"] else ""
    against = report.get("against")
    lines = [f"{head}, against {against['what']}" if against else head]
    headings = ["task", "metric", "value", "95 % interval"]
    headings += ["other", "difference", "95 % interval", "p", "verdict"] if against else []
    rows = [headings]
    for name, task in report["tasks"].items():
        apart = (against or {"tasks": {}})["tasks"].get(name)
        for metric, said in task["metrics"].items():
            span = f"{_number(said['low'])} to {_number(said['high'])}" if "low" in said else ""
            row = [name, metric, _number(said["value"]), span]
            if against:
                row += _apart(None if apart is None else apart["metrics"].get(metric))
            rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(headings))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += ["", f"{report['method']}"]
    lines += [f"accepted: {line}" for line in model.get("accepted", ())]
    lines += [f"{name}: {note}" for name, task in report["tasks"].items() for note in task.get("notes", ())]
    for name, apart in (against or {"tasks": {}})["tasks"].items():
        if "changed" in apart:
            changed = apart["changed"]
            lines.append(
                f"{name}: {changed['num_won']} rows right that were wrong, {changed['num_lost']} the other way"
            )
        elif not apart["paired"]:
            lines.append(
                f"{name}: other rows than then, or rows that are not known: compared as numbers, not row by row"
            )
    if against and against["not_there"]:
        lines.append(f"not in {against['what']}: {', '.join(against['not_there'])}")
    return "\n".join(lines)


def _apart(apart: dict[str, Any] | None) -> list[str]:
    if apart is None:
        return ["-", "-", "", "", ""]
    span = f"{_number(apart['low'])} to {_number(apart['high'])}"
    return [_number(apart["value"]), _number(apart["difference"], "+"), span, _number(apart["p"]), apart["verdict"]]


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.4g}"
