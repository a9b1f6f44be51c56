"""`shardtune compare` over axes: real points on two ranks, one refused, one that fails, stopped by Ctrl-C and gone on with."""

import base64
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from launch.compare import progress
from launch.compare.points import plan_points
from launch.main import main
from launch.runs import freeze
from strategies.errors import ConfigError
from tests.helpers.building import model_dir
from tests.helpers.launching import clean_environment
from tests.helpers.speed import seconds
from tests.helpers.tokenizers import write_chat_data
from tests.helpers.wandb_files import record, summary
from tests.helpers.wandb_server import wandb_server
from tests.helpers.warm import command_warm, forked
from trainer.reporting.status import RunState, write_status


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    path = tmp_path_factory.mktemp("points")
    write_chat_data(path / "train.jsonl", 32)
    model_dir(path)
    return path


def words(site, *more: str) -> list[str]:
    return [f"model.path={site / 'llama'}", f"data.path={site / 'train.jsonl'}", "debug=cpu2", *more]


POINTS = [
    "optim.lr=1e-4,1e30",
    "strategy=ddp,fsdp2,single",
    "optim.max_skipped_steps=2",
    "compare.steps=4",
    "logging.wandb=offline",
    "logging.report=false",
    "export.at_end=false",
]
POINTS += ["compare.repeats=2", "compare.skip=[optim.lr=1e30+strategy=fsdp2,optim.lr=1e30+strategy=single]"]


@pytest.fixture(scope="module")
def compared(site):
    """(what Ctrl-C left, the same command's answer, the time at which the first point was done)."""
    command = [
        sys.executable,
        "-m",
        "launch.main",
        "compare",
        *words(site, *POINTS),
        f"data.cache_dir={site / 'cache'}",
    ]
    command += [f"to={site / 'to'}", "--json"]
    # Of what is read back of W&B's files the second command writes enough.
    env = {key: value for key, value in clean_environment(WANDB_MODE="disabled").items() if key != "OMP_NUM_THREADS"}
    reads, writes = os.pipe()
    # What Ctrl-C does to ranks of torchrun is shown in test_processes.py.
    with (site / "out").open("w") as out, os.fdopen(reads) as errors:
        first = forked(command, env, out.fileno(), errors=writes, cwd=site, ranks=True)
        os.close(writes)
        watch = threading.Timer(seconds(300), first.kill)
        watch.start()
        told = ""
        for line in errors:
            told += line
            if line.startswith("[2/6] lr1e-4-fsdp2 -> "):
                os.killpg(first.pid, signal.SIGINT)  # as a terminal does
                break
        rest = errors.read()
    watch.cancel()
    assert first.wait(seconds(60)) == 130, told + rest
    out = (site / "out").read_text()
    status = site / "to/lr1e-4-ddp/status.json"
    done_at = status.stat().st_mtime_ns
    answer, said = io.StringIO(), io.StringIO()
    with contextlib.chdir(site), contextlib.redirect_stdout(answer), contextlib.redirect_stderr(said):
        code = command_warm(command[3:])
    assert code == 0, answer.getvalue()[-3000:] + said.getvalue()[-3000:]
    return json.loads(out), json.loads(answer.getvalue()), told + rest, said.getvalue(), done_at


def test_compare_points_keep_what_was_measured_at_ctrl_c(compared):
    stopped, _, told, _, _ = compared
    states = {run["name"]: run["state"] for run in stopped["runs"]}
    # Saved, killed before it could save, or told before its processes were there: wherever Ctrl-C meets it.
    assert states.pop("lr1e-4-fsdp2") in ("preempted", "failed", "not started")
    assert states == {
        "lr1e-4-ddp": "not started",  # its second repeat
        "lr1e-4-single": "refused",
        "lr1e30-ddp": "not started",
    }
    assert stopped["runs"][0]["measured"]["steps"] == 4
    assert "stopped; the same command continues" in told


