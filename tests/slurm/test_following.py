"""Runs seen and stopped from a login node: the queue, the output of a job, and an end that is not requeued.

The one that trains was started by the script for people, the one that waits by `shardtune submit`.
"""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from tests.helpers.models import tiny_model_dir
from tests.helpers.tokenizers import tiny_tokenizer, write_chat_data
from tests.slurm.cluster import Cluster, wait_for

pytestmark = pytest.mark.slurm
CLONE = Path(__file__).parents[2]
ENV = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
ODD = ENV | {
    "SBATCH_TIMELIMIT": "1",
    "SBATCH_ARRAY_INX": "0-2",
    "SBATCH_NO_REQUEUE": "1",
    "SBATCH_PARTITION": "main",
    "SQUEUE_STATES": "SUSPENDED",
    "SQUEUE_PARTITION": "high",
}
"""What a user may have set once: it would change the job, and hide it from squeue."""
PACED = ENV | {"PYTHONPATH": f"{CLONE}:{CLONE / 'tests' / 'faults' / 'pace'}"}
"""Where a run rests after each step: it is only looked at."""
BETWEEN = "\f"
ONE_BY_ONE = f"""
import json, sys
from launch.main import main
for words in json.loads(sys.argv[1]):
    code = main(words)
    print({BETWEEN!r}, end="", flush=True)
    if code:
        sys.exit(code)
"""


def test_status_logs_and_stop_of_jobs(cluster: Cluster, tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tiny_model_dir(tmp_path / "model"))
    data = write_chat_data(tmp_path / "train.jsonl", 48)
    words = [f"model.path={tmp_path / 'model'}", f"data.path={data}", f"data.cache_dir={tmp_path / 'cache'}"]
    words += [
        "strategy=ddp",
        "run.device=cpu",
        "precision=fp32",
        "batch.global=8",
        "batch.micro=2",
        "budget.steps=90000",
    ]
    words += ["logging.wandb=disabled", "logging.every_steps=1", "logging.report=false"]

    def shardtune(*asked: list[object]) -> list[str]:
        """What each of these commands says, one after the other in one process of the login node; all end well."""
        commands = [list(map(str, words)) for words in asked]
        done = cluster.on(
            "ctl", sys.executable, "-c", ONE_BY_ONE, json.dumps(commands), cwd=CLONE, env=ODD, check=False
        )
        assert done.returncode == 0, done.stdout
        return done.stdout.split(BETWEEN)[:-1]

    runs = tmp_path / "runs"
    works, waits = runs / "works", runs / "waits"
    (works / "logs").mkdir(parents=True)
    # The script as people have copied it since before the modules that it calls were moved.
    script = "tests/golden/earlier_train.sbatch"
    asked = ["--nodes=2", "--exclusive", f"--output={works}/logs/%x-%j.out", script]
    ids = [cluster.sbatch(*asked, *words, f"run.dir={works}", cwd=CLONE, env=PACED | {"PYTHON": sys.executable})]
    [begun] = shardtune(
        ["submit", *words, f"run.dir={waits}", "launcher.nodes=2", "launcher.exclusive=true", "launcher.time=30"]
    )
    found = re.search(r"submitted job (\d+)", begun)
    assert found, begun
    ids.append(found[1])
    asked_for = cluster.job(found[1])
    assert (asked_for["TimeLimit"], asked_for["Requeue"], "ArrayJobId" in asked_for) == ("00:30:00", "1", False)
    assert "environ SBATCH_PARTITION=main is passed on" in begun
    metrics = works / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 2, 180, "steps")
    listed, shown, job, line = shardtune(
        ["status", runs, "--json"], ["status", runs], ["logs", works, "job=last"], ["logs", works, "lines=1"]
    )
    rows = {Path(row["directory"]).name: row for row in json.loads(listed)["runs"]}
    assert {name: (row["state"], row["job_id"]) for name, row in rows.items()} == {
        "works": ("running", ids[0]),
        "waits": ("queued", ids[1]),
    }
    assert (rows["works"]["host"], rows["works"]["job"]["state"]) == ("n9", "RUNNING")
    assert "waits for nodes to become free" in shown
    assert f"job {ids[0]}, start 0, on n[9-10]" in job and "no problems: the nodes can run the job" in job
    assert "| loss " in line

    taken_out, after, stopped = shardtune(
        ["stop", waits],
        ["submit", *words, f"run.dir={runs / 'after'}", f"launcher.after={ids[1]}"],  # which SLURM cancels
        ["stop", works],
    )
    assert f"job {ids[1]} was taken out of the queue; no step was made" in taken_out
    assert cluster.job(ids[1])["JobState"] == "CANCELLED"
    status = json.loads((works / "status.json").read_text())
    assert f"saved at step {status['step']}: " in stopped, stopped
    assert (works / "checkpoints" / f"step-{status['step']:06d}" / "manifest.json").exists()
    ended = cluster.wait(ids[0])
    assert (ended["Restarts"], status["state"]) == ("0", "preempted")
    job, listed, stopped, followed, cancelled = shardtune(
        ["logs", works, "job=last"],
        ["status", runs, "--json"],
        ["stop", works],
        ["logs", works, "--follow"],
        ["status", runs / "after"],
    )
    dependent = re.search(r"submitted job (\d+)", after)
    assert dependent and f"job {dependent[1]} ended before its script began; SLURM says: CANCELLED" in " ".join(
        cancelled.split()
    )
    assert "not requeued from here" in job
    [state] = [row["state"] for row in json.loads(listed)["runs"] if Path(row["directory"]) == works]
    assert state == "preempted"
    assert "is not running: preempted" in stopped
    assert f"works: preempted at step {status['step']}" in followed
