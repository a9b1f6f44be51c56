"""`shardtune status`: runs below a directory and the queue, or one run with its checkpoints. Reads; writes nothing."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from launch.config.help_text import show_help
from launch.runs import status_lineage
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from launch.runs.queue import Queue
    from launch.runs.status_tables import StatusAnswer

USAGE = """usage: shardtune status [directory | run] [document=<file>:<line> | text=<piece>] [--watch] [--verify] [--json]

  shardtune status                    all runs below runs/, and your jobs in SLURM's queue
  shardtune status /scratch/sweep     all runs below another directory
  shardtune status runs/first         one run in full, with its checkpoints
  shardtune status runs document=train.jsonl:12       which runs were trained on this document
  shardtune status runs "text=Jane Roe"               or on those with this text in them

A run that says it is running, but gives no sign of life, is called lost. Rates are medians over the last steps, all
ranks together; memory is the largest peak of a rank; "heard" is the time since the last sign of life, or the end.

  --watch     look again every two seconds, until Ctrl-C
  --verify    read every checkpoint and compare it with its seal; 69 where one is damaged
  --json      print JSON (with --watch: an object a line)

Ends with 64 where the word is no directory. docs/following.md says what each state means."""
FLAGS = ("--watch", "--verify", "--json")
HOME = Path("runs")
"""Where runs without a `run.dir` are."""
EVERY_S, ASK_S = 2.0, 15.0
"""Seconds between two looks, and between two questions to SLURM's controller."""
DAMAGED = 69


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code. Errors: ConfigError."""
    if {"-h", "--help"} & set(argv):
        show_help(USAGE)
        return 0
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no bars
    words = [word for word in argv if word not in FLAGS]
    asked = [word for word in words if status_lineage.is_wanted([word])]
    root = read_words([word for word in words if word not in asked])
    if asked:
        if {"--watch", "--verify"} & {*argv}:
            raise ConfigError(f"{asked[0]}: is looked for once; leave --watch and --verify out")
        return status_lineage.main(root, asked, as_json="--json" in argv)
    if "--watch" in argv:
        if "--verify" in argv:
            raise ConfigError("--watch --verify: every look would read all checkpoints; give one of the two")
        watch(root, as_json="--json" in argv)
    from launch.runs.status_tables import as_dict, text

    found = look(root)
    damaged = _verify(found, quiet="--json" in argv) if "--verify" in argv else None
    if "--json" in argv:
        print(json.dumps(as_dict(found, damaged), indent=1, allow_nan=False))
    else:
        print(text(found, damaged))
    return DAMAGED if damaged else 0


def read_words(words: list[str]) -> Path:
    """The directory to look in. Raises ConfigError."""
    flags = [word for word in words if word.startswith("-")]
    if flags:
        raise ConfigError([f"{flag}: there is no such flag; status takes {', '.join(FLAGS)}" for flag in flags])
    named = [Path(word.removeprefix("run.dir=")).expanduser() for word in words]
    if len(named) > 1:
        raise ConfigError(f"{' '.join(words)}: name one directory; all runs below it are shown")
    if named and not named[0].is_dir():
        raise ConfigError(f"{words[0]}: there is no such directory; name a run, or the directory of your runs")
    return named[0] if named else HOME


def look(root: Path, known: Queue | None = None) -> StatusAnswer:
    """What is known now of the runs below `root`, and of the queue, which is asked unless it is `known`.

    Raises ConfigError where the directory cannot be listed.
    """
    from launch.runs import checkpoints, queue
    from launch.runs.metrics_tail import curve
    from launch.runs.status import FoundRuns, find, look_at_all
    from launch.runs.status_tables import One, StatusAnswer

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(lambda: known or queue.ask())
        try:
            found = find(root)
        except FileNotFoundError:  # the home of runs, before the first
            found = FoundRuns()
        except OSError as error:
            raise ConfigError(f"{root}: cannot be listed ({error.strerror})") from error
        jobs = asked.result()
    runs = look_at_all(found, jobs)
    one = None
    if found.runs == [root] and runs:
        from launch.runs.efficiency import starts
        from trainer.reporting.status import read_failure

        one = One(
            store=checkpoints.saved(root),
            failure=read_failure(root),
            curve=curve(root / "metrics.jsonl", 60),
            logs=root / "logs",
            starts=starts(root),
        )
    return StatusAnswer(root=root, runs=runs, queue=jobs, cut=found.cut, one=one)


def watch(root: Path, *, as_json: bool) -> None:
    """Look again and again; ends with KeyboardInterrupt."""
    from launch.runs.status_tables import as_dict, text

    if as_json or not sys.stdout.isatty():
        for found in looks(root):
            print(json.dumps(as_dict(found, None)) if as_json else text(found, None) + "\n", flush=True)
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from launch.streams import printable, raw

    # Not the alternate screen: what was seen last stays where it was seen.
    with Live(console=Console(file=raw(sys.stdout), highlight=False), auto_refresh=False) as live:
        for found in looks(root):
            live.update(Text(printable(text(found, None, live=True))), refresh=True)


def looks(root: Path) -> Iterator[StatusAnswer]:
    """One look after another, without end; the queue, which many share, is asked less often."""
    queue, asked_at = None, float("-inf")
    while True:
        if time.monotonic() - asked_at >= ASK_S:
            queue, asked_at = None, time.monotonic()
        found = look(root, queue)
        queue = found.queue
        yield found
        time.sleep(EVERY_S)


def _verify(found: StatusAnswer, *, quiet: bool) -> dict[Path, str]:
    """What is wrong with each damaged checkpoint of the runs; which is read stands on standard error meanwhile."""
    from launch.runs.checkpoints import damage, saved

    def say(text: str) -> None:
        if not quiet:
            print(f"reading {text}", file=sys.stderr, flush=True)

    damaged: dict[Path, str] = {}
    for run in found.runs:
        store = found.one.store if found.one is not None else saved(run.directory)
        damaged |= damage(store, say)
    return damaged
