"""From an objective's name to the object."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from trainer.objectives.base import ClassificationConfig, Objective, ObjectiveConfig

BALANCED = "balanced"


def settled(config: ObjectiveConfig, labels: np.ndarray | None, names: list[str] | None) -> ObjectiveConfig:
    """The settings with weights in place of `balanced`, from the labels (int64 [D]) of the training documents."""
    if not isinstance(config, ClassificationConfig) or config.class_weights != BALANCED:
        return config
    from trainer.objectives.classification import balanced_weights

    assert labels is not None and names is not None, "classification has labels"
    return replace(config, class_weights=balanced_weights(labels, names, multi_label=config.multi_label))


def build_objective(config: ObjectiveConfig) -> Objective:
    """The objective that `config` names."""
    if isinstance(config, ClassificationConfig):
        from trainer.objectives.classification import Classification, MultiLabel

        # What is balanced is settled by `settled`; counting samples needs no weights.
        weights = None if config.class_weights == BALANCED else config.class_weights
        return MultiLabel(weights) if config.multi_label else Classification(weights)
    from trainer.objectives.sft import Sft

    return Sft()
