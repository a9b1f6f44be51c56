"""What a rank is expected to exchange, beside what its simulated step does, and what is counted on the way."""

from collections import Counter
from dataclasses import replace

import pytest

from strategies.base import Precision
from strategies.communication_counters import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, REDUCE_SCATTER, count_communication
from strategies.sequence import with_sequence_parallelism
from strategies.simulation import simulated_rank
from tests.helpers.building import model_dir
from tests.simulated.cases import LENGTHS, Case, DealtExperts
from trainer.config.parallel import ParallelConfig
from trainer.planner.communication_volume import expected_bytes_by_collective
from trainer.planner.cost_model import ALL_TO_ALL as SIMULATED_EXCHANGE
from trainer.planner.simulate import simulate
from trainer.planner.simulation import build_step_parts

NAMES = {"allgather_base": ALL_GATHER, "allreduce": ALL_REDUCE, "reduce_scatter_base": REDUCE_SCATTER}
WAYS = [("ddp", "full"), ("fsdp2", "full"), ("fsdp2", "lora"), ("hsdp", "full"), ("zero1", "full"), ("zero2", "lora")]
RANKS = 4


@pytest.mark.parametrize(("strategy", "tuning"), WAYS)
def test_as_much_is_exchanged_as_is_expected_and_counted(tmp_path, strategy, tuning):
    case, micro_batches = Case(strategy, tuning, "bf16", "none", False, 2), 2
    config = case.config(model_dir(tmp_path), RANKS)
    with simulated_rank(0, RANKS, local_world_size=2) as runtime:
        parts = build_step_parts(config, LENGTHS, runtime)
        expected = expected_bytes_by_collective(
            parts.built, config.strategy, Precision.bf16, runtime, micro_batches, sum(LENGTHS)
        )
        with count_communication() as counted:
            step = simulate(parts, runtime, num_repeats=0)
    done = Counter()
    for each in step.collectives:
        if each.num_bytes > 1024:  # flags and norms are not expected
            done[NAMES[each.name]] += each.num_bytes
    # Shards are of equal size: what has no equal parts is padded.
    assert expected.keys() == done.keys()
    assert dict(done) == pytest.approx(expected, rel=0.05)
    steps = 2
    small = steps * sum(each.num_bytes for each in step.collectives if each.num_bytes <= 1024) + 4096
    assert all(steps * done[name] <= counted.bytes_by_collective[name] <= steps * done[name] + small for name in done)


@pytest.mark.parametrize(
    ("strategy", "mode", "degree", "world"),
    [
        ("fsdp2", "full", 2, RANKS),
        ("fsdp2", "none", 4, RANKS),
        ("hsdp", "none", 2, RANKS),
        ("hsdp", "none", 2, 2 * RANKS),
        ("hsdp", "full", 4, 2 * RANKS),
    ],
)
def test_as_much_is_exchanged_of_dealt_experts_as_is_expected(tmp_path, strategy, mode, degree, world):
    """In a place of two ranks, of one, and of one in each of two replicas; of two and of one in replicas of four ranks."""
    case = DealtExperts(strategy, "experts", "bf16", mode, False, 2, experts=degree)
    config = case.config(case.model_in(tmp_path), world)
    with simulated_rank(0, world, local_world_size=2) as runtime:
        parts = build_step_parts(config, LENGTHS, runtime)
        expected = expected_bytes_by_collective(parts.built, config.strategy, Precision.bf16, runtime, 2, sum(LENGTHS))
        step = simulate(parts, runtime, num_repeats=0)
        after = expected_bytes_by_collective(parts.built, config.strategy, Precision.bf16, runtime, 2, sum(LENGTHS))
    done = Counter()
    for each in step.collectives:
        done[NAMES.get(each.name, ALL_TO_ALL)] += each.num_bytes
    assert after == expected, "a run asks when its model is sharded"
    done[ALL_REDUCE] -= sum(
        each.num_bytes for each in step.collectives if each.name == "allreduce" and each.num_bytes < 64
    )
    assert {name: size for name, size in done.items() if size} == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("mode", "degree"), [("none", 2), ("full", 4)])
def test_as_much_of_shared_rows_is_exchanged_as_is_expected(tmp_path, mode, degree):
    """Four heads of two key-value heads: with four ranks, two of them have the same one."""
    case = Case("fsdp2", "lora", "bf16", mode, False, 2)
    config = replace(case.config(model_dir(tmp_path), RANKS), parallel=ParallelConfig(sequence=degree))
    with simulated_rank(0, RANKS, local_world_size=2) as all_ranks:
        runtime = with_sequence_parallelism(all_ranks, degree)
        parts = build_step_parts(config, LENGTHS, runtime)
        micro_batches = len(parts.micro_batches)
        expected = expected_bytes_by_collective(
            parts.built, config.strategy, Precision.bf16, runtime, micro_batches, sum(LENGTHS)
        )
        step = simulate(parts, runtime, num_repeats=0)
    done = sum(each.num_bytes for each in step.collectives if each.name.startswith(SIMULATED_EXCHANGE))
    assert expected[ALL_TO_ALL] == pytest.approx(done, rel=0.05) and done > 0
