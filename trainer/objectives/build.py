"""From an objective's name to the object."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.objectives.base import (
    DpoConfig,
    Objective,
    ObjectiveConfig,
    ObjectiveName,
    OrpoConfig,
    RewardConfig,
    SimpoConfig,
)

if TYPE_CHECKING:
    from trainer.objectives.preference import Reference


def build_objective(config: ObjectiveConfig, reference: Reference | None = None) -> Objective:
    """The objective that `config` names.

    `reference` switches the tuned model's adapter off; None where there is no adapter to switch off.
    """
    if config.name is ObjectiveName.classification:
        from trainer.objectives.classification import Classification

        return Classification()
    if isinstance(config, RewardConfig):
        from trainer.objectives.reward import Reward

        return Reward(config)
    if isinstance(config, DpoConfig | OrpoConfig | SimpoConfig):
        from trainer.objectives import preference

        if isinstance(config, DpoConfig):
            return preference.Dpo(config, reference)
        return preference.Orpo(config) if isinstance(config, OrpoConfig) else preference.Simpo(config)
    from trainer.objectives.sft import Sft

    return Sft()
