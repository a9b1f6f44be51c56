"""The trainer itself over two SLURM nodes, one Gloo rank each: a curve that a requeue leaves alone."""

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from tests.helpers.covering import whole
from tests.helpers.launching import command_here
from tests.helpers.models import tiny_model_dir
from tests.helpers.tokenizers import tiny_tokenizer, write_chat_data
from tests.slurm.cluster import Cluster, wait_for

pytestmark = pytest.mark.slurm
CLONE = Path(__file__).parents[2]
STEPS = 12
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The settings that both runs share."""
    site = tmp_path_factory.mktemp("site")
    tiny_tokenizer().save_pretrained(tiny_model_dir(site / "model"))
    data = write_chat_data(site / "train.jsonl", 48)
    settings = (
        f"strategy=fsdp2 run.device=cpu precision=fp32 optim.lr=1e-3 budget.steps={STEPS} batch.global=8 batch.micro=2"
    )
    paths = [f"model.path={site / 'model'}", f"data.path={data}", f"data.cache_dir={site / 'cache'}"]
    return [
        *settings.split(),
        *paths,
        "logging.wandb=disabled",
        "logging.every_steps=1",
        "logging.report=false",
        "export.at_end=false",
    ]


def losses(run: Path) -> list[float]:
    whole, _, _ = (run / "metrics.jsonl").read_text().rpartition("\n")  # one may be being written
    return [row["loss"] for row in map(json.loads, whole.splitlines()) if "loss" in row]


def alone(words: list[str]) -> list[str]:
    """The same run in one process."""
    return [word.replace("strategy=fsdp2", "strategy=single") for word in words] + ["launcher.processes=1"]


def state(run: Path) -> str:
    path = run / "status.json"
    return json.loads(path.read_text())["state"] if path.exists() else "none"


def logs(run: Path) -> str:
    return "".join(path.read_text() for path in sorted((run / "logs").iterdir()))


def test_requeue_continues_the_curve_with_the_code_that_was_submitted(
    cluster: Cluster, words: list[str], tmp_path: Path
) -> None:
    """That of one process; the script for people trains, and is stopped, in test_following.py."""
    calm, torn, clone = tmp_path / "calm", tmp_path / "torn", tmp_path / "clone"
    for part in ("conf", "launch", "strategies", "trainer", "slurm"):
        shutil.copytree(CLONE / part, clone / part, ignore=shutil.ignore_patterns("__pycache__"))
    submit = [sys.executable, "-m", "launch.main", "submit", *words, f"run.dir={torn}", "launcher.nodes=2"]
    submit += ["launcher.preflight=none", f"launcher.stage={tmp_path / 'disk'}"]
    gate, pace = tmp_path / "gate", CLONE / "tests" / "faults" / "pace"
    held = {"PYTHONPATH": f"{clone}:{pace}", "PACE_GATE": str(gate)}  # until the signal comes
    said = cluster.on("ctl", *submit, cwd=clone, env=ENV | held).stdout
    job = re.search(r"submitted job (\d+)", said)
    assert job, said

    assert command_here(["train", *alone(words), f"run.dir={calm}"]) == 0
    wait_for(lambda: (torn / "metrics.jsonl").exists() and losses(torn), 120, "the first step")
    for file in [*clone.rglob("*.py"), *clone.rglob("*.yaml")]:
        file.write_text("} what was changed since")
    cluster.on("ctl", "scancel", "--signal=USR2", job[1])
    ended = cluster.wait(job[1], 120)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), logs(torn)
    assert (state(calm), state(torn)) == ("done", "done")
    assert len(losses(calm)) == STEPS
    assert losses(torn) == pytest.approx(losses(calm), rel=1e-5)
    record = json.loads((torn / "run.json").read_text())
    assert [start["start"] for start in record["jobs"]] == [0, 1] and record["jobs"][1]["elapsed_s"] > 1
    assert all(Path(copy["to"]).is_relative_to(tmp_path / "disk") for copy in record["staged"].values())
    assert logs(torn).count("staging model on ") == 1, "the start after the requeue finds the copies"
    assert not [*(tmp_path / "disk").rglob("model.safetensors")], "a run that is done takes them away"
    assert f"job {job[1]}, start 1: 0:0" in logs(torn) and "Slurm accounting storage is disabled" in logs(torn)
    [code] = (torn / "code").iterdir()
    assert json.loads((torn / "run.json").read_text())["git_revision"] == f"code {code.name}"


@whole("ranks of torchrun take the same ways")
def test_srun_without_torchrun_trains_the_same_also_on_another_number_of_nodes(
    cluster: Cluster, words: list[str], tmp_path: Path
) -> None:
    """No torchrun: SLURM starts the ranks, which take their places from its variables. Between starts `--nodes` changes."""
    run, calm, pace = tmp_path / "native", tmp_path / "alone", CLONE / "tests" / "faults" / "pace"
    short = [word for word in words if not word.startswith("budget.")] + ["budget.steps=60", "schedule=constant"]
    tasks = f"srun --ntasks-per-node=1 {shlex.join([sys.executable, '-m', 'launch.train', *short, f'run.dir={run}'])}"
    nodes = (2, 1, 2)
    for number, count in enumerate(nodes):
        env = ENV | {"PYTHONPATH": f"{CLONE}:{pace}"}  # a rest after each step, so that a signal comes before the last
        told, least = tmp_path / f"{number}.out", 3 + (len(losses(run)) if number else 0)
        job = cluster.sbatch(f"--output={told}", f"--nodes={count}", f"--wrap={tasks}", cwd=CLONE, env=env)
        last = number == len(nodes) - 1
        if not last:
            wait_for(lambda: (run / "metrics.jsonl").exists(), 120, "the first step")
            wait_for(lambda least=least: len(losses(run)) >= least, 120, f"step {least}")
            cluster.on("ctl", "scancel", "--signal=USR2", job)
        code = "75:0" if count == 1 and not last else "0:0"  # ranks of several do not end each other
        assert cluster.wait(job, 120)["ExitCode"] == code, told.read_text()
        assert state(run) == ("done" if last else "preempted"), told.read_text()
        record = json.loads((run / "run.json").read_text())
        assert record["world_size"] == count and record["slurm_job_id"] == job
        assert ("resumed from step-" in told.read_text()) == (number > 0)
    assert command_here(["train", *alone(short), f"run.dir={calm}"]) == 0
    assert len(losses(run)) == 60
    assert losses(run) == pytest.approx(losses(calm), rel=1e-5)
