"""Real processes: two gloo ranks under the launcher end together, whatever ends them; the first cause is told last."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import psutil
import pytest

from launch.cluster import killed_rank, torchrun
from strategies.errors import ConfigError
from tests.faults.runs import wait
from tests.helpers.covering import EVERYTHING, whole
from tests.helpers.launching import command_here, ended
from tests.helpers.speed import seconds
from tests.launch.cluster.stand_in import STAND_IN
from trainer.reporting.status import read_failure, record_failure

ROOT = Path(__file__).parents[3]


@pytest.fixture
def job(tmp_path):
    """Start `shardtune train` on two ranks with a stand-in worker; everything it left is killed afterwards."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(STAND_IN)
    (tmp_path / "data.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "model").mkdir()
    started = []

    def start(what, *words, processes=2):
        # As on a machine whose environment says nothing of a job.
        env = {
            k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SHARDTUNE_", "OMP_", "PYTHONSAFEPATH"))
        }
        env |= {"PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{ROOT}", "STAND_IN": what}
        command = [sys.executable, "-P", "-m", "launch.main", "train", f"model.path={tmp_path / 'model'}"]
        command += [f"data.path={tmp_path / 'data.jsonl'}", "budget.steps=3", "batch.global=4", "batch.micro=1"]
        command += [f"run.dir={tmp_path / 'run'}", "run.device=cpu", "strategy=ddp"]
        command += [f"launcher.processes={processes}", *words]
        process = subprocess.Popen(
            command, cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
    for pid in running(tmp_path / "run"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def ranks(run_dir: Path) -> list[int]:
    return [int(path.read_text()) for path in run_dir.glob("**/rank-*.pid")]


def wait_for_step(run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + seconds(60)
    while time.monotonic() < deadline:
        try:
            status = json.loads((run_dir / "status.json").read_text())
        except FileNotFoundError:
            status = {}
        if (status.get("step") or 0) >= step and len(ranks(run_dir)) == 2:
            return
        time.sleep(0.05)
    raise AssertionError("the ranks never started")


def running(run_dir: Path) -> list[int]:
    """Ranks that have not ended."""
    return [pid for pid in ranks(run_dir) if not ended(pid)]


def assert_gone(run_dir: Path, count: int = 2) -> None:
    assert len(ranks(run_dir)) == count
    assert running(run_dir) == []


def test_two_ranks_finish_and_starting_again_is_a_no_op(job, tmp_path, monkeypatch, capsys):
    # What has our names where the command is typed is not imported.
    (tmp_path / "trainer.py").write_text("raise SystemExit('the wrong trainer')\n")
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "train.py").write_text("raise SystemExit('the wrong launch')\n")
    process = job("short")
    _, err = process.communicate(timeout=seconds(90))
    assert process.returncode == 0, err
    assert "starting 2 processes" in err
    world, threads, sha256 = (tmp_path / "run" / "environment").read_text().split()
    assert world == "2"
    assert int(threads) == max(1, len(os.sched_getaffinity(0)) // 2)
    assert f"# sha256: {sha256}" in (tmp_path / "run" / "config.yaml").read_text()
    monkeypatch.chdir(tmp_path)
    assert command_here(process.args[4:]) == 0  # ranks would find no model
    assert "already finished" in capsys.readouterr().out


FAILURES = [("user", 64, "matches no module"), ("kill", 70, "killed by SIGKILL"), ("raise", 70, "rank 1 on ")]


@whole("a rank is killed under torchrun in test_ranks.py, and one that fails is named in test_warm.py")
@pytest.mark.parametrize(("what", "code", "last"), FAILURES)
def test_a_failing_rank_ends_the_job_and_is_named_last(job, tmp_path, what, code, last):
    process = job(what)
    begun = time.monotonic()
    _, err = process.communicate(timeout=seconds(90))
    assert process.returncode == code, err
    assert last in "\n".join(err.strip().splitlines()[-2:])
    assert "ChildFailedError" not in err
    assert err.count("shardtune train:") == 1  # only the first cause is told
    failure = json.loads((tmp_path / "run" / "failure.json").read_text())
    assert failure["rank"] == 1
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    assert_gone(tmp_path / "run")
    assert time.monotonic() - begun < seconds(60)


@pytest.mark.parametrize("what", ["long", "stuck"] if EVERYTHING else ["stuck"])
def test_ctrl_c_ends_every_process_within_ten_seconds(job, tmp_path, what):
    process = job(what)
    wait_for_step(tmp_path / "run", 1 if what == "long" else 0)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=seconds(60))
    assert time.monotonic() - begun < seconds(10)
    assert process.returncode == 130, err
    assert_gone(tmp_path / "run")
    state = json.loads((tmp_path / "run" / "status.json").read_text())["state"]
    assert state == ("preempted" if what == "long" else "failed")


def test_a_killed_launcher_leaves_no_orphan(job, tmp_path):
    process = job("long")
    wait_for_step(tmp_path / "run", 1)
    process.kill()
    process.wait()
    deadline = time.monotonic() + seconds(10)
    while running(tmp_path / "run") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert_gone(tmp_path / "run")


@whole("status names the process that was started as the one that trains in tests/launch/runs/test_real_runs.py")
def test_launcher_of_one_process_trains_without_torchrun(job, tmp_path):
    process = job("short", "strategy=single", processes=1)
    _, err = process.communicate(timeout=seconds(60))
    assert process.returncode == 0, err
    assert ranks(tmp_path / "run") == [process.pid]


@pytest.mark.parametrize(
    ("recorded", "first_cause"),
    [(ConfigError("tuning.targets=nope: matches no module"), 1), (RuntimeError("Connection closed by peer [x]"), 0)],
)
def test_launcher_names_a_killed_rank_as_the_cause_unless_another_recorded_one(
    tmp_path, monkeypatch, recorded, first_cause
):
    record_failure(tmp_path, 1, recorded, "worker")
    killed = types.SimpleNamespace(exitcode=-signal.SIGABRT, pid=7, timestamp=5)
    ended = types.SimpleNamespace(exitcode=70, pid=8, timestamp=5)
    monkeypatch.setenv("SHARDTUNE_RUN_DIR", str(tmp_path))
    killed_rank.record_killed_rank(
        types.SimpleNamespace(failures={1: ended, 0: killed}), kernel_killed_for_memory=False
    )
    assert read_failure(tmp_path)["rank"] == first_cause


def test_launcher_keeps_a_signal_until_there_is_a_rank_to_take_it():
    """What torchrun starts before its ranks took it, and no rank ever heard of it."""
    agent = subprocess.Popen(
        ["bash", "-c", "sleep 60 & read; RANK=0 sleep 60 & wait -n; kill %1"], stdin=subprocess.PIPE
    )
    try:
        wait(psutil.Process(agent.pid).children, "a helper")
        assert not torchrun._signal_ranks(agent.pid, signal.SIGTERM)
        agent.stdin.write(b"\n")
        agent.stdin.flush()
        wait(lambda: torchrun._signal_ranks(agent.pid, signal.SIGTERM), "a rank")
        assert agent.wait(seconds(30)) == 0, "the rank has ended, and the helper was there to be ended"
    finally:
        agent.kill()
        agent.communicate()


def test_launcher_passes_on_a_signal_that_comes_while_it_handles_others(monkeypatch):
    class Pending(list):
        later = [signal.SIGUSR2]  # noqa: RUF012

        def __iter__(self):
            yield from super().__iter__()
            self.extend(self.later)  # as a handler does, which runs between any two steps of the interpreter
            self.later = []

    passed, ends = [], iter([None, None, 0])

    def wait_for(timeout):
        if (code := next(ends)) is None:
            raise subprocess.TimeoutExpired("torchrun", timeout)
        return code

    monkeypatch.setattr(torchrun, "_signal_ranks", lambda pid, number: passed.append(number) or True)
    agent = types.SimpleNamespace(pid=1, wait=wait_for)
    assert torchrun._wait_for_torchrun(agent, Pending([signal.SIGINT]), []) == 130
    assert passed == [signal.SIGTERM, signal.SIGUSR2]
