"""The points of `train -m` as a table of 80 columns: how each ended, its losses, speed and memory, and what told it apart."""

from __future__ import annotations

import textwrap
from pathlib import Path

from launch.compare.run_files import Point, measure, read_point
from strategies.errors import ConfigError

WIDTH = 80
LEAST = 24
"""Columns of words, however long the numbers before them are."""
SHORT = {"failed": "failed", "preempted": "stopped", "not started": "not run"}


def table(labels: list[str], run_dirs: list[Path], codes: list[int]) -> str:
    """What a person reads when the points have ended; `codes` are those of the points that were started, in their order."""
    numbers = ("steps", 6), ("loss", 8), ("held-out", 9), ("tokens/s", 9), ("GiB", 6)
    lines = [f"{'':<8}" + "".join(f"{title:>{width}}" for title, width in numbers) + "  point"]
    for number, (label, run_dir) in enumerate(zip(labels, run_dirs, strict=True)):
        code = codes[number] if number < len(codes) else None
        try:
            point = read_point(run_dir) if code is not None else None
            reason = point.reason if point is not None else None
        except ConfigError as error:
            point, reason = None, " ".join(error.problems)
        cells = _cells(point)
        head = f"{_state(code, point):<8}" + "".join(
            f"{cell:>{width}}" for cell, (_, width) in zip(cells, numbers, strict=True)
        )
        words = textwrap.wrap(label, max(LEAST, WIDTH - len(head) - 2), break_on_hyphens=False)
        lines += [f"{head}  {words[0]}", *(" " * (len(head) + 2) + line for line in words[1:])]
        indent = " " * 10
        lines += textwrap.wrap(
            reason or "", WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )
    return "\n".join([*lines, "", f"side by side: shardtune compare {run_dirs[0].parent}"])


def _state(code: int | None, point: Point | None) -> str:
    if code is None:
        return "not run"
    if code == 0:
        return "done"
    return SHORT.get(point.state, f"exit {code}") if point is not None else f"exit {code}"


def _cells(point: Point | None) -> tuple[str, ...]:
    if point is None or not point.steps:
        return ("-",) * 5
    found = measure(point)
    watched = str(point.config.get("evaluation.watch") or "eval/loss")
    return (
        str(max(point.steps)),
        _number(found.loss, ".4f"),
        _number(found.after.get(watched), ".4f"),
        _number(found.tokens_per_s, ",.0f"),
        _number(found.memory_gib, ".3g"),
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
