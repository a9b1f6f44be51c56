"""Full tuning: every parameter trains."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import Tensor, nn

from trainer.tuning.base import BaseWeightsReader


class Full:
    """Changes nothing about the model."""

    adapter = False
    keeps_base = False

    def apply(self, model: nn.Module) -> nn.Module:
        """Let every floating-point parameter train. Others, such as packed weights, have no gradient."""
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        return model

    def merge(self, model: nn.Module) -> nn.Module:
        """Nothing to fold."""
        return model

    def reference(self, model: nn.Module) -> AbstractContextManager[None]:
        """Never called: the model itself trains, so what it computed before training must be recorded."""
        raise AssertionError("training the model itself leaves no base model to switch back to")

    def base_name(self, name: str) -> str:
        """The name a parameter has in the base model's checkpoint."""
        return name

    def is_added_parameter(self, name: str) -> bool:
        """False: every parameter is the base's."""
        return False

    def rewrites(self, name: str) -> bool:
        """False: every parameter starts at the checkpoint's value."""
        return False

    def lr_factor(self, name: str) -> float:
        """1: every parameter has the run's learning rate."""
        return 1.0

    def initial_value(self, name: str, shape: tuple[int, ...], base: BaseWeightsReader, seed: int) -> Tensor:
        """Never called: full tuning owns no parameters."""
        raise AssertionError(f"{name} belongs to the base model")
