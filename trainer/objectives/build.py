"""From an objective's name to the object."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from trainer.objectives.base import (
    ClassificationConfig,
    DpoConfig,
    Objective,
    ObjectiveConfig,
    OrpoConfig,
    RewardConfig,
    Seq2seqConfig,
    SimpoConfig,
)

if TYPE_CHECKING:
    from trainer.objectives.preference import Reference

BALANCED = "balanced"


def settled(config: ObjectiveConfig, labels: np.ndarray | None, names: list[str] | None) -> ObjectiveConfig:
    """The settings with weights in place of `balanced`, from the labels (int64 [D]) of the training documents."""
    if not isinstance(config, ClassificationConfig) or config.class_weights != BALANCED:
        return config
    from trainer.objectives.classification import balanced_weights

    assert labels is not None and names is not None, "classification has labels"
    return replace(config, class_weights=balanced_weights(labels, names, multi_label=config.multi_label))


def build_objective(config: ObjectiveConfig, reference: Reference | None = None) -> Objective:
    """The objective that `config` names.

    `reference` switches the tuned model's adapter off; None where there is no adapter to switch off.
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
    from trainer.objectives.sft import Sft

    return Sft()
