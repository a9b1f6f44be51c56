"""Runs that users started, seen from outside: at work, stopped, killed, failed, finished."""

import json
import re
import shutil
import signal
import subprocess
import sys

from launch.main import main
from tests.faults.runs import ROOT, environment, wait
from tests.helpers.covering import whole
from tests.helpers.launching import command_here
from tests.helpers.speed import seconds
from tests.launch.runs.made import without_torch


def command(*words, **extra):
    """`shardtune ...` as a user types it."""
    return [sys.executable, "-m", "launch.main", *map(str, words)]


def states(capsys, directory) -> dict[str, dict]:
    assert main(["status", str(directory), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["runs"]
    return {row["directory"].rpartition("/")[2]: row for row in found}


def test_status_of_runs_as_they_come_and_go(runs, capsys):
    alive, killed = runs.start("alive"), runs.start("killed", "checkpoint.every_steps=2")
    (runs.root / "wrong.jsonl").write_text('{"nothing": 1}\n')
    code, _ = runs.run("failed", f"data.path={runs.root / 'wrong.jsonl'}")
    assert code == 65
    runs.wait_for_step("alive", 3, alive)
    # Which ones there are changes as one looks: only the newest stay.
    kept = runs.root / "killed" / "checkpoints"
    wait(lambda: any(kept.glob("step-*/manifest.json")), "a checkpoint", killed)
    killed.kill()
    runs.end(killed)
    found = states(capsys, runs.root)
    assert {name: row["state"] for name, row in found.items()} == {
        "alive": "running",
        "killed": "lost",
        "failed": "failed",
    }
    assert found["killed"]["why"].startswith(f"process {killed.pid} on ")
    row = found["alive"]
    assert (row["pid"], row["total"], row["last_seen_s"] < 120) == (alive.pid, 5000, True)
    assert row["step"] >= 3 and row["loss"] and row["tokens_per_s"] and row["memory_gib"] and row["left_s"]
    assert "wrong.jsonl" in found["failed"]["why"]

    watched = subprocess.Popen(
        command("status", runs.root / "alive", "--watch"),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert watched.stdout is not None
    said = ""
    for line in watched.stdout:  # until it has looked again and seen it go on
        said += line
        steps = {int(step) for step in re.findall(r"running, step (\d+)/5000", said)}
        if len(steps) > 1:
            break
    watched.send_signal(signal.SIGINT)
    assert watched.wait(timeout=seconds(60)) == 130
    assert len(steps) > 1, said
    watched.stdout.close()

    followed = subprocess.Popen(
        command("logs", runs.root / "alive", "lines=0", "--follow"),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert followed.stdout is not None and "| loss " in [followed.stdout.readline() for _ in range(2)][1]
    code = command_here(["stop", str(runs.root / "alive")])
    stopped = capsys.readouterr()
    assert (code, runs.end(alive)) == (0, 75), stopped.err
    step = runs.status("alive")["step"]
    newest = runs.root / "alive" / "checkpoints" / f"step-{step:06d}"
    assert f"asked to save and to end (kill -TERM {alive.pid})" in stopped.out
    assert f"saved at step {step}: {newest}; the same command continues it" in stopped.out
    assert (newest / "manifest.json").exists()
    rest, _ = followed.communicate(timeout=seconds(60))
    assert followed.returncode == 0 and f"checkpoint step-{step:06d}: " in rest, rest
    assert rest.endswith(
        f"alive: preempted at step {step}: stopped at step {step} of 5000; start the same run again to continue\n"
    )
    assert main(["logs", str(runs.root / "failed")]) == 0
    assert "fit no format" in capsys.readouterr().out
    found = states(capsys, runs.root)
    assert (found["alive"]["state"], found["alive"]["left_s"]) == ("preempted", None)
    for name, words in (("failed", "change what the message says"), ("killed", "the same command continues it")):
        done = without_torch("status", runs.root / name)
        assert (done.returncode, done.stderr) == (0, "") and words in " ".join(done.stdout.split()), done.stdout
        assert max(map(len, done.stdout.replace(str(runs.root), "runs").splitlines())) <= 80


@whole("a restart is in tests/faults/test_ranks.py, following and stopping in the test before")
def test_logs_and_stop_of_a_run_that_restarts(runs):
    """By two ranks of a launcher that starts them again after USR2."""
    launcher = runs.start("again", "launcher.processes=2", "strategy=ddp", "launcher.retry={preempted:9}")
    runs.wait_for_step("again", 2, launcher)
    with (runs.root / "followed").open("w") as out:
        words = command("logs", runs.root / "again", "lines=0", "--follow")
        followed = subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=out, stderr=subprocess.STDOUT)
    runs.started.append(followed)
    wait(lambda: "| loss " in (runs.root / "followed").read_text(), "a step", launcher)
    launcher.send_signal(signal.SIGUSR2)
    wait(lambda: "started again (preempted; 8 more times)" in runs.said("again"), "a restart", launcher)
    saved = runs.status("again")["step"]
    runs.wait_for_step("again", saved + 1, launcher)
    assert followed.poll() is None
    stopped = subprocess.run(
        command("stop", runs.root / "again"), cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert (stopped.returncode, runs.end(launcher)) == (0, 75), stopped.stderr + runs.said("again")
    assert f"(kill -TERM {launcher.pid})" in stopped.stdout
    step = runs.status("again")["step"]
    assert step > saved and f"saved at step {step}: " in stopped.stdout
    assert runs.said("again").count("started again") == 1
    assert followed.wait(timeout=seconds(60)) == 0
    said = (runs.root / "followed").read_text()
    assert f"step {saved}/5000 |" in said and f"step {saved + 1}/5000 |" in said and f"step {step}/5000 |" in said
    assert f"again: preempted at step {step}: " in said


def test_status_of_one_run_with_its_checkpoints_and_their_damage(runs, capsys):
    words = ["budget.steps=6", "checkpoint.every_steps=2", "checkpoint.keep=9", "evaluation.every_steps=2"]
    words += [f"data.eval_path={runs.root / 'eval.jsonl'}", f"checkpoint.fallback_dir={runs.root / 'far'}"]
    code, said = runs.run("first", *words)
    assert code == 0, said
    run = runs.root / "first"
    assert main(["status", str(run), "--verify"]) == 0
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = min((row["eval/loss"], row["step"]) for row in rows if row.get("eval/loss") and row["step"])
    assert out.startswith(f"{run}: done, step 6/6 (100.0%)\n")
    assert len(re.findall(r"^  step-00000[246] .* intact", out, re.MULTILINE)) == 3, out
    assert re.findall(r"step-00000(\d) .*; best: eval/loss ([\d.]+)", out) == [(str(best[1]), f"{best[0]:.4f}")]

    far = next(iter((runs.root / "far").glob("first-*")), None) or _far(runs, run)
    shutil.move(run / "checkpoints" / "step-000004", far / "step-000004")
    (run / "checkpoints" / "given-up-1").mkdir()
    shutil.copytree(run / "checkpoints" / "step-000002", run / "checkpoints" / "given-up-1" / "step-000002")
    tensors = next((run / "checkpoints" / "step-000006").glob("rank-*"))
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    assert main(["status", str(run), "--verify"]) == 69
    out = " ".join(capsys.readouterr().out.split())
    assert f"{tensors.name} does not have the bytes that were written" in out
    assert f"in {far}" in out and "given up, in given-up-1" in out
    assert main(["status", str(runs.root), "--verify", "--json"]) == 69
    told = json.loads(capsys.readouterr().out)
    assert list(told["damaged"]) == [str(tensors.parent)]


def _far(runs, run):
    """The run's part of `checkpoint.fallback_dir`, which it makes only when it needs it."""
    from trainer.checkpoints.layout import checkpoint_dirs_of

    far = checkpoint_dirs_of(run, str(runs.root / "far"))[1]
    far.mkdir(parents=True)
    return far
