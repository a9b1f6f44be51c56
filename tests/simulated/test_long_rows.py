"""Tiles of the MLP and inputs of blocks on the host, in simulated steps: what they gather, keep and copy."""

from dataclasses import replace

import pytest

from strategies.runtime import SIMULATED
from strategies.simulation import simulated_rank
from strategies.tensor_inventory import MemoryKind
from tests.helpers.building import model_dir
from tests.simulated.cases import LENGTHS, LongRows, simulated
from trainer.planner.memory_tracker import StepPhase
from trainer.planner.simulate import simulate
from trainer.planner.simulation import build_step_parts

BLOCKS, WIDTH, RANKS = 2, 32, 8
TOKENS = sum(LENGTHS)
GATHERING = ("fsdp2", "zero3")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_dir(tmp_path_factory.mktemp("long"))


def gathers(step):
    return sum(each.name == "allgather_base" for each in step.collectives)


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("strategy", GATHERING)
def test_tiles_gather_nothing_again(model, strategy, tuning):
    """Three tiles and more a block. Without the MLP as one module, ZeRO-3 would gather its weights for each of them."""
    whole = LongRows(strategy, tuning, "bf16", "full", mlp_tokens=None)
    steps = [simulated(replace(whole, mlp_tokens=tokens), model, RANKS) for tokens in (None, 16)]
    assert 0 < gathers(steps[1]) <= gathers(steps[0])
    assert steps[1].flops > steps[0].flops  # the tiles compute once more


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_inputs_of_blocks_wait_on_the_host(model, mode):
    """Each input goes to the host and comes back once in a micro-batch, and the device is rid of it."""
    case = LongRows("fsdp2", "lora", "bf16", mode, accumulation=2, mlp_tokens=None)
    on_device, on_host = (simulated(replace(case, on_host=on_host), model, RANKS) for on_host in (False, True))
    size = BLOCKS * TOKENS * WIDTH * 2
    assert (
        on_host.bytes_to_host - on_device.bytes_to_host
        == on_host.bytes_to_device - on_device.bytes_to_device
        == 2 * size
    )
    assert (on_host.host_inputs.num_tensors, on_host.host_inputs.num_bytes) == (BLOCKS, size)
    assert on_host.host_inputs.pinned_size() == size  # 4,096 bytes a block, a power of two already
    assert on_device.host_inputs.num_tensors == 0 and on_host.flops == on_device.flops
    # What transformers lets require a gradient, the embeddings' output, autograd keeps for it: the input of the first block.
    backward = StepPhase("backward", 0, "before")
    assert on_device.peak_by_phase[backward].total_bytes - on_host.peak_by_phase[
        backward
    ].total_bytes == size // BLOCKS * (BLOCKS - 1)


def test_tiles_lower_the_peak_of_a_wide_mlp(tmp_path):
    """An MLP of eight times the width is most of a block: in eight tiles the peak loses more than half of its activations."""
    wide = model_dir(tmp_path, intermediate_size=1024)
    peaks = {}
    for tokens in (None, 64):
        case = LongRows("single", "lora", "bf16", "full", mlp_tokens=tokens)
        with simulated_rank(0, 1, device=SIMULATED) as runtime:
            peaks[tokens] = simulate(build_step_parts(case.config(wide, 1), [512], runtime), runtime).phase_and_peak[1]
    assert peaks[64].bytes_by_kind[MemoryKind.activations] < 0.5 * peaks[None].bytes_by_kind[MemoryKind.activations]
