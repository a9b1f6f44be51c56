"""Scripts by hand and rendered: shellcheck has nothing to say, a wheel carries them, a real sbatch takes their options."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cluster import pipeline
from launch.cluster.slurm import render_train_script
from launch.cluster.submission import script_text_by_part
from tests.slurm.cluster import Cluster
from trainer.config.run import Code, Preflight, RunConfig, SlurmConfig

CLONE = Path(__file__).parents[2]
BY_HAND = sorted((CLONE / "slurm").glob("*.sbatch"))
SOME = {
    "defaults": {},
    "two nodes": {"nodes": 2},
    "times": {"time": "1-00:00:00", "signal_lead_s": 600},
    "high": {"partition": "high", "exclusive": True},
    "cpus": {"cpus_per_task": 4, "mem": "2G"},
    "names": {"job_name": "a.b-c_1", "comment": 'it\'s "a" $run'},
    "excluded": {"exclude": "n10", "nodes": 1},
    "after": {"dependency": "singleton", "mail": "NONE"},
    "no requeue": {"retry": {"preempted": 0, "node_fail": 0}, "preflight": Preflight.none},
    "set up": {"setup": ["module() { :; }", "module load 'a b'"], "python": "/opt/a b/bin/python"},
    "clone": {"code": Code.clone, "extra": ["--hold"]},
    "container": {"container": "/images/a b.sif", "container_mounts": ["/scratch:/scratch:ro"]},
}


def rendered(name: str, tmp_path: Path, **more) -> Path:
    script = tmp_path / f"{name}.sbatch"
    runs = [tmp_path / "a run", tmp_path / "b"] if name == "names" else [tmp_path / "a run"]
    script.write_text(
        render_train_script(RunConfig(launcher=SlurmConfig(**SOME[name], **more)), runs, code_dir=CLONE, cwd=tmp_path)
    )
    return script


def test_scripts_pass_shellcheck(tmp_path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck")
    scripts = [
        *BY_HAND,
        CLONE / "slurm" / "env.sh",
        *(rendered(name, tmp_path) for name in ("defaults", "set up", "container")),
    ]
    config = RunConfig(launcher=SlurmConfig(pipeline=["prepare", "train"]))
    (tmp_path / "part.sbatch").write_text(script_text_by_part(config, [tmp_path / "run"], CLONE)["prepare"])
    done = subprocess.run(
        ["shellcheck", "-s", "bash", "-x", *map(str, scripts), str(tmp_path / "part.sbatch")],
        cwd=CLONE,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert pipeline.PART_SCRIPT_BODY in (tmp_path / "part.sbatch").read_text()


def test_scripts_are_in_the_wheel() -> None:
    lines = (CLONE / "setup.py").read_text().partition("SCRIPTS = ")[2]
    there = {path.name for path in (CLONE / "slurm").iterdir() if path.is_file()}
    assert set(eval(lines.partition("\n]\n")[0] + "]")) == there


def test_array_script_takes_the_words_of_its_line(tmp_path: Path) -> None:
    """With a stand-in for train.sbatch that shows what it was given."""
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "train.sbatch").write_text('printf "<%s>" "$@"')
    (tmp_path / "points.txt").write_text("optim.lr=1e-4\noptim.lr=2e-4 data.path='a b.jsonl'\n")
    command = ["bash", str(CLONE / "slurm" / "array.sbatch"), "points.txt", "model.path=m"]
    for task, said in (("2", "<model.path=m><optim.lr=2e-4><data.path=a b.jsonl>"), ("3", "")):
        env = os.environ | {"SLURM_ARRAY_TASK_ID": task}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.stdout == said and (done.returncode == 64) == (task == "3")
        assert ("has no line 3; submit with --array=1-2" in done.stderr) == (task == "3"), done.stderr


@pytest.mark.slurm
def test_scripts_are_accepted_by_a_real_sbatch(cluster: Cluster, tmp_path: Path) -> None:
    for script in [*BY_HAND, *(rendered(name, tmp_path) for name in SOME)]:
        done = cluster.on("ctl", "sbatch", "--test-only", str(script), cwd=CLONE, env=dict(os.environ), check=False)
        assert done.returncode == 0 and "to start at" in done.stdout, f"{script}: {done.stdout}"
    refused = rendered("defaults", tmp_path, gres="shard:8")
    done = cluster.on("ctl", "sbatch", "--test-only", str(refused), cwd=CLONE, env=dict(os.environ), check=False)
    assert done.returncode and "Invalid generic resource (gres) specification" in done.stdout
    assert sys.executable in rendered("defaults", tmp_path).read_text()
