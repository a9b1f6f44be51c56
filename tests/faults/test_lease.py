"""Real runs meet in one directory: on this host, and from another one that shares the disk."""

import json
import os
import signal

import pytest

from tests.faults.runs import can_be_elsewhere, descendants, read, start_elsewhere, take_over, wait
from tests.helpers.covering import whole
from trainer.session.lease_owner import LeaseOwner


def test_a_second_run_on_this_host_is_refused_though_the_clock_went_back(runs):
    first = runs.start("clock")
    runs.wait_for_step("clock", 1, first)
    status = runs.root / "clock" / "status.json"
    status.write_text(json.dumps({**read(status), "time": 0}))
    written = status.read_text()
    assert runs.end(runs.forked(runs.words("clock"), "again", {})) == 64, runs.said("again")
    assert f"process {first.pid} on " in runs.said("again") and "is running it; stop it" in runs.said("again")
    assert status.read_text() == written
    first.send_signal(signal.SIGTERM)
    assert runs.end(first) == 75


@whole("what refuses it is shown below, and what a refused run says above")
@pytest.mark.skipif(not can_be_elsewhere(), reason="needs the right to make namespaces")
def test_lease_refuses_another_host_while_the_owner_lives(runs):
    first = runs.start("shared", "run.lease_s=5")
    runs.wait_for_step("shared", 1, first)
    assert runs.end(start_elsewhere(runs, "refused", "shared", "run.lease_s=5")) == 64
    assert f"process {first.pid} on {os.uname().nodename}" in runs.said("refused")
    assert "Traceback" not in runs.said("refused")


@pytest.mark.skipif(not can_be_elsewhere(), reason="needs the right to make namespaces")
def test_lease_is_taken_over_by_another_host_when_the_owner_is_silent(runs):
    words = ["run.lease_s=5"]
    first = runs.start("shared", *words)
    runs.wait_for_step("shared", 1, first)
    first.send_signal(signal.SIGSTOP)
    second = start_elsewhere(runs, "taken", "shared", *words)
    wait(lambda: "watching for a heartbeat" in runs.said("taken"), "the other host watches", second)
    wait(lambda: runs.status("shared").get("host") == "elsewhere", "the other host trains", second)
    first.send_signal(signal.SIGCONT)
    assert runs.end(first) == 74
    assert "on elsewhere" in runs.said("shared") and "took it over" in runs.said("shared")
    assert not (runs.root / "shared" / "failure.json").exists()
    for process in descendants(second.pid):
        process.send_signal(signal.SIGTERM)
    assert runs.end(second) == 75
    assert (runs.status("shared")["state"], runs.status("shared")["host"]) == ("preempted", "elsewhere")
    steps = [row["step"] for row in runs.rows("shared")]
    assert steps == list(range(1, len(steps) + 1)), "rows of two runs"


def test_lease_lost_while_data_is_prepared_leaves_the_records_to_the_new_owner(runs):
    with runs.data_held() as word:
        started = {"alone": runs.start("alone", word, "run.lease_s=5")}
        started |= zip(
            ("both.0", "both.1"), runs.start_ranks("both", word, "strategy=ddp", "run.lease_s=5"), strict=True
        )
        for name, process in started.items():
            wait(lambda name=name: "waiting for another process" in runs.said(name), f"{name} waits", process)
        for run in ("alone", "both"):
            (runs.root / run / "status.json").write_text('{"state": "running", "host": "elsewhere"}')
            take_over(runs.root / run, LeaseOwner(host="elsewhere", process="boot/namespace/1"))
        codes = {name: runs.end(process) for name, process in started.items()}
    assert codes == dict.fromkeys(started, 74), {name: runs.said(name) for name in started}
    for name in started:
        assert "on elsewhere" in runs.said(name) and "took it over" in runs.said(name)
        assert "Traceback" not in runs.said(name)
    for run in ("alone", "both"):
        assert runs.status(run) == {"state": "running", "host": "elsewhere"}
        assert not (runs.root / run / "failure.json").exists()
