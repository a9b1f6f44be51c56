"""What a run's objective compares the trained model with: a teacher, or the model as the run began."""

from __future__ import annotations

from typing import Any

from strategies.parameters import TEACHER_PREFIX
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


def attach_reference_model(
    built: Built,
    config: ModelConfig,
    objective: ObjectiveConfig,
    tuning_config: TuningConfig,
    source: WeightSource,
    tokenizer: Any,
) -> None:
    """Give the step module the reference model that its objective compares with, if it needs one that is not there already.

    - An objective that compares nothing needs none.
    - The model before training is there without a copy if a new adapter is trained: it is the model with the adapter off. With an
      adapter trained before (`tuning.from`), the engine keeps the adapter's first values, if only log-probabilities are compared.
    - Otherwise a frozen model is added: a teacher, or a copy of the model before training.

    Raises ConfigError if a teacher has another vocabulary, or a head that cannot be compared.
    """
    family = family_of(objective)
    step = built.step_module
    tuning = built.tuning
    compares_distributions = family.compares_distributions(objective)
    if not compares_distributions and not family.compares_with_initial_model(objective):
        return
    if compares_distributions:
        check_head(step.model, f"objective={family.name}")
    elif tuning.adapter:
        if not _base_is_initial_model(tuning, tuning_config):
            step.plan.keeps_initial_weights = True
            step.objective = build_objective(objective, ReferenceModels(keeps_initial_weights=True))
        return
    has_teacher = family.teacher(objective) is not None
    if not has_teacher and tuning.keeps_base:
        return

    # A frozen model. A teacher has weights of its own; a copy begins with the adapter of `tuning.from`, if there is one.
    initial_adapter = None if has_teacher else merge_initial_adapter(built.plain, tuning_config)
    frozen = frozen_model(config, objective, built.config, built.arrangement, source, initial_adapter, tokenizer)
    step.teacher = frozen.model
    source.frozen_sources[TEACHER_PREFIX] = frozen.weights
    step.objective = build_objective(objective, reference_models(tuning, frozen.model))
    step.add_block_classes(frozen.block_classes)


def _base_is_initial_model(tuning: Tuning, config: TuningConfig) -> bool:
    """Whether an untrained adapter changes nothing, so that the model with the adapter off is the model before training.

    True for LoRA, one factor of which starts at zero. False for other methods, some of which start with random values.
    """
    return tuning.keeps_base and isinstance(config, LoraConfig)
