"""The scripts on a real SLURM of two nodes, with a stand-in for the worker: signals, requeue, preemption, arrays."""

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from launch.cluster.slurm import render_train_script
from launch.config.frozen import config_yaml
from tests.helpers.covering import EVERYTHING, whole
from tests.helpers.models import tiny_model_dir
from tests.slurm.cluster import Cluster, wait_for
from trainer.config.run import Preflight, RunConfig, SlurmConfig

pytestmark = pytest.mark.slurm
CLONE = Path(__file__).parents[2]


class Job:
    """One submitted job and its run directory."""

    def __init__(self, cluster: Cluster, job_id: str, run: Path) -> None:
        self.cluster, self.id, self.run = cluster, job_id, run

    def wait_step(self, step: int = 1) -> None:
        """Signals before a worker's first step may come before it listens."""
        beat = self.run / "beat.json"
        wait_for(
            lambda: beat.exists() and json.loads(beat.read_text())["step"] >= step, 60, f"step {step} of {self.run}"
        )

    def signal(self, *words: str) -> None:
        self.cluster.on("ctl", "scancel", *words, self.id)

    def starts(self) -> list[dict]:
        return [json.loads(line) for line in (self.run / "starts.jsonl").read_text().splitlines()]

    def logs(self) -> str:
        return "".join(log.read_text() for log in sorted((self.run / "logs").iterdir()))


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A directory to submit from, whose `launch` is the stand-in, with odd characters in its name; the rest is the clone's."""
    site = tmp_path / 'it\'s a "site"'
    (site / "launch").mkdir(parents=True)
    (site / "launch" / "__init__.py").write_text("__path__ = __import__('pkgutil').extend_path(__path__, __name__)\n")
    shutil.copy(Path(__file__).with_name("standin.py"), site / "launch" / "train.py")
    return site


def environment(steps: int = 20, gate: Path = Path("/")) -> dict[str, str]:
    own = {"OMP_NUM_THREADS": "1", "STANDIN_STEPS": str(steps), "STANDIN_GATE": str(gate), "PYTHON": sys.executable}
    return os.environ | own | {"PYTHONPATH": str(CLONE)}  # the rest of the packages, behind the site's


def submit(
    cluster: Cluster, site: Path, runs: list[str], *, steps: int = 20, gate: Path = Path("/"), **launcher: object
) -> list[Job]:
    """Render, for two nodes unless told, and submit; one job for each run (the tasks of an array)."""
    settings = {"nodes": 2, "preflight": Preflight.none, **launcher}
    config = RunConfig(launcher=SlurmConfig(**settings))  # type: ignore[arg-type]
    dirs = [site / "runs" / run for run in runs]
    for run in dirs:
        (run / "logs").mkdir(parents=True)
        (run / "config.yaml").write_text(config_yaml(config))
    script = site / "script"
    script.write_text(render_train_script(config, dirs, code_dir=site, cwd=site))
    job = cluster.sbatch(str(script), cwd=Path("/"), env=environment(steps, gate))
    return [Job(cluster, f"{job}_{i}" if len(dirs) > 1 else job, run) for i, run in enumerate(dirs)]


