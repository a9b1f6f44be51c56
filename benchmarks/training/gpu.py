"""The same comparison on one GPU: a 1.5 B Llama in bf16, wall time, MFU and the GPU's memory."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import time
from collections.abc import Callable
from statistics import mean
from typing import Any

from environments import WORK, install

from training import inputs, tables
from training.cases import GPU_GROUPS
from training.drive import Work

PEAK_TFLOPS = {"H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0}
"""Dense bf16 peak of a GPU, from the makers' data sheets; the first name that matches counts."""


def name_of_gpu() -> str | None:
    """The first GPU's name, or None where there is none."""
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return said.stdout.splitlines()[0].strip() if said.stdout.strip() else None


def main(
    args: argparse.Namespace, facts: dict[str, Any], compare: Callable[..., Any], keep: Callable[..., None]
) -> int:
    """Measure one trainer after the other and write `training_gpu`; 0 with a message where there is no GPU."""
    began = time.monotonic()
    gpu = name_of_gpu()
    if gpu is None and not args.dry_run:
        print("bench-gpu: skipped: no NVIDIA GPU here (nvidia-smi found none); --dry-run goes through it on the CPU")
        return 0
    trouble = install("trl") if "trl" in args.peers else "left out by --peers"
    failed = {} if trouble is None else {"trl": trouble}
    size = inputs.TINY if args.dry_run else inputs.GPU
    where = inputs.make(WORK / f"training-{size.name}", size, train=1_024)
    rounds, steps, batch = (1, 1, 2) if args.dry_run else (args.rounds, args.steps, 32)
    work = Work(where, args.warm, steps, rounds, batch, "cpu" if args.dry_run else "cuda")
    present = {"trl"} - set(failed)
    groups = [
        dataclasses.replace(g, cases=tuple(c for c in g.cases if c.environment is None or c.environment in present))
        for g in GPU_GROUPS
    ]
    found = compare(groups, work, failed, together=False)
    facts["minutes"] = (time.monotonic() - began) / 60
    peak = next((value * 1e12 for name, value in PEAK_TFLOPS.items() if name in (gpu or "")), None)
    tokens = [
        mean(s["tokens"] / s["steps"] / batch for s in one.stretches) for e in found.values() for one in e.values()
    ]
    lines = [
        "# Training on one GPU: results",
        "",
        f"Command: `{facts['command']}` ({facts['minutes']:.0f} minutes)",
        "",
    ]
    lines += [f"{gpu or 'CPU (dry run)'}; {facts['hardware']}. Llama of {size.name} parameters from a seed, {batch} "]
    lines[-1] += f"conversations a step, bf16, constant rate 1e-3; medians of {rounds} stretches of {steps} steps, "
    lines[-1] += "wall time. MFU counts 6 operations a trained weight, 4 a frozen one, and causal attention."
    made = {group.name: tables.rows(group, found[group.name], "wall") for group in groups}
    for group in groups:
        flops = size.flops_per_token(mean(tokens) if tokens else 0.0, lora=group.name.endswith("lora"))
        lines += ["", f"## {group.title}", "", *tables.table(made[group.name], "wall", peak, flops)]
    if failed:
        lines += ["", "## Left out", "", *[f"- {name}: {why}" for name, why in failed.items()]]
    name = "training_gpu_dry_run" if args.dry_run else "training_gpu"
    keep(
        WORK if args.dry_run else args.results, name, "\n".join(lines) + "\n", facts | {"rows": made, "failed": failed}
    )
    return int(bool(failed) or not all(one["agrees"] for group in made.values() for one in group))
