"""What every script of this directory shares: its command line, and what a stretch of its work cost. Standard library only.

The scripts run in the environments of different projects, so nothing of shardtune may be imported here.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def arguments(description: str) -> argparse.Namespace:
    """The command line: where the data and the tokenizer are, where the result goes, and how it is made."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help="JSONL file of conversations")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory of a tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="directory for everything that is written")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a pack")
    parser.add_argument("--processes", type=int, default=1, help="processes that prepare data")
    parser.add_argument("--count", action="store_true", help="also count what was made, after the measurement")
    parser.add_argument("--audit", choices=("default", "none"), default="default", help="shardtune: the audit")
    return parser.parse_args()


def cpu_seconds() -> float:
    """CPU seconds of this process and of its children that have ended, user and system."""
    both = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def own_peak() -> float:
    """Most memory this process has held, in MB; `ru_maxrss` would remember the process that started it."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Meter:
    """CPU and wall seconds of named stretches of work, each measured once."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure the block as `<name>_cpu` and `<name>_wall`."""
        cpu, wall = cpu_seconds(), time.perf_counter()
        yield
        self.found[f"{name}_cpu"] = cpu_seconds() - cpu
        self.found[f"{name}_wall"] = time.perf_counter() - wall

    def wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, measured under `name` when it is called."""

        def call(*positional: Any, **named: Any) -> Any:
            with self(name):
                return function(*positional, **named)

        return call

    def report(self, **more: Any) -> None:
        """Print one line of JSON, the last of the output: the times, peak memory in MB, and `more`."""
        peak = own_peak()
        child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print("\n" + json.dumps({**self.found, "rss_self": peak, "rss_child": child, **more}), flush=True)


def count_labels(rows: Any, column: str) -> dict[str, int]:
    """Rows, tokens and supervised tokens of a `datasets` table whose label -100 is not learned; padding is left out."""
    tokens = supervised = 0
    wanted = {"input_ids", "attention_mask", column}
    for row in rows.select_columns([name for name in rows.column_names if name in wanted]):
        real = row.get("attention_mask") or [1] * len(row["input_ids"])
        tokens += sum(1 for mark in real if mark)
        supervised += sum(1 for label in row[column] if label != -100)
    return {"rows": len(rows), "tokens": tokens, "supervised": supervised}


def own_caches(out: Path) -> None:
    """Keep what the Hugging Face libraries write inside `out`, and off the network. Call before importing them."""
    os.environ["HF_HOME"] = str(out / "hf")
    os.environ["HF_DATASETS_CACHE"] = str(out / "datasets")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
