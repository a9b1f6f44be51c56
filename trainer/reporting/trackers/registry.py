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

    setting_name: str
    """Name of its setting below `logging`, such as `wandb`."""
    class_path: str
    """`module:Class` within this package."""
    package: str
    """The package that must be installed."""
    extra: str | None
    """The extra of setup.py that installs it; None where it comes with shardtune."""

    def open(self, tracked_run: TrackedRun) -> Tracker:
        """Begin recording. May raise whatever the tracker's own library raises."""
        module, _, class_name = self.class_path.partition(":")
        tracker: Tracker = getattr(import_module(f"trainer.reporting.trackers.{module}"), class_name)(tracked_run)
        return tracker


TRACKER_KINDS = (
    TrackerKind("wandb", "weights_and_biases:WandbRun", "wandb", None),
    TrackerKind("tensorboard", "tensorboard:TensorboardFiles", "tensorboard", "tensorboard"),
    TrackerKind("trackio", "trackio_store:TrackioRun", "trackio", "trackio"),
    TrackerKind("mlflow", "mlflow_store:MlflowRun", "mlflow", "mlflow"),
)


def enabled_trackers(config: LoggingConfig) -> list[TrackerKind]:
    """The trackers that `logging` turns on, in the order of `TRACKER_KINDS`."""
    return [kind for kind in TRACKER_KINDS if getattr(config, kind.setting_name) not in (False, WandbMode.disabled)]


def tracker_problems(config: LoggingConfig) -> Iterator[str]:
    """Check that the trackers which `logging` turns on can record: yields a message for each whose package is missing here.

    Also if `logging.tables` asks for tables, and no tracker is on that shows them.
    """
    tracker_kinds = enabled_trackers(config)
    enabled_settings = {tracker_kind.setting_name for tracker_kind in tracker_kinds}
    if config.tables and not enabled_settings & {"wandb", "tensorboard"}:
        yield "logging.tables=true: W&B and TensorBoard show them, and neither is on; set logging.wandb=offline, or leave it out"
    for tracker_kind in tracker_kinds:
        package = tracker_kind.package
        if find_spec(package) is None:
            command = install_command(tracker_kind.extra) if tracker_kind.extra else f"pip install {package}"
            setting_name = tracker_kind.setting_name
            typed_value = str(getattr(config, setting_name)).lower()  # as on a command line: `true`, not `True`
            yield f"logging.{setting_name}={typed_value}: needs the package {package} ({command})"