def test_compare_points_go_on_with_the_same_command(compared, site):
    """What was done is not run again, and every second time the order is the other way round."""
    _, found, _, told, done_at = compared
    assert (site / "to/lr1e-4-ddp/status.json").stat().st_mtime_ns == done_at
    assert "1 of 6 runs are done already" in told
    started = re.findall(r"^\[(\d)/6\] (\S+) -> \S+/(\S+)$", told, re.MULTILINE)
    assert [(int(number), run) for number, _, run in started] == [
        (2, "lr1e-4-fsdp2"),
        (3, "lr1e30-ddp"),
        (5, "lr1e-4-fsdp2-repeat2"),  # what had failed was not tried twice by one command
        (6, "lr1e-4-ddp-repeat2"),
    ]
    assert [run["measured"]["repeats"] for run in found["runs"]] == [2, 2, 0, 1]


def test_compare_points_end_with_parity_failures_and_repeats(compared, site):
    """Parity, a failed and a refused row with their reasons, repeats, and one preparation for all."""
    _, found, _, told, _ = compared
    ddp, fsdp2, single, failed = found["runs"]
    assert found["first"] == "lr1e-4-ddp" and fsdp2["against"] == "lr1e-4-ddp"
    assert (
        fsdp2["loss_difference"]["same"]
        and fsdp2["loss_difference"]["early"] <= 1e-5
        and fsdp2["loss_difference"]["steps"] == 4
    )
    assert [ddp["state"], fsdp2["state"]] == ["done", "done"]
    assert single["state"] == "refused" and "runs in one process, not 2" in single["reason"]
    assert failed["state"] == "failed" and "gradients were not finite for 2 steps" in failed["reason"]
    assert "lr1e30-ddp: failed at step 3" in told and "output.log" in told
    assert "gradients were not finite" in (site / "to/lr1e30-ddp/logs/output.log").read_text()
    for run in (ddp, fsdp2):
        took = run["measured"]
        speeds = [json.loads((site / name / "run.json").read_text())["outcome"]["speed"] for name in run["repeats"]]
        assert took["tokens_per_s_repeats"] == [pytest.approx(speed["tokens_per_s"]) for speed in speeds]
        assert took["tokens_per_s"] == pytest.approx(sum(took["tokens_per_s_repeats"]) / 2)
        receipts = [json.loads((site / name / "run.json").read_text())["receipt"] for name in run["repeats"]]
        assert took["planned_gib"] == receipts[0]["predicted"]["memory_gib"] > 0
        assert took["memory_gib"] == max(receipt["measured"]["memory_gib"] for receipt in receipts)
        assert took["start_s"] == pytest.approx(sum(r["measured"]["start_s"] for r in receipts) / 2)
        exchanged = [receipts[0][key]["exchanged_bytes"] for key in ("predicted", "measured")]
        sums = [sum(each.values()) / 2**30 for each in exchanged]
        assert [took["planned_exchanged_gib"], took["exchanged_gib"]] == sums and sums[1] == pytest.approx(
            sums[0], rel=0.02
        )
        assert took["exchanged_bytes"] == exchanged[1] and 0 < took["exposed_s"] < took["start_s"]
        assert min(r["measured"]["checkpoint_s"] for r in receipts) <= took["checkpoint_s"]
        parts = took["parts_s"]
        assert min(parts[name] for name in ("forward", "backward", "optimizer")) > 0
        assert sum(parts.values()) == pytest.approx(max(took["step_s"], sum(parts.values()) - parts["rest"]))
    assert len({json.loads(p.read_text())["data_directory"] for p in (site / "to").glob("*/run.json")}) == 1


