"""What is put before a rank's command for a container, and what is refused; the real cluster has it in test_signals.py."""

import itertools
from pathlib import Path

import pytest

from launch.cluster import containers
from launch.cluster.preflight.coordinator import srun_check_command
from launch.main import main
from strategies.errors import ConfigError
from tests.helpers.models import tiny_model_dir
from trainer.config.resuming import settings_as_dict
from trainer.config.run import Container, RunConfig, SlurmConfig


def tree(tmp_path: Path, **launcher) -> dict:
    config = RunConfig(launcher=SlurmConfig(**launcher))
    config.data.cache_dir, config.data.path = str(tmp_path / "cache"), [str(tmp_path / "data" / "*.jsonl"), "hub:a/b"]
    config.model.path = "org/name"
    return settings_as_dict(config)


def test_container_runtime_is_chosen_by_the_image(tmp_path):
    ways = {
        image: containers.container_runtime({"container": image})
        for image in ("a.sif", "docker://a/b:1", "nvcr.io#a/b:1", str(tmp_path))
    }
    assert ways == {
        "a.sif": "apptainer",
        "docker://a/b:1": "apptainer",
        "nvcr.io#a/b:1": "pyxis",
        str(tmp_path): "apptainer",
    }
    assert containers.container_runtime({"container": "a.sif", "container_by": Container.pyxis}) == "pyxis"
    assert containers.container_command(tree(tmp_path), []) == ([], [])


def test_container_mounts_what_the_run_reads_and_writes_once(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "state" / "shardtune").mkdir(parents=True)  # what this user typed before, which verbs look up there
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path / "here")
    own = tree(tmp_path, container="a.sif", container_mounts=["/scratch:/scratch:ro"])
    step, before = containers.container_command(own, [tmp_path / "here" / "runs" / "a"])
    assert (
        step == []
        and before[:3] == ["apptainer", "exec", "--nv"]
        and before[-3:] == ["--pwd", str(Path.cwd()), "a.sif"]
    )
    binds = [mount for flag, mount in itertools.pairwise(before) if flag == "--bind"]
    places = [tmp_path / name for name in ("cache", "data", "here", "state/shardtune")]
    assert sorted(binds) == sorted([*(f"{place}:{place}" for place in places), "/scratch:/scratch:ro"])
    step, before = containers.container_command(tree(tmp_path, container="a#b:1", container_workdir="/w"), [])
    assert before == [] and "--container-image=a#b:1" in step and "--container-workdir=/w" in step
    with pytest.raises(ConfigError, match="mounts cannot carry"):
        containers.container_command(own, [Path("/a:b")])
    command = srun_check_command(2, "python3", step, {}, container_prefix=["apptainer"])
    assert command.argv.index("--container-image=a#b:1") < command.argv.index("apptainer") < command.argv.index("bash")


def test_container_that_cannot_start_is_refused_before_a_job_waits(tmp_path, monkeypatch, capsys):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", "echo --help"), ("sbatch", "echo 17"), ("sinfo", "exit 1")):
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    tiny_model_dir(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text('{"text": "x"}\n')
    words = [f"model.path={tmp_path / 'model'}", f"data.path={tmp_path / 'data.jsonl'}", "budget.steps=1"]
    assert main(["submit", *words, f"run.dir={tmp_path / 'run'}", "launcher.container=nvcr.io#a/b"]) == 64
    assert "the plugin pyxis is missing" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no apptainer on"):
        containers.refuse_unavailable_container({"container": "a.sif"})
    (tools / "apptainer").write_text("#!/bin/sh\n")
    (tools / "apptainer").chmod(0o755)
    with pytest.raises(ConfigError, match="does not see it"):
        containers.refuse_unavailable_container({"container": str(tmp_path / "a.sif")})
    containers.refuse_unavailable_container({"container": "docker://a/b"})
