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

COLUMNS = {
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
    """Steps between reads of the device's metric buffer (a row is kept for every step)."""
    wandb: WandbMode = setting(WandbMode.auto, reach=Reach.tracker)
    """Weights & Biases: `online`, `offline` (sync later), `disabled`, or `auto`: WANDB_MODE, else offline."""
    project: str | None = setting(None, reach=Reach.tracker)
    """Project in trackers; null takes WANDB_PROJECT, else `shardtune`."""
    entity: str | None = setting(None, reach=Reach.tracker)
    """W&B team or user; null takes WANDB_ENTITY, else the account's own."""
    group: str | None = setting(None, reach=DESCRIBES)
    """Runs to be compared share one; null takes WANDB_RUN_GROUP; `compare` and `train -m` give their points one."""
    name: str | None = setting(None, reach=DESCRIBES)
    """Name in trackers; null takes WANDB_NAME, else what the run is, such as fsdp2-lora-lr2e-4, or the point of a comparison."""
    notes: str | None = setting(None, reach=DESCRIBES)
    """Some words about the run, shown in trackers; null takes WANDB_NOTES."""
    job_type: str | None = setting(None, reach=DESCRIBES)
    """Kind of run in trackers; null takes WANDB_JOB_TYPE, else `train`."""
    tags: list[str] = setting(default_factory=list, reach=DESCRIBES)
    """Tags in trackers; an empty list takes WANDB_TAGS (a,b)."""
    columns: list[str] = setting(default_factory=list, reach=DESCRIBES)
    """Settings that are also columns of the run table, such as optim.weight_decay, or name=text for one of your own."""
    x: XAxis = setting(XAxis.step, reach=Reach.tracker)
    """What W&B draws metrics over: `step`, `tokens`, `epoch`, or `seconds` of training steps."""
    alerts: list[Alert] = setting(default_factory=list, reach=Reach.tracker)
    """Ends of a run of which W&B sends a message (Slack, e-mail): `failed`, `diverged`, `preempted`."""
    artifacts: bool = setting(False, reach=Reach.tracker)
    """Also register the prepared data and the export as W&B artifacts, by reference: files stay where they are."""
    tables: bool = setting(False, reach=Reach.tracker)
    """Also show the worst and the changed rows of tasks, and answers of rounds, as tables in W&B and TensorBoard."""
    tensorboard: bool = setting(False, reach=Reach.tracker)
    """Also write TensorBoard event files (needs the `tensorboard` package)."""
    trackio: bool = setting(False, reach=Reach.tracker)
    """Also record to trackio (needs the `trackio` package)."""
    mlflow: bool = setting(False, reach=Reach.tracker)
    """Also record to MLflow, where MLFLOW_TRACKING_URI says, else to mlflow.db beside the run (needs `mlflow-skinny`)."""
    energy: str | None = setting(None, reach=DESCRIBES)
    """Country whose electricity the hosts use, as in DEU (ISO 3166): codecarbon measures their energy; null: nothing does."""
    step_parts: bool = setting(False, reach=DESCRIBES)
    """Also time forward passes, backward passes and the optimizer in each step, without waiting for the device."""
    slow_rank: float = number(1.5, least=0, advice="1.5 names a rank that takes half as long again; 0 never looks")
    """Times the median of the others that a rank computes, in five logging intervals in a row, to be called slow; 0: never."""
    report: bool = setting(True, reach=DESCRIBES)
    """Write `report.html` when the run has ended: verdict, numbers and settings; the extra `report` adds plots."""
    reference_tflops: float | None = number(None, above=0, advice="null takes what is known of the device")
    """Peak TFLOP/s of one device for MFU; default: known for common GPUs. Runs on CPUs have no MFU without it."""
