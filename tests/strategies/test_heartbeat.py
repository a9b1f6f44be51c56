"""Signs of life through a store whose host cannot be reached: it neither answers nor breaks the connection."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch.distributed as dist

from strategies import heartbeat, rendezvous
from strategies.bounded_store import BoundedStore, Unanswered
from strategies.errors import ShardtuneError
from strategies.heartbeat import CutOffRank, Heartbeats
from strategies.rendezvous import Meeting
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


def test_heartbeat_of_a_rank_cut_off_from_the_store_says_so_and_ends(server, monkeypatch, capfd):
    process, store = server
    monkeypatch.setattr(heartbeat, "ANSWER_S", 0.2)
    monkeypatch.setattr(heartbeat, "CUT_OFF_S", 0.0)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    ended, told = threading.Event(), []
    beats = Heartbeats(store, 1, 2, lambda: ("training", 7), timeout_s=1.0)

    def end(error):
        told.append(error)
        ended.set()

    beats.when_cut_off = end
    os.kill(process.pid, signal.SIGSTOP)
    # The exchange times out: whoever looks for its cause must not wait for the store, which is what kept such a rank for ever.
    cause = beats.cause(RuntimeError("[gloo] Timed out waiting 30000ms for recv operation to complete"))
    assert isinstance(cause, CutOffRank) and cause.retry == "node_fail"
    assert "is cut off: 10.0.0.1:29500, where the ranks meet, has not answered for" in str(cause)
    assert beats.collect_exchanges(None) == {}
    # One whose main thread waits for a library without a limit is ended by the beat.
    assert ended.wait(seconds(30))
    assert (told[0].sign.rank, told[0].sign.step) == (1, 7)
    assert "the link is down, or that host hangs; this rank ends after 1 s without progress" in capfd.readouterr().err


def test_rendezvous_reports_that_other_ranks_do_not_come(monkeypatch, capfd):
    monkeypatch.setattr(rendezvous, "REPORT_EVERY_S", 0.1)
    job = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ShardtuneError, match="rank 0 of 2 did not meet the others"):
        Meeting.join(1.0)
    assert f"rank 0 of 2 waits for the others to come to 127.0.0.1:{job['MASTER_PORT']}" in capfd.readouterr().err


def test_a_store_that_answers_again_is_used_again(server):
    process, store = server
    bounded = BoundedStore(store, 0.2)
    bounded.set("key", "1")
    os.kill(process.pid, signal.SIGSTOP)
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
