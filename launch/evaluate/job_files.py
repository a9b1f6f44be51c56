"""The files in which `shardtune evaluate` hands configuration and job to its ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.config.run import RunConfig

CONFIG_FILE = "job.yaml"
JOB_FILE = "job.json"


def write_job_files(directory: Path, config: RunConfig, job: dict[str, Any]) -> str:
    """Write the files that tell the ranks of an evaluation what to do: `job.json` with `job`, `job.yaml` with `config`.

    Returns the configuration's SHA-256, as hex. With split=test and for a trial of rewards, call `copy_rewards` before, since
    it changes the configuration.
    """
    from launch.config.frozen import config_sha256, config_yaml
    from trainer.reporting.status import write_text_atomic

    sha256 = config_sha256(config)
    write_text_atomic(directory / JOB_FILE, json.dumps(job, indent=1) + "\n")
    write_text_atomic(
        directory / CONFIG_FILE, f"# Written by shardtune evaluate.\n# sha256: {sha256}\n{config_yaml(config)}"
    )
    return sha256
