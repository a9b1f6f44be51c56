"""How time, memory and disk of data preparation grow with the rows: with the audit and the search for near copies.

python -m benchmarks.preparation_scaling [--rows 100000,300000,1000000] [--workers 2]. The conversations are those of
`conversations.py`; every fiftieth is a near copy of an earlier one. Each size is a process of its own with an empty cache.
Writes benchmarks/results/preparation_scaling.json after each size.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "peers")]  # the benchmarks' scripts import each other by their own names

from conversations import conversations, make_inputs  # noqa: E402
from environments import WORK, hardware  # noqa: E402
from meter import Meter  # noqa: E402

RESULTS = HERE / "results" / "preparation_scaling.json"
COPY_EVERY = 50
"""Every so many rows, one is a copy of an earlier row with one word replaced in its last turn."""
KEPT_ROWS = 1000
"""The last rows of which one is copied."""
LOOK_S = 0.5
"""Seconds between two looks at memory and disk."""
MIB = 2**20


def rows_with_near_copies(count: int) -> Iterator[dict[str, Any]]:
    """`count` conversations, some of them near copies of earlier ones."""
    draw = random.Random(11)
    recent: list[dict[str, Any]] = []
    for number, row in enumerate(conversations(count)):
        if number % COPY_EVERY == COPY_EVERY - 1:
            *turns, last = draw.choice(recent)["messages"]
            words = last["content"].split(" ")
            words[draw.randrange(len(words))] = "replaced"
            yield {"messages": [*turns, {**last, "content": " ".join(words)}]}
            continue
        recent.append(row)
        del recent[:-KEPT_ROWS]
        yield row


def make_rows(count: int) -> Path:
    """The JSONL file of `count` rows; made once."""
    path = WORK / f"scaling-{count}.jsonl"
    if not path.exists():
        partial = path.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as file:
            for row in rows_with_near_copies(count):
                file.write(json.dumps(row) + "\n")
        partial.rename(path)
    return path


def prepare_here(data: Path, cache: Path, workers: int) -> None:
    """Prepare `data` in this process, and print what it took, as JSON."""
    from transformers import AutoTokenizer

    from trainer.data import prepare
    from trainer.data.config import DataConfig, DuplicatePolicy, DuplicatesConfig
    from trainer.objectives.sft import SftDataSpec

    config = DataConfig(
        path=str(data),
        cache_dir=str(cache),
        max_length=2048,
        max_bad_share=1.0,
        duplicates=DuplicatesConfig(near=DuplicatePolicy.report),
        workers=workers,
    )
    meter = Meter()
    prepare.choose_splits = meter.wrapped("choose", prepare.choose_splits)
    tokenizer = AutoTokenizer.from_pretrained(make_inputs(WORK / "input-20000", 20_000).parent / "plain")
    with meter("all"):
        prepared = prepare.Preparation(config, tokenizer, SftDataSpec(), seed=1).open_or_prepare()
    train = prepared.train
    near = prepared.report["duplicates"]["near"]
    meter.report(
        documents=len(train), tokens=int(train.lengths.sum()), near_copies=near["documents"], search=near["search"]
    )


def measure(data: Path, workers: int) -> dict[str, Any]:
    """Prepare `data` in a process of its own: seconds, and the most memory and disk that it had at a time, in MiB."""
    cache = WORK / "scaling-cache"
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir(parents=True)
    command = [
        sys.executable,
        "-m",
        "benchmarks.preparation_scaling",
        "--workers",
        str(workers),
        "--prepare",
        str(data),
    ]
    log = WORK / "scaling-log.txt"
    load_before = os.getloadavg()[0]
    peaks: dict[str, float] = {}
    with log.open("w", encoding="utf-8") as file:
        one_thread = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "RAYON", "ARROW")}
        process = subprocess.Popen(
            [*command, "--cache", str(cache)], stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **one_thread}
        )
        while process.poll() is None:
            for name, now in looked_at(process.pid, cache).items():
                peaks[name] = round(max(peaks.get(name, 0), now / MIB), 1)
            time.sleep(LOOK_S)
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}\n{log.read_text(encoding='utf-8')[-2000:]}")
    made = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    stored = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    input_mib = data.stat().st_size / MIB
    shutil.rmtree(cache)
    return {
        "input_mib": round(input_mib, 1),
        "stored_mib": round(stored / MIB, 1),
        "peaks_mib": peaks,
        "load": [round(load_before, 1), round(os.getloadavg()[0], 1)],
        **made,
    }


def looked_at(pid: int, cache: Path) -> dict[str, float]:
    """Bytes that a preparation has now, all its processes together.

    "memory": what they share is counted once (PSS); "anonymous": the part of it that stands for no file, which the system
    cannot drop. "cache": the files in its directory. "nameless": the files of its search for near copies.
    """
    found = {"memory": 0.0, "anonymous": 0.0, "cache": 0.0, "nameless": 0.0}
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return found
    for process in processes:
        try:
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="utf-8")
            maps = Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8")
        except OSError:  # it has just ended
            continue
        fields = dict(line.split()[:2] for line in rollup.splitlines()[1:])
        found["memory"] += 1024 * int(fields["Pss:"])
        found["anonymous"] += 1024 * int(fields["Pss_Anon:"])
        if process.pid == pid:
            found["nameless"] = sum(_length(line) for line in maps.splitlines() if _is_nameless(line, cache))
    for path in cache.rglob("*"):
        try:
            found["cache"] += path.stat().st_size if path.is_file() else 0
        except OSError:  # renamed meanwhile
            continue
    return found


def _is_nameless(line: str, cache: Path) -> bool:
    """Whether a line of `/proc/<pid>/maps` stands for a file that was made in the cache and has no name."""
    return str(cache) in line and line.endswith("(deleted)")


def _length(line: str) -> int:
    """Bytes of the mapping that a line of `/proc/<pid>/maps` stands for."""
    begin, end = line.split()[0].split("-")
    return int(end, 16) - int(begin, 16)


def main() -> None:
    """Measure each size in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="100000,300000,1000000")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.prepare is not None:
        prepare_here(asked.prepare, asked.cache, asked.workers)
        return
    WORK.mkdir(parents=True, exist_ok=True)
    for count in map(int, asked.rows.split(",")):
        found = measure(make_rows(count), asked.workers)
        results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
        results["hardware"] = hardware()
        results[str(count)] = {"workers": asked.workers, **found}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(count, json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
