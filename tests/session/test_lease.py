"""A run directory has one owner, on whatever host and whatever the clocks and the file system do."""

import errno
import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from launch.cluster.supervisor import record_run_outcome, state_before_start
from strategies import atomic_io
from strategies.errors import Preempted, StorageError
from tests.faults.runs import ROOT, can_be_elsewhere, take_over, wait
from tests.helpers.speed import seconds
from trainer import run as run_module
from trainer.config.run import RunConfig
from trainer.reporting.status import record_failure
from trainer.session import announcements as telling
from trainer.session import lease as lease_module
from trainer.session import lease_owner as owner_module
from trainer.session.attempt import Attempt, run_attempt
from trainer.session.lease import Lease, LeaseLost, RunDirInUse, possible_owner_text
from trainer.session.lease_owner import LeaseOwner
from trainer.stopping.signals import StopRequest


@pytest.mark.parametrize("end", [Preempted("asked to stop"), KeyboardInterrupt(), ValueError("x")], ids=repr)
def test_lease_is_checked_however_an_attempt_ends(tmp_path, another_host, end):
    status = tmp_path / "status.json"
    with pytest.raises(BaseException, match="on elsewhere") as caught, run_attempt(tmp_path, 60, StopRequest()):
        take_over(tmp_path, LeaseOwner(host="elsewhere"))
        status.write_text("the other's")
        raise end
    assert isinstance(caught.value, LeaseLost)
    assert status.read_text() == "the other's"
    assert not (tmp_path / "failure.json").exists()


def test_lease_is_checked_by_all_ranks_at_a_stop_before_training(monkeypatch):
    def stops(*_):
        raise Preempted("asked to stop while the reference was computed")

    def lost():
        raise LeaseLost("run.dir=x: another took it over")

    monkeypatch.setattr(run_module, "record_reference_logps", stops)
    built = MagicMock()
    built.tuning.keeps_base = False
    where = Attempt(lease=SimpleNamespace(check=lost))
    place = SimpleNamespace(attempt=where, runtime=SimpleNamespace(world_size=1), run_dir=Path(), config_sha256="")
    place.console = place.stop_agreement = MagicMock()
    with pytest.raises(LeaseLost):
        run_module.record_reference_logps_of_data(RunConfig(), MagicMock(), MagicMock(), built, place)
    with pytest.raises(LeaseLost):  # and so before what the run is, and that it runs, is written down
        run_module.compare_with_resumed_run(RunConfig(), MagicMock(), place)
    monkeypatch.setattr(telling, "start_screen_text", lambda facts: "")
    with pytest.raises(LeaseLost):
        telling.open_trackers_and_records(RunConfig(), {}, MagicMock(), place)


def test_lease_that_cannot_be_read_does_not_hide_why_the_run_failed(tmp_path, monkeypatch, capsys):
    def stale(directory):
        raise OSError(errno.ESTALE, "stale file handle")

    before = state_before_start(tmp_path)
    record_failure(tmp_path, 1, StorageError("checkpoints/step-000005: no space left"), "training", 5)
    monkeypatch.setattr(lease_module, "latest_claim", stale)
    assert record_run_outcome(tmp_path, 1, before) == 74
    assert "checkpoints/step-000005: no space left" in capsys.readouterr().err


PATIENCE_S = 60.0
"""Of a directory that others may want, on a machine that may let nobody work for seconds."""


@pytest.fixture
def another_host(monkeypatch):
    """Owners are judged by their heartbeats alone, as between hosts, which come twelve times a second."""
    monkeypatch.setattr(owner_module, "process_identity", lambda pid: "")
    monkeypatch.setattr(owner_module, "HEARTBEATS_PER_TIMEOUT", 12 * PATIENCE_S)
    monkeypatch.setattr(lease_module, "HEARTBEATS_PER_TIMEOUT", 12 * PATIENCE_S)


def test_lease_between_hosts_is_decided_by_signs_of_life_only(tmp_path, another_host):
    owner = Lease.acquire(tmp_path, PATIENCE_S)
    with pytest.raises(RunDirInUse, match="is running it"):
        Lease.acquire(tmp_path, PATIENCE_S)
    assert possible_owner_text(tmp_path) is not None
    owner.check()
    owner.release()
    assert possible_owner_text(tmp_path) is None
    begun = time.monotonic()
    with Lease.acquire(tmp_path, 10**6):  # what is over is not waited for
        assert time.monotonic() - begun < seconds(60)


HIDDEN = """
import os, subprocess, time
from trainer.session.lease_owner import LeaseOwner, is_alive_here, process_identity, owner_of_this_process
def become(user):
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
there = os.fork()
if not there:
    become(4711)
    time.sleep(3600)
owner, mine = LeaseOwner(pid=there, process=process_identity(there)), owner_of_this_process(1)
subprocess.run(["mount", "-t", "proc", "-o", "hidepid=2", "proc", "/proc"], check=True)
asker = os.fork()
if not asker:
    become(4712)
    assert process_identity(there) == "" and is_alive_here(owner, mine) is None
    os._exit(0)
told = os.waitstatus_to_exitcode(os.waitpid(asker, 0)[1])
os.kill(there, 9)
os.waitpid(there, 0)
os._exit(told or is_alive_here(owner, mine) is not False)
"""


@pytest.mark.skipif(not can_be_elsewhere(), reason="needs root, and namespaces")
def test_lease_of_a_hidden_process_of_another_user_is_not_taken_for_free():
    """As on hosts of many users, where /proc shows each their own (`hidepid`): its run was taken over while it lived."""
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", HIDDEN], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_lease_claim_that_is_missed_at_one_look_is_not_another_attempt(tmp_path, monkeypatch):
    with Lease.acquire(tmp_path, 60) as lease:
        monkeypatch.setattr(lease, "_claim_exists", lambda: False)
        lease.check()


