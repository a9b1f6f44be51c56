"""What is said, and refused, before a job waits; with a stand-in for sinfo that answers what a real one did."""

import json
import math
from pathlib import Path

import pytest

from launch.cluster.advice import job_notes_if_startable, partitions_of_job, query_partitions, rank_layout_notes
from launch.cluster.array_size import refuse_large_arrays
from launch.config.prices import gpu_hour_price_of_kind
from launch.main import main
from launch.runs.slurm_time import format_slurm_time, parse_slurm_time
from strategies.errors import ConfigError
from trainer.config.run import RunConfig, SlurmConfig
from trainer.config.validate import config_problems

SINFO = """\
main*|main|1:00:00|10:00|3|4|4000|(null)|up
gpu|gpu|2-00:00:00|n/a|4|64|512000|gpu:h100:8(S:0-1)|up
gpu|gpu|2-00:00:00|n/a|8|64|256000|gpu:a100:4|up
free|free|infinite|n/a|1|4|4000|(null)|down
mixed|mixed|infinite|n/a|2|4|4000|(null)|up
mixed|mixed|infinite|n/a|1|64|512000|(null)|up
"""
GROUPED = SINFO.replace("2|4|4000", "3|4+|4000+").replace("mixed|mixed|infinite|n/a|1|64|512000|(null)|up\n", "")
"""As it says it where `--exact` is not asked (its man page)."""


