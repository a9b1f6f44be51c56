"""MLflow: rows go to MLFLOW_TRACKING_URI, or else to a database beside the run directory."""

from __future__ import annotations

import logging
import os
import shlex
import time
from typing import Any

from trainer.reporting.status import RunState
from trainer.reporting.trackers.base import LoggedTable, RunEnding, TrackedRun
from trainer.reporting.trackers.reachable import unreachable_reason

MAX_PARAMETERS_PER_REQUEST = 100
"""Parameters that a server takes in one request."""
MAX_PARAMETER_CHARACTERS = 6000
"""Characters of a parameter's value that a server takes."""
RUN_ID_TAG = "shardtune.run_id"
"""The tag by which a resumed run is found again."""
MLFLOW_STATUS_BY_STATE = {RunState.done: "FINISHED", RunState.failed: "FAILED", RunState.preempted: "KILLED"}


class MlflowRun:
    """A run in an experiment named as the project."""

    def __init__(self, tracked_run: TrackedRun) -> None:
        """Begin or continue the run in MLflow. Raises ConnectionError if its server does not answer."""
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        from mlflow import MlflowClient

        database = tracked_run.run_dir.absolute().parent / "mlflow.db"
        address = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{database}"
        is_server = address.startswith("http")
        # The client would try for minutes to reach a server that is not there.
        problem = unreachable_reason(address) if is_server else None
        if problem is not None:
            raise ConnectionError(f"{address} cannot be reached: {problem}")
        self._client = MlflowClient(tracking_uri=address)
        self._mlflow_run_id = self._find_or_create_run(tracked_run)
        self._step = tracked_run.resumed_at
        """The step of the last row, for numbers of the whole run."""
        view_hint = address if is_server else f"mlflow ui --backend-store-uri {shlex.quote(address)}"
        self.hint: tuple[str, str] | None = ("MLflow", view_hint)

    def _find_or_create_run(self, tracked_run: TrackedRun) -> str:
        """Find the MLflow run that an earlier start of this run created, else create one; returns its MLflow id.

        A new one gets the run's settings as parameters, and a tag by which later starts find it.
        """
        client = self._client
        experiment = client.get_experiment_by_name(tracked_run.project)
        if experiment:
            experiment_id = experiment.experiment_id
        else:
            experiment_id = client.create_experiment(tracked_run.project)

        if tracked_run.resumed_at:  # the first run found is it; a new one is created if there is none
            for run in client.search_runs(
                [experiment_id], filter_string=f"tags.`{RUN_ID_TAG}` = '{tracked_run.run_id}'"
            ):
                client.update_run(run.info.run_id, status="RUNNING")
                return str(run.info.run_id)

        from mlflow.entities import Param

        config = tracked_run.config
        tags = {RUN_ID_TAG: tracked_run.run_id, "group": config.group, "job_type": config.job_type or "train"}
        tags |= {"mlflow.note.content": config.notes, "tags": ",".join(config.tags)}
        set_tags = {key: text for key, text in tags.items() if text}
        created = client.create_run(experiment_id, run_name=tracked_run.name, tags=set_tags)
        run_id = str(created.info.run_id)
        parameters = []
        for key, setting in _parameters_by_dotted_key(tracked_run.settings).items():
            parameters.append(Param(key, str(setting)[:MAX_PARAMETER_CHARACTERS]))
        for first in range(0, len(parameters), MAX_PARAMETERS_PER_REQUEST):
            client.log_batch(run_id, params=parameters[first : first + MAX_PARAMETERS_PER_REQUEST])
        return run_id

    def log(self, metrics: dict[str, Any], *, step: int) -> None:
        """Record a row in MLflow, in one request: its numbers, since MLflow takes no texts as metrics."""
        from mlflow.entities import Metric

        self._step = step
        now_ms = int(time.time() * 1000)
        numbers = []
        for name, number in metrics.items():
            if name != "step" and isinstance(number, int | float):
                numbers.append(Metric(name, float(number), now_ms, step))
        self._client.log_batch(self._mlflow_run_id, metrics=numbers)

    def log_table(self, name: str, table: LoggedTable, *, step: int) -> None:
        """Left out: it keeps numbers."""

    def summarise(self, values: dict[str, Any]) -> None:
        self.log(values, step=self._step)

    def close(self, ending: RunEnding) -> None:
        self._client.set_tag(self._mlflow_run_id, "state", ending.tracked_state)
        if ending.reason:
            self._client.set_tag(self._mlflow_run_id, "reason", ending.reason[:MAX_PARAMETER_CHARACTERS])
        self._client.set_terminated(self._mlflow_run_id, MLFLOW_STATUS_BY_STATE[ending.state])


def _parameters_by_dotted_key(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings for MLflow, which takes no nested ones: {"optim": {"lr": 0.1}} -> {"optim.lr": 0.1}.

    An empty dict stays as a value. Characters that MLflow does not take in names become `_`. `prefix`: what the keys begin
    with, such as `optim.`.
    """
    flat_settings: dict[str, Any] = {}
    for key, setting in settings.items():
        name = prefix
        for character in str(key):
            is_allowed = character.isalnum() or character in "_-./ "
            name += character if is_allowed else "_"
        if isinstance(setting, dict) and setting:
            flat_settings |= _parameters_by_dotted_key(setting, f"{name}.")
        else:
            flat_settings[name] = setting
    return flat_settings
