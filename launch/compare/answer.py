"""Prints a comparison as tables, and as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from launch.compare import repeats
from launch.compare.comparison import ComparedRun, Comparison, rounded
from launch.compare.events import notable_step_lines, resolved_settings
from launch.output import Column, TableRow, fold_all, table
from trainer.reporting.numbers import short

MeasureColumn = tuple[str, Callable[[ComparedRun], str]]
"""A column's title, and a run's cell in it."""


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _rate(value: float | None) -> str:
    return _number(value, ",.0f" if value is None or value >= 100 else ".1f")


MAIN_COLUMNS: tuple[MeasureColumn, ...] = (
    ("steps", lambda run: str(run.measured.steps)),
    ("loss", lambda run: _number(run.measured.loss, ".4f")),
    ("apart", lambda run: rounded(run.loss_difference.early) if run.loss_difference else "-"),
    ("tokens/s", lambda run: _rate(run.measured.tokens_per_s)),
    ("learned/s", lambda run: _rate(run.measured.supervised_tokens_per_s or None)),
    ("MFU", lambda run: _number(run.measured.mfu, ".1%")),
    ("GiB", lambda run: _number(run.measured.memory_gib, ".3g")),
)
COST_COLUMNS: tuple[MeasureColumn, ...] = (
    ("repeats", lambda run: _spread(run)),
    ("planned", lambda run: _number(run.measured.planned_gib, ".3g")),
    ("start s", lambda run: _number(_start_seconds(run), ".1f")),
    ("save s", lambda run: _number(run.measured.checkpoint_s, ".2f")),
    ("GiB saved", lambda run: _number(run.measured.checkpoint_gib, ".3g")),
    ("$/M", lambda run: _number(run.summary.dollars_per_million, ".3g")),
)
STEP_PART_COLUMNS: tuple[MeasureColumn, ...] = (
    ("whole", lambda run: _milliseconds(run.measured.step_s)),
    *(
        (name, lambda run, name=name: _milliseconds(run.summary.parts_s.get(name)))
        for name in ("data", "forward", "backward", "optimizer", "rest")
    ),
)
EXCHANGE_COLUMNS: tuple[MeasureColumn, ...] = (
    ("GiB a step", lambda run: _number(run.measured.exchanged_gib, ".3g")),
    ("planned", lambda run: _number(run.measured.planned_exchanged_gib, ".3g")),
    ("exposed ms", lambda run: _milliseconds(run.measured.exposed_s)),
)


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.3g}" if seconds < 1 else f"{seconds * 1000:,.0f}"


def _start_seconds(run: ComparedRun) -> float | None:
    """Seconds to the first step, without the evaluation before it."""
    m = run.measured
    return None if m.start_s is None else m.start_s - (m.evaluation_before_s or 0)


def _spread(run: ComparedRun) -> str:
    spread = run.summary.spread
    return "-" if spread is None else f"{_rate(spread[0])}-{_rate(spread[1])}"


def tables(comparison: Comparison) -> list[tuple[str, list[MeasureColumn]]]:
    """(title, columns) of each table; of those behind the first, columns in which no row has anything are left out."""
    begun = [run for run in comparison.runs if run.measured.steps]
    more = [("what it took", COST_COLUMNS)]
    more += [("a step in ms", STEP_PART_COLUMNS)] if any(run.summary.parts_s for run in begun) else []
    more += [("exchanged", EXCHANGE_COLUMNS)] if any(run.measured.exchanged_gib for run in begun) else []
    first = [(title, cell_of) for title, cell_of in MAIN_COLUMNS if len(comparison.runs) > 1 or title != "apart"]
    shown = [("", first)]
    for name, measures in more:
        known = [(title, cell_of) for title, cell_of in measures if any(cell_of(run) != "-" for run in begun)]
        shown += [(name, known)] if known else []
    return shown


def as_text(comparison: Comparison) -> str:
    """What a person reads in a terminal."""
    lines: list[str] = []
    for name, measures in tables(comparison):
        columns = [Column(f"{name}:" if name else ""), *(Column(title, is_number=True) for title, _ in measures)]
        rows = []
        for run in comparison.runs:
            if name and not run.measured.steps:
                continue  # only the first table has runs that never began
            notes = fold_all([run.repeated.reason]) if run.repeated.reason and not name else []
            rows.append(TableRow([run.name, *(cell_of(run) for _, cell_of in measures)], notes))
        lines += [*([""] if lines else []), *table(columns, rows)]
    for title, sentences in sections(comparison):
        lines += ["", f"{title}:", *fold_all(sentences)] if sentences else []
    return "\n".join(lines)


def sections(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """(title, lines) of what is said below the tables."""
    return [
        ("verdict", [run.verdict for run in comparison.runs]),
        ("loss curves", _curves(comparison)),
        ("held-out metrics, before and after", _evaluations(comparison)),
        ("steps that stood out", notable_step_lines(comparison)),
        ("what differs", [f"{d.key}: {', '.join(short(value) for value in d.values)}" for d in comparison.differences]),
        ("substituted", resolved_settings(comparison)),
        ("to know", list(comparison.notes)),
    ]


def _curves(comparison: Comparison) -> list[str]:
    lines = []
    for run in comparison.runs:
        if run.against is None:
            continue
        if run.not_comparable:
            lines.append(f"{run.name}: not comparable with {run.against}: {'; '.join(run.not_comparable)}")
        elif run.loss_difference is None:
            lines.append(f"{run.name}: no step with a loss that {run.against} has too")
        else:
            a = run.loss_difference
            lines.append(
                f"{run.name} beside {run.against}: largest relative difference {rounded(a.early)} over the first five steps "
                f"(step {a.early_step}), {rounded(a.drift)} over all {a.steps} common ones (step {a.drift_step})"
            )
    return lines


def _evaluations(comparison: Comparison) -> list[str]:
    metrics = dict.fromkeys(key for run in comparison.runs for key in {**run.measured.before, **run.measured.after})
    lines = []
    for metric in metrics:
        for run in comparison.runs:
            before, after = run.measured.before.get(metric), run.measured.after.get(metric)
            if before is not None or after is not None:
                lines.append(f"{metric}  {run.name}: {_number(before, '.4f')} -> {_number(after, '.4f')}")
    return lines


def cell_tables(comparison: Comparison) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, headings, cells of each row) of each table; the first one ends with each run's state."""
    plain = []
    for title, columns in tables(comparison):
        headings = ["run", *(name for name, _ in columns), *([] if title else ["state"])]
        rows = [
            [
                run.name,
                *(value(run) for _, value in columns),
                *([] if title else [run.repeated.reason or run.repeated.state]),
            ]
            for run in comparison.runs
            if not title or run.measured.steps
        ]
        plain.append((title, headings, rows))
    return plain


