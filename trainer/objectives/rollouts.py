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
    """Longest answer in tokens; a longer one is cut off and counts as truncated."""
    temperature: float = number(1.0, above=0, advice="1 draws as the model says; 0.6 to 1 as a rule")
    """Divides the logits that answers are drawn from, and those that are learned from."""
    stop: list[str] = setting(default_factory=list, reach=DESCRIBES)
    """Texts that end an answer; a text that is one special token is found fastest."""
    steps: int = number(1, least=1, advice="1 learns from fresh answers; 2 to 8 write more at a time")
    """Optimizer steps that a round is divided into; its answers are written before the first of them."""
    iterations: int = number(1, least=1, advice="1 uses each answer once")
    """Times that the answers of a round are learned from."""
    rows: int | None = number(None, least=1, advice="null takes as many as memory allows", resume=FREE)
    """Answers that a rank writes at a time; null: as many as memory allows. Changes them by rounding only."""
    share_prompts: bool | None = setting(None, reach=DESCRIBES, resume=FREE)
    """Whether a prompt is computed once for its answers while they are learned; null: on CPUs, where the model allows it."""
    record: int | None = number(None, least=0, advice="null records all groups, 0 none", resume=FREE)
    """Groups of each round whose answers and rewards are written to `rounds/` in the run directory; null: all."""
    most_difference: float | None = number(
        None, above=0, advice="null is 0.001 in float32 and 0.1 else; raise it only if you know why they differ"
    )
    """Mean difference in nats between log-probabilities of writing and of learning that ends the run; null: by precision."""


@dataclass(kw_only=True, slots=True)
class RoundsConfig(ObjectiveConfig):
    """Settings shared by objectives whose batches are rounds. `batch.global` counts answers."""

    group_size: int = number(8, least=1, advice="8 as a rule, 16 to 64 where few answers are right")
    """Answers that are written to each prompt; `batch.global` must be a multiple of it."""
    rewards: dict[str, RewardEntry] = setting(default_factory=dict, reach=DESCRIBES)
    """What scores the answers, by a name of your choice; a Python file stands for each of its functions."""
    reward_workers: int | None = number(None, least=1, advice="null takes up to 4; more for slow rewards", resume=FREE)
    """Processes of each rank that score answers at the same time; null: its share of the host's processors, at most 4."""
    idle_groups: IdleGroups = setting(IdleGroups.keep, reach=DESCRIBES)
    """Groups in which all answers score alike: `keep`, `drop` (saves their computation), or `replace` by further prompts."""
    rollout: RolloutConfig = group(RolloutConfig)
    """How the answers of a round are written, and how often they are used."""


def stop_problems(config: RoundsConfig) -> Iterator[str]:
    """What is wrong with the texts that end an answer, one line each."""
    if "" in config.rollout.stop:
        yield "objective.rollout.stop: has an empty text, which would end every answer; leave it out"
