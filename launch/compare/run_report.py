"""Writes `report.html` of one run: at its end, and for `shardtune compare <run>`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from strategies.errors import ShardtuneError
from trainer.reporting.status import RunState, read_status, write_text_atomic

if TYPE_CHECKING:
    from launch.compare.comparison import Comparison
    from trainer.config.run import RunConfig

REPORT_FILE = "report.html"
STATES_WITHOUT_PAGE = (RunState.running, None)
"""States without a page: another attempt writes in the directory, or nothing was begun there."""


def write_run_report(run_dir: Path, comparison: Comparison) -> Path:
    """Write the page of a run, `report.html`, into its directory; returns the path. Raises StorageError.

    `comparison` has this run as its only point.
    """
    from launch.compare.run_page.page import run_page

    path = run_dir / REPORT_FILE
    write_text_atomic(path, run_page(comparison))
    return path


def write_report_at_end(config: RunConfig, run_dir: Path | None) -> None:
    """Write the page of a run that has ended, if `logging.report` is on, and print where it is.

    Does nothing for a run without a directory (`run_dir` is None), for one that has not ended, and for one that failed
    before its first step. If the run is a point of a job array, the array's W&B script is written anew as well.

    An error of these files is no error of the run: it is only printed.
    """
    if run_dir is None or not run_dir.is_dir() or not config.logging.report:
        return
    if read_status(run_dir).get("state") in STATES_WITHOUT_PAGE:
        return
    if not (run_dir / "run.json").is_file():
        return  # written at the first step: the run failed before it, and the page would have nothing to show
    from launch.compare.comparison import compare_points
    from launch.compare.page import missing_packages_message
    from launch.compare.settings import PointSource
    from launch.compare.workspace import rewrite_workspace_script_of_array
    from launch.config.prices import gpu_hour_price

    try:
        comparison = compare_points([PointSource((run_dir,))], gpu_hour_price)
        print(f"report:     {write_run_report(run_dir, comparison)}", flush=True)
        no_plots_reason = missing_packages_message(f"{REPORT_FILE} with plots")
        if no_plots_reason is not None:
            print(f"            {no_plots_reason}", flush=True)
        rewrite_workspace_script_of_array(run_dir)
    except ShardtuneError as error:
        print(f"no {REPORT_FILE}: {error}", file=sys.stderr, flush=True)
    except Exception as error:  # noqa: BLE001 - the run is what was asked for: it does not fail for its page
        print(f"no {REPORT_FILE}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
