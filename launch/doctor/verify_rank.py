"""One rank of `shardtune doctor --verify`: takes the steps, and rank 0 writes what they came to."""

from __future__ import annotations

import json
import os
from pathlib import Path

from trainer.stopping.signals import unblock_signals

CONFIG_FILE, REQUEST_FILE, REPORT_FILE, PROGRESS_FILE = "config.yaml", "request.json", "report.json", "progress.txt"
"""Files in the directory of a verification: the run's own configuration, what else the ranks must know, their answer, and a
line for each part of the work that has begun."""


def main() -> int:
    """Be one rank of `doctor --verify`: take the steps that are compared; returns the exit code. Rank 0 writes the report.

    An error is recorded in `failure.json`, for the process that started the ranks, and raised.
    """
    unblock_signals()
    from launch.config.compose import load_frozen_config
    from strategies import runtime as processes
    from strategies.parent_death import die_with_parent
    from trainer.config.run import settled_matmul
    from trainer.reporting.status import record_failure, write_text_atomic
    from trainer.verification.run import verify_step_against_single_process

    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    # What to compare, as the process that started the ranks wrote it.
    frozen = Path(os.environ["SHARDTUNE_CONFIG"])
    directory = frozen.parent
    request = json.loads((directory / REQUEST_FILE).read_text(encoding="utf-8"))
    rank = int(os.environ["RANK"])

    def report_progress(text: str) -> None:
        if rank == 0:
            with (directory / PROGRESS_FILE).open("a", encoding="utf-8") as file:
                file.write(f"{text}\n")

    try:
        config = load_frozen_config(frozen)
        runtime = processes.join_job(
            str(config.run.device),
            timeout_s=request["timeout_s"],
            threads=config.run.threads,
            matmul=settled_matmul(config),
            shared_memory=config.run.shared_memory,
        )
        report = verify_step_against_single_process(
            config, directory, runtime, user_ranks=request["user_ranks"], report_progress=report_progress
        )
        if rank == 0:
            write_text_atomic(directory / REPORT_FILE, json.dumps(report))
        processes.barrier(runtime)
        processes.leave_job()
    except Exception as error:
        record_failure(directory, rank, error, "verifying")
        raise
    return 0
