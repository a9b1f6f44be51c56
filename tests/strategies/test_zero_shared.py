"""Shared parameters under ZeRO-3."""

import pytest
from torch import nn

from strategies.errors import ConfigError
from strategies.zero_load import check_shared


def tied(first, second):
    model = nn.Module()
    model.one, model.two = first, second
    model.two.weight = model.one.weight
    return model


def test_layers_that_share_what_trains_are_refused_and_tied_embeddings_and_frozen_ones_are_not():
    with pytest.raises(ConfigError, match=r"one.weight and two.weight are one parameter.*strategy=fsdp2"):
        check_shared(tied(nn.Linear(4, 4), nn.Linear(4, 4)))
    check_shared(tied(nn.Embedding(4, 4), nn.Linear(4, 4, bias=False)))
    frozen = tied(nn.Linear(4, 4), nn.Linear(4, 4))
    frozen.requires_grad_(False)
    check_shared(frozen)
