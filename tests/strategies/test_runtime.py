"""What a rank may use of its host."""

import os

import torch

from strategies import runtime
from strategies.runtime import usable_cores


def test_quotas_of_cgroups_around_the_process_count(tmp_path, monkeypatch):
    inner = tmp_path / "system.slice" / "job_1"
    inner.mkdir(parents=True)
    (tmp_path / "membership").write_text("0::/system.slice/job_1\n")
    monkeypatch.setattr(runtime, "_CGROUPS", tmp_path)
    monkeypatch.setattr(runtime, "_MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert usable_cores() == 64 and runtime.cgroup_memory() is None
    (inner / "cpu.max").write_text("max 100000\n")
    (inner.parent / "cpu.max").write_text("350000 100000\n")
    (inner / "memory.max").write_text("max\n")
    (inner.parent / "memory.max").write_text("8589934592\n")
    assert usable_cores() == 3 and runtime.cgroup_memory() == 2**33
    (inner / "cpu.max").write_text("50000 100000\n")
    assert usable_cores() == 1


def test_torchruns_single_thread_is_no_limit(monkeypatch):
    """torchrun sets OMP_NUM_THREADS=1 for every rank; the rank still takes its share of the host."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(runtime, "usable_cores", lambda: 6)
    before = torch.get_num_threads()
    try:
        for key, value in {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
            monkeypatch.setenv(key, value)
        runtime.start("cpu", timeout_s=30)
        assert torch.get_num_threads() == 3
    finally:
        runtime.stop()
        torch.set_num_threads(before)
