"""The trainer against the bare loop, in alternation, on the same batches: useful tokens per CPU second and peak memory.

    python benchmarks/training/against_bare.py [--rounds 3] [--cases full-fp32,lora-bf16] [--steps 9] [--matmul blas] [--out X.md]

The trainer runs through its command line with evaluation, logging at every step and a checkpoint on; the CPU time of evaluations
and checkpoints is not counted, everything around them is. Speed is measured with both in one process, step by step in turn, on
one thread; memory and start of each in a process of its own. In fp32 the trainer may take oneDNN (`run.matmul`), the bare
loop has torch's own choice; `--matmul blas` gives both the same. Losses are compared before anything is
printed: full tuning must agree to 1e-5 relative in fp32; adapters start from other random numbers in the two.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
CASES = ("full-fp32", "lora-fp32", "full-bf16", "lora-bf16")
SKIPPED = 3
"""First steps, not counted."""


def words(model: Path, data: Path, work: Path, case: str, steps: int, run_dir: Path, matmul: str) -> list[str]:
    """The words a user would type."""
    tuning, precision = case.split("-")
    return [
        f"model.path={model}",
        f"data.path={data}",
        "data.eval_share=0.1",
        f"data.cache_dir={work / 'cache'}",
        f"tuning={tuning}",
        f"precision={precision}",
        "batch.global=4",
        "batch.micro=4",
        f"budget.steps={steps}",
        "optim.lr=1e-3",
        "schedule=constant",
        "schedule.warmup_share=0",
        f"evaluation.every_steps={steps // 2}",
        f"checkpoint.every_steps={steps // 2}",
        "logging.every_steps=1",
        "logging.wandb=disabled",
        "run.device=cpu",
        "run.threads=1",
        f"run.matmul={matmul}",
        "run.resume=never",
        f"run.dir={run_dir}",
    ]


def run(command: list[str], out: Path) -> dict[str, Any]:
    """Run to the end; what the process measured. Raises with its output where it failed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:3])} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return json.loads(out.read_text(encoding="utf-8"))


def measure(case: str, model: Path, data: Path, work: Path, *, rounds: int, steps: int, matmul: str) -> dict[str, Any]:
    """Speed of both, alternating step by step in one process, median over rounds; then memory and start of each alone."""
    tuning, precision = case.split("-")
    batches, out = work / "batches.json", work / "out.json"
    found = []

    def ours(name: str, first: list[str], number: int) -> dict[str, Any]:
        run_dir = work / "runs" / f"{case}-{os.getpid()}-{name}"
        command = [sys.executable, str(HERE / "shardtune_timed.py"), *first, str(out)]
        return run([*command, *words(model, data, work, case, number, run_dir, matmul)], out)

    for turn in range(rounds):
        result = ours(str(turn), ["--bare"], steps)
        tolerance = {"full-fp32": 1e-5, "full-bf16": 2e-3}.get(case, 3e-2)
        pairs = list(zip(result["losses"], result["bare_losses"], strict=True))
        for step, (a, b) in enumerate(pairs[:5]):
            assert abs(a - b) <= tolerance * b, f"{case}: losses differ at step {step}: {a} and {b}"
        tokens = sum(result["tokens"][SKIPPED:])
        seconds, bare_seconds = (sum(result[key][SKIPPED:]) for key in ("seconds", "bare_seconds"))
        found.append((tokens / seconds, tokens / bare_seconds, bare_seconds / seconds, *pairs[-1]))
    alone = ours("alone", ["--batches", str(batches)], 8)
    command = [sys.executable, str(HERE / "bare.py"), "--model", str(model), "--batches", str(batches)]
    bare = run([*command, "--tuning", tuning, "--precision", precision, "--out", str(out)], out)
    speed, bare_speed, ratio, loss, bare_loss = (median(values) for values in zip(*found, strict=True))
    return {
        "case": case,
        "bare": bare_speed,
        "shardtune": speed,
        "ratio": ratio,
        "bare_mib": bare["peak_mib"],
        "shardtune_mib": alone["peak_mib"],
        "bare_start_s": bare["start_s"],
        "shardtune_start_s": alone["start_s"],
        "loss": (loss, bare_loss),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The measurements as a Markdown table."""
    names = (
        "case",
        "bare tok/CPU-s",
        "shardtune tok/CPU-s",
        "ratio",
        "peak MiB",
        "shardtune's",
        "start CPU-s",
        "shardtune's",
    )
    lines = ["| " + " | ".join([*names, "last loss, shardtune / bare"]) + " |", "| --- " * 9 + "|"]
    lines += [
        f"| {r['case']} | {r['bare']:.0f} | {r['shardtune']:.0f} | {r['ratio']:.3f} | {r['bare_mib']:.0f} | "
        f"{r['shardtune_mib']:.0f} | {r['bare_start_s']:.1f} | {r['shardtune_start_s']:.1f} | "
        f"{r['loss'][0]:.4f} / {r['loss'][1]:.4f} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--matmul", default="auto", help="the trainer's run.matmul; the bare loop keeps torch's choice")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks" / ".work" / "training")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from training.inputs import SMALL, make

    inputs = make(args.work / "inputs", SMALL)
    model, data = inputs / "model", inputs / "train.jsonl"
    rows = []
    for case in args.cases.split(","):
        rows.append(measure(case, model, data, args.work, rounds=args.rounds, steps=args.steps, matmul=args.matmul))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    text = table(rows)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
