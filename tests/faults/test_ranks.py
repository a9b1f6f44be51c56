"""The cause of a failure is told by name: the rank that was killed or stopped, not the peer that lost it."""

import json
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist

from strategies import durable
from strategies.heartbeat import Heartbeats
from tests.faults.runs import ROOT, environment, rank_of, read
from tests.helpers.covering import EVERYTHING
from tests.helpers.speed import seconds
from trainer.records.status import record_failure


def two() -> tuple[str, ...]:
    """Words for two ranks that miss each other soon, but not while one of them is still starting on a busy machine."""
    return "strategy=ddp", "launcher.processes=2", f"run.timeout_s={round(seconds(7.5))}"


def test_a_killed_and_a_stopped_rank_are_named(runs):
    started = {name: runs.start(name, *two()) for name in ("killed", "stopped")}
    for name, process in started.items():
        runs.wait_for_step(name, 2, process)
    time.sleep(seconds(3))  # a sign of life comes each second, and later on a busy machine
    ranks = {name: rank_of(process.pid, 1) for name, process in started.items()}
    ranks["killed"].send_signal(signal.SIGKILL)
    ranks["stopped"].send_signal(signal.SIGSTOP)
    for name, said in (("killed", "was killed by SIGKILL"), ("stopped", "stopped")):
        assert runs.end(started[name]) == 70
        failure = read(runs.root / name / "failure.json")
        assert (failure["rank"], failure["phase"], failure["pid"]) == (1, "training", ranks[name].pid), failure
        assert failure["step"] is not None  # as of its last sign of life
        assert str(ranks[name].pid) in failure["message"] and said in failure["message"]
        assert "memory" not in failure["message"]  # nothing says that it was
        last = runs.said(name).strip().splitlines()[-2:]
        assert "rank 1 on " in last[0] and said in last[1]
        assert runs.status(name)["state"] == "failed"
    # Where the other one waited for it (a step has several places to wait in), and where it was.
    assert ", in fit" in failure["traceback"] and "timed out" in failure["traceback"].lower()
    assert " in fit" in (runs.root / "stopped" / "logs" / "rank-1.stacks").read_text()


@pytest.mark.skipif(not EVERYTHING, reason="that a success removes it is shown by test_retry, too")
def test_under_torchrun_a_success_removes_what_an_earlier_attempt_left(runs):
    (runs.root / "plain").mkdir()
    record_failure(runs.root / "plain", 1, RuntimeError("of an earlier attempt"), "training")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "launch.train",
    ]
    command += runs.words("plain", "strategy=ddp", "budget.steps=2")[4:]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert runs.status("plain")["state"] == "done"
    assert not (runs.root / "plain" / "failure.json").exists()


def test_restarts_by_torchrun_are_refused_with_the_reason(runs):
    job = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29400"}
    job["TORCHELASTIC_MAX_RESTARTS"] = "1"  # as torchrun says it
    command = [sys.executable, "-m", "launch.train", *runs.words("restarts", "strategy=ddp")[4:]]
    refused = subprocess.run(
        command, env=environment(**job), cwd=ROOT, capture_output=True, text=True, check=False, timeout=seconds(60)
    )
    assert refused.returncode == 64
    assert "torchrun --max-restarts=1: ranks that torchrun starts again may wait for each other" in refused.stderr
    assert not (runs.root / "restarts").exists()


def test_a_failure_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(self, descriptor, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(durable.Disk, "write", full)
        assert not record_failure(tmp_path, 0, ValueError("first"), "training")
    assert list(tmp_path.iterdir()) == []  # no empty file that would hide the cause
    assert record_failure(tmp_path, 1, ValueError("second"), "training")
    assert json.loads((tmp_path / "failure.json").read_text())["message"] == "second"


def test_only_a_rank_that_does_not_count_on_is_the_cause():
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    over = threading.Event()

    def state():
        while over.is_set():  # its thread counts no more, as where its process is gone
            time.sleep(1)
        return "training", 7

    beats = [Heartbeats(store, 0, 2, lambda: ("training", 7)), Heartbeats(store, 1, 2, state)]
    lost, other = RuntimeError("Connection closed by peer [127.0.0.1]:1"), ValueError("the batch is bad")
    assert beats[0].cause(other) is None
    assert beats[0].cause(lost) is None  # both live
    over.set()
    found = beats[0].cause(lost)
    assert (found.seen.rank, found.seen.phase, found.seen.step, found.hung) == (1, "training", 7, False)
    assert beats[0].cause(RuntimeError("Timed out waiting 15000ms for recv")).hung
