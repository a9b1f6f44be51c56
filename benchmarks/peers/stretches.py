"""What a training script of this directory measures: stretches of steps, between which it waits for its turn.

The driver starts one process for each trainer and lets them run in turn, a stretch of steps at a time, so that load that
comes and goes meets all of them alike and nothing is started twice. A process waits inside the optimizer's step, where it
uses no CPU. The same three hooks serve every trainer, so that all are counted alike:

- an embedding is called once for each forward pass: it sees the token ids, hence the tokens that are not padding;
- an optimizer's step ends a step;
- the first training call of the embedding ends the start-up.

The scripts run in the environments of different projects, so nothing of shardtune may be imported here.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from meter import cpu_seconds, own_peak

PAD = 0
"""Id of the padding token, which occurs in no document."""


def options(description: str) -> argparse.Namespace:
    """The command line of a training script. Sets what must be in the environment before torch is imported."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--inputs", type=Path, required=True, help="directory that benchmarks/training/inputs.py made")
    parser.add_argument("--out", type=Path, required=True, help="directory for everything that is written")
    parser.add_argument("--tuning", choices=("full", "lora"), default="full")
    parser.add_argument("--layout", default="default", help="default, or the name of a way of packing")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch", type=int, default=4, help="documents a step")
    parser.add_argument("--pack", type=int, default=512, help="tokens of a pack, where documents are packed")
    parser.add_argument("--packs", type=int, default=1, help="packs a step, where documents are packed")
    parser.add_argument("--longest", type=int, default=2048, help="longest document in tokens, where none is packed")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warm", type=int, default=2, help="steps before the first stretch")
    parser.add_argument("--steps", type=int, default=4, help="steps of a stretch")
    parser.add_argument("--rounds", type=int, default=3, help="stretches")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--matmul", choices=("blas", "onednn"), default="blas", help="float32 products")
    args = parser.parse_args()
    args.total = args.warm + args.steps * args.rounds
    os.environ.update(HF_HOME=str(args.out / "hf"), HF_DATASETS_CACHE=str(args.out / "datasets"), HF_HUB_OFFLINE="1")
    os.environ.update(HF_DATASETS_DISABLE_PROGRESS_BARS="1", WANDB_MODE="disabled", TOKENIZERS_PARALLELISM="false")
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    args.out.mkdir(parents=True, exist_ok=True)
    return args


