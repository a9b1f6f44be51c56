"""Benchmark of data preparation: shardtune and its peers on the same conversations, from JSONL to packs on disk.

Makes the data and the tokenizer, an environment for each peer, and `benchmarks/results/data_preparation.md`. Every
measurement is a process of its own (`benchmarks/peers/run_*.py`) with fresh caches; see `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversations import make_inputs
from environments import WORK, hardware, install, python_of

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "data_preparation.md"
NOTES = "\n## Notes\n"
"""What follows it in the results was written by hand, and stays."""
LENGTH = 2048
PEERS = ("trl", "llamafactory", "datasets", "axolotl")


@dataclass(slots=True)
class Case:
    """One way of preparing the data."""

    name: str
    script: str
    environment: str | None
    """Name under `.envs`; None for the environment that runs this driver."""
    tokenizer: str = "plain"
    """Which of `conversations.TEMPLATES` its tokenizer has."""
    options: tuple[str, ...] = ()
    rounds: bool = True
    """Whether it takes part in the alternating rounds; otherwise it runs once."""


CASES = [
    Case("shardtune, defaults", "shardtune", None),
    Case("shardtune, no audit", "shardtune", None, options=("--audit=none",)),
    Case("shardtune, defaults, generation template", "shardtune", None, "generation", rounds=False),
    Case("TRL (bfd)", "trl", "trl", "generation"),
    Case("LLaMA-Factory (neat packing)", "llamafactory", "llamafactory"),
    Case("datasets.map batched (no packs)", "datasets", "datasets", "generation"),
    Case("axolotl (packs not made)", "axolotl", "axolotl", rounds=False),
]
OURS = CASES[0].name
FIGURES = ("all_cpu", "all_wall", "process_cpu", "process_wall", "rss")


def measure(case: Case, data: Path, *, processes: int = 1, count: bool = False) -> dict[str, Any]:
    """Run one case in a process of its own. Raises RuntimeError, led by the case, with the end of what it printed."""
    out = WORK / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    command = [
        python_of(case.environment),
        str(HERE / "peers" / f"run_{case.script}.py"),
        f"--data={data}",
        f"--out={out}",
    ]
    command += [f"--tokenizer={data.parent / case.tokenizer}", f"--length={LENGTH}", f"--processes={processes}"]
    command += [*case.options, *(["--count"] if count else [])]
    one_thread = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "RAYON", "ARROW")}
    environment = {**os.environ, **one_thread, "TOKENIZERS_PARALLELISM": "false"}
    if case.environment is None:
        environment["PYTHONPATH"] = str(HERE.parent)
    log = WORK / "log.txt"
    began = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=out)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{case.name}: exit code {process.returncode}\n{log.read_text(encoding='utf-8')[-2000:]}")
    found = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    found["process_cpu"], found["process_wall"] = usage.ru_utime + usage.ru_stime, time.perf_counter() - began
    found["rss"] = max(found["rss_self"], found["rss_child"])
    return found


def pack_many(count: int) -> dict[str, float]:
    """Packing alone: CPU seconds and fill for `count` lengths of the same kind as the conversations'."""
    sys.path.insert(0, str(HERE.parent))
    import numpy as np

    from trainer.data.batches.mixing import best_fit_decreasing

    drawn = np.random.default_rng(1).lognormal(4.8, 0.55, count)
    lengths = np.clip(drawn, 8, LENGTH).astype(np.int64)
    began = time.process_time()
    packs = best_fit_decreasing(lengths, LENGTH)
    seconds = time.process_time() - began
    return {"seconds": seconds, "fill": float(lengths.sum()) / LENGTH / len(packs), "mean": float(lengths.mean())}


def say(case: Case, found: dict[str, Any], what: str) -> None:
    """One line on the terminal for a measurement."""
    print(
        f"{what}: {case.name}: {found['all_cpu']:.2f} CPU-s, {found['all_wall']:.2f} s, {found['rss']:.0f} MB",
        flush=True,
    )


def check(cases: list[Case], data: Path, failed: dict[str, str]) -> tuple[dict[str, Any], list[Case]]:
    """What each case makes, by name, and the cases that work; the others are added to `failed`."""
    made, working = {}, []
    for case in cases:
        try:
            made[case.name] = measure(case, data, count=True)
        except (RuntimeError, json.JSONDecodeError, IndexError) as error:
            print(error, file=sys.stderr)
            failed[case.name] = str(error).strip().splitlines()[-1]
            continue
        say(case, made[case.name], "check")
        working.append(case)
    return made, working


