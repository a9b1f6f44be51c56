"""Benchmark of checkpoints: what a save costs training, written in the step and in the background, in one run.

Every few steps the run saves in another way, in turn: in the step, in the background, not at all. From one save to the next
passes the time of the same number of steps (`passed_s`), which shows whether steps are slower while a file is written; that takes
an idle machine. Makes `benchmarks/results/saving.json`; see `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from environments import WORK, hardware
from training.inputs import GPU, SMALL, TINY, make

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "saving.json"
SIZES = {size.name: size for size in (TINY, SMALL, GPU)}
WAYS = ("in the step", "background", "not at all")
STEPS = 4
"""From one save to the next."""


class Saved(NamedTuple):
    """What one save took."""

    size_bytes: int
    took_s: float
    """From its beginning until it had its name."""
    stall_s: float
    """Of these, the seconds in which training waited."""


class Turns:
    """Saves in turn in another way, and notes what each took."""

    def __init__(self) -> None:
        self.began: list[tuple[str, float]] = []
        self.saved: dict[str, list[Saved]] = {way: [] for way in WAYS}
        self.copy_s: list[float] = []

    def install(self) -> None:
        """In the place of the checkpoints' own methods."""
        import torch

        from trainer.checkpoints.manager import Checkpoints

        save, succeeded = Checkpoints.save_checkpoint, Checkpoints._record_success

        def in_turn(made: Checkpoints, engine: Any, progress: Any, *, must_succeed: bool = True, **how: Any) -> bool:
            way = WAYS[len(self.began) % len(WAYS)]
            if must_succeed:
                self.began.append(("end", time.perf_counter()))
                return save(made, engine, progress, must_succeed=True, **how)
            self.began.append((way, time.perf_counter()))
            if way == "not at all":
                tensors = [each.values for each in engine.state(progress).local_elements]
                self.began[-1] = (way, self._copied(tensors, torch))
                return False
            made.config.background = way == "background"
            return save(made, engine, progress, must_succeed=False, **how)

        def noted(made: Checkpoints, checkpoint: Any, published: Any, *, took_s: float, stall_s: float) -> None:
            way = "in the step" if stall_s == took_s else "background"
            self.saved[way].append(Saved(published.size_bytes, took_s, stall_s))
            succeeded(made, checkpoint, published, took_s=took_s, stall_s=stall_s)

        Checkpoints.save_checkpoint = in_turn  # type: ignore[method-assign]
        Checkpoints._record_success = noted  # type: ignore[method-assign]

    def _copied(self, tensors: list[Any], torch: Any) -> float:
        """The time after a plain copy of the same tensors to warm memory, which is noted, too."""
        there = [torch.empty(each.shape, dtype=torch.float32).fill_(0) for each in tensors]
        begin = time.perf_counter()
        for each, copy in zip(tensors, there, strict=True):
            copy.copy_(each)
        self.copy_s.append(time.perf_counter() - begin)
        return time.perf_counter()

    def results(self) -> dict[str, Any]:
        """Medians, without the first turn of each way."""
        passed: dict[str, list[float]] = {way: [] for way in WAYS}
        for (way, begin), (_, end) in zip(self.began[len(WAYS) :], self.began[len(WAYS) + 1 :], strict=False):
            passed[way].append(end - begin)
        steps = median(passed["not at all"])
        kept = {way: self.saved[way][1:] for way in WAYS[:2]}
        stall = {way: median(each.stall_s for each in kept[way]) for way in kept}
        copy = median(self.copy_s[1:])
        return {
            "bytes": kept["background"][0].size_bytes,
            "saves": {way: len(kept[way]) for way in kept},
            "stall_s": stall,
            "write_s": {way: median(each.took_s for each in kept[way]) for way in kept},
            "stall_ratio": stall["background"] / stall["in the step"],
            "plain_copy_s": copy,
            "stall_in_plain_copies": stall["background"] / copy,
            f"seconds_of_{STEPS}_steps": steps,
            "every": {"stall_s": {way: [each.stall_s for each in kept[way]] for way in kept}, "passed_s": passed},
        }


def main() -> None:
    """Run it and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=sorted(SIZES), default=SMALL.name)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    inputs = make(WORK / f"inputs-{given.size}", SIZES[given.size])
    turns = Turns()
    turns.install()
    from launch.main import main as shardtune

    words = [
        f"model.path={inputs / 'model'}",
        f"data.path={inputs / 'train.jsonl'}",
        f"data.cache_dir={WORK / 'saving' / 'cache'}",
        f"run.dir={WORK / 'saving' / time.strftime('%Y%m%d-%H%M%S')}",
        f"run.device={given.device}",
        f"run.threads={given.threads}",
        "tuning=full",
        "batch.global=4",
        "batch.micro=4",
        f"budget.steps={STEPS * (len(WAYS) * (given.rounds + 1) + 1)}",
        f"checkpoint.every_steps={STEPS}",
        f"checkpoint.max_failures={10**6}",
        "checkpoint.keep=1",
        "evaluation.at_start=false",
        "export.at_end=false",
        "logging.wandb=disabled",
    ]
    if code := shardtune(["train", *words]):
        raise SystemExit(code)
    found = {
        "hardware": hardware(),
        "size": given.size,
        "threads": given.threads,
        **turns.results(),
    }
    given.results.parent.mkdir(parents=True, exist_ok=True)
    given.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in found.items() if key != "every"}, indent=1))


if __name__ == "__main__":
    main()
