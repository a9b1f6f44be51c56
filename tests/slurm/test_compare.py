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
