"""What every part of the parity job has: the ranks, the directory, and the lone process as the oracle."""

import tempfile
from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from strategies import runtime as processes
from strategies.base import StrategyConfig
from strategies.parameters import named_parameters
from strategies.sequence import with_sequence_parallelism
from tests.helpers.building import GLOBAL_BATCH, STRATEGIES, alone, data_set, take_steps, trainer_for
from tests.helpers.learning import LEAST_LEARNED, learned, moved
from trainer.config.run import RunConfig
from trainer.data.prepare import PreparedData
from trainer.loop import Trainer

Made = TypeVar("Made")
Curve = list[list[float]]


class Job:
    """One rank of the job. Its methods are collective unless they say that the process is alone."""

    def __init__(self, root: Path, runtime: processes.Runtime) -> None:
        self.root, self.runtime = root, runtime
        self._made: dict[Hashable, Any] = {}
        self.data = self.first_here(lambda: data_set(root, uneven=True))

    def first_here(self, make: Callable[[], Made]) -> Made:
        """What `make` makes or finds on disk: made by rank 0, found by the others."""
        if self.runtime.is_main:
            make()
        processes.barrier(self.runtime)
        return make()

    def oracle(self, key: Hashable, make: Callable[[], Made], elsewhere: Made) -> Made:
        """What `make`, which must not be collective, gave rank 0 once; `elsewhere` on other ranks, whose answers nobody reads."""
        return self.once(key, make) if self.runtime.is_main else elsewhere

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` returned when it was first asked for `key`."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def trainer(self, config: RunConfig, data: PreparedData | None = None) -> Trainer:
        return trainer_for(config, data or self.data, with_sequence_parallelism(self.runtime, config.parallel.sequence))

    def curve(self, config: RunConfig, steps: int, data: PreparedData | None = None) -> Curve:
        """Loss and grad norm of a few steps on all ranks."""
        return [list(pair) for pair in take_steps(self.trainer(config, data), steps)]

    def lone_trainer(self, config: RunConfig, data: PreparedData | None = None) -> Trainer:
        """The same job under `single`, one micro-batch a step, in this process alone."""
        batch = {"global": GLOBAL_BATCH, "micro": GLOBAL_BATCH}
        return trainer_for(
            replace(config, strategy=STRATEGIES["single"], batch=batch), data or self.data, alone(self.runtime)
        )

    def lone(self, config: RunConfig, steps: int, data: PreparedData | None = None) -> Curve:
        """Its curve. Alone."""
        return lone_steps(self.lone_trainer(config, data), steps)

    def lone_and_far(self, config: RunConfig, steps: int, data: PreparedData | None = None) -> tuple[Curve, float]:
        """Its curve, and how far that is from the curve of a run that learns nothing. Alone."""
        trainer = self.lone_trainer(config, data)
        curve = lone_steps(trainer, steps)
        return curve, self.far(trainer, curve, config, data)

    def far(self, trainer: Trainer, curve: Curve, config: RunConfig, data: PreparedData | None = None) -> float:
        """The same of a trainer that has taken the steps of `curve`: by `again`, or where that says little by a run. Alone."""
        if (again := self.again(trainer, curve)) > LEAST_LEARNED:
            return again
        rows = [row[:2] for row in curve]
        return learned(rows, self.lone(replace(config, optim=replace(config.optim, lr=0.0)), len(rows), data))

    def again(self, trainer: Trainer, curve: Curve) -> float:
        """By how much the first batch, taken once more after the steps of `curve`, has moved. Alone."""
        trainer.progress.samples = 0
        return moved(lone_steps(trainer, 1)[0], curve[0][:2])

    def saved(self, trainer: Trainer) -> Path:
        """A directory with the training state, written out of a copy as in the background."""
        path = Path(processes.broadcast_object(tempfile.mkdtemp(dir=self.root), self.runtime))
        state = trainer.engine.state(trainer.progress)
        state.copy_values_to(torch.full((state.num_elements,), torch.nan))
        state.save(path)
        processes.barrier(self.runtime)
        return path

    def go_on(self, config: RunConfig, path: Path, steps: int, *, look: bool = False) -> list[tuple[float, float]]:
        """A few steps of a fresh trainer from a saved state. `look`: what a forward pass gathers must not outlive the load."""
        fresh = self.trainer(config)
        if look:  # as to record a reference
            with fresh.engine.inference() as module:
                module(fresh.loader.collator([self.data.train.sample(0)]))
        fresh.progress = fresh.engine.load(path)
        return take_steps(fresh, steps)

    def resumed(
        self, config: RunConfig, other: StrategyConfig, *, before: int, steps: int, look: bool = False
    ) -> dict[str, Any]:
        """Steps after a saved state: by the run that saved it, by a fresh one, and under another strategy."""
        first = self.trainer(config)
        take_steps(first, before)
        path = self.saved(first)
        return {
            "uninterrupted": take_steps(first, steps),
            "resumed": self.go_on(config, path, steps, look=look),
            "elsewhere": self.go_on(replace(config, strategy=other), path, steps, look=look),
        }

    def gathered_apart(self, trainer: Trainer, expected: dict[str, torch.Tensor], *, of: set[str]) -> float:
        """The largest difference of a gathered value from `expected`, among the parameters `of`; all must be there."""
        worst, seen = 0.0, set()
        for name, value in trainer.engine.gather_full_parameters(trainable_only=False):
            if value is not None:
                assert value.shape == expected[name].shape, name
                if name in of:
                    worst = max(worst, float((value.float() - expected[name].float()).abs().max()))
                seen.add(name)
        assert not self.runtime.is_main or seen == set(expected)
        return worst


def lone_steps(trainer: Trainer, num: int) -> Curve:
    """Loss and grad norm of `num` further steps of a process alone, without any communication: from its own sums."""
    rows = []
    for batch in trainer.loader.steps(trainer.progress.samples, num):
        record = trainer.train_step(batch)
        rows.append([float(record.local_sums["loss"]) / record.counts["loss"], float(record.result.grad_norm)])
    return rows


def values_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """A copy of every parameter of a process alone."""
    return {name: p.detach().clone() for name, p in named_parameters(trainer.engine.step_module)}
