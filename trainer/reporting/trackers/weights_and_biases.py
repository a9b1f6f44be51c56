"""Weights & Biases: rows on a tokens axis, a summary, how the run ended, and alerts. The run id survives a resume."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import time
from collections import deque
from pathlib import Path
from typing import Any

from trainer.reporting.config import WandbMode
from trainer.reporting.status import State
from trainer.reporting.trackers.base import RunEnding, Table, TrackedRun
from trainer.reporting.trackers.wandb_server import address, no_server

INIT_S = 30
"""Seconds that a server which answers is given to begin a run."""
FINISH_S = 60
"""Seconds for what is not uploaded yet when a run ends; it lies on the disk, and a job that is to end has no more time."""
KEPT_BYTES = 2**18
"""Bytes of the last rows, as JSON, that are kept for another process of W&B: its own has up to 32 KiB not yet in its file."""
MOST_PROCESSES = 3
"""How often W&B's process is started for one run."""


class WandbRun:
    """A run in W&B, online, or in files that `wandb sync` uploads."""

    def __init__(self, about: TrackedRun) -> None:
        self._about = about
        self._home = Path(os.environ.get("WANDB_DIR") or about.run_dir).absolute()
        """W&B's own process may have been started elsewhere."""
        self.note: str | None = None
        """Why it is offline where online was asked for."""
        self._recent_rows: deque[tuple[int, dict[str, Any], int]] = deque()
        """(step, metrics, size in bytes) of the last rows."""
        self._recent_bytes = 0
        self._summary: dict[str, Any] = {}
        self._processes = 1
        online = about.config.wandb is WandbMode.online
        if online:
            why = no_server()
            self.note = f"offline ({why})" if why else self._begin("online")
        if not online or self.note:
            self._begin("offline")
        self._define_axes()
        self.hint: tuple[str, str] | None = None
        self._tell_where(online=online and not self.note)
        if about.config.artifacts and about.data is not None:
            self._take_data(about.data, online=online and not self.note)

    def _begin(self, mode: str) -> str | None:
        """Start the run; why it could not be started online."""
        import wandb

        about = self._about
        config = about.config
        try:
            self._home.mkdir(parents=True, exist_ok=True)
            self._run = wandb.init(
                project=about.project,
                entity=config.entity,
                group=config.group,
                job_type=config.job_type or "train",
                tags=config.tags or None,
                name=about.name,
                notes=config.notes,
                id=about.run_id,
                resume="allow" if mode == "online" else None,
                mode=mode,  # type: ignore[arg-type]
                dir=str(self._home),
                config=about.settings,
                # The command line may hold what should not leave the machine; the resolved config says it all.
                settings=wandb.Settings(
                    x_disable_meta=True,
                    console="off",
                    silent=True,
                    init_timeout=INIT_S,
                    finish_timeout=float(os.environ.get("WANDB_FINISH_TIMEOUT") or FINISH_S),
                    finish_timeout_raises=True,
                ),
            )
        except (wandb.Error, TimeoutError) as error:
            if mode == "offline":
                raise
            wandb.teardown()  # its process would call this run's id taken
            return f"offline ({address()} does not begin a run: {' '.join(str(error).split())})"
        return None

    def _tell_where(self, *, online: bool) -> None:
        if online:
            self.hint = ("W&B", str(self._run.url))
            return
        parts: list[Path] = []
        for home in sorted({self._home, self._about.run_dir.absolute()}):
            parts += home.glob(f"wandb/offline-run-*-{self._about.run_id}")
        names = shlex.join(_relative_to_here(part) for part in sorted(parts, key=lambda part: part.name))
        self.hint = ("W&B", f"wandb sync {names}")

    def _take_data(self, directory: Path, *, online: bool) -> None:
        if not online:
            self._about.print_line(
                "logging.artifacts: W&B notes what data a run has used online only; the export is registered"
            )
            return
        self._run.use_artifact(
            _by_reference(directory, f"data-{self._fingerprint()[:12]}", "dataset", self._about.settings)
        )

    def _fingerprint(self) -> str:
        return str(self._about.settings.get("data_fingerprint") or "unknown").partition("/")[0]

    def _define_axes(self) -> None:
        self._run.define_metric("tokens")
        self._run.define_metric("*", step_metric="tokens")

    def log(self, metrics: dict[str, Any], *, step: int) -> None:
        self._keep_row(metrics, step)
        try:
            self._log_row(metrics, step)
        except ConnectionError:
            self._begin_again()  # with this row, too

    def _log_row(self, metrics: dict[str, Any], step: int) -> None:
        self._run.log({"train_step": step, **metrics}, step=step)

    def _keep_row(self, metrics: dict[str, Any], step: int) -> None:
        size = len(json.dumps(metrics, default=str))
        self._recent_rows.append((step, metrics, size))
        self._recent_bytes += size
        while self._recent_bytes > KEPT_BYTES:
            self._recent_bytes -= self._recent_rows.popleft()[2]

    def _begin_again(self) -> None:
        """Start W&B's process again, and hand it the last rows.

        SLURM's TERM goes to every process of a step: it ends W&B's own before the run has saved, with rows that are in no file
        yet. The rows go into another part of the same run, as after a resume. Raises ConnectionError after some such ends.
        """
        import wandb

        if self._processes >= MOST_PROCESSES:
            raise ConnectionError("W&B's own process has ended again and again")
        self._processes += 1
        time.sleep(1.0)  # W&B tells the parts of a run apart by the second of their beginning
        with contextlib.suppress(Exception):  # whatever its client raises without a process
            wandb.teardown()
        online = self._about.config.wandb is WandbMode.online and not self.note
        if online:
            self.note = self._begin("online")
            online = self.note is None
        if not online:
            self._begin("offline")
        self._define_axes()
        for step, metrics, _ in self._recent_rows:
            self._log_row(metrics, step)
        self._run.summary.update(self._summary)
        self._tell_where(online=online)

    def table(self, name: str, table: Table, *, step: int) -> None:
        """Log a table. A column with any cell that is no number becomes texts throughout."""
        import wandb

        # Columns have one type each, and one that is empty has none: texts where not all are numbers.
        columns = []
        for cells in zip(*table.rows, strict=True):
            is_numeric = all(isinstance(cell, int | float) for cell in cells)
            columns.append(cells if is_numeric else [str(cell) for cell in cells])
        rows = [list(cells) for cells in zip(*columns, strict=True)]
        self._run.log({name: wandb.Table(columns=table.columns, data=rows)}, step=step)

    def summarise(self, values: dict[str, Any]) -> None:
        self._summary |= values
        try:
            self._run.summary.update(values)
        except ConnectionError:
            self._begin_again()

    def close(self, ended: RunEnding) -> None:
        try:
            self._end(ended)
        except ConnectionError:
            self._begin_again()
            self._end(ended)

    def _end(self, ended: RunEnding) -> None:
        """Set the state, send the alert and the reference to the export if asked for, and wait for the upload."""
        if ended.state is State.preempted:
            self._run.mark_preempting()  # so that the run is called preempted and not failed
        self._run.summary.update({"state": str(ended.alert or ended.state)})
        if ended.alert in self._about.config.alerts:
            level = "WARN" if ended.state is State.preempted else "ERROR"
            self._run.alert(f"{self._about.name}: {ended.alert}", f"{self._about.run_dir}: {ended.reason}", level=level)
        if self._about.config.artifacts and ended.exported is not None:
            name = f"model-{self._about.run_id}"
            self._run.log_artifact(_by_reference(ended.exported, name, "model", self._about.settings))
        try:
            self._run.finish(exit_code=ended.exit_code)
        except TimeoutError:
            part = _relative_to_here(Path(self._run.dir).parent)
            self.hint = ("W&B", f"wandb sync {shlex.quote(part)}   (not all was uploaded in time)")


def _by_reference(directory: Path, name: str, kind: str, settings: dict[str, Any]) -> Any:
    """An artifact that names the files of a directory; none is copied or read."""
    import wandb

    metadata_keys = ("strategy", "tuning", "objective", "base_model", "data_fingerprint", "git_revision", "run_dir")
    artifact = wandb.Artifact(name, type=kind, metadata={key: settings.get(key) for key in metadata_keys})
    artifact.add_reference(directory.absolute().as_uri(), checksum=False)
    return artifact


def _relative_to_here(part: Path) -> str:
    """As the run's directory is named: relative where it lies below the working directory."""
    return str(part.relative_to(Path.cwd())) if part.is_relative_to(Path.cwd()) else str(part)
