"""Runs seen and stopped from a login node: the queue, the output of a job, and an end that is not requeued."""

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
    words += ["logging.wandb=disabled", "logging.every_steps=1", "launcher.nodes=2", "logging.report=false"]

    def shardtune(verb: str, *more: object, code: int = 0) -> str:
        command = [sys.executable, "-m", "launch.main", verb, *map(str, more)]
        done = cluster.on("ctl", *command, cwd=CLONE, env=ENV, check=False)
        assert done.returncode == code, done.stdout
        return done.stdout

    def rows() -> dict[str, dict]:
        return {Path(row["directory"]).name: row for row in json.loads(shardtune("status", runs, "--json"))["runs"]}

    runs = tmp_path / "runs"
    ids = {}
    for name in ("works", "waits"):
        said = shardtune("submit", *words, f"run.dir={runs / name}", "launcher.exclusive=true")
        found = re.search(r"submitted job (\d+)", said)
        assert found, said
        ids[name] = found[1]
    metrics = runs / "works" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 2, 180, "steps")
    found = rows()
    assert {name: (row["state"], row["job_id"]) for name, row in found.items()} == {
        "works": ("running", ids["works"]),
        "waits": ("queued", ids["waits"]),
    }
    assert (found["works"]["host"], found["works"]["job"]["state"]) == ("n9", "RUNNING")
    assert "waits for nodes to become free" in shardtune("status", runs)
    said = shardtune("logs", runs / "works", "job=last")
    assert f"job {ids['works']}, start 0, on n[9-10]" in said and "the nodes are fit" in said
    assert "| loss " in shardtune("logs", runs / "works", "lines=1")

    said = shardtune("stop", runs / "waits")
    assert f"job {ids['waits']} was taken out of the queue; nothing was begun" in said
    assert cluster.job(ids["waits"])["JobState"] == "CANCELLED"
    said = shardtune("stop", runs / "works")
    status = json.loads((runs / "works" / "status.json").read_text())
    assert f"saved at step {status['step']}: " in said, said
    assert (runs / "works" / "checkpoints" / f"step-{status['step']:06d}" / "manifest.json").exists()
    ended = cluster.wait(ids["works"])
    assert (ended["Restarts"], status["state"]) == ("0", "preempted")
    assert "not requeued from here" in shardtune("logs", runs / "works", "job=last")
    assert rows()["works"]["state"] == "preempted"
    assert "is not running: preempted" in shardtune("stop", runs / "works")
    assert f"works: preempted at step {status['step']}" in shardtune("logs", runs / "works", "--follow")
