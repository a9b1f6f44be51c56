"""What a job script asks of Python, and what keeps a second job out of a run, with stand-ins for SLURM's commands."""

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cluster import job
from launch.cluster.preflight.coordinator import preflight_request
from launch.config import frozen
from launch.config.compose import compose_config
from launch.config.frozen import config_yaml
from launch.config.process_role import expand_hosts, master_port
from launch.main import main
from launch.runs import freeze
from launch.runs.job_record import read_job_record, record_job_end, record_job_start
from launch.runs.queue import write_submitted_job_ids
from strategies.errors import ConfigError, OutOfMemory
from tests.helpers.launching import ROOT
from tests.helpers.models import tiny_model_dir
from tests.launch.runs.made import stand_in_for_squeue
from trainer.config.run import Preflight, RunConfig, RunSettings, SlurmConfig
from trainer.reporting.status import record_failure, write_status
from trainer.session.lease import RunDirInUse
from trainer.session.lease_owner import owner_of_this_process


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A frozen run, in the third start of job 7 on two nodes."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text("#!/bin/sh\necho n9\necho n10\n")
    (tools / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    for name in ("OMP_NUM_THREADS", "SHARDTUNE_RDZV", "PROCESSES", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    run = tmp_path / "a run"
    run.mkdir()
    launcher = SlurmConfig(nodes=2, gpus_per_node=4, preflight=Preflight.none, retry={"preempted": 5, "node_fail": 1})
    (run / "config.yaml").write_text(config_yaml(RunConfig(launcher=launcher, run=RunSettings(dir=str(run)))))
    own = {"JOB_ID": "7", "JOB_NODELIST": "n[9-10]", "RESTART_COUNT": "2", "CPUS_PER_TASK": "12"}
    for name, value in own.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SHARDTUNE_CONFIG", str(run / "config.yaml"))
    return run


def begun(capfd: pytest.CaptureFixture[str], code: int = 0, *words: str) -> tuple[dict[str, str], str]:
    capfd.readouterr()
    assert job.main(["begin", *words]) == code
    out, err = capfd.readouterr()
    return {key: shlex.split(value)[0] for key, _, value in (line.partition("=") for line in out.splitlines())}, err


def test_preflight_of_a_job_asks_what_the_frozen_run_needs(run):
    request = preflight_request(job.FrozenRun.read(run).settings, num_nodes=2)  # reads strategy and batch, too
    assert (request.num_nodes, request.ranks_per_node, request.gpus_per_node, request.memory_gib) == (2, 4, 4, 0.0)


def test_job_script_gets_its_variables_from_the_frozen_run(run, capfd, monkeypatch):
    told, _ = begun(capfd)
    assert (told["run_dir"], told["logs"], told["job"], told["start"]) == (str(run), str(run / "logs"), "7", "2")
    assert (told["processes"], told["threads"], told["retry_preempted"], told["retry_node_fail"]) == (
        "4",
        "3",
        "5",
        "1",
    )
    assert told["rendezvous"] == f"n9:{master_port(os.environ)}" and told["finished"] == ""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SHARDTUNE_RDZV", "ib0:29400")
    told, _ = begun(capfd)
    assert (told["threads"], told["job"], told["rendezvous"]) == ("2", "5_1", "ib0:29400")


def test_job_script_passes_over_a_port_in_use(run, capfd, monkeypatch):
    first = master_port(os.environ)
    with socket.create_server(("", first)):
        assert begun(capfd)[0]["rendezvous"] == f"n9:{first + 1}"
        monkeypatch.setenv("SHARDTUNE_RDZV", f"{socket.gethostname()}:{first}")
        with pytest.raises(ConfigError, match="another process listens there"):
            job.main(["begin"])


def test_job_script_starts_no_finished_run_nor_one_lost_too_often(run, capfd, monkeypatch):
    write_status(run, "running", step=3)  # as an earlier start of this job left it
    assert begun(capfd)[0]["finished"] == ""  # the first that ended without a word
    with pytest.raises(Exception, match="more than 1 starts ended without a word"):
        job.main(["begin"])
    monkeypatch.setenv("SLURM_JOB_ID", "8")  # another job's are its own
    assert begun(capfd)[0]["finished"] == ""
    write_status(run, "done", step=3)
    told, said = begun(capfd)
    assert told["finished"] == "1" and "already finished" in said


def test_job_script_requeues_an_out_of_memory_run_with_half_its_micro_batch(run, capfd, monkeypatch):
    asked = compose_config(
        ["model.path=m", "budget.steps=3", "launcher=slurm", "batch.global=8", "batch.micro=2"], check=False
    )
    (run / "config.yaml").write_text(f"# sha256: {asked.sha256}\n{asked.yaml}")
    (run / "logs").mkdir()
    monkeypatch.setenv("SHARDTUNE_RUN_DIR", str(run))
    record_failure(run, 1, OutOfMemory("no room"), "training", 7)
    ends = (
        ("", "not requeued, since that happened more than 0 times", 2),
        ("3", "a rank ran out of memory, batch.micro: 2 -> 1; it is to be requeued", 1),
        ("3", "not requeued, since batch.micro cannot be halved", 1),
    )
    for limit, said, micro in ends:
        monkeypatch.setenv("retry_out_of_memory", limit)
        assert job.main(["end", "1", ""]) == 1
        assert said in capfd.readouterr().out
        assert frozen.load_frozen_config(run / "config.yaml").batch["micro"] == micro


def test_job_script_reads_its_words_once_and_refuses_what_sbatch_must_be_told(run, capfd, monkeypatch, tmp_path):
    monkeypatch.delenv("SHARDTUNE_CONFIG")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    tiny_model_dir(tmp_path / "model")
    (tmp_path / "it's a, b.jsonl").write_text('{"text": "x"}\n')
    words = ["model.path=model", "data.path='it\\'s a, b.jsonl'", "budget.steps=3", "strategy=ddp", "batch.global=8"]
    words.append("launcher.preflight=none")
    told, _ = begun(capfd, 0, *words, "run.dir=~/own runs/x", "launcher.processes=2", "batch.micro=1")
    assert (told["run_dir"], told["processes"]) == (f"{tmp_path}/own runs/x", "2")
    assert "it's a, b.jsonl" in (tmp_path / "own runs/x/config.yaml").read_text()
    for word, said in (
        ("launcher.partition=gpu", "give it to sbatch before the script's name"),
        ("launcher=local", "is the script's own"),
        ("launcher.nodes=3", "the job has 2; give sbatch --nodes"),
    ):
        with pytest.raises(ConfigError, match=said):
            job.main(["begin", *words, "batch.micro=1", "batch.global=12", word])


def test_a_run_that_slurm_will_start_is_not_frozen_again(run, monkeypatch, tmp_path, capsys):
    """Its job would train with what the second command has frozen."""
    (run / "train.sbatch").write_text(f"runs=('{run}')\n")
    row = ["17", "17", "PENDING", "Resources", "N/A", "1:00", "", str(tmp_path), "run", f"{run}/train.sbatch"]
    monkeypatch.setenv("PATH", f"{stand_in_for_squeue(tmp_path / 'tools', [row])}:{os.environ['PATH']}")
    freeze._cached_queue.cache_clear()
    monkeypatch.delenv("SLURM_JOB_ID")
    with pytest.raises(
        RunDirInUse, match=r"job 17 is for this run, .* \(it is pending: waits for nodes to become free\)"
    ):
        freeze.raise_if_queued(run)
    tiny_model_dir(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text('{"text": "x"}\n')
    words = [
        f"model.path={tmp_path / 'model'}",
        f"data.path={tmp_path / 'data.jsonl'}",
        "budget.steps=3",
        f"run.dir={run}",
    ]
    assert main(["submit", *words]) == 64
    assert f"`shardtune stop {run}` ends it" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_JOB_ID", "17")  # the job itself may
    freeze.raise_if_queued(run)
    freeze._cached_queue.cache_clear()


def test_submitted_directory_is_refused_while_the_queue_gives_no_answer(run, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", f"{stand_in_for_squeue(tmp_path / 'tools', [])}:{os.environ['PATH']}")
    squeue = tmp_path / "tools" / "squeue"
    squeue.write_text(f"#!/bin/sh\necho asked >>{tmp_path}/asked\necho 'squeue: error: timed out' >&2; exit 1\n")
    freeze._cached_queue.cache_clear()
    monkeypatch.delenv("SLURM_JOB_ID")
    freeze.raise_if_queued(run)
    assert (tmp_path / "asked").read_text().count("asked") == 1, "at once: nobody submitted this directory"
    write_submitted_job_ids([run], "17")
    with pytest.raises(RunDirInUse, match=f"was submitted as job 17; .* if job 17 is over, remove {run}/submitted"):
        freeze.raise_if_queued(run)
    assert (tmp_path / "asked").read_text().count("asked") == 2
    write_status(run, "done", step=9)  # a job that still waits would find nothing to do
    freeze.raise_if_queued(run)
    write_status(run, "failed", step=9)
    monkeypatch.setenv("SLURM_JOB_ID", "17")  # the job itself may
    freeze.raise_if_queued(run)
    monkeypatch.delenv("SLURM_JOB_ID")
    record_job_end(run, "17", 0, 70, reason="failed", will_restart=False)
    freeze.raise_if_queued(run)
    freeze._cached_queue.cache_clear()


def test_job_script_hosts_are_from_the_slurm_variable_and_unlike_parts_are_refused(run, capfd, monkeypatch):
    (Path(os.environ["PATH"].partition(":")[0]) / "scontrol").write_text("#!/bin/sh\necho Welcome to n99, 2 news\n")
    assert begun(capfd)[0]["rendezvous"].startswith("n9:")
    assert expand_hosts("n[9-10],gpu-[08,10-11]-ib,r[1-2]c[0-1],one") == [
        *("n9", "n10", "gpu-08-ib", "gpu-10-ib", "gpu-11-ib", "r1c0", "r1c1", "r2c0", "r2c1", "one")
    ]
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "3")
    with pytest.raises(ConfigError, match=r"SLURM_JOB_NODELIST=n\[9-10\]: names 2 hosts, and SLURM_JOB_NUM_NODES=3"):
        job.main(["begin"])
    record = read_job_record(run)
    assert record is not None and record.is_over and "names 2 hosts" in (record.reason or "")
    monkeypatch.delenv("SLURM_JOB_NUM_NODES")
    monkeypatch.setenv("SLURM_HET_SIZE", "2")
    with pytest.raises(ConfigError, match="a heterogeneous job trains on its first part alone"):
        job.main(["begin"])


def test_starts_that_make_no_step_end_with_75(run, capfd, monkeypatch):
    """As where the time limit leaves no time beside the lead of the signal."""
    (run / "logs").mkdir()
    monkeypatch.setenv("SHARDTUNE_RUN_DIR", str(run))
    monkeypatch.setenv("retry_preempted", "20")
    codes = []
    for start, step in enumerate((4, 9, 9, 9, 9)):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(start))
        record_job_start(run, "7", start, "n[9-10]")
        write_status(run, "preempted", step=step)
        # The third is told before it has a step.
        codes.append(job.main(["end", "75", "", "1" if start == 3 else ""]))
    record = read_job_record(run)
    assert record is not None and (record.idle_starts, record.step, record.is_over) == (3, 9, True)
    assert codes == [75] * 5 and capfd.readouterr().out.count("it is to be requeued") == 4
    assert "3 starts in a row made no step: set a longer launcher.time" in (record.reason or "")


def test_ranks_that_slurm_kills_for_memory_are_started_again_with_half(run, capfd, monkeypatch, tmp_path):
    """The words are those of slurmstepd, in the output of the script; the ranks have left none."""
    asked = compose_config(
        ["model.path=m", "budget.steps=3", "launcher=slurm", "batch.global=8", "batch.micro=2"], check=False
    )
    (run / "config.yaml").write_text(f"# sha256: {asked.sha256}\n{asked.yaml}")
    (run / "logs").mkdir()
    output = tmp_path / "output"
    killed = "slurmstepd-n1: error: StepId=7.0 exceeded memory limit (225480704 > 104857600), being killed\n"
    env = {**os.environ, "SHARDTUNE_RUN_DIR": str(run), "retry_out_of_memory": "1", "PYTHONPATH": str(ROOT)}
    for text, said, micro in (
        (f"{killed}job 7, start 2, on n9\n", "exit code 137 and wrote no reason", 2),  # of an earlier start
        (f"job 7, start 2, on n9\n{killed}", "a rank ran out of memory, batch.micro: 2 -> 1; it is to be requeued", 1),
    ):
        output.write_text(text)
        with output.open("a") as out:
            subprocess.run([sys.executable, "-m", "launch.job", "end", "137", ""], env=env, stdout=out, check=False)
        assert said in output.read_text()
        assert frozen.load_frozen_config(run / "config.yaml").batch["micro"] == micro


def test_the_owner_is_named_with_array_task_and_start(run, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert ", SLURM job 5_1, start 2, since" in owner_of_this_process(1.0).describe()


def test_a_finished_run_is_not_submitted_again(run, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("SLURM_JOB_ID")
    called = tmp_path / "called"
    (tmp_path / "bin/sbatch").write_text(f'#!/bin/sh\necho "$@" >>{called}\necho 5\n')
    (tmp_path / "bin/sbatch").chmod(0o755)
    (tmp_path / "bin/squeue").symlink_to("/bin/true")
    tiny_model_dir(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text('{"text": "x"}\n')
    words = [f"model.path={tmp_path / 'model'}", f"data.path={tmp_path / 'data.jsonl'}", "budget.steps=3"]
    assert main(["submit", *words, f"run.dir={tmp_path / 'new'}"]) == 0
    write_status(tmp_path / "new", "done", step=3)
    capsys.readouterr()
    assert main(["submit", *words, f"run.dir={tmp_path / 'new'}"]) == 0
    assert "already finished with this configuration" in capsys.readouterr().out
    several = [
        "launcher=slurm",
        "launcher.nodes=1,2",
        "strategy=ddp",
        "batch.global=8",
        f"run.dir={tmp_path / 'several'}",
    ]
    assert main(["train", "-m", *words, *several, "optim.lr=1e-3,1e-4"]) == 0
    submitted = [Path(line.split()[-1]) for line in called.read_text().splitlines()]
    assert [str(path.parent.relative_to(tmp_path)) for path in submitted] == ["new", "several/0", "several/2"]
    assert "--nodes=1\n" in submitted[1].read_text() and "--array=0-1\n" in submitted[1].read_text()
    assert "--nodes=2\n" in submitted[2].read_text() and "--array=0-1\n" in submitted[2].read_text()


@pytest.mark.parametrize("argv", [[], ["stop"], ["part", "export"], ["end"], ["end", "x", ""]])
def test_wrong_arguments_are_answered_with_the_three_forms(argv):
    with pytest.raises(
        ConfigError, match=r"begin \[overrides\]; end <exit code .*\]; or part <part> <run directory> <ranks>"
    ):
        job.main(argv)
