"""`shardtune logs`: which file is the right one, its last lines, and following it from one attempt to the next."""

import json
import os
import threading
import time
from io import StringIO
from pathlib import Path

import pytest

from launch.main import main
from launch.runs import logs_command
from launch.runs.queue import JobQueue
from tests.helpers.speed import seconds
from tests.launch.runs.made import made, owned, stand_in_for_squeue, without_torch


@pytest.fixture(autouse=True)
def no_queue(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


def said(run: Path, name: str, text: str, *, age_s: float = 0) -> Path:
    path = run / "logs" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def failed(run: Path, **about) -> None:
    record = {
        "rank": 1,
        "host": "n2",
        "phase": "training",
        "step": 5,
        "user_error": False,
        "message": "cut",
        "traceback": "T: cut",
    }
    (run / "failure.json").write_text(json.dumps({**record, **about}))


def test_logs_shows_the_last_lines_of_the_right_file(tmp_path, capsys):
    run = made(tmp_path, "run", state="done")
    said(run, "rank-0.log", "".join(f"zero {n}\n" for n in range(60)) + "torn")
    said(run, "rank-1.log", "one\n")
    said(run, "run-16.out", "old script\n", age_s=500)
    said(run, "run-17.out", "script\n", age_s=100)
    said(run, "run-17-0.log", "  0%|  |\r 50%|# |\r100%|##|\n")
    said(run, "run-17-1.log", "node 1\n")
    said(run, "rank-0.stacks", "no log\n")

    def shown(*words: str) -> str:
        assert main(["logs", str(run), *words]) == 0
        return capsys.readouterr().out

    assert shown() == "".join(f"zero {n}\n" for n in range(20, 60))
    assert shown("lines=2") == "zero 58\nzero 59\n"
    assert shown("rank=1") == "one\n"
    of_job = shown("job=last")
    assert [line for line in of_job.splitlines() if not line.startswith("==>")] == ["100%|##|", "node 1", "script"]
    assert shown("job=16") == "old script\n"

    (run / "status.json").write_text('{"state": "failed"}')
    failed(run)
    told = shown()
    for part in ("one\n", "node 1\n", "rank 1 on n2 failed (training, step 5):\nT: cut\n"):
        assert part in told
    assert "zero" not in told and told.index("node 1") < told.index("one\n") < told.index("T: cut")
    failed(run, user_error=True, message="first\nsecond")
    assert shown().endswith("step 5):\n  first\n  second\n")
    assert "failed" not in shown("rank=0")

    answer = json.loads(shown("--json", "lines=1"))
    assert answer["run"] == str(run) and answer["failure"]["message"] == "first\nsecond"
    lines = {Path(each["file"]).name: each["lines"] for each in answer["files"]}
    assert lines == {
        "run-17-0.log": ["100%|##|"],
        "run-17-1.log": ["node 1"],
        "run-17.out": ["script"],
        "rank-1.log": ["one"],
    }
    assert json.loads(shown("--json", "rank=0"))["failure"] is None


def test_logs_without_a_file_of_a_rank_shows_the_job_output_or_says_so(tmp_path, capsys):
    run = made(tmp_path, "run", state=None)
    assert main(["logs", str(run)]) == 0
    assert "nothing was written below" in capsys.readouterr().out
    first = made(tmp_path, "first", state=None)
    for array in (first, run):
        (array / "train.sbatch").write_text(f"#!/bin/bash\nruns=({first} {run})\n")
    said(first, "shardtune-20_0.out", "another task's\n")
    said(first, "shardtune-20_1.out", "setup: command not found\n")
    said(run, "shardtune-22-0.log", "its node's\n")
    assert main(["logs", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line for line in lines if "==>" not in line} == {"its node's", "setup: command not found"}
    assert main(["logs", str(first)]) == 0
    assert capsys.readouterr().out == "another task's\n"
    done = without_torch("logs", run)
    assert done.returncode == 0 and "setup: command not found" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["nowhere"], "nowhere: there is no such run directory"),
        (["{run}", "rank=7"], "rank=7: has no log in"),
        (["{run}", "rank=x"], "rank=x: must be a whole number, at least 0"),
        (["{run}", "job=99"], "jobs with output: 17"),
        (["{run}", "rank=0", "job=17"], "give one of the two"),
        (["{run}", "{run}"], "name one run directory: shardtune logs runs/first"),
        (["{run}", "-f"], "-f: there is no such flag"),
        (["{run}", "ranks=1"], "ranks=1: there is no such argument"),
        (["{run}", "rank=7", "--follow"], "ranks with a log: 0 to 0"),
    ],
)
def test_logs_names_a_run_rank_or_job_that_does_not_exist(tmp_path, capsys, words, problem):
    run = made(tmp_path, "run")
    said(run, "rank-0.log", "x\n")
    said(run, "run-17.out", "x\n")
    assert main(["logs", *(word.format(run=run) for word in words)]) == 64
    assert problem in capsys.readouterr().err


