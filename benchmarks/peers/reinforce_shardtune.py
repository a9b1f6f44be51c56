"""shardtune's `objective=grpo` through its own entry, `python -m launch.main train`."""

from __future__ import annotations

import json
import runpy
import sys
from typing import Any

from rounds import StepReports, options


def words(args: Any) -> list[str]:
    """What a user would type for this work."""
    return [
        "train",
        "objective=grpo",
        f"model.path={args.model}",
        f"data.path={args.inputs / 'prompts.jsonl'}",
        f"data.cache_dir={args.out / 'cache'}",
        f"objective.rewards={args.inputs / 'rewards.py'}:{args.reward}",
        f"objective.group_size={args.group}",
        f"objective.rollout.max_new_tokens={args.new}",
        "tuning=lora",
        "precision=fp32",
        f"optim.lr={args.lr}",
        "schedule=constant",
        "schedule.warmup_share=0",
        f"batch.global={args.answers}",
        f"batch.micro={args.micro}",
        f"budget.steps={args.steps}",
        "logging.every_steps=1",
        "logging.wandb=disabled",
        f"run.seed={args.seed}",
        "run.threads=1",
        "run.device=cpu",
        "export.at_end=false",
        f"run.dir={args.out / 'run'}",
    ]


def main() -> None:
    """Train and report."""
    args = options(__doc__)
    reports = StepReports(args).install()
    sys.argv = ["shardtune", *words(args)]
    try:
        runpy.run_module("launch.main", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
    import torch
    import transformers

    lines = (args.out / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    steps = [row for row in rows if "reward" in row]
    version = f"shardtune on torch {torch.__version__}, transformers {transformers.__version__}"
    lengths = [row["completions/mean_length"] for row in steps]
    reports.finish([row["reward"] for row in steps], lengths, version)


if __name__ == "__main__":
    main()
