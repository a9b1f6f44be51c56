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
from launch.runs.status_lineage import PLACE
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
EVERY_S, ASK_S = 2.0, 15.0
"""Seconds between two looks, and between two questions to SLURM's controller."""
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

    found = look(root)
    damaged = _verify(found, quiet=words.as_json) if words.verify else None
    if words.as_json:
        print(json.dumps(as_dict(found, damaged), indent=1, allow_nan=False))
    else:
        print(text(found, damaged))
    return DAMAGED if damaged else 0


def status_words(argv: list[str]) -> StatusWords:
    """What was typed. Errors: ConfigError with every problem."""
    words, problems = read_words("status", StatusWords, argv)
    if words.root is not None and not words.root.is_dir():
        problems.append(f"{words.root}: there is no such directory; name a run, or the directory of your runs")
    sought = [f"{key}={words.typed[key]}" for key in ("document", "text") if key in words.typed]
    if len(sought) > 1:
        problems.append(f"{' '.join(sought)}: name one document, or one piece of text")
    if sought and (words.watch or words.verify):
        problems.append(f"{sought[0]}: is looked for once; leave --watch and --verify out")
    if words.watch and words.verify:
        problems.append("--watch --verify: every look would read all checkpoints; give one of the two")
    if words.document is not None and PLACE.fullmatch(words.document) is None:
        problems.append(
            f"document={words.document}: must be a file and a line, as in document=train.jsonl:12; text= looks for a text"
        )
    if problems:
        raise ConfigError(problems)
    return words


def look(root: Path, known: Queue | None = None) -> StatusAnswer:
    """What is known now of the runs below `root`, and of the queue, which is asked unless it is `known`.

    Raises ConfigError where the directory cannot be listed.
    """
    from launch.runs import checkpoints, queue
    from launch.runs.metrics_tail import curve
    from launch.runs.status import FoundRuns, find, look_at_all
    from launch.runs.status_tables import RunDetails, StatusAnswer

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
    details = None
    if found.runs == [root] and runs:
        from launch.runs.efficiency import starts
        from trainer.reporting.status import read_failure

        details = RunDetails(
            store=checkpoints.saved(root),
            failure=read_failure(root),
            curve=curve(root / "metrics.jsonl", 60),
            logs=root / "logs",
            starts=starts(root),
        )
    return StatusAnswer(root=root, runs=runs, queue=jobs, cut=found.cut, details=details)


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
        store = found.details.store if found.details is not None else saved(run.directory)
        damaged |= damage(store, say)
    return damaged
