"""Names of metrics in trackers, beside those in `metrics.jsonl`: one table for every tracker and for those who read them back.

What a step logs is `train/NAME`, as transformers' Trainer writes it, so that one panel holds runs of both. Figures that the
Trainer does not have stand in groups of their own: `speed/`, `time/`, `memory/`, `data/`, `experts/`, `gpu/`.
Names of evaluations and of the summary are the same in both places: settings, gates and saved views go by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

FIRST_NAMES_EDITION = 1
"""Edition of the names in trackers of runs that record no edition: they are those of `metrics.jsonl`."""
RATED_REWARDS_EDITION = 3
"""From this edition on, rewards of answers that are rated one by one have the names of pairs (`PAIR_REWARD_BY_RATED_REWARD`)."""
CURRENT_NAMES_EDITION = 3
"""Edition of the names that a new run uses. A run that goes on keeps the edition it began with."""


@dataclass(frozen=True, slots=True)
class TrackedMetric:
    """A metric as trackers show it."""

    name: str
    unit: str
    hidden: bool = False
    """Whether W&B draws no panel of it: a counter, which is of use as an x axis alone."""


TRACKED_METRIC_BY_NAME: dict[str, TrackedMetric] = {
    "step": TrackedMetric("train/global_step", "steps", hidden=True),
    "epoch": TrackedMetric("train/epoch", "epochs", hidden=True),
    "tokens": TrackedMetric("train/num_tokens", "tokens since the start", hidden=True),
    "supervised_tokens": TrackedMetric("train/num_supervised_tokens", "tokens since the start", hidden=True),
    "loss": TrackedMetric("train/loss", "nats"),
    "grad_norm": TrackedMetric("train/grad_norm", "nats"),
    "lr": TrackedMetric("train/learning_rate", "per step"),
    "accuracy": TrackedMetric("train/accuracy", "share"),
    "margin": TrackedMetric("train/rewards/margins", "nats"),
    "chosen_reward": TrackedMetric("train/rewards/chosen", "nats"),
    "rejected_reward": TrackedMetric("train/rewards/rejected", "nats"),
    "skipped": TrackedMetric("train/skipped", "1 if the update was skipped"),
    "outlier/loss": TrackedMetric("train/outlier/loss", "standard deviations"),
    "outlier/grad_norm": TrackedMetric("train/outlier/grad_norm", "standard deviations"),
    "tokens_per_s": TrackedMetric("speed/tokens_per_s", "tokens/s, all ranks"),
    "tokens_per_s_per_rank": TrackedMetric("speed/tokens_per_s_per_rank", "tokens/s"),
    "supervised_tokens_per_s": TrackedMetric("speed/supervised_tokens_per_s", "tokens/s, all ranks"),
    "written_tokens_per_s": TrackedMetric("speed/written_tokens_per_s", "tokens/s, all ranks"),
    "mfu": TrackedMetric("speed/mfu", "share of the device's peak"),
    "step_s": TrackedMetric("time/step_s", "seconds"),
    "train_s": TrackedMetric("time/train_s", "seconds of a step without writing and scoring answers"),
    "write_s": TrackedMetric("time/write_s", "seconds of writing a round's answers"),
    "reward_s": TrackedMetric("time/reward_s", "seconds of scoring them"),
    "look_back_s": TrackedMetric("time/look_back_s", "seconds of passes over them before their steps"),
    "forward_s": TrackedMetric("time/forward_s", "seconds, mean of the ranks"),
    "backward_s": TrackedMetric("time/backward_s", "seconds, mean of the ranks"),
    "optimizer_s": TrackedMetric("time/optimizer_s", "seconds, mean of the ranks"),
    "data_wait_s": TrackedMetric("time/data_wait_s", "seconds, mean of the ranks"),
    "blocks_s": TrackedMetric("time/blocks_s", "seconds, median of the ranks"),
    "blocks_s/worst": TrackedMetric("time/blocks_s/worst", "seconds"),
    "blocks_s/rank": TrackedMetric("time/blocks_s/rank", "rank"),
    "checkpoint_stall_s": TrackedMetric("time/checkpoint_stall_s", "seconds"),
    "checkpoint_write_s": TrackedMetric("time/checkpoint_write_s", "seconds"),
    "memory_gib": TrackedMetric("memory/peak_gib", "GiB, largest of the ranks"),
    "memory_reserved_gib": TrackedMetric("memory/reserved_gib", "GiB, largest of the ranks"),
    "step_tokens": TrackedMetric("data/step_tokens", "tokens of the step"),
    "balance": TrackedMetric("data/balance", "share of the ranks' time that is work"),
}
"""By the name in `metrics.jsonl`. A name that is not here follows `tracked_name`."""

TRAINING_S = TrackedMetric("time/training_s", "seconds of steps since the start", hidden=True)
"""A counter that trackers alone get: `metrics.jsonl` has the seconds of each step."""
PAIR_ACCURACY = TrackedMetric("train/rewards/accuracies", "share")
"""`accuracy` of an objective that compares rewards, as TRL calls it."""
PAIR_REWARD_BY_RATED_REWARD = {"desirable_reward": "chosen_reward", "undesirable_reward": "rejected_reward"}
"""Rewards of answers that are rated one by one (KTO), by the metric of pairs whose name they share, as in TRL."""
TRACKER_GROUP_BY_NAME_PREFIX = {"step_tokens/": "data/", "experts/": "", "gpu/": ""}
"""What trackers put before a name with this prefix: `step_tokens/web` is `data/step_tokens/web`. Other names get `train/`."""
EVALUATION_PREFIXES = ("eval/", "test/", "final/", "overfitting/", "output/", "forgetting")
"""How the names of metrics of evaluations and of the summary begin."""
POSITION_METRICS = ("step", "tokens", "epoch")
"""Metrics in every row, also in one of an evaluation, that say how far the run was."""
TRACKER_GROUP_PREFIXES = ("train/", "speed/", "time/", "memory/", "data/", "experts/", "gpu/")
"""How the names of a step's metrics begin in trackers."""


