"""What is said of a trace, on events whose sums are done by hand, and on a trace that torch wrote."""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from launch.compare.profiles import read_profile
from trainer.reporting.profile import ProfileConfig, Profiler, profile_problems
from trainer.reporting.trace import summarise_trace


def event(name, begin, dur, cat="kernel", tid=7):
    return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": dur, "pid": 0, "tid": tid}


def test_trace_has_exposed_communication_and_idle_time():
    """Compute 0-10 and 14-20; communication 5-12 and 25-27: 2 of the first and all of the second are exposed."""
    trace = [event("gemm", 0, 10), event("gemm", 14, 6), event("ncclDevKernel_AllReduce", 5, 7, tid=8)]
    trace += [event("ncclDevKernel_AllReduce", 25, 2, tid=8), event("aten::mm", 0, 100, cat="cpu_op")]
    found = summarise_trace(trace)
    assert found["of"] == "device" and found["window_s"] == pytest.approx(27e-6)
    assert found["communication_s"] == pytest.approx(9e-6) and found["exposed_s"] == pytest.approx(4e-6)
    assert found["idle_s"] == pytest.approx(7e-6)  # 12-14 and 20-25
    assert found["operators"][0] == {"name": "gemm", "self_s": pytest.approx(16e-6), "calls": 2}


def test_trace_operator_is_not_counted_for_what_it_calls():
    trace = [event("outer", 0, 10, "cpu_op"), event("inner", 2, 3, "cpu_op"), event("inner", 6, 2, "cpu_op")]
    trace += [event("outer", 20, 1, "cpu_op"), event("inner", 0, 4, "cpu_op", tid=9)]
    own = {each["name"]: (each["self_s"], each["calls"]) for each in summarise_trace(trace)["operators"]}
    assert own == {"outer": (pytest.approx(6e-6), 2), "inner": (pytest.approx(9e-6), 3)}


def test_trace_that_torch_wrote_is_summarised(tmp_path):
    """Operators, their self time within the whole, and the bytes of a tensor that is held in the middle."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as live:
        left = torch.ones(256, 256)
        right = left @ left
        del right
    live.export_chrome_trace(str(tmp_path / "trace.json.gz"))
    with gzip.open(tmp_path / "trace.json.gz", "rt") as file:
        found = summarise_trace(json.load(file)["traceEvents"])
    told = {each["name"]: each for each in found["operators"]}
    assert found["of"] == "operators" and told["aten::mm"]["calls"] == 1
    assert {each.key: each.self_cpu_time_total for each in live.key_averages()}["aten::mm"] == pytest.approx(
        1e6 * told["aten::mm"]["self_s"], rel=0.05
    )
    assert max(point["gib"] for point in found["memory"]) == pytest.approx(2 * 256 * 256 * 4 / 2**30)
    assert found["idle_s"] >= 0 and found["exposed_s"] == 0


def test_trace_without_events_is_empty():
    assert summarise_trace([])["window_s"] == 0 and summarise_trace([])["operators"] == []


@pytest.mark.parametrize(
    ("steps", "said"), [([10], "first and the last"), ([3, 2], "first and the last"), ([0, 2], "1 at least")]
)
def test_profile_steps_that_are_no_range_of_the_run_are_refused(steps, said):
    (problem,) = profile_problems(ProfileConfig(steps=steps), None)
    assert said in problem and problem.startswith(f"profile.steps={str(steps).replace(' ', '')}: ")
    assert not profile_problems(ProfileConfig(steps=[2, 3]), 3)
    assert "the run has 2 steps" in profile_problems(ProfileConfig(steps=[2, 3]), 2)[0]


def test_profile_of_a_rank_is_traced_and_read_by_the_page(tmp_path):
    """Steps 2 and 3 of four; the loop's own listener hears of all."""
    heard, said = [], []
    runtime = SimpleNamespace(rank=1, device=torch.device("cpu"))
    with Profiler(ProfileConfig(steps=[2, 3]), tmp_path, runtime, heard.append, said.append) as profiler:
        for step in range(1, 5):
            profiler.at_step(step)
            (torch.ones(64, 64) @ torch.ones(64, 64)).sum().item()
    assert heard == [1, 2, 3, 4] and "profiled steps 2 to 3" in said[0]
    found = read_profile(tmp_path)
    assert found is not None and found.steps == (2, 3) and found.ranks[0][0] == "1" and found.memory
    assert {row[0]: row[3] for row in found.operators}["aten::mm"] == "2"
    (tmp_path / "profile" / "rank-0.summary.json").write_text('{"rank": 0')  # being written
    assert read_profile(tmp_path) == found


def test_operators_are_of_all_ranks(tmp_path):
    (tmp_path / "profile").mkdir()
    for rank, own in enumerate(([("mm", 2.0, 1), ("add", 1.0, 4)], [("mm", 1.0, 1), ("cat", 4.0, 2)])):
        operators = [{"name": name, "self_s": s, "calls": calls} for name, s, calls in own]
        about = {"rank": rank, "steps": [1, 2], "of": "device", "window_s": 5.0, "memory": [], "operators": operators}
        about |= {"communication_s": 1.0, "exposed_s": 0.5, "idle_s": 0.0}
        (tmp_path / f"profile/rank-{rank}.summary.json").write_text(json.dumps(about))
    found = read_profile(tmp_path)
    assert [row[0] for row in found.ranks] == ["0", "1"]
    assert found.operators == [
        ["cat", "4000.00", "50%", "2"],
        ["mm", "3000.00", "38%", "2"],
        ["add", "1000.00", "12%", "4"],
    ]


def test_the_last_step_may_be_the_runs_last(tmp_path):
    runtime = SimpleNamespace(rank=0, device=torch.device("cpu"))
    with Profiler(ProfileConfig(steps=[1, 1]), tmp_path, runtime, lambda step: None, lambda text: None) as profiler:
        profiler.at_step(1)
        torch.ones(8).sum()
    assert read_profile(tmp_path).steps == (1, 1)
