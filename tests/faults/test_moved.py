"""Somebody purges, renames or deletes what a running run has on the disk: what can be saved is, and the sentence is true."""

import json
import shutil

import pytest

from tests.faults.runs import wait
from tests.helpers.covering import EVERYTHING

WORDS = ["run.lease_s=4", "budget.steps=12"]
"""A heartbeat, and a look at the directory, three times a second."""


def rows_of(directory):
    return [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


RANKS = {"one": ["launcher.processes=1"], "two": ["launcher.processes=2", "strategy=ddp"]}


@pytest.mark.parametrize("ranks", list(RANKS)[: None if EVERYTHING else 1])
def test_moved_run_is_saved_where_it_is_now_and_a_purge_costs_nothing(runs, ranks):
    words = [*RANKS[ranks], *WORDS]
    old, new = runs.root / f"{ranks}-old", runs.root / f"{ranks}-new"
    process = runs.start(old.name, *words, ranks=True, **runs.held_at(old.name, 3))
    runs.wait_for_step(old.name, 3, process)
    shutil.rmtree(old / "lease")
    wait(lambda: list(old.glob("lease/*.json")), "the claim is made again", process)
    (old / "metrics.jsonl").unlink()
    old.rename(new)
    assert runs.end(process) == 75
    said = runs.said(old.name)
    assert "was emptied by somebody; the run's claim is made again" in said
    assert f"the directory was renamed to {new}" in said
    status = runs.status(new.name)
    step = status["step"]
    assert status["state"] == "preempted" and 3 <= step < 12
    assert f"{new}: stopped at step {step}, saved; " in said and f"run.dir={new} continues it" in said
    assert "took it over" not in said and "Traceback" not in said
    assert not old.exists()
    assert f"renamed from {old}" in status["reason"]
    assert (new / "checkpoints" / f"step-{step:06d}").is_dir()
    assert rows_of(new) == list(range(1, step + 1))
    code, said = runs.run_here(new.name, *words)
    assert code == 0 and f"resumed from step-{step:06d}" in said


def test_deleted_run_says_that_it_was_deleted(runs):
    gone = runs.root / "gone"
    process = runs.start(gone.name, *WORDS, **runs.held_at(gone.name, 2))
    runs.wait_for_step(gone.name, 2, process)
    shutil.rmtree(gone)
    assert runs.end(process) == 74
    said = runs.said(gone.name)
    assert "the directory was deleted" in said
    assert "took it over" not in said and "Traceback" not in said
    assert not gone.exists()
