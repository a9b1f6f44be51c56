"""Makes a round: prompts in the order of the run, answers, rewards, and what is compared with the past. All ranks must call."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from strategies.errors import DataError, Interrupted
from strategies.runtime import Runtime, gather_objects
from trainer.data.batches.collate import to_device
from trainer.objectives.base import ReferenceModels
from trainer.objectives.grpo_config import Baseline, Combine, GrpoConfig, KlPlace, Scale
from trainer.objectives.rollouts import IdleGroups
from trainer.rollout.dealing import Dealer
from trainer.rollout.groups import advantages, idle, normalised_sum
from trainer.rollout.look_back import PolicyLogps, ReferenceLogps, RowScorer, answer_logps
from trainer.rollout.metrics import round_metrics
from trainer.rollout.prompts import PromptReader
from trainer.rollout.round import Round, rewards_of
from trainer.rollout.types import Group, GroupGenerator, GroupScores, RewardScorer, all_answers

if TYPE_CHECKING:
    from strategies.base import Engine

MOST_WRITTEN = 3
"""Prompts answered for a round with `idle_groups=replace`, as a multiple of those that it needs."""
LEAST_SHARE = 0.25
"""Share of groups with spread that a further draw counts on at least, so that no draw is more than four times what is missing."""
MOST_IDLE_DRAWS = 10
"""Draws without one group that has spread, after which the run ends: its rewards tell no answers apart."""


@dataclass(slots=True)
class _Written:
    """Groups that were written and scored for a round."""

    groups: list[Group] = field(default_factory=list)
    scores: list[GroupScores] = field(default_factory=list)

    def select(self, numbers: Sequence[int]) -> _Written:
        """The groups of these numbers."""
        selected = _Written()
        for number in numbers:
            selected.groups.append(self.groups[number])
            selected.scores.append(self.scores[number])
        return selected


@dataclass(slots=True)
class RoundBuilder:
    """Makes the rounds of a run. Everything about a round is decided on the whole round, so alike on all ranks."""

    settings: GrpoConfig
    prompts_per_round: int
    engine: Engine
    prompts: PromptReader
    group_generator: GroupGenerator
    scorer: RewardScorer
    dealer: Dealer
    runtime: Runtime
    references: ReferenceModels
    """What gives the reference its log-probabilities, where the divergence from it has a weight."""
    stop_now: Callable[[], bool] = lambda: False
    """Asked on all ranks between two phases: whether to stop."""
    report_phase: Callable[[str], None] = lambda phase: None
    """Called with what the run is at, for messages about a rank that fails or stands still."""
    on_round: list[Callable[[Round, int], None]] = field(default_factory=list)
    """Called on all ranks with each new round, and the optimizer steps taken before it."""
    _seconds: dict[str, float] = field(default_factory=lambda: {"write_s": 0.0, "reward_s": 0.0, "look_back_s": 0.0})

    def build_round(self, first_sample: int, step: int) -> Round:
        """Write, score and weigh the answers of the round after `first_sample` consumed prompts and `step` optimizer steps.

        Every function in `on_round` is called with the round. All ranks must call. Raises, on all ranks alike, DataError if a
        reward fails or no group has rewards that differ, and Interrupted if the run is asked to stop.
        """
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        written = self._write(first_sample, self.prompts_per_round, step)
        facts: dict[str, float] = {}
        num_prompts = self.prompts_per_round
        kept = written
        if self.settings.idle_groups is IdleGroups.replace:
            kept, num_prompts = self._replace_idle(written, first_sample, step)
            facts["groups/replaced"] = num_prompts - len(kept.groups)
            facts["groups/missing"] = self.prompts_per_round - len(kept.groups)
        rollout_round = self.build_round_from_scores(kept.groups, kept.scores, first_sample, num_prompts)
        self.report_phase("training")
        is_idle = idle(self._rewards(written.scores))
        rollout_round.facts = round_metrics(written.groups, written.scores, is_idle) | facts
        rollout_round.costs = self._speeds(written.groups)
        for listener in self.on_round:
            listener(rollout_round, step)
        return rollout_round

    def build_round_from_scores(
        self, groups: list[Group], scores: list[GroupScores], first_sample: int = 0, num_prompts: int = 0
    ) -> Round:
        """A round of answers that were scored, with all that its loss reads. It consumes `num_prompts` after `first_sample`.

        All ranks must call. Raises Interrupted, on all ranks alike, if the run is asked to stop.
        """
        rollout_round = Round(
            first_sample=first_sample,
            num_prompts=num_prompts,
            groups=groups,
            scores=scores,
            advantages=np.zeros((len(groups), self.settings.group_size)),
            is_learned=~np.isnan(rewards_of(scores)),
        )
        self._weigh(rollout_round)
        return rollout_round

    def _write(self, first_sample: int, count: int, step: int) -> _Written:
        """Answers to `count` prompts, and their scores."""
        prompts = self.prompts.read(first_sample, count)
        with self._phase(f"writing answers (after step {step})", "write_s"):
            groups = self.group_generator.generate_groups(self.engine, prompts, self.settings.group_size)
        with self._phase(f"scoring answers (after step {step})", "reward_s"):
            scores = self.scorer.score(groups, step=step)
        return _Written(groups, scores)

    def _replace_idle(self, written: _Written, first_sample: int, step: int) -> tuple[_Written, int]:
        """Replace idle groups, whose answers all score alike and so teach nothing, by answers to further prompts.

        Returns (the first groups whose rewards differ, as many as a round has; prompts consumed up to the last of them). Further
        groups are appended to `written`. Prompts after the last group that is taken are not consumed: the next round answers
        them again, with its own weights. Raises DataError if in many draws no group has rewards that differ.
        """
        wanted = self.prompts_per_round
        attempts = 1  # how often answers were written for this round
        while True:
            with_spread = np.flatnonzero(~idle(self._rewards(written.scores))).tolist()  # numbers of groups
            num_written = len(written.groups)
            # Enough groups are there, or some, and the most prompts that a round may answer are used up.
            if len(with_spread) >= wanted or (with_spread and num_written >= MOST_WRITTEN * wanted):
                break
            if not with_spread and attempts >= MOST_IDLE_DRAWS:
                raise DataError(self._no_spread(written))
            missing = wanted - len(with_spread)
            # As many prompts as are needed if the share of groups with differing rewards stays as it was so far.
            count = math.ceil(missing / max(LEAST_SHARE, len(with_spread) / num_written))
            if with_spread:
                count = min(count, MOST_WRITTEN * wanted - num_written)
            further = self._write(first_sample + num_written, count, step)
            written.groups += further.groups
            written.scores += further.scores
            attempts += 1
        taken = with_spread[:wanted]
        num_consumed = taken[-1] + 1 if len(taken) == wanted else num_written
        return written.select(taken), num_consumed

    def _no_spread(self, written: _Written) -> str:
        """The error message if all answers to each prompt have the same reward, so that there is nothing to learn."""
        rewards = rewards_of(written.scores)
        known = rewards[~np.isnan(rewards)]
        observed = "no answer was scored"
        if len(known):
            observed = f"rewards lie between {known.min():g} and {known.max():g}"
        return (
            f"objective.idle_groups=replace: in none of {len(written.groups)} groups of {self.settings.group_size} answers do "
            f"the rewards differ ({observed}), so there is nothing to learn; give rewards that tell answers apart, easier "
            "prompts, or a larger objective.group_size"
        )

    def _weigh(self, rollout_round: Round) -> None:
        """Complete a round, in place: which answers count in the loss, their advantages, and log-probabilities for the loss.

        `old_logps` are those of the weights that wrote the answers, if several updates learn from one round; `reference_logps`
        those of the reference model, for the KL divergence. With `kl.place=reward` the divergence is subtracted from the rewards.
        All ranks must call.
        """
        # Which answers count in the loss.
        settings = self.settings
        rewards = self._rewards(rollout_round.scores)
        if settings.idle_groups is IdleGroups.drop:
            rollout_round.is_learned &= ~idle(rewards)[:, None]
        if settings.mask_truncated:
            has_ended = [answer.has_ended for answer in all_answers(rollout_round.groups)]
            rollout_round.is_learned &= np.reshape(has_ended, rollout_round.is_learned.shape)

        # Log-probabilities, each only if something needs it.
        num_answers = rewards.size
        several_updates = settings.rollout.steps * settings.rollout.iterations > 1
        kl_in_reward = settings.kl.weight > 0 and settings.kl.place is KlPlace.reward
        # The divergence in the reward is that of every scored answer, whether it counts in the loss or not.
        needed = rollout_round.learned(range(num_answers))
        if kl_in_reward:
            needed = np.flatnonzero(~np.isnan(rewards).ravel()).tolist()
        old_logps: dict[int, np.ndarray] = {}
        if several_updates or kl_in_reward:
            old_logps = self._look_back(rollout_round, needed, PolicyLogps(settings.rollout.temperature))
        if settings.kl.weight > 0:
            reference = ReferenceLogps(settings.rollout.temperature, self.references)
            rollout_round.reference_logps = self._look_back(rollout_round, needed, reference)

        # Advantages.
        if kl_in_reward:
            rewards = self._with_divergence(rewards, old_logps, rollout_round.reference_logps)
        if several_updates:
            rollout_round.old_logps = old_logps
        if settings.combine is Combine.normalised:
            # Each reward was already normalised within its group (`_rewards`); here their sum is, over the batch.
            rollout_round.advantages = advantages(rewards, Baseline.batch, Scale.batch_std)
        else:
            rollout_round.advantages = advantages(rewards, settings.baseline, settings.scale)

    def _rewards(self, scores: Sequence[GroupScores]) -> np.ndarray:
        """The reward of each answer that advantages are computed from, float64 [groups, answers], nan where unscored.

        With several reward functions it is their weighted sum, with `objective.combine=normalised` of normalised ones.
        """
        rewards = rewards_of(scores)
        if self.settings.combine is Combine.sum:
            return rewards
        by_reward = {}
        for name in scores[0].by_reward:
            by_reward[name] = np.stack([score.by_reward[name] for score in scores])
        weights = {name: reward.weight for name, reward in self.settings.rewards.items()}
        return normalised_sum(by_reward, weights, rewards)

    def _with_divergence(
        self, rewards: np.ndarray, old_logps: dict[int, np.ndarray], reference_logps: dict[int, np.ndarray]
    ) -> np.ndarray:
        """Rewards less the divergence of each answer from the reference (k1: the sum of differences over its tokens)."""
        flat = rewards.copy().ravel()
        for number, old in old_logps.items():
            difference = float(np.sum(old.astype(np.float64) - reference_logps[number]))
            flat[number] -= self.settings.kl.weight * difference
        return flat.reshape(rewards.shape)

    def _look_back(self, rollout_round: Round, numbers: list[int], row_scorer: RowScorer) -> dict[int, np.ndarray]:
        """Compute a number for each token of the answers `numbers` in forward passes: float32 [tokens] by the answer's number.

        `row_scorer` says which: log-probabilities of the policy or of the reference model. All ranks must call.
        """
        if not numbers:
            return {}
        with self._phase("looking back at the answers", "look_back_s"):
            samples = [rollout_round.sequence(number) for number in numbers]
            own_micro_batches, _ = self.dealer.deal(samples, samples[0])
            # Of each micro-batch, the numbers of its answers in the round; None for a sequence that only fills it up.
            answers: list[list[int | None]] = []
            for micro_batch in own_micro_batches:
                answers.append([None if position is None else numbers[position] for position in micro_batch.positions])
            batches = [to_device(micro_batch.batch, self.dealer.device) for micro_batch in own_micro_batches]
            return answer_logps(self.engine, batches, answers, row_scorer, self.runtime, self._check_stop)

    def _check_stop(self) -> None:
        if self.stop_now():
            raise Interrupted

    @contextmanager
    def _phase(self, phase: str, name: str) -> Iterator[None]:
        """Around a part of a round: reports `phase` as what the run is doing, and adds its seconds to `_seconds[name]`.

        Raises Interrupted before the part begins, if the run is asked to stop.
        """
        self._check_stop()
        self.report_phase(phase)
        began = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - began

    def _speeds(self, groups: Sequence[Group]) -> dict[str, Any]:
        """Seconds of each part of a round on its slowest rank, and the speed of writing. All ranks must call.

        For example {"write_s": 8.1, "reward_s": 0.4, "look_back_s": 1.2, "written_tokens_per_s": 5100.0}.
        """
        by_rank = gather_objects(self._seconds, self.runtime)
        seconds = dict.fromkeys(self._seconds, 0.0)
        for seconds_of_rank in by_rank:
            for name, rank_seconds in seconds_of_rank.items():
                seconds[name] = max(seconds[name], rank_seconds)
        tokens = sum(len(answer.ids) for answer in all_answers(groups))
        return {**seconds, "written_tokens_per_s": tokens / max(seconds["write_s"], 1e-9)}