def run_rounds(cases: list[Case], data: Path, rounds: int) -> dict[str, Any]:
    """Medians of the figures by case, and the samples per CPU second of every round. The order turns round each time."""
    found: dict[str, list[dict[str, Any]]] = {case.name: [] for case in cases}
    for number in range(rounds):
        for case in cases if number % 2 == 0 else cases[::-1]:
            if case.rounds or number == 0:
                load = os.getloadavg()[0]
                found[case.name].append({**measure(case, data), "load": load})
                say(case, found[case.name][-1], f"round {number + 1}, load {load:.1f}")
    return {
        name: {figure: statistics.median(run[figure] for run in runs) for figure in FIGURES}
        | {"runs": len(runs), "each": [run["all_cpu"] for run in runs], "load": [run["load"] for run in runs]}
        for name, runs in found.items()
    }


def report(facts: dict[str, Any]) -> str:
    """The results as Markdown."""
    samples, measured, two = facts["samples"], facts["measured"], facts["two"]
    loads = [load for one in measured.values() for load in one["load"]]
    versions = sorted({one["version"] for one in facts["checked"].values() if "version" in one})
    ours = measured[OURS]["each"]
    lines = [
        "# Data preparation: results",
        "",
        f"Command: `{facts['command']}`",
        "",
        f"Setup: {samples:,} conversations, packs of {LENGTH:,} tokens, one process and one thread. {facts['hardware']}; load "
        f"average {min(loads):.1f} to {max(loads):.1f}. {'; '.join(versions)}. Medians of {facts['rounds']} alternating rounds, "
        "unless the last column has fewer rounds.",
        "",
        "| trainer | samples/CPU-s | CPU-s | times the CPU of shardtune | elapsed s | samples/CPU-s, whole process | "
        "peak MB | CPU-s of the rounds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, one in measured.items():
        each = ", ".join(f"{value:.1f}" for value in one["each"])
        ratio = statistics.median(theirs / own for theirs, own in zip(one["each"], ours, strict=False))
        lines.append(
            f"| {name} | {samples / one['all_cpu']:,.0f} | {one['all_cpu']:.1f} | {ratio:.2f} | "
            f"{one['all_wall']:.1f} | {samples / one['process_cpu']:,.0f} | {one['rss']:,.0f} | {each} |"
        )
    lines += [
        "",
        "Two processes, one run each:",
        "",
        "| trainer | samples per elapsed second | samples/CPU-s | peak MB, largest process |",
    ]
    lines.append("| --- | --- | --- | --- |")
    for name, one in two.items():
        rates = f"{samples / one['all_wall']:,.0f} | {samples / one['all_cpu']:,.0f}"
        lines.append(f"| {name} | {rates} | {one['rss']:,.0f} |")
    lines += [
        "",
        "Result of each trainer:",
        "",
        "| trainer | tokens | supervised tokens | packs |",
        "| --- | --- | --- | --- |",
    ]
    for name, one in facts["checked"].items():
        lines.append(f"| {name} | {one['tokens']:,} | {one['supervised']:,} | {one['rows'] or '-'} |")
    pack = facts["packing"]
    lines += [
        "",
        f"Packing alone (`best_fit_decreasing`, 1,000,000 lengths with mean {pack['mean']:.0f}): {pack['seconds']:.2f} "
        f"CPU-s, fill {pack['fill']:.2%}.",
    ]
    lines += [f"\nLeft out: {name}: {trouble}" for name, trouble in facts["failed"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Install, check, measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default="trl,llamafactory,datasets", help="of trl, llamafactory, datasets, axolotl")
    parser.add_argument("--samples", type=int, default=50_000, help="conversations")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds")
    args = parser.parse_args()
    peers = [name for name in args.peers.split(",") if name]
    if unknown := [name for name in peers if name not in PEERS]:
        parser.error(f"--peers: {', '.join(unknown)} is none of {', '.join(PEERS)}")
    WORK.mkdir(exist_ok=True)
    failed = {name: trouble for name in peers if (trouble := install(name)) is not None}
    data = make_inputs(WORK / f"input-{args.samples}", args.samples)
    cases = [case for case in CASES if case.environment is None or case.environment in set(peers) - set(failed)]
    checked, cases = check(cases, data, failed)
    measured = run_rounds(cases, data, args.rounds)
    two = {}
    for case in cases:
        if case.environment or case.name == OURS:
            try:
                two[case.name] = measure(case, data, processes=2)
            except RuntimeError as error:
                failed[f"{case.name}, two processes"] = str(error).strip().splitlines()[-1]
                continue
            say(case, two[case.name], "2 processes")
    facts = {"samples": args.samples, "rounds": args.rounds, "failed": failed, "hardware": hardware()}
    facts |= {"checked": checked, "measured": measured, "two": two, "packing": pack_many(1_000_000)}
    facts["command"] = " ".join(["python benchmarks/data_preparation.py", *sys.argv[1:]])
    (WORK / "measured.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    RESULTS.write_text(
        report(facts) + NOTES + RESULTS.read_text(encoding="utf-8").partition(NOTES)[2], encoding="utf-8"
    )
    print(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
