"""Models are built without memory, whatever the size of one of their parameters."""

import pytest
import torch
from torch import nn

from strategies import parameters as parameters_module
from strategies.parameters import load_parameter_cooperatively, meta_context
from strategies.runtime import Runtime


class Layer(nn.Module):
    """Parameters of TiB, and buffers that are looked at."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2**20, 2**20)
        self.experts = nn.Parameter(torch.empty(2**10, 2**15, 2**15))
        self.zeros = nn.Parameter(torch.zeros((2**10, 2**15, 2**15), dtype=torch.float32))
        self.small = nn.Parameter(torch.ones(4, 4, 4))
        self.register_buffer("mask", torch.ones(2048, 2048, dtype=torch.bool).tril())
        self.register_buffer("angles", torch.outer(torch.arange(2**12), torch.ones(2**9)))


def test_parameters_need_no_memory_and_buffers_have_values():
    with meta_context():
        layer = Layer()
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert layer.experts.shape == layer.zeros.shape == (2**10, 2**15, 2**15)
    assert layer.mask.sum() == 2048 * 2049 // 2
    assert layer.angles[3, 5] == 3
    assert torch.zeros(2, 2**10, 2**10).device.type == "cpu"


def test_meta_parameters_draw_no_random_numbers_and_all_else_does():
    """Torch's own functions draw what is real; random numbers go on from where they were."""
    before = torch.get_rng_state()
    with meta_context():
        layer = nn.Linear(8, 8)
        assert nn.init.normal_(layer.weight) is layer.weight and layer.weight.normal_() is layer.weight
        assert nn.init.kaiming_uniform_(tensor=layer.weight).is_meta
    assert torch.equal(torch.get_rng_state(), before)
    with meta_context():
        real = nn.init.normal_(torch.zeros(8, device="cpu"))
    torch.set_rng_state(before)
    assert torch.equal(real, torch.zeros(8).normal_()) and real.std() > 0


@pytest.mark.parametrize("count", [12, 13, 2])
def test_ranks_that_read_a_parameter_together_each_read_their_part(count, monkeypatch):
    """The exchange is played back: each rank is asked twice, and gets the second time what all have handed in the first time."""
    values = torch.arange(count, dtype=torch.float32) + 1
    world = 4
    asked = []

    class Source:
        def read_slice(self, name, shape, start, stop):
            asked.append(stop - start)
            return values[start:stop]

    handed_in = []
    monkeypatch.setattr(parameters_module, "MIN_COOPERATIVE_ELEMENTS", 1)
    gather = parameters_module.dist
    for is_second in (False, True):
        monkeypatch.setattr(
            gather,
            "all_gather_into_tensor",
            lambda parts, part, second=is_second: (
                parts.copy_(torch.cat(handed_in)) if second else handed_in.append(part.clone())
            ),
        )
        for rank in range(world):
            runtime = Runtime(rank, world, rank, world, torch.device("cpu"), None)
            parameter = torch.zeros(count)
            load_parameter_cooperatively(parameter, "weight", Source(), runtime)
            assert not is_second or torch.equal(parameter, values)
    assert sum(asked) == 2 * count and max(asked) == -(-count // world)
    asked.clear()
    monkeypatch.setattr(parameters_module, "MIN_COOPERATIVE_ELEMENTS", 2**20)
    load_parameter_cooperatively(parameter, "weight", Source(), runtime)
    assert asked == [count]
