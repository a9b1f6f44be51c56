"""What the trainers of `benchmarks/reinforcement.py` share: a count of CPU seconds for each step, and a gate between turns.

A step is everything between the ends of two optimizer steps: writing answers, scoring them, and training on them. At the end
of a step the process reports it on a line of JSON. After every `--turn` steps it waits until the driver says go on.

The scripts run in the environments of different projects, so nothing of shardtune may be imported here.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from meter import own_peak


def options(description: str) -> argparse.Namespace:
    """The command line of a training script. Sets what must be in the environment before torch is imported."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, required=True, help="a model directory")
    parser.add_argument("--inputs", type=Path, required=True, help="directory with prompts.jsonl and rewards.py")
    parser.add_argument("--out", type=Path, required=True, help="directory for everything that is written")
    parser.add_argument("--reward", required=True, help="name of the reward function")
    parser.add_argument("--new", type=int, required=True, help="longest answer in tokens")
    parser.add_argument("--prompts", type=int, default=8, help="prompts a step")
    parser.add_argument("--group", type=int, default=8, help="answers to a prompt")
    parser.add_argument("--micro", type=int, default=32, help="answers in a forward pass")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--turn", type=int, default=2, help="steps between two gates")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=3e-4)
    args = parser.parse_args()
    args.answers = args.prompts * args.group
    os.environ.update(HF_HOME=str(args.out / "hf"), HF_DATASETS_CACHE=str(args.out / "datasets"), HF_HUB_OFFLINE="1")
    os.environ.update(HF_DATASETS_DISABLE_PROGRESS_BARS="1", WANDB_MODE="disabled", TOKENIZERS_PARALLELISM="false")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    args.out.mkdir(parents=True, exist_ok=True)
    return args


class StepReports:
    """Reports the CPU seconds of each step to the driver, and waits for it between turns."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.pipes = [int(descriptor) for descriptor in os.environ.get("BENCH_PIPES", "").split(",") if descriptor]
        self.steps = 0
        self._num_forward_passes = 0
        self._cpu_s = family_cpu_seconds()

    def install(self) -> StepReports:
        """Put the hooks into torch. Call before the trainer runs; imports torch."""
        import torch
        from torch.optim.optimizer import register_optimizer_step_post_hook

        plain_forward = torch.nn.Embedding.forward

        def forward(module: Any, ids: Any) -> Any:
            if torch.is_grad_enabled():
                self._num_forward_passes += 1
            return plain_forward(module, ids)

        torch.nn.Embedding.forward = forward  # type: ignore[method-assign]
        register_optimizer_step_post_hook(lambda *_: self._end_step())
        return self

    def _end_step(self) -> None:
        if not self._num_forward_passes:  # an optimizer that wraps another, or one that only sets up its state
            return
        self._num_forward_passes = 0
        self.steps += 1
        cpu_s = family_cpu_seconds() - self._cpu_s
        self._report({"event": "step", "step": self.steps, "cpu_s": cpu_s, "peak_mb": own_peak()})
        is_turn_over = self.steps % self.args.turn == 0 and self.steps < self.args.steps
        if is_turn_over and self.pipes and not os.read(self.pipes[0], 1):
            raise EOFError("the driver of the benchmark has ended")
        self._cpu_s = family_cpu_seconds()

    def finish(self, rewards: list[float], lengths: list[float], version: str) -> None:
        """Report the mean reward and length in tokens of each step's answers. Raises RuntimeError if steps are missing."""
        if not self.steps == len(rewards) == len(lengths) == self.args.steps:
            raise RuntimeError(f"{self.steps} steps, {len(rewards)} rewards: {self.args.steps} expected")
        self._report({"event": "end", "rewards": rewards, "lengths": lengths, "version": version})

    def _report(self, event: dict[str, Any]) -> None:
        line = json.dumps(event) + "\n"
        if self.pipes:
            os.write(self.pipes[1], line.encode())
        else:
            print(line, end="", flush=True)


def family_cpu_seconds() -> float:
    """CPU seconds of this process and of its children that live: rewards may be scored in processes of their own."""
    children: list[str] = []
    for task in Path("/proc/self/task").iterdir():
        children += (task / "children").read_text(encoding="utf-8").split()
    return time.process_time() + sum(map(_cpu_seconds_of, children))


def _cpu_seconds_of(process: str) -> float:
    """CPU seconds of another process, user and system; 0 if it has ended."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except OSError:
        return 0.0
    # The name in parentheses may hold blanks. Behind it, user and system time are the fields 12 and 13.
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