class Stretches:
    """Hooks that count, and the gate at which the process waits."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.began = time.perf_counter()
        self.pipes = [int(fd) for fd in os.environ.get("BENCH_PIPES", "").split(",") if fd]
        self.steps = 0
        self._tokens: Any = 0
        self._slots = 0
        self._aside = [0.0, 0.0]
        self._forwards = 0
        self._started = False
        self._mark = (0.0, 0.0)

    # -- counting ------------------------------------------------------------------------------------------------

    def install(self) -> Stretches:
        """Put the hooks into torch. Call before the trainer runs; imports torch."""
        import torch
        from torch.optim.optimizer import register_optimizer_step_post_hook

        plain = torch.nn.Embedding.forward

        def forward(module: Any, ids: Any) -> Any:
            if torch.is_grad_enabled() and module.training:
                if not self._started:
                    self._started = True
                    self._ready()
                self._forwards += 1
                self._slots += ids.numel()
                self._tokens = self._tokens + (ids != PAD).sum()
            return plain(module, ids)

        torch.nn.Embedding.forward = forward  # type: ignore[method-assign]
        register_optimizer_step_post_hook(lambda *_: self._stepped())
        return self

    def _ready(self) -> None:
        """The start-up is over: data, model and optimizer are made, and the first step is about to be taken."""
        found = {"event": "ready", "cpu": cpu_seconds(), "wall": self._wall(), "peak": own_peak()}
        self._say(found | {"aside_cpu": self._aside[0], "aside_wall": self._aside[1]})
        self._wait()

    def _stepped(self) -> None:
        if not self._forwards:  # an optimizer that wraps another, or one that only sets up its state
            return
        self._forwards = 0
        self.steps += 1
        args = self.args
        done = self.steps - args.warm
        if done < 0 or done % args.steps or self.steps > args.total:
            return
        self._synchronise()
        cpu, wall = time.process_time() - self._mark[0], time.perf_counter() - self._mark[1]
        found = {"event": "stretch", "number": done // args.steps, "cpu": cpu, "wall": wall, "peak": self._peak()}
        found |= {"aside_cpu": self._aside[0], "aside_wall": self._aside[1]}
        found |= {"tokens": int(self._tokens), "slots": self._slots, "steps": args.steps if done else args.warm}
        self._say(found)
        self._wait()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Work inside a stretch that is reported apart: an evaluation, a checkpoint."""
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        self._aside[0] += time.process_time() - cpu
        self._aside[1] += time.perf_counter() - wall

    def apart(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, each call of which is set aside."""

        def call(*positional: Any, **named: Any) -> Any:
            with self.aside():
                return function(*positional, **named)

        return call

    # -- the gate ------------------------------------------------------------------------------------------------

    def _wall(self) -> float:
        """Seconds since the driver started this process."""
        started = os.environ.get("BENCH_STARTED")
        return time.time() - float(started) if started else time.perf_counter() - self.began

    def _say(self, found: dict[str, Any]) -> None:
        line = json.dumps(found) + "\n"
        if self.pipes:
            os.write(self.pipes[1], line.encode())
        else:
            print(line, end="", flush=True)

    def _wait(self) -> None:
        """Wait for the driver's word, then begin a stretch. Raises EOFError where the driver is gone."""
        if self.pipes and not os.read(self.pipes[0], 1):
            raise EOFError("the driver of the benchmark has ended")
        self._tokens, self._slots, self._aside = 0, 0, [0.0, 0.0]
        self._mark = (time.process_time(), time.perf_counter())

    def _synchronise(self) -> None:
        if self.args.device == "cuda":
            import torch

            torch.cuda.synchronize()

    def _peak(self) -> float:
        """Peak memory in MB: of this process, or of the GPU where the work is there."""
        if self.args.device == "cuda":
            import torch

            return torch.cuda.max_memory_reserved() / 2**20
        return own_peak()

    # -- the end -------------------------------------------------------------------------------------------------

    def finish(self, logits_of: Callable[[Any], Any], version: str) -> None:
        """Report the loss of the trained model, measured the same way for all, and which versions ran.

        `logits_of` takes ids `[1, T]` and gives logits `[1, T, V]`. Raises RuntimeError where steps are missing.
        """
        if self.steps < self.args.total:
            raise RuntimeError(f"{self.steps} steps were taken, {self.args.total} expected")
        peak = self._peak()
        loss = yardstick(logits_of, self.args)
        self._say({"event": "end", "loss": loss, "version": version, "cpu": cpu_seconds(), "peak": peak})


def documents(args: argparse.Namespace, split: str = "train") -> list[dict[str, list[int]]]:
    """The documents as tokens: `input_ids`, and `labels` in place (not shifted), -100 where not learned."""
    return [json.loads(line) for line in (args.inputs / f"{split}_tokens.jsonl").open()]


def repeated(args: argparse.Namespace) -> list[dict[str, list[int]]]:
    """The documents of all steps in their order, the file read again from its start where it ends."""
    rows = documents(args)
    return [rows[index % len(rows)] for index in range(args.total * args.batch * world())]


def world() -> int:
    """Processes that train together, as torchrun says; `--batch` is for each of them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def choose_matmul(args: argparse.Namespace) -> None:
    """Let torch compute float32 products with oneDNN, where asked for; without AMX these stay in float32."""
    if args.matmul == "onednn":
        import torch

        torch.set_float32_matmul_precision("medium")


def base_dtype(args: argparse.Namespace) -> Any:
    """Type of the loaded weights: float32, which trains; on GPUs bfloat16 where LoRA freezes it."""
    import torch

    return torch.bfloat16 if args.device == "cuda" and args.tuning == "lora" else torch.float32


def yardstick(logits_of: Callable[[Any], Any], args: argparse.Namespace) -> float:
    """Mean cross-entropy over the supervised tokens of the held-out documents, each by itself, summed in float32."""
    import torch

    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in documents(args, "eval"):
            ids = torch.tensor([row["input_ids"]], device=args.device)
            targets = torch.tensor(row["labels"][1:], device=args.device)
            logits = logits_of(ids)[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"))
            tokens += int((targets != -100).sum())
    return total / tokens


def plain_logits(model: Any) -> Callable[[Any], Any]:
    """`logits_of` for a transformers model."""

    def logits_of(ids: Any) -> Any:
        return model(input_ids=ids, use_cache=False).logits

    model.eval()
    return logits_of


def remember_trainer() -> list[Any]:
    """A list that holds the transformers Trainer once its `train` was called, for peers that build it out of reach."""
    import transformers

    found: list[Any] = []
    plain = transformers.Trainer.train

    def train(self: Any, *positional: Any, **named: Any) -> Any:
        found.append(self)
        return plain(self, *positional, **named)

    transformers.Trainer.train = train  # type: ignore[method-assign]
    return found


def lora_settings() -> dict[str, Any]:
    """The adapter of the benchmark, in peft's words."""
    return {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
