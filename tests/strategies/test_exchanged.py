"""What is counted of a step's exchange is what methods of process groups are called with, wherever those are seen."""

import json

import pytest
import torch
import torch.distributed as dist

from strategies.communication_counters import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, count_communication
from tests.helpers.building import model_dir
from tests.helpers.warm import run_ranks
from tests.strategies.exchanged_job import CASES


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    directory = tmp_path_factory.mktemp("exchanged")
    model_dir(directory)
    run_ranks(["-m", "tests.strategies.exchanged_job", directory], 2)
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", [name for name in CASES if name != "ddp"])
def test_exchange_counted_is_what_the_methods_are_called_with(reports, case):
    for report in reports:
        assert report[case]["exchanged"] == report[case]["methods"] != {}


def test_exchange_of_the_ddp_reducer_is_counted_in_cpp(reports):
    """Which no method in Python sees."""
    for report in reports:
        assert report["ddp"]["methods"] == {} and report["ddp"]["exchanged"] == {ALL_REDUCE: report["ddp"]["gradients"]}


@pytest.mark.parametrize("case", CASES)
def test_exchange_through_host_memory_is_counted_alike(reports, case):
    for report in reports:
        assert report[f"{case} shared"]["exchanged"] == report[case]["exchanged"]
        assert report[case]["waited"] is False and report[f"{case} shared"]["waited"] is (case != "hsdp")


def test_shards_are_gathered_and_scattered(reports):
    for report in reports:
        assert (
            report["fsdp2"]["exchanged"].keys()
            == report["zero3"]["exchanged"].keys()
            == {ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER}
        )


def test_exchange_counters_within_each_other_count_separately(group_of_one):
    """Counters within each other have each what was exchanged while they were open, and none has what came later."""
    with count_communication() as outer:
        group_of_one()
        with count_communication() as inner:
            group_of_one()
    group_of_one()
    assert (outer.bytes_by_collective, inner.bytes_by_collective) == ({ALL_REDUCE: 24}, {ALL_REDUCE: 12})


def test_exchange_counters_with_equal_numbers_are_not_mistaken_for_each_other(group_of_one):
    with count_communication() as outer:
        with count_communication() as inner:
            pass
        group_of_one()
    assert (outer.bytes_by_collective, inner.bytes_by_collective) == ({ALL_REDUCE: 12}, {})


def test_a_step_that_raises_leaves_no_kernel_behind(group_of_one):
    with pytest.raises(ZeroDivisionError), count_communication() as broken_off:
        group_of_one()
        raise ZeroDivisionError
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("c10d::allreduce_", "Autograd")
    with count_communication() as later:
        group_of_one()
    assert (broken_off.bytes_by_collective, later.bytes_by_collective) == ({ALL_REDUCE: 12}, {ALL_REDUCE: 12})


@pytest.fixture
def group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield lambda: dist.all_reduce(torch.ones(3))
    dist.destroy_process_group()
