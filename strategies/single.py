"""One process with full parameters: the reference that every other strategy is compared with."""

from __future__ import annotations

import torch
from torch import nn

from strategies.activation import apply_checkpointing_and_compile
from strategies.base import OptimizerFactory, ParameterSource, Precision, StrategyConfig
from strategies.native import NativeEngine
from strategies.parameters import (
    COMPUTE_DTYPE,
    allocate_on_device,
    load_full_parameters,
    set_parameter_dtypes,
)
from strategies.runtime import Runtime


class SingleStrategy:
    """Trains in one process, without any communication."""

    def __init__(self, config: StrategyConfig, precision: Precision, runtime: Runtime) -> None:
        self.config = config
        self.precision = precision
        self.runtime = runtime

    def prepare(
        self,
        step_module: nn.Module,
        *,
        source: ParameterSource,
        make_optimizer: OptimizerFactory,
        max_grad_norm: float,
    ) -> NativeEngine:
        """Turn a model on meta into an engine for one process: load its weights onto the device, then build the optimizer.

        `source`: where weights come from. `make_optimizer`: builds the optimizer of (plain name, parameter) pairs that train.
        `max_grad_norm`: to which the gradients' global norm is clipped; 0 does not clip.
        """
        load_in_full(step_module, source, self.precision, self.runtime)
        apply_checkpointing_and_compile(step_module, self.config)
        return NativeEngine(
            step_module,
            step_module,  # the module as it is called: nothing wraps it here
            make_optimizer=make_optimizer,
            max_grad_norm=max_grad_norm,
            precision=self.precision,
            runtime=self.runtime,
            strategy=self.config.name,
        )


def load_in_full(step_module: nn.Module, source: ParameterSource, precision: Precision, runtime: Runtime) -> None:
    """Load all parameters onto this rank's device: trainable ones in fp32, frozen ones in the compute type."""
    set_parameter_dtypes(step_module, trainable=torch.float32, frozen=COMPUTE_DTYPE[precision])
    allocate_on_device(step_module, runtime.device)
    load_full_parameters(step_module, source, runtime)
