"""Runs in MLflow, read back by its own library; a resumed run goes on, a failed one is marked. `twice` is for trackio, too."""

import pytest

from tests.reporting.test_tracking import tracked
from trainer.reporting.config import Alert, LoggingConfig, WandbMode
from trainer.reporting.status import RunState
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
    first.trackers.close(RunEnding(RunState.preempted, 75, "asked to stop"))
    about = tracked(path / "run", config, settings=SETTINGS, run_id=first.run_id, resumed_at=2)
    again = open_trackers(about, {})
    again.trackers.log({"loss": 0.25, "tokens": 30}, step=3)
    again.trackers.summarise({"final/loss": 0.25})
    again.trackers.close(RunEnding(RunState.failed, 70, "not finite", diverged=True))
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
    assert [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, "train/loss")] == [
        (1, 1),
        (2, 0.5),
        (3, 0.25),
    ]
    assert found.data.metrics["final/loss"] == 0.25


def test_mlflow_server_that_is_not_there_is_left_out(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    opened = open_trackers(tracked(tmp_path, LoggingConfig(wandb=WandbMode.disabled, mlflow=True)), {})
    opened.trackers.close(RunEnding(RunState.done))
    assert "127.0.0.1:9 cannot be reached: Connection refused" in opened.substitutions["logging.mlflow"]
