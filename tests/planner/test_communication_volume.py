"""What a rank is expected to exchange, beside what its simulated step does, and what is counted on the way."""

from collections import Counter

import pytest

from strategies.base import Precision
from strategies.communication_counters import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, count_communication
from strategies.simulation import simulated_rank
from tests.helpers.building import model_dir
from tests.simulated.cases import LENGTHS, Case
from trainer.planner.communication_volume import expected_bytes
from trainer.planner.simulate import simulate
from trainer.planner.simulation import step_parts

NAMES = {"allgather_base": ALL_GATHER, "allreduce": ALL_REDUCE, "reduce_scatter_base": REDUCE_SCATTER}
WAYS = [("ddp", "full"), ("fsdp2", "full"), ("fsdp2", "lora"), ("hsdp", "full"), ("zero1", "full"), ("zero2", "lora")]
RANKS = 4


@pytest.mark.parametrize(("strategy", "tuning"), WAYS)
def test_as_much_is_exchanged_as_is_expected_and_counted(tmp_path, strategy, tuning):
    case, micro_batches = Case(strategy, tuning, "bf16", "none", False, 2), 2
    config = case.config(model_dir(tmp_path), RANKS)
    with simulated_rank(0, RANKS, local_world_size=2) as runtime:
        parts = step_parts(config, LENGTHS, runtime)
        expected = expected_bytes(parts.built, config.strategy, Precision.bf16, runtime, micro_batches)
        with count_communication() as counted:
            step = simulate(parts, runtime, repeat=0)
    done = Counter()
    for each in step.collectives:
        if each.bytes > 1024:  # flags and norms are not expected
            done[NAMES[each.name]] += each.bytes
    # Shards are of equal size: what has no equal parts is padded.
    assert expected.keys() == done.keys()
    assert dict(done) == pytest.approx(expected, rel=0.05)
    steps = 2
    small = steps * sum(each.bytes for each in step.collectives if each.bytes <= 1024) + 4096
    assert all(steps * done[name] <= counted.sizes[name] <= steps * done[name] + small for name in done)
