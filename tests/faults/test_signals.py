"""Signals in the environment a user has: whatever comes, and however often, the run saves, says so and is resumable."""

import signal
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist

from strategies.rendezvous import DECISION_KEY, Rendezvous
from tests.faults.runs import ROOT, environment, flood, forked_rank_of, wait
from tests.helpers.covering import EVERYTHING
from tests.helpers.speed import seconds


def test_signals_save_a_run_of_one_process(runs):
    # One whose libraries start their threads when they are loaded, as of a user; the others train when it has ended.
    flooded = runs.start("flooded", "run.threads=0", "tuning=full", paced=False, own=True)
    runs.wait_for_step("flooded", 3, flooded)
    codes = {"flooded": flood(flooded, signal.SIGHUP, signal.SIGTERM)}
    interrupted, suspended = (runs.start(name) for name in ("interrupted", "suspended"))
    for name, process in (("interrupted", interrupted), ("suspended", suspended)):
        runs.wait_for_step(name, 3, process)
    interrupted.send_signal(signal.SIGINT)
    # As `scontrol suspend` and resume do; longer than what waits for signals may look away.
    suspended.send_signal(signal.SIGSTOP)
    time.sleep(1)
    suspended.send_signal(signal.SIGCONT)
    time.sleep(0.2)
    suspended.send_signal(signal.SIGXCPU)  # as the kernel sends it at a soft limit of processor time
    codes |= {"interrupted": runs.end(interrupted), "suspended": runs.end(suspended)}
    assert codes == {"flooded": 75, "interrupted": 130, "suspended": 75}
    for name in codes:
        status = runs.status(name)
        assert (status["state"], status["step"] >= 3) == ("preempted", True)
        assert (runs.root / name / "checkpoints" / f"step-{status['step']:06d}" / "manifest.json").exists()
        assert f"stopped at step {status['step']}, saved" in runs.said(name)
    assert "Press Ctrl-C again to quit now" in runs.said("interrupted")


@pytest.mark.skipif(not EVERYTHING, reason="one process shows the same in fewer seconds")
def test_two_ranks_and_their_launcher_outlive_a_flood(runs):
    process = runs.start("two", "strategy=ddp", "launcher.processes=2", paced=False)
    runs.wait_for_step("two", 3, process)
    assert flood(process, signal.SIGHUP, signal.SIGTERM) == 75
    assert runs.status("two")["state"] == "preempted"
    assert "saved; the same command continues it" in runs.said("two")


TERMINAL = """
import signal
signal.signal(signal.SIGHUP, signal.{})
from trainer.stopping.signals import STOP_SIGNALS
print(signal.SIGHUP in STOP_SIGNALS)
"""


def test_signal_of_a_closing_terminal_asks_to_save_but_under_nohup():
    for disposition, asks in (("SIG_DFL", "True"), ("SIG_IGN", "False")):
        words = [sys.executable, "-c", TERMINAL.format(disposition)]
        assert subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == asks


BY_ITSELF = """
import os, signal, time
from trainer.stopping.signals import StopRequest, block_signals

def send(number, until):
    os.kill(os.getpid(), number)
    deadline = time.monotonic() + 60
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.01)

class Breaks(StopRequest):
    broken = False
    def _remember_first_signal(self, number, frame):
        if not self.broken:
            self.broken = True
            raise RuntimeError("the waiting thread ends")
        super()._remember_first_signal(number, frame)

block_signals()
with Breaks() as request:  # a thread that died is replaced
    waiting = request._receiving_thread
    send(signal.SIGUSR2, lambda: not waiting.is_alive())
    assert request.signal_name is None
    send(signal.SIGUSR2, lambda: request.signal_name == "SIGUSR2")
with StopRequest() as request:  # as CPython's resource tracker does when it is started
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    send(signal.SIGTERM, lambda: request.signal_name == "SIGTERM")
with StopRequest(interrupts=True) as request:
    said, gone = os.dup(2), os.pipe()
    os.close(gone[0])
    os.dup2(gone[1], 2)  # the `tee` that read it has ended of the same Ctrl-C
    send(signal.SIGINT, lambda: request.signal_name == "SIGINT")
    os.dup2(said, 2)
    try:
        send(signal.SIGINT, lambda: False)
    except KeyboardInterrupt:
        print("ended at once")
assert signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])  # held to the end
"""


def test_signal_wait_loses_no_signal_and_a_second_ctrl_c_ends_at_once():
    done = subprocess.run(
        [sys.executable, "-c", BY_ITSELF], env=environment(), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "ended at once\n"), done.stderr


