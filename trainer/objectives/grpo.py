"""Group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300) and its kin: rules of the settings, and the family.

The settings are in `grpo_config.py`, the loss is in `policy.py`, and the advantages are in `trainer/rollout/groups.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

from trainer.data.config import DataConfig
from trainer.objectives.answers import PromptDataSpec
from trainer.objectives.base import ObjectiveFamily, OtherSettings
from trainer.objectives.grpo_config import Baseline, ClipForm, Combine, GrpoConfig, KlEstimator, KlPlace, Scale
from trainer.objectives.policy import Policy
from trainer.objectives.reward_functions import prompt_spec
from trainer.objectives.rollouts import IdleGroups, stop_problems


def grpo_problems(config: GrpoConfig, other_settings: OtherSettings) -> Iterator[str]:
    """What is wrong with the settings of GRPO and its kin, alone and with `data.over_length`, one line each.

    Checked are stops of generation, group size, how rewards are combined, bounds of the ratio, and the KL estimator.
    """
    over_length = other_settings.data.over_length
    if over_length not in PromptDataSpec.over_length:
        yield f"data.over_length={over_length.value}: a prompt is never cut; set data.over_length=drop or data.over_length=fail"
    yield from stop_problems(config)
    yield from _group_problems(config)
    yield from _normalised_combine_problems(config)
    yield from _clip_problems(config)
    kl = config.kl
    if kl.place is KlPlace.reward and kl.estimator is not KlEstimator.k3:
        yield (
            f"objective.kl.estimator={kl.estimator}: in the reward the divergence is the plain difference of log-probabilities "
            "(k1); leave it out, or set objective.kl.place=loss"
        )


def _group_problems(config: GrpoConfig) -> Iterator[str]:
    """Settings that do not go with groups of one answer, and `objective.idle_groups` where idle groups teach too.

    A group: the answers to one prompt. It is idle if all of them get the same reward, so that none is better than another.
    """
    if config.group_size == 1:
        settings_that_compare_in_group = []
        if config.baseline in (Baseline.group, Baseline.others):
            settings_that_compare_in_group.append(f"objective.baseline={config.baseline}")
        if config.scale is Scale.std:
            settings_that_compare_in_group.append(f"objective.scale={config.scale}")
        if settings_that_compare_in_group:
            yield (
                f"objective.group_size=1 with {' and '.join(settings_that_compare_in_group)}: one answer has nothing in its "
                "group to be compared with; set objective.group_size=8, or objective.baseline=batch objective.scale=batch_std"
            )
    if config.idle_groups is not IdleGroups.keep and config.baseline in (Baseline.batch, Baseline.none):
        yield (
            f"objective.idle_groups={config.idle_groups} with objective.baseline={config.baseline}: a group in which all answers "
            "score alike is compared with other groups, so it teaches something; set objective.idle_groups=keep, or "
            "objective.baseline=group"
        )


def _normalised_combine_problems(config: GrpoConfig) -> Iterator[str]:
    """Settings that do not go with `objective.combine=normalised`.

    That whitens each reward within its group (the answers to one prompt), and then their sum over the round (all prompts that are
    answered before the next steps).
    """
    if config.combine is not Combine.normalised:
        return
    remedy = "leave it out, or set objective.combine=sum"
    if config.baseline is not Baseline.group:
        yield f"objective.baseline={config.baseline}: objective.combine=normalised compares rewards within a group; {remedy}"
    if config.scale is not Scale.std:
        yield (
            f"objective.scale={config.scale}: objective.combine=normalised divides each reward by its deviation in the group, "
            f"and their sum by its deviation in the round; {remedy}"
        )
    if config.group_size == 1:
        yield (
            "objective.group_size=1: objective.combine=normalised compares the answers to one prompt; set "
            "objective.group_size=8, or objective.combine=sum"
        )
    if config.kl.weight > 0 and config.kl.place is KlPlace.reward:
        yield (
            "objective.kl.place=reward: objective.combine=normalised scales each reward by itself, and a divergence with it; "
            "set objective.kl.place=loss"
        )


def _clip_problems(config: GrpoConfig) -> Iterator[str]:
    """Bounds of the probability ratio that `objective.clip_form` needs and does not have, or has and does not read.

    `cispo` needs a `clip_high` of 1 or more; only `ppo` reads `clip_negative`; `none` reads no bound.
    """
    if config.clip_form is ClipForm.cispo and (config.clip_high is None or config.clip_high < 1):
        clip_high = "null" if config.clip_high is None else f"{config.clip_high:g}"
        yield (
            f"objective.clip_high={clip_high}: objective.clip_form=cispo bounds the ratio itself with it, which is about 1; set "
            "objective.clip_high=5"
        )
    if config.clip_form is not ClipForm.ppo and config.clip_negative is not None:
        yield (
            f"objective.clip_negative={config.clip_negative:g}: objective.clip_form={config.clip_form} does not read it; leave "
            "it out, or set objective.clip_form=ppo"
        )
    if config.clip_form is ClipForm.none and config.clip_high is not None:
        yield (
            f"objective.clip_high={config.clip_high:g}: objective.clip_form=none bounds nothing; leave it out, or set "
            "objective.clip_form=ppo"
        )


def settings_without_effect(config: GrpoConfig) -> list[str]:
    """Settings of the ratio that change nothing, as `key=value`: where a round is one step, every ratio is 1."""
    if config.rollout.steps * config.rollout.iterations > 1:
        return []
    defaults = GrpoConfig()
    names = ("importance_level", "clip", "clip_high", "clip_negative")
    changed = [name for name in names if getattr(config, name) != getattr(defaults, name)]
    return [f"objective.{name}={getattr(config, name)}" for name in changed]


def max_positions(config: GrpoConfig, data: DataConfig) -> dict[str, int]:
    """The positions of the longest prompt with the longest answer."""
    longest_answer = config.rollout.max_new_tokens
    return {"data.max_length + objective.rollout.max_new_tokens": data.max_length + longest_answer}


GRPO = ObjectiveFamily(
    settings=GrpoConfig,
    data_spec=prompt_spec,
    build=Policy,
    problems=grpo_problems,
    compares_with_initial_model=lambda config: config.kl.weight > 0,
    max_positions=max_positions,
    rollout=lambda config: config.rollout,
    watched_metric="eval/reward",
    better_when_larger=("reward",),
)
