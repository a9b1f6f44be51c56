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
from trainer.data.batches.loader import BatchShare, StepBatch
from trainer.data.batches.order import Order
from trainer.objectives.policy import SAMPLING_DIFFERENCE_METRIC
from trainer.rollout.round import Round
from trainer.rollout.round_builder import RoundBuilder
from trainer.rollout.round_file import ROUND_FILE, deserialize_round, serialize_round

ROUND_STEP = "round_step"
"""Metric of a run whose rounds are several steps: the number of the step in its round, from 0."""


@dataclass(slots=True)
class RolloutLoader:
    """Batches of one rank. `share.global_batch` counts the prompts of a round, `batch.global` the answers of a step.

    A round is `objective.rollout.steps` steps, which are taken `objective.rollout.iterations` times. Its prompts count as
    consumed with its last step.
    """

    round_builder: RoundBuilder
    share: BatchShare
    progress: Progress
    """Of the run: how many steps it has taken, and how many of the round it stands in."""
    max_logp_difference: float = math.inf
    """The run ends if log-probabilities of generation and of training differ by more than this on average, in nats a token."""
    current_round: Round | None = None
    """The round whose steps are being taken; a resumed run begins with that of its checkpoint."""

    @property
    def order(self) -> Order:
        """The order in which prompts are consumed."""
        return self.round_builder.prompts.order

    @property
    def accumulation(self) -> int:
        """Micro-batches of each data-parallel rank in a step in which every answer is learned."""
        settings = self.round_builder.settings
        answers_per_step = self.round_builder.num_prompts_per_round * settings.group_size // settings.rollout.steps
        return self.round_builder.batcher.num_micro_batches(answers_per_step, settings.group_size)

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
        """Row numbers in `documents.arrow` of the prompts of the round after `first_sample` consumed prompts, ascending."""
        units = self.order.units(first_sample, self.share.global_batch)
        return [int(row) for row in np.unique(self.round_builder.prompts.dataset.documents[units])]

    def attachments(self) -> dict[str, bytes]:
        """The unfinished round, as a file for a checkpoint: {"round.safetensors": content}; {} if no round is unfinished."""
        if self.current_round is None or not self.progress.round_step:  # the next step begins a round of its own
            return {}
        return {ROUND_FILE: serialize_round(self.current_round)}

    def restore(self, checkpoint: Path) -> None:
        """Go on with the unfinished round of a checkpoint, whose remaining steps learn from answers that were generated before.

        Sets `current_round`; None if the checkpoint has no unfinished round. All ranks must call, after the engine has loaded the
        checkpoint. Raises StorageError if the file is missing or damaged.
        """
        self.current_round = None
        if self.progress.round_step:
            path = checkpoint / ROUND_FILE
            content: bytes = call_on_main(path.read_bytes, self.round_builder.runtime)
            self.current_round = deserialize_round(content, str(path))

    def check_generated_answers(self, rows: list[dict[str, Any]]) -> None:
        """Raise Diverged, on all ranks alike, if a step learned from answers that other weights generated.

        That is so if the log-probabilities of generation and of training differ by more than `max_logp_difference`. `rows`: the
        metrics of each step since the last call, equal on all ranks.
        """
        for step_metrics in rows:
            difference = step_metrics.get(SAMPLING_DIFFERENCE_METRIC, 0.0)
            if difference > self.max_logp_difference:
                raise Diverged(
                    f"step {step_metrics['step']}: the log-probabilities of writing and of learning differ by "
                    f"{difference:.3g} nats a token, more than {self.max_logp_difference:g}: other weights wrote the answers "
                    "than learn from them, or another temperature; if this precision explains it, raise "
                    "objective.rollout.most_difference"
                )

    def steps(self, first_sample: int, num_steps: int) -> Generator[StepBatch, None, None]:
        """Yield the batches of `num_steps` optimizer steps; builds the next round when all steps of the current one are taken.

        A round is divided into `rollout.steps` batches, and used `rollout.iterations` times: with 2 and 3, its 6 steps learn from
        the batches 0, 1, 0, 1, 0, 1. It is generated with the weights of that moment, so the caller must take each step before it
        asks for the next batch.

        `first_sample`: prompts consumed before. `facts` of a batch are metrics for its step's row.

        All ranks must iterate together. Raises, on all ranks alike, DataError if a reward fails or no group has rewards that
        differ, and Interrupted if the run is asked to stop.
        """
        rollout = self.round_builder.settings.rollout
        steps_per_round = rollout.steps * rollout.iterations
        step_of_round = self.progress.round_step  # 0: the next step begins a round
        for _ in range(num_steps):
            started_at = time.perf_counter()
            if self.current_round is None or not step_of_round:
                self.current_round = self.round_builder.build_round(first_sample, self.progress.step)
                step_of_round = 0
            batch = self.step_batch(self.current_round, step_of_round % rollout.steps)
            batch.facts = dict(self.current_round.metrics)
            if not step_of_round:  # the first step of the round also reports what the round cost
                batch.facts |= self.current_round.cost_metrics
            if steps_per_round > 1:
                batch.facts[ROUND_STEP] = step_of_round
            step_of_round += 1
            if step_of_round == steps_per_round:  # with the last step of a round, its prompts count as consumed
                step_of_round = 0
                batch.samples = self.current_round.num_prompts  # prompts that the run has consumed with this step
                first_sample += self.current_round.num_prompts
            batch.round_step = step_of_round
            batch.round_s = time.perf_counter() - started_at
            yield batch

    def step_batch(self, rollout_round: Round, index: int) -> StepBatch:
        """Make the batch of one step of a round, on the device. `index`: which of the round's `rollout.steps` batches.

        Its totals count the whole step on all ranks, such as {"loss": 512.0, "tokens": 512, "answers": 8}. It counts no prompts
        as consumed: `steps` does so with the last step of the round.
        """
        settings = self.round_builder.settings
        answer_numbers = rollout_round.answers_of_step(index, settings.rollout.steps)
        step_data = rollout_round.step_data(answer_numbers, settings.normalise, settings.rollout.max_new_tokens)
        batcher = self.round_builder.batcher
        # A micro-batch for which no answer is left computes the round's first one, without targets.
        share = batcher.divide(step_data.samples, filler=rollout_round.sequence(0))
        micro_batches = []
        for micro_batch in share.micro_batches:
            micro_batches.append(to_device({**micro_batch.batch, "totals": step_data.totals}, batcher.device))
        return StepBatch(
            micro_batches=micro_batches,
            totals=step_data.totals,
            tokens=sum(len(sample.input_ids) for sample in step_data.samples),
            local_tokens=batcher.num_local_tokens(share.micro_batches),
            supervised_tokens=int(step_data.totals["tokens"]),
            samples=0,  # prompts consumed by the step: the last step of a round sets it
            parallel_efficiency=share.balance,
        )
