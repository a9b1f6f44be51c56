"""Weights & Biases: rows, a summary, how the run ended, and alerts. The run id survives a resume."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import time
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

from strategies.redaction import redact
from trainer.reporting.config import Alert, WandbMode
from trainer.reporting.metric_names import FIRST_NAMES_EDITION, TRACKED_METRIC_BY_NAME, TRAINING_S
from trainer.reporting.status import RunState
from trainer.reporting.trackers.base import LoggedTable, RunEnding, TrackedRun
from trainer.reporting.trackers.wandb_server import fetch_run_labels, wandb_server_address, wandb_server_problem

INIT_TIMEOUT_S = 30
"""Seconds that a server which answers is given to begin a run."""
FINISH_TIMEOUT_S = 60
"""Seconds for what is not uploaded yet when a run ends; it lies on the disk, and a job that is to end has no more time."""
MAX_KEPT_ROW_BYTES = 2**18
"""Bytes of the last rows, as JSON, that are kept for another process of W&B: its own has up to 32 KiB not yet in its file."""
MAX_PROCESS_STARTS = 3
"""How often W&B's process is started for one run."""


class _SentRow(NamedTuple):
    """A row that was handed to W&B's process."""

    step: int
    metrics: dict[str, Any]
    size_bytes: int
    """Of the metrics as JSON."""


