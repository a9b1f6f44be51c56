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

        beside = about.run_dir.absolute().parent / "mlflow.db"
        address = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{beside}"
        if address.startswith("http") and (why := unreachable(address)):
            raise ConnectionError(f"{address} cannot be reached: {why}")
        self._client = MlflowClient(tracking_uri=address)
        self._id = self._begin(about)
        self._step = about.resumed_at
        shown = f"mlflow ui --backend-store-uri {shlex.quote(address)}"
        self.hint: tuple[str, str] | None = ("MLflow", address if address.startswith("http") else shown)

    def _begin(self, about: TrackedRun) -> str:
        client = self._client
        known = client.get_experiment_by_name(about.project)
        experiment = known.experiment_id if known else client.create_experiment(about.project)
        if about.resumed_at:
            for found in client.search_runs([experiment], filter_string=f"tags.`{RUN}` = '{about.run_id}'"):
                client.update_run(found.info.run_id, status="RUNNING")
                return str(found.info.run_id)
        from mlflow.entities import Param

        config = about.config
        tags = {RUN: about.run_id, "group": config.group, "job_type": config.job_type or "train"}
        tags |= {"mlflow.note.content": config.notes, "tags": ",".join(config.tags)}
        told = {key: value for key, value in tags.items() if value}
        run_id = str(client.create_run(experiment, run_name=about.name, tags=told).info.run_id)
        given = [Param(key, str(value)[:LONGEST]) for key, value in _flat(about.settings).items()]
        for first in range(0, len(given), MOST):
            client.log_batch(run_id, params=given[first : first + MOST])
        return run_id

    def log(self, metrics: dict[str, Any], *, step: int) -> None:
        from mlflow.entities import Metric

        self._step, now = step, int(time.time() * 1000)
        rows = [
            Metric(key, float(each), now, step)
            for key, each in metrics.items()
            if key != "step" and isinstance(each, int | float)
        ]
        self._client.log_batch(self._id, metrics=rows)

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
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = prefix + "".join(letter if letter.isalnum() or letter in "_-./ " else "_" for letter in str(key))
        found |= _flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return found
