"""`shardtune stop` where nothing runs, elsewhere, and by SLURM: what it would do, what it says, and whom it never touches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cluster.slurm import TRAIN_SCRIPT_BODY
from launch.main import main
from launch.runs import stop as ways
from launch.runs import stop_command
from launch.runs.job_record import record_job_end
from launch.runs.queue import write_submitted_job_ids
from tests.launch.runs.made import here, made, owned, stand_in_for_squeue, without_torch
from trainer.session.lease_owner import process_identity

READY = "import signal; signal.pthread_sigmask(signal.SIG_UNBLOCK, {15}); print(flush=True); input()"
"""A process that TERM ends, whatever the tests before it have blocked."""
CALLED = """#!/bin/sh
echo "$(basename "$0") $*" >>"{log}"
case "$1" in
  write) cat "{script}" ;;
  *) [ -z "$SCANCEL_FAILS" ] || { echo "scancel: error: Access denied" >&2; exit 1; }; : >"{queue}" ;;
esac
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    for name in ("POLL_INTERVAL_S", "QUEUE_INTERVAL_S"):
        monkeypatch.setattr(stop_command, name, 0.02)


def checkpoint(run: Path, step: int) -> None:
    (run / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)


def process(code: str, run: Path) -> subprocess.Popen:
    """A process that has the directory of a run open, as the owner of its lease has, and that waits."""
    opened = f"import os; os.open({str(run)!r}, os.O_RDONLY); {code}"
    other = subprocess.Popen([sys.executable, "-c", opened], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline()
    return other


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stand-ins for SLURM's commands; returns what was called. `(job id, state, run)` is what the queue holds."""
    log, script = tmp_path / "called", tmp_path / "script"
    script.write_text("#!/bin/bash\n" + TRAIN_SCRIPT_BODY)
    log.touch()

    def queue(job: str, state: str, run: Path) -> Path:
        row = [job, "21", state, "None", "N/A", "1:00", "n1", str(tmp_path), "run", f"{run}/train.sbatch"]
        monkeypatch.setenv("PATH", stand_in_for_squeue(tmp_path / "bin", [row]))
        for name in ("scancel", "scontrol"):
            text = CALLED.replace("{log}", str(log)).replace("{script}", str(script))
            (tmp_path / "bin" / name).write_text(text.replace("{queue}", str(tmp_path / "bin" / "queue")))
            (tmp_path / "bin" / name).chmod(0o755)
        return log

    return queue


def test_stop_of_a_run_that_is_not_running_names_its_last_checkpoint(tmp_path, capsys):
    done = made(tmp_path, "done", state="done")
    checkpoint(done, 3)
    silent = made(tmp_path, "silent")
    owned(silent, heartbeat_age_s=10**6)
    begun = made(tmp_path, "begun", state=None, steps=0)
    for run, said in (
        (done, f"is not running: done; saved at step 3: {done}/checkpoints/step-000003"),
        (silent, "is not running: lost (no heartbeat for 12 d from process 7 on n1); no checkpoint"),
        (begun, "is not running: not started; no step was made, so nothing is lost"),
    ):
        assert main(["stop", str(run)]) == 0
        assert said in capsys.readouterr().out
    found = without_torch("stop", done, "--json")
    assert found.returncode == 0 and "is not running" in found.stderr, found.stderr
    newest = {"step": 3, "path": f"{done}/checkpoints/step-000003"}
    told = {"run": str(done), "by": None, "state": "done", "why": None, "step": 3, "checkpoint": newest}
    assert json.loads(found.stdout) == told


def test_a_process_that_is_not_the_runs_is_never_touched(tmp_path, capsys):
    mine = made(tmp_path, "mine")
    other = process(READY, mine)
    try:
        reused = made(tmp_path, "reused")
        owned(reused, **{**here(other.pid), "process": process_identity(other.pid) + "1"})
        assert main(["stop", str(reused)]) == 0
        assert "ended without a message" in capsys.readouterr().out
        # Also where it took the number between the look and the signal.
        assert ways.SignalProcess(other.pid, process_identity(os.getpid())).send() is False
        assert ways.SignalProcess(2**22 - 1, "x").send() is False
        assert other.poll() is None
        # A copy of the run, and a run of somebody else's that names a process of its reader's.
        copied = made(tmp_path, "copied")
        owned(copied, **here(other.pid))
        assert main(["stop", str(copied)]) == 69
        assert f"process {other.pid} is named as its owner, and has no file of that" in capsys.readouterr().err
        assert other.poll() is None
        owned(mine, **here(other.pid))
        assert main(["stop", str(mine), "--dry-run"]) == 0
        assert f"would be stopped by: kill -TERM {other.pid}" in capsys.readouterr().out
        assert other.poll() is None
        assert main(["stop", str(mine)]) == 70  # it knows nothing of runs, and dies
        assert "has not saved: it ended without a message; no checkpoint" in capsys.readouterr().err
        assert other.wait() == -15
    finally:
        other.kill()
        other.communicate()


def test_stop_waits_as_long_as_asked_for_a_process_that_does_not_end(tmp_path, capsys, monkeypatch):
    deaf = f"import signal; signal.signal(15, signal.SIG_IGN); {READY}"
    run = made(tmp_path, "run")
    (run / "metrics.jsonl").write_text('{"step": 7, "loss": 1.0}\n')
    other = process(deaf, run)
    try:
        checkpoint(run, 2)
        owned(run, **here(other.pid))
        assert main(["stop", str(run), "wait_s=0"]) == 69
        said = capsys.readouterr().err
        assert "has not ended within 0 s" in said and "saved at step 2" in said
        monkeypatch.setattr(stop_command, "REPORT_INTERVAL_S", 0.0)
        assert main(["stop", str(run), "wait_s=1"]) == 69
        assert "not yet ended (step 7)" in capsys.readouterr().out, (
            "as its metrics say: a resumed run's status does not"
        )
        assert other.poll() is None
    finally:
        other.kill()
        other.communicate()


def test_stop_of_a_run_on_another_host_says_what_to_type(tmp_path, capsys):
    run = made(tmp_path, "run")
    owned(run)
    assert main(["stop", str(run)]) == 69
    said = capsys.readouterr().err
    assert f"on n1 type: shardtune stop {run}" in said and "kill -TERM 7" in said
    owned(run, 2, pid="7; touch /tmp/pasted")  # in somebody else's run
    main(["stop", str(run)])
    assert "pasted" not in "".join(capsys.readouterr())
    owned(run, 3, job="30")
    assert main(["stop", str(run)]) == 69
    assert "SLURM job 30 on n1 runs it" in capsys.readouterr().err


def test_stop_ends_the_job_before_its_ranks_are_asked_to_save(tmp_path, capsys, slurm):
    run = made(tmp_path, "run", state="preempted")
    checkpoint(run, 3)
    owned(run, job="21")
    log = slurm("20_1", "RUNNING", run)
    assert main(["stop", str(run), "--dry-run"]) == 0
    commands = ["scancel --batch --signal=TERM 20_1", "scancel --signal=USR2 20_1"]
    assert "; ".join(commands) in capsys.readouterr().out
    assert log.read_text().splitlines() == ["scontrol write batch_script 21 -"]
    assert main(["stop", str(run)]) == 0
    assert log.read_text().splitlines()[2:] == commands
    assert f"saved at step 3: {run}/checkpoints/step-000003; the same command continues it" in capsys.readouterr().out


def test_stop_takes_a_pending_job_out_of_the_queue(tmp_path, capsys, slurm, monkeypatch):
    run = made(tmp_path, "run", state="running")  # it says so since its node went away
    checkpoint(run, 3)
    log = slurm("20", "PENDING", run)
    monkeypatch.setenv("SCANCEL_FAILS", "1")
    assert main(["stop", str(run)]) == 69
    assert "scancel 20: scancel: error: Access denied" in capsys.readouterr().err
    monkeypatch.delenv("SCANCEL_FAILS")
    log.write_text("")
    assert main(["stop", str(run)]) == 0
    assert log.read_text() == "scancel 20\n"
    assert "job 20 was taken out of the queue; saved at step 3" in capsys.readouterr().out


@pytest.mark.parametrize("state", ["PENDING", "RUNNING"])
def test_stop_does_not_end_the_job_of_another_run_that_a_copy_names(tmp_path, capsys, slurm, state):
    """As a copied run does, or one of somebody else's."""
    mine, copied = made(tmp_path / "mine", "run"), made(tmp_path, "copied", state="preempted")
    log = slurm("20", state, mine)
    write_submitted_job_ids([copied], "20")
    owned(copied, heartbeat_age_s=10**6, job="21")
    assert main(["stop", str(copied)]) == 0
    assert "is not running" in capsys.readouterr().out
    script = tmp_path / "script"
    script.write_text("#!/bin/bash\nsrun something else\n")
    queue = tmp_path / "bin" / "queue"
    queue.write_text(queue.read_text().replace(f"{mine}/train.sbatch", f"{tmp_path}/other.sh"))
    assert main(["stop", str(copied)]) == 69, "nobody knows for what that job is"
    assert "scancel" not in log.read_text()


@pytest.mark.parametrize("state", ["REQUEUE_HOLD", "SPECIAL_EXIT", "REQUEUED"])
def test_stop_takes_a_held_job_out_of_the_queue(tmp_path, slurm, state):
    log = slurm("20", state, made(tmp_path, "run", state="preempted"))
    assert main(["stop", str(tmp_path / "run")]) == 0
    assert log.read_text() == "scancel 20\n"


def test_stop_does_not_take_a_queue_that_gives_no_answer_for_an_empty_one(tmp_path, capsys, monkeypatch):
    run = made(tmp_path, "run", state="preempted")
    write_submitted_job_ids([run], "20")
    monkeypatch.setenv("PATH", stand_in_for_squeue(tmp_path / "bin", []))
    assert main(["stop", str(run)]) == 0
    squeue = tmp_path / "bin" / "squeue"
    once = f"[ -e {tmp_path}/failed ] || {{ touch {tmp_path}/failed; exit 1; }}"
    squeue.write_text(f'#!/bin/sh\n[ -z "$SQUEUE_STATES" ] || exit 3\n{once}\n')
    monkeypatch.setenv("SQUEUE_STATES", "SUSPENDED")
    assert main(["stop", str(run)]) == 0, "it is asked twice, and not with the user's filter"
    squeue.write_text("#!/bin/sh\necho 'squeue: error: Unable to contact slurm controller' >&2; exit 1\n")
    capsys.readouterr()
    assert main(["stop", str(run)]) == 69
    said = capsys.readouterr().err
    assert "was submitted as job 20; whether it still waits or runs is not known" in said
    assert "Unable to contact slurm controller" in said and "scancel 20" in said
    assert main(["status", str(run)]) == 0
    assert "queue: squeue failed" in capsys.readouterr().out
    squeue.unlink()
    assert main(["stop", str(run)]) == 69, "a host without SLURM cannot tell either"
    (run / "submitted").write_text("20; touch /tmp/pasted\n")  # in somebody else's run
    main(["stop", str(run)])
    assert "pasted" not in "".join(capsys.readouterr())
    write_submitted_job_ids([run], "20")
    record_job_end(run, "20", 0, 75, reason="state saved", will_restart=False)
    assert main(["stop", str(run)]) == 0, "the job's own script has said that it is over"
    assert main(["stop", str(made(tmp_path, "other", state="preempted"))]) == 0, "never submitted"


def test_stop_leaves_a_job_with_another_script_to_its_user(tmp_path, capsys, slurm):
    run = made(tmp_path, "run")
    owned(run, job="21")
    log = slurm("20", "RUNNING", run)
    (tmp_path / "script").write_text("#!/bin/bash\nsrun python -m launch.train\n")
    assert main(["stop", str(run)]) == 69
    assert "scancel --signal=USR2 20 if srun started the ranks" in capsys.readouterr().err
    assert "scancel" not in log.read_text()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["nowhere"], "nowhere: is no run directory"),
        (["{run}", "wait_s=long"], "wait_s=long: must be a whole number, at least 0"),
        (["{run}", "--now"], "--now: there is no such flag"),
        (["{run}", "step=3"], "step=3: there is no such argument"),
        (["{run}", "{run}"], "name one run directory: shardtune stop runs/first"),
    ],
)
def test_stop_names_words_that_mean_nothing(tmp_path, capsys, words, problem):
    run = made(tmp_path, "run")
    assert main(["stop", *(word.format(run=run) for word in words)]) == 64
    assert problem in capsys.readouterr().err
