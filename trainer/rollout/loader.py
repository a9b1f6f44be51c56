"""`RolloutLoader` stands where `StepLoader` stands: its batches are rounds, made when the loop asks for the next one."""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from strategies.base import Progress
from strategies.errors import Diverged
from strategies.runtime import call_on_main
from trainer.data.batches.collate import to_device
from trainer.data.batches.loader import Share, StepBatch
from trainer.data.batches.order import Order
from trainer.objectives.policy import WRITER_DIFFERENCE
from trainer.rollout.maker import RoundBuilder
from trainer.rollout.round import Round
from trainer.rollout.round_file import ROUND_FILE, round_bytes, round_of

ROUND_STEP = "round_step"
"""Metric of a run whose rounds are several steps: the number of the step in its round, from 0."""


@dataclass(slots=True)
class RolloutLoader:
    """Batches of one rank. `share.global_batch` counts the prompts of a round, `batch.global` the answers of a step.

    A round is `objective.rollout.steps` steps, which are taken `objective.rollout.iterations` times. Its prompts count as
    consumed with its last step.
    """

    round_builder: RoundBuilder
    share: Share
    progress: Progress
    """Of the run: how many steps it has taken, and how many of the round it stands in."""
    most_difference: float = math.inf
    """Mean difference in nats between log-probabilities of writing and of learning beyond which the run ends."""
    current: Round | None = None
    """The round whose steps are being taken; a resumed run begins with that of its checkpoint."""

    @property
    def order(self) -> Order:
        """The order in which prompts are consumed."""
        return self.round_builder.prompts.order

    @property
    def accumulation(self) -> int:
        """Micro-batches of each reader in a step in which every answer is learned."""
        settings = self.round_builder.settings
        answers = self.round_builder.prompts_per_round * settings.group_size // settings.rollout.steps
        return self.round_builder.dealer.num_micro_batches(answers, settings.group_size)

    @property
    def samples_per_step(self) -> float:
        """Prompts that a step consumes, on average over the steps of a round."""
        rollout = self.round_builder.settings.rollout
        return self.share.global_batch / (rollout.steps * rollout.iterations)

    @property
    def unit_tokens(self) -> np.ndarray:
        """int64 [prompts]: tokens of each prompt with an answer of the longest length."""
        lengths: np.ndarray = self.round_builder.prompts.dataset.lengths
        return lengths + self.round_builder.settings.rollout.max_new_tokens

    def documents(self, first_sample: int) -> list[int]:
        """Rows of `documents.arrow` of the prompts of the round that begins after `first_sample`, ascending."""
        units = self.order.units(first_sample, self.share.global_batch)
        return [int(row) for row in np.unique(self.round_builder.prompts.dataset.documents[units])]

    def attachments(self) -> dict[str, bytes]:
        """The round that the run stands in, as a file of a checkpoint; nothing between two rounds, where it is written again."""
        if self.current is None or not self.progress.round_step:
            return {}
        return {ROUND_FILE: round_bytes(self.current)}

    def restore(self, checkpoint: Path) -> None:
        """Go on with the round of a checkpoint that the engine has loaded. All ranks must call. Errors: StorageError."""
        self.current = None
        if self.progress.round_step:
            path = checkpoint / ROUND_FILE
            content: bytes = call_on_main(path.read_bytes, self.round_builder.runtime)
            self.current = round_of(content, str(path))

    def check_rows(self, rows: list[dict[str, Any]]) -> None:
        """Raise Diverged, on all ranks alike, if a step learned from answers that its own weights did not write.

        `rows`: of the steps since the last call, equal on all ranks.
        """
        for row in rows:
            difference = row.get(WRITER_DIFFERENCE, 0.0)
            if difference > self.most_difference:
                raise Diverged(
                    f"step {row['step']}: the log-probabilities of writing and of learning differ by {difference:.3g} nats a "
                    f"token, more than {self.most_difference:g}: other weights wrote the answers than learn from them, or "
                    "another temperature; if this precision explains it, raise objective.rollout.most_difference"
                )

    def steps(self, first_sample: int, num_steps: int) -> Generator[StepBatch, None, None]:
        """Batches of `num_steps` steps. A round of answers is written and scored when the one before it is used up.

        A round gives `rollout.steps` batches, and is gone through `rollout.iterations` times: with 2 and 3, its 6 steps learn
        from parts 0, 1, 0, 1, 0, 1. It is written with the weights as they are then, so all ranks must take the batches in step.
        `first_sample`: prompts consumed before. Errors: those of `RoundBuilder.build_round`.
        """
        rollout = self.round_builder.settings.rollout
        step_of_round = self.progress.round_step  # 0: the next step begins a round
        for _ in range(num_steps):
            began = time.perf_counter()
            if self.current is None or not step_of_round:
                self.current = self.round_builder.build_round(first_sample, self.progress.step)
                step_of_round = 0
            batch = self.step_batch(self.current, step_of_round % rollout.steps)
            batch.facts = dict(self.current.facts)
            if not step_of_round:  # the first step of the round also reports what the round cost
                batch.facts |= self.current.costs
            if rollout.steps * rollout.iterations > 1:
                batch.facts[ROUND_STEP] = step_of_round
            step_of_round += 1
            if step_of_round == rollout.steps * rollout.iterations:  # the last step: its prompts count as consumed
                step_of_round = 0
                batch.samples = self.current.num_prompts
                first_sample += self.current.num_prompts
            batch.round_step = step_of_round
            batch.round_s = time.perf_counter() - began
            yield batch

    def step_batch(self, rollout_round: Round, part: int) -> StepBatch:
        """The batch of one step of a round, on the device. `part`: which of the `rollout.steps` parts of its answers.

        It counts no prompts as consumed: `steps` does so with the last step of the round.
        """
        settings = self.round_builder.settings
        numbers = rollout_round.part(part, settings.rollout.steps)
        samples, totals = rollout_round.samples(numbers, settings.normalise, settings.rollout.max_new_tokens)
        filler = rollout_round.sequence(0)
        dealer = self.round_builder.dealer
        own_micro_batches, balance = dealer.deal(samples, filler)
        micro_batches = []
        for micro_batch in own_micro_batches:
            micro_batches.append(to_device({**micro_batch.batch, "totals": totals}, dealer.device))
        return StepBatch(
            micro_batches=micro_batches,
            totals=totals,
            tokens=sum(len(sample.input_ids) for sample in samples),
            local_tokens=dealer.local_tokens(own_micro_batches),
            supervised_tokens=int(totals["tokens"]),
            samples=0,
            balance=balance,
        )
