"""MLflow: rows go to MLFLOW_TRACKING_URI, or else to a database beside the run directory."""

from __future__ import annotations

import logging
import os
import shlex
import time
from typing import Any

from trainer.reporting.status import State
from trainer.reporting.trackers.base import RunEnding, Table, TrackedRun
from trainer.reporting.trackers.reachable import unreachable

MOST = 100
"""Parameters that a server takes at once."""
LONGEST = 6000
"""Characters of a parameter."""
RUN = "shardtune.run_id"
"""The tag by which a resumed run is found again."""
STATES = {State.done: "FINISHED", State.failed: "FAILED", State.preempted: "KILLED"}


class MlflowRun:
    """A run in an experiment named as the project."""

    def __init__(self, about: TrackedRun) -> None:
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        from mlflow import MlflowClient

        database = about.run_dir.absolute().parent / "mlflow.db"
        address = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{database}"
        is_server = address.startswith("http")
        # The client would try for minutes to reach a server that is not there.
        if is_server and (why := unreachable(address)):
            raise ConnectionError(f"{address} cannot be reached: {why}")
        self._client = MlflowClient(tracking_uri=address)
        self._id = self._begin(about)
        self._step = about.resumed_at
        command = f"mlflow ui --backend-store-uri {shlex.quote(address)}"
        self.hint: tuple[str, str] | None = ("MLflow", address if is_server else command)

    def _begin(self, about: TrackedRun) -> str:
        """Find the run again that is resumed, else create one; returns MLflow's id of it."""
        client = self._client
        experiment = client.get_experiment_by_name(about.project)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(about.project)
        if about.resumed_at:
            for run in client.search_runs([experiment_id], filter_string=f"tags.`{RUN}` = '{about.run_id}'"):
                client.update_run(run.info.run_id, status="RUNNING")
                return str(run.info.run_id)
        from mlflow.entities import Param

        config = about.config
        tags = {RUN: about.run_id, "group": config.group, "job_type": config.job_type or "train"}
        tags |= {"mlflow.note.content": config.notes, "tags": ",".join(config.tags)}
        set_tags = {key: text for key, text in tags.items() if text}
        run_id = str(client.create_run(experiment_id, run_name=about.name, tags=set_tags).info.run_id)
        parameters = [Param(key, str(setting)[:LONGEST]) for key, setting in _flat(about.settings).items()]
        for first in range(0, len(parameters), MOST):
            client.log_batch(run_id, params=parameters[first : first + MOST])
        return run_id

    def log(self, metrics: dict[str, Any], *, step: int) -> None:
        """Send the numbers of a row in one batch; MLflow takes no texts as metrics."""
        from mlflow.entities import Metric

        self._step = step
        now_ms = int(time.time() * 1000)
        numbers = []
        for name, number in metrics.items():
            if name != "step" and isinstance(number, int | float):
                numbers.append(Metric(name, float(number), now_ms, step))
        self._client.log_batch(self._id, metrics=numbers)

    def table(self, name: str, table: Table, *, step: int) -> None:
        """Left out: it keeps numbers."""

    def summarise(self, values: dict[str, Any]) -> None:
        self.log(values, step=self._step)

    def close(self, ended: RunEnding) -> None:
        self._client.set_tag(self._id, "state", str(ended.alert or ended.state))
        if ended.reason:
            self._client.set_tag(self._id, "reason", ended.reason[:LONGEST])
        self._client.set_terminated(self._id, STATES[ended.state])


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted key, as names that MLflow takes."""
    leaves: dict[str, Any] = {}
    for key, content in tree.items():
        letters = [letter if letter.isalnum() or letter in "_-./ " else "_" for letter in str(key)]
        name = prefix + "".join(letters)
        if isinstance(content, dict) and content:
            leaves |= _flat(content, f"{name}.")
        else:
            leaves[name] = content
    return leaves
