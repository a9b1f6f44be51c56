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

from environments import HERE, WORK, install, python_of

from training.cases import AXOLOTL, FACTORY, FLATTENING, HF, NEAT, TRL, Case
from training.drive import Failed, Work, reason

STRATEGIES = ("ddp", "fsdp2", "zero2")
MICRO = 4
"""Conversations in one forward pass of one process, in every row."""
PER_RANK = (16, 4)
"""Conversations a step for each process. The first makes the product's default global batch on two, and is judged; with the
second nothing is accumulated and every pass communicates."""
SINGLE = "one process"
APART = "independent processes"
PEERS = (HF, FLATTENING, FACTORY, NEAT, TRL, AXOLOTL)
"""Who runs beside them, under torchrun with DDP, where nothing is accumulated."""
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
        "batch.micro": MICRO,
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
    with out.with_suffix(".log").open("w", encoding="utf-8") as log:
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
                raise Failed(reason(out.with_suffix(".log").read_text(errors="replace", encoding="utf-8")))
    finally:
        for _, process in processes:
            if process.poll() is None:
                process.terminate()
    found = [speed(out) for out, _ in processes]
    return sum(rate for rate, _ in found), found[0][1]


def peer(work: Work, case: Case, ranks: int, steps: int) -> tuple[float, float]:
    """(tokens a second of wall time after the warm-up, the final loss on held-out documents) under DDP. Raises Failed."""
    out = WORK / "training" / "ranks" / case.name.replace(" ", "-").replace(",", "")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    words = [python_of(case.environment), "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    words += [str(HERE / "peers" / f"train_{case.script}.py"), f"--inputs={work.inputs}", f"--out={out}"]
    words += [f"--warm={WARM}", f"--steps={steps - WARM}", "--rounds=1", f"--batch={MICRO}", *case.options]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, cwd=out, capture_output=True, text=True, timeout=600)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"event"')]
    stretches = [event for event in found if event["event"] == "stretch" and event["number"] == 1]
    ends = [event["loss"] for event in found if event["event"] == "end"]
    if done.returncode or len(stretches) < ranks or not ends:
        own = [line for line in done.stderr.splitlines() if "elastic" not in line and "ChildFailed" not in line]
        raise Failed(reason("\n".join(own)))
    return sum(event["tokens"] for event in stretches) / max(event["wall"] for event in stretches), ends[0]


def peers(work: Work, args: argparse.Namespace, steps: int, rounds: int) -> dict[str, Any]:
    """Rates by round and final losses of the peers that were asked for, and why one is left out."""
    taking_part = [case for case in PEERS if case.environment in args.peers]
    rates: dict[str, list[float]] = {}
    losses: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for case in taking_part:
        if case.environment and (trouble := install(case.environment)):
            left_out[case.name] = trouble
    for number in range(rounds):
        for case in [case for case in taking_part if case.name not in left_out]:
            try:
                rate, losses[case.name] = peer(work, case, args.ranks, steps)
            except (Failed, subprocess.TimeoutExpired) as error:
                left_out[case.name] = str(error)
                continue
            rates.setdefault(case.name, []).append(rate)
            print(f"  round {number + 1}: {case.name}: {rate:.0f} tokens/s", flush=True)
    for case in taking_part:  # as in the comparison of one process, where the first agrees with shardtune
        if case.name in losses and HF.name in losses and abs(losses[case.name] / losses[HF.name] - 1) > case.tolerance:
            left_out[case.name] = f"final loss {losses[case.name]:.4f}, not {losses[HF.name]:.4f}"
            rates.pop(case.name, None)
    return {"rates": rates, "losses": losses, "left_out": left_out}


def main(args: argparse.Namespace, facts: dict[str, Any], work: Work, keep: Callable[..., None]) -> int:
    """Measure in turn, and write `training_ranks`; 1 where a strategy failed or its loss differs from one process's."""
    began, loads, tables = time.monotonic(), [], []
    for per_rank in PER_RANK:
        tables.append(measure(work, args.ranks, WARM + args.steps * 2, per_rank * args.ranks, facts["rounds"], loads))
    others = peers(work, args, tables[-1]["steps"], facts["rounds"])
    facts |= {"minutes": (time.monotonic() - began) / 60, "tables": tables, "peers": others}
    keep(args.results, "training_ranks", report(args.ranks, facts, loads), facts)
    return int(max(apart for table in tables for apart in table["difference"].values()) > CLOSE)


