"""More ranks than experts under FSDP2."""

import pytest
import torch
from torch import nn

from strategies.errors import ConfigError
from strategies.fsdp2 import check_experts_can_be_sharded


def step(*shape):
    model = nn.Module()
    model.mlp = nn.Module()
    model.mlp.experts = nn.Module()
    model.mlp.experts.gate_up_proj = nn.Parameter(torch.empty(*shape, device="meta"))
    return model


def test_more_ranks_than_experts_are_refused_with_the_replicas_that_fit():
    with pytest.raises(
        ConfigError, match=r"8 experts, and 64 ranks.*strategy=hsdp strategy.replicate=8.*over 8.*zero3"
    ):
        check_experts_can_be_sharded(step(8, 4, 4), 64, "fsdp2")
    with pytest.raises(ConfigError, match=r"5 experts, and 6 ranks.*strategy.replicate=2, which shards over 3"):
        check_experts_can_be_sharded(step(5, 4, 4), 6, "fsdp2")


def test_experts_room_ignores_other_parameters_of_three_dimensions():
    model = nn.Module()
    model.probe = nn.Parameter(torch.empty(1, 1, 8, device="meta"))
    check_experts_can_be_sharded(model, 8, "fsdp2")


@pytest.mark.parametrize("shape", [(8, 4, 4), (128, 4, 4), (4, 4)])
def test_as_many_experts_as_ranks_and_matrices_are_dealt(shape):
    check_experts_can_be_sharded(step(*shape), 8, "fsdp2")
