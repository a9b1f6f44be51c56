"""Builds a round: prompts in the order of the run, answers, rewards, and log-probabilities to compare with."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from strategies.errors import DataError, Interrupted
from strategies.runtime import Runtime, gather_objects
from trainer.data.batches.collate import to_device
from trainer.objectives.base import ReferenceModels
from trainer.objectives.grpo_config import Baseline, Combine, GrpoConfig, KlPlace, Scale
from trainer.objectives.rollouts import IdleGroups
from trainer.rollout.answer_batcher import AnswerBatcher
from trainer.rollout.answer_logps import PolicyLogps, ReferenceLogps, RowScorer, answer_logps
from trainer.rollout.groups import advantages, is_idle_group, normalised_sum
from trainer.rollout.metrics import round_metrics
from trainer.rollout.prompts import PromptReader
from trainer.rollout.round import Round, stack_rewards
from trainer.rollout.types import AnswerGroup, GroupScores, RewardScorer, all_answers

if TYPE_CHECKING:
    from strategies.base import Engine
    from trainer.rollout.generator import EngineGroupGenerator

MAX_PROMPTS_RATIO = 3
"""Most prompts answered for a round with `idle_groups=replace`, as a multiple of those that the round needs."""
MIN_USEFUL_SHARE = 0.25
"""Share of useful groups, whose rewards differ, that is expected at least, so that no attempt answers more than four times as
many prompts as are missing."""
MAX_IDLE_ATTEMPTS = 10
"""Attempts without one group of differing rewards after which the run ends: its rewards tell no answers apart."""


@dataclass(slots=True)
class _ScoredGroups:
    """Groups of answers that were generated for a round, with their scores."""

    groups: list[AnswerGroup] = field(default_factory=list)
    scores: list[GroupScores] = field(default_factory=list)

    def select(self, indices: Sequence[int]) -> _ScoredGroups:
        """The groups with these indices."""
        selected = _ScoredGroups()
        for index in indices:
            selected.groups.append(self.groups[index])
            selected.scores.append(self.scores[index])
        return selected


class _GroupsOfRound(NamedTuple):
    """The groups of a round. Some of those that were generated may be idle: all answers score alike, and so teach nothing."""

    generated: _ScoredGroups
    """All, in the order of their prompts."""
    kept: _ScoredGroups
    """Those that the round learns from: all of them, or, if idle groups are replaced, the useful ones."""
    num_consumed_prompts: int
    """Prompts from the first one up to that of the last kept group, those of replaced groups included."""


@dataclass(slots=True)
class RoundBuilder:
    """Builds the rounds of a run: the model answers prompts, rewards score the answers, and some optimizer steps learn from them.

    Everything about a round is decided from the whole round, so alike on all ranks.
    """

    settings: GrpoConfig
    num_prompts_per_round: int
    engine: Engine
    prompts: PromptReader
    group_generator: EngineGroupGenerator
    scorer: RewardScorer
    batcher: AnswerBatcher
    runtime: Runtime
    references: ReferenceModels
    """What gives the reference model's log-probabilities, if the KL divergence from it has a weight."""
    stop_now: Callable[[], bool] = lambda: False
    """Asked on all ranks before each stage of a round: whether to stop."""
    report_phase: Callable[[str], None] = lambda phase: None
    """Called with what the run is doing, for messages about a rank that fails or hangs."""
    on_round: list[Callable[[Round, int], None]] = field(default_factory=list)
    """Called on all ranks with each new round, and the optimizer steps taken before it."""
    _seconds_by_stage: dict[str, float] = field(
        default_factory=lambda: {"write_s": 0.0, "reward_s": 0.0, "look_back_s": 0.0}
    )
    """Seconds that generating answers, scoring them, and computing log-probabilities of them took in this round."""

    def build_round(self, first_sample: int, step: int) -> Round:
        """Build the next round: generate answers to prompts, score them, and compute what the loss needs of them.

        All ranks must call.

        `first_sample`: prompts that the run has consumed so far.
        `step`: optimizer steps taken so far.

        Calls every function in `on_round` with the round. Raises, on all ranks alike, DataError if a reward fails or no group has
        rewards that differ, and Interrupted if the run is asked to stop.
        """
        self._seconds_by_stage = dict.fromkeys(self._seconds_by_stage, 0.0)
        generated = self._generate_and_score(first_sample, self.num_prompts_per_round, step)
        result = _GroupsOfRound(generated, kept=generated, num_consumed_prompts=self.num_prompts_per_round)
        replaced_metrics: dict[str, float] = {}
        # A group is all answers to one prompt. It is idle if all of them score alike: none is better than another, so it teaches
        # nothing.
        if self.settings.idle_groups is IdleGroups.replace:
            result = self._replace_idle_groups(generated, first_sample, step)
            num_kept = len(result.kept.groups)
            replaced_metrics["groups/replaced"] = result.num_consumed_prompts - num_kept
            replaced_metrics["groups/missing"] = self.num_prompts_per_round - num_kept
        rollout_round = self.build_round_from_scores(
            result.kept.groups, result.kept.scores, first_sample, result.num_consumed_prompts
        )
        self.report_phase("training")
        # The metrics are of all groups, also those that were replaced.
        is_idle = is_idle_group(self._rewards_for_advantages(result.generated.scores))
        answer_metrics = round_metrics(result.generated.groups, result.generated.scores, is_idle)
        rollout_round.metrics = answer_metrics | replaced_metrics
        rollout_round.cost_metrics = self._time_metrics(result.generated.groups)
        for listener in self.on_round:
            listener(rollout_round, step)
        return rollout_round

    def build_round_from_scores(
        self, groups: list[AnswerGroup], scores: list[GroupScores], first_sample: int = 0, num_prompts: int = 0
    ) -> Round:
        """Build a round of answers that were scored, with its advantages and, if the loss reads them, log-probabilities.

        `groups`: the answers to one prompt each.
        `first_sample`: prompts consumed before the round.
        `num_prompts`: prompts that it consumes; 0 if the groups were not generated for this run, as in a trial of rewards.

        All ranks must call. Raises Interrupted, on all ranks alike, if the run is asked to stop.
        """
        rollout_round = Round(
            first_sample=first_sample,
            num_prompts=num_prompts,
            groups=groups,
            scores=scores,
            advantages=np.zeros((len(groups), self.settings.group_size)),  # replaced below
            is_learned=~np.isnan(stack_rewards(scores)),  # an answer without a reward is not learned
        )
        # Excludes answers of groups that all score alike, and answers that were cut off, if the settings say so.
        self._exclude_answers_from_loss(rollout_round)
        self._set_logps_and_advantages(rollout_round)
        return rollout_round

    def _generate_and_score(self, first_sample: int, num_prompts: int, step: int) -> _ScoredGroups:
        """Let the model answer the `num_prompts` prompts after `first_sample` consumed ones, and score the answers.

        All ranks must call.
        """
        prompts = self.prompts.read(first_sample, num_prompts)
        with self._timed_stage(f"writing answers (after step {step})", stage_key="write_s"):
            groups = self.group_generator.generate_groups(self.engine, prompts, self.settings.group_size)
        with self._timed_stage(f"scoring answers (after step {step})", stage_key="reward_s"):
            scores = self.scorer.score(groups, step=step)
        return _ScoredGroups(groups, scores)

    def _replace_idle_groups(self, first_attempt: _ScoredGroups, first_sample: int, step: int) -> _GroupsOfRound:
        """Replace idle groups, whose answers all score alike and so teach nothing, by answers to further prompts.

        Keeps the first groups whose rewards differ, as many as a round has; fewer if `MAX_PROMPTS_RATIO` is reached. Prompts
        after that of the last kept group are not consumed: the next round answers them again, with its own weights.

        `first_attempt`: the groups that were generated for the round.

        All ranks must call. Raises DataError if no group has rewards that differ after `MAX_IDLE_ATTEMPTS` attempts.
        """
        num_wanted = self.num_prompts_per_round
        max_prompts = MAX_PROMPTS_RATIO * num_wanted
        generated = _ScoredGroups(list(first_attempt.groups), list(first_attempt.scores))
        num_attempts = 1
        while True:
            is_idle = is_idle_group(self._rewards_for_advantages(generated.scores))
            useful_groups = np.flatnonzero(~is_idle).tolist()  # indices of groups whose rewards differ
            num_answered = len(generated.groups)
            if len(useful_groups) >= num_wanted or (useful_groups and num_answered >= max_prompts):
                break
            if not useful_groups and num_attempts >= MAX_IDLE_ATTEMPTS:
                raise DataError(self._nothing_to_learn_message(generated))
            # As many prompts as are needed if the share of useful groups stays what it was so far.
            useful_share = max(MIN_USEFUL_SHARE, len(useful_groups) / num_answered)
            num_further = math.ceil((num_wanted - len(useful_groups)) / useful_share)
            if useful_groups:  # with none, `MAX_IDLE_ATTEMPTS` is the limit
                num_further = min(num_further, max_prompts - num_answered)
            further = self._generate_and_score(first_sample + num_answered, num_further, step)
            generated.groups += further.groups
            generated.scores += further.scores
            num_attempts += 1
        kept = useful_groups[:num_wanted]
        # Groups are in the order of the prompts, so that the last kept index tells how many prompts were used.
        num_consumed = kept[-1] + 1 if len(kept) == num_wanted else num_answered
        return _GroupsOfRound(generated, kept=generated.select(kept), num_consumed_prompts=num_consumed)

    def _nothing_to_learn_message(self, scored: _ScoredGroups) -> str:
        """Write the error for a run whose rewards tell no answers apart: all answers to each prompt have the same one.

        `scored`: all groups (answers to one prompt) that were tried.
        """
        rewards = stack_rewards(scored.scores)
        known_rewards = rewards[~np.isnan(rewards)]
        observed = "no answer was scored"
        if len(known_rewards):
            observed = f"rewards lie between {known_rewards.min():g} and {known_rewards.max():g}"
        return (
            f"objective.idle_groups=replace: in none of {len(scored.groups)} groups of {self.settings.group_size} answers do "
            f"the rewards differ ({observed}), so there is nothing to learn; give rewards that tell answers apart, easier "
            "prompts, or a larger objective.group_size"
        )

    def _exclude_answers_from_loss(self, rollout_round: Round) -> None:
        """Leave answers out of the loss that the settings exclude: set `is_learned`, bool [groups, answers], of a round to False.

        With `idle_groups=drop`: the answers of groups that all score alike. With `mask_truncated`: answers without an end.
        """
        if self.settings.idle_groups is IdleGroups.drop:
            is_idle = is_idle_group(self._rewards_for_advantages(rollout_round.scores))
            rollout_round.is_learned &= ~is_idle[:, None]
        if self.settings.mask_truncated:
            has_ended = [answer.has_ended for answer in all_answers(rollout_round.groups)]
            rollout_round.is_learned &= np.reshape(has_ended, rollout_round.is_learned.shape)

    def _set_logps_and_advantages(self, rollout_round: Round) -> None:
        """Compute what the loss compares answers by, and set it in a round: log-probabilities and advantages.

        All ranks must call.

        - `old_logps`: by the weights that generated the answers, if several updates learn from the round.
        - `reference_logps`: by the reference model, if the KL divergence has a weight.
        - `advantages`: how much better each answer scored than its baseline. With `kl.place=reward` the divergence is subtracted
          from the rewards first.

        `is_learned` of the round must be final.
        """
        settings = self.settings
        rewards = self._rewards_for_advantages(rollout_round.scores)
        has_several_updates = settings.rollout.steps * settings.rollout.iterations > 1
        kl_in_reward = settings.kl.weight > 0 and settings.kl.place is KlPlace.reward
        # Answers whose log-probabilities are needed. They are numbered as in the raveled `rewards`, [groups, answers].
        answer_numbers = rollout_round.learned_answer_numbers(range(rewards.size))
        if kl_in_reward:
            # The divergence in the reward is that of every scored answer, whether it counts in the loss or not.
            answer_numbers = np.flatnonzero(~np.isnan(rewards).ravel()).tolist()
        temperature = settings.rollout.temperature
        old_logps: dict[int, np.ndarray] = {}
        if has_several_updates or kl_in_reward:
            old_logps = self._compute_logps(rollout_round, answer_numbers, PolicyLogps(temperature))
        if has_several_updates:
            rollout_round.old_logps = old_logps
        if settings.kl.weight > 0:
            reference = ReferenceLogps(temperature, self.references)
            rollout_round.reference_logps = self._compute_logps(rollout_round, answer_numbers, reference)
        if kl_in_reward:
            rewards = self._rewards_minus_divergence(rewards, old_logps, rollout_round.reference_logps)
        if settings.combine is Combine.normalised:
            # Each reward was already normalised within its group (`_rewards_for_advantages`); here their sum is, over the batch.
            rollout_round.advantages = advantages(rewards, Baseline.batch, Scale.batch_std)
        else:
            rollout_round.advantages = advantages(rewards, settings.baseline, settings.scale)

    def _rewards_for_advantages(self, scores: Sequence[GroupScores]) -> np.ndarray:
        """The reward of each answer that advantages are computed from, float64 [groups, answers], nan where unscored.

        It is the weighted sum of the reward functions' scores; with `objective.combine=normalised`, of scores that are normalised
        within their group.
        """
        rewards = stack_rewards(scores)
        if self.settings.combine is Combine.sum:
            return rewards
        scores_by_reward = {}
        for name in scores[0].scores_by_reward:
            scores_by_reward[name] = np.stack([group_scores.scores_by_reward[name] for group_scores in scores])
        weight_by_reward = {name: reward.weight for name, reward in self.settings.rewards.items()}
        return normalised_sum(scores_by_reward, weight_by_reward, rewards)

    def _rewards_minus_divergence(
        self, rewards: np.ndarray, old_logps: dict[int, np.ndarray], reference_logps: dict[int, np.ndarray]
    ) -> np.ndarray:
        """Subtract from rewards `kl.weight` times the answers' divergence from the reference model; float64 [groups, answers].

        The divergence of an answer is the sum over its tokens of old minus reference log-probability (the estimator k1). Both
        arguments have float32 [tokens] by number of the answer in the round.
        """
        flat_rewards = rewards.copy().ravel()
        for answer_number, old_logps_of_answer in old_logps.items():
            divergence = float(np.sum(old_logps_of_answer.astype(np.float64) - reference_logps[answer_number]))
            flat_rewards[answer_number] -= self.settings.kl.weight * divergence
        return flat_rewards.reshape(rewards.shape)

    def _compute_logps(
        self, rollout_round: Round, answer_numbers: list[int], row_scorer: RowScorer
    ) -> dict[int, np.ndarray]:
        """Compute the log-probability of each token of some answers by forward passes: {answer number: float32 [tokens]}.

        `answer_numbers`: of answers in the round; without any, nothing is computed.
        `row_scorer`: by which weights, those of the policy or of the reference model.

        All ranks must call.
        """
        if not answer_numbers:
            return {}
        with self._timed_stage("looking back at the answers", stage_key="look_back_s"):
            samples = [rollout_round.sequence(number) for number in answer_numbers]
            # A rank with too few answers runs the filler in their place, since each pass is collective.
            local_micro_batches = self.batcher.divide(samples, filler=samples[0]).micro_batches
            # The answer numbers of each micro-batch's sequences; None for a filler.
            numbers_by_batch: list[list[int | None]] = []
            for micro_batch in local_micro_batches:
                numbers_by_batch.append(
                    [None if index is None else answer_numbers[index] for index in micro_batch.answer_indices]
                )
            batches = [to_device(micro_batch.batch, self.batcher.device) for micro_batch in local_micro_batches]
            return answer_logps(
                self.engine, batches, numbers_by_batch, row_scorer, self.runtime, self._raise_if_stopping
            )

    def _raise_if_stopping(self) -> None:
        """Raise Interrupted if the run is asked to stop. All ranks must call."""
        if self.stop_now():
            raise Interrupted

    @contextmanager
    def _timed_stage(self, phase: str, *, stage_key: str) -> Iterator[None]:
        """A context around a stage of a round (generating, scoring, looking back): reports it, and counts its seconds.

        `phase`: what the run is doing, for messages.
        `stage_key`: the key of `_seconds_by_stage` to which the seconds are added; not if the stage raises.

        Raises Interrupted before the stage begins, if the run is asked to stop.
        """
        self._raise_if_stopping()
        self.report_phase(phase)
        started_at = time.perf_counter()
        yield
        self._seconds_by_stage[stage_key] += time.perf_counter() - started_at

    def _time_metrics(self, groups: Sequence[AnswerGroup]) -> dict[str, Any]:
        """Seconds of each stage of a round on its slowest rank, and the speed of generation. All ranks must call.

        "look_back_s" is the time of the forward passes for log-probabilities. For example {"write_s": 8.1, "reward_s": 0.4,
        "look_back_s": 1.2, "written_tokens_per_s": 5100.0}.
        """
        slowest_seconds = dict.fromkeys(self._seconds_by_stage, 0.0)
        for rank_seconds in gather_objects(self._seconds_by_stage, self.runtime):
            for stage_key, seconds in rank_seconds.items():
                slowest_seconds[stage_key] = max(slowest_seconds[stage_key], seconds)
        num_tokens = sum(len(answer.ids) for answer in all_answers(groups))
        return {**slowest_seconds, "written_tokens_per_s": num_tokens / max(slowest_seconds["write_s"], 1e-9)}
