"""A rank that the kernel killed for memory is the user's to mend, under SLURM too: named as that, and never started again."""

import os
import signal
import subprocess
import types
import uuid
from pathlib import Path

import pytest

from launch.cluster import killed_rank
from launch.runs.logs_command import failure_report
from strategies import runtime
from strategies.heartbeat import Heartbeat, SilentRank
from tests.faults.runs import ROOT, environment, rank_of, read, wait
from tests.helpers.covering import whole
from trainer.reporting.status import read_failure, read_status, record_failure
from trainer.session.attempt import first_line_of_message

SBATCH = "#!/bin/bash\necho 7\n"
SRUN = '#!/bin/bash\nwhile [ "$1" != bash ]; do shift; done\nexec "$@"\n'
SCONTROL = """#!/bin/bash
case $1$2 in
  showhostnames) echo localhost ;;
  showjob) echo PreemptTime=None ;;
  *) echo "$*" >>"$SHARDTUNE_RUN_DIR/asked" ;;
esac
"""
GROWS = """
import os, pathlib, threading, time

def grow():
    while not pathlib.Path(os.environ["GROW"]).exists():
        time.sleep(0.1)
    kept = []
    while True:
        kept.append(b"x" * 2**26)

if os.environ.get("RANK") == "1":
    threading.Thread(target=grow, daemon=True).start()
"""
LIMIT = 3 * 2**30


@pytest.fixture
def group():
    """A control group of little memory; skips where this process may make none."""
    for parent, limits in (
        (Path("/sys/fs/cgroup"), {"memory.max": LIMIT, "memory.swap.max": 0}),
        (Path("/sys/fs/cgroup/memory"), {"memory.limit_in_bytes": LIMIT, "memory.memsw.limit_in_bytes": LIMIT}),
    ):
        made = parent / f"shardtune-{uuid.uuid4().hex[:8]}"
        try:
            made.mkdir()
        except OSError:
            continue
        if (made / next(iter(limits))).exists():
            for name, value in limits.items():
                if (made / name).exists():
                    (made / name).write_text(str(value))
            yield made
            processes = made / "cgroup.procs"
            wait(lambda path=processes: not path.read_text(), "the end of all in the group")
            made.rmdir()
            return
        made.rmdir()
    pytest.skip("this process may not make a control group with a limit of memory")


