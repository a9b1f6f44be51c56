"""Where metrics go: `metrics.jsonl` always, Weights & Biases and TensorBoard when asked. The only importer of wandb."""

from __future__ import annotations

import json
import math
import os
import shlex
import uuid
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from strategies import durable
from strategies.errors import ConfigError, StorageError
from trainer.records.earlier import Earlier, earlier


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
    step_parts: bool = False
    """Also time forward passes, backward passes and the optimizer in each step, without waiting for the device."""
    reference_tflops: float | None = None
    """Peak TFLOP/s of one device for MFU; default: known for common GPUs, measured for CPUs."""


class Tracker(Protocol):
    """Where rows of numbers go."""

    def log(self, metrics: dict[str, Any], *, step: int) -> None:
        """Record numbers of one step."""

    def close(self) -> None:
        """Finish; nothing is lost if it is never called but the summary."""


class JsonlTracker:
    """`metrics.jsonl`: one JSON object a line, full precision, flushed a row at a time; see `not_finite`."""

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path, self.earlier, self._warned = path, Earlier(), False
        try:
            if path.exists():  # rows after the checkpoint belong to a future that is now done again
                self._keep_up_to(resume_step or -1)
            self._file = path.open("a")
            durable.sync_directory(path.parent)
        except OSError as error:
            raise StorageError(
                f"{path}: cannot be written ({durable.reason(error)}); free space, or set run.dir"
            ) from error

    def _keep_up_to(self, step: int) -> None:
        """Leave only the rows up to this step, durably: the checkpoint counts on them. Errors: OSError, with all rows there."""
        kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= step]
        aside = self.path.with_suffix(".tmp")
        aside.write_text("".join(line + "\n" for line in kept))
        durable.sync_file(aside)
        durable.disk.rename(aside, self.path)
        self.earlier = earlier(kept)

    def rewind(self, step: int) -> None:
        """Forget the rows after a step."""
        self._file.close()
        self._keep_up_to(step)
        self._file = self.path.open("a")

    def log(self, metrics: dict[str, Any], *, step: int) -> None:
        self._file.write(json_text({"step": step, **metrics, **not_finite(metrics)}) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Have the rows on the disk, as the checkpoint will be that they lead to; one warning where that is not possible."""
        try:
            durable.disk.sync(self._file.fileno())
        except OSError as error:
            if not self._warned:
                print(
                    f"warning: {self.path} could not be synced ({durable.reason(error)}): a power cut may lose rows that the "
                    "checkpoints count on; the checkpoints themselves are synced apart",
                    flush=True,
                )
            self._warned = True

    def close(self) -> None:
        self._file.close()


def not_finite(metrics: dict[str, Any]) -> dict[str, list[str]]:
    """`{"not_finite": [names]}` where a number is NaN or infinite, which JSON cannot have: it stands as null. Else nothing."""
    names = [name for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]
    return {"not_finite": names} if names else {}


def json_text(value: Any, **how: Any) -> str:
    """JSON that every reader takes: null where a number is not finite."""

    def plain(part: Any) -> Any:
        if isinstance(part, float):
            return part if math.isfinite(part) else None
        if isinstance(part, dict):
            return {key: plain(inner) for key, inner in part.items()}
        return [plain(inner) for inner in part] if isinstance(part, list | tuple) else part

    return json.dumps(plain(value), allow_nan=False, **how)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")  # a torn last line


class WandbTracker:
    """Weights & Biases with its step metrics on a tokens axis; the run id survives a resume."""

    def __init__(self, config: LoggingConfig, run_dir: Path, *, run_id: str, settings: dict[str, Any]) -> None:
        import wandb

        mode, self.note = str(config.wandb), None
        if config.wandb is WandbMode.online and not _has_wandb_account():
            mode, self.note = "offline", "offline (no W&B API key is configured)"
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            group=config.group,
            tags=config.tags or None,
            name=run_dir.name,
            id=run_id,
            resume="allow" if mode == "online" else None,
            mode=mode,  # type: ignore[arg-type]
            dir=str(run_dir.absolute()),  # W&B's own process may have been started elsewhere
            config=settings,
            # The command line may hold what should not leave the machine; the resolved config says it all.
            settings=wandb.Settings(x_disable_meta=True, console="off", silent=True),
        )
        self._run.define_metric("tokens")
        self._run.define_metric("*", step_metric="tokens")
        self.offline_dir = str(Path(self._run.dir).parent) if mode == "offline" else None

    def log(self, metrics: dict[str, Any], *, step: int) -> None:
        self._run.log({"train_step": step, **metrics}, step=step)

    def summarise(self, values: dict[str, Any]) -> None:
        """Set the run's summary, which the standard run table shows."""
        self._run.summary.update(values)

    def close(self) -> None:
        self._run.finish()


def _has_wandb_account() -> bool:
    import wandb

    return bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)