def test_compare_points_directory_read_again_gives_the_same_comparison(compared, site, capsys, monkeypatch):
    monkeypatch.chdir(site)
    assert main(["compare", "to", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert [run["verdict"] for run in again["runs"]] == [run["verdict"] for run in compared[1]["runs"]]
    assert [run["measured"] for run in again["runs"]] == [run["measured"] for run in compared[1]["runs"]]
    page = (site / "to/compare.md").read_text()
    assert "## Costs" in page and "refused: strategy=single" in page


def test_wandb_has_a_named_group(compared, site):
    """Read back with W&B's own tools: names, group, columns of the axes, how each ended."""
    for run, lr, code in (("lr1e-4-ddp-repeat2", 1e-4, 0), ("lr1e-4-fsdp2-repeat2", 1e-4, 0), ("lr1e30-ddp", 1e30, 70)):
        part = sorted((site / "to" / run / "wandb").glob("offline-run-*"))[-1]
        told, found = record(part, "run"), summary(part)
        assert (told["display_name"], told["run_group"], found["exit_code"]) == (run, "to", code)
        assert (found["config"]["lr"], found["config"]["world_size"]) == (lr, 2)
        assert found["config"]["strategy"] in run


def test_wandb_gets_a_section_for_each_question_and_a_report(compared, site):
    """The script is run as a user runs it, after `wandb sync`; a stand-in keeps what both send."""
    pytest.importorskip("wandb_workspaces")
    part = sorted((site / "to/lr1e-4-ddp-repeat2/wandb").glob("offline-run-*"))[-1]
    run_id = part.name.rpartition("-")[2]
    with wandb_server() as server:
        env = {**clean_environment(), **server.environment, "WANDB_SILENT": "true"}
        for words in (["-m", "wandb", "sync", str(part)], [str(site / "to/workspace.py")]):
            done = subprocess.run([sys.executable, *words], env=env, cwd=site, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-2000:]
    assert len(server.rows(run_id)) == 4 and server.summary(run_id)["state"] == "done"
    assert server.ending(run_id)["exitcode"] == 0

    (view,) = server.variables("UpsertView2")
    (report,) = server.variables("upsertView")
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("us", "shardtune", "to")
    section = json.loads(view["spec"])["section"]
    questions = ["Which is fastest?", "What does each need?", "Is it the same loss?", "What does each cost?"]
    sections = {each["name"]: each["panels"] for each in section["panelBankConfig"]["sections"]}
    assert list(sections) == ["Points", "Which settings are best?", *questions]
    loss = sections["Is it the same loss?"][0]["config"]
    assert (loss["metrics"], loss["xAxis"]) == (["train/loss"], "train/global_step")
    assert {"train/loss", "train/global_step"} <= {*server.rows(run_id)[0]}
    (runs,) = section["runSets"]
    assert [key["name"] for key in runs["grouping"]] == ["strategy.value", "lr.value"]
    ids = sorted(id_in_wandb(run) for run in (site / "to").glob("*/run.json"))
    (filtered,) = runs["filters"]["filters"]
    assert (filtered["key"]["name"], filtered["value"]) == ("name", ids)
    baseline = base64.b64decode(runs["baselineRunId"]).decode()
    assert baseline == f"Run:v1:{id_in_wandb(site / 'to/lr1e-4-ddp/run.json')}:shardtune:us"
    blocks = json.loads(report["spec"])["blocks"]
    titles = [block["children"][0]["text"] for block in blocks if block["type"] == "heading"]
    assert titles == ["Answer", "Points", "Which settings are best?", *questions, "Verdict on each point"]
    assert report["type"] == "runs/draft"
    (table,) = [block["content"] for block in blocks if block["type"] == "markdown-block"]
    answer, _, same_table = sections["Points"][0]["config"]["value"].partition("\n\n")
    assert table == same_table and "lr1e-4-fsdp2" in answer
    header, _, *rows = table.splitlines()
    assert header.startswith("| run | strategy | lr | steps | loss |") and len(rows) == 4
    assert rows[2].startswith("| lr1e-4-single | single | 1e-4 | - ") and "refused: strategy=single" in rows[2]


def id_in_wandb(run_json: Path) -> str:
    parts = sorted(run_json.parent.glob("wandb/offline-run-*"))
    return parts[-1].name.rpartition("-")[2]


def listed(site, *more: str) -> list[str]:
    return [point.name for point in plan_points(words(site, "strategy=ddp", "compare.steps=2", *more)).points]


def test_compare_points_are_chosen_by_skip_and_where(site):
    axes = ("tuning=full,lora", "optim.lr=2e-5,2e-4")
    assert listed(site, *axes) == ["full-lr2e-5", "full-lr2e-4", "lora-lr2e-5", "lora-lr2e-4"]
    assert listed(site, *axes, "compare.skip=[tuning=full+optim.lr=2e-4]") == [
        "full-lr2e-5",
        "lora-lr2e-5",
        "lora-lr2e-4",
    ]
    where = "compare.where=[tuning=full+optim.lr=2e-5, tuning=lora optim.lr=2e-4]"
    assert listed(site, *axes, where) == ["full-lr2e-5", "lora-lr2e-4"]
    own = ("tuning=full,lora", "tuning.dora=false,true", "optim.lr=2e-5,2e-4", where)
    assert listed(site, *own) == ["full-lr2e-5", "lora-dora_false-lr2e-4", "lora-dora_true-lr2e-4"]
    lists = ("tuning=lora", "tuning.targets=[q_proj,v_proj],[q_proj]")
    assert listed(site, *lists) == ["targets_q_proj_v_proj", "targets_q_proj"]
    assert listed(site, *lists, "compare.repeats=2", "compare.skip=[tuning.targets=[q_proj,v_proj]]") == [
        "targets_q_proj"
    ]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["strategy=ddp"], "nothing to compare: no setting has several values"),
        (["strategy=ddp,fsdp2", "compare.skip=[strategy=ddp]"], "the conditions leave no two points"),
        (
            ["strategy=ddp,fsdp2", "compare.skip=[strategy=zero2]"],
            "compare.skip: strategy=zero2: strategy takes ddp, fsdp2",
        ),
        (["strategy=ddp,fsdp2", "compare.where=[tuning=lora+strategy=ddp]"], "tuning=lora: no axis of this comparison"),
        (["strategy=ddp,fsdp2", "compare.where=[strategy=ddp]"], "says nothing more of such points"),
        (["strategy=ddp,fspd2"], "fspd2: strategy=fspd2: no such choice"),
        (["strategy=ddp,fsdp2", "optim.lrr=1"], "optim.lrr=1: there is no setting optim.lrr"),
        (["strategy=ddp,ddp"], "ddp-2: the same as another point"),
        (["strategy=ddp,fsdp2", "compare.repeat=2"], "compare.repeat=2: there is no setting compare.repeat"),
        (["strategy=ddp,fsdp2", "compare.repeats=0"], "compare.repeats=0: must be at least 1"),
        (["strategy=ddp,fsdp2", "budget.epochs=1"], "compare.steps=2: budget.epochs says how long too"),
        (["strategy=ddp,fsdp2", "run.dir=x"], "run.dir: the points have directories of their own"),
        (["strategy=single,single2"], "no such choice"),
        (["strategy=ddp,fsdp2", "batch.micro=3"], "batch"),
    ],
)
def test_compare_points_refuse_what_cannot_be_compared(site, more, said):
    with pytest.raises(ConfigError) as refused:
        plan_points(words(site, "compare.steps=2", *more))
    assert said in str(refused.value)
    assert str(refused.value).count("there is no setting optim.lrr") <= 1  # of all points, once


