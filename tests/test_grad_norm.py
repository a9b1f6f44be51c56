"""The gradient norm at the sizes of real parameters."""

from types import SimpleNamespace

import pytest
import torch

from strategies.native import NativeEngine


def test_the_norm_of_many_elements_is_exact():
    """However a strategy cuts them up: torch's own norm is 3e-4 off for one piece of this size on a CPU."""
    engine = NativeEngine.__new__(NativeEngine)
    engine.runtime = SimpleNamespace(device=torch.device("cpu"))
    grad = torch.randn(8_400_000, generator=torch.Generator().manual_seed(0)) * 1e-4
    expected = float(grad.double().norm())
    for grads in ([grad], list(grad.chunk(7))):
        assert float(engine._grad_norm(grads)) == pytest.approx(expected, rel=1e-6)
