"""Where metrics go: `metrics.jsonl` always, Weights & Biases and TensorBoard when asked. The only importer of wandb."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class WandbMode(StrEnum):
    """`online` falls back to `offline`, recorded, when no API key is configured."""

    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass(kw_only=True, slots=True)
class LoggingConfig:
    """What is recorded, where and how often."""

    every_steps: int = 10
    """Steps between reads of the device's metric buffer (a row is kept for every step)."""
    wandb: WandbMode = WandbMode.offline
    """Weights & Biases: `online`, `offline` (sync later) or `disabled`."""
    project: str = "shardtune"
    """W&B project."""
    entity: str | None = None
    """W&B team or user."""
    group: str | None = None
    """W&B group; runs to be compared share one."""
    tags: list[str] = field(default_factory=list)
    """W&B tags."""
    tensorboard: bool = False
    """Also write TensorBoard event files (needs the `tensorboard` package)."""
    reference_tflops: float | None = None
    """Peak TFLOP/s of one device for MFU; default: known for common GPUs, measured for CPUs."""