def test_signal_to_one_rank_while_data_is_prepared_stops_all(runs):
    with runs.data_held() as word:
        process = runs.start("early", word, "strategy=ddp", "launcher.processes=2", ranks=True)
        wait(lambda: runs.said("early").count("waiting for another process") == 2, "both ranks wait", process)
        begun = time.monotonic()
        forked_rank_of(process.pid, 1).send_signal(signal.SIGUSR2)
        assert runs.end(process) == 75
    assert time.monotonic() - begun < seconds(30)  # not the 600 of run.timeout_s
    assert runs.status("early")["state"] == "preempted"
    assert "stopped before training began, nothing is lost" in runs.said("early")


def stuck(runs, name, function, **extra):
    """What makes each process of the run stand still in native code in `function`, and the file with their numbers."""
    mark = runs.root / f"{name}.stuck"
    path = {"PYTHONPATH": f"{ROOT / 'tests' / 'faults' / 'stuck'}:{ROOT}"}
    return mark, {**path, "STUCK_IN": function, "STUCK_MARK": str(mark), **extra}


def test_signal_ends_a_process_stuck_in_native_code_before_training(runs):
    """Nothing is saved before training: who asks does not wait for a library that loads, or never comes back."""
    alone_mark, alone_fault = stuck(runs, "stuck-alone", "load_tokenizer")
    alone = runs.start("stuck-alone", paced=False, **alone_fault)
    locked_mark, locked_fault = stuck(runs, "stuck-locked", "load_tokenizer", STUCK_ALONE="1")
    locked = runs.start("stuck-locked", paced=False, **locked_fault)
    pair_mark, pair_fault = stuck(runs, "stuck-pair", "build_engine")
    pair = runs.start("stuck-pair", "strategy=ddp", "launcher.processes=2", paced=False, ranks=True, **pair_fault)
    wait(alone_mark.exists, "one process stands still", alone)
    wait(locked_mark.exists, "one process stands still and lets no thread run", locked)
    for process in (alone, locked):
        process.send_signal(signal.SIGTERM)
    wait(lambda: pair_mark.exists() and len(pair_mark.read_text().split()) == 2, "both ranks stand still", pair)
    forked_rank_of(pair.pid, 1).send_signal(signal.SIGUSR2)  # one rank: its end is that of the other, too
    assert (runs.end(alone), runs.end(pair)) == (75, 75)
    assert (runs.status("stuck-alone")["state"], runs.status("stuck-pair")["state"]) == ("preempted", "preempted")
    assert runs.status("stuck-pair")["reason"] == "SIGUSR2 during: building the model"
    assert "stopped during data preparation, nothing is lost" in runs.said("stuck-alone")
    assert "stopped before training began, nothing is lost" in runs.said("stuck-pair")
    assert runs.end(locked) == -signal.SIGKILL
    # The lease was given back: on another host, too, the same words begin at once.
    assert [path.name for path in (runs.root / "stuck-alone" / "lease").glob("*.over")] == ["000001.over"]


def until_decided(store):
    wait(lambda: store.check([DECISION_KEY]), "a decision")


def test_signal_decision_whether_to_start_training_is_made_once_for_all_ranks():
    def meet(told, *, slow=lambda store: None):
        """What two ranks decide: rank 0 is ready and asks `told`; rank 1 prepares until `slow` returns."""
        store, answers = dist.HashStore(), {}
        first, second = Rendezvous(store, 0, 2, 30), Rendezvous(store, 1, 2, 30)
        thread = threading.Thread(target=lambda: answers.update(first=first.wait_for_all(told)))
        thread.start()
        slow(store)
        stops = second.poll_stop_decision(False)
        answers["second"] = not stops and second.wait_for_all(lambda: False)
        thread.join()
        return answers

    assert meet(lambda: False) == {"first": True, "second": True}
    # Told while it waits for the other one, which hears of it between two blocks of its data.
    assert meet(lambda: True, slow=until_decided) == {"first": False, "second": False}
    # Told too late: the other has decided, and the group, which exists now, hears of it.
    store = dist.HashStore()
    both = Rendezvous(store, 0, 2, 30), Rendezvous(store, 1, 2, 30)
    store.set("shardtune/ready/0", "1")
    store.add("shardtune/ready", 1)
    assert both[1].wait_for_all(lambda: False) and both[0].wait_for_all(lambda: True)
    assert not both[0].poll_stop_decision(True)
