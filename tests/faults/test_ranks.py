"""The cause of a failure is told by name: the rank that was killed or stopped, not the peer that lost it."""

import json
import signal
import subprocess
import sys
import threading
import time
import types

import pytest
import torch
import torch.distributed as dist

from launch.cluster import killed_rank
from strategies import atomic_io, flight_recorder, heartbeat
from strategies.flight_recorder import CollectiveCall
from strategies.heartbeat import HEARTBEAT_DIRECTORY_VARIABLE, HeartbeatMonitor, read_last_heartbeat
from tests.faults.runs import ROOT, Runs, environment, forked_rank_of, rank_of, read, wait
from tests.faults.test_retry import begun, gone_on
from tests.helpers.covering import whole
from tests.helpers.speed import seconds
from trainer.reporting import status
from trainer.reporting.status import record_failure
from trainer.session import attempt


def two() -> tuple[str, ...]:
    """Words for two ranks that miss each other soon, but not while one of them is still starting on a busy machine."""
    return "strategy=ddp", "launcher.processes=2", "tuning=full", f"run.timeout_s={round(seconds(5))}"


@whole("a rank is killed under torchrun below too, and what is told of one is shown there")
def test_a_killed_rank_is_named(runs):
    """By torchrun."""
    started = runs.start("killed", *two())
    runs.wait_for_step("killed", 2, started)
    time.sleep(seconds(1.5))  # a heartbeat comes each second, and later on a busy machine
    killed = rank_of(started.pid, 1)
    killed.send_signal(signal.SIGKILL)
    failure = named(runs, "killed", started, killed.pid, "was killed by SIGKILL")
    assert "ChildFailedError" not in runs.said("killed")
    assert "memory" not in failure["message"]  # nothing says that it was


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run whose rank 1 was stopped, and that process; it waits out three times of its own before it ends."""
    runs = Runs(tmp_path_factory.mktemp("stopped"))
    words = runs.root / "words"
    words.mkdir()
    started = runs.start("stopped", *two(), ranks=True, **{HEARTBEAT_DIRECTORY_VARIABLE: str(words)})
    try:
        wait(
            lambda: (said := read_last_heartbeat(words, 1)) is not None and said.step,
            "a heartbeat of training",
            started,
        )
        rank = forked_rank_of(started.pid, 1)
        rank.send_signal(signal.SIGSTOP)
        yield runs, started, rank
    finally:
        runs.close()


def test_run_is_started_again_after_a_killed_rank(runs, stopped):
    """By torchrun, which starts the ranks of both starts; the one that was stopped waits meanwhile."""
    process = begun(runs, "launcher.retry={preempted: 1, node_fail: 1}")
    first = rank_of(process.pid, 0)
    first.kill()
    runs.let_on("again")
    wait(lambda: "started again (node_fail; 0 more times)" in runs.said("again"), "the second start", process)
    said = runs.said("again")
    assert f"(process {first.pid}) was killed by SIGKILL" in said and "ChildFailedError" not in said, said
    gone_on(runs, process)


def test_a_stopped_rank_is_named(stopped):
    """By its peer: where that one waited for it (a step has several places to wait in), and where it was."""
    runs, started, rank = stopped
    failure = named(runs, "stopped", started, rank.pid, "stopped")
    assert ", in fit" in failure["traceback"] and "timed out" in failure["traceback"].lower()
    assert " in fit" in (runs.root / "stopped" / "logs" / "rank-1.stacks").read_text()
    assert set(failure["stacks"]) == {"logs/rank-0.stacks", "logs/rank-1.stacks"}, failure
    assert "where the threads of ranks were: logs/rank-0.stacks, logs/rank-1.stacks" in failure["message"]
    assert "gloo:" in failure["exchanges"]["0"], failure


def named(runs, name, started, pid, said):
    """The failure of a run that rank 1 ended, as it is told at the end."""
    assert runs.end(started) == 70
    failure = read(runs.root / name / "failure.json")
    assert (failure["rank"], failure["phase"], failure["pid"]) == (1, "training", pid), failure
    assert failure["step"] is not None  # as of its last heartbeat
    assert str(pid) in failure["message"] and said in failure["message"]
    last = runs.said(name).strip().splitlines()
    place = max(number for number, line in enumerate(last) if "shardtune train: rank 1 on " in line)
    assert said in last[place + 1]
    assert runs.status(name)["state"] == "failed"
    return failure


@whole("a run that goes on by itself shows it, too")
def test_failure_record_of_an_earlier_attempt_is_removed_by_a_success_under_torchrun(runs):
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
        patch.setattr(atomic_io.Disk, "write", full)
        assert not record_failure(tmp_path, 0, ValueError("first"), "training")
    assert list(tmp_path.iterdir()) == []  # no empty file that would hide the cause
    # Of an attempt that was killed amid this: in a container the next has the same host's name and number.
    (tmp_path / f".failure.json.{status._writer_token()}").touch()
    assert record_failure(tmp_path, 1, ValueError("second"), "training")
    assert json.loads((tmp_path / "failure.json").read_text())["message"] == "second"
    assert [each.name for each in tmp_path.iterdir()] == ["failure.json"]


def test_failure_cause_is_only_a_rank_whose_count_stands_still(monkeypatch):
    """In a time of its own: whoever looks does so until all that live have counted on, as a busy machine may not let them."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    over, stands, looked = threading.Event(), threading.Event(), []

    def state():
        if over.is_set():  # its thread counts no more, as where its process is gone
            stands.set()
            threading.Event().wait()
        return "training", 7

    def sleep(for_s):
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.01)
            return
        looked.append(for_s)
        before = [seen.count for seen in beats[0]._last_heartbeats()]
        living = [0] if over.is_set() else [0, 1]
        wait(
            lambda: all(beats[0]._last_heartbeats()[rank].count > before[rank] for rank in living),
            "a beat of all that live",
        )

    monkeypatch.setattr(heartbeat, "time", types.SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    beats = [HeartbeatMonitor(store, 0, 2, lambda: ("training", 7)), HeartbeatMonitor(store, 1, 2, state)]
    lost, other = RuntimeError("Connection closed by peer [127.0.0.1]:1"), ValueError("the batch is bad")
    assert beats[0].lost_peer_error(other) is None and looked == []
    assert beats[0].lost_peer_error(lost) is None  # both live
    over.set()
    assert stands.wait(seconds(30))
    found = beats[0].lost_peer_error(lost)
    assert (found.heartbeat.rank, found.heartbeat.phase, found.heartbeat.step, found.hung) == (1, "training", 7, False)
    assert beats[0].lost_peer_error(RuntimeError("Timed out waiting 15000ms for recv")).hung
    assert looked == [2.5, 2.5, 6]  # seconds; a beat comes each second


def exchange(number: int, waits_s: float | None = None, group: str = "default_pg", by: str = "gloo") -> CollectiveCall:
    return CollectiveCall(number=number, operation=f"{by}:all_reduce", group=group, sizes=[[4, 2]], waiting_s=waits_s)


def test_a_rank_that_lives_and_does_not_come_is_the_cause(tmp_path, monkeypatch):
    """It computes without end, say; its stacks and its last words are there before anybody asks for them."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv(HEARTBEAT_DIRECTORY_VARIABLE, str(tmp_path))
    monkeypatch.setattr(heartbeat, "last_collective", lambda: exchange(12, 5.0))
    beats = [HeartbeatMonitor(store, rank, 2, lambda: ("training", 7), timeout_s=0.01) for rank in range(2)]
    beats[1].write_stacks_to(tmp_path / "rank-1.stacks")
    wait(lambda: "last exchange: gloo:all_reduce number 12 of default_pg (4x2), not over" in stacks(tmp_path), "stacks")
    assert "test_a_rank_that_lives" in stacks(tmp_path)
    wait(lambda: read_last_heartbeat(tmp_path, 1) is not None, "last words")
    assert (
        read_last_heartbeat(tmp_path, 1).phase,
        read_last_heartbeat(tmp_path, 1).step,
        read_last_heartbeat(tmp_path, 2),
    ) == (
        "training",
        7,
        None,
    )
    beats[0].write_stacks_to(tmp_path / "rank-0.stacks")
    monkeypatch.setattr(heartbeat, "ANSWER_BEATS", seconds(60))  # it waits for those that are slow, and for nobody else
    assert beats[0].collect_last_collectives(None) == dict.fromkeys((0, 1), exchange(12, 5.0))

    late = RuntimeError("Timed out waiting 15000ms for recv")
    for others, said in (
        ({1: exchange(11)}, "rank 1 (process "),  # one behind, and waits for nobody
        ({1: exchange(12), 2: exchange(3, group="other")}, "rank 2"),
        ({1: exchange(12, by="nccl")}, "rank 1 (process "),  # another count
        ({1: exchange(12, 9.0)}, None),  # waits for it as well
        ({1: exchange(11, 9.0)}, None),  # waits for somebody else
        ({}, None),
    ):
        beats[0].world_size = 1 + max(others, default=1)
        found = beats[0].lagging_rank_error(late, {0: exchange(12, 9.0), **others})
        assert (found is None) == (said is None) and str(found).startswith(said or "None"), found
    beats[0].world_size = 2
    shared = RuntimeError("timed out: rank 0 waited 25 s for its peer 1 (run.timeout_s=25)")
    assert "does not come to an exchange through shared memory" in str(beats[0].lagging_rank_error(shared, {}))
    assert "lives and does not come to gloo:all_reduce number 12 of default_pg (4x2)" in str(
        beats[0].lagging_rank_error(late, {0: exchange(12, 9.0), 1: exchange(11)})
    )


def test_failure_of_a_waiting_exchange_is_recorded_before_nccl_ends_the_process(tmp_path, monkeypatch):
    """Its watchdog aborts, and no error is raised; under gloo there is one. What was told stands when the process is found."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    now, told = [exchange(12, 5.0)], []
    monkeypatch.setattr(heartbeat, "last_collective", lambda: now[0])
    beats = HeartbeatMonitor(store, 0, 2, lambda: ("training", 7), timeout_s=1.0)
    beats.on_collective_timeout = told.append
    beats._warn_before_abort(now[0])
    now[0] = exchange(12, 0.9, by="nccl")
    wait(lambda: told, "what NCCL waits for")
    assert told == [now[0]] and beats.on_collective_timeout is None, "once, by the beats themselves"
    patient = HeartbeatMonitor(store, 1, 2, lambda: ("training", 7), timeout_s=600)
    patient.on_collective_timeout = told.append
    patient._warn_before_abort(exchange(12, 500.0, by="nccl"))
    assert patient.on_collective_timeout is not None, "it may still be over in time"

    monkeypatch.setattr(heartbeat, "ANSWER_BEATS", 0)
    monkeypatch.setattr(HeartbeatMonitor, "ranks_without_heartbeat", lambda self, wait_s: [])
    where = attempt.Attempt(phase="training", step=7, run_dir=tmp_path, heartbeat_monitor=beats)
    path = tmp_path / "failure.json"
    teller = threading.Thread(target=attempt._record_timeout_before_nccl_aborts, args=(where, 0, now[0]))
    teller.start()
    wait(lambda: path.exists() and "exchanges" in read(path), "the failure with the last exchanges")
    monkeypatch.setenv("SHARDTUNE_RUN_DIR", str(tmp_path))
    killed = types.SimpleNamespace(exitcode=-signal.SIGABRT, pid=7, timestamp=5)
    killed_rank.record_killed_rank(types.SimpleNamespace(failures={0: killed}), kernel_killed_for_memory=False)
    failure = read(path)
    assert failure["message"].startswith("timed out: nccl:all_reduce number 12 of default_pg (4x2) is not over after")
    assert (failure["step"], failure["retry"]) == (7, "node_fail")
    where.step = 8  # the others came in time after all
    teller.join(seconds(30))
    assert not path.exists()


def test_flight_recorders_of_gloo_and_nccl_are_both_read(monkeypatch):
    """NCCL's exchanges are not among gloo's."""

    def entry(number: int, by: str, created: int, retired: bool) -> dict:
        about = {
            "collective_seq_id": number,
            "profiling_name": f"{by}:all_reduce",
            "process_group": ["0", "default_pg"],
        }
        return {**about, "time_created_ns": created, "retired": retired, "input_sizes": [[2]]}

    def said(*entries):
        return lambda collectives, active: json.dumps({"entries": [*entries]}).encode()

    from torch._C import _distributed_c10d as c10d

    monkeypatch.setattr(c10d, "_dump_fr_trace_json", said(entry(3, "gloo", 10, True)))
    monkeypatch.setattr(c10d, "_dump_nccl_trace_json", said(entry(7, "nccl", 20, True)), raising=False)
    assert (flight_recorder.last_collective().operation, flight_recorder.last_collective().number) == (
        "nccl:all_reduce",
        7,
    )
    monkeypatch.setattr(c10d, "_dump_nccl_trace_json", said(entry(7, "nccl", 5, False), entry(8, "nccl", 6, False)))
    last = flight_recorder.last_collective()
    assert (last.number, last.numbering) == (7, ("default_pg", "nccl")) and last.waiting_s > 0
    monkeypatch.setattr(c10d, "_dump_nccl_trace_json", said())
    assert flight_recorder.last_collective().numbering == ("default_pg", "gloo")


def test_rank_that_asks_where_all_are_has_reported_its_own_place(tmp_path, monkeypatch):
    """Its own beat was late on a busy host, and its exchange, for which it had waited, was missing in failure.json."""

    def state():
        if threading.current_thread() is not threading.main_thread():
            threading.Event().wait()
        return "training", 7

    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(heartbeat, "last_collective", lambda: exchange(3))
    monkeypatch.setattr(heartbeat, "ANSWER_BEATS", 0)
    beats = HeartbeatMonitor(store, 1, 2, state)
    beats.write_stacks_to(tmp_path / "rank-1.stacks")
    assert beats.collect_last_collectives(None) == {1: exchange(3)}
    assert stacks(tmp_path).count("last exchange: ") == 1 and "test_rank_that_asks" in stacks(tmp_path)


def test_a_full_disk_makes_no_rank_silent(tmp_path, monkeypatch):
    """Where the stacks cannot be written, its heartbeats ended with that, or the cause of the failure did."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(heartbeat, "last_collective", lambda: exchange(3))
    beats = HeartbeatMonitor(store, 1, 2, lambda: ("training", 7))
    (tmp_path / "rank-1.stacks").symlink_to("/dev/full")
    beats.write_stacks_to(tmp_path / "rank-1.stacks")
    monkeypatch.setattr(heartbeat, "ANSWER_BEATS", 0)
    assert beats.collect_last_collectives(None) == {1: exchange(3)}


BUSY = """
import json, pathlib, sys, threading, time
from torch.distributed import TCPStore
from strategies.heartbeat import HeartbeatMonitor

def work():
    while True:
        json.dumps({"a": [1, {"b": 2}]}, indent=1)
        sorted("3 2 1".split(), key=lambda word: pathlib.Path("x") / word)

store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
HeartbeatMonitor(store, 1, 2, lambda: ("training", 7)).write_stacks_to(pathlib.Path(sys.argv[1]))
threading.Thread(target=work, daemon=True).start()
print("busy", flush=True)
time.sleep(3600)
"""


def test_rank_survives_being_asked_where_it_is_while_its_threads_run(tmp_path):
    """Another thread's frames, read in the handler of a signal, ended it by SIGSEGV: at times a stopped rank that was woken."""
    command = [sys.executable, "-c", BUSY, str(tmp_path / "rank-1.stacks")]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "busy\n"
            for _ in range(300):
                process.send_signal(signal.SIGSTOP)
                heartbeat._signal_main_thread(process.pid, signal.SIGQUIT)
                process.send_signal(signal.SIGCONT)
                time.sleep(0.002)
                assert process.poll() is None
            wait(lambda: "in <module>" in stacks(tmp_path), "the main thread's stack", process)
        finally:
            process.kill()


def stacks(directory) -> str:
    path = directory / "rank-1.stacks"
    return path.read_text() if path.exists() else ""


def test_the_exchanges_of_this_process_are_read_without_a_pickle():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for _ in range(2):
            dist.all_reduce(torch.ones(4, 2))
        last, until = flight_recorder.last_collective(), time.monotonic() + seconds(30)
        while last.waiting_s is not None and time.monotonic() < until:  # gloo's own thread notes that it is over
            last = flight_recorder.last_collective()
    finally:
        dist.destroy_process_group()
    assert (last.operation, last.sizes, last.waiting_s) == ("gloo:all_reduce", [[4, 2]], None) and last.number >= 2


def test_killed_rank_has_its_phase_and_step_also_where_no_peer_saw_it(tmp_path, monkeypatch):
    monkeypatch.setenv(HEARTBEAT_DIRECTORY_VARIABLE, str(tmp_path))
    monkeypatch.setenv("SHARDTUNE_RUN_DIR", str(tmp_path))
    monkeypatch.setenv("SHARDTUNE_LAUNCHER", "1")
    (tmp_path / "1").write_text('{"host": "n1", "pid": 7, "count": 9, "phase": "evaluation", "step": 4}')
    killed = types.SimpleNamespace(exitcode=-signal.SIGKILL, pid=7, timestamp=5)
    killed_rank.record_killed_rank(types.SimpleNamespace(failures={1: killed}), kernel_killed_for_memory=False)
    failure = read(tmp_path / "failure.json")
    assert (failure["rank"], failure["phase"], failure["step"]) == (1, "evaluation", 4), failure
