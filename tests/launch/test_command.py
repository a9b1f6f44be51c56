"""The command line without a run: verbs, help, exit codes, torchrun's arguments, what the environment decides."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import main as command
from launch import train
from launch.cluster import torchrun
from launch.cluster.hosts import ThisHost
from launch.compare import command as compare
from launch.config import process_role
from launch.config.help_text import fold_help
from launch.evaluate import command as evaluate
from launch.evaluate.kinds import KINDS_READ
from launch.export import command as export
from launch.prepare import command as prepare
from launch.runs import logs_command
from strategies.errors import ConfigError, DataError, Preempted, StorageError
from trainer.config.run import LauncherConfig
from trainer.evaluation.tasks.registry import TASK_KINDS
from trainer.reporting.status import clear_failure, read_failure, read_status, record_failure, write_status

ROOT = Path(__file__).parents[2]


def imported_after(statement):
    code = f"{statement}\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_help_imports_nothing_heavy():
    for words in ("['--help']", "['train', '--help']", "['frobnicate']"):
        modules = imported_after(f"from launch.main import main; main({words})")
        assert not {"torch", "hydra", "omegaconf", "yaml", "transformers", "trainer.config.run"} & modules


def test_a_wheel_carries_every_package(monkeypatch):
    asked = {}
    monkeypatch.setattr("setuptools.setup", lambda **settings: asked.update(settings))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    tops = ("conf", "launch", "strategies", "trainer")
    there = {path.parent.relative_to(ROOT).as_posix() for top in tops for path in ROOT.glob(f"{top}/**/__init__.py")}
    assert {path.replace("/", ".") for path in there} == set(asked["packages"])


def test_help_is_one_screen():
    lines = command.usage_text().splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 80
    assert list(command.DESCRIPTION_BY_VERB) == [verb for group in command.VERBS_BY_GROUP.values() for verb in group]


def test_help_lists_verbs_groups_and_choices(capsys):
    assert command.main(["--help"]) == 0
    assert command.main([]) == 0
    assert "prepare" in capsys.readouterr().out
    assert command.main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    for part in ("batch.global", "zero3", "gemma2_2b_lora_zero2", "--dry-run"):
        assert part in out


HELP = """
import sys
import time
from launch.main import DESCRIPTION_BY_VERB, main

HEAVY = {"torch", "transformers", "hydra", "omegaconf", "peft", "datasets"}
for words in (["--help"], *([verb, "--help"] for verb in DESCRIPTION_BY_VERB), ["prepare", "--print", "--help"]):
    began = time.process_time()
    assert main(words) == 0
    assert not HEAVY & set(sys.modules), (words, HEAVY & set(sys.modules))
    assert time.process_time() - began < 0.3, words