@pytest.fixture
def sinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tool = tmp_path / "bin" / "sinfo"
    tool.parent.mkdir()
    (tmp_path / "answer").write_text(SINFO)
    (tmp_path / "grouped").write_text(GROUPED)
    tool.write_text(f'#!/bin/sh\ncase "$*" in *--exact*) cat {tmp_path}/answer;; *) cat {tmp_path}/grouped;; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    return tool


def advised(run: Path, **launcher) -> str:
    return "\n".join(job_notes_if_startable(RunConfig(launcher=SlurmConfig(**launcher)), [run]))


@pytest.mark.parametrize(
    ("text", "value"),
    [("30", 1800), ("10:30", 630), ("1:00:00", 3600), ("2-12", 216000), ("1-00:30:10", 88210), ("infinite", math.inf)],
)
def test_slurm_times_are_read_as_slurm_writes_them(text, value):
    assert parse_slurm_time(text) == value


def test_slurm_partitions_are_read_from_sinfo(sinfo):
    found = {(part.name, part.gpus): part for part in query_partitions()}
    assert found["gpu", 8].gpu_kinds == {"h100"} and found["gpu", 8].limit_s == 172800 and found["gpu", 4].nodes == 8
    assert (
        found["main", 0].is_default
        and not found["gpu", 4].is_default
        and format_slurm_time(found["free", 0].limit_s) == "any time"
    )


@pytest.mark.parametrize(
    ("named", "found"), [(None, ["main"]), ("free", ["free"]), ("gpu,free", ["gpu", "gpu", "free"]), ("none", [])]
)
def test_a_job_runs_in_the_partitions_that_it_names_else_in_the_default(sinfo, named, found):
    partitions = partitions_of_job(SlurmConfig(partition=named), query_partitions())
    assert [partition.name for partition in partitions] == found


def test_a_job_that_fits_the_larger_nodes_of_a_mixed_partition_is_not_refused(sinfo, tmp_path):
    assert advised(tmp_path, partition="mixed", time="30:00", mem="400G", cpus_per_task=32)
    with pytest.raises(ConfigError, match=r"launcher\.nodes=2: partition mixed has 1 such nodes"):
        advised(tmp_path, partition="mixed", time="30:00", mem="400G", nodes=2)


@pytest.mark.parametrize(
    ("launcher", "said"),
    [
        ({}, "launcher.time=24:00:00: partition main gives 1:00:00 at most"),
        ({"time": "30:00", "nodes": 4}, "launcher.nodes=4: partition main has 3 such nodes"),
        ({"time": "30:00", "gpus_per_node": 1}, "launcher.gpus_per_node=1: the nodes of partition main have none"),
        ({"partition": "gpu", "gpus_per_node": 8, "nodes": 5}, "launcher.nodes=5: partition gpu has 4 such nodes"),
        ({"time": "30:00", "cpus_per_task": 8}, "launcher.cpus_per_task=8: the nodes of partition main have 4"),
        ({"time": "30:00", "mem": "4G"}, "launcher.mem=4G: the nodes of partition main have 4000M at most"),
        ({"partition": "gpu", "mem": "300G", "nodes": 5}, "launcher.nodes=5: partition gpu has 4 such nodes"),
        ({"time": "3:00"}, "launcher.signal_lead_s=180: launcher.time=3:00 (0:03:00) is no longer"),
        ({"partition": "gpus"}, "there is no such partition here; it has main, gpu, free"),
    ],
)
def test_a_job_that_can_never_start_is_refused(sinfo, tmp_path, launcher, said):
    with pytest.raises(ConfigError) as refused:
        advised(tmp_path, **launcher)
    assert [said in problem for problem in refused.value.problems] == [True]


def test_slurm_limits_that_may_be_lifted_and_silent_clusters_refuse_nothing(sinfo, tmp_path):
    advised(tmp_path, qos="long")
    advised(tmp_path, reservation="week")
    sinfo.write_text("#!/bin/sh\nexit 1\n")
    assert "time    1-0:00:00 a start" in advised(tmp_path)


def test_slurm_advice_has_price_and_restarts_as_far_as_they_are_known(sinfo, tmp_path):
    asked = {"partition": "gpu", "gpus_per_node": 8, "nodes": 2, "time": "10:00:00"}
    assert (
        gpu_hour_price_of_kind("h100") == 3.99
        and gpu_hour_price_of_kind("a100") is None
        and gpu_hour_price_of_kind("fake") is None
    )
    said = advised(tmp_path, **asked, gres="gpu:h100:8")
    assert "price   $638 at most a start: 160 GPU hours of $3.99" in said  # 2 x 8 x 10 x 3.99
    assert "160 GPU hours at most a start; what one costs is not known of a100, h100" in advised(tmp_path, **asked)
    assert "starts  not known" in said and "price" not in advised(tmp_path, time="30:00")
    rows = [{"step": step, "loss": 1.0, "step_s": 10.0} for step in range(1, 11)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.json").write_text('{"total_steps": 1010}')
    said = advised(tmp_path, time="1:00:00", retry={"preempted": 1})
    # 1000 steps of 10 s in starts of 3600 - 180 s: three
    assert "2:46:40 of steps are left at 10 s a step: 2 restarts at the limit, but launcher.retry allows 1" in said
    assert "signal_lead_s=" not in said
    slow_rows = [{**row, "step_s": 300.0} for row in rows]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in slow_rows))
    # Five quarters of 300 s are 6.25 minutes: seven, and one more.
    assert "note    a step takes about 300 s, longer than launcher.signal_lead_s=180" in (
        said := advised(tmp_path, time="1:00:00")
    )
    assert "set launcher.signal_lead_s=480" in said


