"""What a run's objective compares the trained model with: a teacher, or the model as the run began."""

from __future__ import annotations

from enum import Enum, auto
from typing import Any

from strategies.parameters import TEACHER_PREFIX
from trainer.model.config import ModelConfig
from trainer.model.weights import WeightSource
from trainer.objectives.base import ObjectiveConfig, ObjectiveFamily, ReferenceModels
from trainer.objectives.frozen_model import frozen_model
from trainer.objectives.registry import build_objective, objective_family
from trainer.objectives.teacher import check_head_computes_divergence
from trainer.step import BuiltModel
from trainer.tuning.base import LoraConfig, Tuning, TuningConfig
from trainer.tuning.build import initial_weights_reader


def reference_models(tuning: Tuning, teacher: Any = None) -> ReferenceModels:
    """What an objective may compare with: the base under the adapter if the tuning keeps it, and a teacher if there is one."""
    return ReferenceModels(tuning.reference if tuning.keeps_base else None, teacher)


class ReferenceSource(Enum):
    """Where the outputs come from that an objective compares the trained model with."""

    no_reference = auto()
    """The objective compares nothing."""
    adapter_off = auto()
    """From the trained model with its adapter off, which is the model before training. No copy is needed."""
    initial_adapter = auto()
    """From the trained model with the adapter's initial values, of which the engine keeps a copy."""
    frozen_model = auto()
    """From a second, frozen model: a teacher, or a copy of the model before training."""


def attach_reference_model(
    built: BuiltModel,
    config: ModelConfig,
    objective: ObjectiveConfig,
    tuning_config: TuningConfig,
    source: WeightSource,
    tokenizer: Any,
) -> None:
    """Give the step module of `built` the reference model that its objective compares with, by the case of `ReferenceSource`:

    - `no_reference`, `adapter_off`: nothing changes.
    - `initial_adapter`: sets `keeps_initial_weights` in the step's plan, so that the engine keeps the values.
    - `frozen_model`: adds a frozen model to the step module, as `teacher` also where it is a copy, and where its weights come
      from to `source`.

    In the last two cases the objective is built anew, since it takes its reference when it is built.

    Raises ConfigError if a teacher has another vocabulary, or if the trained model has a head whose distributions cannot be
    compared.
    """
    family = objective_family(objective)
    step = built.step_module
    tuning = built.tuning
    if family.compares_distributions(objective):
        check_head_computes_divergence(step.model, f"objective={family.name}")
    reference_source = _reference_source(family, objective, tuning, tuning_config)
    if reference_source is ReferenceSource.initial_adapter:
        step.plan.keeps_initial_weights = True
        step.objective = build_objective(objective, ReferenceModels(keeps_initial_weights=True))
    elif reference_source is ReferenceSource.frozen_model:
        _attach_frozen_model(built, config, objective, tuning_config, source, tokenizer)


def _attach_frozen_model(
    built: BuiltModel,
    config: ModelConfig,
    objective: ObjectiveConfig,
    tuning_config: TuningConfig,
    source: WeightSource,
    tokenizer: Any,
) -> None:
    """Add a teacher, or a frozen copy of the model before training, to the step module on meta; the engine shards it too.

    Sets in `source.frozen_sources` where its weights are read.
    """
    step = built.step_module
    has_teacher = objective_family(objective).teacher(objective) is not None
    # A teacher has weights of its own; a copy begins with the adapter of `tuning.from`, if there is one.
    initial_adapter = None if has_teacher else initial_weights_reader(built.base_on_meta, tuning_config)
    frozen = frozen_model(config, objective, built.config, built.attention_layout, source, initial_adapter, tokenizer)
    step.teacher = frozen.model
    source.frozen_sources[TEACHER_PREFIX] = frozen.weights
    step.objective = build_objective(objective, reference_models(built.tuning, frozen.model))
    # The engine shards and recomputes by blocks, so it must know the frozen model's.
    step.add_block_classes(frozen.block_classes)


def _reference_source(
    family: ObjectiveFamily, objective: ObjectiveConfig, tuning: Tuning, tuning_config: TuningConfig
) -> ReferenceSource:
    """Decide where an objective's reference outputs come from, without a second model if that is possible.

    Objectives such as dpo compare with the model before training, distillation with a teacher. Only some compare whole
    distributions over the vocabulary; the others compare log-probabilities.
    """
    compares_distributions = family.compares_distributions(objective)
    if not compares_distributions and not family.compares_with_initial_model(objective):
        return ReferenceSource.no_reference
    if not compares_distributions and tuning.adapter:
        # Only log-probabilities are compared, which an engine can also compute with the adapter's initial values.
        if _base_is_initial_model(tuning, tuning_config):
            return ReferenceSource.adapter_off
        return ReferenceSource.initial_adapter
    # Distributions come from a forward pass with the adapter off, which needs the base to be in the model still.
    if family.teacher(objective) is None and tuning.keeps_base:
        return ReferenceSource.adapter_off
    return ReferenceSource.frozen_model


def _base_is_initial_model(tuning: Tuning, config: TuningConfig) -> bool:
    """Whether an untrained adapter changes nothing, so that the model with the adapter off is the model before training.

    True for new LoRA adapters, one factor of which starts at zero. False for other methods, some of which start with random
    values, and for an adapter that was trained before (`tuning.from`).
    """
    return tuning.keeps_base and isinstance(config, LoraConfig)
