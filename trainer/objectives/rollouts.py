"""Settings of objectives that learn from answers which the model writes itself, scored by rewards (online learning)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from strategies.settings import DESCRIBES, FREE, Reach, group, number, setting
from trainer.objectives.base import ObjectiveConfig


class IdleGroups(StrEnum):
    """What becomes of groups in which all answers have the same reward: they have no gradient."""

    keep = "keep"
    drop = "drop"
    replace = "replace"  # type: ignore[assignment]  # hides a method of str that nobody calls on it


@dataclass(kw_only=True, slots=True)
class RewardEntry:
    """One reward: a built-in kind, a function in a Python file, or a reward model. Exactly one of the three is set."""

    kind: str = setting("", reach=DESCRIBES)
    """A built-in reward, as `maths` or `length`; an unknown one is refused with a list of all."""
    function: str | None = setting(None, reach=Reach.code)
    """`<file>:<name>`: a function of a Python file, which is run in worker processes."""
    path: str | None = setting(None, reach=DESCRIBES)
    """Directory of a reward model: a run of `objective=reward`, its export, or a classifier of transformers with one label."""
    weight: float = number(
        1.0, least=-1000, most=1000, advice="1 as a rule; 0 measures a reward without learning from it"
    )
    """What the reward is multiplied by in the sum; 0 measures it without learning from it (a control)."""
    options: dict[str, Any] = setting(default_factory=dict, reach=DESCRIBES)
    """What its kind, function or model lets one choose; an unknown one is refused with a list of all."""
    timeout_s: float = number(30.0, above=0, advice="well below run.timeout_s; 10 to 60 as a rule")
    """Seconds that one call may take before its worker process is ended and its answers count as unscored."""


@dataclass(kw_only=True, slots=True)
class RolloutConfig:
    """How the answers of a round are written, and how many optimizer steps it is used for."""

    max_new_tokens: int = number(512, least=1, advice="as long as good answers are: 256 to 4096 as a rule")
    """Greatest length of an answer in tokens. A longer answer is cut off and counts as truncated."""
    temperature: float = number(1.0, above=0, advice="1 draws as the model says; 0.6 to 1 as a rule")
    """Sampling temperature. It divides the logits both when answers are generated and in the loss."""
    stop: list[str] = setting(default_factory=list, reach=DESCRIBES)
    """Texts that end an answer. A text that is a single special token is found fastest."""
    steps: int = number(1, least=1, advice="1 learns from fresh answers; 2 to 8 write more at a time")
    """Number of optimizer steps of a round. All answers of the round are generated before its first step."""
    iterations: int = number(1, least=1, advice="1 uses each answer once")
    """How often the answers of a round are trained on."""
    rows: int | None = number(None, least=1, advice="null takes as many as memory allows", resume=FREE)
    """Number of answers that a rank generates at a time. null: as many as memory allows. It changes answers only by
    rounding."""
    share_prompts: bool | None = setting(None, reach=DESCRIBES, resume=FREE)
    """Compute the prompt of a group once for all its answers in the loss. null: on CPUs, if the model allows it."""
    record: int | None = number(None, least=0, advice="null records all groups, 0 none", resume=FREE)
    """Number of groups of each round whose answers and rewards are written to `rounds/` in the run directory. null: all."""
    most_difference: float | None = number(
        None, above=0, advice="null is 0.001 in float32 and 0.1 else; raise it only if you know why they differ"
    )
    """Largest mean difference, in nats, between log-probabilities at generation and in training. Beyond it the run ends. null:
    depends on the precision."""


@dataclass(kw_only=True, slots=True)
class RoundsConfig(ObjectiveConfig):
    """Settings shared by objectives whose batches are rounds. `batch.global` counts answers."""

    group_size: int = number(8, least=1, advice="8 as a rule, 16 to 64 where few answers are right")
    """Number of answers that are generated to each prompt (a group). `batch.global` must be a multiple of it."""
    rewards: dict[str, RewardEntry] = setting(default_factory=dict, reach=DESCRIBES)
    """Rewards that score the answers, by names of your choice. A Python file stands for each of its functions."""
    reward_workers: int | None = number(None, least=1, advice="null takes up to 4; more for slow rewards", resume=FREE)
    """Number of worker processes of each rank that score answers. null: the rank's share of the host's cores, at most 4."""
    idle_groups: IdleGroups = setting(IdleGroups.keep, reach=DESCRIBES)
    """What happens to groups whose answers all have the same reward: `keep`; `drop`, which saves their computation; or
    `replace` by more prompts."""
    rollout: RolloutConfig = group(RolloutConfig)
    """How the answers of a round are generated, and how often they are used."""


def stop_problems(config: RoundsConfig) -> Iterator[str]:
    """What is wrong with the texts that end an answer, one line each."""
    if "" in config.rollout.stop:
        yield "objective.rollout.stop: has an empty text, which would end every answer; leave it out"
