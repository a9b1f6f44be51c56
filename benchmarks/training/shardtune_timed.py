"""The trainer through its own entry, with a clock beside it: `python shardtune_timed.py OUT.json <words of the verb train>`.

The clock reads the process's CPU time where a step begins, and around evaluation and checkpoints, whose work no bare loop does.
With `--bare` as the first word the bare loop takes each step too, just before, on the same documents and in the same process:
load that comes and goes then meets both. With `--batches FILE.json` the documents of each step are written down for it.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from launch.main import main as shardtune


class Clock:
    """CPU seconds at the start of each step, and those spent on what is not a step."""

    def __init__(self) -> None:
        self.begins: list[float] = []
        self.aside = 0.0
        self.asides: list[float] = []
        self.tokens: list[int] = []
        self.end = 0.0
        self.peak_mib = 0.0
        self.bare: list[float] = []
        self.bare_losses: list[float] = []
        self.config: Any = None
        """The run's, for a bare loop over the same model."""

    def bare_step(self, trainer: Any) -> None:
        """The same step in the bare loop, timed, and not counted as the trainer's."""
        from bare import Loop, build, concatenate

        config, begin = self.config, time.process_time()
        if not self.bare:
            model = build(config.model.path, str(config.tuning.name), str(config.precision))
            self.loop = Loop(model, lr=config.optim.lr, precision=str(config.precision))
        batch = concatenate(documents_of(trainer.loader, trainer.progress.samples), "cpu")
        ours = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(
            "highest"
        )  # torch's own choice of a library, which the trainer may have changed
        start = time.process_time()
        loss, _ = self.loop.step(batch)
        self.bare.append(time.process_time() - start)
        torch.set_float32_matmul_precision(ours)
        self.bare_losses.append(float(loss))
        self.aside += time.process_time() - begin

    def steps(self, original: Callable[..., Any], *, bare: bool) -> Callable[..., Any]:
        """Note the beginning of each step."""

        def train_step(trainer: Any, batch: Any) -> Any:
            if bare:
                self.bare_step(trainer)
            self.begins.append(time.process_time())
            self.asides.append(self.aside)
            self.tokens.append(batch.tokens)
            return original(trainer, batch)

        return train_step

    def without(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Leave the time of a method out of that of the steps."""

        def method(*args: Any, **kwargs: Any) -> Any:
            begin = time.process_time()
            try:
                return original(*args, **kwargs)
            finally:
                self.aside += time.process_time() - begin

        return method

    def noting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Keep the configuration that the loop's settings are taken from."""

        def loop_settings(config: Any, total_steps: int) -> Any:
            self.config = config
            return original(config, total_steps)

        return loop_settings

    def fit(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Note the end of training, before the export."""

        def run(trainer: Any) -> Any:
            try:
                return original(trainer)
            finally:
                self.end = time.process_time()
                self.peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

        return run

    def seconds(self) -> list[float]:
        """CPU seconds of each step, all between two steps included but evaluation and checkpoints."""
        begins, asides = [*self.begins, self.end], [*self.asides, self.aside]
        return [begins[i + 1] - begins[i] - (asides[i + 1] - asides[i]) for i in range(len(self.begins))]


def documents_of(loader: Any, first_sample: int) -> list[dict[str, list[int]]]:
    """The documents of the step that begins at `first_sample`, in the order in which the loader lays them out."""
    documents = [doc for slot in loader.plan(first_sample)[0] for doc in slot]
    samples = [loader.dataset.sample(doc) for doc in documents]
    return [
        {"input_ids": s.input_ids.tolist(), "labels": np.where(s.supervised, s.input_ids, -100).tolist()}
        for s in samples
    ]


def write_batches(path: Path, loader: Any, num_steps: int) -> None:
    """The documents of each step, for the bare loop in a process of its own."""
    path.write_text(
        json.dumps([documents_of(loader, i * loader.share.global_batch) for i in range(num_steps)]), encoding="utf-8"
    )


def main() -> int:
    """One run of the trainer; its exit code."""
    words = sys.argv[1:]
    batches = None
    if bare := words[0] == "--bare":
        words = words[1:]
    if words[0] == "--batches":
        batches, words = Path(words[1]), words[2:]
    out, words = Path(words[0]), words[1:]
    from trainer import run
    from trainer.checkpoints.manager import Checkpoints
    from trainer.loop import Trainer

    clock = Clock()
    run.loop_settings = clock.noting(run.loop_settings)
    fit: Any = Trainer.fit
    if batches is not None:

        def noted(trainer: Any) -> Any:
            write_batches(batches, trainer.loader, trainer.settings.total_steps)
            return fit(trainer)

        Trainer.fit = clock.fit(noted)  # type: ignore[method-assign]
    else:
        Trainer.fit = clock.fit(fit)  # type: ignore[method-assign]
    Trainer.train_step = clock.steps(Trainer.train_step, bare=bare)  # type: ignore[method-assign]
    Trainer._evaluate = clock.without(Trainer._evaluate)  # type: ignore[method-assign]
    Checkpoints.save_checkpoint = clock.without(Checkpoints.save_checkpoint)  # type: ignore[method-assign]
    code = shardtune(["train", *words])
    run_dir = next(Path(word.partition("=")[2]) for word in words if word.startswith("run.dir="))
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    result = {
        "losses": [row["loss"] for row in rows if "loss" in row],
        "seconds": clock.seconds(),
        "tokens": clock.tokens,
        "start_s": clock.begins[0] if clock.begins else None,
        "peak_mib": clock.peak_mib,
        "bare_seconds": clock.bare,
        "bare_losses": clock.bare_losses,
    }
    out.write_text(json.dumps(result), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