def test_rendered_array_saves_at_usr2_and_requeues_the_signalled_task_alone(cluster: Cluster, site: Path) -> None:
    """One task is told before it has a step, the other while it trains, its script and all of its processes alike."""
    # The last task's own job id is the array's: a requeue by that id would start every task again.
    hold = site / "hold"
    setup = ['export GREETING="hello there"', 'echo "$GREETING from $SLURMD_NODENAME"']
    setup.append(f"while [ -e {shlex.quote(str(hold))} ]; do sleep 0.1; done")
    nodes = 2 if EVERYTHING else 1  # on two they are told apart below, and requeued in test_training.py
    gate = site / "gate"
    hold.touch()
    early, job = submit(cluster, site, ["early", "a b 100%j"], steps=8, gate=gate, setup=setup, nodes=nodes)
    wait_for(lambda: any("hello" in out.read_text() for out in (early.run / "logs").glob("*_0.out")), 60, "its script")
    early.signal("--batch", "--signal=USR2")
    hold.unlink()
    job.wait_step()
    job.signal("--full", "--signal=USR2")
    wait_for((job.run / "starts.jsonl").exists, 60, "the end of its first start")
    gate.touch()
    ended = cluster.wait(job.id)
    logs = job.logs()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), logs
    first, second = job.starts()
    assert (first["from"], first["state"]) == (0, "preempted")
    assert second == {"from": first["to"], "to": 8, "state": "done"}
    if nodes == 2:  # in SLURM's order, so that the first log is rank 0's
        assert all(f"rank {rank} of 2 on {host}, threads 1" in logs for rank, host in enumerate(("n9", "n10"))), logs
    assert len(re.findall(rf"^rank 0 of {nodes} on n\d+, threads 1", logs, re.MULTILINE)) == 2, logs
    ended = cluster.wait(early.id)
    logs = early.logs()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), logs
    assert "told to stop before its ranks were started; it is to be requeued" in logs
    assert [start["state"] for start in early.starts()] == ["done"]
    record = json.loads((job.run / "job.json").read_text())
    assert (record["job"], record["start"], record["code"], record["goes_on"]) == (job.id, 1, 0, False)


@whole("the array that is requeued takes the same way")
def test_restart_limit_ends_with_75_and_scancel_is_final(cluster: Cluster, site: Path) -> None:
    [limited] = submit(cluster, site, ["limited"], steps=600, retry={"preempted": 0})
    [cancelled] = submit(cluster, site, ["cancelled"], steps=600)
    limited.wait_step()
    limited.signal("--signal=USR2")
    cancelled.wait_step()
    cancelled.signal()
    ended = cluster.wait(limited.id)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "75:0"), limited.logs()
    ended = cluster.wait(cancelled.id)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")
    assert [start["state"] for start in cancelled.starts()] == ["preempted"]  # saved all the same


@whole("it trains in test_following.py, and the other script, which is the same but for its head, is requeued")
def test_script_for_people_is_requeued_once_by_slurm_and_later_by_itself(cluster: Cluster, site: Path) -> None:
    shutil.copytree(CLONE / "slurm", site / "slurm")
    tiny_model_dir(site / "model")
    (site / "data, and 'more'.jsonl").write_text('{"text": "x"}\n')
    words = ["model.path=model", "data.path='data, and \\'more\\'.jsonl'", "budget.steps=3", "run.dir=~/runs/a b"]
    words += ["strategy=ddp", "batch.global=8", "launcher.preflight=none", "launcher.code=clone"]
    env = environment(50) | {"HOME": str(site), "PROCESSES": "1"}
    job_id = cluster.sbatch("--nodes=2", "slurm/train.sbatch", *words, cwd=site, env=env)
    job = Job(cluster, job_id, site / "runs" / "a b")
    job.wait_step()
    evict = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    cluster.wait(cluster.sbatch(*evict, cwd=site))
    job.wait_step(job.starts()[0]["to"] + 2)
    job.signal("--signal=USR2")
    ended = cluster.wait(job.id)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "2"), job.logs()
    starts = job.starts()
    assert [start["state"] for start in starts] == ["preempted", "preempted", "done"]
    assert [start["from"] for start in starts[1:]] == [start["to"] for start in starts[:-1]]
    said = (site / f"shardtune-{job_id}.out").read_text()
    assert said.count("not requeued from here") == 1
    assert said.count("; it is to be requeued") == 1


@whole("test_script.py asks the same of the script with a stand-in for srun")
def test_a_crash_is_not_requeued_on_an_old_status(cluster: Cluster, site: Path) -> None:
    (site / "launch" / "train.py").write_text("raise SystemExit('broken')")
    run = site / "runs" / "crash"
    run.mkdir(parents=True)
    (run / "status.json").write_text('{"state": "preempted"}')
    [job] = submit(cluster, site, ["crash"])
    ended = cluster.wait(job.id)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0")
    assert "broken" in job.logs()


