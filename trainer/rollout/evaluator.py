"""`eval/reward`: the rewards of answers that the model writes to held-out prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import comb
from typing import TYPE_CHECKING

import numpy as np

from trainer.evaluation.base import DecodingConfig, GenerateConfig
from trainer.evaluation.tasks.pass_at_k import PASS_PREFIX, sample_counts_for_pass_at_k
from trainer.rollout.types import Answer, Group, GroupScores, Prompt, RewardScorer

if TYPE_CHECKING:
    from strategies.base import Engine
    from trainer.evaluation.generate import AnswerGenerator, GeneratedAnswer
    from trainer.objectives.rollouts import RolloutConfig

REWARD = "eval/reward"
"""The metric that is watched if nothing else is asked for."""


def evaluation_writing(rollout: RolloutConfig, generate: GenerateConfig) -> DecodingConfig:
    """How answers to held-out prompts are written: as long as those of training, and drawn as `evaluation.generate` says.

    That is greedily, one answer a prompt, unless its temperature and draws are set.
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
    """Writes answers to held-out prompts and scores them by the rewards of training."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        answer_generator: AnswerGenerator,
        scorer: RewardScorer,
        writing: DecodingConfig,
    ) -> None:
        """`prompts`: all that are answered, the same on all ranks."""
        self.prompts = prompts
        self.answer_generator = answer_generator
        self.scorer = scorer
        self.writing = writing
        self.groups: list[Group] = []
        self.scores: list[GroupScores] = []
        """What the last evaluation wrote, and its scores."""

    def run(self, engine: Engine) -> Iterator[tuple[str, float]]:
        """Yield (name, value), equal on all ranks. All ranks must call. Raises DataError and Interrupted on all or none."""
        written = self.answer_generator.generate_answers(engine, [prompt.ids for prompt in self.prompts], self.writing)
        self.groups = group_by_prompt(self.prompts, written)
        self.scores = self.scorer.score(self.groups, step=0)
        yield from reward_metrics(self.groups, self.scores, self.writing.draws).items()


def group_by_prompt(prompts: Sequence[Prompt], written: Sequence[GeneratedAnswer]) -> list[Group]:
    """The answers to each prompt, draw by draw. Their log-probabilities are not known, and are nan."""
    answers: list[list[Answer]] = [[] for _ in prompts]
    for answer in written:
        unknown = np.full(len(answer.ids), np.nan, np.float32)
        answers[answer.prompt_index].append(
            Answer(answer.sample_index, answer.ids, unknown, answer.text, answer.has_ended)
        )
    return [Group(prompt, of_prompt) for prompt, of_prompt in zip(prompts, answers, strict=True)]


def reward_metrics(groups: Sequence[Group], scores: Sequence[GroupScores], draws: int) -> dict[str, float]:
    """The metrics of an evaluation, by name. Answers without a score count nowhere; without any score a mean is nan.

    `eval/pass_at_K` is the expected best reward of K answers, of the prompts whose answers all have a score. For rewards of 0 and
    1 that is pass@k (Chen et al. 2021).
    """
    totals = np.concatenate([group_scores.total for group_scores in scores])
    metrics = {REWARD: _mean(totals)}
    for name in scores[0].by_reward:
        reward_values = np.concatenate([group_scores.by_reward[name] for group_scores in scores])
        metrics[f"eval/rewards/{name}/mean"] = _mean(reward_values)
    answers: list[Answer] = []
    for group in groups:
        answers += group.answers
    metrics["eval/completions/mean_length"] = float(np.mean([len(answer.ids) for answer in answers]))
    metrics["eval/completions/clipped_ratio"] = float(np.mean([not answer.has_ended for answer in answers]))
    metrics["eval/answers/unscored"] = float(np.isnan(totals).sum())
    metrics |= _means_by_source(groups, scores)
    # Of each prompt whose answers all have a score: these scores.
    complete_totals = [group_scores.total for group_scores in scores if not np.isnan(group_scores.total).any()]
    for k in sample_counts_for_pass_at_k(draws):
        best_of_k = [expected_best(total, k) for total in complete_totals]
        metrics[f"eval/{PASS_PREFIX}{k}"] = _mean(np.array(best_of_k))
    return metrics


def _means_by_source(groups: Sequence[Group], scores: Sequence[GroupScores]) -> Mapping[str, float]:
    """The mean reward of each source, as `eval/reward/NAME`; none where there is one source."""
    by_source: dict[str, list[np.ndarray]] = {}
    for group, group_scores in zip(groups, scores, strict=True):
        if group.prompt.source:
            by_source.setdefault(group.prompt.source, []).append(group_scores.total)
    return {f"{REWARD}/{source}": _mean(np.concatenate(totals)) for source, totals in sorted(by_source.items())}


def expected_best(rewards: np.ndarray, k: int) -> float:
    """The expected maximum of k of these rewards, drawn without repetition: the unbiased estimate for k fresh answers."""
    ordered = np.sort(rewards)
    draws = len(ordered)
    # The i-th smallest is the maximum of as many choices as there are of k - 1 among those below it.
    choices = [comb(rank, k - 1) for rank in range(draws)]
    return float(np.dot(ordered, choices) / comb(draws, k))


def _mean(values: np.ndarray) -> float:
    """The mean of the values that are no nan; nan without any."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
