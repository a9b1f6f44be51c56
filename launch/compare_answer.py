"""A comparison as tables of 80 columns, and as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from trainer.comparison.compare import Compared, Comparison, bound
from trainer.comparison.naming import short

WIDTH = 80
NAME = 26
Column = tuple[str, int, Callable[[Compared], str]]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _rate(value: float | None) -> str:
    return _number(value, ",.0f" if value is None or value >= 100 else ".1f")


COLUMNS: tuple[Column, ...] = (
    ("steps", 6, lambda run: str(run.measured.steps)),
    ("loss", 8, lambda run: _number(run.measured.loss, ".4f")),
    ("apart", 7, lambda run: bound(run.apart.early) if run.apart else "-"),
    ("tokens/s", 10, lambda run: _rate(run.measured.tokens_per_s)),
    ("learned/s", 10, lambda run: _rate(run.measured.supervised_tokens_per_s)),
    ("MFU", 7, lambda run: _number(run.measured.mfu, ".1%")),
    ("GiB", 6, lambda run: _number(run.measured.memory_gib, ".3g")),
)


def text(found: Comparison) -> str:
    """What a person reads in a terminal."""
    lines = [f"{'':<{NAME}}" + "".join(f"{title:>{width}}" for title, width, _ in COLUMNS)]
    for run in found.runs:
        cells = "".join(f"{value(run):>{width}}" for _, width, value in COLUMNS)
        lines += [f"{run.name:<{NAME}}{cells}"] if len(run.name) < NAME else [run.name, f"{'':<{NAME}}{cells}"]
        lines += _folded(f"  {run.point.reason}") if run.point.reason else []
    for title, told in _sections(found):
        if told:
            lines += ["", f"{title}:"]
            lines += [line for said in told for line in _folded(f"  {said}")]
    return "\n".join(lines)


def _sections(found: Comparison) -> list[tuple[str, list[str]]]:
    return [
        ("verdict", [run.verdict for run in found.runs]),
        (f"loss curves beside that of {found.runs[0].name}", _curves(found)),
        ("held-out metrics, before and after", _evaluations(found)),
        ("start, checkpoint and planned memory", [said for run in found.runs if (said := _besides(run))]),
        ("what differs", [f"{d.key}: {', '.join(short(value) for value in d.values)}" for d in found.differences]),
        ("to know", list(found.notes)),
    ]


def _curves(found: Comparison) -> list[str]:
    lines = []
    for run in found.runs[1:]:
        if run.not_comparable:
            lines.append(f"{run.name}: not comparable: {'; '.join(run.not_comparable)}")
        elif run.apart is None:
            lines.append(f"{run.name}: no step with a loss in both")
        else:
            a = run.apart
            lines.append(
                f"{run.name}: largest relative difference {bound(a.early)} over the first five steps (step "
                f"{a.early_step}), {bound(a.drift)} over all {a.steps} common ones (step {a.drift_step})"
            )
    return lines


def _evaluations(found: Comparison) -> list[str]:
    metrics = dict.fromkeys(key for run in found.runs for key in {**run.measured.before, **run.measured.after})
    lines = []
    for metric in metrics:
        for run in found.runs:
            before, after = run.measured.before.get(metric), run.measured.after.get(metric)
            if before is not None or after is not None:
                lines.append(f"{metric}  {run.name}: {_number(before, '.4f')} -> {_number(after, '.4f')}")
    return lines


def _besides(run: Compared) -> str:
    """What a run took beside its steps, and what memory it was expected to take; empty where it says nothing of them."""
    m, parts = run.measured, []
    if m.start_s is not None:
        evaluated = f", of which {m.evaluation_before_s:.1f} the evaluation before it" if m.evaluation_before_s else ""
        parts.append(f"{m.start_s:.1f} s from its start to the first step{evaluated}")
    if m.checkpoint_gib is not None:
        took = "" if m.checkpoint_s is None else f" (the last one written took {m.checkpoint_s:.1f} s)"
        parts.append(f"newest checkpoint {_size(m.checkpoint_gib)}{took}")
    if m.planned_gib is not None:
        parts.append(f"planned {_size(m.planned_gib)} a rank, measured {_size(m.memory_gib)} ({m.planned_by})")
    return f"{run.name}: {'; '.join(parts)}" if parts else ""


def _size(gib: float | None) -> str:
    return "-" if gib is None else f"{gib:.2f} GiB" if gib >= 0.01 else f"{gib * 1024:.2f} MiB"


def _folded(said: str) -> list[str]:
    return textwrap.wrap(said, WIDTH, subsequent_indent="    ", break_on_hyphens=False)


def as_markdown(found: Comparison) -> str:
    """The same as a page."""
    titles = ["run", *(title for title, _, _ in COLUMNS), "state"]
    lines = ["# Comparison", "", _cells(titles), _cells(["---"] * len(titles))]
    for run in found.runs:
        state = run.point.reason or run.point.state
        lines.append(_cells([f"`{run.name}`", *(value(run) for _, _, value in COLUMNS), state]))
    for title, told in _sections(found):
        if told:
            lines += ["", f"## {title[0].upper()}{title[1:]}", "", *(f"- {said}" for said in told)]
    lines += ["", "## Runs", "", *(f"- {run.name}: `{run.point.directory}`" for run in found.runs)]
    return "\n".join(lines) + "\n"


def _cells(values: list[str]) -> str:
    return f"| {' | '.join(value.replace('|', chr(92) + '|') for value in values)} |"


def as_dict(found: Comparison) -> dict[str, Any]:
    """The comparison as JSON values; GiB, seconds, tokens a second of all ranks together."""
    return {
        "first": found.runs[0].name,
        "runs": [
            {
                "name": run.name,
                "directory": str(run.point.directory),
                "state": run.point.state,
                "reason": run.point.reason,
                "measured": asdict(run.measured),
                "apart": None if run.apart is None else {**asdict(run.apart), "same": run.apart.same},
                "not_comparable": list(run.not_comparable),
                "verdict": run.verdict,
                "differing": {d.key: d.values[number] for d in found.differences},
            }
            for number, run in enumerate(found.runs)
        ],
        "notes": list(found.notes),
    }


def as_csv(found: Comparison) -> str:
    """One row a run: what it measured, then the settings in which runs differ."""
    metrics = dict.fromkeys(key for run in found.runs for key in {**run.measured.before, **run.measured.after})
    rows = []
    for number, run in enumerate(found.runs):
        measured = asdict(run.measured)
        before, after, quartiles = (measured.pop(key) for key in ("before", "after", "tokens_per_s_quartiles"))
        low, high = quartiles or (None, None)
        distance = asdict(run.apart) if run.apart else {}
        rows.append(
            {
                "name": run.name,
                "directory": str(run.point.directory),
                "state": run.point.state,
                "reason": run.point.reason,
                **measured,
                "tokens_per_s_low": low,
                "tokens_per_s_high": high,
                "apart_early": distance.get("early"),
                "apart_early_step": distance.get("early_step"),
                "apart_drift": distance.get("drift"),
                "apart_drift_step": distance.get("drift_step"),
                "not_comparable": "; ".join(run.not_comparable),
                **{f"before/{key}": before.get(key) for key in metrics},
                **{f"after/{key}": after.get(key) for key in metrics},
                **{d.key: d.values[number] for d in found.differences},
            }
        )
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
