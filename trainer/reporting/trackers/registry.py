"""All trackers. A new one is a module with a `base.Tracker`, a setting of `logging`, and a line here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

from strategies.extras import install_command
from trainer.reporting.config import LoggingConfig, WandbMode
from trainer.reporting.trackers.base import TrackedRun, Tracker


@dataclass(frozen=True, slots=True)
class TrackerKind:
    """One tracker: its setting of `logging`, the class in this package, what must be installed."""

    setting: str
    class_path: str
    """`module:Class` within this package."""
    package: str
    extra: str | None
    """The extra of setup.py that installs it; None where it comes with shardtune."""

    def open(self, tracked_run: TrackedRun) -> Tracker:
        """Begin recording. May raise whatever the tracker's own library raises."""
        module, _, class_name = self.class_path.partition(":")
        tracker: Tracker = getattr(import_module(f"trainer.reporting.trackers.{module}"), class_name)(tracked_run)
        return tracker


KINDS = (
    TrackerKind("wandb", "weights_and_biases:WandbRun", "wandb", None),
    TrackerKind("tensorboard", "tensorboard:TensorboardFiles", "tensorboard", "tensorboard"),
    TrackerKind("trackio", "trackio_store:TrackioRun", "trackio", "trackio"),
    TrackerKind("mlflow", "mlflow_store:MlflowRun", "mlflow", "mlflow"),
)


def enabled_trackers(config: LoggingConfig) -> list[TrackerKind]:
    """The trackers that are on."""
    return [kind for kind in KINDS if getattr(config, kind.setting) not in (False, WandbMode.disabled)]


def problems(config: LoggingConfig) -> Iterator[str]:
    """An error message for each tracker whose package is not installed on this host, and for tables that nobody shows."""
    enabled_settings = {kind.setting for kind in enabled_trackers(config)}
    if config.tables and not enabled_settings & {"wandb", "tensorboard"}:
        yield "logging.tables=true: W&B and TensorBoard show them, and neither is on; set logging.wandb=offline, or leave it out"
    for kind in enabled_trackers(config):
        if find_spec(kind.package) is None:
            command = install_command(kind.extra) if kind.extra else f"pip install {kind.package}"
            typed_value = str(getattr(config, kind.setting)).lower()
            yield f"logging.{kind.setting}={typed_value}: needs the package {kind.package} ({command})"
