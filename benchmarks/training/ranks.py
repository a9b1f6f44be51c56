"""Several processes of one thread: shardtune's strategies beside what the machine gives to processes that do not talk."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from environments import HERE, WORK

from training.drive import Failed, Work, reason

STRATEGIES = ("ddp", "fsdp2", "zero2")
SINGLE = "one process"
APART = "independent processes"
CLOSE = 1e-5
"""Largest relative difference of the loss from one process's."""
WARM = 2
"""Steps left out of the rate."""


def command(work: Work, out: Path, strategy: str, processes: int, steps: int, batch: int) -> list[str]:
    """What a user would type; the global batch is the same for any number of processes."""
    words = {
        "model.path": work.inputs / "model",
        "data.path": work.inputs / "train.jsonl",
        "data.eval_path": work.inputs / "eval.jsonl",
        "data.cache_dir": WORK / "training" / "ranks-cache",
        "data.shuffle": "false",
        "batch.global": batch,
        "batch.micro": batch // processes,
        "budget.steps": steps,
        "strategy": strategy,
        "launcher.processes": processes,
        "precision": "fp32",
        "optim.lr": 1e-3,
        "schedule": "constant",
        "logging.every_steps": WARM,
        "logging.wandb": "disabled",
        "export.at_end": "false",
        "run.threads": 1,
        "run.device": "cpu",
        "run.dir": out,
    }
    return [sys.executable, "-m", "launch.main", "train", *(f"{key}={value}" for key, value in words.items())]


def start(words: list[str], out: Path) -> subprocess.Popen:
    """Begin a run; its output goes to `<out>.log`."""
    shutil.rmtree(out, ignore_errors=True)
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with out.with_suffix(".log").open("w") as log:
        return subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=out.parent)


def speed(out: Path) -> tuple[float, list[float]]:
    """(tokens a second of wall time after the warm-up, the losses) of a finished run, from its own `metrics.jsonl`."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    steps = [row for row in found if "step_s" in row]
    counted = steps[WARM:]
    rate = sum(row["step_tokens"] for row in counted) / sum(row["step_s"] for row in counted)
    return rate, [row["loss"] for row in steps]


def once(work: Work, what: str, ranks: int, steps: int, batch: int) -> tuple[float, list[float]]:
    """Tokens a second of one way to use the machine, and its losses. Raises Failed."""
    base = WORK / "training" / "ranks"
    base.mkdir(parents=True, exist_ok=True)
    if what in STRATEGIES:
        runs = [(base / what, command(work, base / what, what, ranks, steps, batch))]
    else:
        count = ranks if what == APART else 1
        places = [base / f"{what.replace(' ', '-')}-{number}" for number in range(count)]
        runs = [(place, command(work, place, "single", 1, steps, batch)) for place in places]
    processes = [(out, start(words, out)) for out, words in runs]
    try:
        for out, process in processes:
            if process.wait(timeout=600):
                raise Failed(reason(out.with_suffix(".log").read_text(errors="replace")))
    finally:
        for _, process in processes:
            if process.poll() is None:
                process.terminate()
    found = [speed(out) for out, _ in processes]
    return sum(rate for rate, _ in found), found[0][1]


def main(args: argparse.Namespace, facts: dict[str, Any], work: Work, keep: Callable[..., None]) -> int:
    """Measure in turn, and write `training_ranks`; 1 where a strategy failed or its loss differs from one process's."""
    began = time.monotonic()
    steps, batch = WARM + args.steps * 2, 4 * args.ranks
    rates: dict[str, list[float]] = {what: [] for what in (SINGLE, APART, *STRATEGIES)}
    losses: dict[str, list[float]] = {}
    loads = []
    once(work, SINGLE, args.ranks, 1 + WARM, batch)  # prepares the data, once for all
    for number in range(facts["rounds"]):
        for what in rates if number % 2 == 0 else reversed(rates):
            rate, losses[what] = once(work, what, args.ranks, steps, batch)
            rates[what].append(rate)
            loads.append(os.getloadavg()[0])
            print(f"  round {number + 1}: {what}: {rate:.0f} tokens/s, load {loads[-1]:.1f}", flush=True)
    pairs = {what: zip(losses[what], losses[SINGLE], strict=True) for what in STRATEGIES}
    apart = {what: max(abs(a - b) / b for a, b in each) for what, each in pairs.items()}
    scaling = {what: median(a / b for a, b in zip(each, rates[SINGLE], strict=True)) for what, each in rates.items()}
    facts |= {"minutes": (time.monotonic() - began) / 60, "rates": rates, "scaling": scaling, "difference": apart}
    keep(args.results, "training_ranks", report(args.ranks, batch, steps, facts, loads), facts)
    return int(max(apart.values()) > CLOSE)


def report(ranks: int, batch: int, steps: int, facts: dict[str, Any], loads: list[float]) -> str:
    """The results as Markdown."""
    scaling, apart = facts["scaling"], facts["difference"]
    lines = [
        f"# Training on {ranks} processes: results",
        "",
        f"Command: `{facts['command']}` ({facts['minutes']:.0f} minutes)",
        "",
        f"{facts['hardware']}; load average {min(loads):.1f} to {max(loads):.1f} while it ran. Wall time: only a quiet "
        "machine gives true figures.",
        "",
        f"shardtune, full fine-tuning in fp32. {facts['model']}, {batch} conversations a step in all, one thread a process, "
        f"{steps - WARM} steps after {WARM} of warm-up; medians of {facts['rounds']} rounds in turn.",
        "",
        "| way | tokens/s | times one process | largest difference of a loss |",
        "| --- | --- | --- | --- |",
    ]
    for what, each in facts["rates"].items():
        name = f"{ranks} {what} (the limit)" if what == APART else what
        difference = f"{apart[what]:.1e}" if what in apart else "-"
        lines.append(f"| {name} | {median(each):,.0f} | {scaling[what]:.2f} | {difference} |")
    goal = min(scaling[what] for what in ("fsdp2", "zero2"))
    lines += ["", f"- fsdp2 and zero2 on {ranks} processes: {goal:.2f} times one process (at least 1.6): "]
    lines[-1] += "holds" if goal >= 1.6 else "MISSED"
    return "\n".join(lines) + "\n"
