"""Settings of what a run records and where."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from strategies.settings import DESCRIBES, Reach, number, setting
from trainer.reporting.metric_names import XAxis


class WandbMode(StrEnum):
    """`auto` takes WANDB_MODE, else `offline`. `online` falls back to `offline`, recorded, without an API key or a server."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


Alert = StrEnum("Alert", ["failed", "diverged", "preempted"])
"""How a run ends of which somebody is told."""

WANDB_COLUMN_BY_SETTING = {
    "strategy.name": "strategy",
    "tuning.name": "tuning",
    "objective.name": "objective",
    "optim.name": "optimizer",
    "optim.lr": "lr",
    "run.seed": "seed",
    "batch.global": "global_batch",
    "batch.micro": "micro_batch",
    "model.path": "model",
    "data.path": "data",
    "precision": "precision",
}
"""Settings that every run has a column of, and its name."""


@dataclass(kw_only=True, slots=True)
class LoggingConfig:
    """What is recorded, where and how often."""

    every_steps: int = number(10, least=1, advice="10 as a rule")
    """Steps between reads of the device's metric buffer. Every step still gets a row in `metrics.jsonl`."""
    wandb: WandbMode = setting(WandbMode.auto, reach=Reach.tracker)
    """Weights & Biases: `online`, `offline` (sync later), `disabled`, or `auto` (WANDB_MODE, else offline)."""
    project: str | None = setting(None, reach=Reach.tracker)
    """Project in trackers. null: WANDB_PROJECT, else `shardtune`."""
    entity: str | None = setting(None, reach=Reach.tracker)
    """W&B team or user. null: WANDB_ENTITY, else that of your account."""
    group: str | None = setting(None, reach=DESCRIBES)
    """Group of runs that are compared. null: WANDB_RUN_GROUP. `compare` and `train -m` set one group for all their runs."""
    name: str | None = setting(None, reach=DESCRIBES)
    """Name in trackers. null: WANDB_NAME, else derived from the settings, such as fsdp2-lora-lr2e-4, or the point of a
    comparison."""
    notes: str | None = setting(None, reach=DESCRIBES)
    """Notes about the run, shown in trackers. null: WANDB_NOTES."""
    job_type: str | None = setting(None, reach=DESCRIBES)
    """Job type in trackers. null: WANDB_JOB_TYPE, else `train`."""
    tags: list[str] = setting(default_factory=list, reach=DESCRIBES)
    """Tags in trackers. Empty: WANDB_TAGS (a,b)."""
    columns: list[str] = setting(default_factory=list, reach=DESCRIBES)
    """Settings that become columns of W&B's table of runs, such as optim.weight_decay, or name=text for a column of your
    own."""
    x: XAxis = setting(XAxis.step, reach=Reach.tracker)
    """X axis of W&B's charts: `step`, `tokens`, `epoch`, or `seconds` of training steps."""
    alerts: list[Alert] = setting(default_factory=list, reach=Reach.tracker)
    """Ends of a run for which W&B sends an alert (Slack, e-mail): `failed`, `diverged`, `preempted`."""
    artifacts: bool = setting(False, reach=Reach.tracker)
    """Also register the prepared data and the export as W&B artifacts, by reference: the files are not uploaded."""
    tables: bool = setting(False, reach=Reach.tracker)
    """Also show the worst and the changed rows of tasks, and answers of rounds, as tables in W&B and TensorBoard."""
    tensorboard: bool = setting(False, reach=Reach.tracker)
    """Also write TensorBoard event files (needs the `tensorboard` package)."""
    trackio: bool = setting(False, reach=Reach.tracker)
    """Also record to trackio (needs the `trackio` package)."""
    mlflow: bool = setting(False, reach=Reach.tracker)
    """Also record to MLflow, at MLFLOW_TRACKING_URI, else in mlflow.db beside the run (needs `mlflow-skinny`)."""
    energy: str | None = setting(None, reach=DESCRIBES)
    """Country whose electricity the hosts use, such as DEU (ISO 3166). Energy is then measured by codecarbon. null: not
    measured."""
    step_parts: bool = setting(False, reach=DESCRIBES)
    """Also time forward pass, backward pass and optimizer in each step, without waiting for the device."""
    slow_rank: float = number(1.5, least=0, advice="1.5 names a rank that takes half as long again; 0 never looks")
    """A rank is reported as slow if its compute time is this many times the median of the other ranks, in five logging
    intervals in a row. 0: never."""
    report: bool = setting(True, reach=DESCRIBES)
    """Write `report.html` when the run has ended, with verdict, numbers and settings. The extra `report` adds plots."""
    reference_tflops: float | None = number(None, above=0, advice="null takes what is known of the device")
    """Peak TFLOP/s of one device, for MFU. null: known for common GPUs. On CPUs there is no MFU without it."""
