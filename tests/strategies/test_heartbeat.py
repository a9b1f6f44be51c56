"""Signs of life through a store whose host cannot be reached, and in a step that takes minutes."""

import json
import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from launch.cluster.long_steps import sufficient_timeout_s
from strategies import flight_recorder, heartbeat, rendezvous
from strategies.bounded_store import BoundedStore, Unanswered
from strategies.compat import process_groups
from strategies.errors import ShardtuneError
from strategies.heartbeat import CutOffRank, HeartbeatMonitor
from strategies.rendezvous import Rendezvous
from tests.helpers.launching import ROOT, clean_environment, free_port
from tests.helpers.speed import seconds

SERVER = """
import sys
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), 1, True)
print("listens", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def server():
    """The process that has the store, and a connection to it. A stopped process is silent as a host without a link is."""
    port = free_port()
    command = [sys.executable, "-c", SERVER, str(port)]
    with subprocess.Popen(
        command, env=clean_environment(), cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "listens\n"
        yield process, dist.TCPStore("127.0.0.1", port, 1, False)
        process.kill()


def stop(process):
    """Stop all threads of the process. A signal that was sent alone leaves the store's thread time for one more answer."""
    os.kill(process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)


def test_heartbeat_of_a_rank_cut_off_from_the_store_says_so_and_ends(server, monkeypatch, capfd):
    process, store = server
    monkeypatch.setattr(heartbeat, "ANSWER_S", 0.2)
    monkeypatch.setattr(heartbeat, "CUT_OFF_S", 0.0)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    ended, told = threading.Event(), []
    beats = HeartbeatMonitor(store, 1, 2, lambda: ("training", 7), timeout_s=1.0)

    def end(error):
        told.append(error)
        ended.set()

    beats.on_cut_off = end
    stop(process)
    # The exchange times out: whoever looks for its cause must not wait for the store, which is what kept such a rank for ever.
    cause = beats.lost_peer_error(RuntimeError("[gloo] Timed out waiting 30000ms for recv operation to complete"))
    assert isinstance(cause, CutOffRank) and cause.retry == "node_fail"
    assert "is cut off: 10.0.0.1:29500, where the ranks meet, has not answered for" in str(cause)
    assert beats.collect_last_collectives(None) == {}
    # One whose main thread waits for a library without a limit is ended by the beat.
    assert ended.wait(seconds(30))
    assert (told[0].heartbeat.rank, told[0].heartbeat.step) == (1, 7)
    assert "the link is down, or that host hangs; this rank ends after 1 s without progress" in capfd.readouterr().err


def test_rendezvous_reports_that_other_ranks_do_not_come(monkeypatch, capfd):
    monkeypatch.setattr(rendezvous, "REPORT_INTERVAL_S", 0.1)
    job = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ShardtuneError, match="rank 0 of 2 did not meet the others"):
        Rendezvous.join(1.0)
    assert f"rank 0 of 2 waits for the others to come to 127.0.0.1:{job['MASTER_PORT']}" in capfd.readouterr().err


def test_a_store_that_answers_again_is_used_again(server):
    process, store = server
    bounded = BoundedStore(store, 0.2)
    bounded.set("key", "1")
    stop(process)
    for _ in range(2):  # the second fails without waiting behind the first
        with pytest.raises(Unanswered):
            bounded.get("key")
    os.kill(process.pid, signal.SIGCONT)
    answered = threading.Event()
    while not answered.is_set():
        try:
            assert bounded.get("key") == b"1"
            answered.set()
        except Unanswered:
            continue
    assert bounded.unanswered_s() == 0
    assert bounded.check(["key"])


STEP_S = 600.0
"""A step of ten minutes, as with documents of a million tokens."""


class StepOver(Exception):
    """The clock has come to the end of the step."""


class Clock:
    """Seconds that pass only while somebody sleeps."""

    def __init__(self, end_s):
        self.now_s = 0.0
        self.end_s = end_s

    def monotonic(self):
        return self.now_s

    def time_ns(self):
        return int(self.now_s * 1e9)

    def sleep(self, duration_s):
        self.now_s += duration_s
        if self.now_s >= self.end_s:
            raise StepOver


class Values(dict):
    """A store that answers at once."""

    def __init__(self, store, limit_s):
        super().__init__()

    def set(self, key, stored):
        self[key] = stored

    def check(self, keys):
        return all(key in self for key in keys)


def beats_of_a_step(monkeypatch, tmp_path, exchanges_at, timeout_s):
    """(heartbeats, times of warnings) after a step of ten minutes of a clock. `exchanges_at`: seconds -> what is recorded."""
    clock = Clock(STEP_S)
    monkeypatch.setattr(heartbeat, "time", clock)
    monkeypatch.setattr(flight_recorder, "time", clock)
    monkeypatch.setattr(heartbeat, "BoundedStore", Values)
    monkeypatch.setattr(process_groups, "recorded_collectives", lambda: exchanges_at(clock.now_s))
    not_started = SimpleNamespace(Lock=threading.Lock, Thread=lambda *, target, args=(), **_: Started(target, args))
    monkeypatch.setattr(heartbeat, "threading", not_started)
    beats = HeartbeatMonitor(None, 0, 1, lambda: ("training", 7), timeout_s=timeout_s)
    beats._stack_dump_file = (tmp_path / "stacks").open("w")
    warned_at = []
    beats.on_collective_timeout = lambda exchange: warned_at.append(clock.now_s)
    with pytest.raises(StepOver):
        beats._send_heartbeats()
    return beats, warned_at


class Started:
    """A thread whose work is done at once; the beat itself is called by the test."""

    def __init__(self, target, args):
        self.work = None if target.__name__ == "_send_heartbeats" else lambda: target(*args)

    def start(self):
        if self.work is not None:
            self.work()


def exchange(number, begun_s, over):
    entry = {"collective_seq_id": number, "profiling_name": "nccl:all_to_all", "input_sizes": [[8]]}
    return entry | {"time_created_ns": int(begun_s * 1e9), "retired": over, "process_group": ["1", "sequence"]}


def test_rank_in_a_step_of_ten_minutes_lives_and_its_exchanges_are_not_late(monkeypatch, tmp_path):
    def exchanges_at(now_s):
        """A layer takes 20 s, of which its exchange waits for the last five."""
        begun_s = now_s // 20 * 20 + 15
        past = [exchange(number, 20 * number + 15, over=True) for number in range(int(now_s // 20))]
        return [*past, exchange(len(past), begun_s, over=False)] if now_s >= begun_s else past

    beats, warned_at = beats_of_a_step(monkeypatch, tmp_path, exchanges_at, timeout_s=STEP_S)
    heartbeat = json.loads(beats._store["shardtune/beat/0"])
    assert heartbeat["count"] == STEP_S and heartbeat["step"] == 7
    assert warned_at == [] and beats._stack_dump_file is not None, "a step that goes on was taken for one that hangs"


def test_exchange_queued_a_step_ahead_is_late_unless_the_timeout_leaves_room(monkeypatch, tmp_path):
    """As NCCL counts: the host queues the last exchange of the step at its beginning."""

    def exchanges_at(now_s):
        return [exchange(0, 0.0, over=False)]

    _, warned_at = beats_of_a_step(monkeypatch, tmp_path, exchanges_at, timeout_s=STEP_S)
    assert [round(at_s) for at_s in warned_at] == [STEP_S - heartbeat.WARNING_BEATS + 1]
    beats, warned_at = beats_of_a_step(monkeypatch, tmp_path, exchanges_at, timeout_s=sufficient_timeout_s(STEP_S))
    assert warned_at == [] and beats._stack_dump_file is not None
