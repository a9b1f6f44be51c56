"""The gradient norm at the sizes of real parameters."""

from types import SimpleNamespace

import pytest
import torch

from strategies.grad_norm import squared_norm
from strategies.native import NativeEngine


def test_the_norm_of_many_elements_is_exact():
    """However a strategy cuts them up: torch's own norm is 3e-4 off for one piece of this size on a CPU."""
    engine = NativeEngine.__new__(NativeEngine)
    engine.runtime = SimpleNamespace(device=torch.device("cpu"))
    grad = torch.randn(8_400_000, generator=torch.Generator().manual_seed(0)) * 1e-4
    expected = float(grad.double().norm())
    for grads in ([grad], list(grad.chunk(7))):
        assert float(engine._grad_norm(grads)) == pytest.approx(expected, rel=1e-6)


def test_small_empty_and_transposed_gradients():
    grads = [torch.zeros(0, 3), torch.full((2, 3), 2.0), torch.arange(6.0).view(2, 3).t(), torch.ones(3).bfloat16()]
    assert float(squared_norm(grads)) == pytest.approx(24 + 55 + 3, rel=1e-6)
    assert not torch.isfinite(squared_norm([torch.tensor([1.0, float("nan")])]))
