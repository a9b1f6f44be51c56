"""`shardtune status`: the runs below a directory and the queue, or one run with its checkpoints. Writes nothing."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch.config.help_text import show_help
from launch.config.verb_arguments import (
    VerbArguments,
    asks_for_help,
    flag,
    help_rows,
    option,
    positional,
    read_arguments,
)
from launch.runs import status_lineage
from launch.runs.status_lineage import FILE_AND_LINE_REGEX
from strategies import exit_codes
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from launch.runs.queue import JobQueue
    from launch.runs.status_tables import RunDetails, RunsStatus


@dataclass(kw_only=True)
class StatusArguments(VerbArguments):
    """What `shardtune status` takes."""

    root: Path | None = positional("name one directory; all runs below it are shown", required=False)
    document: str | None = option("show which runs were trained on this line of a file", example="train.jsonl:12")
    text: str | None = option("show which runs were trained on documents with this text", example="'Jane Roe'")
    watch: bool = flag("repeat every two seconds, until Ctrl-C")
    verify: bool = flag("read every checkpoint and compare it with its checksums; exit code 69 if one is damaged")
    as_json: bool = flag("print JSON; with --watch one object per line", key="--json")


USAGE = f"""usage: shardtune status [directory | run] [document=<file>:<line> | text=<piece>] [--watch] [--verify] [--json]

  shardtune status                    all runs below runs/, and your jobs in SLURM's queue
  shardtune status /scratch/sweep     all runs below another directory
  shardtune status runs/first         one run in full, with its checkpoints
  shardtune status runs document=train.jsonl:12
  shardtune status runs "text=Jane Roe"

status shows the state of runs. A run is called lost if its last state is "running" but its heartbeat has
stopped. Speeds are medians over the last steps, for all ranks together. Memory is the largest peak of any rank. "last
seen" is the time since the last heartbeat, or since the end of the run.

{help_rows(StatusArguments)}

The exit code is 64 if there is no such directory. docs/following.md explains each state."""
DEFAULT_RUNS_DIRECTORY = Path("runs")
"""The directory of runs that have no `run.dir`."""
WATCH_INTERVAL_S = 2.0
"""Seconds between two readings of the runs with --watch."""
QUEUE_INTERVAL_S = 15.0
"""Seconds between two calls of squeue: many users share SLURM's controller."""


def main(argv: list[str]) -> int:
    """Run `shardtune status` with the arguments behind it; returns the exit code. Raises ConfigError for wrong ones."""
    if asks_for_help(argv):
        show_help(USAGE)
        return 0
    arguments = status_arguments(argv)
    root = arguments.root or DEFAULT_RUNS_DIRECTORY
    if arguments.document is not None or arguments.text is not None:
        return status_lineage.print_document_lineage(
            root, arguments.document, arguments.text, as_json=arguments.as_json
        )
    if arguments.watch:
        watch_runs_status(root, as_json=arguments.as_json)  # until Ctrl-C
    from launch.runs.status_json import status_as_dict
    from launch.runs.status_tables import status_text

    runs_status = read_runs_status(root)
    damage_by_checkpoint = None  # not verified
    if arguments.verify:
        damage_by_checkpoint = _verify_checkpoints(runs_status, quiet=arguments.as_json)
    if arguments.as_json:
        print(json.dumps(status_as_dict(runs_status, damage_by_checkpoint), indent=1, allow_nan=False))
    else:
        print(status_text(runs_status, damage_by_checkpoint))
    return exit_codes.CHECK_FAILED if damage_by_checkpoint else 0


def status_arguments(argv: list[str]) -> StatusArguments:
    """Read the arguments behind `shardtune status`, and check that they go together.

    Raises ConfigError with every problem at once.
    """
    arguments, problems = read_arguments("status", StatusArguments, argv)
    if arguments.root is not None and not arguments.root.is_dir():
        problems.append(f"{arguments.root}: there is no such directory; name a run, or the directory of your runs")
    lineage_arguments = []  # those that search runs by a document, as they were typed
    for key in ("document", "text"):
        if key in arguments.text_by_key:
            lineage_arguments.append(f"{key}={arguments.text_by_key[key]}")
    if len(lineage_arguments) > 1:
        problems.append(f"{' '.join(lineage_arguments)}: name one document, or one piece of text")
    if lineage_arguments and (arguments.watch or arguments.verify):
        problems.append(f"{lineage_arguments[0]}: is looked for once; leave --watch and --verify out")
    if arguments.watch and arguments.verify:
        problems.append("--watch --verify: every look would read all checkpoints; give one of the two")
    if arguments.document is not None and FILE_AND_LINE_REGEX.fullmatch(arguments.document) is None:
        problems.append(
            f"document={arguments.document}: must be a file and a line, as in document=train.jsonl:12; text= looks for a text"
        )
    if problems:
        raise ConfigError(problems)
    return arguments


