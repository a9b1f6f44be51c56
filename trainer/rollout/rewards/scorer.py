"""Scores the answers of rounds: each rank scores some of the groups in its worker processes, and all ranks learn all scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from strategies.errors import DataError, Interrupted
from strategies.runtime import Runtime, gather_objects, longer_timeout, num_usable_cores
from trainer.objectives.reward_functions import Convention, find_reward_function
from trainer.rollout.rewards.copies import function_locations
from trainer.rollout.rewards.judged import VerdictSource, judge_answers
from trainer.rollout.rewards.kinds import JudgeReward
from trainer.rollout.rewards.process import Call, Reply, Stopped, WorkerPool
from trainer.rollout.types import AnswerGroup, GroupScores

if TYPE_CHECKING:
    from trainer.objectives.rollouts import RewardEntry, RoundsConfig
    from trainer.rollout.rewards.model import RewardModelScorer


MAX_WORKERS = 4
"""Worker processes of a rank if the settings say nothing: each imports the reward files, and some are large."""


class WorkerScorer:
    """Scores groups (all answers to one prompt) by functions and built-in rewards.

    Rank g modulo the number of ranks scores group g.
    """

    def __init__(
        self,
        config: RoundsConfig,
        runtime: Runtime,
        run_dir: Path | None,
        *,
        stop_asked: Callable[[], bool] = lambda: False,
        judge: VerdictSource | None = None,
    ) -> None:
        """Decide how each reward is computed, and make worker processes for those that need one; `start` starts them.

        `run_dir`: where copies of reward files and the logs of workers are.
        `stop_asked`: whether this process was asked to stop; no collective.
        `judge`: for rewards of that kind.
        """
        self.rewards: Mapping[str, RewardEntry] = config.rewards
        self.runtime = runtime
        location_by_reward = function_locations(config.rewards, run_dir)
        # What workers load, by reward: {"file": "/runs/a/rewards/0/maths.py", "function": "score", "options": {}} for a function,
        # {"kind": "length", "options": {"limit": 512}} for a built-in reward.
        worker_setup: dict[str, dict[str, Any]] = {}
        self._single_answer_rewards = set()
        """Rewards that are called with one answer at a time, so that a time limit is that of an answer."""
        self._judge_rewards = [name for name, reward in config.rewards.items() if reward.kind == JudgeReward.kind]
        """Rewards that the judge gives."""
        self._judge = judge
        self._model_rewards = [name for name, reward in config.rewards.items() if reward.path is not None]
        """Rewards that are models."""
        self.model_scorer: RewardModelScorer | None = None
        """Scores by them; set once there is an engine that holds them."""
        for name, reward in config.rewards.items():
            if name in self._collective_rewards:  # the judge's, or a model's
                continue
            if name in location_by_reward:
                file, function = location_by_reward[name]
                worker_setup[name] = {"file": str(file), "function": function, "options": dict(reward.options)}
                signature = find_reward_function(f"{file}:{function}", f"objective.rewards.{name}.function")
                if signature.convention is not Convention.trl:
                    self._single_answer_rewards.add(name)
                continue
            options = dict(reward.options)
            if reward.kind == "length" and options.get("limit") is None:
                options["limit"] = config.rollout.max_new_tokens
            worker_setup[name] = {"kind": reward.kind, "options": options}
        log_dir = (run_dir or Path()) / "logs"
        num_workers = config.reward_workers or default_num_workers(runtime)
        if not worker_setup:  # the judge or models alone score
            num_workers = 0
        logs = [log_dir / f"rewards-rank-{runtime.rank}-{number}.log" for number in range(num_workers)]
        self._pool = WorkerPool(worker_setup, logs, stop_asked)

    def start(self) -> None:
        """Start the workers and load the rewards. All ranks must call. Raises DataError or Interrupted on all ranks alike."""
        with longer_timeout(self.runtime, 600):
            self._gather_results(self._pool.start)

    def score(self, groups: Sequence[AnswerGroup], *, step: int) -> list[GroupScores]:
        """Score the answers of a round by all rewards; returns the scores of each group, in order, the same on all ranks.

        A group is all answers to one prompt. `step`: optimizer steps taken, which reward functions are told. All ranks must call.
        Raises DataError or Interrupted on all ranks alike.
        """
        # Functions and built-in rewards: each rank scores its share of the groups.
        local_group_indices = range(self.runtime.rank, len(groups), self.runtime.world_size)
        # Ranks wait for the one whose calls take longest, at worst until each has reached its time limit.
        num_answers = sum(len(group.answers) for group in groups)
        longest_s = sum(reward.timeout_s for reward in self.rewards.values()) * num_answers
        scored_by_group: dict[int, _ScoredGroup] = {}  # by index of the group
        with longer_timeout(self.runtime, longest_s):
            for scored_by_rank in self._gather_results(
                lambda: self._score_local_groups(groups, local_group_indices, step)
            ):
                scored_by_group |= scored_by_rank
        scores = [scored_by_group[index].scores for index in range(len(groups))]

        # The judge and reward models: all ranks together.
        for name in self._collective_rewards:
            for group_scores, reward_scores in zip(scores, self._score_on_all_ranks(name, groups), strict=True):
                group_scores.scores_by_reward[name] = reward_scores

        for index, group_scores in enumerate(scores):
            group_scores.total = weighted_reward_sum(group_scores.scores_by_reward, self._weight_by_reward)
            # An answer for which a reward ran out of time has no total, whatever the other rewards are.
            group_scores.total[scored_by_group[index].answers_without_total] = np.nan
        return scores

    @property
    def _collective_rewards(self) -> list[str]:
        """Names of the rewards that all ranks compute together, without worker processes: of the judge and of reward models."""
        return [*self._judge_rewards, *self._model_rewards]

    @property
    def _weight_by_reward(self) -> dict[str, float]:
        return {name: reward.weight for name, reward in self.rewards.items()}

    def _score_on_all_ranks(self, name: str, groups: Sequence[AnswerGroup]) -> list[np.ndarray]:
        """Score groups by a reward model or the judge, on all ranks together: float64 [answers] of each group.

        All ranks must call.
        """
        if name in self._model_rewards:
            assert self.model_scorer is not None, "set before the first round"
            return self.model_scorer.scores(name, groups)
        assert self._judge is not None, "composing refuses a judge without an address"
        return judge_answers(self._judge, self.rewards[name].options, groups)

    def _score_local_groups(
        self, groups: Sequence[AnswerGroup], local_indices: Sequence[int], step: int
    ) -> dict[int, _ScoredGroup]:
        """Score this rank's share of the groups, in its worker processes, without communication.

        `groups`: all groups of the round; a group is all answers to one prompt.
        `local_indices`: indices of the groups that this rank scores, which are the keys of the result.
        """
        group_calls: list[_GroupCall] = []
        for index in local_indices:
            group_calls += self._calls_of_group(index, groups[index], step)
        replies = self._pool.run([group_call.call for group_call in group_calls])
        collector_by_group = {}
        for index in local_indices:
            collector_by_group[index] = _GroupScoreCollector(len(groups[index].answers), self.rewards)
        # `run` gives the replies in the order of the calls.
        for group_call, reply in zip(group_calls, replies, strict=True):
            collector = collector_by_group[group_call.group_index]
            collector.add_reply(group_call.call.reward, group_call.answer_indices, reply)
        return {index: collector.scored_group() for index, collector in collector_by_group.items()}

    def _calls_of_group(self, group_index: int, group: AnswerGroup, step: int) -> Iterator[_GroupCall]:
        """The calls of functions and built-in rewards that score a group (all answers to one prompt).

        A reward is called once with all answers of the group, or, if it is in `_single_answer_rewards`, once for each. Rewards
        that all ranks compute together, of the judge and of models, are left out: `_score_on_all_ranks` has them.
        """
        all_indices = list(range(len(group.answers)))
        for name, reward in self.rewards.items():
            if name in self._collective_rewards:
                continue
            indices_by_call = [all_indices]
            if name in self._single_answer_rewards:
                indices_by_call = [[index] for index in all_indices]
            for answer_indices in indices_by_call:
                arguments = _call_arguments(group, answer_indices, step)
                call = Call(name, arguments, group.prompt.origin, reward.timeout_s)
                yield _GroupCall(group_index=group_index, answer_indices=answer_indices, call=call)

    def _gather_results(self, work: Callable[[], Any]) -> list[Any]:
        """Call `work` on each rank; returns what it returned on all ranks, in rank order. All ranks must call.

        If `work` raises DataError or Stopped on a rank, all ranks end their worker processes and raise DataError or Interrupted.
        """
        local_result = _RankResult()
        try:
            local_result = _RankResult(returned=work())
        except Stopped:
            local_result = _RankResult(was_stopped=True)
        except DataError as error:
            local_result = _RankResult(problem=str(error))
        except BaseException:  # unforeseen: raised on this rank alone
            self.close()
            raise
        results = gather_objects(local_result, self.runtime)
        problems = [result.problem for result in results if result.problem is not None]
        was_stopped = any(result.was_stopped for result in results)
        if problems or was_stopped:
            self.close()
        if problems:
            raise DataError(problems[0])
        if was_stopped:
            raise Interrupted
        return [result.returned for result in results]

    def close(self) -> None:
        """End the worker processes of this rank. Local; may be called twice."""
        self._pool.close()


class _RankResult(NamedTuple):
    """What became of a function that each rank has called: exchanged, so that all ranks go on or raise alike."""

    returned: Any = None
    """What it returned; None if it raised."""
    problem: str | None = None
    """The message of the DataError that it raised."""
    was_stopped: bool = False
    """Whether it raised Stopped."""


class _GroupCall(NamedTuple):
    """A call of a reward for some answers of a group."""

    group_index: int
    answer_indices: list[int]
    """Indices in the group of the answers that the call scores."""
    call: Call


class _ScoredGroup(NamedTuple):
    """The scores of a group by the rewards that worker processes compute."""

    scores: GroupScores
    answers_without_total: list[int]
    """Indices of answers for which a reward with a weight took longer than its time limit."""


class _GroupScoreCollector:
    """Collects the scores of one group from the replies of worker processes."""

    def __init__(self, num_answers: int, rewards: Mapping[str, RewardEntry]) -> None:
        self.rewards = rewards
        self.scores_by_reward = {name: np.full(num_answers, np.nan) for name in rewards}
        self.num_timed_out = 0
        self.answers_without_total: set[int] = set()
        self.logged_numbers: dict[str, list[float]] = {}
        """Numbers that reward functions log, by `REWARD/NAME`."""
        self.extra_columns: dict[str, list[Any]] = {}
        """Values that reward functions add to the record of an answer, by `REWARD/NAME`: one of each answer, or None."""

    def add_reply(self, reward: str, answer_indices: list[int], reply: Reply) -> None:
        """Add the scores of one call of a reward to those of its group, with what the reward logged.

        `answer_indices`: of the answers in the group that were scored. A reply without scores is of a call that took longer than
        its time limit: its answers have no total if the reward has a weight.
        """
        if reply.scores is None:
            self.num_timed_out += len(answer_indices)
            if self.rewards[reward].weight != 0:
                self.answers_without_total.update(answer_indices)
            return
        for index, score in zip(answer_indices, reply.scores, strict=True):
            if score is not None:  # None: the reward does not apply to this answer
                self.scores_by_reward[reward][index] = score
        for name, numbers in reply.logged_numbers.items():
            self.logged_numbers.setdefault(f"{reward}/{name}", []).extend(numbers)
        for name, extra_values in reply.extra_columns.items():
            column = self.extra_columns.setdefault(f"{reward}/{name}", [None] * len(self.scores_by_reward[reward]))
            for index, value in zip(answer_indices, extra_values, strict=True):
                column[index] = value

    def scored_group(self) -> _ScoredGroup:
        """The scores of the group by its rewards. Its totals are nan: they are computed once all rewards are there."""
        num_answers = len(next(iter(self.scores_by_reward.values())))
        scores = GroupScores(
            total=np.full(num_answers, np.nan),
            scores_by_reward=self.scores_by_reward,
            num_timed_out=self.num_timed_out,
            logged_numbers=self.logged_numbers,
            extra_columns=self.extra_columns,
        )
        return _ScoredGroup(scores=scores, answers_without_total=sorted(self.answers_without_total))


def default_num_workers(runtime: Runtime) -> int:
    """Worker processes of a rank: its share of the processors that this process may use, at least one and at most four."""
    return max(1, min(MAX_WORKERS, num_usable_cores() // runtime.local_world_size))


def weighted_reward_sum(by_reward: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """Combine the scores of several rewards into the reward that is learned from, float64 [answers]: their sum by weight.

    nan where no reward with a weight applied. A reward that does not apply to an answer counts for nothing, as in TRL.
    """
    (first, *_) = by_reward.values()
    total = np.zeros(len(first))
    applied = np.zeros(len(first), bool)
    for name, scores in by_reward.items():
        has_score = ~np.isnan(scores)
        if weights[name] != 0:
            total[has_score] += weights[name] * scores[has_score]
            applied |= has_score
    total[~applied] = np.nan
    return total


def _call_arguments(group: AnswerGroup, answer_indices: list[int], step: int) -> dict[str, Any]:
    """Some answers of a group as JSON values, of which the worker process makes an `AnswersOfGroup`."""
    answers = [group.answers[index] for index in answer_indices]
    texts = [answer.text for answer in answers]
    ids = [answer.ids for answer in answers]
    truncated = [not answer.has_ended for answer in answers]
    return {
        "prompt": group.prompt.text,
        "columns": group.prompt.columns,
        "texts": texts,
        "ids": ids,
        "truncated": truncated,
        "step": step,
    }


def open_scorer(
    config: RoundsConfig,
    runtime: Runtime,
    run_dir: Path | None,
    *,
    stop_asked: Callable[[], bool] = lambda: False,
    judge: VerdictSource | None = None,
) -> WorkerScorer:
    """Start the scorer of a run and load its rewards; the caller must close it. All ranks must call.

    `run_dir`: has the copies of reward files.
    `stop_asked`: whether this process was asked to stop; no collective.
    `judge`: for rewards of that kind.

    Raises DataError or Interrupted on all ranks alike.
    """
    scorer = WorkerScorer(config, runtime, run_dir, stop_asked=stop_asked, judge=judge)
    scorer.start()
    return scorer