def test_compare_points_dry_run_lists_and_runs_nothing(site, capsys, monkeypatch):
    monkeypatch.chdir(site)
    assert main(["compare", *words(site, "strategy=ddp,single", "compare.steps=2"), "to=dry", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "only where" not in out
    assert "2 points in dry" in out and "refused: strategy=single: runs in one process, not 2" in out
    assert not (site / "dry").exists()
    assert main(["compare", *words(site, "strategy=ddp,fsdp2"), "dry"]) == 64
    assert "name runs that exist, or settings of new ones, not both" in capsys.readouterr().err


def test_compare_points_by_slurm_are_one_job_array_of_those_not_done(site, tmp_path, capsys, monkeypatch):
    script = tmp_path / "sbatch"
    script.write_text(f'#!/bin/sh\necho "$2" >>{tmp_path}/asked\necho 7\n')
    script.chmod(0o755)
    (tmp_path / "queue").touch()
    (tmp_path / "squeue").write_text(f"#!/bin/sh\ncat {tmp_path}/queue\n")
    (tmp_path / "squeue").chmod(0o755)
    freeze._cached_queue.cache_clear()
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    asked = [
        f"model.path={site / 'llama'}",
        f"data.path={site / 'train.jsonl'}",
        "launcher=slurm",
        "strategy=ddp,fsdp2,zero2",
    ]
    asked += ["launcher.gpus_per_node=2", "compare.steps=4"]
    new = f"to={tmp_path / 'new'}"
    assert main(["compare", *asked, new]) == 0
    (submitted,) = (tmp_path / "asked").read_text().splitlines()
    assert submitted == str(tmp_path / "new/ddp/train.sbatch") and "--array=0-2" in Path(submitted).read_text()
    said = capsys.readouterr()
    assert "submitted job 7" in said.err and "not started" in said.out
    assert f"to compare the points, now or when their jobs have ended: shardtune compare {tmp_path / 'new'}" in said.err
    assert "logging.name" not in said.out, "what a point is called is no difference of its own"
    write_status(tmp_path / "new/ddp", RunState.done, step=4)
    assert main(["compare", *asked, new]) == 0
    assert (tmp_path / "asked").read_text().splitlines()[1] == str(tmp_path / "new/fsdp2/train.sbatch")
    assert "--array=0-1" in (tmp_path / "new/fsdp2/train.sbatch").read_text()
    # Of the second array one task waits, and the other has failed: that one alone is submitted, as a job of its own.
    row = [
        "7_0",
        "12",
        "PENDING",
        "Resources",
        "N/A",
        "1:00",
        "",
        str(tmp_path),
        "x",
        submitted.replace("ddp", "fsdp2"),
    ]
    (tmp_path / "queue").write_text("\x1f".join(row) + "\n")
    script.write_text(f'#!/bin/sh\necho "$2" >>{tmp_path}/asked\necho 8\n')
    freeze._cached_queue.cache_clear()
    assert main(["compare", *asked, new]) == 0
    assert f"{tmp_path / 'new/fsdp2'}: job 7_0 pending: waits for nodes" in capsys.readouterr().err
    asked_for = (tmp_path / "asked").read_text().splitlines()[2:]
    assert asked_for == [str(tmp_path / "new/zero2/train.sbatch")]
    # All wait: fsdp2 by the array whose script it has, zero2 by its own job.
    own_job = ["8", "8", "RUNNING", *row[3:-1], submitted.replace("ddp", "zero2")]
    (tmp_path / "queue").write_text("\x1f".join(row) + "\n" + "\x1f".join(own_job) + "\n")
    freeze._cached_queue.cache_clear()
    assert main(["compare", *asked, new]) == 0
    assert "zero2: job 8 RUNNING; not submitted again" in capsys.readouterr().err
    assert (tmp_path / "asked").read_text().splitlines()[2:] == asked_for
    (tmp_path / "squeue").unlink()
    (tmp_path / "asked").write_text("1\n2\n")
    freeze._cached_queue.cache_clear()
    assert main(["compare", *asked, "launcher.nodes=1,2", f"to={tmp_path / 'other'}"]) == 0
    scripts = [Path(line).read_text() for line in (tmp_path / "asked").read_text().splitlines()[2:]]
    requests = [re.findall(r"^#SBATCH --(?:array|nodes)=(\S+)$", script, re.MULTILINE) for script in scripts]
    assert requests == [["0-2", "1"], ["0-2", "2"]]  # one array for all points that ask for the same
    capsys.readouterr()
    assert main(["compare", *asked, new, "compare.steps=5"]) == 64
    said = capsys.readouterr().err
    assert f"to={tmp_path / 'new'}: holds other runs" in said and "budget.steps: 4 there, 5 here" in said


def test_compare_points_remaining_time_is_from_the_steps_and_then_from_earlier_runs(tmp_path, monkeypatch, capsys):
    """Ten seconds to start, two a step, ten steps: by hand, in a clock of its own."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    told = progress.RunsProgress(3, 0)

    def at(seconds: float, step: int) -> str:
        clock[0] = seconds
        (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {n}}}\n' for n in range(1, step + 1)))
        last_step = progress._last_step(tmp_path)
        told._run.note_step(last_step, seconds)
        return told._progress_line(last_step, seconds)

    told.start_run("a", tmp_path, 10)
    assert at(5, 0) == "[1/3] a: starting"
    assert at(12, 1) == "[1/3] a: step 1 of 10"
    assert at(20, 5) == "[1/3] a: step 5 of 10, about 1 min 10 s left"  # 10 s of this run, twice 30 s of the others
    clock[0] = 30
    told.end_run(0, tmp_path / "output.log")
    told.skip_run()
    told.start_run("c", tmp_path, 10)
    assert at(35, 10) == "[3/3] c: step 10 of 10, about 25 s left"
    assert "[1/3] a: done in 30 s" in capsys.readouterr().err