@pytest.mark.parametrize(
    ("launcher", "ranks", "reason"),
    [
        ({"gres": "gpu"}, 1, "launcher.gres=gpu"),
        ({"gres": "gpu:8"}, 8, "launcher.gres=gpu:8"),
        ({"gres": "gpu:h100:8"}, 8, "launcher.gres=gpu:h100:8"),
        ({"gres": "gpu:h100:4,gpu:a100:2,shard:3"}, 6, "gpu:h100:4,gpu:a100:2"),
        ({"gres": "shard:8"}, 1, ""),
        ({"gres": "mps:100"}, 1, ""),
        ({"gpus_per_node": 4, "gres": "gpu:8"}, 4, "launcher.gpus_per_node=4"),
        ({"extra": ["--gpus-per-node=h100:8"]}, 8, "launcher.extra: --gpus-per-node=h100:8"),
        ({"extra": ["-G 16"], "nodes": 2}, 8, "launcher.extra: --gpus=16"),
        ({"extra": ["--gpus-per-task 8"]}, 8, "launcher.extra: --gpus-per-task=8"),
        ({"extra": ["--gres=gpu:2"], "gres": "gpu:8"}, 2, "launcher.extra: --gres=gpu:2"),
        ({"extra": ["--gpus-per-n=8"]}, 8, "--gpus-per-node=8"),
    ],
)
def test_slurm_ranks_of_a_node_are_the_gpus_that_are_asked_for(launcher, ranks, reason):
    slurm = SlurmConfig(**launcher)
    assert slurm.per_node == ranks
    said = "\n".join(rank_layout_notes(slurm))
    assert reason in said and bool(said) == bool(reason)


def test_slurm_advice_names_idle_gpus_and_the_price_of_all(sinfo, tmp_path):
    said = advised(tmp_path, partition="gpu", gres="gpu:h100:8", processes=1, nodes=2, time="10:00:00")
    assert "note    7 of 8 GPUs stay idle on each node: launcher.gres=gpu:h100:8, but launcher.processes=1" in said
    assert "160 GPU hours" in said
    with pytest.raises(ConfigError, match=r"launcher\.gres=gpu:8: the nodes of partition main have none"):
        advised(tmp_path, gres="gpu:8", time="30:00")


def test_slurm_advice_names_a_partition_that_is_down_and_refuses_too_large_a_sweep(
    sinfo, tmp_path, monkeypatch, capsys
):
    assert "note    partition free is not up: no job starts there until it is" in advised(tmp_path, partition="free")
    assert "not up" not in advised(tmp_path, partition="gpu")
    scontrol = sinfo.with_name("scontrol")
    scontrol.write_text("#!/bin/sh\necho 'MaxArraySize            = 20'\n")
    scontrol.chmod(0o755)
    monkeypatch.setattr("launch.config.compose.compose_config", None)  # no point is composed
    words = ["launcher=slurm", "model.path=m", "optim.lr=1e-4,2e-4", "run.seed=range(0,11)"]
    assert main(["train", "-m", *words]) == 64
    assert "22 runs are one job array, and SLURM takes 20 at most here (MaxArraySize)" in capsys.readouterr().err
    assert main(["compare", *words[:3], "compare.repeats=11"]) == 64
    assert "22 runs are one job array" in capsys.readouterr().err
    refuse_large_arrays([[*words[:2], f"optim.lr={n}", f"launcher.nodes={n % 2}"] for n in range(40)])  # two arrays


def test_slurm_options_that_contradict_the_script_are_refused_by_name(sinfo, tmp_path):
    extra = ["--array=0-2", "-o /tmp/x", "--no-requeue", "--sig=B:USR2@60", "-N2"]
    problems = "\n".join(config_problems(RunConfig(launcher=SlurmConfig(extra=extra, nodes=3)), world_size=3))
    for option in ("--array=0-2", "--output=/tmp/x", "--signal=B:USR2@60", "--nodes=2"):
        assert f"launcher.extra: {option}: " in problems
    assert "requeue:" not in problems
    uneven = RunConfig(launcher=SlurmConfig(extra=["--gpus=10"], nodes=4))
    assert "--gpus=10 cannot be shared evenly by launcher.nodes=4" in "\n".join(config_problems(uneven, world_size=8))
    said = advised(tmp_path, extra=["--no-requeue", "--time=2:00:00", "--partition=gpu"])
    assert "time    2:00:00 a start, 180 s before its end it saves and ends with 75, not requeued" in said
    assert "partition gpu gives 2-0:00:00" in said
