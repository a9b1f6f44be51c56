"""Full tuning: every parameter trains."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import Tensor, nn

from trainer.tuning.base import BaseReader


class Full:
    """Changes nothing about the model."""

    adapter = False
    keeps_base = False

    def apply(self, model: nn.Module) -> nn.Module:
        """Every floating-point parameter trains."""
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

    def owns(self, name: str) -> bool:
        """Nothing is added."""
        return False

    def rewrites(self, name: str) -> bool:
        """Nothing starts elsewhere."""
        return False

    def rate_of(self, name: str) -> float:
        """One rate for all."""
        return 1.0

    def initial_value(self, name: str, shape: tuple[int, ...], base: BaseReader, seed: int) -> Tensor:
        """Never called: full tuning owns no parameters."""
        raise AssertionError(f"{name} belongs to the base model")
