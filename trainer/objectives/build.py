"""From an objective's name to the object."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from trainer.objectives.base import (
    ClassificationConfig,
    DistillationConfig,
    DpoConfig,
    KtoConfig,
    Objective,
    ObjectiveConfig,
    OrpoConfig,
    RewardConfig,
    Seq2seqConfig,
    SftConfig,
    SimpoConfig,
)

if TYPE_CHECKING:
    from torch import nn

    from trainer.objectives.causal import Reference

BALANCED = "balanced"


def settled(config: ObjectiveConfig, labels: np.ndarray | None, names: list[str] | None) -> ObjectiveConfig:
    """The settings with weights in place of `balanced`, from the labels (int64 [D]) of the training documents."""
    if not isinstance(config, ClassificationConfig) or config.class_weights != BALANCED:
        return config
    from trainer.objectives.classification import balanced_weights

    assert labels is not None and names is not None, "classification has labels"
    return replace(config, class_weights=balanced_weights(labels, names, multi_label=config.multi_label))


def imitates(config: ObjectiveConfig) -> bool:
    """Whether the objective compares with another model's distributions."""
    return isinstance(config, DistillationConfig)


def holds(config: ObjectiveConfig) -> bool:
    """Whether the objective compares with the distributions of the model as it was before training."""
    return isinstance(config, SftConfig) and config.forgetting.kl_weight > 0


def build_objective(
    config: ObjectiveConfig, reference: Reference | None = None, teacher: nn.Module | None = None
) -> Objective:
    """The objective that `config` names.

    `reference` switches the tuned model's adapter off; None where there is no adapter to switch off. `teacher` is the
    frozen model beside the tuned one. Without either, what is built can count samples, and more where it needs neither.
    """
    if isinstance(config, ClassificationConfig):
        from trainer.objectives.classification import Classification, MultiLabel

        # What is balanced is settled by `settled`; counting samples needs no weights.
        weights = None if config.class_weights == BALANCED else config.class_weights
        return MultiLabel(weights) if config.multi_label else Classification(weights)
    if isinstance(config, RewardConfig):
        from trainer.objectives.reward import Reward

        return Reward(config)
    if isinstance(config, DpoConfig | OrpoConfig | SimpoConfig):
        from trainer.objectives import preference

        if isinstance(config, DpoConfig):
            return preference.Dpo(config, reference)
        return preference.Orpo(config) if isinstance(config, OrpoConfig) else preference.Simpo(config)
    if isinstance(config, Seq2seqConfig):
        from trainer.objectives.seq2seq import Seq2seq

        return Seq2seq()
    if isinstance(config, KtoConfig):
        from trainer.objectives.kto import Kto

        return Kto(config, reference)
    return _with_teacher(config, reference, teacher)


def _with_teacher(config: ObjectiveConfig, reference: Reference | None, teacher: nn.Module | None) -> Objective:
    from trainer.objectives.sft import Replaying, Sft
    from trainer.objectives.teacher import AdapterOff, FrozenModel, Nobody, Teacher

    judge: Teacher = Nobody()
    if teacher is not None:
        judge = FrozenModel(teacher)
    elif reference is not None:
        judge = AdapterOff(reference)
    if isinstance(config, DistillationConfig):
        from trainer.objectives.distillation import Distillation

        return Distillation(config, judge)
    return Replaying(config.forgetting, judge) if isinstance(config, SftConfig) and holds(config) else Sft()
