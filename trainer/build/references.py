"""What a run's objective compares the trained model with: a teacher, or the model as the run began."""

from __future__ import annotations

from typing import Any

from strategies.parameters import TEACHER
from trainer.model.config import ModelConfig
from trainer.model.weights import WeightSource
from trainer.objectives.base import ObjectiveConfig, ReferenceModels
from trainer.objectives.frozen_model import frozen_model
from trainer.objectives.registry import build_objective, family_of
from trainer.objectives.teacher import check_head
from trainer.step import Built
from trainer.tuning.base import LoraConfig, Tuning, TuningConfig
from trainer.tuning.build import merge_initial_adapter


def reference_models(tuning: Tuning, teacher: Any = None) -> ReferenceModels:
    """What an objective may compare with: the base under the adapter if the tuning keeps it, and a teacher if there is one."""
    return ReferenceModels(tuning.reference if tuning.keeps_base else None, teacher)


def attach_frozen(
    built: Built,
    config: ModelConfig,
    objective: ObjectiveConfig,
    tuning_config: TuningConfig,
    source: WeightSource,
    tokenizer: Any,
) -> None:
    """Give the step module what its objective compares with: a frozen teacher, or the model before training.

    With a new adapter, the model before training is the tuned model with the adapter off. With an adapter that was trained before
    (`tuning.from`) it is the base with that adapter: a frozen copy of both, or for log-probabilities alone the adapter's first
    values, which the engine keeps. Raises ConfigError if a teacher has another vocabulary, or a head that cannot be compared.
    """
    family = family_of(objective)
    step = built.step_module
    tuning = built.tuning
    if family.compares_distributions(objective):
        check_head(step.model, f"objective={family.name}")
    elif not family.compares_with_start(objective):
        return
    elif tuning.adapter:
        if not _begins_at_base(tuning, tuning_config):
            step.plan.keeps_start = True
            step.objective = build_objective(objective, ReferenceModels(keeps_start=True))
        return
    has_teacher = family.teacher(objective) is not None
    if not has_teacher and tuning.keeps_base:
        return
    # A teacher has weights of its own, whatever the run begins with.
    start = None if has_teacher else merge_initial_adapter(built.plain, tuning_config)
    frozen = frozen_model(config, objective, built.config, built.arrangement, source, start, tokenizer)
    step.teacher = frozen.model
    source.beside[TEACHER] = frozen.weights
    step.objective = build_objective(objective, reference_models(tuning, frozen.model))
    step.add_block_classes(frozen.block_classes)


def _begins_at_base(tuning: Tuning, config: TuningConfig) -> bool:
    """Whether a new adapter changes nothing at first, so that the model with the adapter off is the model as the run began.

    Plain LoRA begins with a zero factor. Of other methods some do and some do not: virtual tokens are drawn.
    """
    return tuning.keeps_base and isinstance(config, LoraConfig)
