"""Runs in trackio and MLflow, read back by their own libraries; resumed runs go on, failed ones are marked."""

import json
import subprocess
import sys

import pytest

from tests.helpers.launching import clean_environment
from tests.helpers.speed import seconds
from tests.reporting.test_tracking import tracked
from trainer.reporting.config import Alert, LoggingConfig, WandbMode
from trainer.reporting.status import State
from trainer.reporting.trackers.base import RunEnding
from trainer.reporting.tracking import open_trackers

SETTINGS = {"strategy": "fsdp2", "lr": 2e-4, "config": {"optim": {"lr": 2e-4}, "tuning": {"layers (x)": [1, 2]}}}


def twice(path, **setting):
    """A run of two steps that is stopped, and resumed until it diverges; returns the commands that show it."""
    config = LoggingConfig(wandb=WandbMode.disabled, project="notes", group="g", alerts=[Alert.diverged], **setting)
    first = open_trackers(tracked(path / "run", config, settings=SETTINGS), {})
    assert not first.substitutions
    for step in (1, 2):
        first.trackers.log({"step": step, "loss": 1 / step, "tokens": 10 * step}, step=step)
    first.trackers.close(RunEnding(State.preempted, 75, "asked to stop"))
    about = tracked(path / "run", config, settings=SETTINGS, run_id=first.run_id, resumed_at=2)
    again = open_trackers(about, {})
    again.trackers.log({"loss": 0.25, "tokens": 30}, step=3)
    again.trackers.summarise({"final/loss": 0.25})
    again.trackers.close(RunEnding(State.failed, 70, "not finite", diverged=True))
    return first.run_id, again.trackers.hints


def test_mlflow_run_reads_back(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "run").mkdir()
    run_id, hints = twice(tmp_path, mlflow=True)
    from mlflow import MlflowClient

    address = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert hints == [("MLflow", f"mlflow ui --backend-store-uri {address}")]
    client = MlflowClient(tracking_uri=address)
    (found,) = client.search_runs([client.get_experiment_by_name("notes").experiment_id])
    assert (found.info.run_name, found.info.status) == ("fsdp2-lora-lr2e-4", "FAILED")
    assert found.data.tags["state"] == "diverged" and found.data.tags["shardtune.run_id"] == run_id
    assert found.data.params["lr"] == "0.0002" and found.data.params["config.optim.lr"] == "0.0002"
    assert [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, "loss")] == [
        (1, 1),
        (2, 0.5),
        (3, 0.25),
    ]
    assert found.data.metrics["final/loss"] == 0.25


def test_mlflow_server_that_is_not_there_is_left_out(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    opened = open_trackers(tracked(tmp_path, LoggingConfig(wandb=WandbMode.disabled, mlflow=True)), {})
    opened.trackers.close(RunEnding(State.done))
    assert "127.0.0.1:9 cannot be reached: Connection refused" in opened.substitutions["logging.mlflow"]


READ = """
import json, sys
from pathlib import Path
from tests.reporting.test_other_trackers import twice
import trackio
from trackio.sqlite_storage import SQLiteStorage
path = Path(sys.argv[1]); (path / "run").mkdir()
run_id, hints = twice(path, trackio=True)
(run,) = trackio.Api().runs("notes")
print(json.dumps({"id": run_id, "hints": hints, "name": run.name, "config": run.config, "alerts": run.alerts(),
    "rows": SQLiteStorage.get_logs("notes", run.name)}, default=str))
"""


def test_trackio_run_reads_back(tmp_path):
    """In a process of its own: trackio takes its place when it is imported."""
    pytest.importorskip("trackio")
    env = clean_environment(TRACKIO_DIR=str(tmp_path / "trackio"))
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path)], env=env, capture_output=True, text=True, timeout=seconds(120)
    )
    assert done.returncode == 0 and "Reserved keys" not in done.stderr, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["name"] == f"fsdp2-lora-lr2e-4-{found['id'][:6]}"
    assert found["hints"] == [["trackio", "trackio show --project notes"]]
    assert found["config"]["lr"] == 2e-4 and found["config"]["_Group"] == "g"
    assert [(row["step"], row["loss"]) for row in found["rows"] if "loss" in row] == [(1, 1.0), (2, 0.5), (3, 0.25)]
    assert [row["state"] for row in found["rows"] if "state" in row] == ["preempted", "diverged"]
    assert [(alert["title"], alert["text"]) for alert in found["alerts"]] == [
        ("fsdp2-lora-lr2e-4: diverged", "not finite")
    ]