def as_markdown(comparison: Comparison, pictures: Sequence[tuple[str, str]] = ()) -> str:
    """The same as a page; `pictures` are (title, path beside it) of plots."""
    lines = [f"# Run {comparison.first}" if len(comparison.runs) == 1 else "# Comparison"]
    for title, headings, rows in cell_tables(comparison):
        lines += ["", *([f"## {title[0].upper()}{title[1:]}", ""] if title else [])]
        lines += [_markdown_row(headings), _markdown_row(["---"] * len(headings))]
        lines += [_markdown_row([f"`{name}`", *cells]) for name, *cells in rows]
    for title, told in sections(comparison):
        if told:
            lines += ["", f"## {title[0].upper()}{title[1:]}", "", *(f"- {said}" for said in told)]
    for title, path in pictures:
        lines += ["", f"## {title}", "", f"![{title}]({path})"]
    lines += ["", "## Runs", ""]
    lines += [
        f"- {run.name}: {', '.join(f'`{point.directory}`' for point in run.repeated.points)}"
        for run in comparison.runs
        if run.repeated.row.directories
    ]
    return "\n".join(lines) + "\n"


def as_html(comparison: Comparison, *, again_s: float | None = None) -> str:
    """The same as one HTML file with plots, read anew by a browser after `again_s` seconds; needs the extra `report`."""
    from launch.compare.page import render_page

    return render_page(comparison, cell_tables(comparison), sections(comparison), again_s=again_s)


def _markdown_row(values: list[str]) -> str:
    return f"| {' | '.join(value.replace('|', chr(92) + '|') for value in values)} |"


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON values; GiB, seconds, tokens a second of all ranks together."""
    return {
        "first": comparison.first,
        "runs": [
            {
                "name": run.name,
                "directory": str(run.point.directory) if run.repeated.row.directories else None,
                "repeats": [str(point.directory) for point in run.repeated.points if run.repeated.row.directories],
                "state": run.repeated.state,
                "reason": run.repeated.reason,
                "measured": asdict(run.measured) | asdict(run.summary),
                "against": run.against,
                "apart": None
                if run.loss_difference is None
                else {**asdict(run.loss_difference), "same": run.loss_difference.same},
                "not_comparable": list(run.not_comparable),
                "verdict": run.verdict,
                "differing": {d.key: d.values[number] for d in comparison.differences},
            }
            for number, run in enumerate(comparison.runs)
        ],
        "notes": list(comparison.notes),
    }


def as_csv(comparison: Comparison) -> str:
    """One row a run: what it measured, then the settings in which runs differ."""
    metrics = dict.fromkeys(key for run in comparison.runs for key in {**run.measured.before, **run.measured.after})
    collectives = dict.fromkeys(name for run in comparison.runs for name in run.measured.exchanged_bytes)
    rows = []
    for number, run in enumerate(comparison.runs):
        measured = asdict(run.measured)
        before, after, quartiles = (measured.pop(key) for key in ("before", "after", "tokens_per_s_quartiles"))
        low, high = quartiles or (None, None)
        exchanged = measured.pop("exchanged_bytes")
        measured |= {f"exchanged_{name}_gib": exchanged.get(name, 0) / 2**30 for name in collectives}
        taken = {
            key: value for key, value in asdict(run.summary).items() if key not in ("tokens_per_s_repeats", "parts_s")
        }
        taken |= {f"{part}_s": run.summary.parts_s.get(part) for part in (*repeats.STEP_PARTS, "rest")}
        slowest, fastest = run.summary.spread or (None, None)
        distance = asdict(run.loss_difference) if run.loss_difference else {}
        rows.append(
            {
                "name": run.name,
                "directory": str(run.point.directory) if run.repeated.row.directories else None,
                "state": run.repeated.state,
                "reason": run.repeated.reason,
                "verdict": run.verdict,
                **measured,
                "tokens_per_s_low": low,
                "tokens_per_s_high": high,
                **taken,
                "tokens_per_s_slowest": slowest,
                "tokens_per_s_fastest": fastest,
                "against": run.against,
                "apart_early": distance.get("early"),
                "apart_early_step": distance.get("early_step"),
                "apart_drift": distance.get("drift"),
                "apart_drift_step": distance.get("drift_step"),
                "not_comparable": "; ".join(run.not_comparable),
                **{f"before/{key}": before.get(key) for key in metrics},
                **{f"after/{key}": after.get(key) for key in metrics},
                **{d.key: d.values[number] for d in comparison.differences},
            }
        )
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
