"""Runs that are killed while they save or export, or whose disk is full: nothing is lost that was said to be saved."""

import signal

import pytest

from tests.faults.runs import read
from tests.helpers.covering import whole
from tests.helpers.launching import ROOT
from tests.helpers.speed import seconds

STEPS = 12
LENGTH = [f"budget.steps={STEPS}", "run.threads=1", "checkpoint.every_steps=1"]
MEASURED = ("step", "loss", "grad_norm", "eval/loss", "eval/accuracy")


def faulty(how: str) -> dict[str, str]:
    return {"FAULTY_DISK": how, "PYTHONPATH": f"{ROOT / 'tests' / 'faults' / 'disk'}:{ROOT}"}


def numbers(runs, run: str) -> list[tuple]:
    return [tuple(row.get(key) for key in MEASURED) for row in runs.rows(run)]


def results(runs, run: str) -> dict:
    """What a run says of itself that does not depend on the clock."""
    outcome = read(runs.root / run / "run.json")["outcome"]
    kept = {key: outcome[key] for key in ("before", "after", "progress", "stopped_early")}
    return {
        **kept,
        "last": [outcome["last_row"][key] for key in ("step", "loss", "grad_norm")],
        "fast": set(outcome["speed"]),
    }


@pytest.fixture(scope="module")
def words(site):
    return [*LENGTH, f"data.eval_path={site.root / 'eval.jsonl'}", "evaluation.every_steps=5", "export.at_end=true"]


def test_killed_while_saving_and_before_its_export_is_named_by_the_phase(runs, words):
    code, said = runs.run_here("left-alone", *words)
    assert code == 0, said
    code, said = runs.run("killed", *words, **faulty("amid step-000004"))
    there = {path.name for path in (runs.root / "killed" / "checkpoints").iterdir()}
    assert code == -signal.SIGKILL and there == {"step-000002", "step-000003", ".step-000004.writing"}, said
    code, said = runs.run("killed", *words, **faulty("kill export"))
    assert code == -signal.SIGKILL and "exported" not in said, said
    assert not (runs.root / "killed" / "export").exists()
    code, said = runs.run_here("killed", *words)
    assert code == 0 and f"resumed from step-{STEPS:06d}" in said, said
    assert numbers(runs, "killed") == numbers(runs, "left-alone")
    found, expected = results(runs, "killed"), results(runs, "left-alone")
    assert found["fast"] == expected["fast"] - {"intervals"}
    assert {**found, "fast": 0} == {**expected, "fast": 0} and found["before"] and found["after"]
    cards = [(runs.root / run / "export" / "README.md").read_text() for run in ("killed", "left-alone")]
    table = [[line for line in card.splitlines() if line.startswith("| eval/")] for card in cards]
    assert table[0] == table[1] != []


def test_a_full_disk_costs_checkpoints_and_not_the_run(runs):
    """Two ranks that have no room for their first three files: the run's disk and the spare one at step 1, the run's at 2."""
    spare = runs.root / "spare"
    words = ["strategy=fsdp2", "launcher.processes=2", "budget.steps=4", "checkpoint.every_steps=1"]
    code, said = runs.run_here("full", *words, f"checkpoint.fallback_dir={spare}", **faulty("full 3"))
    assert code == 0 and "Traceback" not in said, said
    assert said.count("warning: No space left on device") == 3 and "1 failed in a row, 3 may" in said
    assert f"checkpoint step-000002 in {spare}" in said
    there = sorted(path.name for path in (runs.root / "full" / "checkpoints").iterdir())
    assert there == ["step-000003", "step-000004"] and [*spare.glob("*/*")] == []
    code, said = runs.run_here("unlisted", *words, **faulty("unlisted checkpoints"))
    assert code == 74 and "checkpoints: cannot be listed (Input/output error" in said and "Traceback" not in said, said


def test_disk_that_is_full_in_the_middle_of_training_is_named_as_the_cause(runs):
    code, said = runs.run("crowded", "budget.steps=4", "checkpoint.save_final=false", **faulty("crowded 2"))
    last = said.strip().splitlines()[-1]
    assert code == 74 and "Traceback" not in said and "metrics.jsonl: cannot be written" in last, said
    assert "No space left on device" in last
    status = runs.status("crowded")
    assert status["state"] == "failed" and "No space left" in status["reason"], status
    assert not (runs.root / "crowded" / "failure.json").exists() and len(runs.rows("crowded")) == 2


def test_resume_from_another_run_goes_on_from_its_own_checkpoint_when_repeated(runs):
    """As of a job that is requeued: it went back to the start of its branch and moved what it had made away."""
    assert runs.run_here("origin", "budget.steps=2")[0] == 0
    words = [f"run.resume={runs.root / 'origin' / 'checkpoints' / 'step-000002'}"]
    stopped = 2
    for _ in range(2):
        process = runs.start("branch", *words)
        runs.wait_for_step("branch", stopped + 2, process)
        process.send_signal(signal.SIGTERM)
        assert runs.end(process) == 75, runs.said("branch")
        assert f"resumed from step-{stopped:06d}" in runs.said("branch")
        stopped = runs.status("branch")["step"]
    assert "has begun from it already" in runs.said("branch")
    assert [row["step"] for row in runs.rows("branch")] == list(range(3, stopped + 1))
    assert not [*(runs.root / "branch" / "checkpoints").glob("given-up*")]


@whole("tests/checkpoints/test_async_writer.py shows the mechanism; this one waits for a disk")
def test_an_fsync_that_takes_longer_than_the_timeout_ends_no_run(runs):
    limit_s = round(seconds(5))
    words = ["strategy=fsdp2", "launcher.processes=2", f"run.timeout_s={limit_s}", "budget.steps=2", "tuning=full"]
    code, said = runs.run("slow", *words, **faulty(f"slow {3 * limit_s}"))
    assert code == 0, said
    assert (runs.root / "slow" / "checkpoints" / "step-000002" / "manifest.json").exists()