class TensorboardTracker:
    """TensorBoard event files under `tensorboard/`."""

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "logging.tensorboard=true: needs the package tensorboard (pip install 'shardtune[tensorboard]')"
            ) from error
        self._writer = SummaryWriter(str(directory))

    def log(self, metrics: dict[str, Any], *, step: int) -> None:
        for key, value in metrics.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class Trackers:
    """All of a run's trackers behind one `log`. Only rank 0 has any."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self._trackers = trackers

    def log(self, metrics: dict[str, Any], *, step: int) -> None:
        """Record numbers of one step everywhere. A failing remote tracker is dropped with a message, not fatal."""
        for tracker in list(self._trackers):
            try:
                tracker.log(metrics, step=step)
            except Exception as error:
                if isinstance(tracker, JsonlTracker):
                    raise StorageError(f"{tracker.path}: cannot be written ({error}); free space") from error
                print(f"{type(tracker).__name__} stopped working and is dropped: {error}", flush=True)
                self._trackers.remove(tracker)

    def summarise(self, values: dict[str, Any]) -> None:
        """Set the summary where a tracker has one."""
        for tracker in self._trackers:
            if isinstance(tracker, WandbTracker):
                tracker.summarise(values)

    def rewind(self, step: int) -> None:
        """Forget the rows after a step in `metrics.jsonl`; elsewhere they stay until they are written again, or for good."""
        for tracker in self._trackers:
            if isinstance(tracker, JsonlTracker):
                try:
                    tracker.rewind(step)
                except OSError as error:
                    raise StorageError(f"{tracker.path}: cannot be written ({error}); free space") from error

    def sync(self) -> None:
        """Make the rows so far outlive a power cut."""
        for tracker in self._trackers:
            if isinstance(tracker, JsonlTracker):
                tracker.sync()

    @property
    def earlier(self) -> Earlier:
        """What the rows say that were there before this process; nothing on other ranks than 0."""
        return next((each.earlier for each in self._trackers if isinstance(each, JsonlTracker)), Earlier())

    @property
    def sync_line(self) -> str | None:
        """The command that uploads an offline W&B run."""
        for tracker in self._trackers:
            if isinstance(tracker, WandbTracker) and tracker.offline_dir:
                return f"wandb sync {shlex.quote(tracker.offline_dir)}"
        return None

    def close(self) -> None:
        """Close all of them."""
        for tracker in self._trackers:
            tracker.close()


def summary_of(last_row: dict[str, Any], speed: dict[str, float], evaluated: dict[str, float]) -> dict[str, Any]:
    """The W&B summary that the run table compares: median speed, memory, the last loss and final held-out metrics."""
    final = {**last_row, **speed}
    summary = {f"final/{key}": final[key] for key in ("tokens_per_s", "memory_gib", "mfu", "loss") if key in final}
    return {**summary, **{f"final/{key}": value for key, value in evaluated.items()}}


def build_trackers(
    config: LoggingConfig, run_dir: Path, *, wandb_id: str | None, resume_step: int, settings: dict[str, Any]
) -> tuple[Trackers, str | None, str | None]:
    """(trackers, W&B run id, substitution note); for rank 0 only."""
    trackers: list[Tracker] = [JsonlTracker(run_dir / "metrics.jsonl", resume_step)]
    note = None
    if config.wandb is not WandbMode.disabled:
        wandb_id = wandb_id or uuid.uuid4().hex[:12]
        tracker = WandbTracker(config, run_dir, run_id=wandb_id, settings=settings)
        note = tracker.note
        trackers.append(tracker)
    if config.tensorboard:
        trackers.append(TensorboardTracker(run_dir / "tensorboard"))
    return Trackers(trackers), wandb_id, note
