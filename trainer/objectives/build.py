"""From an objective's name to the object."""

from __future__ import annotations

from trainer.objectives.base import Objective, ObjectiveConfig, ObjectiveName


def build_objective(config: ObjectiveConfig) -> Objective:
    """The objective that `config` names."""
    if config.name is ObjectiveName.classification:
        from trainer.objectives.classification import Classification

        return Classification()
    from trainer.objectives.sft import Sft

    return Sft()
