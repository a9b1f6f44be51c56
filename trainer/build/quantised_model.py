"""Builds the engine that evaluates a model stored in 4 or 8 bits. Every rank holds the full model. All ranks must call."""

from __future__ import annotations

from typing import Any

import torch

from strategies.base import Engine, Precision
from strategies.native import NativeEngine
from strategies.parameters import COMPUTE_DTYPE
from strategies.runtime import Runtime
from trainer.build.parts import check_model_takes_data
from trainer.build.step_module import build_step_module
from trainer.config.run import RunConfig
from trainer.data.prepare import PreparedData
from trainer.model.loading import find_weights_directory
from trainer.model.quantised_checkpoints import replace_with_quantised
from trainer.objectives.registry import objective_family
from trainer.step import BuiltModel


def build_quantised_for_evaluation(
    config: RunConfig, tokenizer: Any, data: PreparedData, runtime: Runtime
) -> tuple[Engine, BuiltModel, Precision]:
    """Build the engine that evaluates a model whose files are quantised, as they are. Nothing is trained. Raises ConfigError.

    Returns (the engine, the model in it, the precision that it computes in): that of the weights that are not quantised.
    """
    objective, objective_notes = objective_family(config.objective).settle(
        config.objective, data.train, data.label_names
    )
    built = build_step_module(
        config.model,
        objective_config=objective,
        tuning_config=config.tuning,
        layout=config.data.layout,
        tokenizer=tokenizer,
        num_labels=None,
        half_on_gpu=runtime.device.type == "cuda",
    )
    built.substitutions.update(objective_notes)
    check_model_takes_data(config, built, data)
    module = built.step_module
    # Replaces the model on meta by the stored one, and returns the type that it computes in.
    dtype = replace_with_quantised(
        module.model, str(find_weights_directory(config.model)), built.config, runtime.device
    )
    engine = NativeEngine(
        module,
        module,
        # The engine makes an optimizer, but never takes a step here.
        make_optimizer=lambda named_parameters: torch.optim.SGD([parameter for _, parameter in named_parameters]),
        max_grad_norm=0.0,
        precision=Precision.fp32,  # to the engine this means no autocast: the layers compute in the type that they have
        runtime=runtime,
        strategy=config.strategy.name,
    )
    precision = next(precision for precision, compute_dtype in COMPUTE_DTYPE.items() if compute_dtype is dtype)
    return engine, built, precision
