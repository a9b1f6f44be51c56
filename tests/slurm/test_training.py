"""The trainer itself over two SLURM nodes, one Gloo rank each: both scripts, and a curve that a requeue leaves alone."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from launch.main import main
from tests.helpers.models import tiny_model_dir
from tests.helpers.tokenizers import tiny_tokenizer, write_chat_data
from tests.slurm.cluster import Cluster, wait_for

pytestmark = pytest.mark.slurm
CLONE = Path(__file__).parents[2]
STEPS = 150
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
    return [*settings.split(), *paths, "logging.wandb=disabled", "logging.every_steps=1"]


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def state(run: Path) -> str:
    path = run / "status.json"
    return json.loads(path.read_text())["state"] if path.exists() else "none"


def logs(run: Path) -> str:
    return "".join(path.read_text() for path in sorted((run / "logs").iterdir()))


def test_both_scripts_train_and_a_requeued_run_continues_its_curve(
    cluster: Cluster, words: list[str], tmp_path: Path
) -> None:
    calm, torn = tmp_path / "calm", tmp_path / "torn"
    out, unasked = f"--output={tmp_path}/calm.out", "launcher.preflight=none"
    calm_id = cluster.sbatch(
        out, "--nodes=2", "slurm/train.sbatch", *words, f"run.dir={calm}", unasked, cwd=CLONE, env=ENV
    )
    submit = [sys.executable, "-m", "launch.main", "submit", *words, f"run.dir={torn}", "launcher.nodes=2", unasked]
    said = cluster.on("ctl", *submit, cwd=CLONE, env=ENV).stdout
    torn_id = re.search(r"submitted job (\d+)", said)
    assert torn_id, said

    wait_for(lambda: (torn / "metrics.jsonl").exists() and losses(torn), 120, "the first step")
    cluster.on("ctl", "scancel", "--signal=USR2", torn_id[1])
    ended = cluster.wait(torn_id[1], 120)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), logs(torn)
    assert cluster.wait(calm_id, 120)["JobState"] == "COMPLETED", logs(calm)
    assert (state(calm), state(torn)) == ("done", "done")
    assert len(losses(calm)) == STEPS
    assert losses(torn) == pytest.approx(losses(calm), rel=1e-5)


def test_native_srun_is_the_same_run(cluster: Cluster, words: list[str], tmp_path: Path) -> None:
    """No torchrun: SLURM starts the ranks, which take their places from its variables."""
    run = tmp_path / "native"
    short = [word for word in words if not word.startswith("budget.")] + ["budget.steps=5", "schedule=constant"]
    tasks = ["srun", "--nodes=2", "--ntasks-per-node=1", sys.executable, "-m", "launch.train"]
    cluster.on("ctl", *tasks, *short, f"run.dir={run}", cwd=CLONE, env=ENV)
    assert state(run) == "done", logs(run)
    record = json.loads((run / "run.json").read_text())
    assert record["world_size"] == 2 and record["slurm_job_id"]
    assert len(losses(run)) == 5
    alone = tmp_path / "alone"
    settings = [word.replace("strategy=fsdp2", "strategy=single") for word in short]
    assert main(["train", *settings, f"run.dir={alone}", "launcher.processes=1"]) == 0
    assert losses(run) == pytest.approx(losses(alone), rel=1e-5)