def test_logs_follows_over_a_requeue_to_the_end(tmp_path, monkeypatch):
    for name in ("READ_INTERVAL_S", "STATE_INTERVAL_S", "QUEUE_INTERVAL_S"):
        monkeypatch.setattr(logs_command, name, 0.02)
    monkeypatch.setattr(logs_command, "RESTART_WAIT_S", 0.3)
    run = made(tmp_path, "run", state=None, steps=0)
    row = ["17", "17", "PENDING", "Resources", "N/A", "1:00", "", str(tmp_path), "run", f"{run}/train.sbatch"]
    monkeypatch.setenv("PATH", stand_in_for_squeue(tmp_path / "bin", [row]))
    queue = tmp_path / "bin" / "queue"
    told = StringIO()  # not capsys: what is said while that is read is lost
    monkeypatch.setattr("sys.stdout", told)
    monkeypatch.setattr("sys.stderr", told)

    def until(part: str) -> None:
        deadline = time.monotonic() + seconds(60)
        while part not in told.getvalue():
            assert time.monotonic() < deadline, f"never came: {part}: {told.getvalue()}"
            time.sleep(0.01)

    def replace(path: Path, text: str) -> None:
        """At once: it is being read."""
        path.with_suffix(".new").write_text(text)
        path.with_suffix(".new").replace(path)

    def write(state: str, step: int) -> None:
        about = {"state": state, "step": step, "reason": "stopped", "time": time.time()}
        replace(run / "status.json", json.dumps(about))

    ended: list[int] = []
    following = threading.Thread(target=lambda: ended.append(main(["logs", str(run), "--follow"])), daemon=True)
    following.start()
    until("waiting: job 17 pending: waits for nodes")
    log = said(run, "rank-0.log", "step 1\nst")
    owned(run, job="17")
    replace(queue, queue.read_text().replace("PENDING", "RUNNING"))
    write("running", 1)
    until("step 1\n")
    with log.open("a") as file:
        file.write("ep 2\n")
    until("step 2\n")
    write("preempted", 2)
    replace(queue, queue.read_text().replace("RUNNING", "PENDING").replace("Resources", "BeginTime"))
    until("about two minutes after a requeue")
    time.sleep(1)  # longer than what has ended is waited for
    assert following.is_alive()
    owned(run, 2, job="17")
    write("running", 2)
    replace(queue, "")
    log.write_text("anew\n")  # shorter: written again from the beginning
    until("anew\n")
    with log.open("a") as file:
        file.write("step 3\n")
    write("done", 3)
    following.join(seconds(60))
    assert ended == [0]
    lines = told.getvalue().splitlines()
    assert [line for line in lines if line.startswith("step")] == ["step 1", "step 2", "step 3"]
    assert lines[-1] == f"{run}: done at step 3: stopped"


def test_logs_following_ends_where_nothing_will_resume_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logs_command, "RESTART_WAIT_S", 0.1)
    monkeypatch.setattr(logs_command, "READ_INTERVAL_S", 0.05)
    run = made(tmp_path, "run", state="failed")
    said(run, "rank-0.log", "x\n")
    failed(run)
    assert main(["logs", str(run), "--follow"]) == 0
    captured = capsys.readouterr()
    assert "T: cut" in captured.out and f"{run}: failed at step 3\n" in captured.err
    monkeypatch.setenv("PATH", stand_in_for_squeue(tmp_path / "bin", []))
    monkeypatch.setenv("STANDIN_CODE", "1")  # of a run that had no job its queue says nothing
    lost = made(tmp_path, "lost")
    owned(lost, heartbeat_age_s=10**6)
    assert main(["logs", str(lost), "--follow"]) == 0
    assert "lost: lost at step 3: no heartbeat for 12 d" in capsys.readouterr().err


def test_where_the_queue_gives_no_answer_a_job_that_pends_is_waited_for(tmp_path, capsys, monkeypatch):
    """A controller that was busy for a moment used to end it, though the job was about to go on."""
    for name in ("READ_INTERVAL_S", "STATE_INTERVAL_S", "QUEUE_INTERVAL_S", "RESTART_WAIT_S"):
        monkeypatch.setattr(logs_command, name, 0.0)
    run = made(tmp_path, "run", state="preempted")
    owned(run, job="17")
    silent, asked = JobQueue(problem="squeue gave no answer"), []
    monkeypatch.setattr(
        "launch.runs.queue.read_queue", lambda: asked.append(silent) or (JobQueue() if asked[5:] else silent)
    )
    assert main(["logs", str(run), "--follow"]) == 0
    assert len(asked) > 5 and "run: preempted at step 3" in capsys.readouterr().err


def test_logs_following_as_json_is_an_object_a_line_and_the_end_of_the_run_last(tmp_path, capsys):
    run = made(tmp_path, "run", state="done")
    said(run, "rank-0.log", 'step 1\n"ü"\n')
    assert main(["logs", str(run), "--follow", "--json", "lines=1"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert told == [
        {"file": str(run / "logs" / "rank-0.log"), "line": '"ü"'},
        {"run": str(run), "state": "done", "step": 3, "why": None},
    ]
