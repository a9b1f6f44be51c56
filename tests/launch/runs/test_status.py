"""`shardtune status` over directories as runs leave them: what is said of each, from how few files, and that nothing raises."""

import json
import os
import re
from pathlib import Path

import pytest

from launch.main import main
from launch.runs import status_command
from launch.runs.job_record import record_job_end, record_job_start
from launch.runs.queue import JobQueue, QueuedJob, read_submitted_job_id, write_submitted_job_ids
from launch.runs.status import RunView, find_runs, read_run_view
from launch.runs.status_tables import status_text
from strategies import atomic_io
from strategies.errors import StorageError
from tests.launch.runs.made import here, made, owned, stand_in_for_squeue, without_torch


@pytest.fixture(autouse=True)
def no_queue(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


def seen(run: Path) -> RunView:
    return read_run_view(run, JobQueue())


def test_a_run_that_gives_no_sign_of_life_is_lost(tmp_path):
    lives = made(tmp_path, "lives")
    owned(lives, heartbeat_age_s=30)
    assert (seen(lives).state, seen(lives).remaining_s) == ("running", 7 * 2.0)
    assert 29 < seen(lives).last_seen_s < 100

    silent = made(tmp_path, "silent")
    owned(silent, 4, heartbeat_age_s=3700)
    found = seen(silent)
    assert (found.state, found.restarts, found.remaining_s) == ("lost", 3, None)
    assert found.state_reason == "no heartbeat for 62 min from process 7 on n1"

    hangs = made(tmp_path, "hangs")
    owned(hangs, heartbeat_age_s=600, **here(os.getpid()))
    assert seen(hangs).state == "lost" and "lives, but no heartbeat for 10 min" in seen(hangs).state_reason

    reused = made(tmp_path, "reused")  # the number of its process is another one's now
    owned(reused, **{**here(os.getpid()), "process": here(os.getpid())["process"] + "1"})
    assert seen(reused).state == "lost" and "ended without a message" in seen(reused).state_reason

    over = made(tmp_path, "over")
    owned(over)
    (over / "lease" / "000001.over").write_text("{}")
    assert seen(over).state == "lost" and "no process runs it" in seen(over).state_reason


def test_status_shows_a_row_for_torn_empty_or_unreadable_records(tmp_path, capsys, monkeypatch):
    torn = made(tmp_path, "torn")
    for name in ("status.json", "run.json", "metrics.jsonl"):
        (torn / name).write_text((torn / name).read_text()[:-9])
    owned(torn)
    empty = made(tmp_path, "empty")
    for path in empty.iterdir():
        if path.is_file() and path.name != "config.yaml":
            path.write_text("")
    odd = made(tmp_path, "odd")
    (odd / "status.json").write_text('{"state": "running", "step": "x", "restart": null, "time": "noon"}')
    (odd / "run.json").write_text("[" * 100_000)
    (odd / "metrics.jsonl").write_bytes(b'\xff\x00\n[1]\n{"step": 2, "loss": null, "tokens_per_s": "fast"}\n{"step": 3')
    (odd / "lease" / "000002.json").write_text("{")
    locked = made(tmp_path, "locked")
    (locked / "lease").rmdir()
    (locked / "lease").symlink_to("lease")
    pipe = made(tmp_path, "pipe", state="done")
    (pipe / "metrics.jsonl").unlink()
    os.mkfifo(pipe / "metrics.jsonl")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.yaml").write_text("a: 1\n")  # of another program
    (tmp_path / "shut").mkdir()
    really = os.scandir

    def scandir(path):
        if Path(path).name == "shut":
            raise PermissionError(13, "Permission denied", str(path))
        return really(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert main(["status", str(tmp_path), "--json"]) == 0
    rows = {Path(row["directory"]).name: row for row in json.loads(capsys.readouterr().out)["runs"]}
    assert {name: (row["state"], row["step"]) for name, row in rows.items()} == {
        "torn": ("running", 2),
        "empty": ("unknown", None),
        "odd": ("running", 2),  # a torn claim of a moment ago
        "locked": ("unknown", 3),
        "pipe": ("done", 3),
        "shut": ("unknown", None),
    }
    assert rows["locked"]["why"].startswith("its lease cannot be read: ")
    assert rows["shut"]["why"] == "cannot be read: Permission denied"
    assert main(["status", str(tmp_path)]) == 0

    class Shut(atomic_io.Disk):
        def names(self, directory):
            if directory == pipe / "checkpoints":
                raise PermissionError(13, "Permission denied", str(directory))
            return super().names(directory)

    monkeypatch.setattr(atomic_io, "disk", Shut())
    for name in rows:
        assert main(["status", str(tmp_path / name)]) == 0 or name == "shut"
    capsys.readouterr()
    assert main(["status", str(pipe), "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)["runs"]
    assert row["checkpoints_problem"].startswith(f"{pipe}/checkpoints: cannot be listed (Permission denied")


def test_hundreds_of_runs_are_read_from_few_bytes_of_few_files(tmp_path):
    for number in range(300):
        run = made(tmp_path, f"sweep/{number}", state="failed" if number % 3 == 0 else "running")
        owned(run, heartbeat_age_s=number * 10)
        if number % 3 == 0:
            (run / "failure.json").write_text(json.dumps({"message": "no space\nleft", "rank": 1}))
        rows = (run / "metrics.jsonl").read_text()
        with (run / "metrics.jsonl").open("w") as file:  # as after weeks, without taking the space
            file.seek(2**32)
            file.write("\n" + rows)
    count = "opened = []\nsys.addaudithook(lambda name, about: opened.append(about[0]) if name == 'open' else None)\n"
    count += "import atexit, pathlib; read = lambda: int(pathlib.Path('/proc/self/io').read_text().split()[1])\n"
    count += (
        "began = read()\natexit.register(lambda: print(len([p for p in opened if 'sweep' in str(p)]), read() - began))"
    )
    done = without_torch("status", tmp_path, before=count)
    assert (done.returncode, done.stderr) == (0, "")
    *lines, counted = done.stdout.splitlines()
    files, read = map(int, counted.split())
    assert files <= 300 * 7, "files opened"
    assert read < 300 * 2**17 + 2**26, "bytes read"
    assert max(len(line) for line in lines) <= 80
    assert re.match(r"300 runs: 1\d\d running, |300 runs: 1\d\d lost, ", lines[-1]) and "100 failed" in lines[-1]
    shown = [line for line in lines if line.startswith("sweep/")]
    assert [line.split()[0] for line in shown] == [f"sweep/{number}" for number in range(300)], "not in their order"
    assert shown[1].split()[1:7] == ["running", "3/10", "2.0000", "1,000", "14", "s"]
    assert lines.count("  no space left") == 100


def test_status_shows_which_runs_pend_in_the_queue_and_why(tmp_path, capsys, monkeypatch):
    waits, task = made(tmp_path, "waits", state=None), made(tmp_path, "sweep/1", state="preempted")
    made(tmp_path, "sweep/0", state="done")
    works = made(tmp_path, "works")
    owned(works, job="31")
    (tmp_path / "sweep/0/train.sbatch").write_text(f"#!/bin/bash\nruns=({tmp_path}/sweep/0 '{task}')\n")
    tail = ["2026-11-26T09:00:00", "1:00:00", "n1", str(tmp_path)]
    rows = [
        ["17", "17", "PENDING", "Resources", *tail, "waits", f"{waits}/train.sbatch"],
        ["20_1", "21", "PENDING", "BeginTime", *tail, "shardtune", f"{tmp_path}/sweep/0/train.sbatch"],
        ["31", "31", "RUNNING", "None", *tail, "works", "(null)"],
        ["32", "32", "PENDING", "Priority", *tail, "somebody's", "(null)"],
    ]
    monkeypatch.setenv("PATH", stand_in_for_squeue(tmp_path / "bin", rows))
    assert main(["status", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    about = {
        Path(run["directory"]).relative_to(tmp_path).as_posix(): (run["state"], run["job_id"]) for run in found["runs"]
    }
    assert about == {
        "waits": ("queued", "17"),
        "sweep/0": ("done", None),
        "sweep/1": ("queued", "20_1"),
        "works": ("running", "31"),
    }
    assert [job["id"] for job in found["other_jobs"]] == ["32"]
    assert main(["status", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "  job 17 pending: waits for nodes to become free; expected at 2026-11-26" in out, out
    assert "  job 20_1 pending: its time has not come (about two minutes after a requeue)" in out
    assert "  job 32 pending: jobs of higher priority come first" in out
    assert main(["status", str(works)]) == 0
    assert "job 31 RUNNING, 1:00:00 left on n1" in capsys.readouterr().out
    ended = made(tmp_path, "ended", state="preempted")
    write_submitted_job_ids([ended], "33")
    rows.append(["33", "33", "RUNNING", "None", tail[0], "INVALID", *tail[2:], "ended", f"{ended}/train.sbatch"])
    stand_in_for_squeue(tmp_path / "bin", rows)
    assert main(["status", str(ended)]) == 0
    out = capsys.readouterr().out
    assert "job 33 RUNNING, past its time limit on n1" in out and "job 33 RUNNING starts it again" in out
    assert "the same command continues it" not in out, "its job does"

    queue = tmp_path / "bin" / "queue"
    queue.write_text(queue.read_text().replace("RUNNING", "SUSPENDED"))
    assert main(["status", str(tmp_path)]) == 0
    assert "  on n1, job 31 SUSPENDED\n" in capsys.readouterr().out

    monkeypatch.setenv("STANDIN_CODE", "1")
    assert main(["status", str(tmp_path)]) == 0
    assert "queue: squeue failed" in capsys.readouterr().out
    monkeypatch.setattr("launch.runs.queue.SQUEUE_TIMEOUT_S", 0.2)
    monkeypatch.setenv("STANDIN_WAITS", "60")
    assert main(["status", str(tmp_path)]) == 0
    assert "queue: squeue gave no answer" in capsys.readouterr().out


def test_status_of_a_job_that_ended_before_its_ranks_wrote_is_ended(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", stand_in_for_squeue(tmp_path / "bin", []))
    (tmp_path / "bin" / "scontrol").write_text(
        "#!/bin/sh\necho JobId=$5 JobState=CANCELLED Reason=Dependency ExitCode=0:0\n"
    )
    (tmp_path / "bin" / "sacct").write_text("#!/bin/sh\nexit 1\n")
    for name in ("scontrol", "sacct"):
        (tmp_path / "bin" / name).chmod(0o755)
    words = {
        "refused": "job 41, start 0: n10: does not see /data (exit code 69)",
        "killed": "job 42, start 1, on n[1-2]: ended, and its script wrote no reason; SLURM says: CANCELLED",
        "cancelled": "job 43 ended before its script began; SLURM says: CANCELLED Dependency",
    }
    runs = {name: made(tmp_path, name, state=None, steps=0) for name in (*words, "fresh")}
    for number, name in enumerate(words):
        write_submitted_job_ids([runs[name]], str(41 + number))
    record_job_end(runs["refused"], "41", 0, 69, reason="n10: does not see /data", will_restart=False)
    record_job_start(runs["killed"], "42", 1, "n[1-2]")
    assert main(["status", str(tmp_path), "--json"]) == 0
    rows = {Path(row["directory"]).name: row for row in json.loads(capsys.readouterr().out)["runs"]}
    assert {name: rows[name]["state"] for name in rows} == dict.fromkeys(words, "failed") | {"fresh": "not started"}
    assert all(text in rows[name]["why"] for name, text in words.items())
    assert main(["status", str(runs["cancelled"])]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "failed: job 43 ended before its script began" in out and "submit the same settings again" in out
    monkeypatch.setenv("STANDIN_CODE", "1")
    assert main(["status", str(runs["cancelled"])]) == 0
    assert "whether it still waits or runs is not known: squeue failed" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("state", "reason", "words"),
    [
        (
            "PENDING",
            "job requeued in held state",
            "held by SLURM after a requeue, and does not start by itself",
        ),
        ("SPECIAL_EXIT", "None", "`scontrol release 9` lets it start"),
        ("REQUEUED", "BeginTime", "its time has not come"),
        ("PENDING", "PartitionDown", "its partition is down"),
        ("PENDING", "JobArrayTaskLimit", "waits for other tasks of its array"),
        ("PENDING", "QOSMaxWallDurationPerJobLimit", "it never starts; lower launcher.time, or set launcher.qos"),
        ("PENDING", "QOSMaxCpuPerJobLimit", "it never starts; lower what is asked for, or set launcher.qos"),
        ("PENDING", "QOSMaxJobsPerUserLimit", "it starts when other jobs have ended"),
        ("PENDING", "AssocGrpGRES", "it starts when other jobs have ended"),
        ("PENDING", "SomethingNew", "SomethingNew"),
    ],
)
def test_status_has_words_and_a_remedy_for_every_pending_reason(state, reason, words):
    job = QueuedJob("9", "9", state, reason, "N/A", "1:00", "", "/", "run", "(null)")
    assert job.is_pending and words in job.description


def test_which_job_a_run_is_for_is_replaced_whole(tmp_path, monkeypatch):
    """Whoever looks meanwhile reads the job before, and so does everybody where the disk is full."""

    def full(self, descriptor, content):
        raise OSError(28, "No space left on device")

    write_submitted_job_ids([tmp_path], "7")
    monkeypatch.setattr(atomic_io.Disk, "write", full)
    with pytest.raises(StorageError, match="No space left"):
        write_submitted_job_ids([tmp_path], "8")
    assert read_submitted_job_id(tmp_path) == "7"


def test_status_watch_fits_the_terminal_and_begins_with_running_runs(tmp_path, monkeypatch):
    for number in range(40):
        made(tmp_path, f"{number}", state="done", time=number)
    owned(made(tmp_path, "works"))
    owned(made(tmp_path, "lost"), heartbeat_age_s=10**6)
    found = status_command.read_runs_status(tmp_path)
    monkeypatch.setenv("LINES", "24")
    lines = status_text(found, None, live=True).splitlines()
    assert len(lines) <= 24
    shown = [line.split()[0] for line in lines if " done " in line or line.startswith(("works", "lost"))]
    assert shown[:3] == ["works", "lost", "39"] and f"... and {42 - len(shown)} more" in lines
    assert "▁" in lines[3] and lines[-1].startswith("42 runs: 40 done, 1 ")
    assert len(status_text(found, None).splitlines()) > 42


def test_status_shows_links_out_of_the_directory_and_inner_links_once(tmp_path):
    made(tmp_path / "runs", "a")
    made(tmp_path / "far", "b")
    (tmp_path / "runs" / "latest").symlink_to("a")
    (tmp_path / "runs" / "b").symlink_to(tmp_path / "far" / "b")
    (tmp_path / "runs" / "round").symlink_to("round")
    found = find_runs(tmp_path / "runs")
    assert [run.name for run in found.runs] == ["a", "b"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere: there is no such directory"),
        (["--quick"], "--quick: there is no such flag"),
        (["a", "b"], "name one directory"),
        (["--watch", "--verify"], "give one of the two"),
    ],
)
def test_status_names_words_that_mean_nothing(words, said, capsys):
    assert main(["status", *words]) == 64
    assert said in capsys.readouterr().err


def test_status_of_a_run_shortens_numbers_that_nobody_reads_to_the_end(tmp_path, capsys):
    run = made(tmp_path, "exploded", state="done")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "loss": 2.5e7}) + "\n")
        file.write(json.dumps({"step": 4, "eval/loss": 159.0786, "eval/perplexity": 1.2e69}) + "\n")
    assert main(["status", str(run)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "loss 2.5e+07" in said and "held out eval/loss 159.0786, eval/perplexity 1.2e+69 (step 4)" in said


def test_status_without_runs_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["status"]) == 0
    assert capsys.readouterr().out == "no runs below runs\n"