"""


def test_help_of_every_verb_fits_80_columns_and_is_there_at_once():
    done = subprocess.run([sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if len(line) > 80] == []


def test_help_begins_with_the_command_and_an_example(capsys):
    for verb in command.DESCRIPTION_BY_VERB:
        assert command.main([verb, "--help"]) == 0
        usage, _, rest = capsys.readouterr().out.partition("\n\n")
        assert usage.startswith(f"usage: shardtune {verb} ")
        assert re.match(r"  (\w+=\S+ )?shardtune ", rest), f"{verb}: an example is to follow the usage"


def test_folding_help_loses_no_word():
    for text in (evaluate.USAGE, train.usage_text(), export.USAGE, compare.USAGE, prepare.USAGE, logs_command.USAGE):
        assert fold_help(text).replace(" \\\n", " ").split() == text.replace("\\\n", " ").split()
    row = "  --flag   " + "word " * 20
    assert fold_help(row).splitlines()[1].startswith(" " * 11 + "word")
    assert fold_help(f"  shardtune train {'key=value ' * 9}").splitlines()[0].endswith(" \\")


def test_help_of_evaluate_lists_the_registered_task_kinds():
    assert {kind: task.rows_description for kind, task in TASK_KINDS.items()} == KINDS_READ, (
        "launch/evaluate/kinds.py is to say the same"
    )


def test_a_misspelt_verb_is_named(capsys):
    assert command.main(["trian"]) == 64
    assert "did you mean train?" in capsys.readouterr().err
    assert command.main(["merge", "runs/first"]) == 64
    assert "did you mean export <run> merge=true?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError(["a=1: no", "b=2: no"]), 64, "2 problems\n  a=1: no\n  b=2: no"),
        (DataError("x.jsonl:3: no"), 65, "x.jsonl:3: no"),
        (StorageError("full"), 74, "full"),
        (Preempted("asked"), 75, "asked"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("ours"), 70, "Traceback"),
    ],
)
def test_errors_become_messages_and_codes(monkeypatch, capsys, error, code, said):
    def fail(argv):
        raise error

    monkeypatch.setitem(sys.modules, "launch.prepare.command", SimpleNamespace(main=fail))
    assert command.main(["prepare"]) == code
    err = capsys.readouterr().err
    assert said in err
    assert ("Traceback" in err) == (code == 70)


def test_cfg_prints_what_would_be_frozen(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert command.main(["train", "--cfg", "optim.lr=-1", "batch.micro=0"]) == 64
    said = capsys.readouterr()
    assert "lr: -1" in said.out
    assert "optim.lr=-1: must be" in said.err and "batch.micro=0" in said.err and "model.path" not in said.err
    assert command.main(["train", "--cfg", "strategy=zero2", "model.path=m"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# sha256: ")
    assert "stage: 2" in out


def test_dry_run_describes_the_plan(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.jsonl").write_text("{}")
    described = []
    answer = SimpleNamespace(text="the plan", facts={}, exit_code=0)
    plan = SimpleNamespace(describe_run=lambda config: described.append(config) or answer)
    monkeypatch.setitem(sys.modules, "launch.plan.dry_run", plan)
    assert command.main(["train", "--dry-run", "model.path=m", "data.path=d.jsonl", "budget.steps=1"]) == 0
    assert capsys.readouterr().out == "the plan\n"
    assert described[0].budget.steps == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "d.jsonl"]  # nothing was started or frozen


@pytest.mark.parametrize(
    ("launcher", "expected"),
    [
        (
            LauncherConfig(processes=8),
            "--nproc-per-node=8 --shutdown-timeout=5 --standalone --local-addr=localhost -m launch.train",
        ),
        (
            LauncherConfig(processes=4, nodes=2, rdzv="n1:29400"),
            "--nproc-per-node=4 --shutdown-timeout=5 --nnodes=2 --rdzv-endpoint=n1:29400 --rdzv-id=abc "
            "--local-addr=10.0.0.2 --rdzv-backend=static --node-rank=1 -m launch.train",
        ),
        (
            LauncherConfig(processes=1, nodes=3, rdzv="n1:29400"),
            "--nproc-per-node=1 --shutdown-timeout=5 --nnodes=3 --rdzv-endpoint=n1:29400 --rdzv-id=abc "
            "--local-addr=10.0.0.2 --rdzv-backend=c10d --rdzv-conf=is_host=0 -m launch.train",
        ),
    ],
)
def test_torchrun_arguments(launcher, expected):
    place = ThisHost(1, "10.0.0.2", "eth0", is_first=False)
    assert torchrun.torchrun_arguments(launcher, "abc", place) == expected.split()
    from torch.distributed.run import parse_args

    parsed = parse_args(torchrun.torchrun_arguments(launcher, "abc", place))
    assert (parsed.module, parsed.training_script) == (True, "launch.train")


MET = {"MASTER_ADDR": "n1", "MASTER_PORT": "29400"}
STEP = {"SLURM_JOB_ID": "100", "SLURM_NNODES": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}


@pytest.mark.parametrize(
    ("env", "worker"),
    [
        ({}, False),
        (MET | {"RANK": "0", "WORLD_SIZE": "1"}, True),
        (STEP | {"SLURM_PROCID": "3"}, True),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, False),  # srun --pty bash
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_NNODES": "1"}, False),  # the batch script itself
        (MET | {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "SLURM_NNODES": "2"}, True),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, False),  # a step that was asked for one host
    ],
)
def test_environment_tells_workers_from_launchers(env, worker):
    assert process_role.is_rank_process(env) is worker


@pytest.mark.parametrize("left", [{"RANK": "0"}, {"WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "2"}])
def test_rank_variables_left_over_from_a_job_are_refused(left):
    with pytest.raises(ConfigError, match=r"MASTER_ADDR and MASTER_PORT, so left over from a job\? `unset RANK"):
        process_role.is_rank_process(left)


def test_rank_that_the_job_does_not_have_is_refused():
    with pytest.raises(ConfigError, match="RANK=5: must be below WORLD_SIZE=2"):
        process_role.is_rank_process(MET | {"RANK": "5", "WORLD_SIZE": "2"})


@pytest.mark.parametrize("flag", ["--cfg", "--dry-run", "--json", "-m"])
def test_rank_variables_left_over_from_a_job_are_refused_whatever_train_does(monkeypatch, flag):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match="left over from a job"):
        train.main([flag, "model.path=models/llama"])


@pytest.mark.parametrize("shell", [{"SLURM_STEP_ID": "4294967290"}, {"SLURM_STEP_ID": "0", "SLURM_PTY_PORT": "41000"}])
def test_slurm_shell_on_one_node_of_several_is_refused(shell):
    step = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NNODES": "1", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    with pytest.raises(
        ConfigError, match=r"in a terminal on one of 2 hosts only; start it with `srun --nodes=2 .*--overlap"
    ):
        process_role.is_rank_process(step | shell)
    assert not process_role.is_rank_process(step | shell | {"SLURM_JOB_NUM_NODES": "1"})


@pytest.mark.parametrize("extra", [{}, {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}])
def test_slurm_start_outside_srun_on_one_of_several_hosts_is_refused(extra):
    with pytest.raises(ConfigError, match="outside srun"):
        process_role.is_rank_process({"SLURM_NNODES": "2", "SLURM_PROCID": "0", **extra})


def test_slurm_variables_become_those_of_torchrun(monkeypatch):
    monkeypatch.setattr(process_role, "first_host", lambda nodes: {"n[1-2]": "n1"}[nodes])
    env = STEP | {
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "3,1",
        "SLURM_STEP_NODELIST": "n[1-2]",
        "SLURM_RESTART_COUNT": "2",
    }
    assert process_role.torchrun_variables(env) == {
        "RANK": "3",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_PORT": "20702",
        "MASTER_ADDR": "n1",
    }
    assert process_role.torchrun_variables(env | {"MASTER_ADDR": "ib0"}).get("MASTER_ADDR") is None
    assert process_role.master_port(env | {"SLURM_STEP_ID": "1"}) == 20833  # two steps of one allocation
    assert process_role.torchrun_variables({"RANK": "0"}) == {}


@pytest.mark.parametrize(
    ("counts", "node", "expected"), [("4(x3),2", 0, "4"), ("4(x3),2", 2, "4"), ("4(x3),2", 3, "2"), ("8", 0, "8")]
)
def test_tasks_per_node_shorthand(counts, node, expected):
    assert process_role.tasks_on_node(counts, node) == expected


def test_status_is_replaced_whole_and_failures_are_written_once(tmp_path):
    write_status(tmp_path, "running", step=1)
    write_status(tmp_path, "done", step=2)
    assert (read_status(tmp_path)["state"], read_status(tmp_path)["step"]) == ("done", 2)
    with pytest.raises(ValueError, match="resting"):
        write_status(tmp_path, "resting")
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
    (tmp_path / "status.json").write_text('{"state": "do')
    assert read_status(tmp_path) == {}
    assert record_failure(tmp_path, 1, DataError("first"), "data", 3)
    assert not record_failure(tmp_path, 0, ValueError("second"), "train", 4)
    failure = json.loads((tmp_path / "failure.json").read_text())
    assert (failure["rank"], failure["message"], failure["exit_code"], failure["step"]) == (1, "first", 65, 3)
    assert record_failure(tmp_path, 2, ValueError("known better"), "killed", replace=True)
    assert read_failure(tmp_path)["rank"] == 2
    clear_failure(tmp_path)
    assert read_failure(tmp_path) == {}