@whole("the array that is requeued takes the same way")
def test_requeue_of_a_lost_rank_is_as_often_as_asked(cluster: Cluster, site: Path) -> None:
    lost = """
import json, os, pathlib
from trainer.reporting.status import job_start_fields
failure = {"retry": "node_fail", **job_start_fields()}
(pathlib.Path(os.environ["SHARDTUNE_RUN_DIR"]) / "failure.json").write_text(json.dumps(failure))
raise SystemExit("lost")
"""
    (site / "launch" / "train.py").write_text(lost)
    [job] = submit(cluster, site, ["lost"], retry={"node_fail": 1})
    ended = cluster.wait(job.id)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "1"), job.logs()
    assert job.logs().count("a rank was lost; it is to be requeued") == 1
    assert "not requeued, since that happened more than 1 times" in job.logs()


APPTAINER = """#!/bin/bash
printf '%q ' "$@" >>"{0}/asked-$SLURM_NODEID"
[ "$1 $2" = "exec --nv" ] || exit 3
shift 2
while [ "${{1#--}}" != "$1" ]; do [ "$1" = --pwd ] && cd "$2"; shift 2; done
[ "$1" = "{0}/an image's.sif" ] || exit 4
shift
IN_BOX=apptainer exec "$@"
"""
SRUN = """#!/bin/bash
[ "$1" = --help ] && {{ echo "  --container-image=[USER@]IMAGE"; exit; }}
printf '%q ' "$@" >>"{0}/asked-srun"
words=() kept=()
for word in "$@"; do
  case $word in --container-*|--no-container-*) kept+=("$word") ;; *) words+=("$word") ;; esac
done
[ ${{#kept[@]}} = 0 ] || export IN_BOX=pyxis
exec /usr/bin/srun "${{words[@]}}"
"""


@pytest.mark.parametrize("way", ["apptainer", *(["pyxis"] if EVERYTHING else [])])
def test_container_ranks_run_in_the_image_and_the_script_outside(cluster: Cluster, site: Path, way: str) -> None:
    """With stand-ins that note what they are given and start the rest; the ranks and the set-up see that they are inside."""
    (site / "bin").mkdir()
    (site / "an image's.sif").write_text("")
    name, text = ("apptainer", APPTAINER) if way == "apptainer" else ("srun", SRUN)
    (site / "bin" / name).write_text(text.format(str(site).replace('"', '\\"')))
    (site / "bin" / name).chmod(0o755)
    image = str(site / "an image's.sif") if way == "apptainer" else "nvcr.io#lab/an image:1"
    mounts = ["/scratch of mine:/scratch:ro"]
    env = environment(3) | {"PATH": f"{site / 'bin'}:{os.environ['PATH']}"}
    setup = ['echo "set up in ${IN_BOX:-the open} at $PWD"']
    config = SlurmConfig(nodes=2, preflight=Preflight.none, container=image, container_mounts=mounts, setup=setup)
    config.python, config.container_workdir = sys.executable, "/usr/share"
    run = site / "runs" / way
    (run / "logs").mkdir(parents=True)
    whole = RunConfig(launcher=config)
    (run / "config.yaml").write_text(config_yaml(whole))
    (site / "script").write_text(render_train_script(whole, [run], code_dir=site, cwd=site))
    job = cluster.sbatch(str(site / "script"), cwd=site, env=env)
    assert cluster.wait(job)["JobState"] == "COMPLETED", Job(cluster, job, run).logs()
    logs = Job(cluster, job, run).logs()
    assert logs.count(f"set up in {way} at ") == 2 and "the open" not in logs, logs
    for rank, host in enumerate(("n9", "n10")):
        assert f"rank {rank} of 2 on {host}" in logs  # in SLURM's order, so that the first log is rank 0's
    if way == "apptainer":
        assert logs.count("set up in apptainer at /usr/share") == 2
        asked = shlex.split((site / "asked-1").read_text())
        assert mounts[0] in asked and f"{site}:{site}" in asked
    else:
        asked = shlex.split((site / "asked-srun").read_text())
        assert f"--container-image={image}" in asked and "--container-workdir=/usr/share" in asked
        [mounted] = [word for word in asked if word.startswith("--container-mounts=")]
        assert mounts[0] in mounted.split(",") or mounted.endswith(f",{mounts[0]}")
