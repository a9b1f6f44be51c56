"""`shardtune export` that is killed with -9 while it writes files, and started again until the export is there."""

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults.kills import Tally, digest
from tests.faults.runs import Runs, environment
from tests.helpers.launching import ROOT
from tests.helpers.speed import seconds
from tests.helpers.warm import Forked, Nursery

EXPORT = "export-verb"
"""What stands in the place of a strategy."""
LIMIT_S = 120
"""Seconds that an export may take on the machine that `tests/helpers/speed.py` measures by."""
KEPT = "is kept from an earlier start"


class ExportCampaign:
    """Kills of the export of one run, which is done. Each export goes on until its directory is there."""

    def __init__(self, runs: Runs, chance: random.Random, nursery: Nursery) -> None:
        self.runs = runs
        self.chance = chance
        self.nursery = nursery
        self.tally = Tally(EXPORT)
        words = ["strategy=single", "tuning=full", "budget.steps=2"]
        code, said = runs.run_here("exported", *words, "export.max_shard_gib=0.00003")
        assert code == 0, said
        calm = runs.root / "calm-export"
        assert not self._life(calm, kill=False), self._said(calm)
        self.expected = digests(calm)
        assert len(self.expected) > 3, "a kill must come between files"

    def kill(self, number: int, progress: Callable[[str], None] = lambda text: None) -> Tally:
        """Kill `number` times, and let the last export come to its end."""
        while self.tally.kills < number:
            to = self.runs.root / f"export-{self.tally.finished + 1}"
            while self._life(to, kill=self.tally.kills < number):
                pass
            self.tally.finished += 1
            if not to.is_dir():
                self.tally.failed.append(f"{to.name} did not come to its end: {self._said(to)}")
                break
            if digests(to) != self.expected:
                self.tally.changed.append(f"{to.name}: its files differ from those of an export that was left alone")
            progress(f"{EXPORT}: {self.tally.kills} of {number} kills; {self.tally.kept} files kept")
        return self.tally

    def _life(self, to: Path, *, kill: bool) -> bool:
        """Start the export, and kill it amid its files if asked to; False if it came to its end, or ended by itself."""
        records = to.with_name(f".{to.name}.writing") / ".written"
        complete_before = complete_files(records)
        kill_after = len(complete_before) + self.chance.randrange(4)
        said_before = len(self._said(to))
        process = self._start(to)
        deadline = time.monotonic() + seconds(LIMIT_S)
        while process.poll() is None and time.monotonic() < deadline:
            if kill and len(complete_files(records)) > kill_after:
                time.sleep(self.chance.random() * 0.05)
                break
            time.sleep(0.002)
        was_killed = process.poll() is None
        if was_killed:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            self.tally.moments.update(["export"])
        process.wait(seconds(LIMIT_S))

        # Only files that this start has passed can be missing among those that it kept.
        kept = self._said(to)[said_before:].count(KEPT)
        self.tally.kept += kept
        if not was_killed and kept < len(complete_before):
            self.tally.lost.append(f"{to.name}: {len(complete_before)} files were complete, and {kept} were kept")
        if to.exists() and was_killed and digests(to) != self.expected:
            self.tally.torn.append(f"{to.name}: is there after a kill, without its bytes")
        return was_killed and not to.exists()

    def _start(self, to: Path) -> Forked:
        """The export in a process of its own session; what it says is appended to a file beside `to`."""
        words = ["export", str(self.runs.root / "exported"), f"to={to}"]
        asked = {"module": "launch.main", "words": words, "env": environment(), "cwd": str(ROOT), "ranks": False}
        with self._said_file(to).open("a") as said:
            process = self.nursery.process(asked, [said.fileno()] * 2)
        self.runs.started.append(process)
        return process

    def _said_file(self, to: Path) -> Path:
        return to.with_name(f"{to.name}.said")

    def _said(self, to: Path) -> str:
        path = self._said_file(to)
        return path.read_text(errors="replace") if path.exists() else ""


def complete_files(records: Path) -> set[str]:
    """Names of the files of which a whole record is there."""
    names = set()
    for record in records.glob("*.safetensors.json"):
        with contextlib.suppress(OSError, ValueError):
            json.loads(record.read_text())
            names.add(record.name)
    return names


def digests(export: Path) -> dict[str, str]:
    """The hash of each file of weights, and of their index."""
    files = [*export.glob("*.safetensors"), *export.glob("*.index.json")]
    return {path.name: digest(path) for path in files}