def read_runs_status(root: Path, known_queue: JobQueue | None = None) -> RunsStatus:
    """Read the state of the runs below `root` and of SLURM's queue; if `root` itself is a run, also the run's details.

    `known_queue`: a queue that was read before; None calls squeue. Raises ConfigError if the directory cannot be listed.
    """
    from launch.runs import queue
    from launch.runs.status import RunSearch, find_runs, read_run_views
    from launch.runs.status_tables import RunsStatus

    with ThreadPoolExecutor(1) as pool:  # squeue runs while the directories are searched
        queue_future = pool.submit(lambda: known_queue or queue.read_queue())
        try:
            search = find_runs(root)
        except FileNotFoundError:  # runs/ does not exist before the first run
            search = RunSearch()
        except OSError as error:
            raise ConfigError(f"{root}: cannot be listed ({error.strerror})") from error
        queue_now = queue_future.result()
    runs = read_run_views(search, queue_now)
    is_single_run = search.runs == [root] and bool(runs)
    details = _read_run_details(root) if is_single_run else None
    return RunsStatus(root=root, runs=runs, queue=queue_now, search_stopped_early=search.stopped_early, details=details)


def _read_run_details(run_dir: Path) -> RunDetails:
    """Read what `status` shows only for a single run: checkpoints, failure, loss curve, logs, and what its jobs used."""
    from launch.runs import checkpoints
    from launch.runs.efficiency import recorded_starts
    from launch.runs.metrics_tail import loss_curve
    from launch.runs.status_tables import NUM_CURVE_POINTS, RunDetails
    from trainer.reporting.status import read_failure

    return RunDetails(
        checkpoint_list=checkpoints.list_checkpoints(run_dir),
        failure=read_failure(run_dir),
        sampled_losses=loss_curve(run_dir / "metrics.jsonl", num_samples=NUM_CURVE_POINTS),
        log_dir=run_dir / "logs",
        start_usages=recorded_starts(run_dir),
    )


def watch_runs_status(root: Path, *, as_json: bool) -> None:
    """Show the state of the runs every `WATCH_INTERVAL_S` seconds (`--watch`).

    Never returns: Ctrl-C ends it, as KeyboardInterrupt. On a terminal, a table is redrawn in place. Otherwise one text
    after another is printed, or with `as_json` one object after another.
    """
    from launch.runs.status_json import status_as_dict
    from launch.runs.status_tables import status_text

    if as_json:
        for runs_status in runs_status_forever(root):
            # None: checkpoints are not verified, which would take too long.
            print(json.dumps(status_as_dict(runs_status, None)), flush=True)
    elif not sys.stdout.isatty():
        for runs_status in runs_status_forever(root):
            print(status_text(runs_status, None) + "\n", flush=True)
    else:
        _redraw_table_forever(root)


def _redraw_table_forever(root: Path) -> None:
    """Show the state of the runs as a table on the terminal, drawn anew every `WATCH_INTERVAL_S` seconds, without end."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from launch.runs.status_tables import status_text
    from launch.streams import printable_text, unwrap_stream

    # Not the alternate screen: after Ctrl-C, the last table stays in the terminal.
    with Live(console=Console(file=unwrap_stream(sys.stdout), highlight=False), auto_refresh=False) as display:
        for runs_status in runs_status_forever(root):
            display.update(Text(printable_text(status_text(runs_status, None, live=True))), refresh=True)


def runs_status_forever(root: Path) -> Iterator[RunsStatus]:
    """Read the state of the runs again and again, every `WATCH_INTERVAL_S` seconds without end, and yield it.

    squeue is called only every `QUEUE_INTERVAL_S` seconds, since many users share SLURM's controller.
    """
    queue = None
    queue_read_at = float("-inf")
    while True:
        if time.monotonic() - queue_read_at >= QUEUE_INTERVAL_S:
            queue = None  # read anew below
            queue_read_at = time.monotonic()
        runs_status = read_runs_status(root, queue)
        queue = runs_status.queue
        yield runs_status
        time.sleep(WATCH_INTERVAL_S)


def _verify_checkpoints(runs_status: RunsStatus, *, quiet: bool) -> dict[Path, str]:
    """Check every checkpoint of the runs against its checksums (`--verify`); returns {damaged checkpoint: what is wrong with it}.

    Empty if all are intact. Prints on stderr which checkpoint is being read, unless `quiet`: that takes minutes for a large
    model.
    """
    from launch.runs.checkpoints import list_checkpoints, verify_checkpoints

    def report_start(checkpoint: str) -> None:
        if not quiet:
            print(f"reading {checkpoint}", file=sys.stderr, flush=True)

    damage_by_checkpoint: dict[Path, str] = {}
    for run in runs_status.runs:
        # A single run has details, with its checkpoints listed already.
        checkpoint_list = (
            runs_status.details.checkpoint_list if runs_status.details is not None else list_checkpoints(run.directory)
        )
        damage_by_checkpoint |= verify_checkpoints(checkpoint_list, report_start)
    return damage_by_checkpoint
