"""`eval/reward`: the rewards of answers that the model writes to held-out prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import comb
from typing import TYPE_CHECKING

import numpy as np

from trainer.evaluation.base import DecodingConfig, GenerateConfig
from trainer.evaluation.tasks.pass_at_k import PASS_PREFIX, sample_counts_for_pass_at_k
from trainer.rollout.metrics import mean_without_nan
from trainer.rollout.types import Answer, AnswerGroup, GroupScores, Prompt, RewardScorer, all_answers

if TYPE_CHECKING:
    from strategies.base import Engine
    from trainer.evaluation.generate import AnswerGenerator, GeneratedAnswer
    from trainer.objectives.rollouts import RolloutConfig

REWARD_METRIC = "eval/reward"
"""The metric that is watched if nothing else is asked for."""


def evaluation_decoding(rollout: RolloutConfig, generate: GenerateConfig) -> DecodingConfig:
    """Decide how answers to held-out prompts are generated: length and stop strings as in training.

    All else is as `evaluation.generate` says, by default greedy decoding and one answer to each prompt.
    """
    return DecodingConfig(
        max_new_tokens=rollout.max_new_tokens,
        temperature=generate.temperature,
        top_p=generate.top_p,
        top_k=generate.top_k,
        stop=list(rollout.stop),
        seed=generate.seed,
        draws=generate.draws,
        batch_tokens=generate.batch_tokens,
    )


class RewardEvaluator:
    """Generates answers to held-out prompts and scores them by the rewards of training."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        answer_generator: AnswerGenerator,
        scorer: RewardScorer,
        decoding: DecodingConfig,
    ) -> None:
        """`prompts`: all prompts that are answered, the same on all ranks."""
        self.prompts = prompts
        self.answer_generator = answer_generator
        self.scorer = scorer
        self.decoding = decoding
        self.groups: list[AnswerGroup] = []
        """The answers of the last evaluation."""
        self.scores: list[GroupScores] = []
        """Their scores, one entry for each group."""

    def run(self, engine: Engine) -> Iterator[tuple[str, float]]:
        """Yield the metrics as (name, value), such as ("eval/reward", 0.4), equal on all ranks. Sets `groups` and `scores`.

        All ranks must call. Raises, on all ranks or none, DataError if a reward fails, Interrupted if the run is asked to stop.
        """
        answers = self.answer_generator.generate_answers(engine, [prompt.ids for prompt in self.prompts], self.decoding)
        self.groups = group_by_prompt(self.prompts, answers)
        self.scores = self.scorer.score(self.groups, step=0)
        yield from reward_metrics(self.groups, self.scores, self.decoding.draws).items()


def group_by_prompt(prompts: Sequence[Prompt], generated: Sequence[GeneratedAnswer]) -> list[AnswerGroup]:
    """Sort generated answers into a group for each prompt. Their log-probabilities, which only training needs, are nan."""
    groups = [AnswerGroup(prompt, []) for prompt in prompts]
    for answer in generated:
        unknown_logprobs = np.full(len(answer.ids), np.nan, np.float32)
        groups[answer.prompt_index].answers.append(
            Answer(answer.sample_index, answer.ids, unknown_logprobs, text=answer.text, has_ended=answer.has_ended)
        )
    return groups


def reward_metrics(groups: Sequence[AnswerGroup], scores: Sequence[GroupScores], num_samples: int) -> dict[str, float]:
    """Compute the metrics of an evaluation by rewards: {"eval/reward": 0.4, "eval/completions/mean_length": 112.0, ...}.

    `scores` has one entry for each group (the answers to one prompt). Answers without a score count in no mean; a mean without
    any score is nan. `eval/pass_at_K` is the mean over prompts of the expected best reward of K answers; only prompts whose
    answers all have a score count. For rewards of 0 and 1 that is pass@k (Chen et al. 2021). `num_samples`: answers to each
    prompt.
    """
    totals = np.concatenate([group_scores.total for group_scores in scores])
    metrics = {REWARD_METRIC: mean_without_nan(totals)}
    for name in scores[0].scores_by_reward:
        reward_values = np.concatenate([group_scores.scores_by_reward[name] for group_scores in scores])
        metrics[f"eval/rewards/{name}/mean"] = mean_without_nan(reward_values)
    answers = all_answers(groups)
    metrics["eval/completions/mean_length"] = float(np.mean([len(answer.ids) for answer in answers]))
    metrics["eval/completions/clipped_ratio"] = float(np.mean([not answer.has_ended for answer in answers]))
    metrics["eval/answers/unscored"] = float(np.isnan(totals).sum())
    metrics |= _means_by_source(groups, scores)
    return metrics | _pass_at_k_metrics(scores, num_samples)


def _pass_at_k_metrics(scores: Sequence[GroupScores], num_samples: int) -> dict[str, float]:
    """`eval/pass_at_K` for each K that `num_samples` answers to a prompt allow, from groups whose answers all have a score."""
    complete_totals = [group_scores.total for group_scores in scores if not np.isnan(group_scores.total).any()]
    metrics = {}
    for k in sample_counts_for_pass_at_k(num_samples):
        best_of_k = [expected_best_of_k(totals, k) for totals in complete_totals]
        metrics[f"eval/{PASS_PREFIX}{k}"] = mean_without_nan(np.array(best_of_k))
    return metrics


def _means_by_source(groups: Sequence[AnswerGroup], scores: Sequence[GroupScores]) -> Mapping[str, float]:
    """The mean reward of each source of prompts, {"eval/reward/NAME": 0.4}; {} if prompts name none, as with one source."""
    totals_by_source: dict[str, list[np.ndarray]] = {}
    for group, group_scores in zip(groups, scores, strict=True):
        if group.prompt.source:
            totals_by_source.setdefault(group.prompt.source, []).append(group_scores.total)
    return {
        f"{REWARD_METRIC}/{source}": mean_without_nan(np.concatenate(totals))
        for source, totals in sorted(totals_by_source.items())
    }


def expected_best_of_k(rewards: np.ndarray, k: int) -> float:
    """The expected maximum of k of these rewards, chosen without repetition: the unbiased estimate for k fresh answers."""
    ordered = np.sort(rewards)
    num_rewards = len(ordered)
    # A reward is the maximum of k chosen ones if the k - 1 others are among the `rank` smaller ones.
    num_choices_with_maximum = [comb(rank, k - 1) for rank in range(num_rewards)]
    return float(np.dot(ordered, num_choices_with_maximum) / comb(num_rewards, k))
