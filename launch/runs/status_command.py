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
from launch.config.verb_words import VerbWords, asks_for_help, bare_word, flag, help_rows, read_words, word
from launch.runs import status_lineage
from launch.runs.status_lineage import DOCUMENT_PLACE
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from launch.runs.queue import Queue
    from launch.runs.status_tables import StatusAnswer


@dataclass(kw_only=True)
class StatusWords(VerbWords):
    """What `shardtune status` takes."""

    root: Path | None = bare_word("name one directory; all runs below it are shown", required=False)
    document: str | None = word("show which runs were trained on this line of a file", like="train.jsonl:12")
    text: str | None = word("show which runs were trained on documents with this text", like="'Jane Roe'")
    watch: bool = flag("repeat every two seconds, until Ctrl-C")
    verify: bool = flag("read every checkpoint and compare it with its checksums; exit code 69 if one is damaged")
    as_json: bool = flag("print JSON; with --watch one object per line", key="--json")


USAGE = f"""usage: shardtune status [directory | run] [document=<file>:<line> | text=<piece>] [--watch] [--verify] [--json]

  shardtune status                    all runs below runs/, and your jobs in SLURM's queue
  shardtune status /scratch/sweep     all runs below another directory
  shardtune status runs/first         one run in full, with its checkpoints
  shardtune status runs document=train.jsonl:12
  shardtune status runs "text=Jane Roe"

status shows the state of runs. A run is called lost if its last state is "running" but it gives no sign of life.
Rates are medians over the last steps, for all ranks together. Memory is the largest peak of any rank. "last seen" is
the time since the last sign of life, or since the end.

{help_rows(StatusWords)}

The exit code is 64 if there is no such directory. docs/following.md explains each state."""
HOME = Path("runs")
"""Where runs without a `run.dir` are."""
EVERY_S = 2.0
"""Seconds between two looks at the runs."""
QUEUE_EVERY_S = 15.0
"""Seconds between two questions to SLURM's controller, which many users share."""
DAMAGED = 69


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code. Errors: ConfigError."""
    if asks_for_help(argv):
        show_help(USAGE)
        return 0
    words = status_words(argv)
    root = words.root or HOME
    if words.document is not None or words.text is not None:
        return status_lineage.main(root, words.document, words.text, as_json=words.as_json)
    if words.watch:
        watch(root, as_json=words.as_json)
    from launch.runs.status_tables import as_dict, text

    answer = read_answer(root)
    damaged = _verify(answer, quiet=words.as_json) if words.verify else None
    if words.as_json:
        print(json.dumps(as_dict(answer, damaged), indent=1, allow_nan=False))
    else:
        print(text(answer, damaged))
    return DAMAGED if damaged else 0


def status_words(argv: list[str]) -> StatusWords:
    """What was typed. Errors: ConfigError with every problem."""
    words, problems = read_words("status", StatusWords, argv)
    if words.root is not None and not words.root.is_dir():
        problems.append(f"{words.root}: there is no such directory; name a run, or the directory of your runs")
    lineage_words = [f"{key}={words.typed[key]}" for key in ("document", "text") if key in words.typed]
    if len(lineage_words) > 1:
        problems.append(f"{' '.join(lineage_words)}: name one document, or one piece of text")
    if lineage_words and (words.watch or words.verify):
        problems.append(f"{lineage_words[0]}: is looked for once; leave --watch and --verify out")
    if words.watch and words.verify:
        problems.append("--watch --verify: every look would read all checkpoints; give one of the two")
    if words.document is not None and DOCUMENT_PLACE.fullmatch(words.document) is None:
        problems.append(
            f"document={words.document}: must be a file and a line, as in document=train.jsonl:12; text= looks for a text"
        )
    if problems:
        raise ConfigError(problems)
    return words


def read_answer(root: Path, queue_before: Queue | None = None) -> StatusAnswer:
    """What is known now of the runs below `root`, and of the queue. The queue is asked only without a `queue_before`.

    Raises ConfigError if the directory cannot be listed.
    """
    from launch.runs import checkpoints, queue
    from launch.runs.metrics_tail import loss_curve
    from launch.runs.status import FoundRuns, find_runs, read_run_views
    from launch.runs.status_tables import RunDetails, StatusAnswer

    with ThreadPoolExecutor(1) as pool:  # SLURM is asked while the directories are searched
        queue_read = pool.submit(lambda: queue_before or queue.read_queue())
        try:
            runs_found = find_runs(root)
        except FileNotFoundError:  # the home of runs, before the first
            runs_found = FoundRuns()
        except OSError as error:
            raise ConfigError(f"{root}: cannot be listed ({error.strerror})") from error
        queue_now = queue_read.result()
    runs = read_run_views(runs_found, queue_now)
    details = None
    if runs_found.runs == [root] and runs:
        from launch.runs.efficiency import recorded_starts
        from trainer.reporting.status import read_failure

        details = RunDetails(
            store=checkpoints.list_checkpoints(root),
            failure=read_failure(root),
            curve=loss_curve(root / "metrics.jsonl", 60),
            logs=root / "logs",
            starts=recorded_starts(root),
        )
    return StatusAnswer(root=root, runs=runs, queue=queue_now, is_cut=runs_found.is_cut, details=details)


def watch(root: Path, *, as_json: bool) -> None:
    """Show the runs again and again; ends with KeyboardInterrupt."""
    from launch.runs.status_tables import as_dict, text

    if as_json or not sys.stdout.isatty():
        for answer in answers(root):
            print(json.dumps(as_dict(answer, None)) if as_json else text(answer, None) + "\n", flush=True)
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from launch.streams import printable, raw

    # Not the alternate screen: what was seen last stays where it was seen.
    with Live(console=Console(file=raw(sys.stdout), highlight=False), auto_refresh=False) as live:
        for answer in answers(root):
            live.update(Text(printable(text(answer, None, live=True))), refresh=True)


def answers(root: Path) -> Iterator[StatusAnswer]:
    """One answer after another, without end. The queue, whose controller many share, is asked less often."""
    queue = None
    queue_read_at = float("-inf")
    while True:
        if time.monotonic() - queue_read_at >= QUEUE_EVERY_S:
            queue = None
            queue_read_at = time.monotonic()
        answer = read_answer(root, queue)
        queue = answer.queue
        yield answer
        time.sleep(EVERY_S)


def _verify(answer: StatusAnswer, *, quiet: bool) -> dict[Path, str]:
    """What is wrong with each damaged checkpoint of the runs; prints on stderr which checkpoint is read."""
    from launch.runs.checkpoints import find_damage, list_checkpoints

    def report(checkpoint: str) -> None:
        if not quiet:
            print(f"reading {checkpoint}", file=sys.stderr, flush=True)

    damaged: dict[Path, str] = {}
    for run in answer.runs:
        store = answer.details.store if answer.details is not None else list_checkpoints(run.directory)
        damaged |= find_damage(store, report)
    return damaged