def test_lease_wait_for_a_silent_owner_can_be_stopped(tmp_path, another_host):
    silent = Lease.acquire(tmp_path, 60)
    with pytest.raises(Preempted, match="nothing was begun"):
        Lease.acquire(tmp_path, 60, stop=lambda: True)
    silent.release()


def test_lease_goes_at_once_to_a_later_start_of_the_same_job_and_the_earlier_stops(tmp_path, another_host, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    lost = threading.Event()
    earlier = Lease.acquire(tmp_path, 60, on_loss=lost.set)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with Lease.acquire(tmp_path, 60) as later:
        with pytest.raises(LeaseLost, match=r"job 7, start 1, since .* took it over"):
            earlier.check()
        assert lost.wait(seconds(60))  # found out by itself, too
        earlier.release()
        later.check()  # the end of the earlier one says nothing about the later


def test_lease_wanted_by_many_at_once_goes_to_one(tmp_path, another_host):
    got, barrier = [], threading.Barrier(6)

    def want():
        barrier.wait()
        try:
            got.append(Lease.acquire(tmp_path, PATIENCE_S))
        except RunDirInUse:
            return

    threads = [threading.Thread(target=want) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    got[0].check()
    got[0].release()


def test_lease_claimed_between_the_look_and_the_claim_of_another_is_kept(tmp_path, another_host, monkeypatch):
    look, first = lease_module.raise_if_run_dir_is_in_use, []

    def overtaken(*words):
        look(*words)
        if not first:
            first.append(None)
            first[0] = Lease.acquire(tmp_path, PATIENCE_S)

    monkeypatch.setattr(lease_module, "raise_if_run_dir_is_in_use", overtaken)
    with pytest.raises(RunDirInUse):
        Lease.acquire(tmp_path, PATIENCE_S)
    first[0].check()
    first[0].release()


class Network(atomic_io.Disk):
    """What network file systems do: answers that get lost, old listings, stale handles, writes of a few bytes, errors."""

    def __init__(self):
        self.old_listing, self.stale, self.broken = True, 1, 0

    def names(self, directory):
        return [] if self.old_listing else super().names(directory)

    def open(self, path, flags):
        if not flags & (os.O_CREAT | os.O_DIRECTORY) and path.exists() and self.stale:
            self.stale -= 1
            raise OSError(errno.ESTALE, "stale file handle")
        return super().open(path, flags)

    def write(self, descriptor, content):
        if self.broken:
            self.broken -= 1
            raise OSError(errno.EIO, "input/output error")
        return super().write(descriptor, content[:7])

    def link(self, source, target):
        super().link(source, target)
        raise OSError(errno.EIO, "the answer got lost")


def test_lease_works_without_hard_links(tmp_path, another_host, monkeypatch):
    def refused(self, source, target):
        raise OSError(errno.EPERM, "operation not permitted")

    monkeypatch.setattr(atomic_io.Disk, "link", refused)
    with Lease.acquire(tmp_path, PATIENCE_S) as owner:
        with pytest.raises(RunDirInUse):
            Lease.acquire(tmp_path, PATIENCE_S)
        owner.check()


def test_lease_works_on_a_network_file_system(tmp_path, another_host, monkeypatch):
    network = Network()
    monkeypatch.setattr(atomic_io, "disk", network)
    owner = Lease.acquire(tmp_path, PATIENCE_S)
    network.stale = 1
    with pytest.raises(RunDirInUse):  # the listing is empty, and the claim is there
        Lease.acquire(tmp_path, PATIENCE_S)
    network.stale, network.broken = 1, 3  # a few heartbeats fail
    wait(lambda: network.broken == 0, "they have failed")
    owner.check()
    network.broken = 10**6
    with pytest.raises(StorageError, match="input/output error"):
        Lease.acquire(tmp_path / "other", PATIENCE_S)
    deadline = time.monotonic() + seconds(60)
    while time.monotonic() < deadline:  # silent for so long that others may take it for dead: it stops by itself
        owner._last_heartbeat_at -= PATIENCE_S
        try:
            owner.check()
        except LeaseLost as lost:
            assert "no heartbeat could be written" in str(lost)
            break
        time.sleep(0.1)
    else:
        raise AssertionError("never gave up")


def test_lease_is_kept_through_a_step_of_ten_minutes(tmp_path, another_host, monkeypatch):
    """The owner's thread counts up whatever the step does; another host, by its own clock, never finds it silent."""
    (tmp_path / "config.yaml").write_text("")
    monkeypatch.setattr(lease_module.threading, "Thread", MagicMock())  # the beat is called below
    lease = Lease.acquire(tmp_path, 120)
    now_s = 0.0
    beaten_at = []

    def wait_for_release(seconds):
        nonlocal now_s
        beaten_at.append(now_s)
        assert lease_module._heartbeat_path(lease.directory, lease.number).read_bytes() == b"%d" % len(beaten_at)
        now_s += seconds
        return now_s >= 600

    monkeypatch.setattr(lease._released, "wait", wait_for_release)
    monkeypatch.setattr(lease_module, "time", SimpleNamespace(monotonic=lambda: now_s))
    lease._write_heartbeats()
    lease.check()
    gaps = [after - before for before, after in itertools.pairwise([*beaten_at, 600.0])]
    assert max(gaps) < 120 / 6 and beaten_at[-1] > 600 - 120 / 6