@whole("how it is seen is shown below, and what a job does then in tests/slurm/test_job.py")
def test_under_slurm_a_rank_killed_for_memory_is_named_and_not_requeued(runs, group):
    tools = runs.root / "slurm-tools"
    tools.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tools / "sitecustomize.py").write_text(GROWS)
    words = ["launcher=slurm", "launcher.processes=2", "launcher.retry={node_fail: 3}", "strategy=ddp"]
    path = f"{tools}:{os.environ['PATH']}"
    subprocess.run(runs.words("memory", *words, verb="submit"), env=environment(PATH=path), cwd=ROOT, check=True)

    run = runs.root / "memory"
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "localhost"}
    job["SLURM_NODEID"] = "0"
    grow = {"PYTHONPATH": str(tools), "GROW": str(run / "grow")}
    command = ["bash", "-c", f"echo $$ >{group / 'cgroup.procs'} && exec bash {run / 'train.sbatch'}"]
    process = runs._popen(command, "memory", {"PATH": path, **job, **grow})
    runs.wait_for_step("memory", 2, process)
    killed = rank_of(process.pid, 1).pid
    (run / "grow").touch()
    assert runs.end(process) != 0
    failure = read(run / "failure.json")
    assert (failure["rank"], failure["pid"], failure["retry"]) == (1, killed, "out_of_memory"), failure
    assert "out of memory" in failure["message"] and "batch.micro" in failure["message"]
    assert runs.status("memory")["state"] == "failed"
    assert not (run / "asked").exists(), (run / "asked").read_text()  # no requeue
    assert f"rank 1 (process {killed}) was killed by SIGKILL: out of memory" in "".join(
        log.read_text() for log in (run / "logs").glob("*") if log.is_file()
    ) + runs.said("memory")


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("launcher", [None, "4711"])
def test_out_of_memory_rank_that_a_peer_took_for_a_lost_node_is_corrected(
    tmp_path, monkeypatch, capsys, memory, launcher
):
    seen = Heartbeat(rank=1, host="n2", pid=7, phase="training", step=9, count=3)
    silent = SilentRank(seen, hung=False, since_s=3, error_line="Connection closed by peer")
    record_failure(tmp_path, 1, silent, "training", 9, gone=True, retry="node_fail")
    assert read_failure(tmp_path)["error"] == "Silent", "what stands in the file outlives the name of a class"
    assert read_failure(tmp_path)["user_error"] is False
    assert "it was probably killed (out of memory, or kill -9)" in read_failure(tmp_path)["message"]
    assert "kernel log of n2 (dmesg -T)" in read_failure(tmp_path)["message"] and "rank-1.log" in str(silent)
    # The message says all, so that no traceback hides it.
    assert "Traceback" not in failure_report(tmp_path) and str(silent) in failure_report(tmp_path)
    monkeypatch.setenv("SHARDTUNE_RUN_DIR", str(tmp_path))
    monkeypatch.delenv("SHARDTUNE_LAUNCHER", raising=False)
    if launcher is not None:
        monkeypatch.setenv("SHARDTUNE_LAUNCHER", launcher)
    killed = types.SimpleNamespace(exitcode=-signal.SIGKILL, pid=7, timestamp=5)
    killed_rank.record_killed_rank(types.SimpleNamespace(failures={1: killed}), kernel_killed_for_memory=memory)
    failure = read_failure(tmp_path)
    assert (failure["phase"], failure["step"], failure["user_error"]) == ("training", 9, memory)
    assert ("out of memory" in failure["message"], failure["retry"]) == (
        memory,
        "out_of_memory" if memory else "node_fail",
    )
    # Where no launcher waits for it (SLURM), it is said at once, and the run does not stay `running`.
    assert ("was killed by SIGKILL" in capsys.readouterr().err) == (launcher is None)
    assert read_status(tmp_path).get("state") == ("failed" if launcher is None else None)


def test_out_of_memory_kills_are_counted_in_the_control_group_or_on_the_host(tmp_path, monkeypatch):
    host, groups, membership = tmp_path / "vmstat", tmp_path / "cgroup", tmp_path / "membership"
    for name, path in (("_HOST_COUNTERS_FILE", host), ("_CGROUP_ROOT", groups), ("_OWN_CGROUP_FILE", membership)):
        monkeypatch.setattr(runtime, name, path)
    assert runtime.num_out_of_memory_kills() is None
    host.write_text("nr_free_pages 17\noom_kill 5\n")
    assert runtime.num_out_of_memory_kills() == 5
    membership.write_text("4:memory:/job\n0::/job_7/step_0\n")
    assert runtime.num_out_of_memory_kills() == 5  # version 2 is there for other things only
    (groups / "job_7" / "step_0").mkdir(parents=True)
    (groups / "job_7" / "step_0" / "memory.events").write_text("low 0\noom 3\noom_kill 2\noom_group_kill 0\n")
    (groups / "job_7" / "memory.events").write_text("oom_kill 9\n")
    assert runtime.num_out_of_memory_kills() == 2


def test_failure_reason_includes_the_line_after_a_heading():
    """Some messages begin with a heading, which alone says nothing."""
    text = (
        "the data cannot be used, of 8 rows:\n  bad.jsonl:1: messages is no list\n  bad.jsonl:2: messages is no list\n"
    )
    assert first_line_of_message(text) == "the data cannot be used, of 8 rows: bad.jsonl:1: messages is no list"
    assert first_line_of_message("no room\nat step 3") == "no room" and first_line_of_message("rows:\n") == "rows:"
    assert first_line_of_message("") == ""
