"""A run is started again by itself as often as asked, for the causes that were named, and never after an error."""

import signal

import pytest

from launch.cluster.supervisor import _retry_cause_key, record_run_outcome, state_before_start
from strategies.errors import ShardtuneError
from tests.faults.runs import wait
from tests.helpers.covering import whole
from trainer.reporting.status import RunState, record_failure, write_status

STEPS = 12


@whole("the same is started again after a killed rank in test_ranks.py, and USR2 is the cause of it below")
def test_run_is_started_again_after_usr2(runs):
    process = begun(runs, "launcher.retry={preempted: 1}")
    process.send_signal(signal.SIGUSR2)
    wait(lambda: "started again (preempted; 0 more times)" in runs.said("again"), "the second start", process)
    gone_on(runs, process)


def begun(runs, retry):
    words = ["tuning=full", f"budget.steps={STEPS}", "checkpoint.every_steps=8"]
    process = runs.start("again", retry, *words, **runs.held_at("again", 5))
    runs.wait_for_step("again", 5, process)
    return process


def gone_on(runs, process):
    """The second start ends well, and each step is there once."""
    assert runs.end(process, 400) == 0, runs.said("again")
    assert (runs.status("again")["state"], runs.status("again")["restart"]) == ("done", 1)
    assert not (runs.root / "again" / "failure.json").exists()
    assert [row["step"] for row in runs.rows("again")] == list(range(1, STEPS + 1))


def test_an_error_is_not_repeated(runs):
    (runs.root / "broken.jsonl").write_text('{"messages": 3\n')
    words = ["launcher.retry={preempted: 9, node_fail: 9}", f"data.path={runs.root / 'broken.jsonl'}"]
    code, said = runs.run_here("error", *words)
    assert code == 65, said
    assert "started again" not in said
    assert said.count("shardtune train:") == 1


@pytest.mark.parametrize(
    ("code", "signals", "lost", "cause"),
    [
        (75, {signal.SIGUSR2}, False, "preempted"),
        (75, {signal.SIGUSR2, signal.SIGTERM}, False, None),
        (75, {signal.SIGHUP}, False, None),
        (75, set(), False, None),  # stopped for another reason than a signal to this command
        (70, set(), True, "node_fail"),
        (70, {signal.SIGUSR1}, True, "node_fail"),
        (70, {signal.SIGTERM}, True, None),
        (130, {signal.SIGINT}, True, None),
        (130, set(), True, None),
        (70, set(), False, None),
        (0, set(), True, None),
    ],
)
def test_a_cause_to_start_again_is_never_seen_after_term_or_ctrl_c(tmp_path, code, signals, lost, cause):
    record_failure(tmp_path, 1, RuntimeError("x"), "training", **({"retry": "node_fail"} if lost else {}))
    assert _retry_cause_key(tmp_path, code, signals) == cause


@pytest.mark.parametrize(("step", "code"), [(None, 70), (7, 75)])
def test_rank_killed_before_training_is_the_cause_though_its_peers_were_stopped(tmp_path, capsys, step, code):
    """torchrun ends them with SIGTERM. Once something was saved, the stop is what counts."""
    before = state_before_start(tmp_path)
    write_status(tmp_path, RunState.preempted, step=step)
    killed = ShardtuneError("rank 1 (process 4711) was killed by SIGKILL")
    record_failure(tmp_path, 1, killed, "killed", retry="node_fail")
    assert record_run_outcome(tmp_path, 1, before) == code
    said = capsys.readouterr().err
    assert ("was killed by SIGKILL" in said) == (code == 70)
