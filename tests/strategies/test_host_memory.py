"""What CPU ranks on one host exchange through shared memory is what gloo would give them."""

import json
import os
import subprocess
import sys

import pytest
import torch

from strategies import host_memory
from strategies.heartbeat import LOST_PEER_REGEX
from strategies.host_memory import HostMemory
from tests.helpers.warm import run_ranks

EXACT = {"torch.float32": 1e-6, "torch.float64": 1e-14, "torch.bfloat16": 2e-2}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    directory = tmp_path_factory.mktemp("exchange")
    run_ranks(["-m", "tests.strategies.exchange_job", directory], 3)
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(3)]


def test_host_memory_collectives_equal_those_of_gloo(reports):
    for report in reports:
        for key in report.keys() & {"all", "barrier", "pair"}:
            assert len(report[key]) == 6 * 3
            for name, apart in report[key].items():
                assert apart <= (0 if "gather" in name else EXACT[name.split()[-1]]), (key, name)
    assert sum("pair" in report for report in reports) == 2
    assert all("all" in report and "barrier" in report for report in reports)


def test_host_memory_sum_is_the_same_on_every_rank(reports):
    assert all(report["bits"] for report in reports)


def test_host_memory_leaves_no_file_open(reports):
    assert [report["descriptors"] for report in reports] == [0, 0, 0]


def test_host_memory_is_used_by_no_rank_if_one_cannot(reports):
    for report in reports:
        assert set(report["refused"]) == {"no memory file", "another host", "cannot be mapped", "forbidden"}
        assert all(report["refused"].values())


def test_host_memory_leaves_small_and_other_collectives_to_deepspeed(reports):
    asked = ["all_reduce", "all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast"]
    assert [report["left to DeepSpeed"] for report in reports] == [asked] * 3


def test_host_memory_norm_given_to_deepspeed(reports):
    """sqrt(9 (1 + 4 + 9)) over the ranks; -1, as DeepSpeed expects, where it is not finite."""
    for report in reports:
        assert report["norms"] == pytest.approx([126**0.5, -1.0], rel=1e-6)


def waiting_for(process: int, timeout_s: float, monkeypatch) -> HostMemory:
    """The memory of rank 0 of two, whose peer is `process`."""
    monkeypatch.setattr(host_memory.dist, "get_rank", lambda _group: 0)
    monkeypatch.setattr(host_memory.dist, "get_process_group_ranks", lambda _group: [0, 1])
    monkeypatch.setattr(host_memory, "_CPU_KEEPS_STORE_ORDER", True)
    size = host_memory._HEADER_BYTES + 2 * host_memory._SLOT_BYTES
    regions = [torch.zeros(size, dtype=torch.uint8) for _ in range(2)]
    return HostMemory(None, regions, [os.getpid(), process], timeout_s)


def test_host_memory_wait_ends_when_a_peer_ended(monkeypatch):
    """Also while nobody has asked for its exit status."""
    peer = subprocess.Popen([sys.executable, "-c", "pass"])
    with pytest.raises(RuntimeError, match=r"rank 0 waited \d+ s for its peer 1, which has ended") as caught:
        waiting_for(peer.pid, 60, monkeypatch).all_reduce(torch.ones(5), average=False)
    assert LOST_PEER_REGEX.search(str(caught.value))  # so that the launcher looks for the cause elsewhere
    assert peer.wait() == 0
    with pytest.raises(RuntimeError, match="which has ended"):
        waiting_for(peer.pid, 60, monkeypatch).all_reduce(torch.ones(5), average=False)


def test_host_memory_wait_ends_when_a_peer_hangs(monkeypatch):
    with pytest.raises(
        RuntimeError, match=r"timed out: rank 0 waited \d+ s for its peer 1 \(run.timeout_s=0\)"
    ) as caught:
        waiting_for(os.getppid(), 0.3, monkeypatch).all_gather(torch.ones(10), torch.ones(5))
    assert LOST_PEER_REGEX.search(str(caught.value))
