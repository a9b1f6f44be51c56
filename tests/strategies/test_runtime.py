"""What a rank may use of its host."""

import os

import pytest
import torch
import torch.distributed as dist

from strategies import runtime
from strategies.runtime import num_usable_cores
from tests.helpers.building import data_set, model_dir, run_config, take_steps, trainer_for


def test_cpu_quotas_are_those_of_the_cgroups_around_the_process(tmp_path, monkeypatch):
    inner = tmp_path / "system.slice" / "job_1"
    inner.mkdir(parents=True)
    (tmp_path / "membership").write_text("0::/system.slice/job_1\n")
    monkeypatch.setattr(runtime, "_CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(runtime, "_OWN_CGROUP_FILE", tmp_path / "membership")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert num_usable_cores() == 64 and runtime.cgroup_memory_limit() is None
    (inner / "cpu.max").write_text("max 100000\n")
    (inner.parent / "cpu.max").write_text("350000 100000\n")
    (inner / "memory.max").write_text("max\n")
    (inner.parent / "memory.max").write_text("8589934592\n")
    assert num_usable_cores() == 3 and runtime.cgroup_memory_limit() == 2**33
    (inner / "cpu.max").write_text("50000 100000\n")
    assert num_usable_cores() == 1


def test_torchruns_single_thread_is_no_limit(monkeypatch):
    """torchrun sets OMP_NUM_THREADS=1 for every rank; the rank still takes its share of the host."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.delenv("SHARDTUNE_RUN_DIR", raising=False)
    monkeypatch.setattr(runtime, "num_usable_cores", lambda: 6)
    before = torch.get_num_threads()
    try:
        for key, value in {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
            monkeypatch.setenv(key, value)
        runtime.join_job("cpu", timeout_s=30)
        assert torch.get_num_threads() == 3
        monkeypatch.setenv("OMP_NUM_THREADS", "5")  # the user's
        assert runtime.threads_from_environment() == 5
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setenv("SHARDTUNE_RUN_DIR", "runs/first")  # our launchers settle it before torchrun does
        assert runtime.threads_from_environment() == 1
    finally:
        runtime.leave_job()
        torch.set_num_threads(before)


@pytest.mark.parametrize(("world", "failed", "destroyed"), [(1, True, 1), (2, False, 1), (2, True, 0)])
def test_process_groups_of_a_failed_rank_stay_for_its_peers(world, failed, destroyed, monkeypatch):
    """NCCL would wait in destroy for the collective in which a peer sits."""
    calls = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append(1))
    runtime.leave_job(failed=failed)
    assert len(calls) == destroyed


def test_many_ranks_connect_when_they_first_talk(monkeypatch):
    monkeypatch.delenv("TORCH_GLOO_LAZY_INIT", raising=False)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(
        dist, "all_gather_object", lambda heard, mine, group: heard.__setitem__(slice(None), [mine] * 64)
    )
    before = torch.get_num_threads()
    try:
        for world, lazy in (("63", None), ("64", "1")):
            monkeypatch.setenv("WORLD_SIZE", world)
            monkeypatch.setattr(runtime, "agree_on_matmul_library", lambda heard, rank: heard[0])
            runtime.join_job("cpu", timeout_s=30, threads=1)
            assert os.environ.get("TORCH_GLOO_LAZY_INIT") == lazy
    finally:
        monkeypatch.undo()
        runtime.leave_job()
        torch.set_num_threads(before)
        os.environ.pop("TORCH_GLOO_LAZY_INIT", None)


def test_second_run_of_a_process_knows_nothing_of_the_process_groups_of_the_first(tmp_path, monkeypatch):
    """DeepSpeed keeps them beyond their end."""
    config = run_config(model_dir(tmp_path), "zero2", "full", micro=4)
    data, curves, threads = data_set(tmp_path, uneven=False), [], torch.get_num_threads()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what joining writes goes with the test
        monkeypatch.delenv(name)
    for _ in range(2):
        alone = runtime.join_job("cpu", timeout_s=60, threads=1)
        try:
            curves.append(take_steps(trainer_for(config, data, alone), 1))
        finally:
            runtime.leave_job()
    torch.set_num_threads(threads)
    assert curves[0] == curves[1]