class WandbRun:
    """A run in W&B, online, or in files that `wandb sync` uploads."""

    def __init__(self, tracked_run: TrackedRun) -> None:
        """Begin the run: online if `logging.wandb=online` and the server answers, else in files (then with `offline_reason`)."""
        self._tracked_run = tracked_run
        self._wandb_dir = Path(os.environ.get("WANDB_DIR") or tracked_run.run_dir).absolute()
        """W&B's own process may have been started elsewhere."""
        self.offline_reason: str | None = None
        """Why the run is offline although online was asked for; None if it is as asked."""
        self._recent_rows: deque[_SentRow] = deque()
        """The last rows, the oldest first, together at most `MAX_KEPT_ROW_BYTES`."""
        self._recent_bytes = 0
        self._summary: dict[str, Any] = {}
        self._num_process_starts = 1

        # Online if the server answers and begins the run; else offline, with the reason in `offline_reason`.
        wants_online = tracked_run.config.wandb is WandbMode.online
        if wants_online:
            server_problem = wandb_server_problem()
            self.offline_reason = f"offline ({server_problem})" if server_problem else self._begin_run("online")
        is_online = wants_online and not self.offline_reason
        if not is_online:
            self._begin_run("offline")
        self._define_axes()
        self.hint: tuple[str, str] | None = None
        self._set_hint(is_online=is_online)
        if tracked_run.config.artifacts and tracked_run.data is not None:
            self._use_data_artifact(tracked_run.data, is_online=is_online)

    def _begin_run(self, mode: str) -> str | None:
        """Start the run in W&B's client, and set `_run`; returns None, or why the server could not begin it.

        With such a reason, the caller begins it offline. `mode`: `online` or `offline`; offline, whatever the client raises is
        raised.
        """
        import wandb

        tracked_run = self._tracked_run
        config = tracked_run.config
        try:
            self._wandb_dir.mkdir(parents=True, exist_ok=True)
            self._run = wandb.init(
                project=tracked_run.project,
                entity=config.entity,
                group=config.group,
                job_type=config.job_type or "train",
                tags=config.tags or None,
                name=tracked_run.name,
                notes=config.notes,
                id=tracked_run.run_id,
                resume="allow" if mode == "online" else None,
                mode=mode,  # type: ignore[arg-type]
                dir=str(self._wandb_dir),
                config=tracked_run.settings,
                # The command line may hold what should not leave the machine; the resolved config says it all.
                settings=wandb.Settings(
                    # If this process has a run under way, W&B would return that one, and record this run into it.
                    reinit="create_new",
                    x_disable_meta=True,
                    console="off",
                    silent=True,
                    init_timeout=INIT_TIMEOUT_S,
                    finish_timeout=float(os.environ.get("WANDB_FINISH_TIMEOUT") or FINISH_TIMEOUT_S),
                    finish_timeout_raises=True,
                ),
            )
        except (wandb.Error, TimeoutError) as error:
            if mode == "offline":
                raise
            wandb.teardown()  # its process would call this run's id taken
            return f"offline ({wandb_server_address()} does not begin a run: {' '.join(str(error).split())})"
        return None

    def _set_hint(self, *, is_online: bool) -> None:
        """Set what the last lines of the run show the user: the run's URL, or offline the command that uploads its files."""
        if is_online:
            self.hint = ("W&B", str(self._run.url))
        else:
            directories = shlex.join(_relative_to_here(directory) for directory in self._offline_run_dirs())
            self.hint = ("W&B", f"wandb sync {directories}")

    def _offline_run_dirs(self) -> list[Path]:
        """The directories of all offline starts of this run, the earliest first: W&B's client makes a new one for each start.

        An earlier start may have logged to the run directory, if it had another `WANDB_DIR`.
        """
        directories: list[Path] = []
        for wandb_dir in sorted({self._wandb_dir, self._tracked_run.run_dir.absolute()}):
            directories += wandb_dir.glob(f"wandb/offline-run-*-{self._tracked_run.run_id}")
        return sorted(directories, key=lambda directory: directory.name)  # the name begins with the time

    def _use_data_artifact(self, directory: Path, *, is_online: bool) -> None:
        """Note in W&B which prepared data this run used, as an artifact (`logging.artifacts`); its files are not uploaded.

        `directory`: of the prepared data. Offline, W&B cannot note it: a line says so.
        """
        if not is_online:
            self._tracked_run.print_line(
                "logging.artifacts: W&B notes what data a run has used online only; the export is registered"
            )
            return
        # `data_fingerprint` is that of the data set, such as `3f2a91`, and perhaps `/` and the name of a split.
        fingerprint, _, _ = str(self._tracked_run.settings.get("data_fingerprint") or "unknown").partition("/")
        artifact = _artifact_of_directory(directory, f"data-{fingerprint[:12]}", "dataset", self._tracked_run.settings)
        self._run.use_artifact(artifact)

    def _define_axes(self) -> None:
        """Tell W&B over what to draw its charts: steps, tokens or seconds (`logging.x`). Counters get no chart of their own."""
        # Rows of the first edition have the names of `metrics.jsonl`, and were always drawn over tokens, whatever `logging.x`
        # says.
        if self._tracked_run.metric_names == FIRST_NAMES_EDITION:
            self._run.define_metric("tokens")
            self._run.define_metric("*", step_metric="tokens")
            return
        self._run.define_metric("*", step_metric=self._tracked_run.config.x.tracked_name)
        for metric in (*TRACKED_METRIC_BY_NAME.values(), TRAINING_S):
            if metric.hidden:
                self._run.define_metric(metric.name, hidden=True)

    def log(self, metrics: dict[str, Any], *, step: int) -> None:
        self._keep_row(metrics, step)
        try:
            self._log_row(metrics, step)
        except ConnectionError:
            self._restart_and_resend_rows()  # with this row, too

    def _log_row(self, metrics: dict[str, Any], step: int) -> None:
        """Hand a row to W&B's own process, which writes and uploads it. Raises ConnectionError if that process has ended."""
        # Later editions have the step in every row, as `train/global_step`.
        if self._tracked_run.metric_names == FIRST_NAMES_EDITION:
            metrics = {"train_step": step, **metrics}
        self._run.log(metrics, step=step)

    def _keep_row(self, metrics: dict[str, Any], step: int) -> None:
        """Keep a row in case W&B's process is killed before it has written it; forgets the oldest beyond `MAX_KEPT_ROW_BYTES`."""
        size_bytes = len(json.dumps(metrics, default=str))
        self._recent_rows.append(_SentRow(step=step, metrics=metrics, size_bytes=size_bytes))
        self._recent_bytes += size_bytes
        while self._recent_bytes > MAX_KEPT_ROW_BYTES:
            self._recent_bytes -= self._recent_rows.popleft().size_bytes

    def _restart_and_resend_rows(self) -> None:
        """Start W&B's process again after it has ended, and hand it the rows in `_recent_rows` and the summary.

        SLURM's TERM goes to every process of a step: it ends W&B's own before the run has saved, with rows that are in no file
        yet. The rows go into another start of the same run, as after a resume. Raises ConnectionError once W&B's process was
        started `MAX_PROCESS_STARTS` times.
        """
        import wandb

        if self._num_process_starts >= MAX_PROCESS_STARTS:
            raise ConnectionError("W&B's own process has ended again and again")
        self._num_process_starts += 1
        time.sleep(1.0)  # W&B tells starts of one run apart by the second in which they begin
        with contextlib.suppress(Exception):  # whatever its client raises without a process
            wandb.teardown()
        is_online = self._tracked_run.config.wandb is WandbMode.online and not self.offline_reason
        if is_online:  # the run was online before; the server may no longer answer
            self.offline_reason = self._begin_run("online")
            is_online = self.offline_reason is None
        if not is_online:
            self._begin_run("offline")
        self._define_axes()
        for row in self._recent_rows:
            self._log_row(row.metrics, row.step)
        self._run.summary.update(self._summary)
        self._set_hint(is_online=is_online)

    def log_table(self, name: str, table: LoggedTable, *, step: int) -> None:
        """Show a table in W&B. A column of W&B has one type: with any cell that is no number, all its cells become texts."""
        import wandb

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
            self._restart_and_resend_rows()

    def close(self, ending: RunEnding) -> None:
        try:
            self._end_run(ending)
        except ConnectionError:
            self._restart_and_resend_rows()
            self._end_run(ending)

    def _end_run(self, ending: RunEnding) -> None:
        """End the run in W&B: set its state, send an alert and register the export if asked for, and wait for the upload.

        Raises ConnectionError if W&B's process has ended. An upload that takes too long is left to the user, by `hint`.
        """
        if ending.state is RunState.preempted:
            self._run.mark_preempting()  # so that the run is called preempted and not failed
        self._run.summary.update({"state": ending.tracked_state})
        # A preempted run has no time for the tag: it is resumed, and ends once more.
        if ending.state is not RunState.preempted:
            self._set_diverged_tag(is_set=ending.diverged)
        if ending.alert in self._tracked_run.config.alerts:
            self._send_alert(ending)
        if self._tracked_run.config.artifacts and ending.exported is not None:
            # An export after training is registered under the run that trained the model.
            name = f"model-{self._tracked_run.trained_by_run or self._tracked_run.run_id}"
            self._run.log_artifact(_artifact_of_directory(ending.exported, name, "model", self._tracked_run.settings))
        try:
            self._run.finish(exit_code=ending.exit_code)
        except TimeoutError:  # the rest lies in files, and the user is told how to upload it
            run_files = _relative_to_here(Path(self._run.dir).parent)
            self.hint = ("W&B", f"wandb sync {shlex.quote(run_files)}   (not all was uploaded in time)")

    def _send_alert(self, ending: RunEnding) -> None:
        """Have W&B write to the user how the run ended: `mine: failed`, with the directory and the reason."""
        level = "WARN" if ending.state is RunState.preempted else "ERROR"
        self._run.alert(
            f"{self._tracked_run.name}: {ending.alert}",
            f"{self._tracked_run.run_dir}: {ending.reason}",
            level=level,
        )

    def _set_diverged_tag(self, *, is_set: bool) -> None:
        """Add the tag `diverged` to the run (`is_set`), or remove the one that an earlier end of this run left.

        W&B's client sets all tags at once, and sends the run's name and notes with them. So the tags, name and notes that
        people have changed in the app are read first, and sent again. If they cannot be read, nothing is sent and a line is
        printed.
        """
        run = self._run
        tag = str(Alert.diverged)
        tags = list(run.tags or ())
        is_tag_as_wanted = is_set == (tag in tags)
        if is_tag_as_wanted or tag in self._tracked_run.config.tags:  # a tag that the user gave stays
            return
        if not run.offline:
            try:
                labels = fetch_run_labels(run.entity, run.project, run.id)
            except Exception as error:  # noqa: BLE001  (whatever W&B's client raises)
                reason = redact(" ".join(str(error).split()) or type(error).__name__)
                self._tracked_run.print_line(
                    f"W&B: the tag {tag} stays as it is: the run's tags cannot be read ({reason})"
                )
                return
            tags = labels.tags
            if labels.name != run.name:
                run.name = labels.name
            if labels.notes != run.notes:
                run.notes = labels.notes or ""
        tags_without_diverged = [kept_tag for kept_tag in tags if kept_tag != tag]
        run.tags = [*tags_without_diverged, tag] if is_set else tags_without_diverged


def _artifact_of_directory(directory: Path, name: str, kind: str, settings: dict[str, Any]) -> Any:
    """Make a W&B artifact that only points to a directory: its files are neither copied nor read.

    `kind`: `dataset` or `model`. `settings`: of the run; some of them become the artifact's metadata.
    """
    import wandb

    metadata_keys = ("strategy", "tuning", "objective", "base_model", "data_fingerprint", "git_revision", "run_dir")
    metadata = {key: settings.get(key) for key in metadata_keys}
    artifact = wandb.Artifact(name, type=kind, metadata=metadata)
    artifact.add_reference(directory.absolute().as_uri(), checksum=False)
    return artifact


def _relative_to_here(path: Path) -> str:
    """The path relative to the working directory if it is below it, else as it is."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