class XAxis(StrEnum):
    """What W&B draws metrics over."""

    step = "step"
    tokens = "tokens"
    epoch = "epoch"
    seconds = "seconds"

    @property
    def tracked_name(self) -> str:
        """The metric of the axis in trackers."""
        return TRAINING_S.name if self is XAxis.seconds else TRACKED_METRIC_BY_NAME[str(self)].name


def tracked_name(name: str) -> str:
    """Translate the name of a metric in `metrics.jsonl` into that in W&B and other trackers, which has a group in front.

    `loss` becomes `train/loss`, a term `kl` of an objective `train/kl`, `step_tokens/web` becomes `data/step_tokens/web`. The
    name of a metric of an evaluation, such as `eval/loss`, stays as it is.
    """
    if name in TRACKED_METRIC_BY_NAME:
        return TRACKED_METRIC_BY_NAME[name].name
    if name.startswith(EVALUATION_PREFIXES):
        return name
    for name_prefix, tracker_group in TRACKER_GROUP_BY_NAME_PREFIX.items():
        if name.startswith(name_prefix):
            return tracker_group + name
    return f"train/{name}"


def tracked_row(
    row: Mapping[str, Any], *, step: int, training_s: float, edition: int = CURRENT_NAMES_EDITION
) -> dict[str, Any]:
    """Translate a row of `metrics.jsonl` for trackers: {"loss": 2.3, "kl": 0.1} becomes {"train/loss": 2.3, "train/kl": 0.1}.

    A row without a `loss` is of an evaluation: of its names only those in `POSITION_METRICS` change. `step` and `training_s`,
    the seconds of all steps so far, are added as axes. `edition`: which set of names the run began with, 2 or 3, since the
    curves of a resumed run must go on under their names. From 3 on, KTO's `desirable_reward` is `train/rewards/chosen`.
    """
    is_of_step = "loss" in row
    compares_rewards = is_of_step and "margin" in row  # of preference pairs, as in DPO
    tracked = {TRACKED_METRIC_BY_NAME["step"].name: step, TRAINING_S.name: training_s}
    for name, metric in row.items():
        if compares_rewards and name == "accuracy":
            tracked[PAIR_ACCURACY.name] = metric
        elif is_of_step and name in PAIR_REWARD_BY_RATED_REWARD and edition >= RATED_REWARDS_EDITION:
            tracked[tracked_name(PAIR_REWARD_BY_RATED_REWARD[name])] = metric
        elif is_of_step or name in POSITION_METRICS:
            tracked[tracked_name(name)] = metric
        else:
            tracked[name] = metric
    return tracked


def recorded_name(tracker_name: str) -> str | None:
    """Translate a tracker's name of a metric back into that of `metrics.jsonl`: `train/kl` becomes `kl`.

    The inverse of `tracked_name` for metrics of steps. None for a metric of an evaluation, which has one name in both places,
    and for the training seconds, which that file does not have.
    """
    if tracker_name == TRAINING_S.name or not tracker_name.startswith(TRACKER_GROUP_PREFIXES):
        return None
    if tracker_name == PAIR_ACCURACY.name:
        return "accuracy"
    if tracker_name in _NAME_BY_TRACKER_NAME:
        return _NAME_BY_TRACKER_NAME[tracker_name]
    for name_prefix, tracker_group in TRACKER_GROUP_BY_NAME_PREFIX.items():
        if tracker_name.startswith(tracker_group + name_prefix):  # `data/step_tokens/web`
            return tracker_name.removeprefix(tracker_group)
    return tracker_name.removeprefix("train/")


def restore_rated_reward_names(row: Mapping[str, Any]) -> dict[str, Any]:
    """Correct the names of rewards in a step's row that was read from a tracker, for a run that rates answers one by one (KTO).

    {"chosen_reward": 0.4} becomes {"desirable_reward": 0.4}: in trackers both have one name, which `recorded_name` takes for
    that of preference pairs.
    """
    rated_name_by_pair_name = {pair_name: rated_name for rated_name, pair_name in PAIR_REWARD_BY_RATED_REWARD.items()}
    return {rated_name_by_pair_name.get(name, name): metric for name, metric in row.items()}


_NAME_BY_TRACKER_NAME = {metric.name: name for name, metric in TRACKED_METRIC_BY_NAME.items()}