def measure(work: Work, ranks: int, steps: int, batch: int, rounds: int, loads: list[float]) -> dict[str, Any]:
    """Rates by round, times one process's rate, and the largest difference of a loss, at one global batch."""
    rates: dict[str, list[float]] = {what: [] for what in (SINGLE, APART, *STRATEGIES)}
    losses: dict[str, list[float]] = {}
    once(work, SINGLE, ranks, 1 + WARM, batch)  # prepares the data, once for all
    for number in range(rounds):
        for what in rates if number % 2 == 0 else reversed(rates):
            rate, losses[what] = once(work, what, ranks, steps, batch)
            rates[what].append(rate)
            loads.append(os.getloadavg()[0])
            print(
                f"  {batch} a step, round {number + 1}: {what}: {rate:.0f} tokens/s, load {loads[-1]:.1f}", flush=True
            )
    pairs = {what: zip(losses[what], losses[SINGLE], strict=True) for what in STRATEGIES}
    return {
        "batch": batch,
        "steps": steps,
        "rates": rates,
        "scaling": {
            what: median(a / b for a, b in zip(each, rates[SINGLE], strict=True)) for what, each in rates.items()
        },
        "difference": {what: max(abs(a - b) / b for a, b in each) for what, each in pairs.items()},
    }


def report(ranks: int, facts: dict[str, Any], loads: list[float]) -> str:
    """The results as Markdown."""
    tables = facts["tables"]
    lines = [
        f"# Training on {ranks} processes: results",
        "",
        f"Command: `{facts['command']}` ({facts['minutes']:.0f} minutes)",
        "",
        "Setup:",
        "",
        f"- **Machine:** {facts['hardware']}; load average {min(loads):.1f} to {max(loads):.1f}. One thread per process.",
        f"- **Training:** full fine-tuning in fp32 with shardtune. {facts['model']}, {MICRO} conversations per forward pass.",
        f"- **Speed:** {tables[0]['steps'] - WARM} steps after {WARM} warm-up steps, in elapsed time. Other work on the machine "
        f"distorts these figures. Medians of {facts['rounds']} rounds, in which the runs take turns.",
    ]
    for table in tables:
        lines += [
            "",
            f"## {table['batch']} conversations per step",
            "",
            "| run | tokens/s | speed relative to one process | largest relative difference of a loss |",
            "| --- | --- | --- | --- |",
        ]
        for what, each in table["rates"].items():
            name = f"{ranks} {what} (upper limit)" if what == APART else what
            difference = f"{table['difference'][what]:.1e}" if what in table["difference"] else "-"
            lines.append(f"| {name} | {median(each):,.0f} | {table['scaling'][what]:.2f} | {difference} |")
    ours, others = median(tables[-1]["rates"]["ddp"]), facts["peers"]
    lines += [
        "",
        f"## Peers, {tables[-1]['batch']} conversations per step",
        "",
        f"Full fine-tuning in fp32 with torchrun, DDP over gloo, {MICRO} conversations per process. The final losses agree.",
        "",
        "| trainer | tokens/s | shardtune's ddp is |",
        "| --- | --- | --- |",
    ]
    for name, each in others["rates"].items():
        lines.append(f"| {name} | {median(each):,.0f} | {ours / median(each):.2f} times as fast |")
    lines += ["", *[f"- left out: {name}: {trouble}" for name, trouble in others["left_out"].items()]]
    goal = min(tables[0]["scaling"][what] for what in ("fsdp2", "zero2"))
    lines += [
        "",
        f"- fsdp2 and zero2 on {ranks} processes, {tables[0]['batch']} conversations per step: {goal:.2f} times one process "
        f"(at least 1.6): {'holds' if goal >= 1.6 else 'MISSED'}",
    ]
    return "\n".join(lines) + "\n"
