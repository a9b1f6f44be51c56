"""A comparison whose points are the tasks of one job array."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from launch.main import main
from tests.helpers.covering import whole
from tests.helpers.models import tiny_model_dir
from tests.helpers.tokenizers import tiny_tokenizer, write_chat_data
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm
CLONE = Path(__file__).parents[2]


@whole("three starts of a job; a stand-in for sbatch shows the array in tests/launch/compare/test_points.py")
def test_slurm_comparison_with_a_failed_point_has_a_row_for_it_and_does_the_others(
    cluster: Cluster, tmp_path: Path, capsys
) -> None:
    tiny_tokenizer().save_pretrained(tiny_model_dir(tmp_path / "model"))
    data = [write_chat_data(tmp_path / name, 16) for name in ("a.jsonl", "b.jsonl")]
    (tmp_path / "bad.jsonl").write_text('{"messages": 3}\n' * 8)
    words = [f"model.path={tmp_path / 'model'}", f"data.path={data[0]},{data[1]},{tmp_path / 'bad.jsonl'}"]
    words += ["launcher=slurm", "launcher.preflight=none", "run.device=cpu", "precision=fp32", "run.matmul=blas"]
    words += ["batch.global=4", "compare.steps=2", f"data.cache_dir={tmp_path / 'cache'}", "logging.wandb=disabled"]
    command = [sys.executable, "-m", "launch.main", "compare", *words, "logging.report=false", f"to={tmp_path / 'to'}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    said = cluster.on("ctl", *command, cwd=CLONE, env=env).stdout
    (job,) = re.findall(r"submitted job (\d+)", said)
    assert f"when their jobs have ended: shardtune compare {tmp_path / 'to'}" in said
    states = [cluster.wait(f"{job}_{task}", 120)["JobState"] for task in range(3)]
    assert states == ["COMPLETED", "COMPLETED", "FAILED"]

    capsys.readouterr()
    assert main(["compare", str(tmp_path / "to"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["runs"]
    assert [(row["name"], row["measured"]["steps"]) for row in rows] == [
        ("a.jsonl", 2),
        ("b.jsonl", 2),
        ("bad.jsonl", 0),
    ]
    assert rows[2]["state"] == "failed" and "data.max_bad_share=0" in rows[2]["reason"]
    nodes = f"NodeName={','.join(cluster.nodes)}"
    cluster.on("ctl", "scontrol", "update", nodes, "State=DRAIN", "Reason=test")  # what is submitted now waits
    again = cluster.on("ctl", *command, cwd=CLONE, env=env).stdout
    ((job, script),) = re.findall(r"submitted job (\d+): (\S+)", again)
    assert script == str(tmp_path / "to/bad.jsonl/train.sbatch"), "what failed is tried once more, alone"
    waiting = cluster.on("ctl", *command, cwd=CLONE, env=env).stdout
    cluster.on("ctl", "scancel", job)
    cluster.on("ctl", "scontrol", "update", nodes, "State=RESUME")
    assert f"bad.jsonl: job {job} pending" in waiting and "not submitted again" in waiting
    assert "submitted job" not in waiting


@whole("two starts of a job; tests/launch/compare/test_page.py shows the script of a search that has ended")
def test_slurm_array_of_a_sweep_leaves_a_script_that_shows_all_its_points_in_wandb(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Each job that ends writes the script anew, so that the last one knows the ids that W&B has given to all points."""
    tiny_tokenizer().save_pretrained(tiny_model_dir(tmp_path / "model"))
    words = [f"model.path={tmp_path / 'model'}", f"data.path={write_chat_data(tmp_path / 'a.jsonl', 16)}"]
    words += ["launcher=slurm", "launcher.preflight=none", "run.device=cpu", "precision=fp32", "run.matmul=blas"]
    words += ["batch.global=4", "budget.steps=2", f"data.cache_dir={tmp_path / 'cache'}", "optim.lr=1e-3,2e-3"]
    words += ["logging.wandb=offline", f"run.dir={tmp_path / 'sweep'}"]
    command = [sys.executable, "-m", "launch.main", "train", "-m", *words]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    said = cluster.on("ctl", *command, cwd=CLONE, env=env).stdout
    (job,) = re.findall(r"submitted job (\d+)", said)
    for task in range(2):
        assert cluster.wait(f"{job}_{task}", 120)["JobState"] == "COMPLETED"
    ids = []
    for point in ("0", "1"):
        record = json.loads((tmp_path / "sweep" / point / "run.json").read_text())
        ids.append(record["outcome"]["progress"]["wandb_id"])
    script = (tmp_path / "sweep/workspace.py").read_text()
    assert f'ws.Metric("ID").isin({sorted(ids)!r})' in script
    assert "COLUMNS = ['lr']" in script and "'Which settings are best?'" in script
