"""A preempted run whose restart is refused before it trains stays preempted at its step, and says why it was refused."""

from types import SimpleNamespace

import pytest

from launch.cluster.job_end import JobStart, _determine_outcome
from launch.cluster.supervisor import _retry_cause_key, record_run_outcome, state_before_start
from launch.runs.logs_command import _current_failure
from launch.runs.status_tables import _advice_lines
from strategies.errors import ConfigError, DataError, Preempted
from trainer.reporting.status import (
    RunState,
    is_refused_start,
    read_failure,
    read_status,
    record_failure,
    write_status,
)
from trainer.session.attempt import run_attempt
from trainer.stopping.signals import StopRequest

REFUSALS = [ConfigError("run.resume: runs/x was trained otherwise"), DataError("a.jsonl:3: no text")]


def start(run_dir, error, *, trains=False):
    """One start of a run that ends with `error`, before its training or after it has begun."""
    with pytest.raises(type(error)), run_attempt(run_dir, 60, StopRequest()) as attempt:
        if trains:
            write_status(run_dir, RunState.running, step=7)  # as `open_trackers_and_records` does
            attempt.at_step(8)
        raise error


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: type(refusal).__name__)
def test_refused_restart_leaves_the_run_preempted_and_ends_with_its_exit_code(tmp_path, refusal, capsys):
    write_status(tmp_path, RunState.preempted, step=7)
    for _ in range(2):  # a second refusal finds the first
        before = state_before_start(tmp_path)
        start(tmp_path, refusal)
        status = read_status(tmp_path)
        assert (status["state"], status["step"]) == ("preempted", 7)
        assert status["reason"] == f"the last start was refused (data preparation): {refusal}"
        assert read_failure(tmp_path)["exit_code"] == refusal.exit_code
        assert _current_failure(tmp_path)["message"] == str(refusal)
        assert record_run_outcome(tmp_path, 1, before) == refusal.exit_code
        assert str(refusal) in capsys.readouterr().err
        assert read_status(tmp_path) == status  # the launcher changes nothing
        assert _retry_cause_key(tmp_path, refusal.exit_code, {10}) is None
    advice = _advice_lines(SimpleNamespace(state="preempted", job=None), read_failure(tmp_path))
    assert "change what the message says" in " ".join(advice)


def test_refused_restart_of_a_job_is_not_requeued(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    write_status(tmp_path, RunState.preempted, step=7)
    start(tmp_path, REFUSALS[0])
    outcome = _determine_outcome(JobStart("5", "5", 0), tmp_path, 1, received_term=False, has_started_ranks=True)
    assert not outcome.should_requeue and outcome.exit_code == 1
    assert outcome.reason == str(REFUSALS[0])


def test_rank_that_is_told_to_stop_because_another_was_refused_changes_nothing(tmp_path):
    write_status(tmp_path, RunState.preempted, step=7)
    start(tmp_path, REFUSALS[1])
    refused = read_status(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "8")  # the first rank of another host
        start(tmp_path, Preempted("asked to stop"))
    assert read_status(tmp_path) == refused


def test_run_stopped_while_its_data_is_prepared_keeps_its_step_for_a_later_refusal(tmp_path):
    write_status(tmp_path, RunState.preempted, step=7)
    for _ in range(2):
        start(tmp_path, Preempted("asked to stop"))
        assert (read_status(tmp_path)["state"], read_status(tmp_path)["step"]) == ("preempted", None)
    start(tmp_path, REFUSALS[0])
    assert is_refused_start(read_status(tmp_path)) and read_status(tmp_path)["step"] == 7


def test_rank_that_is_refused_before_the_first_rank_owns_the_directory_keeps_the_step(tmp_path, monkeypatch):
    write_status(tmp_path, RunState.preempted, step=7)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    start(tmp_path, REFUSALS[0])
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    start(tmp_path, REFUSALS[0])
    assert is_refused_start(read_status(tmp_path)) and read_status(tmp_path)["step"] == 7


@pytest.mark.parametrize(
    ("retry", "state", "requeued"),
    [(None, "failed", False), ("node_fail", "preempted", True)],
    ids=["an error of the user", "a lost connection"],
)
def test_first_start_that_another_rank_ends_with_an_error_is_not_shown_as_stopped(
    tmp_path, monkeypatch, retry, state, requeued
):
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("retry_preempted", "20")
    with pytest.raises(Preempted), run_attempt(tmp_path, 60, StopRequest()):
        # Another rank ends with an error, and torchrun asks this one to stop.
        record_failure(tmp_path, 3, REFUSALS[1], "data preparation", retry=retry)
        write_status(tmp_path, RunState.failed, reason="rank 3")
        raise Preempted("asked to stop")
    assert read_status(tmp_path)["state"] == state
    outcome = _determine_outcome(JobStart("5", "5", 0), tmp_path, 1, received_term=False, has_started_ranks=True)
    assert outcome.should_requeue is requeued


@pytest.mark.parametrize(
    ("earlier_state", "earlier_step", "error", "trains"),
    [
        ("failed", 7, REFUSALS[0], False),
        ("preempted", None, REFUSALS[0], False),  # nothing was saved
        ("preempted", 7, ValueError("a defect"), False),
        ("preempted", 7, REFUSALS[1], True),
    ],
)
def test_any_other_end_is_a_failure(tmp_path, earlier_state, earlier_step, error, trains):
    write_status(tmp_path, earlier_state, step=earlier_step)
    before = state_before_start(tmp_path)
    start(tmp_path, error, trains=trains)
    assert read_status(tmp_path)["state"] == "failed"
    assert record_run_outcome(tmp_path, 1, before) == getattr(error, "exit_code", 70)
    assert read_status(tmp_path)["state"] == "failed"
