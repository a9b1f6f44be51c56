"""What stands in for DeepSpeed's own exchange holds, moves and exchanges what that does."""

import os

import pytest
import torch

from strategies.runtime import SIMULATED, Runtime
from strategies.simulation import fake_tensors, simulated_rank

RANKS = 4


@pytest.mark.parametrize("rank", [0, 2, 3])
@pytest.mark.parametrize("sizes", [[64], [13], [64, 32], [13, 3, 40], [1, 8]], ids=str)
def test_gradients_are_dealt_out_as_by_deepspeed(sizes, rank):
    """Whole buffers, with padding where ranks get less than their part, and the part of this rank."""
    from strategies.deepspeed_library import import_deepspeed, set_deepspeed_device
    from trainer.planner.step_recorder import StepRecorder

    with simulated_rank(rank, RANKS) as runtime:
        import_deepspeed(on_cpu=True).init_distributed(auto_mpi_discovery=False, verbose=False)
        set_deepspeed_device(runtime)
        import deepspeed.comm
        from deepspeed.runtime.comm.coalesced_collectives import reduce_scatter_coalesced

        from strategies.simulated_deepspeed import reduce_scatter_shapes

        deepspeed.comm.init_distributed(auto_mpi_discovery=False, verbose=False)
        found = []
        for deal in (reduce_scatter_coalesced, reduce_scatter_shapes):
            with fake_tensors(SIMULATED):
                recorder = StepRecorder(SIMULATED)
                with recorder:
                    given = [torch.empty(1, size, device=SIMULATED) for size in sizes]
                    recorder.begin_step()
                    parts = deal(given, torch.distributed.group.WORLD)
                    (highest,) = recorder.peak_by_phase.values()
                    storages = {part.untyped_storage()._cdata for part in parts}
                    collective_totals = [
                        (each.name, each.num_bytes, each.ranks) for each in recorder.record.collectives
                    ]
                    shapes = [(part.shape, part.storage_offset()) for part in parts]
                    moved = dict(recorder.record.moved_bytes_by_phase)
                    found.append(
                        (shapes, highest.total_bytes, recorder.live_bytes, moved, collective_totals, len(storages))
                    )
    assert found[0] == found[1]
    assert found[1][4], "there was an exchange"


def test_simulation_leaves_a_run_on_a_gpu_its_own_device(monkeypatch):
    """DeepSpeed takes `LOCAL_RANK` for the number of the GPU: of one that a rank sees alone, as under SLURM, it is 0."""
    from strategies.deepspeed_library import set_deepspeed_device

    with simulated_rank(0, RANKS) as simulated:
        set_deepspeed_device(simulated)
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setenv("LOCAL_RANK", "3")
    set_deepspeed_device(Runtime(3, 4, 3, 4, torch.device("cuda", 0), None))
    assert (os.environ["LOCAL_RANK"], get_accelerator().device_name(0)) == ("0", "cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "3")
    set_deepspeed_device(Runtime(3, 4, 3, 4, torch.device("cpu"), None))
    assert (os.environ["LOCAL_RANK"], get_accelerator().device_name()) == ("3", "cpu")
